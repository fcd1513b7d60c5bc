"""Scene graphs: objects by name, how they stand to each other, and where they are, where that is known.

JSON as the field writes it: ``{"objects": ["cow", "grass"], "relationships": [[0, "above", 1]]}``, one graph or a list
of them; ``"boxes": [[x0, y0, x1, y1], ...]``, fractions of the picture's sides, say where the objects are.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato.errors import BadInput, unknown
from sfumato.foreign import read_json, reading, shaped

from .base import Pictures
from .folders import FolderPictures
from .sketch import COLOURS, OBJECTS, Item, Scene
from .toys import ScenePictures, SketchPictures

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of the picture's sides."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
IMAGE, IN_IMAGE = "__image__", "__in_image__"
"""The node that stands for the picture, and the relation of every object to it."""
SPATIAL = ("left of", "right of", "above", "below", "inside", "surrounding")
_ORDERS = {"left of": "right of", "above": "below", "inside": "surrounding"}
_FORM = 'write it like {"objects": ["star", "fish"], "relationships": [[0, "left of", 1]]}'


@dataclass(frozen=True)
class SceneGraph:
    """Objects, triples (subject, relation, reference) of places in ``objects``, and a box for each object, if known.

    Raises:
        BadInput: a triple that names no object or one object twice; boxes that are not one for each, or none.
    """

    objects: tuple[str, ...]
    relationships: tuple[tuple[int, str, int], ...] = ()
    boxes: tuple[Box, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.objects)
        for subject, relation, reference in self.relationships:
            if not (0 <= subject < n and 0 <= reference < n):
                raise BadInput(f"a relation names object {max(subject, reference, key=abs)} of {n}, from 0 on")
            if subject == reference:
                raise BadInput(f"object {subject} cannot be {relation!r} itself: a relation is between two objects")
        if self.boxes is not None and len(self.boxes) != n:
            raise BadInput(f"{len(self.boxes)} boxes for {n} objects: give one for each, or leave the boxes out")
        for box in self.boxes or ():
            if not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
                raise BadInput(f"a box is left, top, right, bottom, each from 0 to 1 and in that order, not {box}")


def from_json(data: Any, where: str) -> SceneGraph:
    """A graph from what JSON gave; ``where`` stands for it in the refusal.

    Raises:
        BadInput: it has another form.
    """
    shaped(data, {"objects": list, "relationships": list | None, "boxes": list | None}, where, _FORM)
    names, triples, boxes = data["objects"], data.get("relationships") or [], data.get("boxes")
    if not all(isinstance(name, str) for name in names):
        raise BadInput(f"objects in {where} are names: {_FORM}")
    if IMAGE in names:
        raise BadInput(f"{where} has the picture itself among its objects: leave {IMAGE} out, every graph gets it")
    number = lambda x, kind: isinstance(x, kind) and not isinstance(x, bool)
    for triple in triples:
        fits = isinstance(triple, list) and len(triple) == 3 and isinstance(triple[1], str)
        if not fits or not (number(triple[0], int) and number(triple[2], int)):
            raise BadInput(f"a relation in {where} is two places among the objects and a word between them: {_FORM}")
    for box in boxes or ():
        if not isinstance(box, list) or len(box) != 4 or not all(number(x, int | float) and 0 <= x <= 1 for x in box):
            raise BadInput(f"a box in {where} is four numbers, [left, top, right, bottom] from 0 to 1: {_FORM}")
    made: Any = None if boxes is None else tuple(tuple(map(float, box)) for box in boxes)
    return SceneGraph(tuple(names), tuple((a, word, b) for a, word, b in triples), made)


def read_graphs(file: str | Path) -> list[SceneGraph]:
    """All graphs of a JSON file, which holds one or a list of them.

    Raises:
        BadInput: it cannot be read, holds none, or one of another form.
    """
    data = read_json(file, dict | list, _FORM)
    several = data if isinstance(data, list) else [data]
    if not several:
        raise BadInput(f"{file} holds no graph: {_FORM}")
    single = len(several) == 1
    return [from_json(each, str(file) if single else f"graph {i} of {file}") for i, each in enumerate(several)]


def require_drawable(graph: SceneGraph) -> None:
    """Refuse what no picture can show.

    A directed circle is none by itself ("a left of b" and "b right of a" is one); things that go round are: "a left of
    b, b left of a", also by way of others or said the other way round. Other words than `SPATIAL` may go round.

    Raises:
        BadInput: a graph without objects, or one with such a circle, which is named.
    """
    if not graph.objects:
        raise BadInput(f"an empty graph shows nothing: name at least one object; {_FORM}")
    for forward, backward in _ORDERS.items():
        after: dict[int, list[int]] = {}
        for a, word, b in graph.relationships:
            if word in (forward, backward):
                after.setdefault(a if word == forward else b, []).append(b if word == forward else a)
        if circle := _circle(after):
            names = f" {forward} ".join(f"{graph.objects[i]} ({i})" for i in circle)
            raise BadInput(f"no picture shows a circle: {names}; take one of these relations out")


def _circle(after: dict[int, list[int]]) -> list[int]:
    """The places of a directed circle, the first again at the end; none: empty."""
    done: set[int] = set()
    for start in after:
        way, branches = [start], [iter(after[start])]
        while branches and start not in done:
            following = next(branches[-1], None)
            if following is None:
                done.add(way.pop())
                branches.pop()
            elif following in way:
                return [*way[way.index(following) :], following]
            elif following not in done:
                way.append(following)
                branches.append(iter(after.get(following, ())))
    return []


@dataclass(frozen=True)
class Vocabulary:
    """The names that a model knows; number 0 is the picture itself, and its relation."""

    objects: tuple[str, ...]
    relations: tuple[str, ...]

    @classmethod
    def of(cls, objects: Sequence[str], relations: Sequence[str]) -> Vocabulary:
        return cls((IMAGE, *objects), (IN_IMAGE, *relations))

    def encode(self, graph: SceneGraph) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Numbers of the objects and last of the picture; (subject, relation, reference), the picture's last.

        Raises:
            BadInput: names that are not known.
        """
        for word, known, what in chain(
            ((name, self.objects, "object") for name in graph.objects),
            ((word, self.relations, "relation") for _, word, _ in graph.relationships),
        ):
            if word not in known[1:]:
                raise unknown(f"{what} of this model", word, known[1:])
        n = len(graph.objects)
        triples = [(a, self.relations.index(word), b) for a, word, b in graph.relationships]
        return [*map(self.objects.index, graph.objects), 0], [*triples, *((i, 0, n) for i in range(n))]


