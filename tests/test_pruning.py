"""`attach` and the reset calls."""

from __future__ import annotations

import logging

import pytest
import torch

import vlm_prune_ext as vp
from tests.engine.test_engine import PROMPTS, make, prompts
from tests.pruning_checks import fingerprint
from vlm_prune_ext.pruning import CUSTOM_LINE, OFF_LINE

FRONT, IMAGE, _ = PROMPTS[0]


@pytest.fixture
def model():
    model = make("sdpa")
    yield model
    vp.detach(model)


def fastv(model, on: bool = True, **fields) -> None:
    values = {
        "fast_v_sys_length": FRONT,
        "fast_v_image_token_length": IMAGE,
        "fast_v_attention_rank": 7,
        "fast_v_agg_layer": 2,
        "fast_v_inplace": True,
    } | fields
    for key, value in {"use_fast_v": on, **values}.items():
        setattr(model.config, key, value)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(inputs_embeds=prompts()[0]).logits


def test_same_as_prune(model) -> None:
    base = logits(model)
    method = vp.FastV(agg_layer=2, attention_rank=7)
    with vp.prune(model, method, visual_span=(FRONT, IMAGE)):
        want = logits(model)
    attachment = vp.attach(model)
    fastv(model)
    model.model.reset_fastv()
    assert torch.equal(logits(model), want)
    assert attachment.method is not None and attachment.trace.visual_tokens[2] == [7]
    fastv(model, on=False)
    model.reset_fastv()
    assert attachment.method is None
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("call", "fields", "cls"),
    [
        ("reset_hmapv", {"use_hmap_v": True, "hmap_v_attn_txt_layer": 1, "hmap_v_attn_txt_rank": 9,
                         "hmap_v_attn_img_layer": 3, "hmap_v_attn_img_rank": 4}, vp.HiMAP),
        ("reset_himap", {"use_hmap_v": True, "hmap_v_attn_txt_layer": 1, "hmap_v_attn_txt_rank": 9,
                         "hmap_v_attn_img_layer": 3, "hmap_v_attn_img_rank": 4}, vp.HiMAP),
        ("reset_saint", {"use_saint": True, "saint_start": 1, "saint_end": 3,
                         "saint_threshold": 0.5}, vp.SAINT),
        ("set_saint", {"use_saint": True, "saint_start": 1, "saint_end": 3}, vp.SAINT),
        ("reset_custom_selection", {"use_custom_selection": True, "custom_kept_tokens": 5,
                                    "custom_selection_method": "norm"}, vp.CustomSelection),
    ],
)  # fmt: skip
def test_every_call(model, call: str, fields: dict, cls: type) -> None:
    attachment = vp.attach(model)
    for key, value in fields.items():
        setattr(model.config, key, value)
    getattr(model, call)()
    assert type(attachment.method) is cls


def test_one_on_turns_the_others_off(model) -> None:
    attachment = vp.attach(model)
    fastv(model)
    model.reset_fastv()
    model.config.use_saint, model.config.saint_start, model.config.saint_end = True, 1, 3
    model.reset_saint()
    assert isinstance(attachment.method, vp.SAINT)
    model.config.use_fast_v = False
    model.reset_fastv()  # says nothing about SAINT
    assert isinstance(attachment.method, vp.SAINT)


def test_detach_restores(model) -> None:
    before = fingerprint(model)
    vp.attach(model)
    assert vp.attach(model) is vp.attach(model)
    fastv(model)
    model.reset_fastv()
    logits(model)
    vp.detach(model)
    after = fingerprint(model)
    assert after == before
    vp.detach(model)


def test_lines_in_the_log(model, caplog: pytest.LogCaptureFixture) -> None:
    vp.attach(model)
    with caplog.at_level(logging.INFO, logger="vlm_prune_ext"):
        fastv(model, on=False)
        model.reset_fastv()
        model.reset_saint()  # nothing is on: said once already
        assert caplog.messages == [OFF_LINE]
        model.config.use_custom_selection = True
        model.config.custom_kept_tokens = 5
        model.reset_custom_selection()
        assert caplog.messages == [OFF_LINE, CUSTOM_LINE]


def test_bad_field_leaves_the_model_clean(model) -> None:
    vp.attach(model)
    fastv(model, fast_v_agg_layer=99)
    before = fingerprint(model)
    with pytest.raises(vp.InputError, match="agg_layer=99"):
        model.reset_fastv()
    assert fingerprint(model) == before


def test_prune_while_attached_is_an_error(model) -> None:
    vp.attach(model)
    fastv(model)
    model.reset_fastv()
    with pytest.raises(vp.InputError, match="already"), vp.prune(model, vp.RandomDrop(keep=3)):
        pass


@pytest.mark.parametrize("wrong", ["fastv", vp.FastV, 5])
def test_what_is_no_method_is_named(model, wrong) -> None:
    with pytest.raises(vp.InputError, match=r"method=.* is not valid"):
        vp.prune(model, wrong)


def test_flags_are_true_or_false(model) -> None:
    attachment = vp.attach(model)
    fastv(model, on="false")
    with pytest.raises(vp.InputError, match="use_fast_v='false' is not valid: true or false"):
        model.reset_fastv()
    assert attachment.method is None
    with pytest.raises(vp.InputError, match="NoneType is not a model"):
        vp.attach(None)


def test_hooks_that_record_outputs_go_with_the_method() -> None:
    """transformers hooks every layer when hidden states are first asked for; entering and leaving
    looks at submodels only, so that it costs little, and still finds them all."""
    from tests.makers import tiny_bare_llama

    model = tiny_bare_llama(layers=3)
    inputs = torch.randn(1, 16, 64)

    def hooks() -> list[tuple[int, ...]]:
        return [tuple(module._forward_hooks) for module in model.modules()]

    clean = hooks()
    for _ in range(2):
        with vp.prune(model, vp.FastV(1, 3), visual_span=(2, 10)), torch.no_grad():
            states = model(inputs_embeds=inputs, output_hidden_states=True).hidden_states
        assert states[-1].shape[1] == 9
        assert hooks() == clean
        assert not any("_output_capturing_hooks_installed" in vars(m) for m in model.modules())
    model(inputs_embeds=inputs, output_hidden_states=True)
    theirs = hooks()
    assert theirs != clean
    with vp.prune(model, vp.FastV(1, 3), visual_span=(2, 10)), torch.no_grad():
        model(inputs_embeds=inputs, output_hidden_states=True)
    assert hooks() == theirs  # what was there before stays
