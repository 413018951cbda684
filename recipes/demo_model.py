"""Train a demo model from nothing: ``python recipes/demo_model.py --out DIR --device cuda``.

The result is a LLaVA-1.5 in the original format, of the sizes that the JSON files of ``--template``
state (by default those of the checkpoint that ships with the package). The modules are those of
transformers, the optimiser is ``torch.optim.AdamW``, the data are scenes drawn from their seeds.

1. *Tower.* Each of the 576 patches says what covers it: colour, shape, size, drawn text, which
   object from the left, how far to its centre. These labels are free, since we drew the scene. The
   heads that say so are dropped afterwards; the features stay.
2. *Everything.* Tower, projector and language model learn to answer, with the ordinary loss on the
   tokens of the answer and nothing else: no term points attention anywhere, and no token is dropped
   while learning. Sixteen questions are packed behind each picture. A mask lets each see the
   picture and itself only, at the positions it would have if it stood alone, so that a packed
   question has the logits of a single one (a test holds this) at a sixteenth of a picture's cost.

Each stage resumes from ``DIR/work``; ``DIR/log.jsonl`` and ``DIR/curve.png`` follow it.

The weights that ship were not made by this file but by an earlier recipe (in this repository's
history: ``vlm_prune_ext/demo/train.py``; its log is ``docs/results/demo_training.jsonl``), which
also had a loss on the attention of decoder layer 2 and dropped tokens during training. This recipe
has been tried for a few steps only.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlm_prune_ext.demo import CHECKPOINT
from vlm_prune_ext.demo import questions as qa
from vlm_prune_ext.demo.drawing import (
    COLORS,
    FIRST_TRAINING_SEED,
    GRID,
    MAX_OBJECTS,
    PATCH,
    RADII,
    SHAPES,
    TEXTS,
    Scene,
    draw,
    make_scene,
)
from vlm_prune_ext.models.checkpoint import Checkpoint
from vlm_prune_ext.models.original import OriginalCheckpoint

PATCHES = GRID * GRID
IGNORE = -100
KINDS = ("vqa", "yn", "mcq", "vqa", "yn", "mcq", "vqa", "caption") * 2
"""What is asked behind each picture."""
SLOT = 64
"""Tokens a packed question and its answer may have."""

# -- wording ---------------------------------------------------------------------------------------
SYSTEMS = {
    "llava": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    "vlmeval": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    ),
    "bare": "",
}
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
WORD_SUFFIX = "\nAnswer the question using a single word or phrase."
CAPTION_PROMPTS = (
    "Provide a one-sentence caption for the provided image.",
    # VLMEvalKit's, with the space it ends in.
    "Please describe this image in general. Directly provide the description, do not include "
    'prefix like "This image depicts". ',
)


def image_prefix(form: str) -> str:
    """What stands before `<image>`, as LLaVA (or VLMEvalKit's LLaVA) assembles it."""
    return SYSTEMS[form] + ("USER:  " if form == "vlmeval" else "USER: ")


def after_image(form: str, text: str) -> str:
    """What stands after `<image>`, up to where the answer begins."""
    return f" {text} ASSISTANT: " if form == "vlmeval" else f"\n{text} ASSISTANT:"


def word_choice(question: qa.Question, style: int) -> str:
    """A multiple-choice question as LLaVA (0), VLMEvalKit's data sets (1) or lmms-eval (2) ask."""
    lines = [f"{letter}. {o}" for letter, o in zip(qa.LETTERS, question.options, strict=True)]
    listed = "\n".join(lines)
    if style == 0:
        return f"{question.text}\n{listed}{LETTER_SUFFIX}"
    if style == 1:
        return (
            f"Question: {question.text}\nOptions:\n{listed}\n"
            "Please select the correct answer from the options above. \n"
        )
    return f"{question.text} There are several options:\n{listed}\n{LETTER_SUFFIX}"


def word_question(question: qa.Question, kind: str, rng: np.random.Generator) -> str:
    """The user's text in one of the wordings that evaluation frameworks use for `kind`."""
    if kind == "mcq":
        return word_choice(question, int(rng.choice(3, p=(0.5, 0.25, 0.25))))
    if kind == "caption":
        return CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))]
    if kind == "yn":
        suffix = (qa.YES_NO_SUFFIX, WORD_SUFFIX, qa.YES_NO_SUFFIX + WORD_SUFFIX)
        return question.text + suffix[int(rng.integers(3))]
    # A minority without the suffix, as a person at a prompt would type.
    return question.text + (WORD_SUFFIX if rng.random() < 0.85 else "")


