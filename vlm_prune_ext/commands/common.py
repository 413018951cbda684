"""Arguments that several commands share: which model, which method."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.settings import MODEL, add_options

if TYPE_CHECKING:
    import torch

    from vlm_prune_ext.methods.base import Method

METHOD_HELP = (
    "a method's short form: fastv, fastv:100, fastv:0.25,agg_layer=2 (vlm-prune methods lists them)"
)


FRESH_HELP = "start anew; what is there is put aside (default: go on from it)"
TRUST_HELP = (
    "load formats that come with code of their own, e.g. OpenGVLab/InternVL2-2B (default: refuse)"
)


def add_method_arguments(
    parser: argparse.ArgumentParser, group: Any = None, *, required: bool = False
) -> None:
    """Declare ``--method`` and ``--set``.

    Args:
        parser: gets both.
        group: gets ``--method`` instead, to exclude something else.
        required: whether ``--method`` must be given.
    """
    if group is None:
        parser.add_argument("--method", metavar="NAME", required=required, help=METHOD_HELP)
    else:
        group.add_argument("--method", metavar="NAME", help=METHOD_HELP)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="a parameter of the method, under its own or its model.config name; may be repeated",
    )


def chosen_method(args: argparse.Namespace) -> Method | None:
    """The method that ``--method`` and ``--set`` ask for; ``None`` for the baseline.

    Raises:
        InputError: unknown name or parameter, or a value that is not accepted.
    """
    from vlm_prune_ext.methods.registry import parse_method

    if args.method is None:
        if args.settings:
            raise InputError(
                f"--set {args.settings[0]} needs --method: it is a method's parameter."
            )
        return None
    for setting in args.settings:
        if "=" not in setting:
            raise InputError(f"--set {setting} is not valid: KEY=VALUE.")
    more = ",".join(args.settings)
    if not more:
        return parse_method(args.method)
    return parse_method(f"{args.method}{',' if ':' in args.method else ':'}{more}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model, on which device, in which precision."""
    add_options(parser, MODEL)


def model_name(args: Any) -> str:
    """What the model is called in files and messages."""
    return "demo" if args.model_path is None else checkpoint_of(args)


def checkpoint_of(args: Any) -> str:
    """What is loaded: the demo's checkpoint where nothing is said.

    Raises:
        InputError: an empty text is (from a shell variable that was not set).
    """
    from vlm_prune_ext.demo import CHECKPOINT

    if args.model_path is None:
        return str(CHECKPOINT)
    if not args.model_path.strip():
        raise InputError(f"--model-path {args.model_path!r} is not valid: it is empty.")
    return args.model_path


def device_for(args: Any) -> torch.device:
    """The device that is meant, before anything is loaded.

    Raises:
        InputError: it is not there, or ``--fast`` cannot be on it.
    """
    from vlm_prune_ext.models import device_of

    device = device_of(args.device)
    if args.fast and device.type != "cuda":
        raise InputError(f"--fast is not possible: CUDA graphs need a GPU, this is {device.type}.")
    return device


def load_model(args: Any) -> tuple[Any, Any]:
    """``(model, processor)`` as :func:`add_model_arguments`'s arguments say."""
    from vlm_prune_ext.models import load

    quiet_transformers()
    model, processor = load(
        checkpoint_of(args),
        dtype=args.dtype,
        device=args.device,
        attn_implementation=args.attn_implementation,
        fast=args.fast,
        trust_remote_code=args.trust_remote_code,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
    )
    return model.eval(), processor


def quiet_transformers() -> None:
    """Leave what a command prints to the command; transformers still reports errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
