"""Rows in, answers out: what every evaluation feeds its model with.

Threads make queries ahead of the model: rows are read, pictures opened, padded, resized and turned
into tensors, texts into tokens. Enough of that lets go of the interpreter's lock for a few threads,
which share what processes would have to send each other. Rows with one picture go together
whatever the order of the file, rows of similar length share a batch, and what is prepared and not
answered yet is bounded, however many rows there are. A row that cannot be prepared or answered
fails alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import torch

from vlm_prune_ext.errors import InputError, reason_of
from vlm_prune_ext.evals.answer import Answer, Answerer, Planned, Query, Sizes
from vlm_prune_ext.evals.batch_size import BatchSize
from vlm_prune_ext.experiment import host, measure
from vlm_prune_ext.experiment.record import Sample, Stretch
from vlm_prune_ext.models.clips import ReadyClip
from vlm_prune_ext.models.images import ImageLike, ReadyImage, digest_of

T = TypeVar("T")

_WINDOW = 4  # batches whose rows are put in order of length together
_ROOM = 1 << 30  # bytes that pictures prepared ahead take, about, and those that are kept
# Seconds after which a thread that computes lets another have the interpreter. At Python's own 5 ms
# the model's thread, which gives it up at each kernel that it launches, waits longer than it works.
_SWITCH = 0.0002
# More would not prepare more, which takes the interpreter for half of the time, but each stands in
# the model's way when that wants it.
_THREADS = 3
_PICTURES = 64  # pictures that are kept, the newest, as far as there is room for them


@dataclass(frozen=True)
class Row:
    """A row to be answered.

    Attributes:
        index: names it.
        make: makes its query, in a thread; what it raises is the row's failure.
    """

    index: Any
    make: Callable[[], Query]


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
        index: the row's.
        answer: ``None``: there is none.
        error: why.
        asked: whether the model was asked; otherwise the query could not be made.
    """

    index: Any
    answer: Answer | None = None
    error: BaseException | None = None
    asked: bool = False

    @property
    def why(self) -> str:
        """The error, in one line."""
        return reason_of(self.error) if self.error is not None else ""


@dataclass(frozen=True)
class Batch:
    """Rows that are done. Those that were answered together: ``size``, in ``seconds``, from the
    moment they were asked for."""

    outcomes: list[Outcome]
    seconds: float
    size: int


class Pictures:
    """Pictures by content, each opened and prepared once; the newest stay.

    Args:
        ready: opens and prepares one.
    """

    def __init__(self, ready: Callable[[ImageLike], ImageLike]) -> None:
        self._ready, self._lock = ready, threading.Lock()
        self._kept: OrderedDict[str, Future[ImageLike]] = OrderedDict()

    def open(self, image: ImageLike) -> tuple[ImageLike, str]:
        """A prepared picture and its digest. Threads that want one picture wait for the first."""
        digest = digest_of(image)
        with self._lock:
            made = self._kept.get(digest)
            mine = made is None
            if made is None:
                made = self._kept[digest] = Future()
            self._kept.move_to_end(digest)
            while mine and len(self._kept) > 1 and self._too_many():
                self._kept.popitem(last=False)
        if mine:
            try:
                made.set_result(self._ready(image))
            except BaseException as error:
                made.set_exception(error)
        return made.result(), digest

    def _too_many(self) -> bool:
        """By number, or by the bytes of those that are made (videos are large)."""
        made = (one for one in self._kept.values() if one.done() and one.exception() is None)
        return len(self._kept) > _PICTURES or sum(_bytes_of(one.result()) for one in made) > _ROOM


@dataclass
class _Prepared:
    """A row whose query is made, or why it is not."""

    row: Row
    query: Query | None = None
    error: BaseException | None = None
    length: int = 0
    shape: Hashable = None  # of its videos, where those of a batch must have one
    waited: bool = False  # for a full batch, once already

    @property
    def picture(self) -> Hashable:
        """The same for rows with one picture."""
        return (self.query.digests if self.query is not None else ()) or id(self)

    @property
    def kind(self) -> Hashable:
        """The same for rows that may share a batch."""
        query = self.query
        assert query is not None
        options = tuple(sorted(query.options.items()))
        return query.style, query.max_new_tokens, query.until, options, self.shape


