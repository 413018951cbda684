"""Captions without what models write beside them.

Only what cannot be part of a caption goes: control tokens, tags around entities with their
coordinates, and the prompt where it is repeated in front.
"""

from __future__ import annotations

import re

from vlm_prune_ext.evals.examples import one_line

# <|im_end|>, <|endoftext|>, ...
_BARS = re.compile(r"<\|[^<>|\s][^<>|]{0,60}\|>")
_WORDS = (
    r"s|pad|unk|bos|eos|sep|cls|mask|image|img|video|IMG_CONTEXT|image_soft_token|im_patch|"
    r"im_start|im_end|start_of_image|end_of_image|start_of_turn|end_of_turn|end_of_utterance|"
    r"fake_token_around_image|global-img|row_\d+_col_\d+|grounding"
)
_SPECIAL = re.compile(rf"</?(?:{_WORDS})\s*/?>|\[/?INST\]|<</?SYS>>")
# Coordinates go with all that is in them; of marks around entities the words between stay.
_BOXES = re.compile(r"<(box|quad|poly)>.*?(?:</\1>|$)", re.DOTALL)
_PLACES = re.compile(r"<(?:patch_index_|loc_?|bbox_|seg_?)\d+>")
_ENTITIES = re.compile(r"</?(?:ref|phrase|p|object|obj|entity|delimiter_of_multi_objects)\s*/?>")

# Around a repeated prompt: who speaks in front of it, and who answers behind it.
_ASKER = re.compile(r"(?:user|human|question)\s*(:?)\s*", re.IGNORECASE)
_ANSWERER = r"(?:assistant|model|(?:short )?answer)"
_OPENING = re.compile(rf"{_ANSWERER}\s*:\s*", re.IGNORECASE)
_OPENING_OF_TURN = re.compile(rf"{_ANSWERER}\b\s*:?\s*", re.IGNORECASE)
_ASSISTANT = re.compile(r"(?:ASSISTANT|Assistant)\s*:\s*")


def clean(text: str, prompt: str = "") -> str:
    """A caption on one line, without control tokens, entity tags and the repeated prompt.

    Cleaning what is clean changes nothing.

    >>> clean("<|im_start|> A <ref>red square</ref><box>[[1, 2, 3, 4]]</box>.</s>")
    'A red square.'
    >>> clean("USER: What is this? ASSISTANT: A cat.", "What is this?")
    'A cat.'
    """
    return drop_prompt(drop_tags(text), prompt)


def drop_tags(text: str) -> str:
    """Without control tokens and entity tags, on one line."""
    before = None
    while before != text:  # taking one out may put the next together
        before = text
        text = _PLACES.sub("", _BOXES.sub("", text))
        text = _SPECIAL.sub(" ", _BARS.sub(" ", _ENTITIES.sub("", text)))
    return one_line(text)


def drop_prompt(text: str, prompt: str) -> str:
    """Without the prompt in front, however often it is repeated there, and without the names of
    the speakers that a chat template puts around it.

    Letter case and blanks may differ. A caption that only begins like the prompt stays.
    """
    text, asked = one_line(text), one_line(drop_tags(prompt))
    while True:
        text = text[_end(_ASSISTANT, text) :]
        rest = _behind(text, asked) if asked else None
        if rest is None:
            return text
        text = rest


def _behind(text: str, prompt: str) -> str | None:
    """What follows the prompt; ``None`` where the text does not begin with it."""
    lead = _end(_ASKER, text)
    for start in dict.fromkeys((0, lead)):
        end = start + len(prompt)
        if text[start:end].lower() != prompt.lower():
            continue
        rest = text[end:]
        if rest and rest[0].isalnum() and prompt[-1].isalnum():
            continue  # "a photo" and "a photograph"
        rest = rest.lstrip()
        opening = _OPENING_OF_TURN if start else _OPENING
        return rest[_end(opening, rest) :].lstrip(" :-" if not start else " ")
    return None


def _end(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    return found.end() if found else 0
