"""Words for scenes: the canonical phrasing of prompts, and the several phrasings of training captions."""

from __future__ import annotations

import numpy as np

from .scene import Item, Scene

FULL = (
    "{subject} on {a_background} background, {style} style",
    "{a_style} style picture of {subject} on {a_background} background",
    "{subject} in {style} style, {background} background",
    "{a_background} background with {subject}, {style} style",
    "a picture of {subject} in {style} style on {a_background} background",
)
WITHOUT_STYLE = ("{subject} on {a_background} background", "a picture of {subject}, {background} background")
WITHOUT_BACKGROUND = ("{subject}, {style} style", "{a_style} style picture of {subject}")


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def compose(template: str, subject: str, background: str, style: str) -> str:
    return template.format(
        subject=subject,
        background=background,
        style=style,
        a_background=article(background),
        a_style=article(style),
    )


def prompt(
    object: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    style: str | None = None,
) -> str:
    """The canonical phrasing, e.g. "a red star on a sky background, chalk style"; any part may be left out.

    Without an object the subject is "a shape" when something else must carry the colour or style, and
    a background alone reads "an empty sky background".  Nothing at all is the empty prompt.
    """
    if object is None and colour is None and style is None:
        return f"an empty {background} background" if background else ""
    words = [word for word in (colour, object or "shape") if word]
    text = article(" ".join(words))
    if background is not None:
        text += f" on {article(background)} background"
    if style is not None:
        text += f", {style} style"
    return text


def _name(item: Item, colour: bool = True) -> str:
    return article(f"{item.colour} {item.object}" if colour else item.object)


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    """The noun phrase for all objects of a scene, with its relations."""
    items = scene.objects
    if len(items) == 1:
        draw = rng.random()
        if draw < 0.04:
            return prompt(colour=items[0].colour)
        return _name(items[0], colour=draw < 0.94)
    if not scene.relations:
        return ", ".join(_name(item) for item in items[:-1]) + " and " + _name(items[-1])
    subject, relation, reference = scene.relations[0]
    text = f"{_name(items[subject])} {relation} {_name(items[reference])}"
    for subject, relation, reference in scene.relations[1:]:
        text += f" and {_name(items[subject])} {relation} the {items[reference].object}"
    return text


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene in one of several phrasings, at most 28 words.

    Background and style are both named in about 72 % of the captions; of the others, half leave out one of
    them and a few name the objects only.  A scene without objects is "an empty ... background".
    """
    if not scene.objects:
        return prompt(background=scene.background)
    subject = _subject(scene, rng)
    draw = rng.random()
    if draw < 0.72:
        # The canonical phrasing is the one that prompts use, so it is the most frequent.
        choice = 0 if rng.random() < 0.4 else int(rng.integers(1, len(FULL)))
        template = FULL[choice]
    elif draw < 0.84:
        template = WITHOUT_STYLE[rng.integers(len(WITHOUT_STYLE))]
    elif draw < 0.95:
        template = WITHOUT_BACKGROUND[rng.integers(len(WITHOUT_BACKGROUND))]
    else:
        template = "{subject}"
    return compose(template, subject, scene.background, scene.style)
