"""List the models that have a short name: id, size, and what each supports. With a NAME, everything
about that one. Any other checkpoint of these families loads by its own name or folder.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlm_prune_ext.commands.common import print_table
from vlm_prune_ext.errors import unknown_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this model, in full")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Print the models that were asked for."""
    from vlm_prune_ext.models.catalogue import CATALOGUE, MINIMUM

    if args.name is not None and args.name not in CATALOGUE:
        raise unknown_name("model", args.name, CATALOGUE)
    names = list(CATALOGUE) if args.name is None else [args.name]
    records: list[dict[str, Any]] = [
        {**CATALOGUE[name].record(), "needs": dict(MINIMUM)} for name in names
    ]
    if args.json:
        print(json.dumps(records if args.name is None else records[0], indent=2))
    elif args.name is None:
        _print_all(records)
    else:
        for key, value in records[0].items():
            print(f"{key}: {_said(value)}")
    return 0


SUPPORT = ("evaluate", "batch", "llm_side", "behind_tower", "vision_side", "video", "fast")


def _print_all(records: list[dict[str, Any]]) -> None:
    columns = (
        "name",
        "size",
        "evaluate",
        "batch",
        "LLM side",
        "behind tower",
        "vision side",
        "video",
        "fast",
        "licence",
        "model id",
        "note",
    )
    rows = [
        (
            record["name"],
            f"{record['size']:g}B",
            *(_said(record[key]) for key in SUPPORT),
            record["licence"],
            record["model_id"],
            record["note"] or "-",
        )
        for record in records
    ]
    print_table(columns, rows)
    print("\nneeds " + _said(records[0]["needs"]))


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {least} or newer" for name, least in value.items())
    return str(value) or "-"
