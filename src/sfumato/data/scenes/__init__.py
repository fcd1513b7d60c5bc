"""The scene oracle: which objects a picture of the sketch world shows, up to three, in which colours, and where.

The [oracle](oracle.py) reads pictures with one object; this network finds several and says how they stand to each
other. Its weights ship with the package: `python -m sfumato.data.scenes --train` makes them anew, and with
`--report docs` it measures them on fresh scenes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput, SfumatoError, unknown
from sfumato.files import sha256_of

from ..oracle import SIDE, conv
from ..sketch import COLOURS, OBJECTS, RELATIONS

GRID = 8
"""Cells a side; a cell can hold the centre of one small object and of one large one that it lies inside of."""
SIZES = 2
LARGE = 0.5
"""From this share of the picture's side on, an object is a large one."""
FIELDS = {"there": 1, "object": len(OBJECTS), "colour": len(COLOURS), "place": 3}
"""Channels of each size: logits, and the offset from the cell's centre (x, y; in cells) and the longer side."""
MOST = 3
ASSETS = Path(__file__).resolve().parents[2] / "assets" / "scenes"
WEIGHTS, CARD = "scenes.safetensors", "card.json"


@dataclass(frozen=True)
class Found:
    """An object that was seen: its centre (x right, y down) and longer side, as fractions of the picture's side."""

    object: str
    colour: str
    x: float
    y: float
    scale: float
    score: float
    """How surely something is there, from 0 to 1."""


def holds(a: Found, relation: str, b: Found) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``, by their places.

    "inside" is: smaller, and its centre within the middle half of the other. Otherwise one is left of (right of, above,
    below) the other when it is a sixth of the picture or more away on that side, and no farther on the other axis.
    """
    if relation not in RELATIONS:
        raise unknown("relation", relation, RELATIONS)
    dx, dy = b.x - a.x, b.y - a.y
    within = max(abs(dx), abs(dy)) < b.scale / 4 and a.scale < 0.75 * b.scale
    if relation == "inside" or within:
        return relation == "inside" and within
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return along * (1 if relation in ("left of", "above") else -1) >= max(1 / 6, abs(across))


class SceneOracle(nn.Module):
    """A convolutional network from a picture to a grid of objects (0.7 M parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv(3, 24, 2, kernel=5),
            conv(24, 64, 2),
            conv(64, 64, 1),
            conv(64, 128, 2),
            conv(128, 128, 1),
            conv(128, 160, 1),
            conv(160, 160, 1),
        )
        self.head = nn.Conv2d(160, SIZES * sum(FIELDS.values()), 1)
        with torch.no_grad():  # few cells hold anything
            self.head.bias.unflatten(0, (SIZES, -1))[:, 0] = -4.0
        self.card: dict[str, Any] = {}

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> dict[str, Float[Tensor, "n sizes field grid grid"]]:
        """The fields of every cell, of RGB pictures in [0, 1] of any size.

        Raises:
            BadInput: they are no such pictures.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise BadInput(
                f"the scene oracle reads float pictures (n, 3, height, width), not {images.dtype} {tuple(images.shape)}"
            )
        images = images.to(self.head.weight)
        if images.shape[-2:] != (SIDE, SIDE):
            images = nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        cells = self.head(self.trunk(images * 2 - 1)).unflatten(1, (SIZES, -1))
        return dict(zip(FIELDS, cells.split(list(FIELDS.values()), dim=2), strict=True))

    @torch.no_grad()
    def read(self, images: Float[Tensor, "n 3 height width"], threshold: float = 0.5) -> list[list[Found]]:
        """The objects of each picture, at most three, the surest first; `threshold` is the least score."""
        cells = self(images)
        score = cells["there"][:, :, 0].sigmoid()
        peak = score == nn.functional.max_pool2d(score, 3, 1, 1)
        score = torch.where(peak, score, 0.0).flatten(1)
        scores, where = score.topk(MOST, dim=1)
        kinds, colours = cells["object"].argmax(2).flatten(1), cells["colour"].argmax(2).flatten(1)
        places = cells["place"].transpose(1, 2).flatten(2)
        pictures = []
        for i in range(len(images)):
            found = []
            for s, at in zip(scores[i].tolist(), where[i].tolist(), strict=True):
                if s < threshold:
                    continue
                row, column = divmod(at % GRID**2, GRID)
                dx, dy, scale = places[i, :, at].tolist()
                x, y = (column + 0.5 + dx) / GRID, (row + 0.5 + dy) / GRID
                found.append(Found(OBJECTS[kinds[i, at]], COLOURS[colours[i, at]], x, y, scale, s))
            pictures.append(found)
        return pictures


@cache
def _shipped(folder: Path) -> SceneOracle:
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file() or not (folder / CARD).is_file():
        raise SfumatoError(f"no scene oracle at {folder}; make it with: python -m sfumato.data.scenes --train")
    card = json.loads((folder / CARD).read_text())
    if sha256_of(folder / WEIGHTS) != card["sha256"]:
        raise SfumatoError(f"the scene oracle's weights at {folder} are not those of its card; install it again")
    oracle = SceneOracle()
    weights = load_file(folder / WEIGHTS)
    oracle.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    oracle.card = card
    return oracle.eval().requires_grad_(False)


def load(folder: str | Path | None = None) -> SceneOracle:
    """The shipped scene oracle (or one in ``folder``): float32, on the CPU, frozen; shared by all callers."""
    return _shipped(Path(folder) if folder is not None else ASSETS)