_Part = Callable[[], Sequence[Answer | BaseException]]


@dataclass(frozen=True)
class _Work:
    """Rows that go together.

    ``made``: waits for the model's part of them, and says when it ended; ``None``: they could not
    be prepared. ``since``: from when on they are waited for.
    """

    group: list[_Prepared]
    since: float
    made: Callable[[], tuple[list[_Part], float]] | None = None


class Feeder:
    """Answers rows.

    Args:
        answerer: the model and what prunes it.
        size: of batches.
        threads: that prepare; ``None``: at most three beside a GPU, two on a CPU, whose
            cores have the model to run.
        overlap: ask the model in a thread of its own; ``None``: beside a GPU.
    """

    def __init__(
        self,
        answerer: Answerer,
        size: BatchSize,
        threads: int | None = None,
        overlap: bool | None = None,
    ) -> None:
        self._answerer, self._size = answerer, size
        self._on_gpu = answerer.processor.device.type == "cuda"
        self._threads = threads or (min(_THREADS, _cores()) if self._on_gpu else 2)
        ours = answerer.together is None  # an engine has processes of its own
        self._overlap = self._on_gpu and ours if overlap is None else overlap
        self._pictures = Pictures(answerer.processor.ready)
        self._adding = threading.Lock()
        self._seen = self._seen_bytes = 0
        self._spent = current()

    def batches(self, rows: Iterable[Row]) -> Iterator[Batch]:
        """Answer all rows, some at a time. Rows may come in another order than they went in, those
        of several windows never. Beside a GPU, a batch is at work while the one before it is
        finished here and looked at by whoever asked for it.

        Raises:
            Exception: what the model raises, but for :class:`InputError` and a lack of memory,
                which are the failures of their rows.
        """
        at_work: deque[_Work] = deque()
        pool = ThreadPoolExecutor(self._threads, "prepare", self._start_thread)
        model = ThreadPoolExecutor(1, "model", self._start_thread) if self._overlap else None
        self._ended = self._resumed = self._spent.start = time.perf_counter()
        switching = sys.getswitchinterval()
        if self._overlap:
            sys.setswitchinterval(_SWITCH)
        try:
            for group in self._groups(pool, iter(rows)):
                if group is not None:
                    at_work.append(self._start(model, group))
                if at_work and (group is None or model is None or len(at_work) > 1):
                    yield self._end(at_work.popleft())
                    self._resumed = time.perf_counter()
            while at_work:
                yield self._end(at_work.popleft())
        finally:
            sys.setswitchinterval(switching)
            pool.shutdown(wait=False, cancel_futures=True)
            if model is not None:  # what is in the model must be out of it when this returns
                model.shutdown(wait=True, cancel_futures=True)

    def _groups(
        self, pool: ThreadPoolExecutor, waiting: Iterator[Row]
    ) -> Iterator[list[_Prepared] | None]:
        """Rows that go together, those that could not be prepared apart; ``None``: nothing is
        ready, and this will wait."""
        ahead, held, falling = deque[Future[_Prepared]](), list[_Prepared](), False
        while True:
            self._submit(pool, waiting, ahead, held)
            if ahead and not ahead[0].done():
                yield None
            began = time.perf_counter()
            found = _window(ahead, self._size.now)
            self._spent.waited += time.perf_counter() - began
            if not found and not held:
                return
            lost = [one for one in found if one.query is None]
            if lost:
                yield lost
            window = held + [one for one in found if one.query is not None]
            size = self._size.now
            groups, held = _cut(window, size, falling, last=not found)
            falling = not falling  # so that what waited for a full batch comes first
            for place, group in enumerate(groups, 1):
                self._submit(pool, waiting, ahead, held)
                yield group
                if self._size.now != size:
                    held = [one for group in groups[place:] for one in group] + held
                    break

    def _start(self, model: ThreadPoolExecutor | None, group: list[_Prepared]) -> _Work:
        """Have rows answered."""
        queries, since = [one.query for one in group if one.query is not None], self._resumed
        if not queries:
            return _Work(group, since)
        if model is not None:
            planned = self._answerer.plan(queries)
            return _Work(group, since, model.submit(self._ask, queries, planned).result)
        began, made = time.perf_counter(), self._ask(queries, None)
        self._spent.blocked += made[1] - began
        return _Work(group, since, lambda: made)

    def _end(self, work: _Work) -> Batch:
        """What became of rows, once the model is done with them."""
        if work.made is None:
            lost = [Outcome(one.row.index, error=one.error) for one in work.group]
            self._spent.note([None] * len(lost))
            return Batch(lost, 0.0, 0)
        began = time.perf_counter()
        parts, ended = work.made()
        self._spent.blocked += time.perf_counter() - began
        seconds, self._ended = ended - max(self._ended, work.since), ended
        results = [result for part in parts for result in part()]
        self._size.note(len(results), seconds, self._answerer.largest)
        outcomes = [
            Outcome(one.row.index, result, None, True)
            if isinstance(result, Answer)
            else Outcome(one.row.index, None, result, True)
            for one, result in zip(work.group, results, strict=True)
        ]
        self._spent.note([one.answer for one in outcomes], ended)
        return Batch(outcomes, seconds, len(outcomes))

    def _start_thread(self) -> None:
        if self._on_gpu:
            torch.set_num_threads(1)  # else each would have a team of its own beside the others
            torch.cuda.set_device(self._answerer.processor.device)  # whose memory is pinned for

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        waiting: Iterator[Row],
        ahead: deque[Future[_Prepared]],
        held: Sequence[_Prepared],
    ) -> None:
        """Have rows prepared, up to two windows beside the one at work, as far as there is room for
        pictures of the size seen so far. Before one was seen, few on a GPU: it gets whole ones."""
        most = max(2 * _WINDOW * self._size.now, 2 * self._threads) - len(held)
        if self._seen:
            most = min(most, int(_ROOM * self._seen / max(1, self._seen_bytes)))
        elif self._on_gpu:
            most = min(most, 2 * self._threads)
        count = max(most - len(ahead), 0 if ahead else 1)
        ahead.extend(pool.submit(self._prepare, row) for row in islice(waiting, count))

    def _prepare(self, row: Row) -> _Prepared:
        processor, spent = self._answerer.processor, self._spent
        marks = [time.perf_counter()]
        try:
            query = row.make()
            marks.append(time.perf_counter())
            opened = [self._pictures.open(image) for image in query.images]
            images = [image for image, _ in opened]
            query = replace(query, images=images, digests=tuple(digest for _, digest in opened))
            marks.append(time.perf_counter())
            length = processor.length(query.text, images, query.style)
            marks.append(time.perf_counter())
            size = sum(map(_bytes_of, images))
            with self._adding:
                self._seen, self._seen_bytes = self._seen + 1, self._seen_bytes + size
                spent.read += marks[1] - marks[0]
                spent.opened += marks[2] - marks[1]
                spent.tokenised += marks[3] - marks[2]
            shape = processor.shape_of(images)
            return _Prepared(row, query, None, length, shape)
        except BaseException as error:  # code of a task, or a decoder, on what nobody has checked
            return _Prepared(row, error=error.with_traceback(None))

    def _ask(self, queries: list[Query], planned: Planned | None) -> tuple[list[_Part], float]:
        """The model's part, and when it ended."""
        began = time.perf_counter()
        parts = self._parts(queries, planned)
        ended = time.perf_counter()
        self._spent.asked += ended - began
        return parts, ended

    def _parts(self, queries: list[Query], planned: Planned | None) -> list[_Part]:
        """What makes answers; in their place what is wrong with a query."""
        try:
            if self._overlap:
                return [self._answerer.run(queries, planned)]
            answers = self._answerer.answer(queries)
            return [lambda: answers]
        except (InputError, torch.OutOfMemoryError) as error:
            if len(queries) == 1:
                failed = error.with_traceback(None)
                return [lambda: [failed]]
        return [part for query in queries for part in self._parts([query], None)]


