"""The many ways in which people ask for a scene: bare words, partial captions, other orders, plurals."""

from __future__ import annotations

import numpy as np

from .captions import FULL, WITHOUT_BACKGROUND, WITHOUT_STYLE, article, caption, compose, prompt
from .mix import is_inside
from .scene import Item, Scene

CANONICAL = 0.4
"""Share of captions that `caption` phrases."""
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_RELATED: dict[str, tuple[str, ...]] = {
    "left of": ("{a} to the left of {b}", "{a} on the left and {b} on the right"),
    "right of": ("{a} to the right of {b}", "{a} on the right and {b} on the left"),
    "above": ("{a} over {b}", "{a} on top and {b} below"),
    "below": ("{a} under {b}", "{a} under {b}"),
    "inside": ("{a} in {b}", "{b} with {a} inside"),
}
_ALIKE = {"left of": "side by side", "right of": "side by side", "above": "one above the other"}
_ALIKE["below"] = _ALIKE["above"]
_WHERE = {
    "white": "on white",
    "sky": "in the sky",
    "grass": "on grass",
    "night": "at night",
    "checkerboard": "on a checkerboard",
    "dotted": "on dots",
}
_SHORT = (
    "{subject}, {style}",
    "{subject}, {background}",
    "{subject} {where}",
    "{subject} {where}, {style}",
    "{subject}, {background}, {style}",
    "{a_style} drawing of {subject}",
    "{subject} in {style} style",
    "{subject} on {a_background} background",
)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of the scene as people write them, at most 28 words.

    `CANONICAL` of them are `caption`'s. The others say what stands where in other words and orders, or only that
    both are there ("a star and a red fish"), count objects that are alike ("two red stars"), leave out a colour or
    an article now and then, and name background and style in full, in short, or not at all.
    """
    if not scene.objects or rng.random() < CANONICAL:
        return caption(scene, rng)
    subject = _subject(scene, rng)
    draw = rng.random()
    if draw < 0.35:
        templates = FULL if rng.random() < 0.6 else (*WITHOUT_STYLE, *WITHOUT_BACKGROUND)
        template = templates[0] if rng.random() < 0.4 else _pick(rng, templates)
    else:
        template = _pick(rng, _SHORT) if draw < 0.65 else "{subject}"
    template = template.replace("{where}", _WHERE[scene.background])
    return compose(template, subject, scene.background, scene.style)


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _name(item: Item, rng: np.random.Generator, bare: bool, articles: bool) -> str:
    """ "a red star"; without its colour when ``bare``, and without the article when not ``articles``."""
    words = item.object if bare else f"{item.colour} {item.object}"
    return article(words) if articles else words


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    """The noun phrase for all objects of a scene."""
    items, articles = scene.objects, rng.random() < 0.85
    if len(items) == 1:
        if rng.random() < 0.04:
            return prompt(colour=items[0].colour)
        return _name(items[0], rng, rng.random() < 0.3, articles)
    if len(items) == 2 and (items[0].object, items[0].colour) == (items[1].object, items[1].colour):
        return _alike(scene, rng)
    # Colours are left out where the objects' names alone tell them apart; of all, or of one.
    apart = len({item.object for item in items}) == len(items)
    none, some = apart and rng.random() < 0.1, apart and rng.random() < 0.1
    names = [_name(item, rng, none or (some and rng.random() < 0.5), articles) for item in items]
    if not is_inside(scene) and rng.random() < 0.4:
        order = rng.permutation(len(names))
        names = [names[i] for i in order]
        if len(names) == 2:
            return _pick(rng, ("{0} and {1}", "{0} and {1}", "{0} and {1}", "{0} with {1}", "{0}, {1}")).format(*names)
        return ", ".join(names[:-1]) + " and " + names[-1]
    phrases = []
    for i, (subject, relation, reference) in enumerate(scene.relations):
        if relation in INVERSE and rng.random() < 0.5:
            subject, relation, reference = reference, INVERSE[relation], subject
        a, b = names[subject], names[reference]
        if i:  # who is named again is "the star"
            a, b = (name if k == 2 else f"the {items[k].object}" for k, name in ((subject, a), (reference, b)))
        form = _pick(rng, _RELATED[relation]) if rng.random() < 0.5 and len(items) == 2 else f"{{a}} {relation} {{b}}"
        phrases.append(form.format(a=a, b=b))
    return " and ".join(phrases)


def _alike(scene: Scene, rng: np.random.Generator) -> str:
    """ "two red stars": of two objects that are the same."""
    item, draw = scene.objects[0], rng.random()
    many = item.object + ("es" if item.object.endswith(("s", "sh")) else "s")
    text = f"two {many}" if draw < 0.15 else f"two {item.colour} {many}"
    return text + " " + _ALIKE[scene.relations[0][1]] if rng.random() < 0.4 else text
