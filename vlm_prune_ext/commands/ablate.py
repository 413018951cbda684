"""Caption one data set with many models and compare them: BLEU-4, METEOR, ROUGE-L, SPICE, CIDEr.

Each model runs in a process of its own; one that fails is reported and the others go on. The same
command continues where it was stopped, and leaves finished models alone. Models are short names
(vlm-prune models), demo, folders, name=folder, or owner/name on the Hugging Face hub.

In --output-dir: <model>_metrics.json, <model>_predictions.csv, all_models_summary.json,
comparison.csv (ranked by BLEU-4) and comparison.png; <model>-<method><budget> for pruned runs.
Exit code 0: all done; 1: a model (or some of its rows) failed; 2: wrong input, nothing was run.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from vlm_prune_ext.ablation.plan import PRESETS, AblationSettings, plan, to_redo
from vlm_prune_ext.commands.common import device_for
from vlm_prune_ext.experiment.settings import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    chosen = ("models", "preset")
    add_options(parser.add_mutually_exclusive_group(), chosen, AblationSettings)
    rest = [one.name for one in fields(AblationSettings) if one.name not in chosen]
    add_options(parser, rest, AblationSettings)


def run(args: argparse.Namespace) -> int:
    """Check everything, then run the study."""
    said = AblationSettings.of(vars(args))
    from vlm_prune_ext.evals.examples import read_data

    data = read_data(
        Path(said.data),
        image_column=said.image_column,
        prompt_column=said.prompt_column,
        reference_columns=said.reference_columns,
        image_folder=Path(said.image_folder) if said.image_folder else None,
        prompt=said.prompt,
        limit=said.limit,
    )
    from vlm_prune_ext.ablation.study import Study
    from vlm_prune_ext.ablation.worker import Folder
    from vlm_prune_ext.experiment.log import terminable

    runs = plan(said.models or PRESETS[said.preset], said.methods)
    redo = frozenset(run.name for run in runs) if said.fresh else to_redo(said.rerun, runs)
    for device in said.device or [None]:  # asked here, not by every run's own process
        device_for(SimpleNamespace(device=device, fast=said.fast))
    study = Study(runs, data, Folder(Path(said.output_dir)), said, redo)
    with terminable():
        return study.carry_out()
