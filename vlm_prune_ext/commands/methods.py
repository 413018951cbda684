"""List the pruning methods: parameters, defaults, the model.config fields that set them, paper and
reference code. With a NAME, everything about that one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from typing import TYPE_CHECKING, Any

from vlm_prune_ext.commands.common import print_table

if TYPE_CHECKING:
    from vlm_prune_ext.methods.base import Method


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this method, in full")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Print the methods that were asked for."""
    from vlm_prune_ext.methods.registry import METHODS, method_class

    if args.name is not None:
        method_class(args.name)
    names = list(METHODS) if args.name is None else [args.name]
    records = [record(name) for name in names]
    if args.json:
        print(json.dumps(records if args.name is None else records[0], indent=2, default=str))
        return 0
    for index, entry in enumerate(records):
        if index:
            print()
        _print(entry, full=args.name is not None)
    return 0


def record(name: str) -> dict[str, Any]:
    """All that the registry knows about a method, ready for JSON."""
    from vlm_prune_ext.methods.registry import METHODS

    cls = METHODS[name]
    if cls is None:
        summary = "The baseline: nothing is dropped and nothing is attached to the model."
        return {"name": name, "summary": summary, "parameters": []}
    return {
        "name": name,
        "class": cls.__name__,
        "summary": _plain(cls.summary()),
        "paper": cls.paper,
        "code": cls.code,
        "sites": list(cls.sites),
        "short_form": f"{name}:{cls.budget_field.upper()}" if cls.budget_field else name,
        "config_flag": cls.flag(),
        "parameters": [
            {
                "name": one.name,
                "required": one.required,
                "default": None if one.required else one.default,
                "config_names": list(cls.config_names(one)),
                "help": one.help,
            }
            for one in cls.options().values()
        ],
        "documentation": _documentation(cls),
    }


def _documentation(cls: type[Method]) -> str:
    """The class's docstring, and those of the dataclasses its parameters are made of."""
    # The class's own parameters are in the table already.
    parts = [(inspect.getdoc(cls) or "").partition("\n\nAttributes:")[0]]
    parts += [f"{each.__name__}: {inspect.getdoc(each)}" for each in cls.companions]
    return _plain("\n\n".join(parts))


def _plain(text: str) -> str:
    """Without reStructuredText marks."""
    return re.sub(r":\w+:`(.*?)`", r"\1", text).replace("``", "")


def _print(entry: dict[str, Any], full: bool) -> None:
    print(f"{entry['name']}: {entry['summary']}")
    sources = {"paper": entry.get("paper"), "code": entry.get("code")}
    sources |= {"short form": entry.get("short_form"), "turned on by": entry.get("config_flag")}
    said = [f"{key} {value}" for key, value in sources.items() if value]
    if said:
        print("  " + ", ".join(said))
    if entry["parameters"]:
        rows = [
            (
                parameter["name"],
                "(required)" if parameter["required"] else repr(parameter["default"]),
                ", ".join(parameter["config_names"]) or "-",
                parameter["help"],
            )
            for parameter in entry["parameters"]
        ]
        print_table(("parameter", "default", "model.config", "meaning"), rows)
    if full and "documentation" in entry:
        print(f"\n{entry['documentation']}")
