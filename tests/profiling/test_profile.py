"""`vlm-prune profile`: axes, data, figures, resuming, reports, bad input."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import vlm_prune_ext as vp
from tests.family_makers import KINDS, internvl_chat
from tests.makers import photo, tiny_hf_llava, tiny_next
from vlm_prune_ext.ablation.plan import AblationSettings
from vlm_prune_ext.cli import main
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.grid import Line, read_lines
from vlm_prune_ext.experiment.log import Log
from vlm_prune_ext.profiling.data import CSV, Entry, read_folder, write_folder
from vlm_prune_ext.profiling.grid import Optimization, ProfileSettings
from vlm_prune_ext.profiling.loading import check_optimization, language_layers, load_for, quantize
from vlm_prune_ext.profiling.measuring import Prompter
from vlm_prune_ext.profiling.report import (
    LOG,
    QUESTIONS,
    answer_to,
    budget_lines,
    rows_of,
    write_reports,
)
from vlm_prune_ext.profiling.runner import cells_of, resolved, run_cells
from vlm_prune_ext.tables import read_list

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("profile_*.yaml"))


def png(seed: int = 0, width: int = 80, height: int = 60) -> bytes:
    file = io.BytesIO()
    photo(width, height, seed=seed).save(file, format="PNG")
    return file.getvalue()


def make_folder(path: Path, count: int = 3) -> Path:
    questions = ("What colour is the cat?", "Is there a dog in the image?", "How many circles?")
    write_folder(path, [Entry(png(i), questions[i % 3], (f"answer {i}",)) for i in range(count)])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "examples")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_llava(tmp_path_factory.mktemp("models") / "llava", layers=4)


def plan(settings: dict[str, Any]) -> ProfileSettings:
    """As from a file."""
    return ProfileSettings.of({}, settings)


def measure(
    folder: Path,
    out: Path,
    stop_after: int | None = None,
    trust: bool = False,
    fresh: bool = False,
    **settings: Any,
) -> Any:
    """Run a grid; with `stop_after`, Ctrl-C comes after so many cells."""
    chosen = resolved(plan({"repeat": 1, "max_new_tokens": 3, "warmup": 0, **settings}))
    examples = read_folder(folder)

    def track(lines: Iterator[Line], total: int, done: int) -> Iterator[Line]:
        for number, line in enumerate(lines, 1):
            yield line
            if number == stop_after:
                raise KeyboardInterrupt

    cells = cells_of(chosen, examples)
    load = {"trust_remote_code": trust}
    return run_cells(cells, examples, out, track, lambda line: None, load=load, fresh=fresh)


def lines_of(out: Path) -> list[dict[str, Any]]:
    text = (out / LOG).read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


# ---------------------------------------------------------------------------------- the grid


def test_sizes_of_pictures_reach_the_processor(folder: Path) -> None:
    """And make cells of their own; what is not said changes nothing of a cell's name."""
    examples = read_folder(folder)
    usual, smaller = (resolved(plan(said)) for said in ({}, {"max_pixels": 3136}))
    assert usual.load() == {} and smaller.load() == {"max_pixels": 3136}
    one, other = (cells_of(said, examples)[0] for said in (usual, smaller))
    assert one.key != other.key and "max_pixels" not in one.settings
    assert AblationSettings(max_pixels=3136).load() == smaller.load()


