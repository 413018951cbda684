"""Two-second clips through both frameworks, end to end: pruned and not, in batches, gone on from,
and with rows that cost only themselves."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("vlmeval")
pytest.importorskip("lmms_eval")

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager
from vlmeval.dataset import videomme

import vlm_prune_ext as vp
from run_vlmeval import main
from tests import family_makers, makers, video_makers
from vlm_prune_ext.evals import lmms
from vlm_prune_ext.evals.answer import Answerer, Query
from vlm_prune_ext.evals.lmms_requests import kind_of
from vlm_prune_ext.experiment.record import SampleLog
from vlm_prune_ext.models.clips import Clip

FAMILIES = ("qwen3_vl", "llava_onevision")
FRAMES = {"qwen3_vl": 2, "llava_onevision": 4}  # that tokens stand for, of four that are shown


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    folder.mkdir()
    family_makers.TABLE[request.param].make(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(2):
        video_makers.mp4(folder / f"{seed}.mp4", seed=seed)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def samples(folder: Path) -> dict[Any, Any]:
    (path,) = folder.glob("*/*_samples.jsonl")
    return {one.index: one for one in SampleLog(path).samples()[0]}


def record(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*/*_results.json")
    return json.loads(path.read_text())


def table(clips: Path) -> Path:
    """Rows with a clip, the same clip, another, none, one that does not decode, one that is not
    there."""
    videos = ["0.mp4", "0.mp4", "1.mp4", "", "broken.mp4", "nowhere.mp4"]
    letters = {
        letter: [word] * len(videos) for letter, word in zip("AB", ("left", "right"), strict=True)
    }
    path = clips / "Moving.tsv"
    questions = [f"Where does it go in {n}?" for n in range(len(videos))]
    frame = pd.DataFrame(
        {"index": range(len(videos)), "video": videos, "question": questions, **letters}
    )
    frame.assign(answer="B").to_csv(path, sep="\t", index=False)
    return path


def test_a_table_of_clips(checkpoint: Path, clips: Path, data: Path, tmp_path: Path) -> None:
    """Answers are those of one prompt at a time, whatever the batch; broken rows fail alone; a run
    goes on, and asks anew where the frames that are shown differ."""
    model, processor = vp.load(checkpoint)
    method = vp.FastV(agg_layer=2, attention_rank=3)
    words = ["--model-path", str(checkpoint), "--data", str(table(clips)), "--max-new-tokens", "3"]
    words += ["--frames", "4", "--device", "cpu"]
    pruned = ["--method", "fastv:3", "--set", "agg_layer=2"]
    for name, extra in {"plain": ["--baseline"], "pruned": pruned}.items():
        folder = tmp_path / name
        assert main([*words, *extra, "--work-dir", str(folder), "--batch-size", "4"]) == 1
        found = samples(folder)
        assert record(folder)["score"]["name"] == "Overall"
        failed = {int(row["index"]): row["reason"] for row in record(folder)["failed"]}
        assert set(failed) == {4, 5}
        assert "does not decode" in failed[4] and "does not exist" in failed[5]
        assert found[3].visual_tokens == 0 and found[3].failed is None
        answerer = Answerer(model, processor, method if name == "pruned" else None)
        for index in range(3):
            text = (
                f"Where does it go in {index}?\nA. left\nB. right\n"
                "Answer with the option's letter from the given choices directly."
            )
            clip = Clip(clips / f"{index // 2}.mp4", 4)
            asked = processor.messages(
                [{"role": "user", "content": [{"type": "video", "video": clip}, text_item(text)]}]
            )
            query = Query(*asked, style="plain", max_new_tokens=3)
            (alone,) = answerer.answer([query])
            assert found[index].prediction == alone.text
            assert found[index].visual_tokens == alone.visual_tokens > 8
        last = max(found[0].visual_kept, key=int)
        left = 3 * FRAMES[checkpoint.name] if name == "pruned" else found[0].visual_tokens
        assert found[0].visual_kept[last] == left
    again = [*words, *pruned, "--work-dir", str(tmp_path / "pruned")]
    (log,) = (tmp_path / "pruned").glob("*/*_samples.jsonl")
    before = log.read_text().count('"sample"')
    assert main(again) == 1  # only the rows that failed are asked again
    assert log.read_text().count('"sample"') - before <= 2
    if checkpoint.name == "qwen3_vl":  # enough once
        return
    assert main([*again, "--frames", "8"]) == 1
    assert samples(tmp_path / "pruned")[0].visual_tokens > found[0].visual_tokens
    whole = ["--video-budget", "video", "--work-dir", str(tmp_path / "whole")]
    assert main([*words, *pruned, *whole]) == 1
    assert samples(tmp_path / "whole")[0].visual_kept["2"] == 3


def text_item(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def video_mme(folder: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions in the form of VLMEvalKit's Video-MME, in place of the hub's."""
    (folder / "video").mkdir(parents=True)
    rows = []
    for seed in range(2):
        (folder / "video" / f"v{seed}.mp4").write_bytes((clips / f"{seed}.mp4").read_bytes())
        options = ["A. Left.", "B. Right.", "C. Up.", "D. Down."]
        rows.append(
            {
                **{"index": seed, "video": f"v{seed}", "video_path": f"./video/v{seed}.mp4"},
                **{"duration": "short", "domain": "Knowledge", "candidates": options},
                **{"sub_category": "Biology & Medicine", "task_type": "Action Recognition"},
                **{"subtitle_path": "none.srt", "question": "Where does it move?", "answer": "B"},
            }
        )
    path = folder / "Video-MME.tsv"
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    monkeypatch.setattr(videomme, "get_cache_path", lambda *_: str(folder))
    monkeypatch.setattr(videomme.VideoMME, "MD5", videomme.md5(str(path)))


