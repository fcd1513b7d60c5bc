"""DORSal's first stage: OSRT (arXiv:2206.06922) learns slots from posed pictures by drawing rays of other views."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.data.cameras import Cameras
from sfumato.data.views import Views
from sfumato.nets import OSRT

from . import draw
from .recipe import Recipe


class OSRTTraining(Recipe):
    """Mean squared error of the colours of random rays of views that the encoder was not shown.

    Args:
        inputs: views that the encoder is shown, a scene's first ones.
        targets: other views, whose rays are drawn.
        rays: of each scene in an update, from all its targets together.
    """

    name = "osrt"
    title = "slots"

    def __init__(self, network: OSRT, views: Views, inputs: int, targets: int, rays: int):
        self.network, self.views, self.inputs, self.targets, self.rays = network, views, inputs, targets, rays

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.network}

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Tensor]:
        rows = draw.integers(len(self.views), size, rng).tolist()
        shown = list(range(self.inputs))
        chosen = some_views(self.views.each, self.inputs, self.targets, size, rng)
        place = draw.normal((size, self.targets * self.views.size**2), rng).argsort(1)[:, : self.rays]
        scenes = [_scene(self.views, row, shown) for row in rows]
        told = {name: torch.stack([scene[name] for scene in scenes]) for name in scenes[0]}
        asked = [_scene(self.views, row, which) for row, which in zip(rows, chosen.tolist(), strict=True)]
        pairs = list(zip(asked, place, strict=True))
        colours = torch.stack([x["pictures"].movedim(1, -1).flatten(0, 2)[p] for x, p in pairs])
        ways = torch.stack([x["directions"].flatten(0, 2)[p] for x, p in pairs])
        origins = torch.stack([x["origins"][p // self.views.size**2] for x, p in pairs])
        return {**told, "colours": colours, "ray_origins": origins, "ray_directions": ways}

    def loss(self, batch: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = {name: x.to(self.network.device) for name, x in batch.items()}
        slots = self.network.encode(batch["pictures"], batch["origins"], batch["directions"])
        colours, _ = self.network.decode(slots, batch["ray_origins"], batch["ray_directions"])
        return F.mse_loss(colours.float(), batch["colours"]), {}


def some_views(each: int, first: int, count: int, rows: int, rng: torch.Generator) -> Tensor:
    """``count`` different views from ``first`` on, of each of so many rows."""
    return first + draw.normal((rows, each - first), rng).argsort(1)[:, :count]


def in_frame(views: Views, row: int) -> Cameras:
    """The cameras of a scene in the frame of its first."""
    cameras = views.cameras(row)
    return cameras.seen_from(cameras.poses[0])


def pictures_of(views: Views, row: int, which: list[int]) -> Float[Tensor, "view 3 size size"]:
    """Views of a scene, in [0, 1]."""
    return torch.from_numpy(views.pictures(row, which)).permute(0, 3, 1, 2).float() / 255


def _scene(views: Views, row: int, which: list[int]) -> dict[str, Any]:
    origins, directions = in_frame(views, row).at(which).rays(views.size)
    return {"pictures": pictures_of(views, row, which), "origins": origins, "directions": directions}
