"""Pruned models for VLMEvalKit: thin ``BaseModel`` subclasses, one per method.

>>> from vlm_prune_ext.evals.vlmeval import LLaVAFastV                       # doctest: +SKIP
>>> model = LLaVAFastV("liuhaotian/llava-v1.5-7b", attention_rank=100)       # doctest: +SKIP
>>> model.generate(["apple.jpg", "What is in this image?"])                  # doctest: +SKIP

For LLaVA-1.5, prompts are those of VLMEvalKit's own ``LLaVA`` class, made by its own code; other
families get a message as one user turn of their own chat template. Answers are greedy.

VLMEvalKit has no plug-in hook, so its launcher has to be started with our entries in its table::

    python -m vlm_prune_ext.evals.vlmeval --model llava-1.5-7b-fastv_rank100 --data MME

:func:`register` makes those entries.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm import LLaVA
from vlmeval.vlm.base import BaseModel

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.answer import Answer, Answerer, Query
from vlm_prune_ext.evals.names import run_name
from vlm_prune_ext.evals.rows import MAX_NEW_TOKENS, register_datasets
from vlm_prune_ext.evals.served import make_answerer
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import (
    METHODS,
    classes,
    get_method,
    method_class,
    parse_method,
    standard_method,
)
from vlm_prune_ext.models.clips import Clip
from vlm_prune_ext.models.prompts import IMAGE, VIDEO

LLAVA_MAX_NEW_TOKENS = 2048
"""What VLMEvalKit's ``LLaVA`` allows an answer, whatever the data set."""


