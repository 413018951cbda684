"""The original LLaVA checkpoint format, read into transformers' own modules.

Format: https://github.com/haotian-liu/LLaVA (``llava/model/builder.py`` loads it there). One
configuration for language model and multimodal fields (``mm_*``); weights ``model.*`` and
``lm_head`` of the language model, ``model.mm_projector.{0,2}``, for LLaVA-1.6 also
``model.image_newline``; the CLIP tower under ``model.vision_tower.vision_tower.`` or in a place of
its own that ``mm_vision_tower`` names.

The tokenizer of such a checkpoint has no image token (the original code feeds -200). Here the
placeholder is the id behind the vocabulary: the embedding table gets one row of zeros more, which
is always overwritten by image features, and the output layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
)

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.base import LoadOptions
from vlm_prune_ext.models.checkpoint import (
    Checkpoint,
    explained,
    find_folder,
    read_json,
    read_weights,
)
from vlm_prune_ext.models.towers import came_from

ARCHITECTURES = {
    "LlavaLlamaForCausalLM": LlamaConfig,
    "LlavaMistralForCausalLM": MistralConfig,
}
_PROJECTOR = {"0": "linear_1", "2": "linear_2"}
_TOWER = "model.vision_tower.vision_tower."
# Buffers that old versions of transformers saved with the weights.
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "head_dim",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What of a published configuration tells how LLaMA-like language models are built."""

_MISTRAL_FIELDS = ("sliding_window",)

