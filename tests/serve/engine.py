"""vLLM's models and processors without its engine: seconds instead of half a minute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from PIL import Image

KEY = "vlm_prune"


def _world() -> None:
    """One process on the CPU, as vLLM wants it. An engine that ran in this process has taken what
    was there with it."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    if model_parallel_is_initialized():
        return
    _set_torch_accelerator_to_noop()
    meeting = Path(mkdtemp(prefix="vlm_prune_world_")) / "file"
    init_distributed_environment(1, 0, meeting.as_uri(), 0, "gloo")
    initialize_model_parallel(1, 1)


def config(folder: Path, method: str | None, **more: Any) -> Any:
    """The engine's configuration, with all of its checks."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    overrides = {} if method is None else {KEY: method}
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 4}
    args = EngineArgs(model=str(folder), **{**options, "hf_overrides": overrides, **more})
    return args.create_engine_config()


class Served:
    """A model as the engine builds it.

    Args:
        folder: checkpoint.
        method: short form; ``None``: unpruned.
        more: arguments of the engine.
    """

    def __init__(self, folder: Path, method: str | None, **more: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model
        from vllm.multimodal import MULTIMODAL_REGISTRY

        self.config = config(folder, method, **more)
        with set_current_vllm_config(self.config):
            _world()
            self.model = get_model(vllm_config=self.config)
        self.processor = MULTIMODAL_REGISTRY.create_processor(self.config.model_config)

    def inputs(self, text: str, pictures: Sequence[Image.Image]) -> Any:
        """A prompt as the engine's front end makes it."""
        from vllm.multimodal.processing.context import TimingContext
        from vllm.multimodal.processing.inputs import ProcessorInputs

        info = self.processor.info
        prompt = info.get_tokenizer().encode(text)
        items = info.parse_mm_data({"image": list(pictures)})
        given = ProcessorInputs(prompt=prompt, mm_data_items=items)
        return self.processor.apply(given, TimingContext(enabled=False))

    @torch.inference_mode()
    def rows(self, inputs: Any) -> list[torch.Tensor]:
        """What the engine puts in the places of each image, several images in one call."""
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context
        from vllm.multimodal.utils import group_and_batch_mm_kwargs

        items = [("image", item) for item in inputs["mm_kwargs"]["image"]]
        with set_current_vllm_config(self.config), set_forward_context(None, self.config):
            return [
                rows
                for _, _, kwargs in group_and_batch_mm_kwargs(items, device="cpu", pin_memory=False)
                for rows in self.model.embed_multimodal(**kwargs)
            ]
