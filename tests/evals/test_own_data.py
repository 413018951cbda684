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
from vlm_prune_ext.evals.answer import Answerer
from vlm_prune_ext.evals.names import check_by_sight, own_table, table_name
from vlm_prune_ext.evals.rows import OwnVQA, open_table
from vlm_prune_ext.experiment.record import read_record


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
        ("task", "2 tasks \\(mine, other\\): the YAML file of one"),
        ("task/nowhere.yaml", "no task of lmms-eval"),
        ("shapes_mcq_ppl", r"multiple_choice: \./run_lmms\.sh"),
        ("mmbench", r"group of tasks of lmms-eval.*mmbench_en_dev"),
        ("shapes_ynn", "'shapes_yn'"),
        ("Shapes_YNN", "'Shapes_YN'"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, data: str, said: str) -> None:
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("index\tquestion\n")
    (tmp_path / "task").mkdir()
    for name in ("mine", "other"):
        (tmp_path / "task" / f"{name}.yaml").write_text(f"task: {name}\n")
    with pytest.raises(InputError, match=said):
        check_by_sight(data)


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


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.json}}
test_split: test
output_type: generate_until
doc_to_visual: !function own.pictures
doc_to_text: question
doc_to_target: answer
process_results: !function own.results
generation_kwargs: {max_new_tokens: 3}
metric_list: [{metric: odd, aggregation: mean, higher_is_better: true}]
"""
OWN = """
from PIL import Image
def pictures(doc): return [Image.new("RGB", (40, 40), doc["category"])]
def results(doc, answers): return {"odd": float(doc["id"] % 2 or not answers)}
"""


@pytest.mark.slow
def test_a_folder_of_a_task_of_lmms_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loop and metric, our log: what is known is not asked again, and gives the same record."""
    pytest.importorskip("lmms_eval")
    model = makers.tiny_original(tmp_path / "llava-v1.5-7b")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(TASK)
    (tmp_path / "task" / "own.py").write_text(OWN)
    rows = [
        {"id": n, "question": f"What is {n}?", "answer": str(n), "category": color}
        for n, color in enumerate(["red", "green", "blue", "red"])
    ]
    (tmp_path / "task" / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    asked: list[int] = []
    answer = Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, some: asked.append(len(some)) or answer(self, some)
    )
    words = ["eval", "--model", str(model), "--method", "fastv:5", "--device", "cpu"]
    words += ["--data", "./task", "--limit", "3", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0 and sum(asked) == 3
    stem = "llava-1.5-7b-fastv_rank5_mine"
    folder = tmp_path / "out" / stem
    record = read_record(folder / f"{stem}_results.json")
    assert record.score is not None and (record.score.name, record.samples) == ("odd", 3)
    assert record.score.value == pytest.approx(100 / 3) and record.score.standard_error
    assert record.last_visual_tokens == 5 and record.hardware and record.seconds
    lines = [json.loads(x) for x in (folder / f"{stem}_rows.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [0.0, 1.0, 0.0]
    assert lines[1]["question"] == "What is 1?" and lines[1]["category"] == "green"
    log = folder / f"{stem}_samples.jsonl"
    log.write_text("".join(x for x in log.read_text().splitlines(True) if '"index": 1,' not in x))
    assert cli.main(words) == 0 and sum(asked) == 4
    again = read_record(folder / f"{stem}_results.json")
    assert (again.score, again.visual_tokens) == (record.score, record.visual_tokens)
    (tmp_path / "task" / "rows.json").write_text(
        "\n".join(map(json.dumps, [{**rows[0], "question": "And now?"}, *rows[1:]]))
    )
    assert cli.main(words) == 0 and sum(asked) == 5
    assert "1 row has changed (question)" in capsys.readouterr().err
