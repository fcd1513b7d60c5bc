"""The vocabulary of the sketch world, and whether a model speaks it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import sketch

WORDS: dict[str, tuple[str, ...]] = {
    "object": sketch.OBJECTS,
    "colour": sketch.COLOURS,
    "background": sketch.BACKGROUNDS,
    "style": sketch.STYLES,
}
"""Attribute -> the sketch world's words, in the order of a prompt's arguments."""
SMALL = 10_000
"""A vocabulary below this size knows whole words or nothing."""


def vocabulary(tokenizer: Any) -> Mapping[str, tuple[str, ...]]:
    """The words of the world that a tokenizer was made for, by attribute; empty where it is no world of ours.

    A small vocabulary in which each of the sketch world's words is one token is that of a model trained on it.
    """
    if len(tokenizer) > SMALL:
        return {}
    words = [w for known in WORDS.values() for w in known]
    return WORDS if all(len(ids) == 1 for ids in _pieces(tokenizer, words)) else {}


def strangers(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Words of the prompts that a small tokenizer can only spell, each once; a large vocabulary knows any word.

    What a model draws for them is chance: it has never seen them. Names in angle brackets are learned words.
    """
    if len(tokenizer) > SMALL:
        return []
    plain = [re.sub(r"<[^>]*>", " ", prompt.lower()) for prompt in prompts]
    words = dict.fromkeys(w for prompt in plain for w in re.findall(r"[^\W\d_]+", prompt))
    return [word for word, ids in zip(words, _pieces(tokenizer, list(words)), strict=True) if len(ids) > 1]


def _pieces(tokenizer: Any, words: list[str]) -> list[list[int]]:
    """The tokens of each word, without those that open and close a prompt: CLIP has both of these, T5 the last."""
    return tokenizer(words, add_special_tokens=False).input_ids if words else []
