"""What a text-to-image model of the sketch world learns from: mostly two objects, and every scene beside its twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .scene import BACKGROUNDS, COLOURS, Scene, sample_scene
from .shapes import OBJECTS

SHARES = (0.03, 0.32, 0.50, 0.15)
"""Shares of scenes with no, one, two and three objects."""
ALIKE = 0.08
"""Share of the scenes of two, none inside the other, that show the same object twice in the same colour."""
SAME_OBJECT, SAME_COLOUR = 0.05, 0.10
"""Shares of the same scenes whose objects are of one kind, or of one colour, and differ in the other."""


def training_scene(rng: np.random.Generator) -> Scene:
    """A random scene of `SHARES` objects; in some scenes of two they share their kind, their colour or both."""
    scene = sample_scene(rng, int(rng.choice(len(SHARES), p=SHARES)))
    if len(scene.objects) != 2 or is_inside(scene):
        return scene
    draw, (first, second) = rng.random(), scene.objects
    if draw < ALIKE:
        second = replace(second, object=first.object, colour=first.colour)
    elif draw < ALIKE + SAME_OBJECT:
        second = replace(second, object=first.object)
    elif draw < ALIKE + SAME_OBJECT + SAME_COLOUR:
        second = replace(second, colour=first.colour)
    return replace(scene, objects=(first, second))


def twin(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed that only its caption tells apart.

    Of two or three objects, two exchange their colours, their kinds, or both (that is, their places); where one lies
    inside the other, their colours. A single object changes its kind, its colour or its background; objects that are
    alike in both no longer are. Places, style and texture stay.
    """
    items = list(scene.objects)
    if len(items) < 2:
        change = ("background", "object", "colour")[int(rng.integers(3)) if items else 0]
        if change == "background":
            return replace(scene, background=_other(BACKGROUNDS, scene.background, rng))
        words = OBJECTS if change == "object" else COLOURS
        other: dict[str, Any] = {change: _other(words, getattr(items[0], change), rng)}
        return replace(scene, objects=(replace(items[0], **other),))
    a, b = sorted(rng.permutation(len(items))[:2])
    first, second = items[a], items[b]
    kinds, colours = first.object != second.object, first.colour != second.colour
    if not kinds and not colours:
        items[b] = replace(second, colour=_other(COLOURS, second.colour, rng))
        return replace(scene, objects=tuple(items))
    which = int(rng.integers(3))
    if colours and (is_inside(scene) or not kinds or which != 1):
        items[a], items[b] = replace(items[a], colour=second.colour), replace(items[b], colour=first.colour)
    if kinds and not is_inside(scene) and (not colours or which != 0):
        items[a], items[b] = replace(items[a], object=second.object), replace(items[b], object=first.object)
    return replace(scene, objects=tuple(items))


def is_inside(scene: Scene) -> bool:
    """Whether one object lies inside another."""
    return any(relation == "inside" for _, relation, _ in scene.relations)


def _other(words: tuple[str, ...], word: str, rng: np.random.Generator) -> str:
    rest = [w for w in words if w != word]
    return rest[int(rng.integers(len(rest)))]
