"""What the lmms-eval models are made of, without a model: arguments, batches on demand, plans."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_prune_ext import InputError
from vlm_prune_ext.evals import lmms_launch
from vlm_prune_ext.evals.lmms import LazyAnswers
from vlm_prune_ext.evals.lmms_plugin import (
    accepted_keys,
    class_of,
    method_of,
    models,
    run_label,
)
from vlm_prune_ext.methods.custom import CustomSelection
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.registry import METHODS
from vlm_prune_ext.methods.saint import SAINT, SAINTViT

# -- the plug-in ---------------------------------------------------------------------------------


def test_plugin_is_light_and_registered() -> None:
    code = (
        "import sys, lmms_eval.models.registry_v2 as r; before = set(sys.modules);"
        "import time; start = time.perf_counter();"
        "from vlm_prune_ext.evals.lmms_plugin import manifests, models; made = manifests();"
        "seconds = time.perf_counter() - start; assert seconds < 1, seconds;"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy;"
        "from lmms_eval.models import get_model_manifest;"
        "assert {m.model_id for m in made} == set(models());"
        "assert all(get_model_manifest(m.model_id) == m for m in made)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Failed to load" not in done.stdout


def test_every_method_has_a_model() -> None:
    assert set(models().values()) == {*METHODS, None}


# -- model_args ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("llava_fastv", {"attention_rank": 50}, FastV(attention_rank=50)),
        ("llava_fastv", {"fast_v_attention_rank": 50, "use_fast_v": True}, FastV(3, 50)),
        ("llava_fastv", {"attention_rank": 0.25, "mode": "mask"}, FastV(3, 0.25, mode="mask")),
        ("llava_fastv", {"fast_v_inplace": False}, FastV(mode="mask")),
        ("vlm_prune", {"method": "fastv", "agg_layer": "2"}, FastV(agg_layer=2)),
        ("vlm_prune", {"method": "none"}, None),
        ("llava_baseline", {}, None),
        ("llava_custom", {"method": "norm"}, CustomSelection(method="norm")),
        (
            "vlm_prune",
            {"method": "custom", "custom_selection_method": "uniform"},
            CustomSelection(method="uniform"),
        ),
        ("llava_saint", {"vit_layers": 19, "start": "None"}, SAINT(start=None, vit=SAINTViT())),
        (
            "llava_saint",
            {"vit_layers": "[11,19]", "vit_keep_num": "[400, 300]", "vit_r": 8},
            SAINT(vit=SAINTViT((11, 19), (400, 300), 8)),
        ),
        (
            "llava_saint",
            {"saint_prune_mode": "[None, iterative_drop_full_graph]", "saint_keep_num": 300},
            SAINT(vit=SAINTViT((1,), 300)),
        ),
        ("llava_saint", {"saint_start": 3, "saint_end": 5}, SAINT(3, 5)),
    ],
)
def test_model_args_become_a_method(model: str, given: dict[str, Any], expected: Any) -> None:
    assert method_of(model, given) == expected


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("llava_fastv", {"attention_ran": 5}, ("attention_ran", "'attention_rank'")),
        ("llava_fastv", {"pretraind": "x"}, ("pretraind", "'pretrained'")),
        ("llava_fastv", {"keep": 5}, ("'keep'", "Accepted")),
        ("llava_fastv", {"attention_rank": 0}, ("attention_rank", "0", "at least 1")),
        ("llava_fastv", {"use_fast_v": False}, ("use_fast_v", "llava_baseline")),
        ("llava_fastv", {"peft": "x"}, ("peft=", "merge")),
        ("llava_fastv", {"delta": "x"}, ("delta=", "apply")),
        ("llava_baseline", {"attention_rank": 5}, ("attention_rank",)),
        ("vlm_prune", {}, ("method=", "fastv")),
        ("vlm_prune", {"method": "fastvv"}, ("fastvv", "'fastv'")),
        ("llava_saint", {"vit_layers": "[1"}, ("[1", "brackets")),
        ("llava_saint", {"vit_layers": 1, "vit": "{layers: [2]}"}, ("vit", "one setting")),
        ("llava_random", {}, ("keep",)),
    ],
)
def test_wrong_model_args_are_named(
    model: str, given: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        method_of(model, given)
    for word in words:
        assert word in str(caught.value)


def test_no_argument_name_misleads_the_tracker() -> None:
    """lmms-eval looks for these texts anywhere in model_args and takes what follows for a name."""
    for model in models():
        for method in METHODS if models()[model] is None else (models()[model],):
            cls = class_of(model, {"method": method})
            for key in accepted_keys(model, cls) - {"pretrained"}:
                word = f"{key}="
                assert not word.endswith(("peft=", "delta=", "pretrained=")), key


def test_labels_tell_configurations_apart() -> None:
    runs: list[tuple[str, dict[str, Any]]] = [
        ("llava_baseline", {}),
        ("llava_fastv", {}),
        ("llava_fastv", {"attention_rank": "50"}),
        ("llava_fastv", {"attention_rank": "50", "agg_layer": "2"}),
        ("llava_fastv", {"attention_rank": "50", "mode": "mask"}),
        ("llava_fastv", {"attention_rank": "50", "dtype": "float16"}),
        ("llava_fastv", {"attention_rank": "50", "pretrained": "liuhaotian/llava-v1.5-7b"}),
        ("llava_fastv", {"attention_rank": "50", "conv_template": "vlmeval"}),
        ("llava_random", {"keep": "50"}),
        ("llava_random", {"keep": "50", "seed": "1"}),
        ("llava_saint", {}),
        ("llava_saint", {"start": "None", "vit_layers": "19"}),
        ("llava_himap", {}),
        ("llava_custom", {}),
        ("llava_custom", {"method": "norm"}),
        ("llava_downsample", {"keep": "0.25"}),
    ]
    labels = [run_label(model, given) for model, given in runs]
    assert len(set(labels)) == len(labels)
    assert labels[6] == "llava-v1.5-7b-fastv_rank50"
    assert run_label("vlm_prune", {"method": "fastv"}) == run_label("llava_fastv", {})
    assert not any(set(label) & set("/ ,='\"[]") for label in labels)


# -- batches on demand -----------------------------------------------------------------------------


def test_lazy_answers_are_made_on_demand_in_any_order() -> None:
    """Whatever the order in which they are made; twins are not made."""
    made: list[int] = []

    def answers() -> Iterator[tuple[int, str]]:
        for place in (2, 0, 4, 1):
            made.append(place)
            yield place, str(place)
        made.append(-1)

    lazy = LazyAnswers(5, answers(), twins={3: 1})
    assert len(lazy) == 5 and made == []
    assert lazy[0] == "0" and made == [2, 0]
    assert [lazy[2], lazy[-1]] == ["2", "4"] and made == [2, 0, 4]
    assert list(lazy) == ["0", "1", "2", "1", "4"]
    assert made == [2, 0, 4, 1, -1]  # what follows the last one is done, too
    assert lazy[1:3] == ["1", "2"]
    with pytest.raises(IndexError):
        lazy[5]


# -- run_lmms.sh -----------------------------------------------------------------------------------


def plan(*words: str) -> list[str]:
    return lmms_launch.make_plan(words).command


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms_launch, "_gpus", lambda: 0)


def after(command: list[str], word: str) -> str:
    return command[command.index(word) + 1]


@pytest.mark.usefixtures("no_gpu")
def test_plan_sorts_keys() -> None:
    made = lmms_launch.make_plan(
        ["llava_random", "shapes_mcq,shapes_yn", "keep=50", "seed=3", "limit=7", "--batch_size=4"]
    )
    command = made.command
    assert after(command, "--model_args") == "keep=50,seed=3"
    assert after(command, "--limit") == "7"
    assert after(command, "--batch_size") == "4"
    assert after(command, "--tasks") == "shapes_mcq,shapes_yn"
    assert after(command, "--include_path") == str(lmms_launch.TASKS)
    assert after(command, "--output_path") == "logs/demo-random_keep50_seed3"
    assert after(command, "--num_processes") == "1"
    assert "--cpu" in command
    assert made.environment["ACCELERATE_USE_CPU"] == "true"
    # Where the method has no seed, lmms-eval's is meant.
    assert after(plan("llava_fastv", "shapes_mcq", "seed=3"), "--seed") == "3"


def test_plan_counts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms_launch, "_gpus", lambda: 4)
    command = plan("llava_fastv", "shapes_mcq")
    assert after(command, "--num_processes") == "4"
    assert "--multi_gpu" in command
    assert after(plan("llava_fastv", "shapes_mcq", "num_processes=1"), "--num_processes") == "1"
    assert after(plan("llava_fastv", "shapes_mcq", "device=cpu"), "--num_processes") == "1"
    monkeypatch.setenv("NUM_PROCESSES", "2")
    assert after(plan("llava_fastv", "shapes_mcq"), "--num_processes") == "2"
    monkeypatch.delenv("NUM_PROCESSES")
    spread = plan("llava_fastv", "shapes_mcq", "device_map=auto")
    assert after(spread, "--num_processes") == "1"
    command = plan(
        "llava_fastv",
        "shapes_mcq",
        "num_processes=16",
        "num_machines=2",
        "machine_rank=1",
        "main_process_ip=10.0.0.1",
        "main_process_port=1234",
    )
    assert after(command, "--num_processes") == "16"
    assert after(command, "--num_machines") == "2"
    assert after(command, "--machine_rank") == "1"
    assert after(command, "--main_process_ip") == "10.0.0.1"
    assert after(command, "--main_process_port") == "1234"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llava_fast", "shapes_mcq"], ("llava_fast", "'llava_fastv'")),
        (["llava_fastv"], ("TASKS",)),
        (["llava_fastv", ","], ("TASKS",)),
        (["llava_fastv", "shapes_mcq", "atention_rank=5"], ("'attention_rank'",)),
        (["llava_fastv", "shapes_mcq", "batchsize=5"], ("'batch_size'",)),
        (["llava_fastv", "shapes_mcq", "attention_rank"], ("key=value",)),
        (["llava_fastv", "shapes_mcq", "limit=1", "limit=2"], ("limit", "twice")),
        (["llava_fastv", "shapes_mcq", "attention_rank=-1"], ("attention_rank",)),
        (["llava_fastv", "shapes_mcq", "num_processes=0"], ("num_processes",)),
        (["llava_fastv", "shapes_mcq", "num_machines=2"], ("machine_rank",)),
        (["llava_fastv", "shapes_mcq_ppl", "use_cache=x"], ("use_cache", "shapes_mcq_ppl")),
        (["llava_fastv", "shapes_mcq", "include_path=x"], ("include_path",)),
        (["llava_fastv", "shapes_mcq", "agg_layer=99"], ("agg_layer", "99", "12 layers")),
        (["llava_fastv", "shapes_mcq", "pretrained=no/where/at/all"], ("no/where/at/all",)),
        (["llava_fastv", "shapes_mcq", "device=cuda:99"], ("cuda:99", "is not there")),
        (["llava_fastv", "shapes_mcq", "device=cpu", "fast=true"], ("fast=true", "device=cpu")),
    ],
)
def test_wrong_calls_are_one_sentence(
    words: list[str], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lmms_launch.main(words) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for word in said:
        assert word in error


def test_unregistered_plugin_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import lmms_eval.models

    monkeypatch.setattr(lmms_eval.models, "list_available_models", lambda: ["llava_hf"])
    with pytest.raises(InputError, match="entry point"):
        plan("llava_fastv", "shapes_mcq")


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert lmms_launch.main([]) == 2
    said = capsys.readouterr().out
    assert "llava_saint" in said
    assert "shapes_mme" in said
    assert lmms_launch.main(["--help"]) == 0


# -- local tasks -----------------------------------------------------------------------------------


def test_task_files_are_complete() -> None:
    tasks = lmms_launch.local_tasks()
    assert {"shapes_mcq", "shapes_yn", "shapes_mme", "shapes_vqa", "shapes_caption"} <= set(tasks)
    for name in tasks:
        path = lmms_launch.TASKS / f"{name}.yaml"
        config = yaml.load(path.read_text(), lmms_launch._Loader)
        assert config["task"] == name
        assert "path" not in str(config.get("dataset_kwargs", ""))


@pytest.fixture(scope="module")
def task_utils() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("shapes_utils", lmms_launch.TASKS / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_multiple_choice_scores(task_utils: Any) -> None:
    doc = {"answer": "B", "A": "red", "B": "a blue ring", "C": "green", "D": "white"}

    def score(text: str) -> float:
        return task_utils.mcq_results(doc, [text])["accuracy"]

    assert [score(text) for text in ("B", "B.", "b", "(B)", "B. a blue ring", "Blue ring")] == [
        1
    ] * 6
    assert [score(text) for text in ("A", "", "red", "Because", "A or B")] == [0] * 5


def test_yes_no_scores(task_utils: Any) -> None:
    answers = [("Yes", "yes"), ("no.", "no"), ("yes", "no"), ("maybe", "yes"), ("no", "yes")]
    results = [task_utils.yn_results({"answer": truth}, [text]) for text, truth in answers]
    assert [one["accuracy"] for one in results] == [1, 1, 0, 0, 0]
    pairs = [one["f1"] for one in results]
    assert task_utils.precision(pairs) == 1 / 2
    assert task_utils.recall(pairs) == 1 / 3
    assert task_utils.f1(pairs) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert task_utils.yes_ratio(pairs) == 2 / 5


def test_mme_score_adds_accuracy_and_both_right(task_utils: Any) -> None:
    def result(image: str, category: str, right: bool) -> dict[str, Any]:
        doc = {"question_id": image, "category": category, "answer": "Yes"}
        return task_utils.mme_results(doc, ["Yes" if right else "No"])["perception_score"]

    results = [result("a", "color", True), result("a", "color", True)]
    results += [result("b", "color", True), result("b", "color", False)]
    assert task_utils.mme_score(results) == pytest.approx(75 + 50)
    results += [result("c", "count", True), result("c", "count", True)]
    assert task_utils.mme_score(results) == pytest.approx(125 + 200)


def test_vqa_and_caption_scores(task_utils: Any) -> None:
    doc = {"answers": ["top left"] * 10}
    assert task_utils.vqa_results(doc, ["The Top Left."])["exact_match"] == 1
    assert task_utils.vqa_results(doc, ["left"])["exact_match"] == 0
    split = {"answers": ["red"] * 2 + ["blue"] * 8}
    assert task_utils.vqa_results(split, ["red"])["exact_match"] == pytest.approx(
        (2 * 1 / 3 + 8 * 2 / 3) / 10
    )
    pairs = []
    for text in ("A red circle and a blue ring.", "A green star and a white cross."):
        pairs.append(task_utils.caption_results({"answer": [text]}, [text])["cider"])
    assert task_utils.bleu_4(pairs) == pytest.approx(100, abs=1e-3)
    assert task_utils.rouge_l(pairs) == pytest.approx(100)
    assert task_utils.cider(pairs) > 500
    wrong = [{**pairs[0], "caption": "nothing at all"}, {**pairs[1], "caption": "a b c d"}]
    assert task_utils.bleu_4(wrong) < 10
    assert task_utils.cider(wrong) < 50


def test_prompts_follow_the_real_tasks(task_utils: Any) -> None:
    doc = {"question": "Is it red? Please answer yes or no.", "image": None}
    prompts = {"post_prompt": "\nAnswer the question using a single word or phrase."}
    asked = task_utils.question_to_text(doc, prompts)
    assert asked == "Is it red?\nAnswer the question using a single word or phrase."
    assert task_utils.question_to_text({"question": None}, prompts) == ""
    assert task_utils.doc_to_visual(doc) == []
    choice = {"question": "What?", "A": "1", "B": "2", "C": "3", "D": "4"}
    assert task_utils.mcq_to_text(choice, {"post_prompt": "\nGo."}) == (
        "What?\nA. 1\nB. 2\nC. 3\nD. 4\nGo."
    )


def test_a_missing_data_folder_is_named(
    task_utils: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLM_PRUNE_DEMO_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"mcq\.parquet.*demo-data"):
        task_utils.load_mcq(None)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("limit=abc", "limit=abc is not valid: a count, or a share under 1."),
        ("limit=0", "limit=0 is not valid"),
        ("batch_size=0", "batch_size=0 is not valid: an integer of at least 1."),
        ("max_batch_size=1.5", "max_batch_size=1.5 is not valid"),
    ],
)
def test_numbers_are_checked_first(word: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        plan("llava_fastv", "shapes_mcq", word)


@pytest.mark.usefixtures("no_gpu")
def test_results_need_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = ["llava_fastv", "shapes_mcq", f"output_path={tmp_path / 'file' / 'logs'}"]
    assert lmms_launch.main(words) == 2
    assert "cannot be written" in capsys.readouterr().err