class PrunedVLM(BaseModel):
    """A model with a method, as VLMEvalKit wants it.

    Subclasses name the method; its parameters are keyword arguments, under the names of its fields
    or of ``model.config`` (``attention_rank=100`` or ``fast_v_attention_rank=100``).

    Args:
        model_path: folder or hub name of a checkpoint.
        method: a ready-made method in place of the class's own and of ``parameters``.
        backend, dtype, device, attn_implementation, fast, preprocess, trust_remote_code,
            tensor_parallel_size, max_model_len, gpu_memory_utilization: see
            :func:`vlm_prune_ext.evals.served.make_answerer`.
        min_pixels, max_pixels: of an image, for families that take it as large as it is.
        frames, fps: how many frames of a video are shown, in all or of each second; ``None``: as
            the data set says, else as the checkpoint's processor chooses, else 32.
        video_budget: see ``video`` of :func:`vlm_prune_ext.prune`.
        max_new_tokens: limit of an answer; ``None``: 2048, as VLMEvalKit's ``LLaVA`` has it (the
            demo's data sets have shorter ones).
        answerer: answers, in place of all that says which model and method.
        parameters: of the method.

    Attributes:
        answerer: answers with model and method.
        last: the last answer of :meth:`answer`, with what it cost.

    Raises:
        InputError: a checkpoint, parameter or value that is not accepted.
    """

    INSTALL_REQ: ClassVar[bool] = False
    INTERLEAVE: ClassVar[bool] = True
    METHOD: ClassVar[str] = "none"

    def __init__(
        self,
        model_path: str = str(CHECKPOINT),
        *,
        method: Method | None = None,
        dtype: str | None = None,
        device: str | None = None,
        attn_implementation: str | None = None,
        fast: bool | None = None,
        trust_remote_code: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        preprocess: str | None = None,
        frames: int | None = None,
        fps: float | None = None,
        video_budget: str = "frame",
        max_new_tokens: int | None = None,
        backend: str | None = None,
        tensor_parallel_size: int | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        answerer: Answerer | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        if answerer is not None:
            method = answerer.method
        elif method is None:  # before loading: a wrong parameter costs nothing
            method = get_method(self.METHOD, **parameters)
        elif parameters:
            raise InputError(f"method and {', '.join(parameters)} are given: one of them may be.")
        if answerer is None:
            answerer = make_answerer(
                model_path,
                method,
                backend,
                dtype=dtype,
                device=device,
                attn_implementation=attn_implementation,
                fast=fast,
                trust_remote_code=trust_remote_code,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                preprocess=preprocess,
                frames=frames,
                fps=fps,
                video_budget=video_budget,
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
            )
        self.model: Any
        self.processor: Any
        self.model, self.processor = answerer.model, answerer.processor
        self.method = method
        self.max_new_tokens = max_new_tokens
        self.last: Answer | None = None
        self.VIDEO_LLM = self.processor.takes_videos  # else VLMEvalKit hands frames as pictures
        self.shown: dict[str, Any] = {}
        self._kinds: dict[str, Any] = {}
        self.answerer = answerer

    # -- prompts: VLMEvalKit's own LLaVA makes them --------------------------------------------
    def use_custom_prompt(self, dataset: str) -> bool:
        """Multiple choice gets LLaVA's wording, everything else the data set's."""
        if dataset not in self._kinds:  # VLMEvalKit looks through all that it knows
            self._kinds[dataset] = DATASET_TYPE(dataset)
        return self._kinds[dataset] == "MCQ"

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """The message of a multiple-choice row, as VLMEvalKit's ``LLaVA`` words it."""
        return LLaVA.build_prompt(self, line, dataset)

    def show(self, dataset: Any) -> None:
        """Take over how many frames of its videos a data set wants shown, unless that was said."""
        stated = {name: getattr(dataset, name, 0) for name in ("nframe", "fps")}
        told = self.processor.frames is not None or self.processor.fps is not None
        self.shown = {n: value for n, value in stated.items() if value and value > 0 and not told}

    def query(self, message: list[dict[str, Any]], dataset: str | None = None) -> Query:
        """A message, texts and images in any order, as a question for the model.

        Raises:
            InputError: an image that does not decode, where the family's template opens it, or a
                video, where the family takes none.
        """
        message = [self._with_frames(item) for item in message]
        images = [item["value"] for item in message if item["type"] == "image"]
        # The marker inside a text would be taken for an image.
        clean = [
            {**item, "value": item["value"].replace(IMAGE, "").replace(VIDEO, "")}
            if item["type"] == "text"
            else item
            for item in message
        ]
        limit = self.max_new_tokens or MAX_NEW_TOKENS.get(dataset or "", LLAVA_MAX_NEW_TOKENS)
        if self.processor.family == "llava":
            text, _ = LLaVA.concat_tilist(self, clean)
            return Query(text, images, style="vlmeval", max_new_tokens=limit)
        if self.processor.family == "llava_next":
            parts = [f"{IMAGE}\n" if item["type"] == "image" else item["value"] for item in clean]
            return Query("".join(parts), images, max_new_tokens=limit)
        text, images = self.processor.messages([{"role": "user", "content": clean}])
        return Query(text, images, style="plain", max_new_tokens=limit)

    def _with_frames(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item; of a video with how many frames are shown."""
        if item["type"] != "video":
            return item
        if not self.processor.takes_videos:
            self.processor.read_clip(Clip(item["value"]))
        return {**self.shown, **item}

    # -- answers -------------------------------------------------------------------------------
    def answer(self, query: Query) -> Answer:
        """Answer one question; also kept as ``last``.

        Raises:
            InputError: a budget or stated length that does not fit the prompt.
        """
        self.last = self.answerer.answer([query])[0]
        return self.last

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """What VLMEvalKit calls: one message in, the answer's text out."""
        return self.answer(self.query(message, dataset)).text


def wrapper(name: str) -> type[PrunedVLM]:
    """The class for a method of the registry: ``fastv`` -> ``LLaVAFastV``."""
    cls = method_class(name)
    return _wrapper("LLaVABaseline" if cls is None else f"LLaVA{cls.__name__}", name)


@cache
def _wrapper(class_name: str, name: str) -> type[PrunedVLM]:
    cls = method_class(name)
    about = "No pruning: nothing is attached." if cls is None else cls.summary()
    body = {"METHOD": name, "__doc__": about, "__module__": __name__}
    return type(class_name, (PrunedVLM,), body)


def __getattr__(name: str) -> type[PrunedVLM]:
    """``LLaVABaseline``, and a class for each method: ``LLaVAFastV``, ``LLaVARandom``..."""
    stem = name.removeprefix("LLaVA").lower()
    if stem == "baseline":
        return wrapper("none")
    for cls in classes() if name.startswith("LLaVA") else ():
        if stem in (cls.__name__.lower(), cls.name.replace("_", "")):
            return wrapper(cls.name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


CHECKPOINTS = (str(CHECKPOINT), "liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.5-13b")


# -- VLMEvalKit's table ---------------------------------------------------------------------------
def register(
    model_path: str | Iterable[str] = CHECKPOINTS,
    methods: Iterable[Method | str | None] | None = None,
    **options: Any,
) -> list[str]:
    """Add entries to VLMEvalKit's table of models, and the demo's data sets to its data sets.

    Args:
        model_path: one checkpoint or several.
        methods: methods, or their short forms (``"fastv:100"``); an entry ``None`` is the baseline.
            Not given: the baseline and every method as its paper sets it.
        options: further keyword arguments of :class:`PrunedVLM` (``dtype``, ``device``...).

    Returns:
        the names, as :func:`run_name` makes them; ``supported_VLM[name]()`` loads such a model.

    Raises:
        InputError: an unknown method or a value that is not accepted.
    """
    from vlmeval.config import supported_VLM

    register_datasets()
    paths = [model_path] if isinstance(model_path, str) else list(model_path)
    names = []
    if methods is None:
        methods = [standard_method(name) for name in METHODS]
    for entry in methods:
        method = parse_method(entry) if isinstance(entry, str) else entry
        cls = wrapper(method.name if method is not None else "none")
        for path in paths:
            name = run_name(path, method)
            supported_VLM[name] = partial(cls, path, method=method, **options)
            names.append(name)
    return names


def launch() -> None:
    """Start VLMEvalKit's own launcher with our entries in its table.

    Raises:
        InputError: it is not there.
    """
    import runpy

    import vlmeval

    register()
    folder = Path(vlmeval.__file__).parent
    for path in (folder / "run.py", folder.parent / "run.py"):
        if path.is_file():
            sys.argv[0] = str(path)
            runpy.run_path(str(path), run_name="__main__")
            return
    raise InputError(f"VLMEvalKit's run.py is neither in {str(folder)!r} nor beside it.")


if __name__ == "__main__":
    launch()
