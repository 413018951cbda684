"""What a checkpoint's JSON files must say before anything is built from them, and what is said when
a library cannot build it all the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.checkpoint import Checkpoint, first_line, read_json

_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "head_dim",
    "vocab_size",
    "depth",
)
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "projector_hidden_act")
# Have no function of their own in transformers' table.
_PLAIN_ROPE = ("default", "mrope", "su")
# Towers turn in ways of their own.
_OWN_ROPE = ("vision_config.", "qformer_config.")


def check_fields(source: Checkpoint) -> None:
    """Raise InputError where a file is no JSON, or a field of ``config.json`` cannot be right: its
    kind, sizes, heads that do not divide, unknown activations and rotary embeddings."""
    what, config = f"checkpoint {source.name!r}", source.config
    names = config.get("architectures")
    if names is not None and not _are_texts(names):
        raise _wrong("architectures", names, what, "a list with the name of a class")
    _check_part(config, "", what)
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, Mapping):
            _check_part(value, f"{name}.", what)
    for name in ("text_config", "vision_config", "llm_config", "qformer_config"):
        if config.get(name) is not None and not isinstance(config[name], Mapping):
            raise _wrong(name, config[name], what, "an object with fields")
    for name in _FILES:
        if (source.folder / name).is_file():
            read_json(source.folder / name, what)


def _check_part(config: Mapping[str, Any], prefix: str, what: str) -> None:
    for name in _COUNTS:
        value = config.get(name)
        if value is None:  # left to the library's default
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _wrong(prefix + name, value, what, "an integer of at least 1")
    _check_heads(config, prefix, what)
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name in _ACTIVATIONS:
        value = config.get(name)
        if value is not None and value not in ACT2FN:
            raise _wrong(prefix + name, value, what, f"one of {', '.join(sorted(ACT2FN))}")
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if isinstance(value, Mapping) and prefix not in _OWN_ROPE:
            kind = value.get("rope_type", value.get("type", "default"))
            known = sorted({*ROPE_INIT_FUNCTIONS, *_PLAIN_ROPE})
            if kind not in known:
                raise _wrong(f"{prefix}{name}.rope_type", kind, what, f"one of {', '.join(known)}")


def _check_heads(config: Mapping[str, Any], prefix: str, what: str) -> None:
    width, heads = config.get("hidden_size"), None
    for name in ("num_attention_heads", "num_heads"):
        if config.get(name) is None:
            continue
        heads = config[name]
        if width is not None and config.get("head_dim") is None and width % heads:
            raise _wrong(prefix + name, heads, what, f"a divisor of hidden_size, {width}")
    shared = config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        name = f"{prefix}num_key_value_heads"
        raise _wrong(name, shared, what, f"a divisor of num_attention_heads, {heads}")


def _wrong(name: str, value: object, what: str, accepted: str) -> InputError:
    return InputError(f"{name}={value!r} in config.json of {what} is not valid: {accepted}.")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a library raises while it builds a model into one sentence.

    Raises:
        InputError: in place of it; memory that runs out stays what it is.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of many libraries, without a common base
        said = f"{type(error).__name__}: {first_line(error)}".rstrip(".:")
        raise InputError(f"{what} does not load ({said}).") from error


def check_flash_attention(name: str | None) -> None:
    """Raise InputError where FlashAttention is asked for and is not there."""
    from importlib.util import find_spec

    from transformers.utils import import_utils

    version = str(name).removeprefix("flash_attention_")
    there = getattr(import_utils, f"is_flash_attn_{version}_available", None)
    if there is None or there() or find_spec("kernels") is not None:
        return
    raise InputError(
        f"attn_implementation={name!r} needs a GPU and the package flash-attn, which is not "
        "installed here: pip install flash-attn, or take 'sdpa', which needs nothing."
    )
