"""Reading a checkpoint: where it is, what its configuration says, its weights by name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.lazy import torch
from vlm_prune_ext.models.catalogue import resolve

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
FETCHING = ("cache_dir", "force_download", "local_files_only", "token")
"""Arguments of loading that say how to fetch from the hub."""

WITH_CODE = ("InternVLChatModel",)
"""Architectures whose repositories bring code of their own."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Everything but weights in formats that nobody here reads.
_NOT_NEEDED = ["*.msgpack", "*.h5", "*.ot", "*.gguf", "*.onnx", "*.pth"]


class Checkpoint:
    """A folder with a ``config.json``, local or fetched from the Hugging Face hub.

    Args:
        name: as the user gave it; short names of the catalogue are known.
        revision: branch, tag or commit on the hub.
        fetch: how to fetch from the hub, names in :data:`FETCHING`.

    Attributes:
        name: as the user gave it, short names spelled out.
        folder: where its files are.
        fetch: as above.
        config: contents of ``config.json``.

    Raises:
        InputError: nothing is there, or ``config.json`` is missing or broken.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        fetch: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(name, str | os.PathLike):
            raise InputError(
                f"checkpoint {name!r} is not valid: give a folder, or owner/name of a repository "
                "on the Hugging Face hub."
            )
        self.name = os.fspath(resolve(name))
        self.fetch = dict(fetch or {})
        self.folder = find_folder(self.name, revision=revision, fetch=self.fetch)
        self.config = read_json(self.folder / "config.json", f"checkpoint {self.name!r}")

    @property
    def architecture(self) -> str:
        """The class that ``config.json`` names first, or an empty string."""
        names = self.config.get("architectures") or [""]
        return str(names[0])


def check_trust(source: Checkpoint, trusted: bool) -> None:
    """Raise InputError where a checkpoint is of a form that comes with code of its own, and the
    user did not say that it is trusted."""
    if source.architecture in WITH_CODE and not trusted:
        raise InputError(
            f"checkpoint {source.name!r} is in InternVL's own format, which comes with code from "
            "the checkpoint: say trust_remote_code=True (--trust-remote-code) if you trust it, or "
            "take one in Hugging Face format, whose name ends in -hf, e.g. "
            "OpenGVLab/InternVL3-2B-hf."
        )


def find_folder(
    name: str,
    *,
    revision: str | None = None,
    what: str = "checkpoint",
    weights: bool = True,
    fetch: Mapping[str, Any] | None = None,
) -> Path:
    """The local folder of a checkpoint, fetched first where ``name`` is one on the hub.

    Args:
        name: path, or ``owner/repository``.
        revision: on the hub.
        what: for messages.
        weights: whether its weights are wanted too.
        fetch: see :class:`Checkpoint`.

    Raises:
        InputError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{what} {name!r} is a file: give the folder that holds its config.json.")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"{what} {name!r} does not exist: give a folder with a config.json, or owner/name of a "
            "repository on the Hugging Face hub."
        )
    return _fetch(name, revision, what, weights, fetch or {})


def _fetch(
    name: str, revision: str | None, what: str, weights: bool, more: Mapping[str, Any]
) -> Path:
    from httpx import HTTPError  # what huggingface_hub speaks through
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    unwanted = [*_NOT_NEEDED] if weights else [*_NOT_NEEDED, "*.bin", "*.safetensors"]
    try:
        folder = snapshot_download(name, revision=revision, ignore_patterns=unwanted, **more)
        return Path(folder)
    except (OSError, ValueError, HTTPError, HfHubHTTPError) as error:
        raise InputError(
            f"{what} {name!r} is no local folder and could not be fetched from the Hugging Face "
            f"hub ({type(error).__name__}): give a folder with a config.json, or owner/name of a "
            "repository that can be reached."
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing, not JSON, or no object.
    """
    if not path.is_file():
        raise InputError(f"{what} has no {path.name}: it should be at {str(path)!r}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} of {what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} of {what} must hold a JSON object.")
    return value


def read_weights(folder: Path, what: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, memory-mapped where the format allows it.

    Reads ``.safetensors`` or ``.bin`` (as data only, never code), in one file or in shards.

    Raises:
        InputError: no weights, a shard that is missing, or a file that cannot be read.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            break
    else:
        raise InputError(
            f"{what} has no weights: {str(folder)!r} should hold one of {', '.join(WEIGHT_FILES)}."
        )
    weights: dict[str, torch.Tensor] = {}
    for file in _shards(path, what):
        weights.update(_read_file(file, what))
    return weights


def _shards(path: Path, what: str) -> Iterator[Path]:
    if path.suffix != ".json":
        yield path
        return
    places = read_json(path, what).get("weight_map")
    named = isinstance(places, dict) and all(isinstance(v, str) for v in places.values())
    if not named or not places:
        raise InputError(f"{str(path)!r} of {what} has no weight_map from weights to files.")
    for name in sorted(set(places.values())):
        if not (path.parent / name).is_file():
            raise InputError(f"{what} is incomplete: {str(path.parent / name)!r} is missing.")
        yield path.parent / name


def _read_file(path: Path, what: str) -> Mapping[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _read_pickle(path)
        if isinstance(found, dict):
            return found
        raise ValueError(f"a {type(found).__name__}, not tensors by name")
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{str(path)!r} of {what} cannot be read: {first_line(error)}") from error
    except Exception as error:  # pickle's own errors have no common base
        if type(error).__name__ != "UnpicklingError":
            raise
        raise InputError(
            f"{str(path)!r} of {what} cannot be read as plain tensors: {first_line(error)}"
        ) from error


def _read_pickle(path: Path) -> Mapping[str, torch.Tensor]:
    import zipfile

    # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first, and what follows it after a colon."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    taken = lines[:1]
    while taken[-1].rstrip().endswith(":") and len(taken) < len(lines):
        taken.append(lines[len(taken)].strip())
    return " ".join(taken)


# -- fields ----------------------------------------------------------------------------------------
# What a checkpoint's JSON files must say before anything is built from them, and what is said
# when a library cannot build it all the same.


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
