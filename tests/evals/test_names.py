"""The demo's data sets, made on first use and kept in the cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlm_prune_ext as vp
from vlm_prune_ext.evals import names


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(names.VARIABLE, raising=False)
    monkeypatch.setattr(names, "SAMPLES", 2)
    return tmp_path / "vlm_prune_ext"


def test_both_forms_are_made_once(home: Path) -> None:
    kinds = {"tsv": "Shapes_YN.tsv", "parquet": "yn.parquet"}
    for form, name in kinds.items():
        folder = names.demo_data(form)
        assert folder.parent == home and folder.name.startswith(f"shapes_{form}_seed0_samples2_")
        (folder / name).write_bytes(b"kept")
        assert names.demo_data(form) == folder and (folder / name).read_bytes() == b"kept"
    assert {path.name.rpartition("_")[2] for path in home.iterdir()} == {names._recipe()}
    assert len(list(home.iterdir())) == 2  # nothing half-written beside them


def test_a_folder_that_is_named_comes_first(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(names.VARIABLE, str(tmp_path / "mine"))
    assert names.demo_data("tsv") == names.demo_data("parquet") == tmp_path / "mine"
    assert not home.exists()


def test_a_cache_that_cannot_be_written(home: Path) -> None:
    home.write_text("a file in its place")
    for form in ("tsv", "parquet"):
        with pytest.raises(vp.InputError, match=r"cannot be written.*XDG_CACHE_HOME"):
            names.demo_data(form)
