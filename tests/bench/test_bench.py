"""`vlm-prune bench`: what it measures is what it says, and bad input ends in one sentence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlm_prune_ext as vp
from tests import family_makers, makers
from vlm_prune_ext.bench import cases, report, shapes
from vlm_prune_ext.cli import main
from vlm_prune_ext.experiment.flops import (
    DecoderShape,
    count_flops,
    decoder_flops,
    prefill_flops,
    vision_modules,
)
from vlm_prune_ext.experiment.measure import Roofline, seconds_of
from vlm_prune_ext.fast.pieces import PROMPT_STEP

FASTV = "fastv:5,agg_layer=2"
ROOFLINE = Roofline(flops=2e9, bytes=1e9, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.tiny_original(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> cases.Workload:
    model, processor = vp.load(folder, device="cpu", fast=False)
    return cases.of_checkpoint("tiny", model, processor, "Red?", makers.photo())


def run(folder: Path, out: Path, *more: str) -> int:
    argv = ["bench", "--model-path", str(folder), "--device", "cpu", "--out", str(out)]
    return main([*argv, "--repeat", "2", "--new-tokens", "3", *more])


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    methods = ["--methods", "none", FASTV, "--batch-sizes", "1", "2"]
    assert run(folder, out, *methods) == 0
    said = capsys.readouterr()
    assert "fastv_rank5_k2" in said.out
    assert "Left out: graphs (CUDA graphs need a GPU): fastv_rank5_k2, none" in said.err
    data = json.loads((out / "bench.json").read_text())
    found = {(c["batch"], c["way"], c["method"]) for c in data["cells"]}
    rows = [("hf", "none"), ("hf-attentions", "none"), ("ordinary", "fastv_rank5_k2")]
    assert found == {(batch, *row) for batch in (1, 2) for row in rows}
    for cell in data["cells"]:
        assert cell["prefill"]["median"] > 0 and cell["prefill"]["count"] == 2
        assert cell["joules"] is None and cell["peak_bytes"] is None  # not 0
        assert cell["samples_per_second"] == cell["batch"] / cell["first_token"]["median"]
        assert cell["unseen_samples_per_second"] > 0
    shape = DecoderShape.from_config(vp.load(folder, device="cpu")[0].config)
    whole = data["prompt"]["text"] + data["prompt"]["visual"]
    pruned = next(c for c in data["cells"] if c["method"] != "none")
    lengths = [whole] * 2 + [data["prompt"]["text"] + 5] * (shape.layers - 2)
    assert pruned["lengths"] == lengths
    ratio = decoder_flops(shape, lengths) / decoder_flops(shape, [whole] * shape.layers)
    assert pruned["flops_ratio"] == pytest.approx(ratio)
    text = (out / "bench.md").read_text()
    assert text.splitlines()[0] == data["title"] and "TFLOP/s (float32)" in text.splitlines()[-1]
    assert text.count("\n|") == 2 + len(data["cells"])
    with Image.open(out / "bench.png") as picture:
        assert picture.size[0] > 300


@pytest.mark.parametrize("name", [None, vp.FastV(agg_layer=2, attention_rank=5)])
def test_a_fast_case(tiny: cases.Workload, name: Any) -> None:
    """Here its pieces are not recorded; what is timed is the same."""
    case = cases.Case("graphs", name, 2)
    cell = cases.measure_case(tiny, case, ROOFLINE, new_tokens=3, repeat=2)
    whole = tiny.tokens
    assert cell.lengths == [whole] * 6 if name is None else [whole] * 2 + [tiny.text + 5] * 4
    assert cell.same_kept == (None if name is None else 1.0)
    # The tower, the layers in front of and behind the drop, and a decode step.
    assert cell.captures == (3 if name is None else 4)
    assert cell.prefill_roofline == pytest.approx(cell.flops / 2e9)
    assert cell.tpot_roofline == pytest.approx(tiny.weight_bytes / 1e9)


@pytest.mark.parametrize(
    ("backend", "step"), [("transformers", 7), ("hooks", 1), ("graphs", PROMPT_STEP)]
)
def test_new_lengths_are_new(tiny: cases.Workload, backend: str, step: int) -> None:
    """To transformers' kernels, with every token of an answer; to recorded pieces. What other ways
    have tried does not matter."""
    fresh = cases.Workload(tiny.name, tiny.model, tiny.single, tiny.span, tiny.text)
    lengths = [fresh.batch(2)["input_ids"].shape[1]]

    def generate(**given: Any) -> None:
        assert given["input_ids"].shape == given["attention_mask"].shape
        assert given["input_ids"].shape[0] == 2 and given["max_new_tokens"] == 7
        lengths.append(given["input_ids"].shape[1])

    for size in (1, 2, 3):
        fresh.unseen(size, "other", 100)
    seconds = cases._unseen_seconds(fresh, cases.Case(backend, None, 2), generate, 7)
    assert seconds is not None and seconds > 0
    assert len(lengths) == 4 + (backend == "graphs")
    assert lengths == list(range(lengths[0], lengths[-1] + 1, step))
    assert fresh.batch(2)["input_ids"].shape[1] == lengths[0]


def test_no_room_for_a_longer_prompt(tiny: cases.Workload) -> None:
    def generate(**given: Any) -> None:
        raise torch.OutOfMemoryError

    assert cases._unseen_seconds(tiny, cases.Case("transformers", None, 1), generate, 2) is None


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_checkpoints_of_other_families(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    family_makers.KINDS[kind].make(folder)
    more = ["--batch-sizes", "2", "--methods", "none", "random:0.5,layer=1"]
    if kind == "qwen2_5_vl":  # pictures as small as is said
        more += ["--min-pixels", str(28 * 28), "--max-pixels", str(28 * 28 * 2)]
    assert run(folder, tmp_path / "out", *more) == 0
    made = json.loads((tmp_path / "out" / "bench.json").read_text())
    found = made["cells"]
    assert kind != "qwen2_5_vl" or made["prompt"]["visual"] == 1
    assert {cell["way"] for cell in found} == {"hf", "hf-attentions", "ordinary"}
    assert all(cell["unseen_samples_per_second"] > 0 for cell in found)


def test_everything_is_put_back(tiny: cases.Workload) -> None:
    config = tiny.model.generation_config
    stop = config.eos_token_id
    assert stop is not None
    for backend in cases.BARE:
        cases.measure_case(tiny, cases.Case(backend, None, 1), ROOFLINE, new_tokens=2, repeat=1)
    assert tiny.model.config._attn_implementation == "sdpa"
    assert config.eos_token_id == stop


def test_weights_that_a_token_reads(tiny: cases.Workload) -> None:
    model = tiny.model
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    assert tiny.weight_bytes == 4 * (layers + model.lm_head.weight.numel())


def test_ratios_are_taken_within_one_way(tiny: cases.Workload) -> None:
    made = [
        cases.measure_case(tiny, cases.Case(backend, method, 1), ROOFLINE, new_tokens=2, repeat=1)
        for backend, method in (
            ("transformers", None),
            ("hooks", vp.RandomDrop(keep=5)),
            ("graphs", None),
        )
    ]
    made = [asdict(one) for one in made]
    assert report.unpruned(made, made[1]) is made[0]
    assert report.unpruned(made, made[2]) is made[2]
    assert report.unpruned(made[1:], made[1]) is None


def test_the_file_keeps_its_keys(tiny: cases.Workload) -> None:
    """`bench.json` has figures under names that others read; they are a view of the record."""
    made = asdict(
        cases.measure_case(
            tiny, cases.Case("transformers", None, 2), ROOFLINE, new_tokens=3, repeat=1
        )
    )
    seen = report.frozen(made)
    assert seen["way"] == "hf" and seen["first_token"] == made["ttft"]
    assert seen.keys() - set(report.FROZEN) == made.keys() - set(report.FROZEN.values())
    for key, name in report.FROZEN.items():
        assert key == "way" or seen[key] == made[name]
    assert set(report.BACKEND_NAMES.values()) == set(cases.BACKENDS)


def test_warm_up_is_not_timed() -> None:
    calls: list[int] = []
    spread = seconds_of(lambda: calls.append(1), torch.device("cpu"), repeat=3, warm_up=4)
    assert len(calls) == 7 and spread.count == 3


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_named_shapes(name: str) -> None:
    """Of the published sizes, made without memory: the parameter counts are the known ones."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.SHAPES[name]())
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    known = {
        "llava-1.5-7b": 7.06,
        "llava-1.5-13b": 13.35,
        "llava-next-7b": 7.06,
        "qwen2.5-vl-3b": 3.75,
        "qwen2.5-vl-7b": 8.29,
        "qwen3-vl-8b": 8.77,
        "gemma-3-4b": 4.30,
    }
    assert billions == pytest.approx(known[name], rel=0.01)


