"""The rows of a data set on their way through VLMEvalKit's own loop.

The loop (checked: 0.0.20) hands a model one row after the other. Ours knows the data set: it has
the next rows answered together, ahead of the loop, and hands the answers out one by one. So that
the loop's bar and its pickles keep up with what is answered, each process is shown its rows in the
order in which they are answered, those with one picture side by side; what the loop writes at its
end has the file's order.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from vlmeval import inference, inference_video
from vlmeval.inference import FAIL_MSG
from vlmeval.vlm.base import BaseModel

from vlm_prune_ext.errors import InputError, RowError
from vlm_prune_ext.evals.answer import Query, Sizes
from vlm_prune_ext.evals.batch_size import BatchSize
from vlm_prune_ext.evals.feed import Batch, Feeder, Outcome, Row, Stint, by_picture, sample_in
from vlm_prune_ext.evals.vlmeval import PrunedVLM
from vlm_prune_ext.evals.vlmeval_store import exchange, index_of
from vlm_prune_ext.experiment.record import Sample, SampleLog, Stretch
from vlm_prune_ext.experiment.report import say

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_SELDOM = 50
Parts = Mapping[int | str, Mapping[str, str]]
"""Index of a row -> part -> fingerprint."""


class RowModel(BaseModel):
    """What VLMEvalKit drives: has a :class:`PrunedVLM` answer rows and writes each answer down.

    A row whose image or text cannot be used becomes a failed row, with VLMEvalKit's own mark for
    such as its prediction. Settings that fit no row end the run.

    Args:
        load: makes what answers, once the first row that is open comes by.
        dataset: the data set that rows come from.
        parts: fingerprints of its rows.
        log: takes the lines.
        batch_size: see :class:`BatchSize`.
        on_sample: called after every row.
        keep_positions: how many of the first rows say which tokens they kept.
    """

    INTERLEAVE = True

    def __init__(
        self,
        load: Callable[[], PrunedVLM],
        dataset: Any,
        parts: Parts,
        log: SampleLog,
        batch_size: int | str | None = 1,
        on_sample: Callable[[], None] | None = None,
        keep_positions: int = 0,
    ) -> None:
        super().__init__()
        self._keep_positions = keep_positions
        self._load, self._parts = load, parts
        self.dataset, self.log, self.on_sample = dataset, log, on_sample
        self.answered, self._batch_size = 0, batch_size
        self._open: list[int] = []
        self._indices = [index_of(index) for index in dataset.data["index"]]
        self._said: dict[int | str, str] = {}
        self._reading = threading.Lock()
        self.has_videos = getattr(dataset, "MODALITY", "IMAGE") == "VIDEO"
        # Else VLMEvalKit would ask the data set itself, and we would not learn which row it is.
        self._dataset_first = getattr(dataset, "force_use_dataset_prompt", False)
        if self._dataset_first:
            dataset.force_use_dataset_prompt = False

    @cached_property
    def inner(self) -> PrunedVLM:
        """What answers."""
        model = self._load()
        model.set_dump_image(getattr(self.dataset, "dump_image", None))
        model.show(self.dataset)
        self.sizes = Sizes.of(model.model.config)
        self.device = model.processor.device
        self._stint = Stint(model.answerer)
        return model

    def stretch(self, rank: int) -> Stretch | None:
        """What answering took; ``None`` if nothing was answered."""
        return self._stint.stretch(rank) if self.answered else None

    # -- what the loop calls -------------------------------------------------------------------
    def ask(self, places: Sequence[int]) -> None:
        """Say which rows of the data set the loop will come by with, in its order."""
        self._open = list(places)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Always where that is how rows come by; data sets of videos are asked, see
        :class:`_Shown`."""
        return not self.has_videos

    def build_prompt(self, line: Any, dataset: str | None = None) -> int | str:
        """The row's index, for :meth:`generate`."""
        return index_of(line["index"])

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """The answer to the row of this index, or VLMEvalKit's mark for a failed row."""
        while message not in self._said:
            self._write(next(self._batches))
        return self._said.pop(message)

    # -- ahead of it ---------------------------------------------------------------------------
    @cached_property
    def _batches(self) -> Iterator[Batch]:
        # A checkpoint that cannot be loaded is no row's fault.
        answerer = self.inner.answerer
        size = BatchSize(self._batch_size, self.device, together=answerer.together)
        feeder = Feeder(answerer, size)
        return feeder.batches(Row(place, partial(self._query, place)) for place in self._open)

    def close(self) -> None:
        """Stop what works ahead."""
        if "_batches" in self.__dict__:
            self._batches.close()  # type: ignore[attr-defined]

    def _query(self, place: int) -> Query:
        with self._reading:
            line, name = self.dataset.data.iloc[place], self.dataset.dataset_name
        if self.has_videos:
            with self._reading:  # frames are cut out under locks with a limit
                message = self.dataset.build_prompt(line, video_llm=self.inner.VIDEO_LLM)
        elif not self._dataset_first and self.inner.use_custom_prompt(name):
            message = self.inner.build_prompt(line, name)
        else:
            message = self.dataset.build_prompt(line)
        videos = self.dataset.videos_of(line) if hasattr(self.dataset, "videos_of") else []
        return self.inner.query([*videos, *_items(message)], name)

    def _write(self, batch: Batch) -> None:
        """Write a batch down, and keep what its rows' predictions are."""
        warm_up, wrong = self.answered < self._stint.warm_up, list[Exception]()
        samples = []
        for one in batch.outcomes:
            index = self._indices[one.index]
            if one.answer is not None:
                self.answered += 1
                answer = one.answer
                if one.index >= self._keep_positions:
                    answer = replace(answer, kept={}, patches={})
                sample = sample_in(batch, self.sizes, index, answer, warm_up=warm_up)
            elif (error := self._everybodys(index, one)) is not None:
                wrong.append(error)
                continue
            else:
                sample = self._failed(index, one)
            samples.append(replace(sample, row=dict(self._parts.get(index, {}))))
            self._said[index] = sample.prediction
        self.log.add(*samples)
        for _ in samples if self.on_sample is not None else ():
            self.on_sample()  # type: ignore[misc]
        if wrong:
            raise wrong[0]

    def _everybodys(self, index: int | str, one: Outcome) -> Exception | None:
        """The error that ends the run, where a row's is not its own."""
        if isinstance(one.error, OSError) and one.error.errno in _NO_PLACE:
            return InputError(f"Pictures cannot be unpacked ({one.error}).")
        if not one.asked or isinstance(one.error, RowError):
            return None
        if isinstance(one.error, torch.OutOfMemoryError):
            if self.answered:
                return None
            return InputError(  # none will fit
                f"Row {index} does not fit into the memory of the device: a smaller dtype or a "
                "larger device is needed."
            )
        return one.error if isinstance(one.error, Exception) else None

    def _failed(self, index: int | str, one: Outcome) -> Sample:
        reason = one.why
        if isinstance(one.error, torch.OutOfMemoryError):
            reason = "it does not fit into the memory of the device"
        say(f"Row {index} failed: {reason}", error=True)
        return Sample(index, f"{FAIL_MSG} {reason}", failed=reason)


