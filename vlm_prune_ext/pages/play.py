"""A local page to try methods on a picture: answers side by side, and what each layer still sees.

Pictures that a user picks travel inside messages and stay in memory: no component of the page
writes to disk, and the server's own route for uploads takes nothing. No part of the page is loaded
from elsewhere, and nothing is reported to anybody.
"""

from __future__ import annotations

import base64
import binascii
import html
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.experiment.settings import read_value
from vlm_prune_ext.methods.option import Option
from vlm_prune_ext.methods.registry import METHODS, classes, get_method, method_class
from vlm_prune_ext.pages.asking import Asker, Reply
from vlm_prune_ext.pages.patches import data_uri, veil
from vlm_prune_ext.pages.show import fill, static

PORT = 7860
MAX_BYTES = 20 << 20
"""Of a picture."""
_SCENES, _SEED = 6, 11
_FIELDS = max(len(cls.options()) for cls in classes())


# -- pictures --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scene:
    """A demo picture.

    Attributes:
        seed: of its scene.
        questions: about it.
    """

    seed: int
    questions: Sequence[str]

    def draw(self) -> Image.Image:
        """The picture."""
        from vlm_prune_ext.demo.drawing import make_scene, render

        return render(make_scene(self.seed))


@lru_cache(maxsize=1)
def scenes() -> dict[str, Scene]:
    """Name -> demo picture, with a question of its own and some that fit all."""
    from vlm_prune_ext.demo.questions import samples

    general = ["How many shapes are in the image?", "Describe the image in one sentence."]
    found = {}
    for one in samples("vqa", _SEED, _SCENES):
        questions = list(dict.fromkeys([one["question"], *general]))
        found[f"demo:{one['scene_seed']}"] = Scene(one["scene_seed"], questions)
    return found


@lru_cache(maxsize=2)
def picture_of(picked: str) -> Image.Image:
    """The picture that a page sent: the name of a demo picture, or a data URI.

    Raises:
        InputError: nothing was picked, or what was picked is no picture.
    """
    from vlm_prune_ext.models.images import open_image

    if not picked:
        raise InputError("No picture is picked: choose a file, or one of the demo pictures.")
    if picked in scenes():
        return scenes()[picked].draw()
    head, _, body = picked.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise InputError("The picture is not valid: the bytes of an image file are accepted.")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise InputError(f"The picture is too large: {MAX_BYTES >> 20} MiB are accepted at most.")
    try:
        data = base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise InputError("The picture is not valid: its text is no base64.") from error
    return open_image(data)


# -- methods ---------------------------------------------------------------------------------------
def chosen(name: str, budget: int, stated: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """A method and its settings: the budget's, and over these what was typed.

    Args:
        name: in the registry.
        budget: visual tokens; left out where the method has no keep budget.
        stated: field -> text, read as on the command line; empty texts are left out.

    Raises:
        InputError: a field or value that the method does not accept.
    """
    from vlm_prune_ext.evals.choices import has_keep_budget

    cls = method_class(name)
    assert cls is not None
    settings = cls.budget_settings(budget) if has_keep_budget(cls) else dict(cls.standard)
    settings |= {key: read_value(text) for key, text in stated.items() if text.strip()}
    return get_method(name, **settings), settings


def lines_of(
    method: Any,
    settings: Mapping[str, Any],
    model: str,
    picked: str,
    file: str,
    question: str,
    max_new_tokens: int,
) -> tuple[str, str]:
    """What gives the same again: Python lines, and command lines."""
    scene = scenes().get(picked)
    drawn = f"render(make_scene({scene.seed}))" if scene else ""
    fields = ", ".join(f"{key}={getattr(method, key)!r}" for key in settings)
    call = f"vp.{type(method).__name__}({fields})"
    load = "vp.load()" if model == "demo" else f"vp.load({model!r})"
    python = ["import vlm_prune_ext as vp"]
    if scene:
        python.append("from vlm_prune_ext.demo.drawing import make_scene, render")
    python += [
        "",
        f"model, processor = {load}",
        f"image = {drawn or repr(file)}",
        f"inputs = processor.prompt({question!r}, image)",
        f"with vp.prune(model, {call}) as trace:",
        f"    out = model.generate(**inputs, max_new_tokens={max_new_tokens})",
        "print(processor.decode(out, inputs)[0], trace.lengths)",
    ]
    shell = []
    if scene:
        file = f"scene_{scene.seed}.png"
        code = f'from vlm_prune_ext.demo.drawing import *; {drawn}.save("{file}")'
        shell.append(f"python -c {shlex.quote(code)}")
    short = f"{method.name}:" + ",".join(f"{k}={_typed(getattr(method, k))}" for k in settings)
    words = ["vlm-prune", "inspect", file, "--question", question, "--method", short.rstrip(":")]
    if model != "demo":
        words += ["--model", model]
    words += ["--max-new-tokens", str(max_new_tokens)]
    return "\n".join(python), "\n".join([*shell, shlex.join(words)])


def _typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_typed, value))}]"
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


