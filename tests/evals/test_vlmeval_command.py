"""run_vlmeval.py: VLMEvalKit's own data sets, inference and scores, on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from vlmeval.dataset import DATASET_CLASSES, ImageBaseDataset

from run_vlmeval import main
from tests import vlmeval_files as files
from tests.makers import photo, tiny_original
from vlm_prune_ext.evals import vlmeval as wrappers
from vlm_prune_ext.evals.answer import Answerer
from vlm_prune_ext.evals.names import model_name
from vlm_prune_ext.evals.rows import open_table
from vlm_prune_ext.evals.vlmeval_rows import shares
from vlm_prune_ext.experiment import metrics
from vlm_prune_ext.experiment.log import lock
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.pruning import OFF_LINE

ROOT = Path(__file__).parents[2]
SHORT = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 visual tokens, 6 layers, under a published checkpoint's name."""
    return tiny_original(tmp_path_factory.mktemp("models") / "llava-v1.5-7b")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder of VLMEvalKit's."""
    folder = tmp_path / "LMUData"
    folder.mkdir()
    monkeypatch.setenv("LMUData", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def class_of(name: str) -> type[ImageBaseDataset]:
    return next(cls for cls in DATASET_CLASSES if name in cls.supported_datasets())


def put(folder: Path, name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file under the name of a real data set, whose md5 is taken for the real one's."""
    path = files.write(folder, name, files.MAKERS[name](count))
    monkeypatch.setitem(class_of(name).DATASET_MD5, name, files.md5(path))
    return path


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / f"{folder.name}_results.json").read_text())


def predictions(folder: Path) -> dict[Any, str]:
    table = pd.read_excel(folder / f"{folder.name}.xlsx", keep_default_na=False)
    return dict(zip(table["index"], table["prediction"], strict=True))


def answered(folder: Path) -> Counter[Any]:
    """How often each row was answered, of all logs there are."""
    lines = [line for path in folder.glob("*_samples*.jsonl") for line in path.open()]
    return Counter(json.loads(x)["sample"]["index"] for x in lines if '"sample"' in x[:12])


