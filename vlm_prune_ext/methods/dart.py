"""DART: keep a few pivots, and beside them what resembles the pivots least.

Paper: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication
Matters More" (EMNLP 2025, arXiv 2502.11494). Code: ``ZichenWen1/DART``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import Evidence, Method, Need, Stage, register, say_once
from vlm_prune_ext.methods.option import a_layer, a_number, an_integer, option, require
from vlm_prune_ext.select import unit_rows


@register
@dataclass(frozen=True)
class DART(Method):
    """Drop visual tokens once, in front of layer ``layer``, by how they duplicate pivots.

    Pivots are the ``pivot_image_token`` visual tokens and the ``pivot_text_token`` tokens of the
    text behind the image whose keys in layer ``layer - 1`` (after rotary embedding) have the
    largest sum of absolute values. One after the other, each picks the same number of visual tokens
    out of those that are neither pivots nor picked: the ones whose states (output of that layer,
    through the decoder's final norm) have the lowest cosine with its own. Pivots and picked tokens
    stay, with their positions: 132 for the published ``max_num_trunction=128``, not 128.

    The order of the pivots matters. It is the published one, that in which CPython lists the set of
    their positions (padding not counted).

    Deviations from the published code, none of which changes a run of one image: every sample and
    image decides for itself; grouped heads count once; a text of fewer tokens than
    ``pivot_text_token`` gives fewer pivots, and fewer tokens stay; a budget above the image keeps
    all of it; pivots are fetched from the device once per image batch, not once each; ties go to
    the lower position.
    """

    name = "dart"
    paper = "arXiv 2502.11494"
    code = "ZichenWen1/DART"
    budget_field = "max_num_trunction"

    layer: int = option(2, a_layer(1), "Layer in front of which tokens go.", tag="k")
    max_num_trunction: int | None = option(
        128,
        replace(an_integer(1).optional(), kind="budget"),
        "Visual tokens that the pivots pick together, rounded down to a multiple of their number; "
        "wins over reduction_ratio. None: reduction_ratio says it.",
        tag="max",
        always=True,
    )
    reduction_ratio: float | None = option(
        None,
        a_number(0.0, 0.999, "a number from 0 to 0.999").optional(),
        "Share of the image's tokens that goes, where max_num_trunction is None.",
        tag="r",
    )
    pivot_image_token: int = option(4, an_integer(1), "Pivots of the image.", tag="p")
    pivot_text_token: int = option(4, an_integer(0), "Pivots of the text behind it.", tag="q")

    def check(self) -> None:
        """One of the two budgets is there, and has an effect."""
        none = self.max_num_trunction is None and self.reduction_ratio is None
        require(not none, "max_num_trunction", None, "a number, where reduction_ratio=None")
        alone = "reduction_ratio" in self._stated and "max_num_trunction" not in self._stated
        unheard = alone and self.reduction_ratio is not None
        accepted = "stated together with max_num_trunction=None, which wins over it otherwise"
        require(not unheard, "reduction_ratio", self.reduction_ratio, accepted)

    def plan(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage."""
        needs: tuple[Need, ...] = ("keys", "tail_keys", "normed", "tail_normed", "positions")
        return (Stage(self.layer, needs, self._rule, left=self._left),)

    def per_pivot(self, total: int) -> int:
        """Tokens that each pivot picks in an image of ``total`` tokens."""
        pivots = self.pivot_image_token + self.pivot_text_token
        if self.max_num_trunction is not None:
            return int(self.max_num_trunction / pivots)
        assert self.reduction_ratio is not None
        return int(total * (1 - self.reduction_ratio) / pivots)

    def _left(self, total: int, now: int) -> int:
        pivots = self.pivot_image_token + self.pivot_text_token
        return min(now, self.pivot_image_token + self.per_pivot(total) * pivots)

    def _rule(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.normed is not None and evidence.tail_normed is not None
        count, each = evidence.count, self.per_pivot(evidence.total)
        wanted = self.pivot_image_token + each * (self.pivot_image_token + self.pivot_text_token)
        if wanted >= count:
            if wanted > count:
                said = f"dart asks for {wanted} visual tokens, more than some images have"
                say_once(f"{said}: these keep them all.")
            return evidence.everything
        image, tail, real = self._pivots(evidence)
        order = _published_order(evidence, image, tail, real)
        states = torch.cat([_at(evidence.normed, image), _at(evidence.tail_normed, tail)], dim=1)
        cosines = unit_rows(states) @ unit_rows(evidence.normed).transpose(1, 2)
        stays = torch.zeros_like(evidence.places, dtype=torch.bool).scatter_(1, image, True)
        return _pick(cosines, stays, order, each)

    def _pivots(self, evidence: Evidence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places of the pivots in image and tail by falling norm, and which of the latter are
        tokens at all; ``(batch, p)``, ``(batch, q)``, bool ``(batch, q)``."""
        assert evidence.keys is not None and evidence.tail_keys is not None
        assert evidence.tail_real is not None
        image = _norms(evidence.keys).sort(dim=1, descending=True, stable=True).indices
        norms = _norms(evidence.tail_keys).masked_fill(~evidence.tail_real, -1.0)
        tail = norms.sort(dim=1, descending=True, stable=True).indices
        image, tail = image[:, : self.pivot_image_token], tail[:, : self.pivot_text_token]
        return image, tail, evidence.tail_real.gather(1, tail)


def _norms(keys: torch.Tensor) -> torch.Tensor:
    """Sum of absolute values over heads, ``(batch, heads, n, head_dim)`` -> ``(batch, n)``."""
    return keys.float().abs().sum(dim=(1, 3))


def _at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


def _published_order(
    evidence: Evidence, image: torch.Tensor, tail: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """In which order pivots pick: int64 ``(batch, p + q)`` indices into image and tail pivots side
    by side; ``-1`` where there is none left."""
    assert evidence.positions is not None and evidence.tail_positions is not None
    text = evidence.tail_positions.gather(1, tail).masked_fill(~real, -1)
    positions = torch.cat([evidence.positions.gather(1, image), text], dim=1)
    orders = []
    for row in positions.tolist():  # one transfer for all
        listed = [row.index(position) for position in {p for p in row if p >= 0}]
        orders.append(listed + [-1] * (len(row) - len(listed)))
    return torch.tensor(orders).to(positions.device)


def _pick(
    cosines: torch.Tensor, stays: torch.Tensor, order: torch.Tensor, each: int
) -> torch.Tensor:
    """What stays once every pivot has picked ``each`` tokens, bool ``(batch, n)``.

    Args:
        cosines: ``(batch, pivots, n)``.
        stays: bool ``(batch, n)``, the image's own pivots.
        order: int64 ``(batch, pivots)``, ``-1`` for none.
        each: at most the number of tokens that are left.
    """
    n = cosines.shape[2]
    for turn in order.unbind(dim=1):
        row = cosines.gather(1, turn.clamp(min=0)[:, None, None].expand(-1, 1, n))[:, 0]
        free = row.masked_fill(stays, float("inf"))
        lowest = free.sort(dim=1, stable=True).indices[:, :each]
        picked = torch.zeros_like(stays).scatter_(1, lowest, True)
        stays = stays | (picked & (turn >= 0)[:, None])
    return stays