# Relations from boxes


def spatial_relation(subject: Sequence[float], other: Sequence[float], centres: Sequence[Any] | None = None) -> str:
    """How the box ``subject`` stands to the box ``other``, as COCO's graphs are made (sg2im, arXiv:1804.01622).

    "surrounding" where it strictly contains the other and "inside" where it is contained; else by the angle of
    d = centre(subject) - centre(other): |theta| >= 3 pi / 4 is left of, from -3 pi / 4 to -pi / 4 above, to pi / 4
    right of, else below.

    Args:
        centres: two pairs (x, y), where the objects' masks say it better than the boxes' middles.
    """
    s, o = [float(x) for x in subject], [float(x) for x in other]
    if s[0] < o[0] and s[2] > o[2] and s[1] < o[1] and s[3] > o[3]:
        return "surrounding"
    if s[0] > o[0] and s[2] < o[2] and s[1] > o[1] and s[3] < o[3]:
        return "inside"
    middles = centres or [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (s, o)]
    (sx, sy), (ox, oy) = middles
    theta, quarter = math.atan2(float(sy) - float(oy), float(sx) - float(ox)), math.pi / 4
    if abs(theta) >= 3 * quarter:
        return "left of"
    if theta < -quarter:
        return "above"
    return "right of" if theta < quarter else "below"


def drawn_relations(boxes: Sequence[Sequence[float]], rng: torch.Generator) -> tuple[tuple[int, str, int], ...]:
    """One relation for each object: with a random partner, in a random order; none where it is alone.

    By the middles of boxes, where COCO's graphs go by those of masks.
    """
    triples = []
    for i in range(len(boxes) if len(boxes) > 1 else 0):
        other = int(torch.randint(len(boxes) - 1, (), generator=rng))
        other += other >= i
        a, b = (i, other) if float(torch.rand((), generator=rng)) > 0.5 else (other, i)
        triples.append((a, spatial_relation(boxes[a], boxes[b]), b))
    return tuple(triples)


# Pictures with graphs


class GraphPictures(Pictures):
    """Pictures of which the scene graph is known, with boxes; ``vocabulary`` has all names that occur."""

    vocabulary: Vocabulary
    most: int
    """The largest number of objects in a graph."""

    @abstractmethod
    def graph(self, index: int) -> SceneGraph:
        """What picture ``index`` shows, with a box for each object."""


class SketchGraphs(GraphPictures):
    """The sketch world's scenes; an object is called by colour and kind, as in "red star"."""

    most = 3

    def __init__(self, world: SketchPictures):
        self.world = world
        self.vocabulary = Vocabulary.of([f"{colour} {kind}" for colour in COLOURS for kind in OBJECTS], SPATIAL)

    def __len__(self) -> int:
        return len(self.world)

    def caption(self, index: int) -> str:
        return self.world.caption(index)

    def picture(self, index: int) -> np.ndarray:
        return self.world.picture(index)

    def graph(self, index: int) -> SceneGraph:
        return graph_of(self.world.scene(index))