# -- real data sets ------------------------------------------------------------------------------
def test_real_classes_score_a_pruned_model(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files.MAKERS:
        put(data, name, 12 if name in ("MME", "POPE") else 4, monkeypatch)
    work = tmp_path / "outputs_fastv"
    command = ["--model-path", str(checkpoint), "--use-fast-v", "--fast-v-attention-rank", "5"]
    command += ["--data", *files.MAKERS, "--work-dir", str(work), "--verbose", *SHORT]
    assert main(command) == 0
    scores = {
        "MMBench_DEV_EN_V11": ("Overall", 100),
        "COCO_VAL": ("CIDEr", 1000),
        "MME": ("perception + reasoning", 600),
        "POPE": ("Overall", 100),
        "TextVQA_VAL": ("Overall", 100),
    }
    for name, (score, most) in scores.items():
        folder = work / f"llava-1.5-7b-fastv_rank5_{name}"
        assert len(predictions(folder)) == len(
            files.MAKERS[name](12 if name in ("MME", "POPE") else 4)
        )
        record = result(folder)
        assert record["score"]["name"] == score
        assert 0 <= record["score"]["value"] <= most
        assert record["failed"] == []
        groups = [(g["first"], g["last"], g["after"]) for g in record["visual_tokens"]]
        assert groups == [(0, 2, 16.0), (3, 5, 5.0)]
        assert 0.5 < record["flops"]["ratio"] < 1.0
        assert record["seconds"]["prefill"]["count"] == record["samples"] - 1
        assert record["peak_memory_bytes"] > 0
        assert record["config"]["method"]["parameters"]["attention_rank"] == 5
        assert {"torch", "transformers", "python"} <= set(record["versions"])


def test_scores_are_those_of_the_answers(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that are right score 100, one wrong of four scores 75."""
    put(data, "MMBench_DEV_EN_V11", 4, monkeypatch)
    given = iter("ABCD" + "ABCA")
    original = Answerer.answer

    def known(self: Any, queries: Any) -> Any:
        answers = original(self, queries)
        for answer in answers:
            answer.text = next(given)
        return answers

    monkeypatch.setattr(Answerer, "answer", known)
    command = ["--model-path", str(checkpoint), "--baseline", "--data", "MMBench_DEV_EN_V11"]
    command += ["--work-dir", str(tmp_path / "out"), *SHORT]
    folder = tmp_path / "out" / "llava-1.5-7b-baseline_MMBench_DEV_EN_V11"
    for expected in (100.0, 75.0):  # the second run starts anew, files of the first are put aside
        assert main([*command, "--fresh"]) == 0
        assert result(folder)["score"]["value"] == expected
    assert len(list((folder / "previous").glob("*_results.json"))) == 1
    assert main(command) == 0  # nothing is left to ask


# -- prompts -------------------------------------------------------------------------------------
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "MMBench_DEV_EN_V11",
            "Count.\nWhich letter is number 1?\nA. one\nB. two\nC. three\nD. four\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        ("MME", "Is there a dog in picture 1? Please answer yes or no."),
        (
            "TextVQA_VAL",
            "What is it?\nAnswer the question using a single word or phrase.",
        ),
        (
            "COCO_VAL",
            "Please describe this image in general. Directly provide the description, do not "
            'include prefix like "This image depicts". ',
        ),
    ],
)
def test_prompts_are_those_of_vlmevalkits_llava(
    name: str, words: str, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(data, name, 2, monkeypatch)
    model = wrappers.LLaVABaseline(str(checkpoint))
    dataset = open_table(name).dataset
    model.set_dump_image(dataset.dump_image)
    row = dataset.data.iloc[1]
    custom = model.use_custom_prompt(name)
    message = model.build_prompt(row, name) if custom else dataset.build_prompt(row)
    query = model.query(message, name)
    assert query.max_new_tokens == 2048
    whole = model.processor.styles[query.style].single(query.text, len(query.images))
    assert whole == f"{SYSTEM}USER:  <image> {words} ASSISTANT: "


def test_interleaved_images_keep_their_places(checkpoint: Path, tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.png"))
        photo(seed=seed).save(paths[-1])
    model = wrappers.LLaVAFastV(str(checkpoint), fast_v_attention_rank=3, max_new_tokens=3)
    message = [
        {"type": "text", "value": "First <image>"},
        {"type": "image", "value": paths[0]},
        {"type": "text", "value": "second"},
        {"type": "image", "value": paths[1]},
        {"type": "text", "value": "Same?"},
    ]
    assert model.query(message).text == "First  <image> second <image> Same?"
    assert isinstance(model.generate(message), str)
    assert model.last is not None
    assert model.last.visual_kept == {0: 32, 3: 6}


# -- metrics of one's own ------------------------------------------------------------------------
def test_a_registered_metric_is_in_the_record_and_the_table(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It sees what was said, what it cost and what would have been right."""
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))

    @metrics.metric("tokens_per_answer", "tok/answer", digits=2, help="new tokens, mean")
    def tokens(scored: metrics.Scored) -> float:
        assert {right for own in scored.references for right in own} <= set("ABCD")
        return sum(one.new_tokens for one in scored.samples) / len(scored.samples)  # type: ignore[union-attr]

    @metrics.metric("never", "never")
    def never(scored: metrics.Scored) -> float:
        raise metrics.Unavailable("nobody has it")

    files.write(data, "Mine", files.mcq_rows(3))
    command = ["--model-path", str(checkpoint), "--method", "fastv:5", "--data", "Mine"]
    assert main([*command, "--work-dir", str(tmp_path / "out"), *SHORT]) == 0
    record = result(tmp_path / "out" / "llava-1.5-7b-fastv_rank5_Mine")
    assert record["metrics"]["tokens_per_answer"] == 4.0 and record["metrics"]["never"] is None
    assert record["missing"] == {"never": "nobody has it"}
    said = capsys.readouterr().out
    assert "tok/answer" in said and "4.00" in said


