"""Scenes as sets of slots, one an object; slots left out, taken over from other scenes, and found in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfumato.data.cameras import Cameras
from sfumato.errors import BadInput
from sfumato.metrics.segmentation import BACKGROUND

from .contract import Condition


@dataclass(frozen=True)
class Slots(Condition):
    """Scenes, each a set of slots.

    Attributes:
        values: what is known of each object, or of what an encoder took for one.
        there: which of them count; what the others hold is not looked at.
        frame: the pose of the camera in whose frame they are described, camera to world.
    """

    values: Float[Tensor, "batch slot width"]
    there: Bool[Tensor, "batch slot"]
    frame: Float[Tensor, "batch 4 4"]

    @classmethod
    def of(cls, objects: Sequence[np.ndarray | Tensor], frame: Float[Tensor, "batch 4 4"]) -> Self:
        """Slots of scenes with different numbers of objects [object, width]."""
        rows = [torch.as_tensor(x, dtype=torch.float32) for x in objects]
        alike = {x.shape[1:] for x in rows} if all(x.ndim == 2 for x in rows) else set()
        if len(alike) != 1 or len(rows) != len(frame):
            raise BadInput("objects are [object, numbers], of as many numbers in all scenes, with a camera's pose each")
        most = max(1, *(len(x) for x in rows))
        values = torch.stack([F.pad(x, (0, 0, 0, most - len(x))) for x in rows])
        there = torch.stack([torch.arange(most) < len(x) for x in rows])
        return cls(values, there, frame)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, in order; those with fewer slots get places that do not count."""
        most = max(part.there.shape[1] for part in parts)
        if len({part.values.shape[2] for part in parts}) > 1:
            raise BadInput("slots of different widths cannot be joined: they come from different encoders")
        return super().cat([part.padded(most) for part in parts])

    def padded(self, slots: int) -> Self:
        """The same with places that do not count, up to so many."""
        more = max(0, slots - self.there.shape[1])
        return self.replace(values=F.pad(self.values, (0, 0, 0, more)), there=F.pad(self.there, (0, more)))

    def check(self, ids: Sequence[int]) -> list[int]:
        """``ids``, if each is a slot that is there in every scene.

        Raises:
            BadInput: names the first that is not, and which are.
        """
        there = self.there.all(0).tolist()
        for i in ids:
            if not 0 <= i < len(there) or not there[i]:
                known = ", ".join(str(k) for k, held in enumerate(there) if held) or "none"
                raise BadInput(f"there is no slot {i} in the scene: its slots are {known}")
        return list(ids)


@dataclass(frozen=True)
class Scene(Condition):
    """Scenes and the cameras of the views that are to be drawn; cameras are never dropped.

    Attributes:
        poses: of the views, in the slots' frame.
        focal: in widths of the picture.
    """

    slots: Slots
    poses: Float[Tensor, "batch view 4 4"]
    focal: Float[Tensor, "batch view"]

    @classmethod
    def seen(cls, slots: Slots, cameras: Cameras) -> Self:
        """``slots`` seen by cameras in the world's frame, the same of all scenes or of each its own.

        Raises:
            BadInput: cameras of another number of scenes.
        """
        cameras = cameras.to(slots.values)
        poses, focal = cameras.poses, cameras.focal
        if poses.ndim == 3:
            poses, focal = poses.expand(len(slots), -1, -1, -1), focal.expand(len(slots), -1)
        if len(poses) != len(slots):
            raise BadInput(f"cameras of {len(poses)} scenes for slots of {len(slots)}: give each scene its own")
        seen = Cameras(poses, focal).seen_from(slots.frame)
        return cls(slots, seen.poses, seen.focal)

    @property
    def views(self) -> int:
        """How many views there are of each scene."""
        return self.focal.shape[1]

    def at(self, views: Tensor) -> Self:
        """These views only."""
        rows = views.to(self.focal.device)
        return self.replace(poses=self.poses[:, rows], focal=self.focal[:, rows])

    def drop(self, mask: Bool[Tensor, "batch"], empty: Self) -> Self:
        return self.replace(slots=self.slots.drop(mask, empty.slots))


def edit(slots: Slots, remove: Sequence[int]) -> Slots:
    """The scenes without these slots, which are then neither attended to nor in the mean.

    Raises:
        BadInput: there is no such slot.
    """
    there = slots.there.clone()
    there[:, slots.check(remove)] = False
    return slots.replace(there=there)


def transfer(slots: Slots, donor: Slots, ids: Sequence[int]) -> Slots:
    """The scenes with slots ``ids`` of ``donor`` besides, which come to stand at the same place relative to the
    canonical camera as they stood there.

    Args:
        donor: as many scenes, or one for all.

    Raises:
        BadInput: there is no such slot; slots of another width, another number of scenes.
    """
    ids = donor.check(ids)
    if donor.values.shape[2] != slots.values.shape[2]:
        raise BadInput(
            f"slots of {donor.values.shape[2]} numbers cannot go to a scene whose slots have {slots.values.shape[2]}: "
            "take them from scenes of the same encoder"
        )
    if len(donor) not in (1, len(slots)):
        raise BadInput(f"slots of {len(donor)} scenes for {len(slots)}: give one, or one for each")
    values, there = donor.values[:, ids], donor.there[:, ids]
    values, there = values.expand(len(slots), -1, -1), there.expand(len(slots), -1)
    return slots.replace(
        values=torch.cat([slots.values, values.to(slots.values)], dim=1),
        there=torch.cat([slots.there, there.to(slots.there.device)], dim=1),
    )


def changes(
    full: Float[Tensor, "*n channel height width"],
    without: Float[Tensor, "slot *n channel height width"],
    smooth: int = 1,
) -> Float[Tensor, "slot *n height width"]:
    """|I - I_-k| of every pixel, the norm over channels: what each slot, left out, changes.

    Args:
        smooth: the side of a square, odd, over which changes are averaged; 1 is none.
    """
    if smooth < 1 or smooth % 2 == 0:
        raise BadInput(f"smooth is the odd side of a square of pixels, not {smooth}")
    change = (full - without).norm(dim=-3)
    if smooth == 1:
        return change
    flat = change.flatten(0, -3)[:, None]
    return F.avg_pool2d(flat, smooth, 1, smooth // 2, count_include_pad=False)[:, 0].view_as(change)


def segments(
    full: Float[Tensor, "*n channel height width"],
    without: Float[Tensor, "slot *n channel height width"],
    threshold: float = 0.1,
    smooth: int = 1,
) -> Int[Tensor, "*n height width"]:
    """Which slot a pixel shows: the one without which it changes most, by more than ``threshold``, else `BACKGROUND`.

    Args:
        full: pictures of the scenes, in [0, 1].
        without: the same, from the same noise, with one slot left out in turn.
    """
    most, which = changes(full, without, smooth).max(dim=0)
    return torch.where(most > threshold, which, BACKGROUND)
