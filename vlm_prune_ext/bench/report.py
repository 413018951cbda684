"""The bench's figures: a table in every form, a picture, and ``bench.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_prune_ext.experiment.log import write_json, write_whole
from vlm_prune_ext.experiment.report import Figure, Table, bar_plot, metric_figures, write_table

ENDINGS = ("json", "md", "png", "csv", "html", "jsonl")
Result = Mapping[str, Any]
"""A :class:`vlm_prune_ext.bench.cases.Measured` as plain values."""

_MS = 1e3
FIGURES = (
    Figure("batch", 0, path="batch_size"),
    Figure("backend", left=True, path="backend"),
    Figure("method", left=True, path="method"),
    Figure("FLOPs ratio", 3, path="flops_ratio"),
    Figure("image FLOPs", 3, path="flops_ratio_visual"),
    Figure("prefill ms", 2, path="prefill.median", scale=_MS),
    Figure("time ratio", 3, path="time_ratio"),
    Figure("time/FLOPs", 3, path="time_over_flops"),
    Figure("roofline ms", 2, path="prefill_roofline", scale=_MS),
    Figure("TTFT ms", 2, path="ttft.median", scale=_MS),
    Figure("TTFT ratio", 3, path="ttft_ratio"),
    Figure("whole FLOPs", 3, path="flops_ratio_whole"),
    Figure("TPOT ms", 2, path="tpot", scale=_MS),
    Figure("TPOT roofline ms", 2, path="tpot_roofline", scale=_MS),
    Figure("samples/s", 2, path="samples_per_second"),
    Figure("long/s", 2, path="long_samples_per_second"),
    Figure("new length/s", 2, path="unseen_samples_per_second"),
    Figure("peak GiB", 2, path="peak_memory", scale=2**-30),
    Figure("J/sample", 2, path="energy"),
    Figure("same kept", 4, path="same_kept"),
)

BACKENDS = ("transformers", "transformers-attentions", "hooks", "graphs")
BACKEND_NAMES = {
    "hf": "transformers",
    "hf-attentions": "transformers-attentions",
    "ordinary": "hooks",
    "fast": "graphs",
}
"""What backends were called before: in ``bench.json``, and still taken on the command line."""
FROZEN = {
    "way": "backend",
    "batch": "batch_size",
    "first_token": "ttft",
    "decode": "tpot",
    "prefill_floor": "prefill_roofline",
    "decode_floor": "tpot_roofline",
    "peak_bytes": "peak_memory",
    "joules": "energy",
}
"""Key that ``bench.json`` has for others to read -> its name here."""


def frozen(result: Result) -> dict[str, Any]:
    """A result as ``bench.json`` has it."""
    old = {key: result[name] for key, name in FROZEN.items()}
    old["way"] = next(old for old, new in BACKEND_NAMES.items() if new == result["backend"])
    return {**{k: v for k, v in result.items() if k not in FROZEN.values()}, **old}


def unpruned(results: Sequence[Result], result: Result) -> Result | None:
    """The baseline of the same backend and batch; for hooks also transformers' own."""
    backend = result["backend"]
    backends = (backend, "transformers") if backend == "hooks" else (backend,)
    for name in backends:
        for other in results:
            same = other["batch_size"] == result["batch_size"] and other["method"] == "none"
            if same and other["backend"] == name:
                return other
    return None


def table(results: Sequence[Result], header: Mapping[str, Any]) -> Table:
    """One row a case."""
    full = [{**one, **ratios(one, unpruned(results, one))} for one in results]
    figures = [*FIGURES, *metric_figures()]
    return Table.of(figures, full, title=header["title"], notes=[legend(header)])


def ratios(result: Result, base: Result | None) -> dict[str, float | None]:
    """Times over those of the unpruned row, and the prefill's over its FLOPs ratio."""
    time = result["prefill"]["median"] / base["prefill"]["median"] if base else None
    timed = base is not None and result["ttft"] and base["ttft"]
    return {
        "time_ratio": time,
        "time_over_flops": time / result["flops_ratio"] if time is not None else None,
        "ttft_ratio": result["ttft"]["median"] / base["ttft"]["median"] if base and timed else None,
    }


def legend(header: Mapping[str, Any]) -> str:
    """What the columns are."""
    roofline = header["ceilings"]
    return (
        f"Roofline: {roofline['flops'] / 1e12:.3g} TFLOP/s ({roofline['dtype']}), "
        f"{roofline['bytes'] / 1e12:.3g} TB/s. FLOPs: of the prefill, text included, over the "
        "unpruned one; image FLOPs: of its layers over visual tokens alone, as papers state it; "
        "a rule's own arithmetic is in neither; time: the same, over the unpruned row of the same "
        "backend (of transformers, where hooks have none). TTFT: of generate, tower included, as "
        "whole FLOPs are; TPOT: per token and batch. samples/s: answers of one token; long/s: of "
        f"{header['new_tokens']}; new length/s: these, to prompts of a length not seen before. "
        "Medians."
    )


def files(folder: Path) -> list[Path]:
    """All that a bench writes."""
    return [folder / f"bench.{ending}" for ending in ENDINGS]


def write(results: Sequence[Result], header: Mapping[str, Any], folder: Path) -> None:
    """Write all files but the log.

    Raises:
        InputError: the folder cannot be written.
    """
    made = table(results, header)
    cells = [{**frozen(one), **ratios(one, unpruned(results, one))} for one in results]
    write_json(folder / "bench.json", {**header, "cells": cells})
    write_table(folder, "bench", made, ("csv", "html"))
    bare = Table(made.columns, made.rows)
    write_whole(folder / "bench.md", f"{made.title}\n\n{bare.markdown()}\n{legend(header)}\n")
    draw(results, header["title"], folder / "bench.png")


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Prefill per sample: a bar a case, its roofline as a mark, a panel a batch size."""
    names = list(dict.fromkeys((one["backend"], one["method"]) for one in results))
    panels: dict[str, list[float | None]] = {}
    floors: dict[str, list[float | None]] = {}
    for size in sorted({one["batch_size"] for one in results}):
        own = {(r["backend"], r["method"]): r for r in results if r["batch_size"] == size}
        scale = _MS / size
        panel = f"batch {size}, prefill, ms per sample"
        panels[panel] = [own[n]["prefill"]["median"] * scale if n in own else None for n in names]
        floors[panel] = [own[n]["prefill_roofline"] * scale if n in own else None for n in names]
    labels = [f"{backend}  {method}" for backend, method in names]
    bar_plot(panels, labels, path, digits=2, floors=floors, title=f"{title} (|: roofline)")