def test_axes_multiply_and_keys_tell_cells_apart(folder: Path) -> None:
    settings = {
        "img_size": [32, "none"],
        "batch_size": [1, 2],
        "cached": [True, False],
        "method": ["none", "fastv:100", {"name": "fastv", "attention_rank": 100}],
        "optimization": ["fp32", "bf16+eager"],
        "device": "cpu",
    }
    cells = cells_of(resolved(plan(settings)), read_folder(folder))
    assert len(cells) == 2 * 2 * 2 * 2 * 2  # the same method twice is one
    assert len({cell.key for cell in cells}) == len(cells)
    again = cells_of(resolved(plan(settings)), read_folder(folder))
    assert [cell.key for cell in again] == [cell.key for cell in cells]
    other = cells_of(resolved(plan({**settings, "repeat": 4})), read_folder(folder))
    assert not {cell.key for cell in other} & {cell.key for cell in cells}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configs(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    made = plan(settings)
    if path.stem == "profile_study":
        names = " ".join(made.model_name).lower()
        for model in ("blip2-flan-t5-xl", "blip2-opt-2.7b", "fuyu-8b", "llava-1.5-7b-hf"):
            assert model in names
        assert "qwen2.5-vl-3b-instruct" in names


def test_optimizations_are_read() -> None:
    assert Optimization.parse("int4") == Optimization("int4")
    assert str(Optimization.parse("eager+bf16")) == "bf16+eager"
    with pytest.raises(InputError, match=r"fp16 and bf16 exclude"):
        Optimization.parse("fp16+bf16")
    with pytest.raises(InputError, match=r"'int5'.*Did you mean 'int"):
        Optimization.parse("int5")


# ----------------------------------------------------------------------------------- a cell


def test_figures_of_a_cell(folder: Path, llava: Path, tmp_path: Path) -> None:
    grid = {"batch_size": [1, 2], "cached": [True, False], "method": ["none", "fastv:5"]}
    outcome = measure(folder, tmp_path, model_name=str(llava), device="cpu", repeat=2, **grid)
    assert (outcome.done, outcome.before, outcome.failed) == (8, 0, [])
    for line in lines_of(tmp_path):
        result, cell = line["result"], line["cell"]
        latency, flops, tokens = result["latency"], result["flops"], result["tokens"]
        batches = -(-3 // cell["batch_size"])
        assert latency["total"]["count"] == 2 * batches
        assert latency["total"]["p10"] <= latency["total"]["median"] <= latency["total"]["p90"]
        assert latency["vision"] > 0 and latency["prefill"] >= 0
        assert 0 < latency["first_token"]["median"] < latency["total"]["median"]
        # Without a cache the scores' keys are computed anew, which no formula of ours counts.
        near = 0.02 if cell["cached"] else 0.03
        assert flops["ratio"] == pytest.approx(1, rel=near)
        assert flops["vision"] == flops["analytic_vision"]
        assert tokens["visual"] == 16 and tokens["pixels"][1:] == [3, 56, 56]
        assert tokens["visual_last"] == (5 if line["label"] != "none" else 16)
        assert len(result["answers"]) == 3 and result["row_numbers"] == [1, 2, 3]
        assert result["peak_memory"] > 1 << 20 and result["quality"]["samples"] == 3
    by_cell = {
        (r["cell"]["batch_size"], r["cell"]["cached"], r["label"]): r["result"]
        for r in lines_of(tmp_path)
    }
    for batch in (1, 2):
        for label in {key[2] for key in by_cell}:
            cached, plain = by_cell[batch, True, label], by_cell[batch, False, label]
            if label == "none":  # pruned, each step without a cache selects anew
                assert cached["answers"] == plain["answers"]
                assert plain["flops"]["prefill"] == cached["flops"]["prefill"]
            assert plain["flops"]["decode"] > 3 * cached["flops"]["decode"]
    assert by_cell[1, True, "none"]["answers"] == by_cell[2, True, "none"]["answers"]


def test_energy_is_empty_or_positive(folder: Path, llava: Path, tmp_path: Path) -> None:
    from vlm_prune_ext.experiment.measure import EnergyMeter

    measure(folder, tmp_path, model_name=str(llava), device="cpu", energy_seconds=0.1)
    energy = lines_of(tmp_path)[0]["result"]["energy"]
    if EnergyMeter("cpu").available:
        assert energy["counted"] > 0
    else:
        assert set(energy.values()) == {None}


@pytest.mark.parametrize("kind", ["llava_next", "internvl_chat", *KINDS])
def test_every_family_gives_a_full_row(kind: str, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / kind
    if kind == "llava_next":
        tiny_next(model, layers=3)
    elif kind == "internvl_chat":
        internvl_chat(model)
    else:
        model.mkdir()
        KINDS[kind].make(model)
    methods = ["none"] if kind == "blip2_t5" else ["none", "fastv:3,agg_layer=1"]
    out = tmp_path / "out"
    settings = {"model_name": str(model), "device": "cpu", "batch_size": 2, "method": methods}
    measure(folder, out, trust=kind == "internvl_chat", **settings)
    lines = lines_of(out)
    assert [line["why"] for line in lines] == [None] * len(methods)
    for line in lines:
        result = line["result"]
        assert result["flops"]["ratio"] == pytest.approx(1, rel=0.02), kind
        assert result["latency"]["vision"] > 0
        assert result["tokens"]["visual"] > 3 and result["tokens"]["text"] > 0
        if line["label"] != "none":
            assert result["tokens"]["visual_last"] == 3
            assert result["flops"]["prefill"] < lines[0]["result"]["flops"]["prefill"]


def test_precisions_on_a_cpu(folder: Path, llava: Path, tmp_path: Path) -> None:
    names = ["fp32", "fp16", "bf16", "int8", "int4", "eager", "sdpa"]
    outcome = measure(
        folder, tmp_path, model_name=str(llava), device="cpu", optimization=names, samples=1
    )
    assert not outcome.failed and outcome.done == len(names)
    found = {line["cell"]["optimization"]: line["result"] for line in lines_of(tmp_path)}
    assert [found[name]["precision"] for name in names[:5]] == names[:5]
    assert found["eager"]["precision"] == "fp32"
    for result in found.values():  # kernels that torch's counter does not know are counted too
        assert result["flops"]["ratio"] == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("precision", "worst"), [("int8", 0.05), ("int4", 0.3)])
def test_quantised_layers_stay_near(precision: str, worst: float, llava: Path) -> None:
    model, _ = vp.load(str(llava), device="cpu")
    layers = language_layers(model)
    hidden = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = layers[0].mlp(hidden)  # type: ignore[operator]
    assert quantize(model, precision) == 7 * len(layers)
    with torch.no_grad():
        after = layers[0].mlp(hidden)  # type: ignore[operator]
    error = float((after - before).norm() / before.norm())
    assert 0 < error < worst
    assert all(type(m) is not torch.nn.Linear for m in layers[0].modules())
    assert type(model.lm_head) is torch.nn.Linear


def test_published_shapes_with_random_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a narrow one here; the full ones are the same code on a GPU."""
    from vlm_prune_ext.bench import shapes

    config = shapes.SHAPES["llava-1.5-7b"]()
    config.text_config.update({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
    config.text_config.update({"intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16})
    config.vision_config.update({"hidden_size": 32, "num_hidden_layers": 2})
    config.vision_config.update({"intermediate_size": 48, "num_attention_heads": 2})
    monkeypatch.setitem(shapes.SHAPES, "llava-1.5-7b", lambda: config)  # type: ignore[arg-type]
    name = "random:llava-1.5-7b"
    measure(
        folder, tmp_path, model_name=name, device="cpu", samples=1, method=["fastv:9,agg_layer=1"]
    )
    result = lines_of(tmp_path)[0]["result"]
    assert result["tokens"]["visual"] == 576 and result["tokens"]["visual_last"] == 9
    assert result["flops"]["ratio"] == pytest.approx(1, rel=0.02)
    with pytest.raises(InputError, match="Did you mean 'random:llava-1"):
        measure(folder, tmp_path / "x", model_name="random:llava-1.5-8b", device="cpu")


def test_energy_in_reports(folder: Path, llava: Path, tmp_path: Path) -> None:
    """What a machine with a counter would have written, in place of nothing."""
    measure(folder, tmp_path, model_name=str(llava), device="cpu", method=["none", "fastv:5"])
    empty = write_reports(tmp_path)[2].read_text()
    if lines_of(tmp_path)[0]["result"]["energy"]["counted"] is None:
        assert "energy is left empty" in empty
        table = [line.split(" | ") for line in empty.splitlines() if line.startswith("| ")]
        place = table[0].index("J/example")
        assert {row[place] for row in table[2:4]} == {""}
    lines = lines_of(tmp_path)
    for number, line in enumerate(lines, 1):
        line["result"]["energy"]["counted"] = 12.5 * number
        line["host"]["idle_watts"] = 71.4
    (tmp_path / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    narrow = Image.open(tmp_path / "pretty_results" / "llava_method.png").width
    page = write_reports(tmp_path)[2].read_text()
    assert "| 12.50 |" in page and "| 25.00 |" in page and "Idle power: 71 W" in page
    # One more panel: energy against the visual tokens that are left.
    assert Image.open(tmp_path / "pretty_results" / "llava_method.png").width > 1.2 * narrow


@pytest.mark.slow
def test_compiled_is_the_same_model(folder: Path, llava: Path, tmp_path: Path) -> None:
    try:
        check_optimization(Optimization(form="compile"), "cpu")
    except InputError as error:
        pytest.skip(str(error))
    measure(
        folder,
        tmp_path,
        model_name=str(llava),
        device="cpu",
        optimization=["fp32", "fp32+compile"],
        method=["none", "fastv:5"],
    )
    by_form: dict[str, list[Any]] = {}
    for line in lines_of(tmp_path):
        assert line["why"] is None
        by_form.setdefault(line["cell"]["optimization"], []).append(line["result"]["answers"])
    assert by_form["fp32"] == by_form["fp32+compile"]


# -------------------------------------------------------------------------------- prompt length


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "blip2_opt", "fuyu"])
def test_prompt_length(kind: str, folder: Path, llava: Path, tmp_path: Path) -> None:
    """Padded prompts give the same answers; cut ones have no more text than asked for."""
    model_path = llava
    if kind != "llava":
        model_path = tmp_path / kind
        model_path.mkdir()
        KINDS[kind].make(model_path)
    model, processor = vp.load(str(model_path), device="cpu")
    examples = list(read_folder(folder).rows)
    plain = Prompter(processor, None, None).batch(examples)
    longest = max(plain.text)
    padded = Prompter(processor, None, longest + 9).batch(examples)
    assert padded.text == plain.text and padded.visual == plain.visual
    assert padded.width == max(plain.visual) + longest + 9
    for name, value in padded.inputs.items():
        if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            assert value.shape == (3, padded.width), name
    said = []
    for inputs in (plain.inputs, padded.inputs):
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said.append(processor.decode(output, inputs))
    assert said[0] == said[1]
    cut = Prompter(processor, None, longest - 1).batch(examples)
    assert max(cut.text) <= longest - 1
    with pytest.raises(InputError, match="max_input_len=1 is not valid"):
        Prompter(processor, None, 1).batch(examples)


def test_image_size_reaches_the_processor(folder: Path, tmp_path: Path) -> None:
    """Qwen2.5-VL takes pictures as they come: a larger one is more visual tokens."""
    model_path = tmp_path / "qwen"
    model_path.mkdir()
    KINDS["qwen2_5_vl"].make(model_path)
    _, processor = vp.load(str(model_path), device="cpu")
    examples = list(read_folder(folder).rows)[:1]
    counts = [Prompter(processor, side, None).batch(examples).visual[0] for side in (56, 112)]
    assert counts == [4, 16]


# ------------------------------------------------------------------------------------ resuming


def test_interrupted_and_resumed(folder: Path, llava: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model_name": str(llava),
        "device": "cpu",
        "img_size": [28, 56],
        "method": ["none", "fastv:5"],
        "samples": 2,
    }
    with pytest.raises(KeyboardInterrupt):
        measure(folder, tmp_path, stop_after=2, **settings)
    first = (tmp_path / LOG).read_text()
    assert len(first.splitlines()) == 2
    # A process that is killed while it writes leaves half a line.
    with (tmp_path / LOG).open("a") as file:
        file.write('{"key": "half')
    outcome = measure(folder, tmp_path, **settings)
    assert (outcome.done, outcome.before) == (2, 2)
    assert (tmp_path / LOG).read_text().startswith(first)
    assert len(read_lines(Log(tmp_path / LOG))) == 4
    outcome = measure(folder, tmp_path, **settings)
    assert (outcome.done, outcome.before) == (0, 4)
    assert measure(folder, tmp_path, fresh=True, **{**settings, "img_size": 28}).done == 2
    assert (tmp_path / "previous" / LOG).read_text().startswith(first)
    # Other examples make other cells.
    other = make_folder(tmp_path / "other", 2)
    assert measure(other, tmp_path, **settings).done == 4


def test_a_process_is_interrupted_and_started_again(
    folder: Path, llava: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vlm_prune_ext.cli", "profile", "--src-folder", str(folder)]
    command += ["--model-name", str(llava), "--device", "cpu", "--out", str(out), "--repeat", "1"]
    command += ["--batch-size", "1", "2", "3", "--img-size", "28", "56", "--max-new-tokens", "3"]
    # A shell may have started the tests with Ctrl-C turned off.
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (out / LOG).exists() and lines_of(out):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    assert process.wait(timeout=300) in (130, 0)  # 0: it was done before the signal came
    first = (out / LOG).read_text()
    assert 1 <= len(first.splitlines()) <= 6
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (out / LOG).read_text().startswith(first) and len(lines_of(out)) == 6
    assert f"{len(first.splitlines())} were there, 0 failed" in done.stdout


def test_failed_cells_are_kept_and_tried_again(folder: Path, llava: Path, tmp_path: Path) -> None:
    methods = ["none", "fastv:5,agg_layer=99"]
    outcome = measure(folder, tmp_path, model_name=str(llava), device="cpu", method=methods)
    assert outcome.done == 1 and len(outcome.failed) == 1
    assert "agg_layer=99" in outcome.failed[0].why
    again = measure(folder, tmp_path, model_name=str(llava), device="cpu", method=methods)
    assert (again.done, again.before, len(again.failed)) == (0, 1, 1)
    assert len(read_lines(Log(tmp_path / LOG))) == 2
    write_reports(tmp_path)
    page = (tmp_path / "pretty_results" / "llava.md").read_text()
    assert "## Failed" in page and "agg_layer=99" in page


# ------------------------------------------------------------------------------------- reports


class Page(HTMLParser):
    """What a page refers to, and its tables as lists of sort values."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.heads: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [value for key in ("src", "href") if (value := given.get(key))]
        if tag == "table":
            self.tables.append([])
            self.heads.append(0)
        elif tag == "th":
            self.heads[-1] += 1
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "td":
            self.tables[-1][-1].append(given["data-value"] or "")


def test_reports(folder: Path, llava: Path, tmp_path: Path) -> None:
    grid: dict[str, Any] = {
        "img_size": [28, 56],
        "max_input_len": [64, 80],
        "cached": [True, False],
        "method": ["none", "fastv:3"],
        "samples": 1,
        "max_new_tokens": 2,
    }
    names = {"model_name": str(llava), "device": "cpu"}
    assert measure(folder, tmp_path, **names, **grid).done == 16
    # Two more batch sizes in two settings: a question is answered from where it has most values.
    more = {**grid, "img_size": 28, "max_input_len": 64, "cached": True, "batch_size": [2, 3]}
    assert measure(folder, tmp_path, **names, **more).done == 4
    assert main(["profile", "--report-only", "--out", str(tmp_path)]) == 0
    results = tmp_path / "pretty_results"
    text = (results / "llava.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.M)
    assert titles == [
        "Image size",
        "Batch size",
        "Prompt length",
        "KV cache",
        "Pruning budget",
        "All cells",
    ]
    assert "resizes every picture to 56 x 56" in text
    assert "Everything else: image 28, text limit 64, KV cache yes." in text
    assert "torch " in text and "cores" in text
    for plot in re.findall(r"!\[.*\]\((.*)\)", text):
        with Image.open(results / plot) as picture:
            assert picture.width > 500
    assert "[" + str(llava) + "](llava.md)" in (results / "index.md").read_text()
    page = Page()
    page.feed((results / "index.html").read_text())
    assert page.sources and all(source.startswith("data:image/png;") for source in page.sources)
    assert [len(table) - 1 for table in page.tables] == [4, 6, 4, 4, 2, 20]
    for table, heads in zip(page.tables, page.heads, strict=True):
        assert {len(row) for row in table[1:]} == {heads}


def test_the_budget_is_answered_for_every_optimisation(
    folder: Path, llava: Path, tmp_path: Path
) -> None:
    names = {"model_name": str(llava), "device": "cpu", "samples": 1, "max_new_tokens": 2}
    methods = ["none", "fastv:3", "random:3"]
    measure(folder, tmp_path, **names, optimization=["fp32", "eager"], method=methods)
    measure(folder, tmp_path, **names, optimization="bf16", method="none")  # no budgets there
    measure(folder, tmp_path, **names, optimization="fp32", method=methods[:2], batch_size=2)
    rows = rows_of(read_lines(Log(tmp_path / LOG)).values())
    question = next(q for q in QUESTIONS if q.axis == "method")
    chosen = answer_to(question, rows)
    found = {(row.setting("optimization"), row.line.cell["method"]["name"]) for row in chosen}
    assert found == {(o, m) for o in ("fp32", "eager") for m in ("none", "fastv", "random")}
    assert {row.setting("batch_size") for row in chosen} == {1}
    lines = budget_lines(chosen)
    assert len(lines) == 4 and {len(line) for line in lines.values()} == {2}
    write_reports(tmp_path)
    text = (tmp_path / "pretty_results" / "llava.md").read_text()
    section = text.split("## Pruning budget")[1].split("## ")[0]
    assert section.count("\n|") == 2 + 6 and "Everything else: batch 1." in section


def test_reports_of_several_models(folder: Path, llava: Path, tmp_path: Path) -> None:
    second = tiny_hf_llava(tmp_path / "other" / "llava", layers=3)
    names = [str(llava), str(second)]
    measure(folder, tmp_path, model_name=names, device="cpu", samples=1)
    pages = write_reports(tmp_path)
    stems = [page.stem for page in pages[2:]]
    assert len(set(stems)) == 2 and all(stem.startswith("llava-") for stem in stems)


# ----------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no data.csv" in refused(capsys, "profile", "--src-folder", str(empty))
    assert "does not exist" in refused(capsys, "profile", "--src-folder", str(tmp_path / "x"))
    (empty / CSV).write_text("image,prompt\na.png,b\n")
    said = refused(capsys, "profile", "--src-folder", str(empty))
    assert "no column question, answer" in said
    (empty / CSV).write_text("image,question,answer\na.png,b,c\n")
    assert "no row that can be used" in refused(capsys, "profile", "--src-folder", str(empty))
    (empty / CSV).write_text("image,question,answer\n")
    assert "is empty" in refused(capsys, "profile", "--src-folder", str(empty))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_device_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "profile", "--src-folder", str(folder), "--device", "cuda")
    assert "device='cuda' is not there" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimization", "flash"], "FlashAttention-2 needs a GPU"),
        (["--optimization", "fast"], "--optimization fast cannot be done"),
        (["--optimization", "fp8"], "Unknown --optimization 'fp8'"),
        (["--batch-size", "0"], "--batch-size 0 is not valid"),
        (["--img-size", "big"], "--img-size big is not valid"),
        (["--method", "fastw:100"], "Did you mean 'fastv'"),
        (["--batchsize", "2"], "--batch-size"),
        (["--repeat", "0"], "--repeat 0 is not valid"),
    ],
)
def test_bad_settings(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["profile", "--src-folder", str(folder), "--device", "cpu", *arguments]
    assert said in refused(capsys, *given)


def test_bad_config_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--src-folder is needed" in refused(capsys, "profile")
    config = tmp_path / "grid.yaml"
    config.write_text("src_folder: x\nbatch_sizes: [1]\n")
    said = refused(capsys, "profile", "--config", str(config))
    assert "'batch_sizes'" in said and "'batch_size'" in said


def test_broken_pictures_are_named_and_the_rest_is_measured(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "data", 3)
    rows = list(csv.reader((source / CSV).open()))
    (source / "images" / rows[2][0]).write_bytes(png()[:200])
    with (source / CSV).open("a") as file:
        file.write("nothing.png,What?,this\n")
    out = tmp_path / "out"
    arguments = ["profile", "--src-folder", str(source), "--model-name", str(llava)]
    arguments += ["--device", "cpu", "--out", str(out), "--repeat", "1", "--max-new-tokens", "2"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "Left out: row 2" in said and "does not decode" in said
    assert "Left out: row 4 (nothing.png)" in said
    assert lines_of(out)[0]["result"]["row_numbers"] == [1, 3]
    # Wrong input later on leaves what is there alone.
    before = (out / LOG).read_text()
    assert main([*arguments, "--optimization", "flash"]) == 2
    assert (out / LOG).read_text() == before


def test_a_model_that_is_not_there(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["profile", "--src-folder", str(folder), "--device", "cpu"]
    arguments += ["--model-name", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "No cell could be measured" in capsys.readouterr().err


def test_help_is_light() -> None:
    code = (
        "import sys; from vlm_prune_ext.cli import main;"
        "main(['profile', '--help']); main(['profile-data', '--help']);"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)


# ----------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_a_gpu_cell(folder: Path, llava: Path, tmp_path: Path) -> None:
    names = ["fp16", "bf16", "int8", "int4"]
    outcome = measure(
        folder,
        tmp_path,
        model_name=str(llava),
        device="cuda",
        optimization=names,
        method=["none", "fastv:5"],
        energy_seconds=1.0,
    )
    assert not outcome.failed
    for line in lines_of(tmp_path):
        assert line["result"]["flops"]["ratio"] == pytest.approx(1, rel=0.02)
        energy = line["result"]["energy"]
        if energy["counted"] is not None:
            assert energy["counted"] > 0


def test_answers_are_read() -> None:
    assert read_list('["a", " b ", ""]') == read_list("['a', 'b']") == ["a", "b"]
    assert read_list("[not json") == ["[not json"] and read_list("[not, json]") == ["[not, json]"]
    assert read_list(" ") == []


def test_load_for_names_what_it_is(llava: Path) -> None:
    loaded = load_for(str(llava), "cpu", Optimization("bf16", "eager"))
    assert loaded.model.dtype is torch.bfloat16
    assert str(loaded.optimization) == "bf16+eager"