def _window(ahead: deque[Future[_Prepared]], size: int) -> list[_Prepared]:
    """The next rows, some batches of them, up to the last one of a picture if that is near."""
    count = size * (_WINDOW if size > 1 else 1)
    found = [ahead.popleft().result() for _ in range(min(count, len(ahead)))]
    while ahead and size > 1 and len(found) < 2 * count:
        if ahead[0].result().picture != found[-1].picture:
            break
        found.append(ahead.popleft().result())
    return found


def _cut(
    window: list[_Prepared], size: int, falling: bool, last: bool
) -> tuple[list[list[_Prepared]], list[_Prepared]]:
    """Batches of rows that may go together, in order of length, those with one picture side by
    side; and rows that wait for a full batch, once."""
    kinds: dict[Hashable, list[_Prepared]] = {}
    for one in window:
        kinds.setdefault(one.kind, []).append(one)
    batches, held = [], list[_Prepared]()
    for mine in kinds.values():
        runs: dict[Hashable, list[_Prepared]] = {}
        for one in mine:
            runs.setdefault(one.picture, []).append(one)
        if size > 1:
            longest = {key: max(one.length for one in run) for key, run in runs.items()}
            order = sorted(runs, key=lambda key: longest[key], reverse=falling)
            runs = {key: runs[key] for key in order}
        cut = _filled(list(runs.values()), size)
        if len(cut[-1]) < size and not last and not any(one.waited for one in cut[-1]):
            held += cut.pop()
        batches += cut
    for one in held:
        one.waited = True
    return batches, held


