"""DyCoke's temporal merging: of a video, what differs from the frames before stays.

Paper: Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models"
(CVPR 2025, arXiv 2411.15024). Code: ``KD-TAO/DyCoke``.

Of the published training-free methods that compare frames this rule is the simplest: it chooses, in
one place, by cosines alone, and how many tokens are left is known beforehand. FrameFusion (arXiv
2501.01986) averages tokens over several layers until a threshold says stop; PruneVid (arXiv
2412.16117) clusters frames into scenes and tokens into groups before it looks at attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_prune_ext.lazy import torch
from vlm_prune_ext.methods.base import FeatureStage, Method, register, say_once
from vlm_prune_ext.methods.evidence import FeatureEvidence
from vlm_prune_ext.methods.option import a_number, option
from vlm_prune_ext.select import unit_rows

WINDOW = 4
"""Frames that are looked at together."""


@register
@dataclass(frozen=True)
class DyCoke(Method):
    """Drop tokens of a video that repeat the same place of an earlier frame, in front of the
    language model.

    Frames go by windows of four. Of the second frame of a window the tokens go that are most like
    the first one's at the same places (cosine of what the language model would be given), a share
    ``pruning_rate`` of them; of the fourth, by the third; of the third, by the first. The first
    frame of each window stays whole: of ``T`` frames (a multiple of four) of ``n`` tokens each,
    ``T / 4 * (n + 3 * floor((1 - pruning_rate) * n))`` tokens are left. Of Qwen's models a frame is
    what stands for a pair of them. Pictures have no frames to compare and keep all their tokens,
    which is said once.

    Deviations: the paper's second part, which exchanges tokens of the KV cache at every decoded
    token, is left out (prefill does not depend on it); every window is treated alike, where the
    published loop leaves the third frame of the last one whole; the last may be shorter, and its
    frames are compared as far as they are there; a rate that leaves no token of a frame leaves one;
    what closes a video (LLaVA-OneVision's newline) stays; every video of every sample of a batch
    decides for itself; ties go to the lower position. No outputs of the published code were at hand
    to compare with: the tests compare with a second, plain writing of the rule above.
    """

    name = "dycoke"
    paper = "arXiv 2411.15024"
    code = "KD-TAO/DyCoke"
    sites = ("features",)
    compares_frames = True

    pruning_rate: float = option(
        0.7,
        a_number(0.0, 0.999, "a number from 0 to 0.999"),
        "K: share of the tokens that goes, of frames that are compared with an earlier one.",
        tag="k",
        always=True,
    )

    def feature_stage(self) -> FeatureStage:
        """On the prompt's tokens, all frames of a video together."""
        return FeatureStage(("projected",), self._rule, over="span")

    def _rule(self, evidence: FeatureEvidence) -> torch.Tensor:
        assert evidence.projected is not None
        tokens, frames = evidence.projected, evidence.frames
        stays = torch.ones_like(tokens[..., 0], dtype=torch.bool)
        if not frames:
            say_once("dycoke compares the frames of videos: pictures keep all of their tokens.")
        starts = [sum(frames[:place]) for place in range(len(frames))]
        for place, earlier in _compared(len(frames)):
            both = min(frames[place], frames[earlier])
            mine = tokens[:, starts[place] : starts[place] + both]
            theirs = tokens[:, starts[earlier] : starts[earlier] + both]
            cosines = (unit_rows(mine) * unit_rows(theirs)).sum(dim=-1)
            least = cosines.sort(dim=1, stable=True).indices[:, : self._left(both)]
            there = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, least, True)
            stays[:, starts[place] : starts[place] + both] = there
        count = int(stays[0].sum())  # the same in all rows
        return (
            stays.int().sort(dim=1, descending=True, stable=True).indices[:, :count].sort().values
        )

    def _left(self, count: int) -> int:
        """Tokens that stay of so many that are compared."""
        left = int((1 - self.pruning_rate) * count)
        if not left:
            said = f"pruning_rate={self.pruning_rate} is above what leaves a token of some frames"
            say_once(f"{said}: these keep one.")
        return max(1, left)


def _compared(frames: int) -> list[tuple[int, int]]:
    """Frames that are compared, each with the earlier one that it is compared with."""
    pairs = []
    for first in range(0, frames, WINDOW):
        behind = ((1, 0), (3, 2), (2, 0))
        pairs += [(first + a, first + b) for a, b in behind if first + a < frames]
    return pairs
