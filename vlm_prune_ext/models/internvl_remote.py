"""InternVL by the code that comes with a checkpoint: ``vision_model``, ``mlp1`` and
``language_model``, joined in ``forward`` and ``generate``.

For live models of that form, wherever they come from, and for checkpoints whose weights
transformers' own modules do not take. ``generate`` embeds the prompt itself, overwrites the
embeddings of ``img_context_token_id``, and hands them to the language model; so visual tokens are
found where the prompt is embedded. The language model must be built like LLaMA (Qwen2 and LLaMA
are; the InternLM2 of such checkpoints has other names and runs unpruned at best).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts, SpanSink, Undo
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import LoadOptions
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line
from vlm_prune_ext.models.generic import decoder_parts, find_decoder

WHY_NO_VISION = (
    "InternVL's tower gives four patches to one token and is not CLIP-like; methods that work in "
    "the language model apply"
)
_PARTS = ("vision_model", "mlp1", "language_model", "extract_feature")


def load_model(
    source: Checkpoint, options: LoadOptions, misfit: InputError, image_token_id: int
) -> Any:
    """Run the checkpoint's own code.

    Args:
        source: with ``auto_map`` in its ``config.json``.
        options: that trust it.
        misfit: why transformers' own modules do not do.
        image_token_id: the placeholder, which such models are told from outside.

    Raises:
        InputError: ``misfit`` where there is no code, or that the code does not run here.
    """
    from transformers import AutoModel

    named = source.config.get("auto_map") or {}
    if "AutoModel" not in named:
        raise misfit
    arguments = options.from_pretrained_arguments()
    arguments.pop("revision", None)  # the folder is that revision
    try:
        model = AutoModel.from_pretrained(
            str(source.folder), trust_remote_code=True, output_loading_info=True, **arguments
        )[0]
    except Exception as error:  # whatever somebody's code raises
        said = f"fails under this transformers ({type(error).__name__}: {first_line(error)}"
        raise _no_way(source, f"{said.rstrip('.')})", misfit) from error
    if not owns(model) or not hasattr(model.language_model, "generate"):
        made = f"makes no model with {', '.join(_PARTS)} whose language model has generate()"
        raise _no_way(source, made, misfit)
    model.img_context_token_id = image_token_id
    return model.eval()


def _no_way(source: Checkpoint, said: str, misfit: InputError) -> InputError:
    return InputError(
        f"checkpoint {source.name!r} does not load: its own code {said}, and transformers' modules "
        f"do not take it ({str(misfit).rstrip('.')}); a checkpoint in Hugging Face format, whose "
        "name ends in -hf, would do."
    )


def tile_length(model: Any) -> int:
    """Visual tokens of one tile."""
    stated = getattr(model, "num_image_token", None)
    if stated is not None:
        return int(stated)
    config, vision = model.config, model.config.vision_config
    side = getattr(config, "force_image_size", None) or vision.image_size
    return int((side // vision.patch_size * config.downsample_ratio) ** 2)


def owns(model: Any) -> bool:
    """Whether a live model has that form."""
    return all(hasattr(model, name) for name in _PARTS) and hasattr(model, "img_context_token_id")


def parts(model: Any) -> ModelParts:
    """Where its parts are.

    Raises:
        InputError: a language model that is not built like LLaMA.
    """
    decoder = find_decoder(model.language_model)
    if decoder is None:
        raise InputError(
            f"{type(model.language_model).__name__} inside {type(model).__name__} is not built "
            "like LLaMA (layers with self_attn.q_proj): nothing to prune. vp.load() reads "
            "published InternVL checkpoints into modules that can be pruned."
        )
    return decoder_parts(
        model,
        decoder,
        why_no_vision=WHY_NO_VISION,
        watch_spans=_watch(model, model.language_model.get_input_embeddings()),
    )


def _watch(model: Any, table: nn.Module) -> Callable[[SpanSink], list[Undo]]:
    def watch(sink: SpanSink) -> list[Undo]:
        def see(module: nn.Module, args: tuple) -> None:
            ids, token = args[0] if args else None, model.img_context_token_id
            if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.shape[1] > 1:
                sink(ids == (-1 if token is None else token), None)

        return [table.register_forward_pre_hook(see).remove]

    return watch
