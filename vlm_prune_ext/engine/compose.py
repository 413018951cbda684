"""Between tower and language model: a rule's choice, and the prompt that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from vlm_prune_ext.engine.layout import Layout, sent, take
from vlm_prune_ext.engine.parts import Joint, ModelParts, Undo, VisionParts
from vlm_prune_ext.engine.prompt import DecoderInput, Image
from vlm_prune_ext.engine.state import Shortened, images_left
from vlm_prune_ext.engine.tower import Seen, Watch, read_addresses, watch_on
from vlm_prune_ext.engine.trace import Trace
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.base import Method, say_once
from vlm_prune_ext.methods.evidence import CLS, FeatureEvidence, FeatureStage, NewTokens

Answer = torch.Tensor | NewTokens
MERGES = (
    "merges features in front of the projector, and this model's projector makes one token of "
    "several patches: methods that choose among tokens (DivPrune, FasterVLM, VisPruner, SCOPE, "
    "HoloV) or work in the language model apply."
)
_READ = {
    "attention": "attention",
    "features": "features of patches",
    "keys": "keys",
    "last": "queries and keys of the last layer",
    "joint": "the space shared with its text half",
}


@dataclass
class Row:
    """What a rule chooses from at a time.

    Attributes:
        picture: index of the image in the prompt.
        tiles: of the tower's output: one crop, or all of the picture; empty: the prompt's tokens.
        crops: tiles that the picture has.
        length: tokens to choose from.
        grid: their rows and columns, where they are one.
        frames: tokens of each frame, where it is a whole video.
    """

    picture: int
    tiles: list[int]
    crops: int
    length: int
    grid: tuple[int, int] | None = None
    frames: tuple[int, ...] = ()


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
        self.codes, factors = read_addresses(self.embeds)
        self.where = self.codes.cpu()
        if not seen.projected or int(self.where.max()) < 0:
            raise InputError(
                "The image features of this prompt did not come from the vision tower: call the "
                "model with pixel values while a method chooses among them."
            )
        projected = seen.all("projected")
        self.of_all_tiles, self.patches = projected.shape[:2]
        flat = projected.flatten(0, 1).to(self.embeds)
        inside = (self.codes >= 0)[..., None]
        factor = torch.where(inside, factors[..., None], 1.0).to(flat)
        self.embeds = torch.where(inside, flat[self.codes.clamp(min=0)] * factor, self.embeds)
        for index, image in enumerate(self.images):
            span = self.where[image.sample, image.slots]
            self.tiles[index] = (span[span >= 0] // self.patches).unique().tolist()

    def rows(self, over: str) -> list[Row]:
        """What the rule chooses from, in order."""
        made = []
        for index, (image, tiles) in enumerate(zip(self.images, self.tiles, strict=True)):
            crops = max(1, len(tiles))
            if over == "span" or self.seen is None or self.seen.packed:
                grid = None if image.frames else self._grid_of(image)
                made.append(Row(index, [], 1, image.length, grid, image.frames))
            elif over == "picture":
                made.append(Row(index, tiles, crops, self.patches * crops))
            else:
                grid = _square(self.patches)
                made += [Row(index, [tile], crops, self.patches, grid) for tile in tiles]
        return made

    def _grid_of(self, image: Image) -> tuple[int, int] | None:
        """Rows and columns of an image's tokens: by positions of several axes, else a square."""
        positions = self.given.positions
        if positions is None or positions.dim() < 3:
            return _square(image.length)
        span = positions[-2:, image.sample, image.slots]
        rows, columns = (len(axis.unique()) for axis in span)
        return (rows, columns) if rows * columns == image.length else None

    def of(self, name: str, rows: Sequence[Row]) -> torch.Tensor:
        """A noted tensor of some rows, ``(rows, ...)``; several tiles of a row side by side along
        the patches."""
        if not rows[0].tiles:
            return self._of_spans(name, [self.images[row.picture] for row in rows])
        assert self.seen is not None
        whole = self._by_token(name, self.seen.all(name))
        tiles = [tile for row in rows for tile in row.tiles]
        if tiles != list(range(len(whole))):
            whole = whole[torch.tensor(tiles, device=whole.device)]
        crops = len(rows[0].tiles)
        if crops == 1:
            return whole
        parted = whole.unflatten(0, (len(rows), crops))
        dim = -1 if name == "attention" else -2  # along which patches stand
        return torch.cat(parted.unbind(1), dim=dim)

    def _of_spans(self, name: str, images: list[Image]) -> torch.Tensor:
        source = self.embeds if name == "projected" else self.codes
        spans = [source[i.sample, i.slots] for i in images]
        if name == "projected":
            return torch.stack(spans)
        assert self.seen is not None
        whole, index = self.seen.all(name)[0], torch.stack(spans)
        return whole[:, index].transpose(0, 1) if name == "attention" else whole[index]

    def _by_token(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Where the projector joins squares of patches into a token: their means."""
        if name in ("projected", "kept", "last_queries"):
            return whole
        along = whole.shape[-1 if name == "attention" else -2]
        if along in (self.patches, self.patches + 1):  # with CLS
            return whole
        if name not in ("attention", "features"):
            raise InputError(f"The method {MERGES}")
        if name == "features" and math.isqrt(along - 1) ** 2 == along - 1:
            return torch.cat([whole[:, :1], self._by_token(name, whole[:, 1:])], dim=1)
        fine, coarse = math.isqrt(along), math.isqrt(self.patches)
        if coarse**2 != self.patches or fine**2 != along or fine % coarse:
            raise InputError(
                f"The model makes {self.patches} visual tokens of {along} patches: it is not known "
                "which belong together."
            )
        grid = whole if name == "attention" else whole.transpose(-1, -2)
        pooled = F.avg_pool2d(grid.unflatten(-1, (fine, fine)).float(), fine // coarse).flatten(-2)
        return pooled if name == "attention" else pooled.transpose(-1, -2)


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


class FeatureSite:
    """Carries a :class:`FeatureStage` out.

    Args:
        stage: what to choose; ``None``: the tower itself chose.
        watch: on the tower; ``None``: the rule needs the tokens of the prompt only.
        trace: to be written to.
        joint: the joint space of image and question, where the rule needs it.
    """

    def __init__(
        self,
        stage: FeatureStage | None,
        watch: Watch | None,
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
        self.trace.merged.clear()
        if self.stage is not None:
            self.trace.vision_kept.clear()

    def attach(self) -> list[Undo]:
        """Register all hooks; the returned callables take them off."""
        undos = [] if self.watch is None else self.watch.attach()
        return undos + ([] if self.joint is None else self.joint.attach())

    def shorten(self, given: DecoderInput, images: list[Image]) -> Shortened:
        """The prompt as the rule leaves it: with its features in place, and without the others.

        Args:
            given: what the decoder was called with.
            images: its images.
        """
        features = Features(given, images, None if self.watch is None else self.watch.take())
        stage = self.stage
        rows = features.rows("crop" if stage is None else stage.over)
        composer = Composer(features, rows, self._project, stage is None or stage.row_ends)
        for group in _alike(rows):
            if stage is None:
                composer.add(group, features.of("kept", group))
            else:
                evidence = self._evidence(stage, features, group)
                with torch.set_grad_enabled(stage.merges and torch.is_grad_enabled()):
                    answer = stage.rule(evidence)
                composer.add(group, answer)
        if stage is not None:
            self.trace.vision_attention = self.attention
            layer = -1 if self.watch is None else self.watch.feature_layer
            self.trace.vision_kept[layer] = composer.kept()
            self.trace.merged[-1] = composer.added
        return composer.shortened()

    @property
    def attention(self) -> Literal["cls", "received"] | None:
        """See :attr:`Trace.vision_attention`."""
        needs = () if self.stage is None else self.stage.needs
        if self.watch is None or not {"attention", "last"} & set(needs):
            return None
        return "cls" if self.watch.cls else "received"

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.watch is not None
        return self.watch.project(rows)

    def _evidence(
        self, stage: FeatureStage, features: Features, rows: list[Row]
    ) -> FeatureEvidence:
        cls = self.watch is not None and self.watch.cls
        found: dict[str, Any] = {}
        for need in stage.needs:
            if need == "last":
                found["last_keys"] = features.of("last_keys", rows)
                found["last_queries"] = features.of("last_queries", rows)
            elif need == "joint":
                found |= self._joint(features, rows, cls)
            else:
                found[need] = features.of(need, rows)
        found = {name: tensor.to(features.embeds.device) for name, tensor in found.items()}
        first = rows[0]
        return FeatureEvidence(first.length, first.crops, first.grid, cls, first.frames, **found)

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


def feature_site(
    parts: ModelParts,
    method: Method,
    stage: FeatureStage,
    trace: Trace,
    watch: Callable[[VisionParts, tuple[str, ...]], Watch] = watch_on,
) -> FeatureSite:
    """What carries a method's feature stage out.

    Args:
        parts, method, stage, trace: of the model, what to do, and what to write to.
        watch: makes what notes the rule's needs, for towers that are not of transformers.

    Raises:
        InputError: the model lacks what the stage needs.
    """
    vision = parts.vision
    if stage.over == "span" or (stage.needs == ("projected",) and vision is None):
        return FeatureSite(stage, None, trace)
    if vision is None or vision.projector is None:
        what = " and ".join(_READ[need] for need in stage.needs if need in _READ)
        raise InputError(
            f"{method.name} reads {what} of the vision tower: {parts.why_no_vision}, and so does "
            "DivPrune, which reads the visual tokens alone."
        )
    if vision.packed is not None and {"keys", "last"} & set(stage.needs):
        raise InputError(f"{method.name} {MERGES}")
    joint = None
    if "joint" in stage.needs:
        if parts.joint is None:
            raise InputError(f"{method.name} needs a CLIP text tower: {parts.why_no_vision}.")
        joint = parts.joint(stage.text_tower)
    site = FeatureSite(stage, watch(vision, stage.needs), trace, joint)
    if site.attention == "received":
        say_once(
            f"{method.name}: {type(vision.tower).__name__} has no CLS token; the mean attention "
            "that patches receive from all patches stands in for that of CLS."
        )
    return site


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Rows that a rule can be shown as one batch."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.length, row.crops, row.grid, row.frames), []).append(row)
    return list(groups.values())


class Composer:
    """Makes the shorter prompt of a rule's answers.

    Args:
        features: the prompt.
        rows: all that the rule chooses from, in order.
        project: tower features ``(rows, t, C)`` to tokens ``(rows, t, D)``.
        row_ends: see :class:`FeatureStage`.

    Attributes:
        added: most tokens that a row got which are no patch of the tower.
    """

    def __init__(self, features: Features, rows: list[Row], project: Any, row_ends: bool) -> None:
        self.features, self.project, self.row_ends = features, project, row_ends
        self.added = 0
        self.embeds = features.embeds
        # Everything but images stays; of images, what an answer names.
        self.stays = torch.ones(self.embeds.shape[:2], dtype=torch.bool)
        for image in features.images:
            self.stays[image.sample, image.slots] = False
        self.stays = self.stays.to(self.embeds.device)
        self._number = {id(row): number for number, row in enumerate(rows)}
        self._kept: list[torch.Tensor | None] = [None] * len(rows)

    def _in_place(self, rows: list[Row], answer: NewTokens) -> bool:
        """Whether tokens that stand for places stay there, whatever order they were named in: where
        positions or text between a picture's tokens say where in it they are."""
        stand = answer.rows is None or answer.projected
        broken = any(self.features.images[row.picture].runs for row in rows)
        return self.row_ends or (stand and (self._several_axes or broken))

    @property
    def _several_axes(self) -> bool:
        """Whether positions say where in the picture a token stands; they are kept then."""
        positions = self.features.given.positions
        return positions is not None and positions.dim() > 2

    def add(self, rows: list[Row], answer: Answer) -> None:
        """What the rule answered for some rows: all rows of a picture come at once."""
        device = self.stays.device  # a model may be spread over several
        if isinstance(answer, torch.Tensor):
            kept = answer = answer.to(device)
        else:
            answer = replace(answer, places=answer.places.to(device))
            kept = answer.kept
        for row, one in zip(rows, kept, strict=True):
            self._kept[self._number[id(row)]] = one
        if isinstance(answer, NewTokens):
            self.added = max(self.added, answer.added)
            if self._in_place(rows, answer):
                self._write_in_place(rows, answer)
            else:
                self._write(rows, answer)
        elif rows[0].tiles:
            self._keep_patches(rows, answer)
        else:
            self._keep_tokens(rows, answer)

    def _keep_tokens(self, rows: list[Row], places: torch.Tensor) -> None:
        """Tokens of the prompt itself, ``places`` ``(rows, k)`` in their images."""
        self.stays[self._slots(rows, places)] = True

    def _slots(self, rows: list[Row], places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples ``(rows, 1)`` and slots ``(rows, k)`` of places in images."""
        images = [self.features.images[row.picture] for row in rows]
        samples = sent([[image.sample] for image in images], places.device)
        return samples, sent([image.slots for image in images], places.device).gather(1, places)

    def _keep_patches(self, rows: list[Row], places: torch.Tensor) -> None:
        """Patches stay where the model packed them; padding that it cut off is gone."""
        chooser, place, mine = self._owners(rows, places.device)
        keep = torch.zeros(len(rows), rows[0].length, dtype=torch.bool, device=places.device)
        self.stays |= mine & keep.scatter(1, places, True)[chooser, place]

    def _owners(
        self, rows: list[Row], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each token of the prompt: the row that it belongs to, its place there, and whether it
        is a patch at all, ``(batch, S)`` each. Row-end tokens are seen to here."""
        features = self.features
        owner = torch.full(self.stays.shape, -1)
        table = torch.zeros(2, len(features.images), features.of_all_tiles, dtype=torch.int64)
        for number, row in enumerate(rows):
            image = features.images[row.picture]
            owner[image.sample, image.slots] = row.picture
            table[0, row.picture, row.tiles] = number
            table[1, row.picture, row.tiles] = torch.arange(len(row.tiles)) * features.patches
        codes, owner = features.codes, owner.to(device)
        mine = (codes >= 0) & (owner >= 0)
        if self.row_ends:
            self.stays |= (codes < 0) & (owner >= 0)
        tile, place = codes.clamp(min=0) // features.patches, codes.clamp(min=0) % features.patches
        chooser, first = table.to(device)[:, owner.clamp(min=0), tile]
        return chooser, first + place, mine

    def _write_in_place(self, rows: list[Row], answer: NewTokens) -> None:
        """Tokens take the places that they stand for."""
        tokens, places = self._tokens(rows, answer), answer.places
        if not rows[0].tiles:
            self._keep_tokens(rows, places)
            samples, slots = self._slots(rows, places)
            self.embeds = self.embeds.index_put((samples, slots), tokens)
            return
        chooser, place, mine = self._owners(rows, places.device)
        index = places.new_full((len(rows), rows[0].length), -1)
        column = torch.arange(places.shape[1], device=places.device).expand_as(places)
        which = index.scatter(1, places, column)[chooser, place]
        here = mine & (which >= 0)
        chosen = tokens[chooser, which.clamp(min=0)]
        self.embeds = torch.where(here[..., None], chosen, self.embeds)
        self.stays |= here

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
            slots += image.slots[: len(mine)]
        device = tokens.device
        at, slot = sent(samples, device), sent(slots, device)
        if self.embeds is self.features.embeds:
            self.embeds = self.embeds.clone()
        self.embeds[at, slot] = tokens.flatten(0, 1)[sent(source, device)]
        self.stays[at, slot] = True

    def _tokens(self, rows: list[Row], answer: NewTokens) -> torch.Tensor:
        """``(rows, t, D)``."""
        if answer.rows is None:
            made = take(self.features.of("projected", rows), answer.places, -2)
        else:
            made = answer.rows if answer.projected else self.project(answer.rows)
        return made.to(self.embeds)

    def _order(self, rows: list[Row], answer: NewTokens) -> dict[int, list[int]]:
        """Picture -> which of the answer's tokens it becomes, ``row * t + token``."""
        width = answer.places.shape[1]
        counts = answer.counts or (width,) * len(rows)
        order: dict[int, list[int]] = {}
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            mine = order.setdefault(row.picture, [])
            mine += range(number * width, number * width + count)
        if rows[0].tiles and rows[0].crops > len(rows[0].tiles):
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
        span = features.where[image.sample, image.slots].tolist()
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
        return torch.stack([F.pad(r, (0, width - len(r)), value=-1) for r in rows])

    def shortened(self) -> Shortened:
        """The prompt that enters layer 0."""
        given = replace(self.features.given, embeds=self.embeds, ids=None)
        held = self.stays.sum(dim=1).tolist()
        layout, _ = Layout.whole(given.batch, given.length, given.device).drop(self.stays, held)
        images = images_left(self.features.images, self.stays)
        if self._several_axes:
            assert given.positions is not None
            lost = torch.zeros(given.batch, 1, dtype=torch.int64, device=given.device)
            kept = take(given.positions, layout.slots, -1)
            return Shortened(given, layout, layout.kept(), kept, lost, images, held)
        lost = sent([[given.length - count] for count in held], given.device)
        positions = layout.counted_anew(given.real).positions
        assert positions is not None
        return Shortened(given, layout, None, positions, lost, images, held)
