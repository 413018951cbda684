"""Any model of transformers that puts image features at placeholder tokens of a causal decoder:
where its parts are, without a file of its own. Bare causal language models too.

What is asked of a decoder: a list of layers, each with an attention module that has ``q_proj``,
``k_proj`` and ``head_dim`` (queries and keys with or without norms, grouped heads, rotary
positions of one axis or several, sliding windows), and a final norm. A placeholder stands in
``input_ids`` for every visual token, named by ``image_token_id`` of the configuration
(``video_token_id`` for frames).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vlm_prune_ext.engine.parts import ModelParts, Present, SpanSink, Undo
from vlm_prune_ext.engine.prompt import Length
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models import questions
from vlm_prune_ext.models.base import Family
from vlm_prune_ext.models.catalogue import FamilyLine
from vlm_prune_ext.models.towers import find_tower

Lengths = Callable[[torch.Tensor, dict[str, Any]], "list[list[int]] | None"]
"""``(mask, keyword arguments of the call) -> visual tokens of each image, per sample``."""

_MERGES = ("get_placeholder_mask", "inputs_merger", "get_image_features")


# ------------------------------------------------------------------------------- the decoder


def find_decoder(model: Any) -> Any:
    """The module that runs the decoder layers, or ``None``."""
    for candidate in _candidates(model):
        if _is_decoder(candidate):
            return candidate
    return None


def _candidates(model: Any) -> Iterator[Any]:
    """The model, what it wraps, and what it calls its language model, outermost first."""
    waiting, seen = [model], set()
    while waiting:
        here = waiting.pop(0)
        if not isinstance(here, nn.Module) or id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        for name in ("model", "language_model", "text_model"):
            waiting.append(getattr(here, name, None))


def _is_decoder(module: nn.Module) -> bool:
    layers = getattr(module, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    attentions = (getattr(layer, "self_attn", None) for layer in layers)
    projects = any(
        all(hasattr(attn, name) for name in ("q_proj", "k_proj", "head_dim")) for attn in attentions
    )
    return projects and isinstance(getattr(module, "norm", None), nn.Module)


def decoder_parts(model: nn.Module, decoder: Any, **more: Any) -> ModelParts:
    """Parts of a model around a decoder; ``more`` are fields of the result."""
    fields: dict[str, Any] = {
        "plain_rotary": _turns_plainly(decoder),
        "rotate": _text_rotary(decoder),
        "follow": _follow(decoder),
        "stacked": _stacked(model, decoder),
    }
    return ModelParts(
        model=model,
        decoder=decoder,
        layers=decoder.layers,
        final_norm=decoder.norm,
        queries=queries,
        keys=keys,
        **{**fields, **more},
    )


def _takes(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's inputs."""
    return _parameters(type(module).forward)[1:]


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _turns_plainly(decoder: Any) -> bool:
    """Is there one rotary position per token, the same in all layers, as in LLaMA?"""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return False
    scaling = getattr(decoder.config, "rope_parameters", None) or {}
    return len(_takes(rotary)) == 2 and "mrope_section" not in scaling  # Gemma's asks for a kind


def _text_rotary(decoder: Any) -> Callable[[torch.Tensor, torch.Tensor, int], Any] | None:
    """How text at stated positions is turned in a layer, where that is not LLaMA's way; see
    :attr:`ModelParts.rotate`."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or _turns_plainly(decoder):
        return None
    kinds = getattr(decoder.config, "layer_types", None)
    if len(_takes(rotary)) > 2:
        assert kinds is not None
        return lambda hidden, positions, layer: rotary(hidden, positions, kinds[layer])
    # Three axes (time, height, width), which are one and the same for text.
    return lambda hidden, positions, layer: rotary(hidden, positions.expand(3, -1, -1))


def _follow(decoder: Any) -> Callable[[Present], list[Undo]] | None:
    """Features that the decoder adds between its layers at visual tokens (DeepStack, arXiv
    2406.04334: Qwen3-VL) are those of the tokens that are still there.

    Raises:
        InputError: the decoder adds features in a way that is not known.
    """
    name = "_deepstack_process"
    if hasattr(decoder, name):
        return lambda present: [_set(decoder, name, _Deepstack(getattr(decoder, name), present))]
    unknown = [n for n in _takes(decoder) if n.startswith("deepstack") or n == "per_layer_inputs"]
    if unknown and not _unused(decoder, unknown[0]):
        raise InputError(
            f"{type(decoder).__name__} adds {unknown[0]} between its layers, which would not "
            "follow dropped tokens: nothing can be pruned in it."
        )
    return None


def _stacked(model: Any, decoder: Any) -> int:
    """See :attr:`ModelParts.stacked`."""
    tower = getattr(getattr(model, "config", None), "vision_config", None)
    levels = getattr(tower, "deepstack_visual_indexes", None) or ()
    return len(levels) if hasattr(decoder, "_deepstack_process") else 0


def _unused(decoder: Any, name: str) -> bool:
    return name == "per_layer_inputs" and not getattr(decoder, "hidden_size_per_layer_input", 1)


def _set(module: nn.Module, name: str, value: Any) -> Undo:
    """Stand in for a method on one instance; returns what takes it off."""
    own = vars(module)
    before = own.get(name)
    own[name] = value

    def undo() -> None:
        if before is None:
            own.pop(name, None)
        else:
            own[name] = before

    return undo


class _Deepstack:
    """The decoder's own method, told of the tokens that are left.

    ``original(hidden, mask, features)``: ``hidden`` ``(batch, n, width)``; ``mask`` bool
    ``(batch, S)`` over the prompt as it came; ``features`` ``(visual tokens, width)``.
    """

    def __init__(self, original: Callable[..., torch.Tensor], present: Present) -> None:
        self.original, self.present = original, present

    def __call__(
        self, hidden: torch.Tensor, mask: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        here = self.present()
        if here is None:
            return self.original(hidden, mask, features)
        here = here.to(mask.device)
        places = here.clamp(min=0)
        stays = mask.gather(1, places) & (here >= 0)
        rank = (mask.flatten().cumsum(0) - 1).view_as(mask).gather(1, places)
        return self.original(hidden, stays, features[rank[stays].to(features.device)])


# ------------------------------------------------------------------------- queries and keys


def queries(attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Queries of given rows; see :class:`vlm_prune_ext.engine.parts.Projection`."""
    return _project(attn, "q", hidden, rotary)


