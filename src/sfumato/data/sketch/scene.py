"""Scene graphs of the sketch world: what is in a picture, where, and how the things stand to each other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from sfumato.errors import BadInput

from .shapes import OBJECTS

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("white", "sky", "grass", "night", "checkerboard", "dotted")
STYLES = ("flat", "outline", "chalk", "stripes", "pixel")
RELATIONS = ("left of", "right of", "above", "below", "inside")
CONTAINERS = ("circle", "square", "heart")
"""Objects with room for another one inside."""


@dataclass(frozen=True)
class Item:
    """One object: its centre (x right, y down) and longer side, as fractions of the picture's side."""

    object: str
    colour: str
    x: float
    y: float
    scale: float


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture.

    `relations` holds triples (subject index, relation, reference index) into `objects`; later objects are
    drawn over earlier ones.  `texture_seed` picks clouds, stars, hills and chalk grain.
    """

    objects: tuple[Item, ...]
    background: str
    style: str
    relations: tuple[tuple[int, str, int], ...] = ()
    texture_seed: int = 0

    def __post_init__(self) -> None:
        for word, known, what in (
            *((item.object, OBJECTS, "object") for item in self.objects),
            *((item.colour, COLOURS, "colour") for item in self.objects),
            (self.background, BACKGROUNDS, "background"),
            (self.style, STYLES, "style"),
        ):
            if word not in known:
                raise BadInput(f"the sketch world has no {what} {word!r}; it has {', '.join(known)}")
        for subject, relation, reference in self.relations:
            if relation not in RELATIONS:
                raise BadInput(f"the sketch world has no relation {relation!r}; it has {', '.join(RELATIONS)}")
            if not {subject, reference} <= set(range(len(self.objects))):
                raise BadInput(f"a relation names object {max(subject, reference)} of {len(self.objects)}, from 0 on")
            if subject == reference:
                raise BadInput(f"object {subject} cannot be {relation} itself: a relation is between two objects")

    def to_json(self) -> str:
        """The scene as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Inverse of `to_json`; raises BadInput when the text is not a scene."""
        try:
            data = json.loads(text)
            data["objects"] = tuple(Item(**item) for item in data["objects"])
            data["relations"] = tuple((int(a), str(r), int(b)) for a, r, b in data["relations"])
            return cls(**data)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadInput(f"this is not a scene written by Scene.to_json: {error}") from error


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _layout(
    rng: np.random.Generator, n: int, style: str
) -> tuple[list[tuple[float, float, float]], list[tuple[int, str, int]]]:
    """Places (x, y, scale) of n objects and the relations between them, in the order they are named."""
    jitter = lambda width: float(rng.uniform(-width, width))
    if n == 0:
        return [], []
    if n == 1:
        # Sprites need more blocks than other styles need pixels.
        low, high = (0.66, 0.76) if style == "pixel" else (0.56, 0.72)
        return [(0.5 + jitter(0.07), 0.5 + jitter(0.07), float(rng.uniform(low, high)))], []
    if n == 2:
        relation = _pick(rng, RELATIONS)
        if relation == "inside":
            x, y = 0.5 + jitter(0.04), 0.5 + jitter(0.04)
            outer, inner = float(rng.uniform(0.80, 0.86)), float(rng.uniform(0.34, 0.38))
            return [(x, y, inner), (x, y, outer)], [(0, relation, 1)]
        places = []
        for side in (-1, 1) if relation in ("left of", "above") else (1, -1):
            main, across = 0.5 + side * 0.235 + jitter(0.015), 0.5 + jitter(0.12)
            scale = float(rng.uniform(0.36, 0.42))
            x, y = (main, across) if relation in ("left of", "right of") else (across, main)
            places.append((x, y, scale))
        return places, [(0, relation, 1)]
    # Three objects: two side by side and the third centred above or below them.
    order = _pick(rng, ("left of", "right of"))
    level = _pick(rng, ("above", "below"))
    left, right = 0.26 + jitter(0.015), 0.74 + jitter(0.015)
    pair_y, third_y = (0.74, 0.26) if level == "above" else (0.26, 0.74)
    xs = (left, right) if order == "left of" else (right, left)
    scales = rng.uniform(0.34, 0.40, 3)
    places = [(x, pair_y + jitter(0.015), float(scale)) for x, scale in zip(xs, scales[:2], strict=True)]
    places.append((0.5 + jitter(0.12), third_y + jitter(0.015), float(scales[2])))
    return places, [(0, order, 1), (2, level, 0)]


def sample_scene(
    rng: np.random.Generator,
    n_objects: int = 1,
    *,
    object: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    style: str | None = None,
) -> Scene:
    """Draw a scene at random.

    Args:
        rng: the only source of randomness.
        n_objects: 0 to 3; objects of one scene differ in kind and in colour.
        object, colour: fixed for the first object where given.
        background, style: fixed for the picture where given.

    Raises:
        BadInput: for a word that the world does not know or another number of objects.
    """
    if not 0 <= n_objects <= 3:
        raise BadInput(f"a scene holds 0 to 3 objects, not {n_objects}")
    style = style if style is not None else _pick(rng, STYLES)
    places, relations = _layout(rng, n_objects, style)
    kinds = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))]
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
    if relations and relations[0][1] == "inside":
        # The container must have room: it goes second, and the object inside it differs from it.
        container = _pick(rng, tuple(word for word in CONTAINERS if word != object))
        kinds.remove(container)
        kinds.insert(1, container)
        if container == "heart":
            # A heart is widest above the middle of its bounding box.
            places[0] = (places[0][0], places[0][1] - 0.025, places[0][2] * 0.92)
    if object is not None:
        kinds = [object] + [word for word in kinds if word != object]
    if colour is not None:
        colours = [colour] + [word for word in colours if word != colour]
    items = [
        Item(kind, hue, round(x, 4), round(y, 4), round(scale, 4))
        for kind, hue, (x, y, scale) in zip(kinds, colours, places, strict=False)
    ]
    if relations and relations[0][1] == "inside":
        items, relations = [items[1], items[0]], [(1, "inside", 0)]
    return Scene(
        objects=tuple(items),
        background=background if background is not None else _pick(rng, BACKGROUNDS),
        style=style,
        relations=tuple(relations),
        texture_seed=int(rng.integers(2**31)),
    )
