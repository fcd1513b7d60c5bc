"""Cameras and their rays: where a picture was taken from, and along which lines its pixels look.

A camera is a rigid pose, camera to world, whose axes are OpenGL's (x to the right, y up, looking along -z), and a focal
length in widths of the (square) picture, whose centre lies on the axis. So NeRF's ``transforms.json`` has them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

TOLERANCE = 1e-3
"""By how much the product of a rotation with its transpose may miss the identity."""


@dataclass(frozen=True, eq=False)
class Cameras:
    """Cameras of one scene, or of several with as many views each.

    Attributes:
        poses: camera to world.
        focal: in widths of the picture: half of it over the tangent of half the angle of view.

    Raises:
        BadInput: shapes that do not match, a pose that is not rigid, a focal length that is not positive.
    """

    poses: Float[Tensor, "*scene view 4 4"]
    focal: Float[Tensor, "*scene view"]

    def __post_init__(self) -> None:
        if self.poses.ndim < 3 or self.poses.shape[-2:] != (4, 4) or self.poses.shape[:-2] != self.focal.shape:
            raise BadInput(
                f"cameras are poses [..., view, 4, 4] and a focal length for each [..., view], not "
                f"{list(self.poses.shape)} and {list(self.focal.shape)}"
            )
        check_rigid(self.poses)
        if not (torch.isfinite(self.focal) & (self.focal > 0)).all():
            raise BadInput("a camera's focal length, in widths of its picture, is a positive finite number")

    def __len__(self) -> int:
        """How many views there are of a scene."""
        return self.focal.shape[-1]

    def at(self, views: Sequence[int] | Tensor) -> Cameras:
        """These views only, in this order."""
        rows = torch.as_tensor(views, dtype=torch.long)
        return Cameras(self.poses[..., rows, :, :], self.focal[..., rows])

    def seen_from(self, frame: Float[Tensor, "*scene 4 4"]) -> Cameras:
        """The same cameras in another one's own frame; see `relative`."""
        return Cameras(relative(self.poses, frame), self.focal)

    def to(self, like: Tensor) -> Cameras:
        """On the device and in the precision of ``like``."""
        return Cameras(self.poses.to(like), self.focal.to(like))

    def rays(self, side: int) -> tuple[Float[Tensor, "*scene view 3"], Float[Tensor, "*scene view side side 3"]]:
        """Where the rays of all pixels begin, and their unit directions."""
        return self.poses[..., :3, 3], directions(self.poses, self.focal, side)


def stacked(scenes: Sequence[Cameras]) -> Cameras:
    """The cameras of several scenes, of which each has as many."""
    return Cameras(torch.stack([c.poses for c in scenes]), torch.stack([c.focal for c in scenes]))


def check_rigid(poses: Float[Tensor, "*n 4 4"]) -> None:
    """Refuse what is no rigid motion.

    Raises:
        BadInput: says what is wrong.
    """
    last = poses.new_tensor([0.0, 0.0, 0.0, 1.0])
    turn = poses[..., :3, :3]
    eye = torch.eye(3, dtype=poses.dtype, device=poses.device)
    missed, allowed = product(turn, turn.mT) - eye, TOLERANCE
    if poses.dtype in (torch.float16, torch.bfloat16):  # which round the rotation itself by more
        missed, allowed = product(turn.double(), turn.mT.double()) - eye, 2 * torch.finfo(poses.dtype).eps
    if not torch.isfinite(poses).all():
        raise BadInput("a camera's pose holds numbers that are not finite: write it again")
    if (poses[..., 3, :] - last).abs().max() > TOLERANCE:
        raise BadInput("the last row of a camera's pose is 0 0 0 1: give matrices from camera to world, rows first")
    if missed.abs().max() > allowed or (torch.linalg.det(turn.double()) < 0).any():
        raise BadInput("a camera's pose turns and moves, without scaling or mirroring: its 3x3 part is a rotation")


