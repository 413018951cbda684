"""A metric is one declaration: written into a file of somebody's own, it is in the record, the log
and every table of eval, profile, bench and ablate, and nothing else was touched."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import makers, vlmeval_files
from vlm_prune_ext import cli
from vlm_prune_ext.demo.writers import write_caption_csv
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import sweep
from vlm_prune_ext.experiment import metrics

TITLE, KEY, HELP = "wider words", "wider_words", "tokens generated, mean, and three"
FILE = """
from vlm_prune_ext.experiment.metrics import mean, metric


@metric("wider_words", "wider words", digits=3, help="tokens generated, mean, and three")
def wider(scored):
    assert all(isinstance(text, str) for text in scored.predictions)
    return 3 + mean(sample.new_tokens for sample in scored.samples)
"""
FASTV = "fastv:5,agg_layer=2"


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[None]:
    path = tmp_path / "somebodys_metric.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("somebodys_metric", path)
    assert spec is not None and spec.loader is not None
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        yield
    finally:
        metrics.METRICS.pop(KEY, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.tiny_hf_llava(tmp_path_factory.mktemp("models") / "tiny", layers=4)


def values(found: Any) -> Iterator[float]:
    """Of the metric, wherever a JSON file has it."""
    if isinstance(found, dict):
        if isinstance(found.get(KEY), float):
            yield found[KEY]
        for value in found.values():
            yield from values(value)
    elif isinstance(found, list):
        for value in found:
            yield from values(value)


def check(folder: Path, said: str, names: dict[str, str], count: int) -> None:
    """Record and log have ``count`` values of the metric, tables and console its name and them."""
    record = list(values(json.loads((folder / names["record"]).read_text())))
    lines = (folder / names["log"]).read_text().splitlines()
    log = [value for line in lines for value in values(json.loads(line))]
    assert len(record) == len(log) == count and record == log and min(log) > 3
    shown = {f"{value:.3f}" for value in log}
    for form in ("md", "html"):
        text = (folder / names[form]).read_text()
        assert TITLE in text and all(value in text for value in shown), form
    sheet = (folder / names["csv"]).read_text()
    assert sheet.splitlines()[0].count(KEY) == 1 and all(str(value) in sheet for value in log)
    assert TITLE in said and all(value in said for value in shown)


def test_bench(
    registered: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--model", str(model), "--method", "none", FASTV, "--batch-size", "1"]
    words += ["--backend", "transformers", "hooks", "--repeat", "1", "--max-new-tokens", "3"]
    assert cli.main(["bench", *words, "--device", "cpu", "--out", str(out)]) == 0
    names = {form: f"bench.{form}" for form in ("md", "html", "csv")}
    names |= {"record": "bench.json", "log": "bench.jsonl"}
    check(out, capsys.readouterr().out, names, 2)


def test_ablate(
    registered: None,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")  # METEOR's Java takes long to start
    out, data = tmp_path / "out", write_caption_csv(tmp_path / "data", 1, 2)
    words = ["--data", str(data), "--model", str(model), "--method", "none", "fastv:5"]
    words += ["--max-new-tokens", "3", "--device", "cpu", "--out", str(out)]
    assert cli.main(["ablate", *words]) == 0
    names = {form: f"comparison.{form}" for form in ("md", "html", "csv")}
    names |= {"record": "all_models_summary.json", "log": "runs.jsonl"}
    check(out, capsys.readouterr().out, names, 2)


def test_profile(
    registered: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    assert cli.main(["profile-data", "--from", "demo", "--samples", "1", "--out", str(data)]) == 0
    words = ["--src-folder", str(data), "--model-name", str(model), "--method", "none", FASTV]
    words += ["--repeat", "1", "--warmup", "0", "--energy-seconds", "0", "--max-new-tokens", "3"]
    assert cli.main(["profile", *words, "--device", "cpu", "--out", str(out)]) == 0
    names = {form: f"pretty_results/tiny.{form}" for form in ("md", "csv", "json")}
    names |= {"html": "pretty_results/index.html", "log": "cells.jsonl"}
    names["record"] = names.pop("json")
    check(out, capsys.readouterr().out, names, 2)


def test_eval(
    registered: None,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a sweep over methods, done in this process: others would have to register it too."""
    monkeypatch.setattr(sweep, "_workers", lambda asked, cells: (0, 1))
    out, data = tmp_path / "out", tmp_path / "LMUData"
    data.mkdir()
    monkeypatch.setenv("LMUData", str(data))
    vlmeval_files.write(data, "Mine", vlmeval_files.mcq_rows(2))
    words = ["--model", str(model), "--method", "none", "fastv:5", "--data", "Mine"]
    words += ["--no-controls", "--max-new-tokens", "3", "--device", "cpu", "--out", str(out)]
    assert cli.main(["sweep", *words]) == 0
    names = {form: f"sweep.{form}" for form in ("md", "csv")} | {"html": "index.html"}
    check(out, capsys.readouterr().out, {**names, "record": "sweep.json", "log": sweep.LOG}, 2)


def test_one_name_once(registered: None) -> None:
    with pytest.raises(InputError, match="'wider_words' is registered already"):
        metrics.register(metrics.Metric(KEY, "again", lambda scored: 0.0))
