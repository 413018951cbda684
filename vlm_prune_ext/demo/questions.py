"""Questions with known answers over a scene, in the four formats of the demo data sets.

Answers are balanced on purpose (even numbers of `Yes` and `No`, of each letter, of each count), so
that a constant answer, or a model that does not look, stays near chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_prune_ext.errors import InputError

from .drawing import (
    COLORS,
    DIGITS,
    FIRST_TRAINING_SEED,
    MAX_OBJECTS,
    QUADRANTS,
    SHAPES,
    WORDS,
    Scene,
    make_scene,
)

KINDS = ("mcq", "yn", "vqa", "caption")
LETTERS = "ABCD"
YES_NO_SUFFIX = " Please answer yes or no."
TEXT_OWNER = -1


@dataclass(frozen=True)
class Question:
    """One question about a scene.

    `owners` are the things it is about, numbered as in `scenes.draw`: object `i` is `i + 1`, the
    drawn text -1. `options` are empty except for multiple choice.
    """

    category: str
    text: str
    answer: str
    owners: tuple[int, ...]
    options: tuple[str, ...] = ()


def _one_of(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _unique(values: list[str]) -> list[int]:
    return [i for i, value in enumerate(values) if values.count(value) == 1]


def _all_owners(scene: Scene) -> tuple[int, ...]:
    return tuple(range(1, len(scene.objects) + 1))


# ------------------------------------------------------------- open questions, one per category


def _ask_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    candidates = _unique([o.shape for o in scene.objects])
    if not candidates:
        return None
    index = _one_of(rng, candidates)
    item = scene.objects[index]
    text = _one_of(rng, ("What color is the {}?", "What is the color of the {}?"))
    return Question("color", text.format(item.shape), item.color, (index + 1,))


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    candidates = _unique([o.color for o in scene.objects])
    if not candidates:
        return None
    index = _one_of(rng, candidates)
    item = scene.objects[index]
    text = _one_of(rng, ("What shape is the {} object?", "What is the shape of the {} object?"))
    return Question("shape", text.format(item.color), item.shape, (index + 1,))


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    text = _one_of(rng, ("How many shapes are there?", "How many shapes are in the image?"))
    return Question("count", text, str(len(scene.objects)), _all_owners(scene))


def _ask_position(scene: Scene, rng: np.random.Generator) -> Question | None:
    candidates = [i for i, o in enumerate(scene.objects) if o.quadrant]
    if not candidates:
        return None
    index = _one_of(rng, candidates)
    item = scene.objects[index]
    text = f"In which quadrant of the image is the {item.name}?"
    return Question("position", text, str(item.quadrant), (index + 1,))


def _ask_text(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.text is None:
        return None
    if scene.text.kind == "digit":
        text = _one_of(rng, ("What digit is shown?", "Which digit is in the image?"))
    else:
        text = _one_of(rng, ("What word is written?", "Which word is in the image?"))
    return Question("text", text, scene.text.text, (TEXT_OWNER,))


OPEN_QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "position": _ask_position,
    "text": _ask_text,
}


def _answer_pool(scene: Scene, question: Question) -> tuple[str, ...]:
    """All answers that a question of this category could have."""
    if question.category == "text":
        return DIGITS if question.answer in DIGITS else WORDS
    return {
        "color": tuple(COLORS),
        "shape": SHAPES,
        "count": tuple(str(n) for n in range(1, MAX_OBJECTS + 1)),
        "position": QUADRANTS,
    }[question.category]


def _distractors(scene: Scene, question: Question, rng: np.random.Generator) -> list[str]:
    """Three wrong options; those that other objects of the scene make tempting come first."""
    tempting = {
        "color": {o.color for o in scene.objects},
        "shape": {o.shape for o in scene.objects},
    }.get(question.category, set())
    pool = [a for a in _answer_pool(scene, question) if a != question.answer]
    shuffled = [pool[i] for i in rng.permutation(len(pool))]
    return sorted(shuffled, key=lambda a: a not in tempting)[:3]


def open_question(scene: Scene, category: str, rng: np.random.Generator) -> Question | None:
    """A question of `category` with a one-word (or, for quadrants, two-word) answer."""
    return OPEN_QUESTIONS[category](scene, rng)


def choice_question(
    scene: Scene, category: str, letter: str, rng: np.random.Generator
) -> Question | None:
    """The same as a multiple choice whose right answer is `letter`."""
    question = open_question(scene, category, rng)
    if question is None:
        return None
    options = _distractors(scene, question, rng)
    options.insert(LETTERS.index(letter), question.answer)
    return Question(category, question.text, letter, question.owners, tuple(options))


# ------------------------------------------------------------------------- yes or no


def _exists(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    """A wrong pair is made of a colour and a shape that are there, wherever the scene allows it."""
    index = int(rng.integers(len(scene.objects)))
    color, shape = scene.objects[index].color, scene.objects[index].shape
    owners: tuple[int, ...] = (index + 1,)
    if not truth:
        there = {(o.color, o.shape) for o in scene.objects}
        crossed = [
            (a.color, b.shape)
            for a in scene.objects
            for b in scene.objects
            if (a.color, b.shape) not in there
        ]
        if crossed and rng.random() < 0.6:
            color, shape = _one_of(rng, crossed)
        else:
            changed = [(c, shape) for c in COLORS] + [(color, s) for s in SHAPES]
            color, shape = _one_of(rng, [pair for pair in changed if pair not in there])
        owners = tuple(
            i + 1 for i, o in enumerate(scene.objects) if o.color == color or o.shape == shape
        )
    article = "an" if color[0] in "aeiou" else "a"
    return Question(
        "existence", f"Is there {article} {color} {shape} in the image?", _yes(truth), owners
    )


def _has_color(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    candidates = _unique([o.shape for o in scene.objects])
    if not candidates:
        return None
    index = _one_of(rng, candidates)
    item = scene.objects[index]
    color = item.color
    if not truth:
        nearby = [o.color for o in scene.objects if o.color != item.color]
        anywhere = [c for c in COLORS if c != item.color]
        color = _one_of(rng, nearby if nearby and rng.random() < 0.6 else anywhere)
    return Question("color", f"Is the {item.shape} {color}?", _yes(truth), (index + 1,))


def _has_side(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    candidates = [(i, o.side) for i, o in enumerate(scene.objects) if o.side]
    candidates += [(i, o.level) for i, o in enumerate(scene.objects) if o.level]
    if not candidates:
        return None
    index, place = _one_of(rng, candidates)
    if not truth:
        place = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[place]
    text = f"Is the {scene.objects[index].name} in the {place} half of the image?"
    return Question("position", text, _yes(truth), (index + 1,))


def _has_count(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    count = len(scene.objects)
    if not truth:
        count = _one_of(rng, [n for n in range(1, MAX_OBJECTS + 1) if n != count])
    text = f"Is the number of shapes in the image {count}?"
    return Question("count", text, _yes(truth), _all_owners(scene))


def _has_text(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    if scene.text is None:
        return None
    shown = scene.text.text
    if not truth:
        pool = DIGITS if scene.text.kind == "digit" else WORDS
        shown = _one_of(rng, [t for t in pool if t != shown])
    text = f"Does the image show the {scene.text.kind} {shown}?"
    return Question("text", text, _yes(truth), (TEXT_OWNER,))


YES_NO_QUESTIONS: dict[str, Callable[[Scene, bool, np.random.Generator], Question | None]] = {
    "existence": _exists,
    "color": _has_color,
    "position": _has_side,
    "count": _has_count,
    "text": _has_text,
}


def _yes(truth: bool) -> str:
    return "Yes" if truth else "No"


def yes_no_question(
    scene: Scene, category: str, truth: bool, rng: np.random.Generator
) -> Question | None:
    """A question of `category` whose answer is `Yes` if `truth`, else `No`."""
    return YES_NO_QUESTIONS[category](scene, truth, rng)


def caption_question(scene: Scene) -> Question:
    """The request for a caption, worded as lmms-eval words it for COCO captions."""
    text = "Provide a one-sentence caption for the provided image."
    return Question("caption", text, scene.caption, _all_owners(scene))


# ------------------------------------------------------------------------- data sets

# How often each category comes up; existence is the question that needs most looking. Quadrants and
# the left or right half are in the training data only: the shipped model tells top from bottom, but
# never learnt to tell left from right.
_WEIGHTS = {
    "vqa": ("color", "shape", "count", "text"),
    "mcq": ("color", "shape", "count", "text"),
    "yn": ("existence", "color", "position", "count", "text", "existence"),
    "caption": ("caption",),
}


def _is_asked(question: Question) -> bool:
    """Whether the data sets ask this question."""
    return not any(f"the {side} half" in question.text for side in ("left", "right"))


def _ask(kind: str, category: str, turn: int, scene: Scene, rng: np.random.Generator) -> Any:
    if kind == "mcq":
        return choice_question(scene, category, LETTERS[turn % len(LETTERS)], rng)
    if kind == "yn":
        return yes_no_question(scene, category, turn % 2 == 0, rng)
    if kind == "vqa":
        return open_question(scene, category, rng)
    return caption_question(scene)


def samples(kind: str, seed: int, count: int) -> list[dict[str, Any]]:
    """`count` evaluation samples, each on a scene of its own; the same for the same arguments.

    Args:
        kind: `mcq`, `yn`, `vqa` or `caption`.
        seed: any whole number of at least 0; other seeds give other scenes.
        count: at least 1.

    Returns:
        one dictionary each: `index`, `kind`, `category`, `scene_seed`, `question`, `answer`, for
        multiple choice also `options` (four strings; `answer` is the letter).
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; accepted are {', '.join(KINDS)}.")
    check_count("count", count)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; a whole number of at least 0 is accepted.")
    rng = np.random.default_rng([KINDS.index(kind), seed])
    categories = _WEIGHTS[kind]
    used: set[int] = set()
    result = []
    for index in range(count):
        category = categories[index % len(categories)]
        # Moves on once a round, so that answers are even within each category as well.
        turn = index // len(categories) + index % len(categories)
        question = None
        while question is None or not _is_asked(question):
            scene_seed = int(rng.integers(FIRST_TRAINING_SEED))
            if scene_seed not in used:
                question = _ask(kind, category, turn, make_scene(scene_seed), rng)
        used.add(scene_seed)
        sample = {
            "index": index,
            "kind": kind,
            "category": category,
            "scene_seed": scene_seed,
            "question": question.text + (YES_NO_SUFFIX if kind == "yn" else ""),
            "answer": question.answer,
        }
        if question.options:
            sample["options"] = list(question.options)
        result.append(sample)
    order = rng.permutation(count)
    return [{**result[j], "index": i} for i, j in enumerate(order)]


def check_count(name: str, count: Any) -> None:
    """Raise unless `count` is a whole number of at least 1 (and small enough to have scenes)."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1_000_000:
        raise InputError(f"{name} is {count!r}; a whole number from 1 to 1,000,000 is accepted.")
