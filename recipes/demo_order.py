"""Is the order of methods on the demo the same for two evaluation seeds?

``python recipes/demo_order.py --samples 30 --seeds 5 6 --out FILE``: methods that keep 64 visual
tokens (HiMAP: 72), on fresh scenes of each seed; writes a table of mean scores (% right over the
four sets; captions: every coloured shape named) and Kendall's tau between the seeds' orders.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import vlm_prune_ext as vp
from vlm_prune_ext.evals import scenes
from vlm_prune_ext.experiment.log import write_whole
from vlm_prune_ext.experiment.report import Column, Table
from vlm_prune_ext.methods.base import Method
from vlm_prune_ext.methods.registry import parse_method

NAMES = (
    *("fastv:64", "himap:72", "pdrop:64", "dart:64", "visionzip:64", "vispruner:64"),
    *("divprune:64", "cdpruner:64", "scope:64", "random:64", "downsample:64"),
)


def _always(method: Method | None, batch: int) -> Method | None:
    return method


def scores(samples: int, seed: int) -> dict[str, float]:
    """Method -> mean over the sets of its share of right answers, %."""
    model, processor = vp.load(dtype="float32")
    found = {}
    sets = [scenes.cases(kind, seed, samples) for kind in ("mcq", "yn", "vqa", "caption")]
    for name in ("none", *NAMES):
        method = None if name == "none" else parse_method(name)
        right: list[bool] = []
        for items in sets:
            given = scenes.ask(model, processor, items, partial(_always, method), batch_size=1)
            right += [scenes.is_right(a, b.prediction) for a, b in zip(items, given, strict=True)]
        found[name] = 100 * sum(right) / len(right)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=30, help="per set and seed")
    parser.add_argument("--seeds", type=int, nargs=2, default=(5, 6))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        one, other = pool.map(partial(scores, given.samples), given.seeds)
    from scipy.stats import kendalltau

    tau = kendalltau([one[name] for name in NAMES], [other[name] for name in NAMES]).statistic
    columns = [Column("method", left=True), *(Column(f"seed {seed}") for seed in given.seeds)]
    rows: list[Any] = [[name, one[name], other[name]] for name in one]
    note = f"Kendall's tau between the orders of {len(NAMES)} methods: {tau:.2f}."
    write_whole(given.out, Table(columns, rows, notes=[note]).markdown())
    print(given.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
