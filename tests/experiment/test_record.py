"""Records: what lines become, fingerprints that tell what differs, and reading back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment import record
from vlm_prune_ext.experiment.record import (
    Record,
    Sample,
    SampleLog,
    Score,
    Stretch,
    changed,
    digest,
    read_record,
    summarise,
    weights_fingerprint,
)


def sample(index: int, kept: dict[str, int], **more: Any) -> Sample:
    values = {
        "prompt_tokens": 20,
        "new_tokens": 3,
        "visual_tokens": 16,
        "visual_kept": kept,
        "lengths": [20, 20, 10, 10],
        "prefill_seconds": 0.1 * (index + 1),
        "decode_seconds": 0.4,
        "flops": 50.0,
        "flops_baseline": 100.0,
    }
    return Sample(index, "yes", **{**values, **more})


def made(**more: Any) -> Record:
    samples = [sample(0, {"0": 16, "2": 6}, warm_up=True), sample(1, {"0": 16, "2": 8})]
    samples.append(Sample(2, "", failed="no picture"))
    stretches = [Stretch(0, 2.0, 7, 1.5, {"cpu": "x"}), Stretch(1, 3.0, 9, None, {"cpu": "x"})]
    fixed: dict[str, Any] = {
        "name": "m-fastv",
        "dataset": "d",
        "model_path": "p",
        "method": {"name": "fastv"},
        "score": Score("Overall", 50.0, 1.0),
        "scores": {"Overall": 50.0},
        "without_image": 0,
        "config": {"seed": 0},
        "versions": {},
        "commit": None,
    }
    return Record(**{**fixed, **summarise(samples, stretches), **more})


def test_lines_become_means() -> None:
    one = made()
    assert (one.samples, one.failed) == (3, [{"index": "2", "reason": "no picture"}])
    assert [(g.first, g.last, g.before, g.after) for g in one.visual_tokens] == [
        (0, 1, 16.0, 16.0),
        (2, 3, 16.0, 7.0),
    ]
    assert one.mean_visual_tokens == 11.5 and one.last_visual_tokens == 7.0
    assert one.token_steps == "16 → 7"
    assert one.flops is not None and one.flops.ratio == 0.5 and one.flops.vision is None
    assert one.seconds.prefill is not None and one.seconds.prefill.median == 0.2
    assert one.seconds.decode_per_token == 0.2 and one.seconds.warm_up_samples == 1
    assert (one.peak_memory_bytes, one.energy_joules, one.wall_seconds) == (9, 1.5, 5.0)
    assert one.hardware == [{"cpu": "x"}]


def test_records_read_back_equal(tmp_path: Path) -> None:
    one = made(metrics={"chair": 0.5, "clip": None}, missing={"clip": "not installed"})
    one.write(tmp_path / "r.json")
    assert read_record(tmp_path / "r.json") == one
    older = {k: v for k, v in asdict(one).items() if k not in ("metrics", "missing")}
    (tmp_path / "old.json").write_text(json.dumps(older))
    assert read_record(tmp_path / "old.json").metrics == {}
    for text in ("{", "[]", '{"name": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad\.json"):
            read_record(tmp_path / "bad.json")


def test_the_log_has_samples_and_stretches(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "x.jsonl")
    first, process = sample(0, {"0": 16}), Stretch(0, 1.0, 2, None, {})
    log.add(first)
    log.append({"sample": {"index": 5}}, {"sample": 3}, {"other": {}})
    log.append({"sample": {"index": 1, "prediction": "a", "from_a_later_version": 3}})
    log.add(process)
    samples, stretches = log.samples()
    assert samples == [first, Sample(1, "a")] and stretches == [process]
    log.rewrite([process, first])
    assert log.samples() == ([first], [process])


def test_digests_differ_where_parts_do() -> None:
    parts: list[tuple[Any, ...]] = [
        ("a", "b"),
        ("ab", ""),
        ("ab",),
        (b"ab",),
        (["a", "b"],),
        (1,),
        ("1",),
    ]
    assert len({digest(*one) for one in parts}) == len(parts)
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})


def test_a_changed_weight_changes_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a file that is not read in full, and wherever the folder lies."""
    monkeypatch.setattr(record, "_WHOLE", 1000)
    monkeypatch.setattr(record, "_BLOCK", 4)
    data = bytearray(range(256)) * 40
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(data)
        (tmp_path / name / "README.md").write_text(name)
    first = weights_fingerprint(tmp_path / "a")
    assert weights_fingerprint(tmp_path / "b") == first
    changed_all = bytes(byte ^ 1 for byte in data)
    for content in (bytes(data[:-1]), changed_all, bytes([1]) + bytes(data[1:])):
        (tmp_path / "b" / "model.safetensors").write_bytes(content)
        assert weights_fingerprint(tmp_path / "b") != first
    (tmp_path / "b" / "model.safetensors").write_bytes(data)
    (tmp_path / "b" / "config.json").write_text("{ }")
    assert weights_fingerprint(tmp_path / "b") != first


def test_what_changed_is_named() -> None:
    assert changed({"seed": 0, "a": 1}, {"seed": 5, "a": 1, "b": "x"}) == [
        "seed=0, now 5",
        "b=None, now 'x'",
    ]
