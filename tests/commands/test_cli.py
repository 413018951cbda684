"""The command line: dispatch, exit codes, one-sentence errors, plain and rich output."""

import argparse
import contextlib
import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_prune_ext import cli
from vlm_prune_ext.commands.common import MethodSettings, chosen_method, print_table, track
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.report import plain_columns
from vlm_prune_ext.experiment.settings import add_options
from vlm_prune_ext.methods.fastv import FastV
from vlm_prune_ext.methods.registry import METHODS


def one_sentence(capsys, *words: str) -> str:
    """Run a command that must be refused; returns what it said on standard error."""
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"usage: vlm-prune {command}" in capsys.readouterr().out


def test_overview_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for command, summary in cli.COMMANDS.items():
        assert command in said and summary in said
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["inspct"], ["command", "'inspct'", "'inspect'"]),
        (["methods", "fastvv"], ["method", "'fastvv'", "'fastv'"]),
        (["methods", "--jsom"], ["option", "'--jsom'", "'--json'"]),
        (["methods", "fastv", "himap"], ["unexpected 'himap'"]),
        (["inspect", "x.png", "--method", "fastv"], ["required", "--question"]),
        (["inspect", "x.png", "--qestion", "a", "--method", "fastv"], ["'--question'"]),
        (["inspect", "x.png", "--question", "a", "--method", "fastv:0"], ["attention_rank=0"]),
        (["inspect", "x.png", "--question", "a", "--method", "none"], ["none", "drops nothing"]),
        (["inspect", "x.png", "--question", " ", "--method", "fastv"], ["--question"]),
        (["inspect", "x.png", "--question", "a", "--method", "fastv"], ["'x.png'", "not exist"]),
        (
            [
                "inspect",
                "x.png",
                "--question",
                "a",
                "--method",
                "fastv",
                "--set",
                "atention_rank=1",
            ],
            ["'atention_rank'", "'attention_rank'"],
        ),
        (
            ["inspect", "x.png", "--question", "a", "--method", "fastv", "--set", "rank"],
            ["--set rank", "KEY=VALUE"],
        ),
        (["scienceqa", "--question-file", "q.json", "--image-folder", "no"], ["no", "folder"]),
        (["scienceqa", "--question-file", "q.json", "--image-folder", ".", "--limit", "x"], ["x"]),
        (["scienceqa", "--question-file", "q", "--image-folder", ".", "--limit", "0"], ["limit"]),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(words, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = one_sentence(capsys, *words)
    for part in parts:
        assert part.lower() in said.lower()
    assert list(tmp_path.iterdir()) == []


def test_not_a_picture(capsys, tmp_path):
    (tmp_path / "x.png").write_bytes(b"text")
    said = one_sentence(
        capsys, "inspect", str(tmp_path / "x.png"), "--question", "a", "--method", "fastv"
    )
    assert "x.png" in said and "picture" in said


def test_dispatching_imports_neither_torch_nor_other_commands():
    code = (
        "import sys; from vlm_prune_ext import cli; cli.main(['--help']); "
        "assert not {'torch', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# -- methods -----------------------------------------------------------------------------------
def test_methods_json_is_what_the_dataclasses_say(capsys):
    assert cli.main(["methods", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(METHODS)
    for name, cls in METHODS.items():
        names = [parameter["name"] for parameter in listed[name]["parameters"]]
        assert names == [field.name for field in dataclasses.fields(cls)] if cls else names == []
    fastv = {parameter["name"]: parameter for parameter in listed["fastv"]["parameters"]}
    assert fastv["attention_rank"]["default"] == FastV().attention_rank
    assert fastv["attention_rank"]["config_names"] == ["fast_v_attention_rank"]
    assert listed["fastv"]["paper"] == FastV.paper
    keep = listed["random"]["parameters"][0]
    assert keep["required"] and keep["default"] is None


def test_methods_in_full_include_nested_settings(capsys):
    assert cli.main(["methods", "saint"]) == 0
    said = capsys.readouterr().out
    assert "keep_num" in said and "Deviations" in said
    assert "``" not in said and ":class:" not in said


def test_each_parameter_and_config_name_is_listed(capsys):
    assert cli.main(["methods"]) == 0
    said = capsys.readouterr().out
    for cls in filter(None, METHODS.values()):
        for parameter in cls.options().values():
            assert parameter.name in said and parameter.help.split()[0] in said
            for name in cls.config_names(parameter):
                assert name in said


# -- what commands share -----------------------------------------------------------------------
def parse(*words: str):
    parser = cli.Parser(prog="x")
    add_options(parser, ("method", "settings"), MethodSettings)
    return chosen_method(MethodSettings.of(vars(parser.parse(words))))


def test_method_from_short_form_and_settings():
    assert parse() is None
    assert parse("--method", "fastv:64") == FastV(attention_rank=64)
    assert parse("--method", "fastv", "--set", "agg_layer=2") == FastV(agg_layer=2)
    both = parse("--method", "fastv:0.5", "--set", "agg_layer=2", "--set", "fast_v_inplace=false")
    assert both == FastV(attention_rank=0.5, agg_layer=2, mode="mask")
    saint = parse("--method", "saint", "--set", "vit={layers: [2, 3], keep_num: [9, 8]}")
    assert saint.vit.layers == (2, 3) and saint.vit.keep_num == (9, 8)
    with pytest.raises(InputError, match="needs --method"):
        parse("--set", "agg_layer=2")


def test_options_after_a_double_dash_are_not_options():
    parser = cli.Parser(prog="x")
    parser.add_argument("word")
    assert parser.parse(["--", "--word"]) == argparse.Namespace(word="--word")


def test_plain_table_aligns_and_keeps_long_cells():
    text = plain_columns([("a", "b"), ["xxx", "y" * 300], ["", "z"]])
    assert text.splitlines() == ["a    b", "xxx  " + "y" * 300, "     z"]


def test_progress_without_a_terminal_is_plain_lines(capsys):
    assert list(track([1, 2], "Work", done=3)) == [1, 2]
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "Work: 5 of 5, 0 s left\n"


def on_a_terminal(monkeypatch, name, write) -> str:
    """What ``write()`` sends to the stream ``name`` of ``sys`` where that is a terminal."""
    parent, child = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with os.fdopen(child, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        write()
        monkeypatch.undo()
    said = b""
    with contextlib.suppress(OSError):  # that is how a terminal says that all was read
        while part := os.read(parent, 1 << 16):
            said += part
    os.close(parent)
    return said.decode()


def test_on_a_terminal_tables_are_drawn(monkeypatch):
    rows = [("x [red]", "word " * 20)]
    said = on_a_terminal(monkeypatch, "stdout", lambda: print_table(("a", "b"), rows))
    assert "━" in said and "x [red]" in said
    assert len(said.splitlines()[-1]) <= 60 and said.count("word") == 20


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    def work():
        assert list(track(range(3), "Work", done=2)) == [0, 1, 2]

    said = on_a_terminal(monkeypatch, "stderr", work)
    assert "━" in said and "5/5" in said


def test_a_reader_that_leaves_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vlm_prune_ext.cli", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


# -- demo-data and convert ---------------------------------------------------------------------
def test_demo_data_is_a_function_of_the_seed(tmp_path, capsys):
    words = ["demo-data", "--samples", "3", "--format", "tsv,csv", "--out"]
    for folder, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert cli.main([*words, str(tmp_path / folder), "--seed", seed]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == 15 and all(path.is_file() for path in written)
    name = "Shapes_MCQ.tsv"
    first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
    assert first == again != other
    assert len(first.splitlines()) == 4
    assert len(list((tmp_path / "a" / "images").iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--samples", "-2"], "--samples -2"),
        (["--samples", "0"], "--samples 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--format", "tvs"], "'tsv'"),
        (["--samples", "many"], "many"),
    ],
)
def test_bad_demo_data_writes_nothing(words, part, tmp_path, capsys):
    assert part in one_sentence(capsys, "demo-data", "--out", str(tmp_path / "x"), *words)
    assert list(tmp_path.iterdir()) == []


def test_demo_data_into_a_file(tmp_path, capsys):
    (tmp_path / "x").write_text("here already")
    said = one_sentence(capsys, "demo-data", "--samples", "2", "--out", str(tmp_path / "x"))
    assert str(tmp_path / "x") in said
    assert (tmp_path / "x").read_text() == "here already"


def test_convert_gives_what_transformers_loads(tmp_path, capsys):
    from transformers import AutoModelForImageTextToText

    import vlm_prune_ext as vp

    out = tmp_path / "new" / "model"
    assert cli.main(["convert", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    _, processor = vp.load(str(out))
    assert processor.count_visual_tokens(processor.prompt("?", scene())) == [576]

    assert "new or empty" in one_sentence(capsys, "convert", "--out", str(out))
    assert "original" in one_sentence(capsys, "convert", str(out), "--out", str(tmp_path / "y"))
    assert not (tmp_path / "y").exists() and len(list(tmp_path.iterdir())) == 1


def scene():
    from vlm_prune_ext.demo.drawing import make_scene, render

    return render(make_scene(1))


def test_ctrl_c_that_an_import_made_another_error_of(capsys, monkeypatch):
    """As numpy does when it is interrupted half-way through its C code."""

    def run(words):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr(cli, "_dispatch", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
    try:
        assert cli.main(["methods"]) == 130
        assert capsys.readouterr().err == "Interrupted.\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_an_encoding_lacks_is_written_out():
    words = [sys.executable, "-m", "vlm_prune_ext.cli", "eval", "--data", "\u00e4\u2192\x1b"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=env, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"\\xe4" in done.stderr and b"\x1b" not in done.stderr
