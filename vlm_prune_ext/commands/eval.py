"""Score a model, pruned or not, on VLMEvalKit's data sets (also as run_vlmeval.py).

Without arguments: the demo model, with and without pruning, on the demo's data sets. Results are
in WORK_DIR/NAME_DATA/: predictions (.xlsx) and one record (_results.json) with scores, visual
tokens, FLOPs, times, memory and settings. A run goes on from what is there; what has changed since
is named and asked anew. Under torchrun rows are shared out among processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.record import Record, token_steps
from vlm_prune_ext.experiment.report import Column, Table, metric_figures, terminal_text
from vlm_prune_ext.experiment.settings import (
    RUN_KEYS,
    Settings,
    add_config,
    add_options,
    method_options,
    read_file,
    read_value,
    resolve,
)
from vlm_prune_ext.methods.custom import only_code_named_in

ARGUMENT_DEFAULT = argparse.SUPPRESS  # what is not given is absent, so that a file can say it


# -- arguments -----------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_options(parser, RUN_KEYS)
    add_config(parser)
    group = parser.add_argument_group("what prunes")
    group.add_argument("--baseline", action="store_true", help="nothing")
    group.add_argument("--method", metavar="NAME[:BUDGET]", help="see vlm-prune methods")
    group.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="any parameter of the method, under its own or its model.config name",
    )
    for option in method_options():
        if option.flag:
            group.add_argument(option.option, action="store_true", help=option.help)
        else:
            help_text = option.help.replace("%", "%%")
            group.add_argument(option.option, metavar="VALUE", help=help_text)


def settings_of(given: Mapping[str, Any]) -> tuple[Settings, frozenset[str]]:
    """Settings that a command line (and the file it names) asks for, and which of them are given.

    Args:
        given: name -> value of the arguments that were given.

    Raises:
        InputError: anything that is not accepted.
    """
    line = dict(given)
    allow_code = line.pop("allow_code", False)
    file = read_file(line.pop("config"), allow_code=allow_code) if "config" in line else {}
    extra = line.pop("set", [])
    for option in method_options():
        if option.key in line and not option.flag:
            line[option.key] = read_value(line[option.key])
    for setting in extra:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r} is not valid: KEY=VALUE.")
        line[key.strip().replace("-", "_")] = read_value(value)
    with nullcontext() if allow_code or not file else only_code_named_in(map(str, line.values())):
        return resolve(line, file)


# -- running -------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0: all went well; 1: some rows failed, or scores are missing; 2: an interrupted run.
    """
    settings, given = settings_of(vars(args))
    try:
        if not given - {"work_dir", "limit", "reuse", "fresh", "seed", "device", "dtype"}:
            return _compare(settings)
        return _run(settings)
    except KeyboardInterrupt:
        print(
            "Interrupted: the answers made so far are on disk, and the same command goes on from "
            "them (as --reuse did; --fresh starts anew).",
            file=sys.stderr,
        )
        return 2


def _compare(settings: Settings) -> int:
    from vlm_prune_ext.evals.names import keep_out_of_lmudata
    from vlm_prune_ext.evals.sweep import demo

    keep_out_of_lmudata()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Under torchrun a run must name --data: the comparison is one process's.")
    return demo(settings)


def _run(settings: Settings) -> int:
    from vlm_prune_ext.demo import CHECKPOINT
    from vlm_prune_ext.evals.names import (
        SHAPES,
        check_by_sight,
        import_quietly,
        is_ours,
        keep_out_of_lmudata,
    )
    from vlm_prune_ext.evals.precheck import check_backend, check_fit, check_served, check_stated
    from vlm_prune_ext.models.checkpoint import Checkpoint

    # Nothing that is wrong should cost an import of torch, let alone VLMEvalKit's.
    check_backend(settings.backend, settings.as_json())
    folder = Path(settings.model_path or CHECKPOINT)
    if not folder.is_dir():
        _check_source(settings)
    for name in settings.data:
        check_by_sight(name)
    check_stated(folder, settings.method)
    if settings.backend is not None:
        check_served(Checkpoint(settings.model_path or CHECKPOINT), settings.method)
    _check_source(settings)
    if not settings.data:
        settings = replace(settings, data=SHAPES)
    if all(map(is_ours, settings.data)):
        keep_out_of_lmudata()
    import_quietly()
    from vlm_prune_ext.evals.rows import check_name, register_datasets
    from vlm_prune_ext.evals.sweep import evaluate
    from vlm_prune_ext.evals.vlmeval_run import Models, Ranks
    from vlm_prune_ext.models.adapters import check_pictures
    from vlm_prune_ext.pruning import announce

    register_datasets()
    for name in settings.data:
        check_name(name, settings.mode)
    models, ranks = Models(settings), Ranks.here()
    if settings.backend is not None and ranks.world > 1:
        raise InputError("backend='vllm' is one process's: tensor_parallel_size shares it on GPUs.")
    check_fit(models.source, settings.method)
    check_pictures(models.source, settings.as_json())
    if ranks.rank == 0:
        announce(settings.method)
    made = []
    with ranks.connected(settings.device), closing(models):
        for name in settings.data:
            made.append(evaluate(settings, name, models))
    records = [one for one in made if one is not None]
    return report(records, settings) if ranks.rank == 0 else 0


def _check_source(settings: Settings) -> None:
    from vlm_prune_ext.models.checkpoint import Checkpoint, check_trust

    if settings.model_path is not None:
        check_trust(Checkpoint(settings.model_path), settings.trust_remote_code)


# -- reporting -----------------------------------------------------------------------------------
COLUMNS = (
    Column("data", left=True),
    Column("score", left=True),
    Column("rows", 0),
    Column("failed", 0),
    Column("visual tokens"),
    Column("FLOPs", unit=" %"),
    Column("prefill", 0, unit=" ms"),
)


def report(records: Sequence[Record], settings: Settings) -> int:
    """Print one row per data set and what went wrong; returns the exit code."""
    extra = metric_figures()
    table = Table([*COLUMNS, *extra], title=records[0].name)
    for one in records:
        prefill = one.seconds.prefill if one.seconds else None
        table.rows.append(
            [
                one.dataset,
                _score(one),
                one.samples,
                len(one.failed),
                token_steps(one.visual_tokens),
                100 * one.flops.ratio if one.flops else None,
                1000 * prefill.median if prefill else None,
                *(one.metrics.get(column.key) for column in extra),
            ]
        )
    table.show(boxed=True)
    for note in dict.fromkeys(one.note for one in records if one.note):
        print(terminal_text(note))
    for one in records:
        print(terminal_text(Path(settings.work_dir) / f"{one.name}_{one.dataset}"))
    return _failures(records, settings)


def _failures(records: Sequence[Record], settings: Settings) -> int:
    failed = sum(len(one.failed) for one in records)
    for one in records:
        for row in one.failed[:10]:
            said = f"{one.dataset}, row {row['index']}: {row['reason']}"
            print(terminal_text(said), file=sys.stderr)
        if len(one.failed) > 10:
            print(f"{one.dataset}: and {len(one.failed) - 10} more rows", file=sys.stderr)
    if failed:
        rows = "row" if failed == 1 else "rows"
        print(f"{failed} {rows} failed; the others are done.", file=sys.stderr)
    unscored = settings.mode != "infer" and any(one.score is None for one in records)
    return 1 if failed or unscored else 0


def _score(record: Record) -> str:
    if record.score is None:
        return "-"
    error = record.score.standard_error
    spread = f" ± {1.96 * error:.1f}" if error is not None else ""
    return f"{record.score.name} {record.score.value:.2f}{spread}"
