"""Models for lmms-eval: every pruning method, chat and simple interface, true batches.

``accelerate launch -m lmms_eval --model llava_fastv --model_args attention_rank=100 --tasks ...``

The classes are found through the entry point group ``lmms_eval.models`` (see ``lmms_plugin``).
All settings come from ``model_args``; nothing is read from the environment, so that lmms-eval's
response cache, which keys on ``model_args``, never serves answers of another configuration.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar, overload

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answerer
from vlm_prune_ext.evals.batch_size import AUTO, LARGEST, BatchSize, batch_size_of
from vlm_prune_ext.evals.feed import Batch, Feeder, Outcome, Row, by_picture
from vlm_prune_ext.evals.lmms_likelihood import Likelihood, Scorer
from vlm_prune_ext.evals.lmms_plugin import class_name, method_of, models, value_of
from vlm_prune_ext.evals.lmms_requests import Reader, Source, Task
from vlm_prune_ext.evals.lmms_tally import Tally
from vlm_prune_ext.evals.precheck import check_fit
from vlm_prune_ext.evals.served import make_answerer
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.pruning import prune

_REACH = 4096  # requests ahead of which one with the same picture may be answered


class PruneModel(lmms):
    """What all models share; the chat interface. See :func:`lmms_plugin.models`.

    Args:
        pretrained: checkpoint, folder or ``owner/name``; the demo checkpoint where it is missing.
        batch_size: samples per batch, or ``auto``: as many as pay and fit into memory, at most 64
            (or ``max_batch_size``).
        max_batch_size: see ``batch_size``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; with several processes each takes its own.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto``; missing: float32 on a CPU,
            elsewhere what the checkpoint states.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``.
        fast: CUDA graphs with fixed shapes, see :func:`vlm_prune_ext.load`.
        trust_remote_code: ``true`` for formats that come with code of their own.
        min_pixels, max_pixels: pixels of an image, of families that take it as large as it is.
        preprocess: ``host`` or ``device``: where pictures are resized; missing: the device where it
            is a GPU.
        frames, fps: how many frames of a video are shown, in all or of each second; missing: as
            the checkpoint's processor chooses, else 32.
        video_budget: what a method's budget is of: each ``frame`` of a video (also where it is
            missing), or the whole ``video``.
        conv_template: conversation template (``vicuna_v1``, ``vlmeval``, ...); missing: the
            family's own.
        device_map: ``auto`` spreads one model over all GPUs of a single process.
        revision: branch, tag or commit of a checkpoint on the hub.
        backend: ``vllm``: vLLM's engine answers, with the same prompts.
        tensor_parallel_size, max_model_len, gpu_memory_utilization: of that engine.
        answerer: answers, in place of all that says which model and method.
        **given: parameters of the method, under their own or their ``model.config`` names.

    Raises:
        InputError: an argument that is not known or not accepted, or a method that does not fit
            the model.
    """

    is_simple = False
    MODEL: ClassVar[str] = "vlm_prune"

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        conv_template: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        fast: bool | None = None,
        trust_remote_code: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        preprocess: str | None = None,
        frames: int | None = None,
        fps: float | None = None,
        video_budget: str | None = None,
        backend: str | None = None,
        tensor_parallel_size: int | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        answerer: Answerer | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        method = method_of(self.MODEL, given) if answerer is None else answerer.method
        self.batch_size_per_gpu = _batch_size(batch_size)
        self._most = int(max_batch_size or LARGEST)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._style = value_of(conv_template)
        if answerer is None:
            checkpoint, served = str(value_of(pretrained) or CHECKPOINT), value_of(backend)
            if served is not None and self._world_size > 1:
                raise InputError(
                    f"backend={served!r} is one process's: tensor_parallel_size shares it among "
                    "GPUs, num_processes=1 is needed."
                )
            check_fit(Checkpoint(checkpoint, revision=value_of(revision)), method)
            answerer = make_answerer(
                checkpoint,
                method,
                served,
                dtype=value_of(dtype),
                device=device if served else _device(device, self.accelerator),
                attn_implementation=value_of(attn_implementation),
                fast=_flag("fast", fast),
                trust_remote_code=bool(_flag("trust_remote_code", trust_remote_code)),
                min_pixels=value_of(min_pixels),
                max_pixels=value_of(max_pixels),
                preprocess=value_of(preprocess),
                frames=value_of(frames),
                fps=value_of(fps),
                video_budget=value_of(video_budget),
                tensor_parallel_size=value_of(tensor_parallel_size),
                max_model_len=value_of(max_model_len),
                gpu_memory_utilization=value_of(gpu_memory_utilization),
                **self._extra(device_map, revision),
            )
            # Is the style known? Does the method fit the model?
            answerer.processor.messages([{"role": "user", "content": "?"}], style=self._style)
            with nullcontext() if served else prune(answerer.model, method):
                pass
        self._answerer: Answerer | None = answerer
        self._device, self._config = answerer.processor.device, answerer.model.config
        self._reader = Reader(self, answerer.processor, self._style)
        self._tally = Tally(answerer, self._device)
        if self._rank == 0:
            label = method.label() if method is not None else "baseline"
            logger.info(
                f"{label}: lmms-eval names its output folder after the checkpoint alone, so give "
                f"each configuration an --output_path of its own (run_lmms.sh does)"
            )
        _keep_cache_across_runs(self.MODEL, [pretrained, dtype, conv_template, *given.items()])

    def _extra(self, device_map: str | None, revision: str | None) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that are there."""
        given = {"device_map": value_of(device_map), "revision": value_of(revision)}
        if given["device_map"] is not None and self._world_size > 1:
            raise InputError(
                f"device_map={device_map!r} needs a single process: start it with num_processes=1."
            )
        return {name: value for name, value in given.items() if value is not None}

    # -- what lmms-eval and its users look at ------------------------------------------------------
    @property
    def answerer(self) -> Answerer:
        """Model, processor and method; gone after :meth:`clean`."""
        if self._answerer is None:
            raise RuntimeError("The model was released after its evaluation: make a new one.")
        return self._answerer

    @property
    def model(self) -> Any:
        """The vision-language model."""
        return self.answerer.model

    @property
    def config(self) -> Any:
        """Its configuration, which stays."""
        return self._config

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.answerer.processor.tokenizer

    @property
    def batch_size(self) -> int:
        """Samples per batch and process, at most."""
        given = self.batch_size_per_gpu
        return self._most if isinstance(given, str) else given

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    # -- answers -----------------------------------------------------------------------------------
    def generate_until(self, requests: list[Instance]) -> Sequence[GenerationResult]:  # type: ignore[override]
        """Answers in the order of the requests, made in batches when they are asked for."""
        twins = _padding_twins(requests)
        tasks = {n: self._reader.task(one) for n, one in enumerate(requests) if n not in twins}
        made = self._answers(tasks, self._bar(len(tasks), "Answering"))
        return LazyAnswers(len(requests), made, twins)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:  # type: ignore[override]
        """Answers of several rounds per sample, as many as the task asks for; rounds of different
        samples share batches."""
        talks = [self._reader.talk(request) for request in requests]
        bar = self._bar(len(talks), "Answering in rounds")
        while open_talks := [talk for talk in talks if not talk.over]:
            for place, answer in dict(self._answers(dict(enumerate(open_talks)))).items():
                open_talks[place].advance(answer.text)
            bar.update(sum(talk.over for talk in open_talks))
        bar.close()
        return [talk.answers for talk in talks]

    def _answers(
        self, tasks: Mapping[int, Task], bar: Any = None
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Answers as they are made. A sample that cannot be answered is reported and gets an empty
        answer."""
        size = BatchSize(self.batch_size_per_gpu, self._device, self._most, self.answerer.together)
        self._tally.start()
        rows = (Row(place, tasks[place].query) for place in self._order(tasks))
        for batch in Feeder(self.answerer, size).batches(rows):
            answers = [one.answer for one in batch.outcomes if one.answer is not None]
            self._tally.add(batch.seconds, answers)
            self.note(batch, tasks)
            for one in batch.outcomes:
                yield one.index, self._result(tasks[one.index].source, one)
            if bar is not None:
                bar.update(len(batch.outcomes))
        if bar is not None:
            bar.close()

    def note(self, batch: Batch, tasks: Mapping[int, Task]) -> None:
        """A batch is done: for whoever keeps a log."""

    def _order(self, tasks: Mapping[int, Task]) -> Iterator[int]:
        """Places, those with one picture side by side as far as they are near each other."""
        places = iter(tasks)
        while some := list(islice(places, _REACH)):
            pictures = self._reader.pictures([tasks[place].source for place in some])
            yield from by_picture(some, dict(zip(some, pictures, strict=True)).get)

    def _result(self, source: Source, outcome: Outcome) -> GenerationResult:
        answer = outcome.answer
        if answer is None:
            self._tally.fault(source, outcome.why)
            return GenerationResult(text="")
        if not answer.visual_tokens:
            self._tally.without_image(source)
        counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens)
        return GenerationResult(text=answer.text, token_counts=counts)

    def loglikelihood(self, requests: list[Instance]) -> Sequence[Likelihood]:  # type: ignore[override]
        """``(loss, greedy)`` of each continuation: its mean negative log-probability per token, and
        whether it is what greedy decoding would say.

        A loss rather than a log-probability, as lmms-eval's own models return it and its
        multiple-choice tasks (which take the smallest) expect it. Tokens are dropped by the prompt
        alone, as in generation.
        """
        if self.answerer.together:
            raise InputError("backend='vllm' scores no likelihoods: take a task that is answered.")
        twins = _padding_twins(requests)
        places = [place for place in range(len(requests)) if place not in twins]
        self._tally.start()
        scorer = Scorer(self.answerer, self._reader, self._tally, self.batch_size)
        bar = tqdm(scorer.scores(requests, places), "Scoring", len(places), disable=self.rank != 0)
        return LazyAnswers(len(requests), iter(bar), twins)

    # -- the end of an evaluation ------------------------------------------------------------------
    def clean(self) -> None:
        """Report what was measured, over all processes, and let go of the model.

        lmms-eval calls this on every process once all requests are answered, whether a process had
        requests of its own or found them all in the cache: the one place where they can meet.
        """
        if self._answerer is not None:
            self._tally.report(self._rank, self._world_size)
            self._answerer.close()
            self._answerer = None
        super().clean()

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, disable=self.rank != 0, desc=what)


def _batch_size(given: Any) -> int | str:
    """Also ``auto:N``, which lmms-eval takes."""
    named = isinstance(given, str) and given.partition(":")[0] == AUTO
    return AUTO if named else batch_size_of("batch_size", given)


def _flag(name: str, given: Any) -> bool | None:
    value = value_of(given)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name}={given!r} is not valid: true or false.")
    return value


def _device(given: str | None, accelerator: Accelerator) -> torch.device | str:
    """The device of this process; a stated one counts unless several processes would share it."""
    given = value_of(given)
    if given is None or (accelerator.num_processes > 1 and str(given) != "cpu"):
        return accelerator.device
    return str(given)


def _padding_twins(requests: Sequence[Instance]) -> dict[int, int]:
    """Requests that only even out the processes -> the real request that they repeat."""
    real = {
        id(request.arguments): place
        for place, request in enumerate(requests)
        if not _is_padding(request)
    }
    return {
        place: real[id(request.arguments)]
        for place, request in enumerate(requests)
        if _is_padding(request) and id(request.arguments) in real
    }


def _is_padding(request: Instance) -> bool:
    return bool((request.metadata or {}).get("__padding_only__"))


def _keep_cache_across_runs(model: str, settings: Sequence[Any]) -> None:
    """Let lmms-eval's response cache find what an interrupted run of the same configuration wrote.

    By default it names each run's folder at random and looks at finished runs only, so that the
    answers of an interrupted one are lost. A name that the user or a scheduler gave is left alone.
    """
    name = hashlib.sha256(repr((model, settings)).encode()).hexdigest()[:16]
    os.environ.setdefault("LMMS_CACHE_RUN_ID", f"{model}-{name}")


def __getattr__(name: str) -> type[PruneModel]:
    """A chat and a simple class for each of :func:`lmms_plugin.models`, made when asked for."""
    for model, method in models().items():
        for simple in (False, True):
            if name == class_name(model, simple=simple):
                about = f"{model}: {method or 'the method that model_args name'}."
                body = {"MODEL": model, "is_simple": simple, "__doc__": about}
                made = type(name, (PruneModel,), {**body, "__module__": __name__})
                globals()[name] = made
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# -- answers on demand -----------------------------------------------------------------------------
T = TypeVar("T")


class LazyAnswers(Sequence[T], Generic[T]):
    """A sequence as long as its requests, whose entries are made on demand.

    Args:
        length: requests.
        made: places and their answers, in the order in which they are made.
        twins: place -> another place whose answer it shares (and which is made instead).
    """

    def __init__(
        self, length: int, made: Iterator[tuple[int, T]], twins: dict[int, int] | None = None
    ) -> None:
        self._length, self._made, self._twins = length, made, twins or {}
        self._answers: dict[int, T] = {}

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        places = range(self._length)[place]
        if isinstance(places, range):
            return [self[one] for one in places]
        places = self._twins.get(places, places)
        while places not in self._answers:
            made, answer = next(self._made)
            self._answers[made] = answer
        if len(self._answers) == self._length - len(self._twins):
            for _ in self._made:  # what is to be done behind the last one
                pass
        return self._answers[places]