# Towers that published checkpoints name. Their sizes are stated here so that a checkpoint with the
# tower's weights inside loads without a network.
KNOWN_TOWERS: Mapping[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "openai/clip-vit-large-patch14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
    },
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the original format."""
    names = config.get("architectures") or []
    return "mm_vision_tower" in config and any(name in ARCHITECTURES for name in names)


class OriginalCheckpoint:
    """An original-format checkpoint: its parts in transformers' terms.

    Args:
        source: where it is.

    Raises:
        InputError: something that the format needs is missing, or a setting is not supported.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.config = source, source.config
        self.what = f"checkpoint {source.name!r}"
        self._check()
        self.tower = Tower.find(self.config["mm_vision_tower"], source)

    def _check(self) -> None:
        required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        for name in required:
            value = self.config.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"config.json of {self.what} needs an integer {name} above 0.")
        tower = self.config["mm_vision_tower"]
        if not isinstance(tower, str) or not tower.strip():
            raise InputError(
                f"mm_vision_tower={tower!r} of {self.what} is not valid: a folder, or owner/name "
                "of a repository on the Hugging Face hub."
            )
        accepted = {
            "mm_projector_type": ("mlp2x_gelu",),
            "mm_vision_select_feature": ("patch", "cls_patch", None),
            "mm_use_im_start_end": (False, None),
        }
        for name, values in accepted.items():
            if self.config.get(name) not in values:
                said = ", ".join(repr(value) for value in values if value is not None)
                raise InputError(
                    f"{name}={self.config.get(name)!r} of {self.what} is not supported; accepted: "
                    f"{said}."
                )

    @property
    def image_token_id(self) -> int:
        """The placeholder: the first id behind the vocabulary."""
        return int(self.config["vocab_size"])

    def text_config(self) -> LlamaConfig | MistralConfig:
        """Configuration of the language model."""
        kind = ARCHITECTURES[self.source.architecture]
        names = TEXT_FIELDS + (_MISTRAL_FIELDS if kind is MistralConfig else ())
        fields = {name: self.config[name] for name in names if name in self.config}
        pad = fields.get("pad_token_id")
        if pad is None or not 0 <= pad < self.config["vocab_size"]:
            fields.pop("pad_token_id", None)
        with explained(self.what):
            return kind(**fields)

    def multimodal_config(self) -> dict[str, Any]:
        """Keyword arguments that ``LlavaConfig`` and ``LlavaNextConfig`` share."""
        whole = self.config.get("mm_vision_select_feature") == "cls_patch"
        vision: Any = self.tower.config
        return {
            "text_config": self.text_config(),
            "vision_config": vision,
            "image_token_index": self.image_token_id,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": self.config.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": "full" if whole else "default",
            "image_seq_length": (vision.image_size // vision.patch_size) ** 2 + int(whole),
            "tie_word_embeddings": bool(self.config.get("tie_word_embeddings", False)),
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights under the names of transformers' modules."""
        found = read_weights(self.source.folder, self.what)
        named = {_rename(name): value for name, value in found.items() if not _is_buffer(name)}
        if not any(name.startswith("model.vision_tower.") for name in named):
            named |= self.tower.weights()
        return named

    def load(self, kind: Any, config: Any, options: LoadOptions) -> Any:
        """A model of transformers' class ``kind``.

        Raises:
            InputError: weights that are missing, that no module has, or of the wrong shape.
        """
        weights = self.weights()
        check_weights(kind, config, weights, self.what)
        with explained(self.what):
            model = kind.from_pretrained(
                None, config=config, state_dict=weights, **options.from_pretrained_arguments()
            )
        add_placeholder_row(model)
        came_from(model.model.vision_tower, self.tower.origin)
        model.generation_config = self._generation_config(config)
        return model.eval()

    def _generation_config(self, config: Any) -> GenerationConfig:
        if (self.source.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(self.source.folder))
        text = config.text_config
        ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id")}
        return GenerationConfig(**ids, pad_token_id=text.pad_token_id)


class Tower:
    """The CLIP tower that ``mm_vision_tower`` names.

    Args:
        name: as the configuration has it.
        folder: where its configuration is, or ``None`` for a known tower that is not at hand.
        local: whether the folder is the user's own, and not a repository fetched without weights.
        fetch: see :class:`Checkpoint`.

    Attributes:
        config: its sizes.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        *,
        local: bool,
        fetch: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.folder, self.local, self.fetch = name, folder, local, fetch
        self.what = f"vision tower {name!r}"
        fields = KNOWN_TOWERS[name] if folder is None else _vision_fields(folder, self.what)
        with explained(self.what):
            self.config = CLIPVisionConfig(**fields)

    @staticmethod
    def find(name: str, source: Checkpoint) -> Tower:
        """Look in the checkpoint's own folder, then for a path, then on the hub."""
        for folder in (source.folder / name, Path(name).expanduser()):
            if folder.is_dir():
                return Tower(name, folder, local=True)
        try:
            folder = find_folder(name, what="vision tower", weights=False, fetch=source.fetch)
        except InputError:
            if name in KNOWN_TOWERS:
                return Tower(name, None, local=False, fetch=source.fetch)
            raise
        return Tower(name, folder, local=False, fetch=source.fetch)

    @property
    def origin(self) -> str:
        """Its folder, or its name on the hub."""
        return str(self.folder) if self.local else self.name

    def image_processor(self) -> CLIPImageProcessor:
        """Resizing and normalising as the tower wants it."""
        if self.folder is not None and (self.folder / "preprocessor_config.json").is_file():
            return CLIPImageProcessor.from_pretrained(self.folder)
        side = self.config.image_size
        return CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """Its weights, from its own folder or repository, under transformers' names."""
        folder = self.folder
        if folder is None or not self.local:
            folder = find_folder(self.name, what="vision tower", fetch=self.fetch)
        found = read_weights(folder, self.what)
        prefixed = any(name.startswith("vision_model.") for name in found)
        return {
            "model.vision_tower." + name.removeprefix("vision_model."): value
            for name, value in found.items()
            # A whole CLIP has a text model and two projections beside its tower.
            if (not prefixed or name.startswith("vision_model.")) and not _is_buffer(name)
        }


def _vision_fields(folder: Path, what: str) -> dict[str, Any]:
    fields = read_json(folder / "config.json", what)
    fields = dict(fields.get("vision_config") or fields)
    kind = fields.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise InputError(
            f"model_type={kind!r} of {what} is not supported; accepted: clip_vision_model."
        )
    return fields


def _is_buffer(name: str) -> bool:
    return name.endswith(_BUFFERS)


def _rename(name: str) -> str:
    if name.startswith(_TOWER):
        rest = name.removeprefix(_TOWER).removeprefix("vision_model.")
        return "model.vision_tower." + rest
    if name.startswith("model.mm_projector."):
        layer, _, rest = name.removeprefix("model.mm_projector.").partition(".")
        return f"model.multi_modal_projector.{_PROJECTOR.get(layer, layer)}.{rest}"
    if name.startswith("model.") and name != "model.image_newline":
        return "model.language_model." + name.removeprefix("model.")
    return name


def check_weights(kind: Any, config: Any, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Compare names and shapes with what the model has.

    Raises:
        InputError: naming up to three weights that do not fit.
    """
    with explained(what), torch.device("meta"):
        expected = {name: value.shape for name, value in kind(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected and name != "lm_head.weight"]
    if missing:
        raise InputError(f"{what} lacks {len(missing)} weight(s): {_some(missing)}.")
    if unexpected:
        raise InputError(
            f"{what} has {len(unexpected)} weight(s) that no module takes: {_some(unexpected)}."
        )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise InputError(
                f"{what}: {name} has shape {tuple(weights[name].shape)}, but its config.json "
                f"makes it {tuple(shape)}."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def add_placeholder_row(model: Any) -> None:
    """Give the embedding table one row of zeros more, for the placeholder's id."""
    table = model.get_input_embeddings()
    row = table.weight.new_zeros(1, table.weight.shape[1])
    grown = torch.cat([table.weight.detach(), row])
    table.weight = nn.Parameter(grown, requires_grad=table.weight.requires_grad)
    table.num_embeddings = grown.shape[0]
