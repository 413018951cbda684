"""Tables of one's own, named by their paths, in every command alike."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("vlmeval")

from tests import makers
from tests import vlmeval_files as files
from tests.makers import photo
from vlm_prune_ext import cli
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals import names
from vlm_prune_ext.evals.names import check_by_sight, own_table, table_name
from vlm_prune_ext.evals.rows import OwnVQA, open_table


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "LMUData").mkdir()
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(names, "_TABLES", {})
    monkeypatch.chdir(tmp_path)


def questions(folder: Path) -> Path:
    """A CSV as people have them: pictures as files, no index, right answers, a category."""
    folder.mkdir()
    for number in range(4):
        photo(60, 44, seed=number).save(folder / f"{number}.png")
    table = pd.DataFrame(
        {
            "image_path": [f"{number}.png" for number in range(4)],
            "question": [f"What is {number}?" for number in range(4)],
            "answer": ["one", "two", "three, four", "None"],
            "category": ["a", "a", "b", "b"],
        }
    )
    table.to_csv(folder / "mine.csv", index=False)
    return folder / "mine.csv"


def test_a_csv_of_pictures_and_questions(tmp_path: Path) -> None:
    path = questions(tmp_path / "data")
    assert table_name(str(path)) == "mine" and own_table("mine") == path
    assert table_name("./data/mine.csv") == "mine"
    table = open_table("mine")
    assert isinstance(table.dataset, OwnVQA) and not table.bad
    rows = table.dataset.data.to_dict("records")
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [Path(row["image_path"]) for row in rows] == [path.parent / f"{n}.png" for n in range(4)]
    assert [row["answer"] for row in rows] == ["one", "two", "three, four", "None"]
    prompt = table.dataset.build_prompt(table.dataset.data.iloc[2])
    assert [item["value"] for item in prompt] == [str(path.parent / "2.png"), "What is 2?"]


def test_paths_do_not_lead_out_of_the_tables_folder(tmp_path: Path) -> None:
    path = questions(tmp_path / "data")
    path.write_text(path.read_text().replace("1.png", "../1.png"))
    table = open_table(table_name(str(path)))
    assert len(table.dataset.data) == 3 and "leads out" in table.bad[0].reason


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nowhere.tsv", "'nowhere.tsv' does not exist"),
        ("MMBench_DEV_EN.tsv", "name of a benchmark: rename"),
        ("task", "task of lmms-eval"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, data: str, said: str) -> None:
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("index\tquestion\n")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("task: mine\n")
    with pytest.raises(InputError, match=said):
        check_by_sight(data)


def test_a_task_of_lmms_eval_is_sent_there() -> None:
    pytest.importorskip("lmms_eval")
    with pytest.raises(InputError, match=r"'pope' is a task of lmms-eval: \./run_lmms\.sh"):
        check_by_sight("pope")


def test_two_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    table_name(str(questions(tmp_path / "one")))
    with pytest.raises(InputError, match="rename one of them"):
        table_name(str(questions(tmp_path / "two")))


@pytest.mark.slow
def test_eval_scores_it_and_a_tsv_of_multiple_choice(tmp_path: Path) -> None:
    model = makers.tiny_original(tmp_path / "llava-v1.5-7b")
    questions(tmp_path / "data")
    files.write(tmp_path / "data", "Choice", files.mcq_rows(3))
    words = ["eval", "--model", str(model), "--baseline", "--max-new-tokens", "3"]
    words += ["--device", "cpu", "--out", str(tmp_path / "out")]
    words += ["--data", "data/mine.csv", "data/Choice.tsv"]
    assert cli.main(words) == 0
    for name, rows in (("mine", 4), ("Choice", 3)):
        stem = f"llava-1.5-7b-baseline_{name}"
        record = json.loads((tmp_path / "out" / stem / f"{stem}_results.json").read_text())
        assert record["score"]["name"] == "Overall" and record["samples"] == rows
        lines = (tmp_path / "out" / stem / f"{stem}_rows.jsonl").read_text().splitlines()
        assert all(json.loads(line)["score"] in (0.0, 1.0) for line in lines)
    assert not [path for path in (tmp_path / "LMUData").rglob("*") if path.is_file()]