# -- batches -------------------------------------------------------------------------------------
def shuffled_rows(count: int) -> list[files.Row]:
    """Rows whose four pictures come in no order; one in the middle does not decode."""
    rows = files.mcq_rows(count)
    for place, row in enumerate(rows):
        row["image"] = rows[place % 4]["image"]
    random.Random(3).shuffle(rows)
    rows[count // 2]["image"] = "A" * 400
    return rows


def test_batches_of_any_size_give_the_same_files(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, four at a time and as many as pay; in one go, and ended by SIGTERM and gone on
    with at another size. Predictions stand in the file's order, and each row is asked once."""
    rows = shuffled_rows(14)
    files.write(data, "Mine", rows)
    command = ["--model-path", str(checkpoint), "--method", "fastv:5", "--data", "Mine", *SHORT]
    batches: list[list[tuple[str, ...]]] = []
    original = Answerer.answer

    def noted(self: Any, queries: Any) -> Any:
        batches.append([query.digests for query in queries])
        if len(batches) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return original(self, queries)

    monkeypatch.setattr(Answerer, "answer", noted)
    found = {}
    for size in ("1", "4", "auto", "stopped"):
        folder = tmp_path / size / "llava-1.5-7b-fastv_rank5_Mine"
        batches.clear()
        stop = 3 if size == "stopped" else 0
        given = ["--work-dir", str(tmp_path / size), "--batch-size"]
        if size == "stopped":
            assert main([*command, *given, "2"]) == 2
            assert sum(answered(folder).values()) in (4, 5)  # the broken row may be one
            stop = 0
        assert main([*command, *given, size if size != "stopped" else "4"]) == 1
        found[size] = predictions(folder)
        assert list(found[size]) == [row["index"] for row in rows]
        assert answered(folder) == Counter(row["index"] for row in rows)
        digests = [one for batch in batches for one in batch]
        if size in ("1", "4"):  # rows with one picture follow each other
            assert len(digests) == 13 and len(list(groupby(digests))) == 4
    assert found["1"] == found["4"] == found["auto"] == found["stopped"]
    failed = rows[7]["index"]
    assert [index for index, said in found["1"].items() if "Failed to obtain" in said] == [failed]
    assert result(tmp_path / "4" / folder.name)["config"]["batch_size"] == 4


def test_processes_do_not_share_a_picture() -> None:
    """Whole pictures go to the process with the fewest open rows; rows with none go anywhere."""
    pictures = [0, 1, 2, 0, 1, 0, 3, None, None, 0]
    parts = {n: {"picture": str(p)} if p is not None else {} for n, p in enumerate(pictures)}
    shared = shares(range(10), parts, set(), 2)
    assert shared == [[0, 3, 5, 9, 7], [1, 4, 2, 6, 8]]
    assert shares(range(10), parts, set(), 1) == [[0, 3, 5, 9, 1, 4, 2, 6, 7, 8]]
    known = shares(range(10), parts, {0, 3, 5}, 2)  # three are answered: their process takes more
    assert known == [[0, 3, 5, 9, 2, 6, 8], [1, 4, 7]]
    assert [sorted(a + b) for a, b in (shared, known)] == [list(range(10))] * 2


# -- broken rows ---------------------------------------------------------------------------------
def test_broken_rows_fail_alone(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = files.mcq_rows(6)
    rows[1]["image"] = "A" * 400  # does not decode
    rows[2]["answer"] = None
    rows[3]["image"] = "nowhere"  # refers to a row that is not there
    path = files.write(data, "Mine", rows)
    lines = path.read_text().splitlines()
    lines[5] += "\tone\ttoo\tmany"
    path.write_text("\n".join(lines) + "\n")
    command = ["--model-path", str(checkpoint), "--method", "fastv:5", "--data", "Mine"]
    assert main([*command, "--work-dir", str(tmp_path / "out"), *SHORT]) == 1
    record = result(tmp_path / "out" / "llava-1.5-7b-fastv_rank5_Mine")
    assert {row["index"] for row in record["failed"]} == {"1", "2", "3", "line 6"}
    assert record["samples"] == 3
    said = capsys.readouterr().err
    assert "4 rows failed" in said
    assert "Mine, row 2: no answer" in said


# -- wrong input ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model-path", "no/where/at/all"], "no/where/at/all"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--data", "MMBench_DEV_EN_V12"], "'MMBench_DEV_EN_V11'"),
        (["--data", "Video-MME"], "which frames of a video"),
        (["--method", "fastvv"], "'fastv'"),
        (["--fast-v-atention-rank", "3"], "--fast-v-attention-rank"),
        (["--fast-v-attention-rank", "3"], "needs its method"),
        (["--use-fast-v", "--fast-v-attention-rank", "0"], "attention_rank=0"),
        (["--use-fast-v", "--fast-v-agg-layer", "6"], "agg_layer=6 is not valid: 1 ... 5"),
        (["--method", "fastv:5", "--fast-v-image-token-length", "15"], "length 15 contradicts"),
        (["--method", "fastv:5", "--fast-v-sys-length", "3"], "3 contradicts"),
        (["--limit", "0"], "limit=0"),
        (["--batch-size", "many"], "batch_size='many' is not valid: an integer of at least 1, or"),
        (["--mode", "eval"], "needs predictions"),
        (["--use-fast-v", "--baseline"], "exactly one"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str],
    said: str,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files.write(data, "Mine", files.mcq_rows(2))
    command = ["--work-dir", str(tmp_path / "out"), *words]
    command += [] if "--model-path" in words else ["--model-path", str(checkpoint)]
    command += [] if "--data" in words else ["--data", "Mine"]
    capsys.readouterr()
    assert main([*command, *SHORT]) == 2
    lines = [
        x for x in capsys.readouterr().err.splitlines() if "Infer" not in x and "Load" not in x
    ]
    assert said in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not list((tmp_path / "out").rglob("*_results.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data Shapes_MCK", "'Shapes_MCQ'"),
        ("--method fastv:9,agg_layer=12 --data Shapes_MCQ", "1 ... 11"),
        ("--method fastv:0 --data Shapes_MCQ", "attention_rank=0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(words: str, said: str) -> None:
    """A refusal must not cost the seconds that torch, transformers and VLMEvalKit take."""
    code = (
        "import sys, run_vlmeval; code = run_vlmeval.main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'vlmeval', 'pandas'} & set(sys.modules);"
        "assert code == 2 and not heavy, (code, heavy)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert said in done.stderr and done.stderr.count("\n") == 1


# -- interrupted and continued -------------------------------------------------------------------
@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the queries that reach the model."""
    texts: list[str] = []
    original = Answerer.answer

    def noted(self: Any, queries: Any) -> Any:
        texts.extend(query.text for query in queries)
        return original(self, queries)

    monkeypatch.setattr(Answerer, "answer", noted)
    return texts


def test_a_run_goes_on_where_it_stopped(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM after 4 of 14 rows; the rest is answered once, with --reuse or without."""
    files.write(data, "Mine", files.mcq_rows(14))
    command = ["--model-path", str(checkpoint), "--method", "fastv:5", "--data", "Mine"]
    command += ["--work-dir", str(tmp_path / "out"), *SHORT]
    original = Answerer.answer

    def stopping(self: Any, queries: Any) -> Any:
        if len(asked) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return original(self, queries)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", stopping)
        assert main(command) == 2
    assert "goes on" in capsys.readouterr().err
    folder = tmp_path / "out" / "llava-1.5-7b-fastv_rank5_Mine"
    assert answered(folder) == Counter(range(4))
    asked.clear()
    assert main([*command, "--reuse"]) == 0
    assert len(asked) == 10
    assert answered(folder) == Counter(range(14))
    in_one_go = tmp_path / "other"
    assert main([*command[:-3], str(in_one_go), *SHORT]) == 0
    assert predictions(folder) == predictions(in_one_go / folder.name)
    assert result(folder)["samples"] == 14


def test_what_changed_is_named_and_asked_anew(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    asked: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows whose question, hint, options or picture differ; all rows for another setting or other
    weights. What was there is put aside, never deleted."""
    model = tmp_path / "models" / "llava-v1.5-7b"
    shutil.copytree(checkpoint, model)
    rows = files.mcq_rows(5)
    command = ["--model-path", str(model), "--method", "fastv:5", "--data", "Mine"]
    command += ["--work-dir", str(tmp_path / "out"), "--max-new-tokens", "3"]
    folder = tmp_path / "out" / "llava-1.5-7b-fastv_rank5_Mine"

    def run(*more: str) -> tuple[int, str]:
        asked.clear()
        files.write(data, "Mine", rows)
        assert main([*command, *more]) == 0
        assert set(answered(folder)) == {row["index"] for row in rows}
        return len(asked), capsys.readouterr().err

    assert run()[0] == 5
    assert run()[0] == 0
    rows[0]["answer"] = "B" if rows[0]["answer"] == "A" else "A"  # no answer depends on it
    assert run()[0] == 0
    changes = {"question": "Other?", "hint": "Look.", "A": "green", "image": rows[4]["image"]}
    for place, (column, value) in enumerate(changes.items()):
        rows[place][column] = value
        count, said = run()
        part = {"A": "options", "image": "picture"}.get(column, column)
        assert (count, f"1 row has changed ({part})" in said) == (1, True), said
    rows[3]["image"] = rows[0]["image"]
    files.write(data, "Mine", rows)
    assert main([*command, "--reuse"]) == 2  # who says --reuse means these answers
    assert "1 row has changed (picture)" in capsys.readouterr().err
    assert run()[0] == 1
    rows.append({**rows[0], "index": 99})
    assert run()[0] == 1
    count, said = run("--seed", "5")
    assert (count, "seed=0, now 5" in said) == (6, True)
    weights = next(model.glob("*.bin"), None) or next(model.glob("*.safetensors"))
    data_of = bytearray(weights.read_bytes())
    data_of[-100] ^= 1
    weights.write_bytes(data_of)
    count, said = run("--seed", "5")
    assert (count, "weights=" in said) == (6, True)
    assert len(list(folder.glob("previous*/*_samples.jsonl"))) == 7


def test_a_broken_line_of_the_log_costs_that_row(
    checkpoint: Path, data: Path, tmp_path: Path, asked: list[str]
) -> None:
    files.write(data, "Mine", files.mcq_rows(4))
    command = ["--model-path", str(checkpoint), "--method", "fastv:5", "--data", "Mine"]
    command += ["--work-dir", str(tmp_path / "out"), *SHORT]
    assert main(command) == 0
    folder = tmp_path / "out" / "llava-1.5-7b-fastv_rank5_Mine"
    before = predictions(folder)
    log = folder / f"{folder.name}_samples.jsonl"
    lines = log.read_bytes().split(b"\n")
    lines[1] = lines[1][:40]
    log.write_bytes(b"\n".join(lines))
    (folder / f"{folder.name}_results.json").unlink()
    asked.clear()
    assert main(command) == 0
    assert len(asked) == 1
    assert predictions(folder) == before


def test_two_runs_in_one_folder_are_one_sentence(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write(data, "Mine", files.mcq_rows(2))
    command = ["--model-path", str(checkpoint), "--method", "fastv:5", "--data", "Mine"]
    with lock(tmp_path / "out" / "llava-1.5-7b-fastv_rank5_Mine"):
        assert main([*command, "--work-dir", str(tmp_path / "out"), *SHORT]) == 2
    assert "in use by another run" in capsys.readouterr().err


def start(words: list[str], *, torchrun: bool = False) -> subprocess.Popen[bytes]:
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, str(ROOT / "run_vlmeval.py"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_killed_then_finished_by_two_processes(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """kill -9 half-way; two processes under torchrun finish; the same answers as one process."""
    count = 60
    files.write(data, "Mine", files.mcq_rows(count))
    words = ["--model-path", str(checkpoint), "--method", "fastv:5", "--data", "Mine"]
    words += ["--max-new-tokens", "12", "--work-dir"]
    folder = tmp_path / "out" / "llava-1.5-7b-fastv_rank5_Mine"
    process = start([*words, str(tmp_path / "out")])
    try:
        deadline = time.monotonic() + 240
        while sum(answered(folder).values()) < 13 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    before = answered(folder)
    assert 13 <= len(before) < count
    done = start([*words, str(tmp_path / "out"), "--batch-size", "4"], torchrun=True)
    output = done.communicate(timeout=400)[0].decode()
    assert done.returncode == 0, output
    assert answered(folder) == Counter(range(count))
    assert main([*words, str(tmp_path / "one")]) == 0
    assert predictions(folder) == predictions(tmp_path / "one" / folder.name)
    assert result(folder)["samples"] == count


# -- baseline ------------------------------------------------------------------------------------
def test_baseline_attaches_nothing_and_does_not_grow(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: Path
) -> None:
    files.write(data, "Mine", files.mcq_rows(2))
    command = ["--model-path", str(checkpoint), "--baseline", "--data", "Mine", *SHORT]
    assert main([*command, "--work-dir", str(tmp_path / "out")]) == 0
    assert [r.message for r in caplog.records].count(OFF_LINE) == 1

    model = wrappers.LLaVABaseline(str(checkpoint), max_new_tokens=2)
    path = str(tmp_path / "photo.png")
    photo().save(path)
    sizes = {}
    for sample in range(1, 501):
        model.generate([path, f"What is in picture {sample % 7}?"])
        if sample in (20, 500):
            sizes[sample] = psutil.Process().memory_info().rss
    assert sizes[500] < sizes[20] * 1.01
    for module in model.model.modules():
        # transformers records hidden states of the tower with hooks of its own.
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert {hook.__module__.partition(".")[0] for hook in hooks} <= {"transformers"}


# -- VLMEvalKit's own launcher -------------------------------------------------------------------
def test_registered_names_load(checkpoint: Path) -> None:
    from vlmeval.config import supported_VLM
    from vlmeval.dataset import SUPPORTED_DATASETS

    names = wrappers.register(str(checkpoint), ["fastv:5", None, FastV(agg_layer=2)])
    assert names == [
        "llava-1.5-7b-fastv_rank5",
        "llava-1.5-7b-baseline",
        "llava-1.5-7b-fastv_rank100_k2",
    ]
    model = supported_VLM[names[0]]()
    assert isinstance(model, wrappers.LLaVAFastV)
    assert model.method == FastV(attention_rank=5)
    assert "Shapes_MCQ" in SUPPORTED_DATASETS
    wrappers.register(str(checkpoint), [None])
    assert SUPPORTED_DATASETS.count("Shapes_MCQ") == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-1.5-7b"),
        ("llava-hf/llava-1.5-13b-hf", "llava-1.5-13b-hf"),
        ("/x/models--a--llava-v1.6-vicuna-7b/snapshots/0f3d", "llava-1.6-vicuna-7b"),
        ("/runs/mine/checkpoint-500", "mine-checkpoint-500"),
        (None, "llava-demo"),
    ],
)
def test_model_names(path: str | None, name: str) -> None:
    assert model_name(path) == name


# -- no arguments --------------------------------------------------------------------------------
@pytest.mark.slow
def test_comparison_of_the_demo(tmp_path: Path) -> None:
    """Four sets by five settings, in the layout of every run; a user's home is left alone."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("LMUData", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_vlmeval.py"), "--work-dir", "out", "--limit", "2"],
        cwd=tmp_path,
        env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    logs = "".join(p.read_text() for p in (tmp_path / "out" / "logs").glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    for label in ("baseline", "fastv_rank288", "fastv_rank100", "fastv_rank32", "random_keep32"):
        assert label in done.stdout
    found = sorted((tmp_path / "out").glob("*/*_results.json"))
    assert len(found) == 20
    for path in found:
        assert path.name == f"{path.parent.name}_results.json"
        assert json.loads(path.read_text())["samples"] == 2
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    assert not (home / "LMUData").exists()