def product(a: Float[Tensor, "*n i j"], b: Float[Tensor, "*n j k"]) -> Float[Tensor, "*n i k"]:
    """The product of small matrices in their own precision, also where mixed precision would multiply in half of it."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def relative(poses: Float[Tensor, "*n view 4 4"], frame: Float[Tensor, "*n 4 4"]) -> Float[Tensor, "*n view 4 4"]:
    """``poses`` in the frame of a camera: F^-1 P. A rigid change of the world, applied to all, changes nothing."""
    turn, place = frame[..., None, :3, :3].mT, frame[..., None, :3, 3:]
    moved = torch.cat([product(turn, poses[..., :3, :3]), product(turn, poses[..., :3, 3:] - place)], dim=-1)
    return torch.cat([moved, poses[..., 3:, :]], dim=-2)


def directions(
    poses: Float[Tensor, "*n 4 4"], focal: Float[Tensor, "*n"], side: int
) -> Float[Tensor, "*n side side 3"]:
    """Unit directions of the rays through the middles of pixels, in the frame that the poses lead to, row by row."""
    middles = (torch.arange(side, dtype=poses.dtype, device=poses.device) + 0.5) / side - 0.5
    y, x = torch.meshgrid(-middles, middles, indexing="ij")
    x, y = (v / focal[..., None, None] for v in (x, y))
    rays = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    rays = rays / rays.norm(dim=-1, keepdim=True)
    return (poses[..., None, None, :3, :3] * rays[..., None, :]).sum(-1)


def look_at(
    eye: Float[Tensor, "*n 3"], target: Float[Tensor, "*n 3"], up: Float[Tensor, "*n 3"]
) -> Float[Tensor, "*n 4 4"]:
    """The pose of a camera at ``eye`` whose axis goes through ``target``, with ``up`` pointing up in its picture."""
    back = torch.nn.functional.normalize(eye - target, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(up.expand_as(back), back), dim=-1)
    pose = torch.zeros(*eye.shape[:-1], 4, 4, dtype=eye.dtype, device=eye.device)
    pose[..., :3, :3] = torch.stack([right, torch.linalg.cross(back, right), back], dim=-1)
    pose[..., :3, 3], pose[..., 3, 3] = eye, 1.0
    return pose


def orbit(cameras: Cameras, n: int) -> Cameras:
    """``n`` cameras once around what ``cameras`` of one scene look at, from where the first of them stands.

    The middle is the point nearest to all axes, which for a single camera lies 1 in front of it. Up is, of what is at
    right angles to all pictures' rows, what is nearest to the mean of their columns, for cameras are seldom tilted
    sideways. Distance and height stay those of the first.
    """
    poses = cameras.poses.double().cpu()
    eye, axis, rows = poses[:, :3, 3], -poses[:, :3, 2], poses[:, :3, 0]
    unit = torch.eye(3, dtype=poses.dtype)
    across = unit - axis[:, :, None] * axis[:, None, :]
    # Least squares of |across (x - eye)|, and of rows . up: the small terms decide what these leave open.
    small = 1e-6
    facing = (across @ eye[:, :, None]).sum(0)[:, 0] + small * (eye + axis).mean(0)
    middle = torch.linalg.solve(across.sum(0) + small * unit, facing)
    up = torch.linalg.solve(rows.mT @ rows + small * unit, poses[:, :3, 1].mean(0))
    up = torch.nn.functional.normalize(up, dim=-1)
    arm = eye[0] - middle
    height = (arm @ up) * up
    flat = arm - height
    angle = torch.arange(n, dtype=poses.dtype)[:, None] * (2 * math.pi / n)
    eyes = middle + height + flat * angle.cos() + torch.linalg.cross(up, flat, dim=-1) * angle.sin()
    made = look_at(eyes, middle.expand_as(eyes), up)
    return Cameras(made.to(cameras.poses), cameras.focal[:1].expand(n).clone())