def random_question(scene: Scene, kind: str, rng: np.random.Generator) -> qa.Question | None:
    """A training question, or `None` where the scene does not allow the one that was drawn."""
    if kind == "caption":
        return qa.caption_question(scene)
    if kind == "yn":
        category = str(rng.choice(tuple(qa.YES_NO_QUESTIONS), p=(0.36, 0.16, 0.16, 0.16, 0.16)))
        return qa.yes_no_question(scene, category, bool(rng.integers(2)), rng)
    category = str(rng.choice(tuple(qa.OPEN_QUESTIONS)))
    if kind == "mcq":
        return qa.choice_question(scene, category, qa.LETTERS[int(rng.integers(4))], rng)
    return qa.open_question(scene, category, rng)


# -- tokenizer -------------------------------------------------------------------------------------
def tokenizer_text() -> Iterator[str]:
    """Sentences that hold each word the model will meet, in about their real proportions."""
    rng = np.random.default_rng(7)
    for form in SYSTEMS:
        for _ in range(40):
            yield image_prefix(form)
    for seed in range(1500):
        scene = make_scene(FIRST_TRAINING_SEED + seed)
        yield scene.caption
        for kind in qa.KINDS:
            question = random_question(scene, kind, rng)
            if question is not None:
                text = after_image("llava", word_question(question, kind, rng))
                yield from (line for line in text.split("\n") if line)
                yield question.answer


