"""The ablation's parts: clean-up, the CSV, names, scores, tables, one process's work."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import stat
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import makers
from vlm_prune_ext import cli
from vlm_prune_ext.ablation import console, plan, study, worker
from vlm_prune_ext.ablation.captions import clean
from vlm_prune_ext.evals.examples import DEFAULT_PROMPT, Example, one_line, read_data
from vlm_prune_ext.experiment import coco, metrics
from vlm_prune_ext.experiment.log import lock, write_json
from vlm_prune_ext.experiment.record import Sample
from vlm_prune_ext.methods.registry import parse_method

ASKED = "Describe this image."

# ------------------------------------------------------------------------------------ clean-up


@pytest.mark.parametrize(
    ("raw", "prompt", "expected"),
    [
        ("A red square.", "", "A red square."),
        ("", ASKED, ""),
        (" \n\t ", ASKED, ""),
        # control tokens
        ("A cat.</s>", "", "A cat."),
        ("<s>A cat.</s><pad><pad>", "", "A cat."),
        ("<|im_start|>A cat.<|im_end|><|endoftext|>", "", "A cat."),
        ("A cat.<end_of_turn>", "", "A cat."),
        ("<image>\nA cat", "", "A cat"),
        ("[INST] A cat [/INST]", "", "A cat"),
        # what only looks like one
        ("2 < 3 and 5 > 4", "", "2 < 3 and 5 > 4"),
        ("a <b>bold</b> cat | a dog", "", "a <b>bold</b> cat | a dog"),
        ("a sign with <3 on it", "", "a sign with <3 on it"),
        # entity tags
        ("<ref>A dog</ref><box>[[1, 2], [3, 4]]</box> runs.", "", "A dog runs."),
        ("<box>[[1, 2", "", ""),
        (
            "<grounding><phrase>a snowman</phrase><object><patch_index_0044>"
            "<patch_index_0863></object> by a fire",
            "",
            "a snowman by a fire",
        ),
        ("<p>a boat</p> <loc_12><loc_99>", "", "a boat"),
        # the prompt in front
        (f"{ASKED} A cat.", ASKED, "A cat."),
        ("describe THIS  image.\nA cat.", ASKED, "A cat."),
        (f"{ASKED}{ASKED} A cat.", ASKED, "A cat."),
        (ASKED, ASKED, ""),
        (f"USER: {ASKED} ASSISTANT: A cat.", ASKED, "A cat."),
        (f"user\n{ASKED}\nmodel\nA cat.", ASKED, "A cat."),
        ("Question: What is it? Answer: a cat", "What is it?", "a cat"),
        ("ASSISTANT: A cat.", ASKED, "A cat."),
        ("a photo of a cat", "a photo of", "a cat"),
        # what only begins like it
        ("a photograph of a cat", "a photo", "a photograph of a cat"),
        ("A model train.", "A", "model train."),
        ("user interface of a phone", ASKED, "user interface of a phone"),
        ("An answer: 42", "", "An answer: 42"),
        # characters
        ("a\x00b\u2028c\x85d\r\ne", "", "a b c d e"),
        ("빨간 사각형 ☃", "", "빨간 사각형 ☃"),
    ],
)
def test_clean(raw: str, prompt: str, expected: str) -> None:
    assert clean(raw, prompt) == expected
    assert clean(expected, prompt) == expected


def test_one_line_leaves_one_line() -> None:
    every = "".join(map(chr, range(0x3000)))
    assert len(one_line(every).splitlines()) == 1


# ------------------------------------------------------------------------------------- the CSV


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        makers.photo(80, 40).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (["image", "reference"], ("image", None, ("reference",))),
        (["id", "Image_Path", "Query", "Annotation"], ("Image_Path", "Query", ("Annotation",))),
        (["url", "question", "answer"], ("url", "question", ("answer",))),
        (
            ["image", "prompt", "caption_1", "caption_2", "captions", "captioner"],
            ("image", "prompt", ("caption_1", "caption_2", "captions")),
        ),
        (["url", "image", "caption", "annotation"], ("image", None, ("annotation",))),
    ],
)
def test_columns(pictures: Path, header: list[str], expected: tuple[Any, ...]) -> None:
    path = write_csv(pictures / "d.csv", [header, ["a.png"] * len(header)])
    columns = read_data(path).columns
    assert (columns.image, columns.prompt, columns.references) == expected


def test_rows(pictures: Path) -> None:
    (pictures / "text.png").write_text("no picture")
    rows = [
        ["image", "prompt", "caption", "caption_2"],
        ["a.png", "What?", "one\nline", ""],
        [str(pictures / "b.png"), "", '["x", "y"]', "z"],
        ["gone.png", "", "x", ""],
        ["text.png", "", "x", ""],
        ["a.png", "", "", " "],
        ["", "", "x", ""],
        ["https://example.org/photos/b.png?size=9", "", "['single']", ""],
        ["https://example.org/gone.png", "", "x", ""],
    ]
    data = read_data(write_csv(pictures / "d.csv", rows))
    assert [(row.index, row.prompt, row.references) for row in data.rows] == [
        (0, "What?", ("one line",)),
        (1, DEFAULT_PROMPT, ("x", "y", "z")),
        (6, DEFAULT_PROMPT, ("single",)),
    ]
    assert [row.path for row in data.rows[1:]] == [str(pictures / "b.png")] * 2
    reasons = {row.index: row.reason for row in data.skipped}
    assert list(reasons) == [2, 3, 4, 5, 7]
    assert reasons[2] == "no such file" and "not a picture" in reasons[3]
    assert reasons[4] == "no reference" and "on the web" in reasons[7]


def test_prompt_for_all(pictures: Path) -> None:
    path = write_csv(
        pictures / "d.csv",
        [["image", "query", "caption"], ["a.png", "a dog", "x"], ["b.png", "", "x"]],
    )
    prompts = [row.prompt for row in read_data(path, prompt="Say it: {prompt}").rows]
    assert prompts == ["Say it: a dog", f"Say it: {DEFAULT_PROMPT}"]
    assert [row.prompt for row in read_data(path, prompt="Say.").rows] == ["Say.", "Say."]


def test_named_columns_and_folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("elsewhere") / "d.tsv"
    path.write_text("pic\tgold\tmore\na.png\tx\ty\n")
    data = read_data(
        path,
        image_column="pic",
        reference_columns=["gold", "more"],
        image_folder=pictures,
        limit=1,
    )
    assert data.rows[0].references == ("x", "y")


def test_digests_tell_what_changed(pictures: Path) -> None:
    def digests(prompt: str = "p", caption: str = "c") -> dict[str, str]:
        rows = [["image", "prompt", "caption"], ["a.png", prompt, caption]]
        return read_data(write_csv(pictures / "d.csv", rows)).digests()

    first = digests()
    assert digests() == first
    assert {k for k, v in digests(prompt="q").items() if v != first[k]} == {"prompts"}
    assert {k for k, v in digests(caption="d").items() if v != first[k]} == {"references"}
    makers.photo(80, 40, seed=1).save(pictures / "a.png")
    assert {k for k, v in digests().items() if v != first[k]} == {"pictures"}


# ---------------------------------------------------------------------------- models and names


def test_default_models_and_presets() -> None:
    assert len(plan.DEFAULT_MODELS) == 8
    for models in plan.PRESETS.values():
        assert [run.name for run in plan.plan(models, ["none"])] == list(models)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", ""),
        ("fastv:100", "-fastv100"),
        ("fastv", "-fastv100"),
        ("fastv:0.25", "-fastv0.25"),
        ("fastv:100,agg_layer=2", "-fastv100_k2"),
        ("random:32", "-random32"),
        ("random:32,seed=7", "-random32_seed7"),
        ("downsample:64", "-downsample64"),
        ("saint:0.7", "-saint0.7"),
    ],
)
def test_suffix(method: str, expected: str) -> None:
    assert plan.suffix(parse_method(method)) == expected


def test_every_method_has_its_own_name() -> None:
    texts = [
        "none",
        "fastv:64",
        "himap",
        "himap:100",
        "himap:attn_img_rank=9",
        "himap:attn_img_layer=none",
        "saint:start=2",
        "saint:vit={keep_num: 100}",
        "custom:64",
        "custom:64,method=norm",
        "custom:64,method=norm,agg_layer=1",
    ]
    names = [plan.suffix(parse_method(text)) for text in texts]
    assert len(set(names)) == len(names)
    assert all(name == files_safe(name) for name in names)


def files_safe(name: str) -> str:
    return "".join(c for c in name if c.isalnum() or c in "._-+")


def test_models_by_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert plan.find_model(str(folder)).name == "my.model"
    named = plan.find_model(f"mine={folder}")
    assert (named.name, named.source) == ("mine", str(folder))
    assert plan.find_model("LLaVA-1.5-7b").model_id == "liuhaotian/llava-v1.5-7b"
    assert plan.find_model("owner/some-model").name == "some-model"
    assert plan.find_model("demo").source.endswith("checkpoint")
    before = named.fingerprint
    (folder / "model.safetensors").write_bytes(b"x")
    assert plan.find_model(f"mine={folder}").fingerprint != before


def test_rerun_names() -> None:
    runs = plan.plan(["demo", "gemma-3-4b"], ["none", "fastv:32"])
    assert [run.name for run in runs][:2] == ["demo", "demo-fastv32"]
    assert plan.to_redo(["demo"], runs) == {"demo", "demo-fastv32"}
    assert plan.to_redo(["gemma-3-4b-fastv32"], runs) == {"gemma-3-4b-fastv32"}


# ---------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on standard error; nothing else was printed, the exit code is 2."""
    assert cli.main(["ablate", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def one_row(folder: Path) -> str:
    return str(write_csv(folder / "d.csv", [["image", "caption"], ["a.png", "x"]]))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("", "is empty"),
        ("image,caption\n", "is empty"),
        ("picture_of,caption\na.png,x\n", "no column for image"),
        ("image,words\na.png,x\n", "no column for references"),
        ("image,caption\ngone.png,x\n", "no row that can be used, e.g. row 0: no such file"),
    ],
)
def test_bad_data(
    pictures: Path, capsys: pytest.CaptureFixture[str], content: str | None, expected: str
) -> None:
    path = pictures / "bad.csv"
    if content is not None:
        path.write_text(content)
    out = str(pictures / "out")
    said = refused(capsys, "--data", str(path), "--models", "demo", "--output-dir", out)
    assert expected in said and str(path) in said
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--models", "llava-1.5-7bb"], "Did you mean 'llava-1.5-7b'?"),
        (["--models", "demmo"], "Did you mean 'demo'?"),
        (["--models", "./gone"], "is not a folder"),
        (["--models", "x=gone"], "is not a folder"),
        (["--models", "a b=."], "name=folder"),
        (["--models", "demo", "demo"], "twice"),
        (["--models", "demo", "--methods", "fastvv:100"], "Did you mean 'fastv'?"),
        (["--models", "demo", "--methods", "fastv:0"], "attention_rank=0 is not valid"),
        (["--models", "demo", "--methods", "fastv", "fastv:100"], "twice"),
        (["--models", "demo", "--rerun", "dem"], "Did you mean 'demo'?"),
        (["--models", "demo", "--preset", "all"], "not allowed with"),
        (["--preset", "quik"], "Did you mean 'quick'?"),
        (["--models", "demo", "--batch-size", "0"], "--batch-size 0"),
        (["--models", "demo", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--models", "demo", "--lang", "kr"], "Accepted: en, ko"),
        (["--models", "demo", "--dtype", "float23"], "Did you mean 'float32'?"),
        (["--models", "demo", "--device", "cuda:99"], "'cuda:99' is not there"),
        (["--models", "demo", "--device", "cpu", "--fast"], "CUDA graphs need a GPU"),
        (["--models", "demo", "--image-column", "imge"], "Did you mean 'image'?"),
        (["--models", "demo", "--image-folder", "gone"], "is not a folder"),
        (["--models", "demo", "--prompt", " "], "--prompt"),
        (["--models", "demo", "--batchsize", "2"], "--batch-size"),
    ],
)
def test_bad_arguments(
    pictures: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    out = pictures / "out"
    given = ["--data", one_row(pictures), "--output-dir", str(out), *arguments]
    assert expected in refused(capsys, *given)
    assert not out.exists()


def test_output_that_cannot_be_written(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "file").write_text("in the way")
    out = str(pictures / "file" / "out")
    given = ["--data", one_row(pictures), "--models", "demo", "--output-dir", out]
    assert "cannot be written" in refused(capsys, *given)


def test_other_settings_are_refused(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pictures / "out"
    lines = worker.Lines(out / "demo_predictions.jsonl")
    out.mkdir()
    lines.begin({"model_id": "vlm_prune_ext/demo", "max_new_tokens": 8})
    lines.add(Sample(0, "x"))
    given = ["--data", one_row(pictures), "--models", "demo", "--output-dir", str(out)]
    said = refused(capsys, *given)
    assert "'demo'" in said and "--rerun demo" in said
    assert len(lines.rows()) == 1
    lines.path.write_text('{"something": "else"}\n')
    write_json(out / "demo_metrics.json", {"of": "somebody"})
    assert "not of this command" in refused(capsys, *given)


def test_a_second_study_waits_outside(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pictures / "out"
    folder = worker.Folder(out)
    folder.open()
    given = ["--data", one_row(pictures), "--models", "demo", "--output-dir", str(out)]
    with lock(folder.logs):
        assert "in use" in refused(capsys, *given)
    assert not (out / "all_models_summary.json").exists()


def test_what_is_done_anew_is_put_aside(tmp_path: Path) -> None:
    """Nothing that a run left is deleted, however often it is started again."""
    folder = worker.Folder(tmp_path)
    for number in range(3):
        write_json(folder.of("a", "metrics"), number)
        folder.put_aside("a")
    folder.put_aside("a")  # nothing there
    kept = sorted(tmp_path.rglob("a_metrics.json"))
    assert [json.loads(path.read_text()) for path in kept] == [0, 1, 2]
    assert {path.parent.name for path in kept} == {"previous", "previous-2", "previous-3"}


# -------------------------------------------------------------------------------------- scores

REFERENCES = [
    ("a red square left of a blue ring", "the red square is on the left"),
    ("two green stars above a white circle",),
    ("there is a yellow triangle in the corner", "a triangle", "one yellow triangle in a corner"),
    ("an orange star",),
]
PREDICTIONS = [
    "a red square and a blue ring",
    "Two green stars above a white circle",
    'a yellow triangle in the corner, and | a || "quoted" ||| thing: 빨간',
    "",
]


def scored(
    predictions: list[str], references: list[tuple[str, ...]], tools: coco.Tools | None = None
) -> dict[str, metrics.Value]:
    return metrics.evaluate(metrics.Scored(predictions, references, tools), metrics.CAPTION)


def test_bleu_is_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    score, signature = metrics.bleu(PREDICTIONS, REFERENCES)
    streams = [[own[i] if i < len(own) else None for own in REFERENCES] for i in range(3)]
    direct = sacrebleu.corpus_bleu(PREDICTIONS, streams, tokenize="13a", smooth_method="exp")
    assert score == pytest.approx(direct.score, abs=1e-9) and 1 < score < 99
    assert "case:mixed" in signature and "tok:13a" in signature and "smooth:exp" in signature


def test_best_and_worst_bleu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sacrebleu")
    monkeypatch.setenv("PATH", "")
    best = scored([own[0] for own in REFERENCES], REFERENCES)["bleu4"]
    assert best.value == 1.0 and best.raw == pytest.approx(100)
    assert scored(["", "", "", ""], REFERENCES)["bleu4"].value == 0.0


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")
    scores = scored(PREDICTIONS, REFERENCES)
    for name in ("meteor", "rougeL", "spice", "cider"):
        assert scores[name].value is None and "Java is not on the PATH" in scores[name].reason
    assert scores["bleu4"].value is not None and scores["bleu4"].reason is None


def test_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    scores = scored(PREDICTIONS, REFERENCES)
    assert {one.value for one in scores.values()} == {None}
    assert all(".[ablate]" in (one.reason or "") for one in scores.values())


def test_nothing_to_score() -> None:
    scores = scored([], [])
    assert all(one.value is None and one.reason for one in scores.values())


def fake_java(folder: Path, script: str) -> str:
    """A PATH whose ``java`` is a shell script."""
    path = folder / "bin" / "java"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"{path.parent}{os.pathsep}{os.environ['PATH']}"


def test_java_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is ended with all that it started, and the study goes on."""
    pytest.importorskip("pycocoevalcap")
    psutil = pytest.importorskip("psutil")
    note = tmp_path / "pid"
    monkeypatch.setenv("PATH", fake_java(tmp_path, f"echo $$ > {note}; exec sleep 1000"))
    monkeypatch.setitem(coco.SECONDS_PER_ROW, "tokenize", 0.0)
    tools = coco.Tools(seconds=5.0)
    with pytest.raises(coco.Unavailable, match="took longer than 5 s"):
        tools.ask({"do": "tokenize", "captions": [["a"]]})
    assert tools._process is None
    if note.exists() and note.read_text().strip():  # it had come that far
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(note.read_text())).wait(timeout=300)


def test_java_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("sacrebleu")
    monkeypatch.setenv("PATH", fake_java(tmp_path, "exit 1"))
    with coco.Tools(tmp_path / "log") as tools:
        scores = scored(PREDICTIONS, REFERENCES, tools)
    assert scores["bleu4"].value is not None
    assert scores["meteor"].value is None and "tool" in (scores["meteor"].reason or "")


def test_spice_is_never_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its files there is a reason, from the child that would run it too."""
    pytest.importorskip("pycocoevalcap")
    if not coco.missing_spice_files():
        pytest.skip("the files of SPICE are there")
    said = {"references": [["a"]], "predictions": ["a"]}
    monkeypatch.setattr(metrics, "needs_java", lambda: None)
    reason = metrics.evaluate(metrics.Scored(["a"], [["a"]]), ["spice"])["spice"].reason
    assert "is not downloaded here" in (reason or "")
    with pytest.raises(RuntimeError, match="is missing"):
        coco.Scorers().answer({"do": "spice", **said})


@pytest.mark.slow  # METEOR reads its tables twice
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_coco_metrics_are_pycocoevalcaps() -> None:
    """Equal to the package called directly on the same text, with empty and odd lines in it; best
    where predictions are the references, worst where they are empty."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with coco.Tools() as tools:
        ours = scored(PREDICTIONS, REFERENCES, tools)
        best = scored([own[0] for own in REFERENCES], [own[:1] for own in REFERENCES], tools)
        worst = scored([""] * 4, REFERENCES, tools)
        process = tools._process
        assert process is not None
    assert process.poll() is not None and tools._process is None
    split = PTBTokenizer().tokenize
    gold = split({i: [{"caption": text} for text in own] for i, own in enumerate(REFERENCES)})
    said = split({i: [{"caption": text}] for i, text in enumerate(PREDICTIONS)})
    for name, scorer in (("rougeL", Rouge()), ("cider", Cider()), ("meteor", Meteor())):
        direct = float(scorer.compute_score(gold, said)[0])
        assert ours[name].value == pytest.approx(direct, abs=1e-9)
        assert 0.0 < direct < best[name].value and worst[name].value == 0.0
    assert best["meteor"].value == best["rougeL"].value == pytest.approx(1.0)
    assert ours["spice"].value is not None or ours["spice"].reason


# -------------------------------------------------------------------------------------- tables


def record(name: str, bleu: float | None, **more: Any) -> dict[str, Any]:
    values = {"bleu4": bleu, "meteor": None, "rougeL": 0.5, "spice": None, "cider": 1.0}
    return {
        "model_name": name,
        "model_id": f"owner/{name}",
        "method": "baseline",
        "metrics": values,
        "num_samples": 3,
        "seconds_per_sample": 0.25,
        "peak_memory_bytes": 2**30,
        **more,
    }


def test_comparison_is_ranked() -> None:
    records = [record("low", 0.1), record("none", None), record("high", 0.9), record("zero", 0.0)]
    rows = list(csv.DictReader(io.StringIO(study.comparison(records).csv())))
    assert [row["model_name"] for row in rows] == ["high", "low", "zero", "none"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["meteor"] == "" and rows[2]["bleu4"] == "0.0" and rows[3]["bleu4"] == ""
    assert rows[0]["peak_memory_gib"] == "1.0" and rows[0]["seconds_per_sample"] == "0.25"


def test_chart_is_a_picture(tmp_path: Path) -> None:
    for records in ([record("a", 0.1)], [record(f"m{i}", None) for i in range(9)]):
        study.draw(records, tmp_path / "chart.png")
        with Image.open(tmp_path / "chart.png") as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 100


def test_predictions_csv_keeps_every_reference() -> None:
    row = {"index": 4, "image": "a.png", "prompt": "p", "prediction": 'a "b", c', "failed": None}
    rows = [
        {**row, "raw_prediction": "a\nb", "references": ("x", "y")},
        {**row, "raw_prediction": "", "references": ("z",)},
    ]
    read = list(csv.DictReader(io.StringIO(study.predictions_csv(rows, 2))))
    assert read[0]["prediction"] == 'a "b", c' and read[0]["reference_2"] == "y"
    assert read[1]["reference_1"] == "z" and read[1]["reference_2"] == ""


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    lines = worker.Lines(tmp_path / "l.jsonl")
    lines.begin({"method": "none"})
    lines.add(Sample(0, "a", visual_kept={"0": 4}), Sample(1, "", "bad"))
    with lines.path.open("a") as file:
        file.write('{"sample": {"index": 2, "te')
    assert lines.settings() == {"method": "none"}
    assert list(lines.rows()) == [0, 1] and lines.rows()[1].failed == "bad"
    lines.add(Sample(1, "b"), Sample(2, "c"))
    assert [row.prediction for row in lines.rows().values()] == ["a", "b", "c"]


def test_a_broken_line_costs_that_line_only(tmp_path: Path) -> None:
    """Wherever it is; the other answers are not asked for again."""
    for broken in range(6):
        lines = worker.Lines(tmp_path / f"{broken}.jsonl")
        lines.begin({"method": "none"})
        lines.add(*(Sample(row, f"answer {row}") for row in range(5)))
        raw = lines.path.read_bytes().split(b"\n")
        raw[broken] = raw[broken][:20] + b"\x00\xff"
        lines.path.write_bytes(b"\n".join(raw))
        assert lines.answered() == set(range(5)) - {broken - 1}
        assert (lines.settings() is None) == (broken == 0)


def test_languages_say_the_same() -> None:
    def fields(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    for key, (english, korean) in console.TEXTS.items():
        assert fields(english) == fields(korean), key
        assert korean.strip() and korean != english, key


def test_durations() -> None:
    assert [console.duration(s) for s in (3.2, 61, 3725)] == ["3 s", "1:01", "1:02:05"]
    assert console.seconds_left(10, 5, 10) == "20 s" and console.seconds_left(10, 0, 10) == "?"


# ------------------------------------------------------------------------- one process's work


@pytest.fixture(scope="module")
def tiny() -> Any:
    import tempfile

    from vlm_prune_ext.evals.answer import Answerer
    from vlm_prune_ext.models import load

    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(makers.tiny_hf_llava(folder), device="cpu")
    return lambda method=None, **more: Answerer(model, processor, method, **more)


def job_of(folder: Path, count: int, batch: int) -> tuple[worker.Work, worker.Lines]:
    rows = []
    for index in range(count):
        path = folder / f"{index}.png"
        makers.photo(120, 60, seed=index).save(path)  # a panorama
        rows.append(Example(index, path.name, str(path), makers.QUESTIONS[index % 4], ("x",)))
    lines = worker.Lines(folder / "lines.jsonl")
    lines.begin({})
    return worker.Work(worker.Folder(folder), rows, batch, 4), lines


def answered(job: worker.Work, answerer: Any, lines: worker.Lines) -> list[int]:
    """Indices of the rows that were asked."""
    order = []
    for samples in worker.answer(job, answerer, lines):
        lines.add(*samples)
        order += [int(sample.index) for sample in samples]
    return sorted(order)


def test_only_open_rows_are_answered(tmp_path: Path, tiny: Any) -> None:
    job, lines = job_of(tmp_path, 5, 2)
    alone = {p.index: p.prediction for batch in worker.answer(job, tiny(), lines) for p in batch}
    lines.add(Sample(1, "known"), Sample(3, "", failed="not yet"))
    assert answered(job, tiny(), lines) == [0, 2, 3, 4]
    rows = lines.rows()
    assert rows[1].prediction == "known" and rows[3].failed is None
    assert {i: rows[i].prediction for i in (0, 2, 3, 4)} == {i: alone[i] for i in (0, 2, 3, 4)}
    assert rows[0].visual_tokens > 0 and rows[0].new_tokens > 0 and rows[0].seconds > 0


def test_a_damaged_picture_costs_one_row(tmp_path: Path, tiny: Any) -> None:
    job, lines = job_of(tmp_path, 4, 4)
    path = Path(job.rows[2].path)
    path.write_bytes(path.read_bytes()[:200])  # its head is whole
    assert answered(job, tiny(), lines) == [0, 1, 2, 3]
    rows = lines.rows()
    assert "does not decode" in (rows[2].failed or "")
    assert all(rows[i].failed is None for i in (0, 1, 3))


def test_a_method_that_does_not_fit_stops_at_once(tmp_path: Path, tiny: Any) -> None:
    job, lines = job_of(tmp_path, 6, 2)
    answerer = tiny(parse_method("fastv:4,agg_layer=2,image_token_length=5000"))
    with pytest.raises(worker.EveryRowFailed, match="image token length 5000"):
        answered(job, answerer, lines)
    assert len(lines.rows()) == 2


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, lines = job_of(tmp_path, 6, 4)
    expected = {p.index: p.prediction for batch in worker.answer(job, tiny(), lines) for p in batch}
    answerer = tiny(share=False)  # what is shared is not asked by `generate`
    whole = type(answerer.model).generate

    def generate(self: Any, **inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return whole(self, **inputs)

    monkeypatch.setattr(type(answerer.model), "generate", generate)
    assert answered(job, answerer, lines) == [0, 1, 2, 3, 4, 5]
    rows = lines.rows()
    assert {i: row.prediction for i, row in rows.items()} == expected
    assert answerer.largest == 2 and max(row.batch for row in rows.values()) == 2