def _filled(runs: list[list[_Prepared]], size: int) -> list[list[_Prepared]]:
    """Batches of runs of rows with one picture. A run that does not fit into what is left of a
    batch begins the next one, unless a quarter would stay empty: pictures are computed once
    and many batches have the same shape."""
    batches: list[list[_Prepared]] = [[]]
    for run in runs:
        if size >= len(run) > size - len(batches[-1]) and 4 * len(batches[-1]) >= 3 * size:
            batches.append([])
        for one in run:
            if len(batches[-1]) == size:
                batches.append([])
            batches[-1].append(one)
    return batches


def _bytes_of(image: Any) -> int:
    if isinstance(image, ReadyImage | ReadyClip):
        return int(image.pixels.nbytes)
    return int(image.width * image.height * 3)


def _cores() -> int:
    """That this process may use, of several on one machine its share."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (every or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# -- orders of rows --------------------------------------------------------------------------------
def by_picture(rows: Iterable[T], picture: Callable[[T], Hashable]) -> Iterator[T]:
    """Rows with one picture one after the other, pictures in the order of their first rows.

    Args:
        rows: in the file's order.
        picture: the same for rows with one picture; ``None``: not known.
    """
    groups: dict[Hashable, list[T]] = {}
    for row in rows:
        key = picture(row)
        groups.setdefault(object() if key is None else key, []).append(row)
    for group in groups.values():
        yield from group


def sample_in(
    batch: Batch, sizes: Sizes, index: int | str, answer: Answer, *, warm_up: bool
) -> Sample:
    """An answer of a batch as a line of the log."""
    sample = sizes.sample(index, answer, warm_up=warm_up)
    return replace(sample, seconds=batch.seconds / batch.size, batch=batch.size)


class Stint:
    """Answering of one process, from now on.

    Args:
        answerer: answers; an engine has warmed up, and its memory is other processes'.

    Attributes:
        warm_up: answers whose times say nothing, the first ones.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer, self._device = answerer, answerer.processor.device
        self.warm_up = 3 if self._device.type == "cuda" else 1
        if answerer.together:
            self.warm_up = 0
        measure.reset_peak(self._device)
        self._energy, self._start = measure.EnergyMeter(self._device, None), time.perf_counter()

    def stretch(self, rank: int = 0) -> Stretch:
        """What it took so far."""
        engine = self._answerer.together is not None
        return Stretch(
            rank=rank,
            seconds=time.perf_counter() - self._start,
            peak_memory_bytes=None if engine else measure.peak_memory(self._device),
            energy_joules=self._energy.joules() if self._answerer.devices == 1 else None,
            hardware=host.hardware(self._device),
        )