# -- what is shown ---------------------------------------------------------------------------------
class Player:
    """Answers for the page.

    Args:
        model: its name.
        loaded: model and processor.
        max_new_tokens: of an answer.

    Attributes:
        total: visual tokens of a (demo) picture.
    """

    def __init__(self, model: str, loaded: tuple[Any, Any], max_new_tokens: int) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        self.asker = Asker(*loaded)
        self._seen = lru_cache(maxsize=2)(self._draw_seen)
        # The first run is slow, and says how many visual tokens there are to choose from.
        some = next(iter(scenes()))
        first = self.asker.ask(picture_of(some), scenes()[some].questions[0], None, 1)
        self.total = first.sample.visual_tokens

    def _draw_seen(self, picked: str) -> str:
        """The picture as the model sees it."""
        return data_uri(Image.fromarray(self.asker.seen(picture_of(picked))), "jpeg", quality=88)

    def show(
        self, picked: str, file: str, question: str, name: str, budget: int, typed: Sequence[str]
    ) -> dict[str, Any]:
        """Everything that the page shows after a question.

        Args:
            picked: demo picture or data URI.
            file: name of the picture's file.
            question: about it.
            name: of the method.
            budget: visual tokens.
            typed: values of the method's fields, in order.
        """
        try:
            method, settings = chosen(name, int(budget), self._stated(name, typed))
            image = picture_of(picked or "")
            # Both each time, one after the other: only then their times can be compared.
            plain, pruned = (
                self.asker.ask(image, question, one, self.max_new_tokens) for one in (None, method)
            )
            seen = self._seen(picked) if pruned.panels else ""
        except InputError as error:
            return {"error": str(error)}
        asked = (picked, file, question, self.max_new_tokens)
        python, shell = lines_of(method, settings, self.model, *asked)
        return {
            "question": question,
            "answers": [
                {"title": "unpruned", "text": plain.sample.prediction, "figures": figures(plain)},
                {
                    "title": method.label(),
                    "text": pruned.sample.prediction,
                    "figures": figures(pruned, plain),
                },
            ],
            "picture": seen,
            "panels": [
                {"title": panel.title, "veil": data_uri(over) if (over := veil(panel)) else ""}
                for panel in pruned.panels
            ],
            "note": self.asker.why_no_grid,
            "python": python,
            "shell": shell,
        }

    @staticmethod
    def _stated(name: str, typed: Sequence[str]) -> dict[str, str]:
        cls = method_class(name)
        names = list(cls.options()) if cls is not None else []
        return {key: text or "" for key, text in zip(names, typed, strict=False)}


def figures(reply: Reply, base: Reply | None = None) -> list[list[str]]:
    """Name, value and share of the unpruned, as texts."""
    one = reply.sample
    left = list(one.visual_kept.values())
    steps = " → ".join(map(str, dict.fromkeys([one.visual_tokens, *left])))
    values = {
        "FLOPs of the prefill": (one.flops, f"{one.flops / 1e9:,.2f} G"),
        "TTFT, this run": (one.prefill_seconds, f"{1e3 * one.prefill_seconds:,.0f} ms"),
    }
    found = [["visual tokens", steps or str(one.visual_tokens), ""]]
    for name, (value, text) in values.items():
        whole = None
        if base is not None:
            other = base.sample
            whole = other.flops if name.startswith("FLOPs") else other.prefill_seconds
        found.append([name, text, f"{100 * value / whole:.0f} %" if whole else ""])
    return found


# -- the page --------------------------------------------------------------------------------------
def field_text(option: Option) -> tuple[str, str]:
    """What stands over a field, and inside it while it is empty."""
    default = "required" if option.required else _typed(option.default)
    return f"{option.help} Accepted: {option.accepts.text}.", default