def graph_of(scene: Scene) -> SceneGraph:
    """The graph of a scene of the sketch world. A box is the square around the object's centre with its longer side."""
    names = tuple(f"{item.colour} {item.object}" for item in scene.objects)
    return SceneGraph(names, scene.relations, tuple(map(_square, scene.objects)))


def _square(item: Item) -> Box:
    x0, y0, x1, y1 = (at + side * item.scale / 2 for side in (-1, 1) for at in (item.x, item.y))
    return max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1)


class FolderGraphs(FolderPictures, GraphPictures):
    """Pictures of a folder, each with its graph and boxes in NAME.json beside it.

    Boxes are of the whole picture, and follow it when it is cropped to its central square; what then lies outside goes,
    with its relations. A picture that cannot be read is refused.

    Raises:
        BadInput: no pictures; a picture without its graph, a graph without boxes.
    """

    def __init__(self, folder: Path, size: int):
        super().__init__(folder, size)
        self.graphs = [cropped(self._read(file), _sides(file)) for file in self.files]
        self.most = max(len(g.objects) for g in self.graphs)
        known = [(set(g.objects), {word for _, word, _ in g.relationships}) for g in self.graphs]
        objects, relations = (sorted(set().union(*part)) for part in zip(*known, strict=True))
        self.vocabulary = Vocabulary.of(objects, [*SPATIAL, *(word for word in relations if word not in SPATIAL)])

    def graph(self, index: int) -> SceneGraph:
        return self.graphs[index]

    def identity(self) -> str:
        """As of other pictures, and with the graphs."""
        told = json.dumps([asdict(graph) for graph in self.graphs])
        return f"{super().identity()}, graphs with {hashlib.sha256(told.encode()).hexdigest()}"

    @staticmethod
    def _read(file: Path) -> SceneGraph:
        beside = file.with_suffix(".json")
        if not beside.is_file():
            raise BadInput(f"{file} has no graph beside it: write {beside.name}, with objects, relationships and boxes")
        graph = from_json(read_json(beside, dict, _FORM), str(beside))
        if graph.boxes is None:
            raise BadInput(f"{beside} says not where its objects are: add boxes, [left, top, right, bottom] of each")
        return graph


def cropped(graph: SceneGraph, sides: tuple[int, int]) -> SceneGraph:
    """The graph of the central square of a picture of ``sides`` (width, height), without what lies outside of it."""
    least = min(sides)
    scale = [side / least for side in sides]
    boxes: dict[int, Box] = {}
    for i, box in enumerate(graph.boxes or ()):
        x0, y0, x1, y1 = (min(1.0, max(0.0, (x - 0.5) * s + 0.5)) for x, s in zip(box, scale * 2, strict=True))
        if x0 < x1 and y0 < y1:
            boxes[i] = (x0, y0, x1, y1)
    place = {i: k for k, i in enumerate(boxes)}
    kept = tuple((place[a], word, place[b]) for a, word, b in graph.relationships if a in place and b in place)
    return SceneGraph(tuple(graph.objects[i] for i in boxes), kept, tuple(boxes.values()))


def _sides(file: Path) -> tuple[int, int]:
    """Width and height of a picture as it is looked at."""
    with reading(file, "a picture"), Image.open(file) as image:
        turned = image.getexif().get(274, 1) >= 5  # the orientations on the side
        return (image.height, image.width) if turned else (image.width, image.height)


def open_graphs(source: str, size: int, seed: int = 0, count: int = 40_000) -> Any:
    """Pictures with graphs: "sketch" or "sketch-scenes" (see `open_pictures`), or a folder of pictures with NAME.json.

    Raises:
        BadInput: there are none.
    """
    if source in ("sketch", "sketch-scenes"):
        return SketchGraphs((SketchPictures if source == "sketch" else ScenePictures)(size, seed, count))
    if not Path(source).is_dir():
        raise BadInput(
            f"no pictures with graphs at {source!r}: give 'sketch', 'sketch-scenes', or a folder of pictures with "
            "NAME.json beside each"
        )
    return FolderGraphs(Path(source), size)


def graphs_of(pictures: Any, rows: Sequence[int]) -> Iterator[SceneGraph]:
    """The graphs of these pictures, without boxes: what one asks for to have pictures such as these.

    Raises:
        BadInput: pictures without graphs.
    """
    if not hasattr(pictures, "graph"):
        raise BadInput("these pictures have no scene graphs: give some that do, see `sfumato.data.graphs`")
    return (replace(pictures.graph(i), boxes=None) for i in rows)