def _items(message: Any) -> list[dict[str, Any]]:
    """A message as a list of items. VLMEvalKit's own way to make one takes text that is the name of
    a file for the file, and fetches text that is an address."""
    items = [message] if isinstance(message, str | dict) else list(message)
    return [{"type": "text", "value": item} if isinstance(item, str) else item for item in items]


# -- the loop ------------------------------------------------------------------------------------
@contextmanager
def shown_in_order(model: RowModel, known: set[int | str], rank: int, world: int) -> Iterator[None]:
    """While this is open, VLMEvalKit's loop sees this process's rows in the order in which they are
    answered, and leaves the GPU's memory alone, which it would hand back after every row.

    Args:
        model: what the loop drives.
        known: indices that have answers.
        rank, world: which process of how many.
    """
    data = model.dataset.data
    places = shares(model._indices, model._parts, known, world)[rank]
    first = {model._indices[place]: place for place in reversed(places)}  # of each index
    open_ = {place for index, place in first.items() if index not in known}
    model.ask([place for place in places if place in open_])
    loop = inference_video if model.has_videos else inference
    theirs = loop.infer_data

    def infer_data(*, dataset: Any, **rest: Any) -> Any:
        return theirs(dataset=_Shown(dataset, data[["index"]].iloc[places], world), **rest)

    with ExitStack() as stack, contextlib.closing(model):
        exchange(stack, loop, "infer_data", infer_data)
        gpu = SimpleNamespace(empty_cache=lambda: None, synchronize=torch.cuda.synchronize)
        exchange(stack, loop, "torch", SimpleNamespace(cuda=gpu))
        yield


def _seldom(dump: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """What the loop writes all its answers with after every tenth row. It takes longer each time,
    and nothing is lost without it, since every answer is in the log: so it is done for a fiftieth
    of the time at most, and at the end.

    Args:
        dump: VLMEvalKit's.
        rows: of the loop.
    """
    ended = took = 0.0

    def write(data: Any, path: str, *args: Any, **options: Any) -> Any:
        nonlocal ended, took
        began = time.perf_counter()
        if not isinstance(data, dict) or len(data) >= rows or began - ended >= _SELDOM * took:
            made = dump(data, path, *args, **options)
            ended = time.perf_counter()
            took = ended - began
            return made
        return None

    return write


class _Shown:
    """A data set of which the loop, which takes every ``world``-th row, finds these. It looks at
    their indices alone; rows with pictures would take it long."""

    def __init__(self, dataset: Any, rows: pd.DataFrame, world: int) -> None:
        self._dataset = dataset
        self.data = rows.iloc[[place for place in range(len(rows)) for _ in range(world)]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def build_prompt(self, place: int, **_: Any) -> int | str:
        """The row's index, as :meth:`RowModel.build_prompt` has it."""
        return index_of(self.data.iloc[place]["index"])

    def __len__(self) -> int:
        return len(self.data)


def shares(
    indices: Iterable[int | str], parts: Parts, known: set[int | str], world: int
) -> list[list[int]]:
    """Places of each process's rows, in the order in which they are answered. Rows with one picture
    are one process's: each picture goes to the process with the fewest open rows so far.

    Args:
        indices: of all rows, in order.
        parts: their fingerprints.
        known: indices that have answers.
        world: processes.
    """
    indices = list(indices)

    def picture(place: int) -> str | None:
        return parts.get(indices[place], {}).get("picture")

    found: list[list[int]] = [[] for _ in range(world)]
    load, mine, last = [0] * world, 0, None
    for place in by_picture(range(len(indices)), picture):
        if (now := picture(place)) is None or now != last:
            mine, last = load.index(min(load)), now
        found[mine].append(place)
        load[mine] += indices[place] not in known
    return found