def build(player: Player, start: str) -> Any:
    """The page, as Gradio's blocks.

    Args:
        player: answers.
        start: the method that is chosen at first.
    """
    from vlm_prune_ext.evals.choices import has_keep_budget

    gr = gradio()
    names = [name for name in METHODS if name != "none"]
    first = next(iter(scenes()))
    with gr.Blocks(analytics_enabled=False, title="vlm-prune play", fill_width=True) as blocks:
        gr.HTML(fill("play_head.html", {"model": html.escape(player.model)}))
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=320):
                picker = gr.HTML(
                    {"picked": first, "file": "", "question": ""},
                    html_template=static("play_picker.html"),
                    js_on_load=static("base.js") + static("play_picker.js"),
                    elem_id="picker",
                    demos=[
                        {
                            "name": name,
                            "questions": list(scene.questions),
                            "uri": data_uri(scene.draw(), "jpeg", quality=85),
                        }
                        for name, scene in scenes().items()
                    ],
                    most=MAX_BYTES,
                )
                question = gr.Textbox(
                    scenes()[first].questions[0], label="Question", lines=1, elem_id="question"
                )
                method = gr.Dropdown(names, value=start, label="Method", elem_id="method")
                about = gr.Markdown(summary_of(start), elem_id="about")
                budget = gr.Slider(
                    1,
                    player.total,
                    max(1, player.total // 9),
                    step=1,
                    label="Keep budget",
                    info="visual tokens per image",
                    elem_id="budget",
                    visible=has_keep_budget(method_class(start)),
                )
                with gr.Accordion("Fields of the method", open=False, elem_id="fields"):
                    gr.Markdown("Empty fields have their default, or what the budget sets.")
                    fields = [gr.Textbox(**settings) for settings in boxes(start)]
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=7, min_width=320):
                result = gr.HTML(
                    None,
                    html_template=static("play_result.html"),
                    js_on_load=static("base.js") + static("play_result.js"),
                    elem_id="result",
                )

        def answer(picked: Any, text: str, name: str, tokens: int, *typed: str) -> Any:
            picked = picked or {}
            return player.show(
                str(picked.get("picked") or ""),
                str(picked.get("file") or "picture.png"),
                text or "",
                name,
                tokens,
                typed,
            )

        def change(name: str) -> list[Any]:
            has = has_keep_budget(method_class(name))
            updates = [gr.update(**settings) for settings in boxes(name)]
            return [summary_of(name), gr.update(visible=has), *updates]

        inputs = [picker, question, method, budget, *fields]
        asking = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        asking |= {"show_progress": "minimal", "trigger_mode": "always_last"}
        method.change(
            change,
            method,
            [about, budget, *fields],
            api_visibility="private",
            show_progress="hidden",
        ).then(answer, inputs, result, **asking)
        picker.select(
            lambda picked: picked["question"] or gr.skip(),
            picker,
            question,
            api_visibility="private",
            show_progress="hidden",
        ).then(answer, inputs, result, **asking)
        gr.on(
            [
                ask.click,
                blocks.load,
                budget.change,
                question.submit,
                *(field.submit for field in fields),
            ],
            answer,
            inputs,
            result,
            **asking,
        )
    return blocks


def summary_of(name: str) -> str:
    """A method in a sentence, with its paper."""
    cls = method_class(name)
    assert cls is not None
    paper = cls.paper.replace("arXiv ", "")
    link = f" [{cls.paper}](https://arxiv.org/abs/{paper})" if paper else ""
    return cls.summary().replace("``", "`") + link


def boxes(name: str) -> list[dict[str, Any]]:
    """Settings of the text boxes for a method's fields; there are as many as any method needs."""
    cls = method_class(name)
    assert cls is not None
    found: list[dict[str, Any]] = []
    for option in cls.options().values():
        info, inside = field_text(option)
        found.append(
            {
                "label": option.name,
                "info": info,
                "placeholder": inside,
                "value": "",
                "visible": True,
            }
        )
    blank = {"label": "", "info": "", "placeholder": "", "value": "", "visible": False}
    return found + [blank] * (_FIELDS - len(found))


# -- the server ------------------------------------------------------------------------------------
def gradio() -> Any:
    """Gradio, which is told to keep to itself first.

    Raises:
        InputError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as found
    except ImportError as error:
        raise InputError(
            "play needs Gradio: pip install 'vlm-prune-ext[play]' brings it."
        ) from error
    return found


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be served on, before a model is loaded.

    Raises:
        InputError: it is taken, not allowed, or not one of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"--host {host} --port {port} cannot be served on ({reason}): give another."
        ) from error


def serve(player: Player, start: str, host: str, port: int) -> tuple[Any, str]:
    """Start the page's server in threads of this process.

    Returns:
        Gradio's blocks, whose ``close()`` ends it, and the page's address.

    Raises:
        InputError: the port was taken meanwhile.
    """
    gr = gradio()
    blocks = build(player, start)
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "sans-serif"],  # fonts that are there, none from elsewhere
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
    try:
        _, url, _ = blocks.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            run_history=False,  # it would save each run, pictures included, in the browser
            max_file_size=1,  # no component uploads, so nobody may
            theme=theme,
            css=static("base.css") + static("play.css"),
        )
    except OSError as error:
        raise InputError(f"--port {port} cannot be served on: {error}.") from error
    return blocks, url