def keys(attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Keys of given rows; see :class:`vlm_prune_ext.engine.parts.Projection`."""
    return _project(attn, "k", hidden, rotary)


def _project(attn: Any, which: str, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    flat = getattr(attn, f"{which}_proj")(hidden)
    if which == "q" and _is_gated(attn):
        flat = flat.unflatten(-1, (-1, 2, attn.head_dim))[..., 0, :].flatten(-2)
    norm = getattr(attn, f"{which}_norm", None)
    per_head = norm is not None and norm.weight.shape[-1] == attn.head_dim
    if norm is not None and not per_head:
        flat = norm(flat)
    heads = flat.view(*hidden.shape[:-1], -1, attn.head_dim)
    if per_head:
        heads = norm(heads)  # type: ignore[misc]
    return _rotate(attn, heads.transpose(1, 2), rotary if _turns(attn) else None)


def _is_gated(attn: Any) -> bool:
    """Does the projection of queries make a gate beside each head (Qwen3.5, Qwen3-Next)?"""
    groups = getattr(attn, "num_key_value_groups", None)
    return groups is not None and (
        attn.q_proj.out_features == 2 * groups * attn.k_proj.out_features
    )


def _turns(attn: Any) -> bool:
    """Some layers see no positions: those that say so, and in Cohere 2 those without a window."""
    windowless = getattr(attn, "sliding_window", None) is None
    cohere = type(attn).__name__ == "Cohere2Attention"
    return bool(getattr(attn, "use_rope", True)) and not (cohere and windowless)


def _rotate(attn: nn.Module, heads: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Rotary embedding by the function of the module's own family, ``(batch, heads, n, dim)``."""
    if rotary is None:
        return heads
    apply = sys.modules[type(attn).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    cos, sin = rotary
    if len([name for name in _parameters(apply) if name in "qkx"]) == 1:
        return apply(heads, cos, sin)  # Gemma 4's rotates one tensor at a time, others two
    nothing = heads[:, :0]
    return apply(heads, nothing, cos, sin)[0]


# ----------------------------------------------------------------------- where images stand


def watch_placeholders(
    inner: Any,
    image_token_id: int,
    lengths: Lengths,
    video_token_id: int | None = None,
    video_ends: tuple[int | None, int | None] = (None, None),
) -> Callable[[SpanSink], list[Undo]]:
    """What :attr:`ModelParts.watch_spans` asks for: a hook in front of ``inner``, the module that
    puts image features into the embedded prompt. ``video_ends``: tokens that a video stands
    between, where its frames have placeholders of images (GLM-4.1V)."""

    def watch(sink: SpanSink) -> list[Undo]:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = {"input_ids": args[0], **kwargs} if args else kwargs
            mask = _places(module, given, image_token_id)
            if mask is None or mask.shape[1] < 2:
                return
            if video_token_id is not None:
                video = _places(module, given, video_token_id)
                assert video is not None
                if None not in video_ends:
                    begun, ended = (_places(module, given, one) for one in video_ends)  # type: ignore[arg-type]
                    assert begun is not None and ended is not None
                    inside = begun.long().cumsum(1) > ended.long().cumsum(1)
                    video, mask = video | (mask & inside), mask & ~inside
                if bool(video.any()):
                    sink(mask | video, frame_lengths(mask, video, given))
                    return
            sink(mask, lengths(mask, given))

        return [inner.register_forward_pre_hook(see, with_kwargs=True).remove]

    return watch


def _places(module: Any, given: dict[str, Any], token: int) -> torch.Tensor | None:
    """Where a placeholder stands, bool ``(batch, seq)``; ``None`` where the call has no tokens."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None:
        return ids == token
    if embeds is None or embeds.shape[1] == 1:
        return None
    # The way transformers itself finds them where only embeddings are given.
    table = module.get_input_embeddings()
    placeholder = torch.tensor(token, device=table.weight.device)
    return (embeds == table(placeholder).to(embeds.device)).all(dim=-1)


def equal_lengths(length: int | None) -> Lengths:
    """Where every image has ``length`` visual tokens; ``None``: every unbroken run is one image."""

    def lengths(mask: torch.Tensor, given: dict[str, Any]) -> list[list[int]] | None:
        if length is None:
            return None
        return [[length] * (count // length) for count in mask.sum(dim=1).tolist()]

    return lengths


def frame_lengths(
    image: torch.Tensor, video: torch.Tensor, given: dict[str, Any]
) -> list[list[Length]]:
    """Visual tokens of each image and of each frame of a video, per sample.

    Args:
        image, video: where their placeholders stand, bool ``(batch, seq)``.
        given: the call's keyword arguments, which say how many frames each video has.
    """
    kinds = image.int() + 2 * video.int()
    runs = [list(_runs(row)) for row in kinds.tolist()]
    frames = _frames(given)
    count = sum(kind == 2 for row in runs for kind, _ in row)
    if frames is not None and count == len(frames):  # a video is one run
        waiting = iter(frames)
        return [[_evenly(n, next(waiting)) if k == 2 else n for k, n in row] for row in runs]
    if frames is None or count != sum(frames):  # then a sample has one at most
        frames = [sum(kind == 2 for kind, _ in row) for row in runs]
    waiting = iter([one for one in frames if one])  # something stands between frames
    rows: list[list[Length]] = []
    for row in runs:
        own: list[Length] = []
        left = list(row)
        while left:
            kind, length = left.pop(0)
            if kind == 1:
                own.append(length)
                continue
            following = next(waiting) - 1
            own.append((length, *(n for _, n in left[:following])))
            del left[:following]
        rows.append(own)
    return rows


def _evenly(length: int, frames: int) -> tuple[int, ...]:
    """Tokens of each frame; one that closes the video is the last one's."""
    each, rest = divmod(length, frames)
    return (*[each] * (frames - 1), each + rest)


def _frames(given: dict[str, Any]) -> list[int] | None:
    """Frames of each video; of Qwen's models, what stands for a pair of them."""
    grid, pixels = given.get("video_grid_thw"), given.get("pixel_values_videos")
    if grid is not None:
        return [int(t) for t in grid[:, 0]]
    if isinstance(pixels, torch.Tensor) and pixels.dim() == 5:
        return [pixels.shape[1]] * pixels.shape[0]
    return None


def _runs(kinds: list[int]) -> Iterator[tuple[int, int]]:
    """Unbroken stretches of one kind above 0, with their lengths."""
    before, count = 0, 0
    for kind in [*kinds, 0]:
        if kind == before:
            count += 1
            continue
        if before:
            yield before, count
        before, count = kind, 1


# --------------------------------------------------------------------------- whole models


def token_of(config: Any, kind: str = "image") -> int | None:
    """The placeholder's id by the configuration."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    return None


def _merging(model: Any, decoder: Any) -> Any:
    """The innermost module around the decoder that puts image features into the prompt."""
    merging = [m for m in path_to(model, decoder) if any(hasattr(m, name) for name in _MERGES)]
    return merging[-1] if merging else None


def owns(model: Any) -> bool:
    """Whether a model has a placeholder for images, a decoder that can be read, and a module that
    puts image features into the prompt."""
    if token_of(getattr(model, "config", None)) is None:
        return False
    decoder = find_decoder(model)
    return decoder is not None and _merging(model, decoder) is not None


def parts(model: Any, lengths: Lengths | None = None) -> ModelParts:
    """Where its parts are.

    Args:
        model: one that is owned.
        lengths: visual tokens of each image in a call; by default what the processor says that made
            the prompt, or the configuration where all images have equally many (Gemma 3,
            PaliGemma); without either, every unbroken run of placeholders is an image.

    Raises:
        InputError: images reach the decoder in another way.
    """
    decoder, config = find_decoder(model), model.config
    inside = [layer._modules for layer in decoder.layers]
    if any("cross_attn" in modules for modules in inside):
        raise InputError(
            f"{type(model).__name__} shows images to its decoder by cross-attention, not as tokens "
            "of the prompt: nothing to prune."
        )
    linear = frozenset(n for n, modules in enumerate(inside) if "linear_attn" in modules)
    stateful = [
        n
        for n, modules in enumerate(inside)
        if n not in linear and "k_proj" not in getattr(modules.get("self_attn"), "_modules", ())
    ]
    if stateful:
        raise InputError(
            f"Layer {stateful[0]} of {type(decoder).__name__} does not attend to tokens that it "
            "keeps (it carries a state on, or shares another layer's keys): nothing can be dropped."
        )
    inner, token = _merging(model, decoder), token_of(config)
    assert token is not None
    vision, why = find_tower(inner)
    return decoder_parts(
        model,
        decoder,
        vision=vision,
        why_no_vision=why,
        linear=linear,
        watch_spans=watch_placeholders(
            inner,
            token,
            lengths or _lengths_of(model),
            token_of(config, "video"),
            (token_of(config, "video_start"), token_of(config, "video_end")),
        ),
    )


def _lengths_of(model: nn.Module) -> Lengths:
    known = equal_lengths(_image_length(model.config))

    def lengths(mask: torch.Tensor, given: dict[str, Any]) -> list[list[int]] | None:
        maker, ids = questions.of_model(model), given.get("input_ids")
        said = getattr(maker, "image_lengths", None)
        found = said(ids) if said is not None and ids is not None else None
        return known(mask, given) if found is None else found

    return lengths


def _image_length(config: Any) -> int | None:
    """Visual tokens of every image, where the configuration says so."""
    text = getattr(config, "text_config", None)
    for holder, name in ((config, "mm_tokens_per_image"), (text, "num_image_tokens")):
        found = getattr(holder, name, None)
        if isinstance(found, int):
            return found
    return None


def family_of(line: FamilyLine) -> Family:
    """Any model with placeholders, or (``causal_lm``) a language model alone."""
    if line.name != "causal_lm":
        return Family(line, owns, _unlisted_parts)
    return Family(line, lambda model: find_decoder(model) is not None, _bare_parts)


def _unlisted_parts(model: Any) -> ModelParts:
    """Of a family that nobody here has tried: its attention is looked at first."""
    found = parts(model)
    attentions = [layer.self_attn for layer in found.layers if hasattr(layer, "self_attn")]
    if not all(_is_read(attn, model.dtype) for attn in attentions):
        found.queries = found.keys = _unread
    return found


def _unread(attn: nn.Module, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    raise InputError(
        f"{type(attn).__name__} computes its queries and keys in a way that is not known here: "
        "methods that read them do not apply to this model; RandomDrop does."
    )


class _Caught(Exception):
    """Stands in for a KV cache: ends the attention when it is handed its keys."""

    def update(self, keys: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.keys = keys
        raise self


@torch.no_grad()
def _is_read(attn: Any, dtype: torch.dtype) -> bool:
    """Are keys as projected here what an attention module hands to its cache, and are there as many
    queries as share them? Tried on two made-up tokens."""
    device = attn.k_proj.weight.device
    if device.type == "meta":  # elsewhere until it is called
        return True
    steps = torch.linspace(-1, 1, 2 * attn.k_proj.in_features, device=device)
    hidden = steps.view(1, 2, -1).to(dtype)
    turns = torch.linspace(0, 1, 2 * attn.head_dim, device=device).view(1, 2, -1)
    rotary = (turns.cos().to(dtype), turns.sin().to(dtype))
    given: dict[str, Any] = {"position_embeddings": rotary, "past_key_values": _Caught()}
    if "shared_kv_states" in inspect.signature(attn.forward).parameters:  # Gemma 4
        given["shared_kv_states"] = {}
    try:
        attn(hidden_states=hidden, attention_mask=None, **given)
    except _Caught as caught:
        made, asked = keys(attn, hidden, rotary), queries(attn, hidden, rotary)
        same = caught.keys.shape == made.shape and torch.allclose(caught.keys, made)
        return same and asked.shape[1] == attn.num_key_value_groups * made.shape[1]
    except Exception:  # whatever it does not take
        return False
    return False


def _bare_parts(model: Any) -> ModelParts:
    return decoder_parts(model, find_decoder(model))


def path_to(model: nn.Module, inner: nn.Module | None) -> list[nn.Module]:
    """The modules that hold ``inner``, outermost first, and itself; none where nothing does.

    Nearest first: hundreds of modules stand deeper than the parts of a model do.
    """
    level = [[model]]
    while level:
        for path in level:
            if path[-1] is inner:
                return path
        level = [[*path, child] for path in level for child in path[-1].children()]
    return []
