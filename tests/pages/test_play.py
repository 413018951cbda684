"""`vlm-prune play` in a real browser: pick, ask, drag, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import shlex
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image

import vlm_prune_ext as vp
from tests.family_makers import qwen2_vl
from tests.pages.conftest import fits
from vlm_prune_ext import cli
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.methods.registry import METHODS, parse_method
from vlm_prune_ext.pages import play

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the extra `play` is not installed"
)
EVIL = "<script>alert(1)</script> ${alert(2)} {{value}} What is this?"


@pytest.fixture(scope="module")
def player():
    return play.Player("demo", vp.load(), 12)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def address(player, temporary):
    with pytest.MonkeyPatch.context() as patch, socket.socket() as probe:
        patch.setenv("GRADIO_TEMP_DIR", str(temporary))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        blocks, url = play.serve(player, "fastv", "127.0.0.1", port)
        yield url
        blocks.close()


# -- without a browser -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_every_method_has_its_fields_and_its_lines(name):
    boxes = play.boxes(name)
    shown = [box for box in boxes if box["visible"]]
    assert [box["label"] for box in shown] == list(METHODS[name].options())
    assert all(len(box["info"]) > 20 and box["placeholder"] for box in shown)
    assert len(boxes) == len(play.boxes("fastv"))
    method, settings = play.chosen(name, 288 if name == "himap" else 64, {})
    python, shell = play.lines_of(method, settings, "demo", "", "a b.png", "It's what?", 9)
    line = next(line for line in python.splitlines() if line.startswith("with"))
    call = line.removeprefix("with vp.prune(model, ").removesuffix(") as trace:")
    assert eval(call, {"vp": vp}) == method
    words = shlex.split(shell)
    assert words[:5] == ["vlm-prune", "inspect", "a b.png", "--question", "It's what?"]
    assert parse_method(words[6]) == method and words[7:] == ["--max-new-tokens", "9"]


def test_typed_fields_win_over_the_budget():
    method, _ = play.chosen("fastv", 64, {"agg_layer": "2", "mode": " mask ", "attention_rank": ""})
    assert method == vp.FastV(agg_layer=2, attention_rank=64, mode="mask")
    assert play.chosen("fastv", 64, {"attention_rank": "0.5"})[0].attention_rank == 0.5
    with pytest.raises(InputError, match="agg_layer='x'"):
        play.chosen("fastv", 64, {"agg_layer": "x"})


@pytest.mark.parametrize(
    ("picked", "said"),
    [
        ("", "No picture"),
        ("/etc/passwd", "not valid"),
        ("data:image/png;base64,!!!", "no base64"),
        ("data:image/png;base64,aGVsbG8=", "image"),
    ],
)
def test_what_is_no_picture(player, picked, said):
    shown = player.show(picked, "x.png", "What?", "fastv", 64, [])
    assert said in shown["error"] and shown["error"].count("\n") == 0


def test_python_lines_and_page_say_the_same(player):
    name, scene = next(iter(play.scenes().items()))
    shown = player.show(name, "", scene.questions[0], "fastv", 64, [])
    printed = []
    exec(shown["python"], {"print": lambda text, lengths: printed.append((text, lengths))})
    assert printed[0][0].strip() == shown["answers"][1]["text"]
    assert printed[0][1][3] - printed[0][1][2] == 64 - 576
    assert ["visual tokens", "576 → 64", ""] in shown["answers"][1]["figures"]


def test_a_model_without_one_square_grid_answers_and_says_why(tmp_path):
    """Its patches are merged on the way: what is drawn would be another place than what is kept."""
    qwen2_vl(tmp_path)
    other = play.Player("tiny", vp.load(str(tmp_path)), 2)
    name = next(iter(play.scenes()))
    shown = other.show(name, "", "What?", "fastv", other.total // 2, ["1"])
    half = f"{other.total} → {other.total // 2}"
    assert shown["answers"][1]["figures"][0][1] == half and shown["panels"] == []
    assert "square patch grid" in shown["note"] and "one to one" in shown["note"]
    assert "merges" in other.show(name, "", "What?", "visionzip", 8, [])["error"]


def test_bad_input(tmp_path, capsys):
    def refused(*words):
        assert cli.main(["play", *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "'fastvv'" in refused("--method", "fastvv") and "none" in refused("--method", "none")
    assert "--port 70000" in refused("--port", "70000")
    assert "--host" in refused("--host", "203.0.113.7")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in refused("--port", str(taken.getsockname()[1]))
    if importlib.util.find_spec("gradio") is not None:
        assert str(tmp_path / "no") in refused("--model", str(tmp_path / "no"), "--port", "7869")


def test_importing_the_package_does_not_load_gradio():
    code = "import sys, vlm_prune_ext.pages.play; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- in the browser --------------------------------------------------------------------------------
def kept(window) -> str:
    return window.locator(".result img.veil").last.get_attribute("src")


def answered(window, title: str) -> None:
    window.locator(".cards article h3", has_text=title).wait_for()


@needs_gradio
@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("phone", "dark")])
def test_it_fits(visit, address, size, scheme):
    window = visit(address, size, scheme)
    answered(window, "fastv_rank64")
    assert window.locator(".cards article").count() == 2 and fits(window)
    window.get_by_text("Fields of the method").click()
    window.get_by_role("button", name="Show the code").click()
    assert "vp.FastV(attention_rank=64)" in window.locator(".code").inner_text()
    assert fits(window)


@needs_gradio
def test_another_budget_shows_other_patches(visit, address):
    window = visit(address)
    answered(window, "fastv_rank64")
    before = kept(window)
    handle = window.locator("#budget input[type=range]")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    window.mouse.move(box["x"] + box["width"] * 63 / 575, box["y"] + box["height"] / 2)
    window.mouse.down()
    window.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2, steps=4)
    window.mouse.up()
    budget = handle.input_value()
    assert 250 < int(budget) < 450
    answered(window, f"fastv_rank{budget}")
    assert kept(window) != before
    assert f"{budget} of 576" in window.locator(".result figcaption").last.inner_text()
    handle.focus()
    window.keyboard.press("ArrowLeft")
    answered(window, f"fastv_rank{int(budget) - 1}")


@needs_gradio
def test_ask_about_another_picture_with_another_method(visit, address):
    window = visit(address)
    answered(window, "fastv_rank64")
    window.get_by_role("button", name="Demo picture 4").click()
    scene = list(play.scenes().values())[3]
    window.locator(".asked", has_text=scene.questions[0]).wait_for()
    window.locator("#method input").click()
    window.get_by_role("option", name="pdrop", exact=True).click()
    answered(window, "pdrop_r64-32-16")
    assert window.locator(".result img.veil").count() == 3
    assert window.get_by_label("ratios").is_visible() is False  # folded away
    window.get_by_text("Fields of the method").click()
    window.get_by_label("ratios").fill("[99, 50, 20]")
    window.locator("#ask").click()
    answered(window, "pdrop_r99-50-20")
    window.get_by_label("ratios").fill("[99, many]")
    window.locator("#ask").click()
    window.locator(".result .problem", has_text="ratios=").wait_for()


@needs_gradio
def test_an_upload_is_answered_and_leaves_nothing(visit, address, temporary, tmp_path):
    Image.effect_noise((400, 200), 60).convert("RGB").save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    window = visit(address)
    answered(window, "fastv_rank64")
    window.locator("#picker input[type=file]").set_input_files(tmp_path / "mine.png")
    window.locator("#question textarea").fill(EVIL)
    window.locator("#ask").click()
    window.locator(".asked", has_text="What is this?").wait_for()
    assert window.locator(".asked").inner_text() == EVIL
    window.get_by_role("button", name="Show the code").click()
    assert "'mine.png'" in window.locator(".code").inner_text()
    window.locator("#picker input[type=file]").set_input_files(tmp_path / "broken.png")
    window.locator(".result .problem").wait_for()
    assert [path for path in temporary.rglob("*") if path.is_file()] == []
    stored = "(async () => [localStorage.length, (await indexedDB.databases()).length])()"
    assert window.evaluate(stored)[1] == 0


@needs_gradio
def test_the_route_for_uploads_takes_nothing(address, temporary):
    body = (
        b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n12345\r\n--x--"
    )
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}gradio_api/upload", body, head)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 413
    assert [path for path in temporary.rglob("*") if path.is_file()] == []
