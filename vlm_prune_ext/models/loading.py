"""Loading checkpoints in Hugging Face format: weights, tokenizers, image processors."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, LlamaTokenizer

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import LoadOptions
from vlm_prune_ext.models.checkpoint import (
    WEIGHT_FILES,
    Checkpoint,
    explained,
    first_line,
    read_json,
)
from vlm_prune_ext.models.prompts import order_merges

_PICTURES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def load_model(kind: Any, source: Checkpoint, options: LoadOptions) -> Any:
    """A model of transformers' class ``kind``.

    Raises:
        InputError: no weights, or weights that are missing or do not fit.
    """
    what = f"checkpoint {source.name!r}"
    if not any((source.folder / name).is_file() for name in WEIGHT_FILES):
        raise InputError(
            f"{what} has no weights: {str(source.folder)!r} should hold one of "
            f"{', '.join(WEIGHT_FILES)}."
        )
    arguments = options.from_pretrained_arguments()
    arguments.pop("revision", None)  # the folder is that revision
    try:
        with explained(what):
            model, report = kind.from_pretrained(
                str(source.folder),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told apart below
                **arguments,
            )
    except InputError as error:
        if not isinstance(error.__cause__, SafetensorError):
            raise
        raise InputError(f"Weights of {what} cannot be read: {error.__cause__}.") from error
    names = sorted(report["missing_keys"])
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise InputError(f"{what} lacks {len(names)} weight(s): {shown}.")
    for name, stored, made in report["mismatched_keys"]:
        raise InputError(
            f"{what}: {name} has shape {tuple(stored)}, but its config.json makes it {tuple(made)}."
        )
    return model.eval()


def check_files(source: Checkpoint, *, tokenizer: bool = True, pictures: bool = True) -> None:
    """Raise InputError where a checkpoint has no tokenizer or no image processor."""
    what = f"checkpoint {source.name!r}"
    there = {name for name in (*_TOKENIZERS, *_PICTURES) if (source.folder / name).is_file()}
    vocabulary = (source.folder / "vocab.json").is_file()
    if tokenizer and not vocabulary and not there.intersection(_TOKENIZERS):
        raise InputError(f"{what} has no tokenizer: tokenizer.model or tokenizer.json is needed.")
    if pictures and not there.intersection(_PICTURES):
        raise InputError(
            f"{what} has no image processor: preprocessor_config.json (or processor_config.json) "
            "is needed beside config.json."
        )


def read_pictures(source: Checkpoint) -> Any:
    """The image processor of a checkpoint.

    Raises:
        InputError: it has none, or one that cannot be made.
    """
    check_files(source, tokenizer=False)
    try:
        return AutoImageProcessor.from_pretrained(str(source.folder), trust_remote_code=False)
    except Exception as error:  # many kinds, by what is wrong in the file
        said = first_line(error)
        raise InputError(
            f"The image processor of checkpoint {source.name!r} cannot be made: {said}"
        ) from error


def load_tokenizer(source: Checkpoint) -> Any:
    """The tokenizer of a checkpoint with a ``tokenizer.model`` or ``tokenizer.json``.

    LLaMA tokenizers are made by their own class: left to choose by model type, transformers may
    take a generic one that leaves out the blank in front of each text.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    folder, what = source.folder, f"checkpoint {source.name!r}"
    check_files(source, pictures=False)
    path = folder / "tokenizer_config.json"
    stated = read_json(path, what).get("tokenizer_class") if path.is_file() else None
    llama = stated in ("LlamaTokenizer", "LlamaTokenizerFast", None)
    kind: Any = LlamaTokenizer if llama else AutoTokenizer
    more = {} if llama else {"trust_remote_code": False}  # it would ask on the terminal
    try:
        made = kind.from_pretrained(str(folder), **more)
        if llama and not (folder / "tokenizer.json").is_file():
            order_merges(made, folder / "tokenizer.model")
        return made
    except Exception as error:  # many kinds, by format and version
        raise InputError(f"The tokenizer of {what} cannot be read: {first_line(error)}") from error


def token_id(tokenizer: Any, token: str, what: str) -> int:
    """Id of a special token.

    Raises:
        InputError: the tokenizer does not know it.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise InputError(f"The tokenizer of {what} has no token {token!r}, which its prompts need.")
    return int(found)
