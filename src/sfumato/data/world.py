"""The vocabulary of the sketch world, and whether a model speaks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import sketch

WORDS: dict[str, tuple[str, ...]] = {
    "object": sketch.OBJECTS,
    "colour": sketch.COLOURS,
    "background": sketch.BACKGROUNDS,
    "style": sketch.STYLES,
}
"""Attribute -> the sketch world's words, in the order of a prompt's arguments."""


def vocabulary(tokenizer: Any) -> Mapping[str, tuple[str, ...]]:
    """The words of the world that a tokenizer was made for, by attribute; empty where it is no world of ours.

    A small vocabulary in which each of the sketch world's words is one token is that of a model trained on it.
    """
    if len(tokenizer) > 10_000:
        return {}
    words = [w for known in WORDS.values() for w in known]
    return WORDS if all(len(ids) == 3 for ids in tokenizer(words).input_ids) else {}
