"""Questions with known answers over a scene, in the four formats of the demo data sets.

Answers are balanced on purpose (even numbers of `Yes` and `No`, of each letter, of each count), so
that a constant answer, or a model that does not look, stays near chance. Categories need different
amounts of the picture: `color`, `shape`, `existence` and `position` one object, `relation` and
`comparison` two, `count` all of them, `text` each character of a sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_prune_ext.errors import InputError

from .drawing import (
    CHARACTERS,
    COLORS,
    FIRST_TRAINING_SEED,
    MAX_OBJECTS,
    QUADRANTS,
    SHAPES,
    Scene,
    SceneObject,
    make_scene,
)

KINDS = ("mcq", "yn", "vqa", "caption")
LETTERS = "ABCD"
YES_NO_SUFFIX = " Please answer yes or no."
TEXT_OWNER = -1
# Which of two objects is further left (or up) is not asked when they are closer than this.
_CLEAR = 24.0
# A caption names at most so many objects.
CAPTION_OBJECTS = 5


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


def _counted(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """What is counted, in the plural, and which objects that are: all, or those of a shape or
    colour (seldom one that is there once only)."""
    field = _one_of(rng, ("all", "all", "shape", "color"))
    value = "" if field == "all" else getattr(_one_of(rng, scene.objects), field)
    owners = tuple(i + 1 for i, o in enumerate(scene.objects) if getattr(o, field, "") == value)
    if field == "all" or (len(owners) == 1 and rng.random() < 0.8):
        return "shapes", _all_owners(scene)
    if field == "color":
        return f"{value} shapes", owners
    return value + ("es" if value == "cross" else "s"), owners


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    what, owners = _counted(scene, rng)
    text = _one_of(rng, ("How many {} are there?", "How many {} are in the image?"))
    return Question("count", text.format(what), str(len(owners)), owners)


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
    text = _one_of(rng, ("What does the sign say?", "What is written on the sign?"))
    return Question("text", text, scene.text.text, (TEXT_OWNER,))


# The word for each way, the coordinate it is about, and whether more of it is further that way.
_EXTREMES = {
    "to the left": ("x", -1),
    "to the right": ("x", 1),
    "to the top": ("y", -1),
    "to the bottom": ("y", 1),
}
_SIDES = {"x": ("left", "right", "left or right of"), "y": ("above", "below", "above or below")}


def _pair(scene: Scene, axis: str, rng: np.random.Generator) -> tuple[int, int] | None:
    """Two objects that are clearly apart along an axis."""
    places = [getattr(o, axis) for o in scene.objects]
    clear = [
        (i, j)
        for i, a in enumerate(places)
        for j, b in enumerate(places)
        if i != j and abs(a - b) >= _CLEAR
    ]
    return _one_of(rng, clear) if clear else None


def _furthest(items: list[tuple[int, SceneObject]], way: str) -> int | None:
    """Which of some objects is furthest that way; `None` when the next is as good as there."""
    axis, sign = _EXTREMES[way]
    ranked = sorted(items, key=lambda pair: -sign * getattr(pair[1], axis))
    first, second = (getattr(item, axis) for _, item in ranked[:2])
    return ranked[0][0] if abs(first - second) >= _CLEAR / 2 else None


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) < 2:
        return None
    if rng.random() < 0.4:
        way = _one_of(rng, tuple(_EXTREMES))
        index = _furthest(list(enumerate(scene.objects)), way)
        if index is None:
            return None
        text = f"What is furthest {way}?"
        return Question("relation", text, scene.objects[index].name, _all_owners(scene))
    axis = _one_of(rng, ("x", "y"))
    pair = _pair(scene, axis, rng)
    if pair is None:
        return None
    one, other = (scene.objects[i] for i in pair)
    less, more, words = _SIDES[axis]
    answer = less if getattr(one, axis) < getattr(other, axis) else more
    text = f"Is the {one.name} {words} the {other.name}?"
    return Question("relation", text, answer, (pair[0] + 1, pair[1] + 1))


OPEN_QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "position": _ask_position,
    "text": _ask_text,
    "relation": _ask_relation,
}


def _other_sign(string: str, rng: np.random.Generator) -> str:
    """Another sign of the same length."""
    other = string
    while other == string:
        other = "".join(_one_of(rng, CHARACTERS) for _ in string)
    return other


def _wrong_counts(count: int, rng: np.random.Generator) -> list[str]:
    """Other counts, near ones first."""
    near = sorted(
        (n for n in range(1, MAX_OBJECTS + 1) if n != count),
        key=lambda n: abs(n - count) + float(rng.random()),
    )
    return [str(n) for n in near]


def _distractors(scene: Scene, question: Question, rng: np.random.Generator) -> list[str]:
    """Three wrong options; those that other objects of the scene make tempting come first."""
    if question.category == "text":
        return list({_other_sign(question.answer, rng): None for _ in range(9)})[:3]
    if question.category == "count":
        return _wrong_counts(int(question.answer), rng)[:3]
    pool = {"color": tuple(COLORS), "shape": SHAPES, "position": QUADRANTS}[question.category]
    tempting = {
        "color": {o.color for o in scene.objects},
        "shape": {o.shape for o in scene.objects},
    }.get(question.category, set())
    others = [a for a in pool if a != question.answer]
    shuffled = [others[i] for i in rng.permutation(len(others))]
    return sorted(shuffled, key=lambda a: a not in tempting)[:3]


def _choose_relation(scene: Scene, rng: np.random.Generator) -> tuple[Question, list[str]] | None:
    """Which of four objects is furthest one way."""
    if len(scene.objects) < 4:
        return None
    chosen = [int(i) for i in rng.permutation(len(scene.objects))[:4]]
    way = _one_of(rng, tuple(_EXTREMES))
    index = _furthest([(i, scene.objects[i]) for i in chosen], way)
    if index is None:
        return None
    owners = tuple(i + 1 for i in chosen)
    text = f"Which of these is furthest {way}?"
    question = Question("relation", text, scene.objects[index].name, owners)
    return question, [scene.objects[i].name for i in chosen if i != index]


def open_question(scene: Scene, category: str, rng: np.random.Generator) -> Question | None:
    """A question of `category` with a one-word (or, for quadrants, two-word) answer."""
    return OPEN_QUESTIONS[category](scene, rng)


def choice_question(
    scene: Scene, category: str, letter: str, rng: np.random.Generator
) -> Question | None:
    """The same as a multiple choice whose right answer is `letter`."""
    if category == "relation":
        made = _choose_relation(scene, rng)
        if made is None:
            return None
        question, options = made
    else:
        found = open_question(scene, category, rng)
        if found is None:
            return None
        question, options = found, _distractors(scene, found, rng)
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
        if crossed and rng.random() < 0.8:
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
    what, owners = _counted(scene, rng)
    count = str(len(owners))
    if not truth:
        count = _wrong_counts(len(owners), rng)[int(rng.integers(3))]
    text = f"Is the number of {what} in the image {count}?"
    return Question("count", text, _yes(truth), owners)


def _has_text(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    if scene.text is None:
        return None
    shown = scene.text.text if truth else _other_sign(scene.text.text, rng)
    return Question("text", f"Does the sign say {shown}?", _yes(truth), (TEXT_OWNER,))


def _has_relation(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    axis = _one_of(rng, ("x", "y"))
    pair = _pair(scene, axis, rng)
    if pair is None:
        return None
    one, other = (scene.objects[i] for i in pair)
    words = ("to the left of", "to the right of") if axis == "x" else ("above", "below")
    is_less = getattr(one, axis) < getattr(other, axis)
    text = f"Is the {one.name} {words[is_less != truth]} the {other.name}?"
    return Question("relation", text, _yes(truth), (pair[0] + 1, pair[1] + 1))


def _compares(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    """Size or colour of two objects."""
    if rng.random() < 0.5:
        return _compares_colors(scene, truth, rng)
    pairs = [
        (i, j)
        for i, a in enumerate(scene.objects)
        for j, b in enumerate(scene.objects)
        if a.size != b.size
    ]
    if not pairs:
        return None
    i, j = _one_of(rng, pairs)
    one, other = scene.objects[i], scene.objects[j]
    word = ("smaller", "larger")[(one.size == "large") == truth]
    text = f"Is the {one.name} {word} than the {other.name}?"
    return Question("comparison", text, _yes(truth), (i + 1, j + 1))


def _compares_colors(scene: Scene, truth: bool, rng: np.random.Generator) -> Question | None:
    alone = _unique([o.shape for o in scene.objects])
    pairs = [
        (i, j)
        for i in alone
        for j in alone
        if i != j and (scene.objects[i].color == scene.objects[j].color) == truth
    ]
    if not pairs:
        return None
    i, j = _one_of(rng, pairs)
    one, other = scene.objects[i].shape, scene.objects[j].shape
    text = f"Do the {one} and the {other} have the same color?"
    return Question("comparison", text, _yes(truth), (i + 1, j + 1))


YES_NO_QUESTIONS: dict[str, Callable[[Scene, bool, np.random.Generator], Question | None]] = {
    "existence": _exists,
    "color": _has_color,
    "position": _has_side,
    "count": _has_count,
    "text": _has_text,
    "relation": _has_relation,
    "comparison": _compares,
}


def _yes(truth: bool) -> str:
    return "Yes" if truth else "No"


def yes_no_question(
    scene: Scene, category: str, truth: bool, rng: np.random.Generator
) -> Question | None:
    """A question of `category` whose answer is `Yes` if `truth`, else `No`."""
    return YES_NO_QUESTIONS[category](scene, truth, rng)


def caption_question(scene: Scene) -> Question | None:
    """The request for a caption, worded as lmms-eval words it for COCO captions; `None` where there
    are more things than a caption names."""
    if len(scene.objects) > CAPTION_OBJECTS:
        return None
    text = "Provide a one-sentence caption for the provided image."
    return Question("caption", text, scene.caption, _all_owners(scene))


# ------------------------------------------------------------------------- data sets

# How often each category comes up; existence is the question that needs most looking.
_WEIGHTS = {
    "vqa": tuple(OPEN_QUESTIONS),
    "mcq": tuple(OPEN_QUESTIONS),
    "yn": (*YES_NO_QUESTIONS, "existence"),
    "caption": ("caption",),
}


def _ask(kind: str, category: str, turn: int, scene: Scene, rng: np.random.Generator) -> Any:
    if kind == "mcq":
        return choice_question(scene, category, LETTERS[turn % len(LETTERS)], rng)
    if kind == "yn":
        return yes_no_question(scene, category, turn % 2 == 0, rng)
    if kind == "vqa":
        return open_question(scene, category, rng)
    return caption_question(scene)


def samples(kind: str, seed: int, count: int, category: str | None = None) -> list[dict[str, Any]]:
    """`count` evaluation samples, each on a scene of its own; the same for the same arguments.

    Args:
        kind: `mcq`, `yn`, `vqa` or `caption`.
        seed: any whole number of at least 0; other seeds give other scenes.
        count: at least 1.
        category: one of the kind's, for all; `None`: each in its turn.

    Returns:
        one dictionary each: `index`, `kind`, `category`, `scene_seed`, `question`, `answer`, for
        multiple choice also `options` (four strings; `answer` is the letter).
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; accepted are {', '.join(KINDS)}.")
    check_count("count", count)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; a whole number of at least 0 is accepted.")
    categories, stream = _WEIGHTS[kind], [KINDS.index(kind), seed]
    if category is not None:
        if category not in categories:
            known = ", ".join(dict.fromkeys(categories))
            raise InputError(f"category is {category!r}; accepted for {kind} are {known}.")
        stream, categories = [*stream, 1 + categories.index(category)], (category,)
    rng = np.random.default_rng(stream)
    used: set[int] = set()
    result = []
    for index in range(count):
        category = categories[index % len(categories)]
        # Moves on once a round, so that answers are even within each category as well.
        turn = index // len(categories) + index % len(categories)
        question = None
        while question is None:
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
