"""A small world in three dimensions: spheres, boxes and cylinders on a floor under one light, drawn by casting rays.

Everything about it is known exactly: cameras, which object a pixel shows and how far away, and what the picture would
be without one of them.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

Kind = Literal["sphere", "box", "cylinder"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Vector = Float[np.ndarray, "3"]
Points = Float[np.ndarray, "ray 3"]

COLOURS = {
    "red": (0.85, 0.15, 0.15), "green": (0.15, 0.65, 0.2), "blue": (0.15, 0.3, 0.85), "yellow": (0.9, 0.8, 0.1),
    "purple": (0.55, 0.2, 0.7), "cyan": (0.1, 0.75, 0.75), "orange": (0.95, 0.5, 0.1), "white": (0.92, 0.92, 0.92),
}  # fmt: skip
SKY = (0.75, 0.85, 0.95)
AMBIENT = 0.4
"""Light that comes from everywhere; the rest comes from one direction."""
NOTHING, FLOOR = -2, -1
"""In maps of what a pixel shows: nothing, and the floor; objects are their numbers from 0."""
SOLIDS = 4
"""Of a scene at most."""
WIDTH = 18
"""Numbers that describe an object: kind (floor, sphere, box, cylinder), centre, up, the direction of a side (of the
floor that of the light), radius, height, colour."""


@dataclass(frozen=True)
class Solid:
    """One object, which stands on the floor z = 0.

    Attributes:
        place: x and y of its middle.
        radius: of a sphere or cylinder; half the side of a box's square base.
        height: of a box or cylinder; a sphere's is twice its radius.
        turn: of a box about its vertical axis, in radians.
        colour: red, green, blue in [0, 1].
    """

    kind: Kind
    place: tuple[float, float]
    radius: float
    height: float
    turn: float
    colour: tuple[float, float, float]

    @property
    def centre(self) -> Vector:
        return np.array([*self.place, self.height / 2])

    def hit(self, origin: Points, way: Points) -> tuple[Float[np.ndarray, "ray"], Points]:
        """How far along unit directions ``way`` the first hit lies (infinity: none), and the normal there."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        o, d = (origin - self.centre) @ turn.T, way @ turn.T
        far, normal = {"sphere": self._sphere, "box": self._box, "cylinder": self._cylinder}[self.kind](o, d)
        return far, normal @ turn

    def _sphere(self, o: Points, d: Points) -> tuple[np.ndarray, np.ndarray]:
        b = (o * d).sum(-1)
        far = _first_root(np.ones_like(b), b, (o * o).sum(-1) - self.radius**2)[0]
        return far, (o + _finite(far)[:, None] * d) / self.radius

    def _box(self, o: Points, d: Points) -> tuple[np.ndarray, np.ndarray]:
        half = np.array([self.radius, self.radius, self.height / 2])
        with np.errstate(divide="ignore", invalid="ignore"):
            one, other = (-half - o) / d, (half - o) / d
        enter, leave = np.fmin(one, other), np.fmax(one, other)
        axis = enter.argmax(-1)
        far = enter.max(-1)
        normal = np.zeros_like(o)
        rows = np.arange(len(o))
        normal[rows, axis] = -np.sign(d[rows, axis])
        return np.where((far > 0) & (far <= leave.min(-1)), far, np.inf), normal

    def _cylinder(self, o: Points, d: Points) -> tuple[np.ndarray, np.ndarray]:
        half = self.height / 2
        a, b = (d[:, :2] ** 2).sum(-1), (o[:, :2] * d[:, :2]).sum(-1)
        side = _first_root(a, b, (o[:, :2] ** 2).sum(-1) - self.radius**2)[0]
        at = o + _finite(side)[:, None] * d
        side = np.where(np.abs(at[:, 2]) <= half, side, np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            lid = (-np.sign(d[:, 2]) * half - o[:, 2]) / d[:, 2]
        on = o[:, :2] + _finite(lid)[:, None] * d[:, :2]
        lid = np.where((lid > 0) & ((on**2).sum(-1) <= self.radius**2), lid, np.inf)
        round_ = np.concatenate([at[:, :2] / self.radius, np.zeros_like(at[:, :1])], axis=-1)
        flat = np.zeros_like(o)
        flat[:, 2] = -np.sign(d[:, 2])
        return np.minimum(side, lid), np.where((side <= lid)[:, None], round_, flat)


def _first_root(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least positive root of a t^2 + 2 b t + c from outside (infinity: none), and the discriminant."""
    under = b * b - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        root = (-b - np.sqrt(np.maximum(under, 0))) / a
    return np.where((under > 0) & (root > 0) & (a > 0), root, np.inf), under


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, 0.0)


@dataclass(frozen=True)
class World:
    """Some solids, a floor and a light.

    Attributes:
        floor: its colour.
        light: unit vector towards the light.
    """

    solids: tuple[Solid, ...]
    floor: tuple[float, float, float]
    light: tuple[float, float, float]

    def without(self, *numbers: int) -> World:
        """The same without these solids; the others keep their order."""
        return replace(self, solids=tuple(s for i, s in enumerate(self.solids) if i not in numbers))

    def trace(self, origin: Points, way: Points) -> tuple[np.ndarray, Int[np.ndarray, "ray"], Points]:
        """Of each ray the distance of the first hit, what it hits (`NOTHING`, `FLOOR` or a number), the normal."""
        with np.errstate(divide="ignore", invalid="ignore"):
            far = -origin[:, 2] / way[:, 2]
        far = np.where((far > 0) & np.isfinite(far), far, np.inf)
        which = np.where(np.isfinite(far), FLOOR, NOTHING)
        normal = np.broadcast_to(np.array([0.0, 0.0, 1.0]), origin.shape).copy()
        for i, solid in enumerate(self.solids):
            at, across = solid.hit(origin, way)
            nearer = at < far
            far, which = np.where(nearer, at, far), np.where(nearer, i, which)
            normal = np.where(nearer[:, None], across, normal)
        return far, which, normal

    def colours(self, origin: Points, way: Points) -> Points:
        """What the rays see, in [0, 1]: the same from all sides (Lambert), with hard shadows."""
        far, which, normal = self.trace(origin, way)
        own = np.array([SKY, self.floor, *(s.colour for s in self.solids)])[which - NOTHING]
        light = np.array(self.light)
        facing = np.maximum(normal @ light, 0)
        lit = np.flatnonzero((which != NOTHING) & (facing > 0))
        at = origin[lit] + far[lit, None] * way[lit] + 1e-4 * normal[lit]
        dark = np.zeros(len(lit), dtype=bool)
        for solid in self.solids:
            dark |= np.isfinite(solid.hit(at, np.broadcast_to(light, at.shape))[0])
        facing[lit[dark]] = 0
        bright = np.where(which == NOTHING, 1.0, AMBIENT + (1 - AMBIENT) * facing)
        return own * bright[:, None]

    def vectors(self, frame: Float[np.ndarray, "4 4"], coloured: bool = True) -> Float[np.ndarray, "object 18"]:
        """The floor and each solid in `WIDTH` numbers, seen from the camera with the pose ``frame``.

        Args:
            coloured: otherwise the places of colours are 0.
        """
        turn, place = frame[:3, :3].T, frame[:3, 3]
        local = lambda point: turn @ (np.asarray(point) - place)
        up = turn @ np.array([0.0, 0.0, 1.0])
        rows = [[1, 0, 0, 0, *local(np.zeros(3)), *up, *(turn @ np.array(self.light)), 0, 0, *self.floor]]
        for s in self.solids:
            kind = [float(s.kind == k) for k in KINDS]
            side = np.array([math.cos(s.turn), math.sin(s.turn), 0.0]) * (s.kind == "box")
            rows.append([0, *kind, *local(s.centre), *up, *(turn @ side), s.radius, s.height, *s.colour])
        found = np.array(rows, dtype=np.float32)
        return found if coloured else np.concatenate([found[:, :-3], np.zeros_like(found[:, -3:])], axis=1)


def render(
    world: World, pose: Float[np.ndarray, "4 4"], focal: float, side: int, samples: int = 2
) -> UInt8[np.ndarray, "side side 3"]:
    """A picture of the world, each pixel the mean of ``samples`` x ``samples`` rays."""
    origin, way = rays(pose, focal, side * samples)
    seen = world.colours(origin, way).reshape(side, samples, side, samples, 3).mean((1, 3))
    return (seen * 255).round().astype(np.uint8)


def shown(
    world: World, pose: Float[np.ndarray, "4 4"], focal: float, side: int
) -> tuple[Int[np.ndarray, "side side"], Float[np.ndarray, "side side 3"]]:
    """What the middle of each pixel shows (see `World.trace`), and where in the world that point is (NaN: nowhere)."""
    origin, way = rays(pose, focal, side)
    far, which, _ = world.trace(origin, way)
    points = np.where(np.isfinite(far)[:, None], origin + _finite(far)[:, None] * way, np.nan)
    return which.reshape(side, side), points.reshape(side, side, 3)


def rays(pose: Float[np.ndarray, "4 4"], focal: float, side: int) -> tuple[Points, Points]:
    """Origins and unit directions through the middles of all pixels; as `sfumato.data.cameras.directions`."""
    middles = (np.arange(side) + 0.5) / side - 0.5
    y, x = np.meshgrid(-middles / focal, middles / focal, indexing="ij")
    way = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
    way = way / np.linalg.norm(way, axis=-1, keepdims=True) @ pose[:3, :3].T
    return np.broadcast_to(pose[:3, 3], way.shape), way


def some_world(rng: np.random.Generator, most: int = SOLIDS) -> World:
    """Two to ``most`` solids that do not touch, of colours of `COLOURS`, on a pale floor."""
    solids: list[Solid] = []
    for _ in range(int(rng.integers(2, most + 1))):
        solids += _placed(rng, solids)
    hue = float(rng.uniform())
    angle = float(rng.uniform(0, 2 * math.pi))
    light = np.array([0.6 * math.cos(angle), 0.6 * math.sin(angle), 1.0])
    light /= np.linalg.norm(light)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.15, 0.75)
    return World(tuple(solids), (red, green, blue), (float(light[0]), float(light[1]), float(light[2])))


def _placed(rng: np.random.Generator, others: list[Solid]) -> Iterator[Solid]:
    """One more solid, apart from the others; none where no room is found."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    colour = list(COLOURS.values())[int(rng.integers(len(COLOURS)))]
    radius = float(rng.uniform(0.22, 0.42))
    height = 2 * radius if kind == "sphere" else float(rng.uniform(0.4, 1.0))
    turn = float(rng.uniform(0, math.pi / 2)) if kind == "box" else 0.0
    reach = radius * math.sqrt(2) if kind == "box" else radius
    for _ in range(50):
        x, y = (float(v) for v in rng.uniform(-1.1, 1.1, 2))
        apart = [math.hypot(x - s.place[0], y - s.place[1]) - s.radius * math.sqrt(2) for s in others]
        if math.hypot(x, y) < 1.1 and min(apart, default=1.0) > reach + 0.05:
            yield Solid(kind, (x, y), radius, height, turn, colour)
            return
