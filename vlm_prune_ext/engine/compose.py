"""Between tower and language model: a rule's choice, and the prompt that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlm_prune_ext.engine.features import Seen, TowerWatch, read_addresses
from vlm_prune_ext.engine.layout import Layout, sent, take
from vlm_prune_ext.engine.parts import Joint, ModelParts, Undo
from vlm_prune_ext.engine.shorten import DecoderInput, Shortened, count_anew
from vlm_prune_ext.engine.spans import Image
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.evidence import CLS, FeatureEvidence, FeatureStage, NewTokens

Answer = torch.Tensor | NewTokens


@dataclass
class Row:
    """What a rule chooses from at a time.

    Attributes:
        picture: index of the image in the prompt.
        tiles: of the tower's output: one crop, or all of the picture; empty: the prompt's tokens.
        crops: tiles that the picture has.
        length: tokens to choose from.
    """

    picture: int
    tiles: list[int]
    crops: int
    length: int


class Features:
    """The prompt's features: where they stand, and what is known of them.

    Args:
        given: what the decoder was called with.
        images: its images.
        seen: what the tower gave; ``None``: the tokens themselves will do.

    Attributes:
        embeds: ``(batch, S, D)``, the prompt with its features in place.
        codes: int64 ``(batch, S)``, ``tile * N + place`` of each token, -1: none; on the device and
            (``where``) on the CPU.
        tiles: tiles of each image, ascending (the first one is the overview).
        of_all_tiles, patches: tiles of the tower's output, and N, patches of each.

    Raises:
        InputError: features that did not come from the tower in this call.
    """

    def __init__(self, given: DecoderInput, images: list[Image], seen: Seen | None) -> None:
        self.given, self.images, self.seen = given, images, seen
        self.embeds = given.embedded()
        self.tiles: list[list[int]] = [[] for _ in images]
        self.of_all_tiles = self.patches = 0
        if seen is not None:
            self._locate(seen)

    def _locate(self, seen: Seen) -> None:
        self.codes = read_addresses(self.embeds)
        self.where = self.codes.cpu()
        if not seen.projected or int(self.where.max()) < 0:
            raise InputError(
                "The image features of this prompt did not come from the vision tower: call the "
                "model with pixel values while a method chooses among them."
            )
        projected = seen.all("projected")
        self.of_all_tiles, self.patches = projected.shape[:2]
        flat = projected.flatten(0, 1).to(self.embeds)
        inside = self.codes >= 0
        self.embeds = torch.where(inside[..., None], flat[self.codes.clamp(min=0)], self.embeds)
        for index, image in enumerate(self.images):
            span = self.where[image.sample, image.start : image.start + image.length]
            self.tiles[index] = (span[span >= 0] // self.patches).unique().tolist()

    def rows(self, over: str) -> list[Row]:
        """What the rule chooses from, in order."""
        made = []
        for index, (image, tiles) in enumerate(zip(self.images, self.tiles, strict=True)):
            crops = max(1, len(tiles))
            if over == "span":
                made.append(Row(index, [], crops, image.length))
            elif over == "picture":
                made.append(Row(index, tiles, crops, self.patches * crops))
            else:
                made += [Row(index, [tile], crops, self.patches) for tile in tiles]
        return made

    def of(self, name: str, rows: Sequence[Row]) -> torch.Tensor:
        """A noted tensor of some rows, ``(rows, ...)``; several tiles of a row side by side along
        the patches."""
        if not rows[0].tiles:
            spans = [self.images[row.picture] for row in rows]
            return torch.stack([self.embeds[s.sample, s.start : s.start + s.length] for s in spans])
        assert self.seen is not None
        whole = self.seen.all(name)
        tiles = [tile for row in rows for tile in row.tiles]
        if tiles != list(range(len(whole))):
            whole = whole[torch.tensor(tiles, device=whole.device)]
        crops = len(rows[0].tiles)
        if crops == 1:
            return whole
        parted = whole.unflatten(0, (len(rows), crops))
        dim = -1 if name == "attention" else -2  # along which patches stand
        return torch.cat(parted.unbind(1), dim=dim)


class FeatureSite:
    """Carries a :class:`FeatureStage` out.

    Args:
        stage: what to choose.
        watch: on the tower; ``None``: the rule needs the tokens of the prompt only.
        trace: to be written to.
        joint: the joint space of image and question, where the rule needs it.
    """

    def __init__(
        self,
        stage: FeatureStage,
        watch: TowerWatch | None,
        trace: Trace,
        joint: Joint | None = None,
    ) -> None:
        self.stage, self.watch, self.trace, self.joint = stage, watch, trace, joint

    @property
    def works_in_tower(self) -> bool:
        """Whether there are hooks elsewhere than on the decoder."""
        return self.watch is not None or self.joint is not None

    def forget(self) -> None:
        """Another prompt begins."""
        self.trace.vision_kept.clear()
        self.trace.merged.clear()

    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        undos = [] if self.watch is None else self.watch.attach()
        return undos + ([] if self.joint is None else self.joint.attach())

    @torch.no_grad()
    def shorten(self, given: DecoderInput, images: list[Image]) -> Shortened:
        """The prompt as the rule leaves it: with its features in place, and without the others.

        Args:
            given: what the decoder was called with.
            images: its images.
        """
        features = Features(given, images, None if self.watch is None else self.watch.take())
        rows = features.rows(self.stage.over)
        composer = Composer(features, rows, self._project)
        for group in _alike(rows):
            composer.add(group, self.stage.rule(self._evidence(features, group)))
        layer = -1 if self.watch is None else self.watch.feature_layer
        self.trace.vision_kept[layer] = composer.kept()
        self.trace.merged[-1] = composer.added
        return composer.shortened()

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.watch is not None
        return self.watch.project(rows)

    def _evidence(self, features: Features, rows: list[Row]) -> FeatureEvidence:
        cls = self.watch is not None and self.watch.parts.cls
        found: dict[str, Any] = {}
        for need in self.stage.needs:
            if need == "last":
                found["last_keys"] = features.of("last_keys", rows)
                found["last_queries"] = features.of("last_queries", rows)
            elif need == "joint":
                found |= self._joint(features, rows, cls)
            else:
                found[need] = features.of(need, rows)
        return FeatureEvidence(rows[0].length, rows[0].crops, cls, **found)

    def _joint(self, features: Features, rows: list[Row], cls: bool) -> dict[str, torch.Tensor]:
        assert self.joint is not None
        patches = features.of("features", rows)[:, int(cls) :]
        texts, segments = self.joint.texts(features.given.batch)
        samples = [features.images[row.picture].sample for row in rows]
        return {
            "image_embeds": self.joint.images(patches),
            "text_embeds": texts[samples],
            "segments": segments[samples],
        }


def feature_site(parts: ModelParts, method: Method, trace: Trace) -> FeatureSite | None:
    """What carries a method's feature stage out; ``None`` where it has none.

    Raises:
        InputError: the model lacks what the stage needs.
    """
    stage = method.feature_stage()
    if stage is None:
        return None
    if stage.over == "span":
        return FeatureSite(stage, None, trace)
    vision = parts.vision
    if vision is None or vision.projector is None:
        raise InputError(f"{method.name} chooses by its vision tower: {parts.why_no_vision}.")
    joint = None
    if "joint" in stage.needs:
        if parts.joint is None:
            raise InputError(f"{method.name} needs a CLIP text tower: {parts.why_no_vision}.")
        joint = parts.joint(stage.text_tower)
    return FeatureSite(stage, TowerWatch(vision, stage.needs), trace, joint)


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Rows that a rule can be shown as one batch."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.length, row.crops), []).append(row)
    return list(groups.values())


class Composer:
    """Makes the shorter prompt of a rule's answers.

    Args:
        features: the prompt.
        rows: all that the rule chooses from, in order.
        project: tower features ``(rows, t, C)`` to tokens ``(rows, t, D)``.

    Attributes:
        added: most tokens that a row got which are no patch of the tower.
    """

    def __init__(self, features: Features, rows: list[Row], project: Any) -> None:
        self.features, self.rows, self.project = features, rows, project
        self.added = 0
        self.embeds = features.embeds
        # Everything but images stays; of images, what an answer names.
        self.stays = torch.ones(self.embeds.shape[:2], dtype=torch.bool)
        for image in features.images:
            self.stays[image.sample, image.start : image.start + image.length] = False
        self.stays = self.stays.to(self.embeds.device)
        self._number = {id(row): number for number, row in enumerate(rows)}
        self._kept: list[torch.Tensor | None] = [None] * len(rows)

    def add(self, rows: list[Row], answer: Answer) -> None:
        """What the rule answered for some rows: all rows of a picture come at once."""
        kept = answer if isinstance(answer, torch.Tensor) else answer.kept
        for row, one in zip(rows, kept, strict=True):
            self._kept[self._number[id(row)]] = one
        if isinstance(answer, NewTokens):
            self.added = max(self.added, answer.added)
            self._write(rows, answer)
        elif rows[0].tiles:
            self._keep_patches(rows, answer)
        else:
            self._keep_tokens(rows, answer)

    def _keep_tokens(self, rows: list[Row], places: torch.Tensor) -> None:
        """Tokens of the prompt itself, ``places`` ``(rows, k)`` in their images."""
        images = [self.features.images[row.picture] for row in rows]
        samples, starts = sent([[i.sample, i.start] for i in images], places.device).unbind(1)
        self.stays[samples[:, None], starts[:, None] + places] = True

    def _keep_patches(self, rows: list[Row], places: torch.Tensor) -> None:
        """Patches stay where the model packed them; padding that it cut off is gone."""
        features, device = self.features, places.device
        owner = torch.full(self.stays.shape, -1)
        table = torch.full((len(features.images), features.of_all_tiles), 0)
        for number, row in enumerate(rows):
            image = features.images[row.picture]
            owner[image.sample, image.start : image.start + image.length] = row.picture
            table[row.picture, row.tiles[0]] = number
        keep = torch.zeros(len(rows), features.patches, dtype=torch.bool, device=device)
        keep.scatter_(1, places, True)
        codes, owner = features.codes, owner.to(device)
        mine = (codes >= 0) & (owner >= 0)
        tile, place = codes.clamp(min=0) // features.patches, codes.clamp(min=0) % features.patches
        chooser = table.to(device)[owner.clamp(min=0), tile]
        self.stays |= mine & keep[chooser, place]

    def _write(self, rows: list[Row], answer: NewTokens) -> None:
        """Tokens in an order of their own take the first places of their image."""
        tokens = self._tokens(rows, answer)
        order = self._order(rows, answer)
        source: list[int] = []
        samples: list[int] = []
        slots: list[int] = []
        for picture, mine in order.items():
            image = self.features.images[picture]
            if len(mine) > image.length:
                raise InputError(
                    f"The method answers {len(mine)} tokens for an image of {image.length} visual "
                    "tokens: a lower budget is needed."
                )
            source += mine
            samples += [image.sample] * len(mine)
            slots += range(image.start, image.start + len(mine))
        device = tokens.device
        at, slot = sent(samples, device), sent(slots, device)
        if self.embeds is self.features.embeds:
            self.embeds = self.embeds.clone()
        self.embeds[at, slot] = tokens.flatten(0, 1)[sent(source, device)].to(self.embeds)
        self.stays[at, slot] = True

    def _tokens(self, rows: list[Row], answer: NewTokens) -> torch.Tensor:
        """``(rows, t, D)``."""
        if answer.rows is not None:
            return self.project(answer.rows)
        return take(self.features.of("projected", rows), answer.places, -2)

    def _order(self, rows: list[Row], answer: NewTokens) -> dict[int, list[int]]:
        """Picture -> which of the answer's tokens it becomes, ``row * t + token``."""
        width = answer.places.shape[1]
        counts = answer.counts or (width,) * len(rows)
        order: dict[int, list[int]] = {}
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            mine = order.setdefault(row.picture, [])
            mine += range(number * width, number * width + count)
        if rows[0].crops > len(rows[0].tiles):
            places = answer.places.flatten().tolist()
            tiles = [row.tiles[0] for row in rows]
            for picture, mine in order.items():
                order[picture] = self._as_mosaic(picture, mine, places, tiles, width)
        return order

    def _as_mosaic(
        self, picture: int, mine: list[int], places: list[int], tiles: list[int], width: int
    ) -> list[int]:
        """The overview's tokens; patches of the other crops where the model packed them (padding
        that it cut off is gone); their CLS tokens; what is merged."""
        features = self.features
        image, overview = features.images[picture], features.tiles[picture][0]
        span = features.where[image.sample, image.start : image.start + image.length].tolist()
        slot = {code: index for index, code in enumerate(span) if code >= 0}
        keys: dict[int, tuple[int, int]] = {}
        for index, token in enumerate(mine):
            tile, place = tiles[token // width], places[token]
            if tile == overview:
                keys[token] = (0, index)
            elif place < 0:
                keys[token] = (2 if place == CLS else 3, index)
            elif tile * features.patches + place in slot:
                keys[token] = (1, slot[tile * features.patches + place])
        return sorted(keys, key=keys.__getitem__)

    def kept(self) -> torch.Tensor:
        """Int64 ``(rows, k)`` of all rows in order, -1 where a row kept fewer."""
        rows = [row for row in self._kept if row is not None]
        width = max(len(row) for row in rows)
        return torch.stack(
            [torch.nn.functional.pad(r, (0, width - len(r)), value=-1) for r in rows]
        )

    def shortened(self) -> Shortened:
        """The prompt that enters layer 0."""
        given = replace(self.features.given, embeds=self.embeds, ids=None)
        until = self.stays.cpu().cumsum(dim=1)
        held = until[:, -1].tolist()
        layout, _ = Layout.whole(given.batch, given.length, given.device).drop(self.stays, held)
        images = _images_left(self.features.images, until, max(held))
        positions = given.positions
        if positions is not None and positions.dim() > 2:
            # Several axes say where in the picture a token stood: kept, as after any drop.
            lost = torch.zeros(given.batch, 1, dtype=torch.int64, device=given.device)
            kept = take(positions, layout.slots, -1)
            return Shortened(given, layout, layout.kept(), kept, lost, images, held)
        lost = sent([[given.length - count] for count in held], given.device)
        return Shortened(given, layout, None, count_anew(layout, given), lost, images, held)


def _images_left(images: list[Image], until: torch.Tensor, width: int) -> list[Image]:
    """Where images are in the shorter prompt; ``until`` ``(batch, S)``: tokens left up to each."""
    left = []
    for image in images:
        row = until[image.sample]
        before = int(row[image.start - 1]) if image.start else 0
        count = int(row[image.start + image.length - 1]) - before
        if count:
            left.append(Image(image.sample, width - int(row[-1]) + before, count))
    return left