def test_a_data_set_of_vlmevalkit(
    checkpoint: Path, clips: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own class, prompts and scores; as many frames as its name says, unless told."""
    video_mme(tmp_path / "hub", clips, monkeypatch)
    words = ["--model-path", str(checkpoint), "--data", "Video-MME_8frame", "--device", "cpu"]
    words += ["--max-new-tokens", "3", "--method", "random:0.5", "--batch-size", "2"]
    tokens = {}
    for name, extra in {"eight": [], "four": ["--frames", "4"]}.items():
        folder = tmp_path / name
        assert main([*words, *extra, "--work-dir", str(folder)]) == 0
        found = record(folder)
        assert found["samples"] == 2 and found["failed"] == []
        tokens[name] = samples(folder)[0].visual_tokens
        assert found["visual_tokens"][-1]["after"] == pytest.approx(tokens[name] / 2, abs=4)
        (log,) = folder.glob("*/*_samples.jsonl")
        written = log.read_text()
        assert main([*words, *extra, "--work-dir", str(folder)]) == 0
        assert log.read_text() == written  # nothing was left to ask
    assert tokens["eight"] > tokens["four"]


def test_names_of_data_sets(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm_prune_ext.evals.rows import check_name

    for name, sentence in {
        "Video-MME": "does not say which frames of a video are shown: Video-MME_0.5fps",
        "MMBench_Video_8frame_pack": "several questions in one",
    }.items():
        with pytest.raises(vp.InputError, match=sentence):
            check_name(name, "all")
    check_name("MVBench_MP4_8frame", "all")


# -- lmms-eval -------------------------------------------------------------------------------------
def request(messages: Any, doc: int, simple: bool = False) -> Instance:
    given = {"max_new_tokens": 3, "temperature": 0, "do_sample": False}
    arguments = ("", messages, given, doc, "t", "test")
    if simple:
        arguments = ("Where does it go?", given, messages, doc, "t", "test")
    return Instance(
        request_type="generate_until",
        arguments=arguments,
        idx=0,
        metadata={"task": "t", "doc_id": doc, "repeats": 1},
    )


def test_lmms(checkpoint: Path, clips: Path) -> None:
    """Chat and simple interface, batches of one and of several, with rows that hold a clip, frames,
    a picture, text alone, and a clip that does not decode."""
    shown = list(video_makers.frames(4))
    docs = [str(clips / "0.mp4"), str(clips / "1.mp4"), shown, None, str(clips / "broken.mp4")]

    def messages(doc: Any, **_: Any) -> Any:
        items = [] if doc is None else [{"type": "video", "url": doc}]
        return [{"role": "user", "content": [*items, text_item("Where does it go?")]}]

    found: dict[Any, Any] = {}
    for kind, simple, batch, budget in (
        ("LlavaFastvChat", False, 4, "frame"),
        ("LlavaFastvSimple", True, 4, "frame"),
        ("LlavaFastvChat", False, 1, "frame"),
        ("LlavaFastvChat", False, 4, "video"),
    ):
        settings = f"agg_layer=2,attention_rank=3,frames=4,video_budget={budget}"
        model: Any = getattr(lmms, kind).create_from_arg_string(
            f"pretrained={checkpoint},device=cpu,{settings}", {"batch_size": batch, "device": None}
        )
        model.task_dict = {"t": {"test": docs}}
        to_visual = lambda doc: [] if doc is None else [doc]  # noqa: E731
        asked = [request(to_visual if simple else messages, n, simple) for n in range(len(docs))]
        results = list(model.generate_until(asked))
        assert results[4].text == "" and results[0].token_counts.output_tokens > 0
        found[kind, batch, budget] = [one.text for one in results]
    assert found["LlavaFastvChat", 4, "frame"] == found["LlavaFastvSimple", 4, "frame"]
    assert found["LlavaFastvChat", 4, "frame"] == found["LlavaFastvChat", 1, "frame"]


TASK = """\
task: moving
dataset_path: parquet
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: "Where does it go?"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_of_lmms_eval(
    checkpoint: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval's own evaluator on a task that hands over files: pruned and not, one clip broken;
    what it measured stands in the results."""
    names = ["0.mp4", "1.mp4", "0.mp4", "broken.mp4"]
    rows = pd.DataFrame({"clip": [str(clips / name) for name in names], "answer": "left"})
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "utils.py").write_text("def visuals(doc):\n    return [doc['clip']]\n")
    (tmp_path / "moving.yaml").write_text(TASK % (tmp_path / "rows.parquet"))
    monkeypatch.setattr(
        "lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: str(tmp_path / "hf")
    )
    left = {"llava_baseline": None, "llava_fastv": 3 * FRAMES[checkpoint.name]}
    for name, after in left.items():
        settings = ",agg_layer=2,attention_rank=3" if after else ""
        results = evaluator.simple_evaluate(
            model=name,
            model_args=f"pretrained={checkpoint},device=cpu,frames=4{settings}",
            tasks=["moving"],
            batch_size=2,
            task_manager=TaskManager(
                "ERROR", include_path=str(tmp_path), include_defaults=False, model_name=name
            ),
            cli_args=Namespace(process_with_media=False, output_path=None),
            bootstrap_iters=0,
        )
        said = {one["doc_id"]: one["resps"][0][0] for one in results["samples"]["moving"]}
        assert said[0] == said[2] != "" and said[3] == ""
        figures = results["throughput"]
        before = figures["avg_visual_tokens_before"]
        assert figures["avg_visual_tokens_after"] == (after or before) and before > 16
        assert figures["avg_failed_samples"] == 1


def test_lmms_baseline_and_bad_settings(clips: Path, tmp_path: Path) -> None:
    folder = makers.tiny_original(tmp_path / "llava")
    model: Any = lmms.LlavaBaselineChat.create_from_arg_string(
        f"pretrained={folder},device=cpu", {"batch_size": 2, "device": None}
    )
    model.task_dict = {"t": {"test": [str(clips / "0.mp4"), None]}}

    def messages(doc: Any, **_: Any) -> Any:
        items = [] if doc is None else [{"type": "video", "url": doc}]
        return [{"role": "user", "content": [*items, text_item("Where?")]}]

    results = list(model.generate_until([request(messages, n) for n in range(2)]))
    assert results[0].text == "" and results[1].token_counts.output_tokens > 0
    for wrong in ("frames=4", "fps=0.5"):
        with pytest.raises(vp.InputError, match=r"is no setting of LLaVA-1\.5, which takes no"):
            lmms.LlavaBaselineChat.create_from_arg_string(
                f"pretrained={folder},device=cpu,{wrong}", {"batch_size": 1, "device": None}
            )


def test_what_a_task_hands_over() -> None:
    array = video_makers.frames(2)
    videos = ["a.mp4", Path("b.MKV"), "c.webm", array, list(array)]
    assert [kind_of(one) for one in videos] == ["video"] * len(videos)
    assert [kind_of(one) for one in ("a.png", makers.photo(), b"")] == ["image"] * 3