def answer_rows(
    answerer: Answerer,
    rows: Iterable[tuple[int | str, Callable[[], Query]]],
    batch_size: int | str | None = 1,
) -> Iterator[Sample]:
    """Answer rows in batches. A row whose query cannot be made, or whose picture cannot be opened,
    fails alone.

    Args:
        answerer: answers.
        rows: index, and what makes the query.
        batch_size: see :class:`BatchSize`.

    Yields:
        a sample per row, in order; those of the first batch are marked as warm-up.

    Raises:
        InputError, torch.OutOfMemoryError: a row cannot be answered.
    """
    sizes, indices = Sizes.of(answerer.model.config), list[int | str]()
    feeder = Feeder(answerer, BatchSize(batch_size, answerer.processor.device))

    def placed() -> Iterator[Row]:
        for place, (index, make) in enumerate(rows):
            indices.append(index)
            yield Row(place, make)

    done: dict[int, Sample] = {}
    given, warm_up = 0, True
    for batch in feeder.batches(placed()):
        for one in batch.outcomes:
            index = indices[one.index]
            if one.answer is not None:
                done[one.index] = sample_in(batch, sizes, index, one.answer, warm_up=warm_up)
            elif one.asked and one.error is not None:
                raise one.error
            else:
                done[one.index] = Sample(index, "", failed=one.why)
        warm_up = warm_up and not batch.size
        while given in done:
            yield done.pop(given)
            given += 1


# -- where the time goes ---------------------------------------------------------------------------
@dataclass
class Spent:
    """Where the time of rows went, in seconds: ``read``, ``opened`` and ``tokenised`` in threads,
    added up over these; ``waited`` for them; ``asked`` the model, beside a GPU in a
    thread of its own, of that ``prefill`` and ``decode``; ``blocked`` until it had answered.
    ``batches``: when each ended, and its rows; ``fast``: rows on the fast path."""

    start: float = 0.0
    read: float = 0.0
    opened: float = 0.0
    tokenised: float = 0.0
    waited: float = 0.0
    asked: float = 0.0
    blocked: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    batches: list[tuple[float, int]] = field(default_factory=list)
    fast: int = 0
    failed: int = 0

    def note(self, outcomes: Sequence[Answer | None], ended: float = 0.0) -> None:
        """Take a batch and when it ended; ``None``: a row that failed."""
        answers = [one for one in outcomes if one is not None]
        self.failed += len(outcomes) - len(answers)
        self.prefill += sum(answer.prefill_seconds for answer in answers)
        self.decode += sum(answer.decode_seconds for answer in answers)
        self.fast += sum(answer.fast for answer in answers)
        if answers:
            self.batches.append((ended, len(answers)))


_watches: list[Spent] = []


def current() -> Spent:
    """What the time of a feeder that is made now is added to."""
    return _watches[-1] if _watches else Spent()


@contextmanager
def watched() -> Iterator[Spent]:
    """Add up where the time of feeders goes that are made inside."""
    spent = Spent()
    _watches.append(spent)
    try:
        yield spent
    finally:
        _watches.remove(spent)