def train_tokenizer(vocabulary: int = 960) -> bytes:
    """A LLaMA-style sentencepiece model: BPE with byte fallback, `<unk>`, `<s>`, `</s>` first."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_text(),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Encoder:
    """Text to token ids, piece by piece as LLaVA's `tokenizer_image_token` does."""

    def __init__(self, model: bytes) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.blank = self.pieces.piece_to_id("\u2581")

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`, without `<s>`."""
        return list(self.pieces.encode(text))


# -- data ------------------------------------------------------------------------------------------
PATCH_HEADS = {
    "kind": 3,
    "color": len(COLORS),
    "shape": len(SHAPES),
    "size": len(RADII),
    "text": len(TEXTS),
    "rank": MAX_OBJECTS,
    "offset": 2,
}
"""What each patch is asked, and how many answers there are; `offset` is the way to the object's
centre in patches, the one thing learnt by regression."""


def patch_labels(scene: Scene, owners: np.ndarray) -> dict[str, np.ndarray]:
    """What each of the 576 patches should say; `IGNORE` where it has nothing to say."""
    labels = {
        name: np.full(PATCHES, IGNORE, dtype=np.int64) for name in PATCH_HEADS if name != "offset"
    }
    labels["kind"] = (owners > 0) + 2 * (owners < 0).astype(np.int64)
    labels["offset"] = np.zeros((PATCHES, 2), dtype=np.float32)
    for rank, item in enumerate(scene.objects):
        mine = np.flatnonzero(owners == rank + 1)
        labels["color"][mine] = list(COLORS).index(item.color)
        labels["shape"][mine] = SHAPES.index(item.shape)
        labels["size"][mine] = list(RADII).index(item.size)
        labels["rank"][mine] = rank
        labels["offset"][mine, 0] = item.x / PATCH - (mine % GRID + 0.5)
        labels["offset"][mine, 1] = item.y / PATCH - (mine // GRID + 0.5)
    if scene.text is not None:
        labels["text"][owners < 0] = TEXTS.index(scene.text.text)
    return labels


def pack(
    encode: Encoder, scene: Scene, form: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Questions of all `KINDS` about a scene: ids and labels, each `(len(KINDS), SLOT)`.

    A label stands where its token is predicted, one place before it.
    """
    ids = np.zeros((len(KINDS), SLOT), dtype=np.int64)
    labels = np.full_like(ids, IGNORE)
    for slot, kind in enumerate(KINDS):
        question = None
        while question is None:
            question = random_question(scene, kind, rng)
        prompt = encode(after_image(form, word_question(question, kind, rng)))
        # Tokenizers differ in whether a piece that begins with a space gets a blank token as well.
        skip = form == "vlmeval" and prompt[0] == encode.blank and rng.random() < 0.5
        prompt = prompt[int(skip) :]
        whole = [*prompt, *encode(question.answer), 2]
        if len(whole) > SLOT:
            raise ValueError(f"A {kind} question has {len(whole)} tokens, more than {SLOT}.")
        ids[slot, : len(whole)] = whole
        labels[slot, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return ids, labels


class Batches(IterableDataset):
    """Endless batches of fresh training scenes, a function of their numbers alone.

    Args:
        encode: `None` gives what stage 1 needs, else also the questions of stage 2.
        size: pictures per batch.
        first: number of the first batch, so that a resumed run sees new scenes.
    """

    def __init__(self, encode: Encoder | None, size: int, first: int) -> None:
        self.encode, self.size, self.first = encode, size, first

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Workers take turns, so that their number changes nothing."""
        worker = get_worker_info()
        step, offset = (worker.num_workers, worker.id) if worker else (1, 0)
        number = self.first + offset
        while True:
            yield self._batch(number)
            number += step

    def _batch(self, number: int) -> dict[str, Tensor]:
        seed = FIRST_TRAINING_SEED + number * self.size
        scenes = [make_scene(seed + i) for i in range(self.size)]
        drawn = [draw(scene) for scene in scenes]
        arrays = {"pixels": np.stack([pixels for pixels, _ in drawn])}
        if self.encode is None:
            labels = [patch_labels(s, o) for s, (_, o) in zip(scenes, drawn, strict=True)]
            arrays |= {name: np.stack([row[name] for row in labels]) for name in labels[0]}
        else:
            rng = np.random.default_rng([2, number])
            form = str(rng.choice(tuple(SYSTEMS), p=(0.45, 0.45, 0.1)))
            packed = [pack(self.encode, scene, form, rng) for scene in scenes]
            arrays["prefix"] = np.array([1, *self.encode(image_prefix(form))])
            arrays["ids"] = np.stack([ids for ids, _ in packed])
            arrays["labels"] = np.stack([labels for _, labels in packed])
        return {name: torch.from_numpy(value) for name, value in arrays.items()}


# -- model -----------------------------------------------------------------------------------------
def new_model(template: Path) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with the sizes that an original-format folder states, float32, random.

    Matrices begin at `0.7 / sqrt(width)`: the default of 0.02 suits models thirty times as wide.
    """
    fields = OriginalCheckpoint(Checkpoint(str(template))).multimodal_config()
    fields["text_config"].initializer_range = 0.7 * fields["text_config"].hidden_size ** -0.5
    return LlavaForConditionalGeneration(LlavaConfig(**fields)).float()


def tower_features(model: Any, pixels: Tensor) -> Tensor:
    """`(batch, 336, 336, 3)` uint8 to the `(batch, 576, width)` features that LLaVA selects."""
    mean, std = (
        torch.tensor(values, device=pixels.device)
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    scaled = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    states = model.model.vision_tower(scaled, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def packed_layout(start: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions `(1, n)` and mask `(1, 1, n, n)` (true: is seen) of a packed prompt.

    The prefix of `start` tokens, the picture's 576, then `slots` questions of `SLOT` tokens each.
    """
    head = start + PATCHES
    positions = torch.cat([torch.arange(head), torch.arange(head, head + SLOT).repeat(slots)]).to(
        device
    )
    owner = torch.cat([torch.zeros(head), torch.arange(1, slots + 1).repeat_interleave(SLOT)])
    owner = owner.to(device)
    order = torch.arange(len(owner), device=device)
    mask = (order[:, None] >= order) & ((owner == 0) | (owner[:, None] == owner))
    return positions[None], mask[None, None]


def answer_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states of the packed questions, `(batch, slots, SLOT, width)`."""
    rows, slots, _ = batch["ids"].shape
    embed = model.get_input_embeddings()
    visual = model.model.multi_modal_projector(tower_features(model, batch["pixels"]))
    prefix = embed(batch["prefix"]).expand(rows, -1, -1).to(visual.dtype)
    text = embed(batch["ids"].flatten(1)).to(visual.dtype)
    positions, mask = packed_layout(len(batch["prefix"]), slots, batch["ids"].device)
    states = model.model.language_model(
        inputs_embeds=torch.cat([prefix, visual, text], dim=1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    return states[:, -slots * SLOT :].unflatten(1, (slots, SLOT))


# -- losses ----------------------------------------------------------------------------------------
Scores = dict[str, float]


def tower_loss(model: Any, heads: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Scores]:
    """Sum of the patch heads' losses, and how many patches each gets right."""
    outputs = heads(tower_features(model, batch["pixels"])).float()
    total, scores = outputs.new_zeros(()), {}
    for name, part in zip(PATCH_HEADS, outputs.split([*PATCH_HEADS.values()], -1), strict=True):
        known = batch["color" if name == "offset" else name] != IGNORE
        if not known.any():
            continue
        target = batch[name][known]
        if name == "offset":
            loss = F.smooth_l1_loss(part[known], target)
            scores[name] = float(loss.detach())
        else:
            loss = F.cross_entropy(part[known], target)
            scores[name] = float((part[known].argmax(-1) == target).float().mean())
        total = total + loss
    return total, scores


def answer_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Scores]:
    """Cross-entropy of the answers' tokens, and the share of right first tokens of each kind."""
    known = batch["labels"] != IGNORE
    logits = model.lm_head(answer_states(model, batch)[known]).float()
    target = batch["labels"][known]
    loss = F.cross_entropy(logits, target)
    first = known & (known.cumsum(-1) == 1)
    right = (logits.argmax(-1) == target)[first[known]].float().view(-1, len(KINDS))
    kinds = np.array(KINDS)
    return loss, {
        kind: float(right[:, torch.from_numpy(np.flatnonzero(kinds == kind))].mean())
        for kind in qa.KINDS
    }


# -- training --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    Args:
        stage: its name in files and the log.
        steps: updates in all.
        batch: pictures per update.
        peak: highest learning rate; reached after 2 % of the steps, from 40 % on a cosine to 0.
        every: steps between lines of the log, and between savings.
    """

    stage: str
    steps: int
    batch: int
    peak: float = 1e-3
    every: int = 50

    def rate(self, step: int) -> float:
        """Learning rate over `peak`."""
        done = step / self.steps
        if done < 0.02:
            return (step + 1) / (0.02 * self.steps + 1)
        return 1.0 if done < 0.4 else 0.5 * (1 + math.cos(math.pi * (done - 0.4) / 0.6))


def train_stage(
    plan: Plan, module: nn.Module, loss_of: Any, batches: Batches, out: Path, workers: int
) -> None:
    """Run one stage, from where an earlier call stopped.

    Args:
        module: what is trained; its state is what a stopped stage goes on from.
        loss_of: batch -> loss and what to log.
    """
    device = next(module.parameters()).device
    optimiser = torch.optim.AdamW(module.parameters(), plan.peak, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, plan.rate)
    parts = {"module": module, "optimiser": optimiser, "schedule": schedule}
    path = out / "work" / f"{plan.stage}.pt"
    step, spent = _resume(path, parts, device)
    batches.first += step
    source = iter(DataLoader(batches, batch_size=None, num_workers=workers))
    begun = time.monotonic() - spent
    while step < plan.steps:
        batch = {name: value.to(device) for name, value in next(source).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, scores = loss_of(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        step += 1
        if step % plan.every == 0 or step == plan.steps:
            seconds = time.monotonic() - begun
            record = {"stage": plan.stage, "step": step, "loss": float(loss.detach()), **scores}
            _log(out / "log.jsonl", {**record, "pictures": step * plan.batch, "seconds": seconds})
            _save(path, step, seconds, parts)


def _resume(path: Path, parts: dict[str, Any], device: torch.device) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"], saved["seconds"]


def _save(path: Path, step: int, seconds: float, parts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, "seconds": seconds, **state}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _log(path: Path, record: dict[str, Any]) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
    line = json.dumps(rounded)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


# -- results ---------------------------------------------------------------------------------------
def save_checkpoint(model: Any, tokenizer: bytes, template: Path, folder: Path) -> None:
    """The original LLaVA format: the template's JSON files, bfloat16 weights under their names."""
    tower = Path(json.loads((template / "config.json").read_text())["mm_vision_tower"])
    (folder / tower).mkdir(parents=True, exist_ok=True)
    for path in (*template.glob("*.json"), *(template / tower).glob("*.json")):
        shutil.copyfile(path, folder / path.relative_to(template))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    whole: dict[str, Tensor] = {}
    vision: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        ready = value.detach().to("cpu", torch.bfloat16).contiguous()
        if name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            vision[f"vision_model.{rest}"] = ready
        else:
            whole[_original_name(name)] = ready
    for path, weights in ((folder, whole), (folder / tower, vision)):
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _original_name(name: str) -> str:
    for part, place in (("linear_1", "0"), ("linear_2", "2")):
        name = name.replace(f"multi_modal_projector.{part}", f"mm_projector.{place}")
    return name.replace("model.language_model.", "model.")


def draw_curve(log: Path, picture: Path) -> None:
    """Shares of right answers of both stages against pictures seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, stage, names in zip(
        axes, ("tower", "together"), (tuple(PATCH_HEADS)[:-1], qa.KINDS), strict=True
    ):
        mine = [record for record in records if record["stage"] == stage]
        for name in names:
            points = [(r["pictures"], 100 * r[name]) for r in mine if name in r]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set(title=stage, xlabel="pictures")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("right on fresh training scenes, %")
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    plt.close(figure)


def train(
    out: Path, template: Path, tower: Plan, together: Plan, device: torch.device, workers: int
) -> None:
    """Both stages; checkpoint, log and curve land in `out`."""
    torch.manual_seed(1)
    out.mkdir(parents=True, exist_ok=True)
    model: Any = new_model(template)
    model.to(device)
    width = model.config.vision_config.hidden_size
    heads = nn.Linear(width, sum(PATCH_HEADS.values())).to(device)
    both = nn.ModuleDict({"tower": model.model.vision_tower, "heads": heads})
    scenes = Batches(None, tower.batch, 0)
    train_stage(tower, both, lambda b: tower_loss(model, heads, b), scenes, out, workers)
    tokenizer = train_tokenizer(model.config.text_config.vocab_size)
    packed = Batches(Encoder(tokenizer), together.batch, tower.steps * tower.batch)
    train_stage(together, model, lambda b: answer_loss(model, b), packed, out, workers)
    save_checkpoint(model, tokenizer, template, out / "checkpoint")
    draw_curve(out / "log.jsonl", out / "curve.png")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of checkpoint, log and curve")
    add("--template", type=Path, default=CHECKPOINT, help="folder whose JSON files state the sizes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=8, help="processes that draw")
    add("--tower-steps", type=int, default=4_000)
    add("--tower-batch", type=int, default=128, help="pictures")
    add("--steps", type=int, default=12_000)
    add("--batch", type=int, default=64, help="pictures, with sixteen questions each")
    given = parser.parse_args(arguments)
    with torch.enable_grad():  # some libraries turn gradients off for the whole process
        train(
            given.out,
            given.template,
            Plan("tower", given.tower_steps, given.tower_batch),
            Plan("together", given.steps, given.batch),
            torch.device(given.device),
            given.workers,
        )


if __name__ == "__main__":
    main()