def test_inputs_of_named_shapes(tmp_path: Path) -> None:
    for form in ("llava", "llava_next"):
        config = shapes.SHAPES["llava-1.5-7b" if form == "llava" else "llava-next-7b"]()
        for part, sizes in (("text_config", "hidden_size"), ("vision_config", "hidden_size")):
            setattr(getattr(config, part), sizes, 32)
            getattr(config, part).intermediate_size = 32
            getattr(config, part).num_hidden_layers = 3
            getattr(config, part).num_attention_heads = 2
        config.text_config.num_key_value_heads = 2
        config.text_config.head_dim = 16
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_config(config).eval()
        made = cases.of_shape("shape", model)
        output = model.generate(**made.batch(2), max_new_tokens=2, do_sample=False)
        assert output.shape[0] == 2
        assert made.tokens == 67 + {"llava": 576, "llava_next": 2928}[form]


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_ttft_beside_flops_of_qwens_shapes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published shape, narrow: whole answers are timed, tower included, at exact counts, and
    what the formula says of tower and language model is what torch counts."""
    config = shapes.SHAPES[name]()
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size = 32, 48
    config.text_config.num_hidden_layers, config.text_config.num_attention_heads = 4, 2
    config.text_config.num_key_value_heads, config.text_config.vocab_size = 1, 152000
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    config.text_config.head_dim = 16
    tower = config.vision_config
    tower.depth, tower.num_heads, tower.out_hidden_size = 2, 2, 32
    index = "deepstack_visual_indexes" if "qwen3" in name else "fullatt_block_indexes"
    setattr(tower, index, [1])
    monkeypatch.setattr(shapes, "SHAPES", {name: lambda: config})
    argv = ["bench", "--shape", name, "--visual", "24", "--batch-size", "2", "--device", "cpu"]
    argv += ["--method", "none", "fastv:0.25,agg_layer=2", "divprune:0.25", "--repeat", "1"]
    assert (
        main([*argv, "--backend", "hf", "hooks", "--out", str(tmp_path), "--new-tokens", "2"]) == 0
    )
    found = json.loads((tmp_path / "bench.json").read_text())["cells"]
    base, later, early = found
    assert base["lengths"] == [67 + 24] * 4 and base["flops_ratio_whole"] == 1.0
    assert later["lengths"] == [67 + 24] * 2 + [67 + 6] * 2
    assert early["lengths"] == [67 + 6] * 4
    assert 0 < early["flops_ratio_whole"] < later["flops_ratio_whole"] < 1
    for cell in (later, early):
        ratio = cell["first_token"]["median"] / base["first_token"]["median"]
        assert cell["ttft_ratio"] == pytest.approx(ratio)
    model = shapes.random_model(name, dtype=torch.float32, device=torch.device("cpu"))
    inputs = cases.of_shape(name, model, 24).batch(1)
    with torch.no_grad(), count_flops(vision_modules(model)) as count:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    analytic = prefill_flops(config, inputs)
    assert analytic is not None
    assert count.vision == pytest.approx(analytic.vision, rel=0.001)
    assert count.total == pytest.approx(analytic.total, rel=0.01)


# -- bad input -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--batch-sizes", "0"], "--batch-size 0 is not valid"),
        (["--repeat", "0"], "--repeat 0 is not valid"),
        (["--new-tokens", "1"], "--max-new-tokens 1 is not valid"),
        (["--ways", "grahps"], "Did you mean 'graphs'"),
        (["--methods", "fastw:3"], "fastv"),
        (["--methods", "fastv:5,agg_layer=77"], "agg_layer=77"),
        (["--fast", "--methods", "none"], "CUDA graphs need a GPU"),
        (["--fast", "--ways", "hf"], "--fast and --backend exclude each other"),
        (["--ways", "fast", "--methods", "none"], "leaves nothing to measure: CUDA graphs need a"),
        (["--ways", "hf", "--methods", FASTV], "transformers does not prune"),
        (["--visual", "100"], "--visual 100 is not possible"),
        (["--end-to-end", "--max-pixels", "9"], "--max-pixels 9 is not possible"),
        (["--dtype", " "], "--dtype ' ' is not valid: it is empty"),
        (["--dtype", "float8", "--methods", "none"], "float8"),
    ],
)
def test_bad_input(
    folder: Path,
    tmp_path: Path,
    more: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(folder, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected in said
    assert not (tmp_path / "out").exists()


def test_the_stored_type(tmp_path: Path) -> None:
    folder = makers.tiny_hf_llava(tmp_path / "m")
    vp.load(folder, dtype="bfloat16", fast=False)[0].save_pretrained(folder)
    given = ["--ways", "hf", "--methods", "none", "--batch-sizes", "1", "--dtype", "auto"]
    assert run(folder, tmp_path / "out", *given) == 0
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["title"].count("bfloat16") == 1


def test_an_earlier_bench_is_kept(folder: Path, tmp_path: Path, capsys: Any) -> None:
    more = ["--ways", "hf", "hf", "--methods", "none", "none", "--batch-sizes", "1", "1"]
    texts = []
    for _ in range(3):
        assert run(folder, tmp_path, *more) == 0
        texts.append((tmp_path / "bench.json").read_text())
        assert len(json.loads(texts[-1])["cells"]) == 1  # what was said twice is measured once
    kept = [tmp_path / "previous", tmp_path / "previous-2"]
    assert [(path / "bench.json").read_text() for path in kept] == texts[:2]
    assert all(len(list(path.iterdir())) == len(report.ENDINGS) for path in kept)
    assert run(folder, tmp_path, "--ways", "hf", "--methods", "none", FASTV + "9") == 2
    assert (tmp_path / "bench.json").read_text() == texts[2]
    assert "is now in" in capsys.readouterr().err


def test_visual_tokens_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "llava-1.5-7b", "--visual", "9"]) == 2
    assert "llava-1.5-7b itself says" in capsys.readouterr().err
    assert main(["bench", "--shape", "qwen2.5-vl-3b", "--visual", "0"]) == 2
    assert "--visual 0 is not valid" in capsys.readouterr().err


def test_an_unknown_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "llava-1.5-8b"]) == 2
    assert "llava-1.5-7b" in capsys.readouterr().err


def test_no_such_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


def test_a_case_that_fails_costs_no_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    plain = cases.measure_case

    def measure(given: Any, case: cases.Case, *more: Any, **options: Any) -> cases.Measured:
        if case.label == "fastv_rank3":
            raise RuntimeError("CUDA error: an illegal something\nand much more")
        return plain(given, case, *more, **options)

    monkeypatch.setattr(cases, "measure_case", measure)
    out = tmp_path / "out"
    more = ["--ways", "hf", "ordinary", "--methods", "none", "fastv:3", "fastv:2"]
    assert run(folder, out, *more) == 1
    said = capsys.readouterr().err
    assert "fastv_rank3: RuntimeError: CUDA error: an illegal something" in said
    assert "much more" not in said
    found = json.loads((out / "bench.json").read_text())["cells"]
    assert {cell["method"] for cell in found} == {"none", "fastv_rank2"}


def test_a_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    for out, why in (("out", "is a file: a folder is needed"), ("out/inside", "cannot be written")):
        assert run(folder, tmp_path / out, "--ways", "hf", "--methods", "none") == 2
        said = capsys.readouterr().err
        assert why in said and "[1/" not in said
