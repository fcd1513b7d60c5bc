"""Where scenes seen by several cameras come from: the world of solids, folders in NeRF's layout, through one door."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from sfumato.errors import BadInput
from sfumato.foreign import read_json, shaped
from sfumato.text import counted

from .base import UNREADABLE, to_square, told_apart
from .cameras import Cameras, look_at
from .solids import SOLIDS, WIDTH, World, render, some_world
from .walk import SUFFIXES, hidden, in_place

FILE = "transforms.json"
ORIENTATION = 0x0112
"""EXIF's number of how a picture is to be turned."""
PERSPECTIVE = ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "OPENCV", "RADIAL", "SIMPLE_RADIAL")
"""Camera models of nerfstudio that are a pinhole's where they are not distorted."""
KEPT = 2**28
"""Bytes of drawn pictures that are kept in memory."""


class Views(Protocol):
    """Scenes by index, each of ``each`` posed pictures. The same index always gives the same scene."""

    size: int
    each: int
    """Views of a scene; the first is the canonical one, in whose frame objects are described."""
    width: int
    """Numbers that describe an object; 0 where nothing is known of objects."""
    most: int
    """Objects of a scene at most."""

    def __len__(self) -> int: ...

    def cameras(self, index: int) -> Cameras:
        """All cameras of scene ``index``, in the world's frame, float32."""
        ...

    def pictures(self, index: int, views: Sequence[int]) -> UInt8[np.ndarray, "view size size 3"]:
        """The pictures of these views."""
        ...

    def objects(self, index: int) -> Float[np.ndarray, "object width"]:
        """What is known of the scene's objects; [0, 0] where nothing is."""
        ...


def open_views(source: str, size: int, least: int = 1, *, seed: int = 0, count: int = 10_000) -> Views:
    """Scenes with at least ``least`` views from ``source``.

    Args:
        source: "solids", spheres, boxes and cylinders on a floor (`sfumato.data.solids`); "solids-uncoloured", the same
            whose objects' descriptions leave out the colours; or a folder with a subfolder for each scene, in which
            ``transforms.json`` (as NeRF's synthetic scenes and nerfstudio have it) names pictures and their cameras.
            There "objects", a list of lists of numbers, may describe the objects in the frame of the first camera.
        size: side in pixels.
        seed, count: of the world of solids.

    Raises:
        BadInput: nothing is found there; cameras and pictures that do not match, too few views, cameras that are none.
    """
    if size < 1 or least < 1:
        raise BadInput(f"scenes have at least one view of at least one pixel, not {least} of {size}")
    if source in ("solids", "solids-uncoloured"):
        return SolidViews(size, seed, count, source == "solids", max(10, least))
    if Path(source).is_dir():
        return FolderViews(Path(source), size, least)
    raise BadInput(
        f"no views at {source!r}: give 'solids', 'solids-uncoloured', or a folder with a subfolder per scene that has "
        f"a {FILE}"
    )


class SolidViews:
    """``count`` scenes of the world of solids, seen from around; the first camera always from the same height."""

    width, most = WIDTH, 1 + SOLIDS

    def __init__(self, size: int, seed: int, count: int, coloured: bool = True, each: int = 10):
        self.size, self.seed, self.count, self.coloured, self.each = size, seed, count, coloured, each
        self._drawn: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.count

    def world(self, index: int) -> World:
        """The scene itself."""
        return _world(self.seed, range(self.count)[index])

    def cameras(self, index: int) -> Cameras:
        return _around(self.seed, range(self.count)[index], self.each)

    def pictures(self, index: int, views: Sequence[int]) -> UInt8[np.ndarray, "view size size 3"]:
        drawn = {v: self._drawn[index, v] for v in views if (index, v) in self._drawn}
        if missing := [v for v in views if v not in drawn]:
            cameras, world = self.cameras(index), self.world(index)
            for v in missing:
                drawn[v] = render(world, cameras.poses[v].double().numpy(), float(cameras.focal[v]), self.size)
                if (len(self._drawn) + 1) * 3 * self.size**2 <= KEPT:
                    self._drawn[index, v] = drawn[v]
        return np.stack([drawn[v] for v in views])

    def objects(self, index: int) -> Float[np.ndarray, "object width"]:
        return self.world(index).vectors(self.cameras(index).poses[0].double().numpy(), self.coloured)


@lru_cache(maxsize=4096)
def _world(seed: int, index: int) -> World:
    return some_world(np.random.default_rng((seed, index, 0)))


def photographs(world: World, cameras: Cameras, side: int) -> UInt8[np.ndarray, "view side side 3"]:
    """What each camera sees of a world."""
    poses, focal = cameras.poses.double().numpy(), cameras.focal.tolist()
    return np.stack([render(world, pose, f, side) for pose, f in zip(poses, focal, strict=True)])


@lru_cache(maxsize=4096)
def _around(seed: int, index: int, n: int) -> Cameras:
    """Cameras around a scene that look at its middle."""
    rng = np.random.default_rng((seed, index, 1))
    around = rng.uniform(0, 2 * math.pi, n)
    above, far = rng.uniform(0.35, 0.85, n), rng.uniform(3.4, 4.2, n)
    above[0], far[0] = 0.6, 3.8  # so that a slot stands on the floor of another scene too
    flat = far * np.cos(above)
    eye = np.stack([flat * np.cos(around), flat * np.sin(around), far * np.sin(above)], axis=-1)
    middle, up = torch.tensor([0.0, 0.0, 0.25]).expand(n, 3), torch.tensor([0.0, 0.0, 1.0])
    return Cameras(look_at(torch.from_numpy(eye).float(), middle, up), torch.full((n,), 1.2))


class FolderViews:
    """Scenes in the subfolders of ``folder``, or one in the folder itself; of each as many views as all have."""

    def __init__(self, folder: Path, size: int, least: int):
        self.size = size
        inside = [folder]
        if not (folder / FILE).is_file():
            inside = in_place((p for p in folder.iterdir() if (p / FILE).is_file() and not hidden((p.name,))), folder)
        if not inside:
            raise BadInput(f"no subfolder of {folder} has a {FILE}: one is needed for each scene")
        scenes = [_scene(place) for place in inside]
        for place, (files, _, _) in zip(inside, scenes, strict=True):
            if len(files) < least:
                raise BadInput(f"{place} has {counted(len(files), 'view')}: {least} are needed of each scene")
        self.each = min(len(files) for files, _, _ in scenes)
        widths = {objects.shape[1] for _, _, objects in scenes}
        if len(widths) > 1:
            raise BadInput(f"the objects of {folder} are described by {sorted(widths)} numbers: give all as many")
        self.width, self.most = widths.pop(), max(len(objects) for _, _, objects in scenes)
        self.folder, self.scenes = folder, scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def identity(self) -> str:
        """By the pictures' names, the cameras and what is said of objects; no picture is looked at."""
        rows = [
            [[file.relative_to(self.folder).as_posix() for file in files], cameras.poses.tolist(),
             cameras.focal.tolist(), objects.tolist()]
            for files, cameras, objects in self.scenes
        ]  # fmt: skip
        return told_apart(len(self), rows)

    def cameras(self, index: int) -> Cameras:
        return self.scenes[index][1].at(range(self.each))

    def pictures(self, index: int, views: Sequence[int]) -> UInt8[np.ndarray, "view size size 3"]:
        files = self.scenes[index][0]
        return np.stack([to_square(files[v], self.size) for v in views])

    def objects(self, index: int) -> Float[np.ndarray, "object width"]:
        return self.scenes[index][2]


def _scene(folder: Path) -> tuple[list[Path], Cameras, np.ndarray]:
    """The pictures of a folder, their cameras, and what is said of objects."""
    where = folder / FILE
    data = read_json(where, {"frames": list}, "write it as NeRF's synthetic scenes have it")
    if not data["frames"]:
        raise BadInput(f"{where} names no frames: give at least one picture with its camera")
    files, poses, focal = [], [], []
    for i, frame in enumerate(data["frames"]):
        shaped(frame, {"file_path": str, "transform_matrix": list}, f"frame {i} of {where}")
        files.append(_file(folder, frame["file_path"]))
        poses.append(_matrix(frame["transform_matrix"], (4, 4), f"frame {i} of {where}"))
        # A frame's own lens goes before that of all, in whichever of the two ways either is told.
        own = not {"fl_x", "camera_angle_x"}.isdisjoint(frame)
        shared = {k: v for k, v in data.items() if not own or k not in ("fl_x", "fl_y", "camera_angle_x")}
        focal.append(_focal({**shared, **frame}, files[-1], f"frame {i} of {where}"))
    if len(set(files)) < len(files):
        raise BadInput(f"{where} has several cameras for one picture: give each picture one")
    left = [f for f in sorted({f for named in files for f in named.parent.iterdir()}) if f not in files]
    if stray := [f for f in left if f.suffix.lower() in SUFFIXES and not hidden((f.name,))]:
        raise BadInput(f"{stray[0]} has no camera in {where}: name it there or take it away")
    try:
        cameras = Cameras(torch.from_numpy(_nearer(np.stack(poses))).float(), torch.tensor(focal))
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    objects = data.get("objects") or []
    if not isinstance(objects, list):
        raise BadInput(f"objects of {where} is no list: give a list of numbers for each object")
    if not objects:
        return files, cameras, np.zeros((0, 0), np.float32)
    width = len(objects[0]) if isinstance(objects[0], list) else 0
    return files, cameras, _matrix(objects, (len(objects), width), f"objects of {where}").astype(np.float32)


def _nearer(poses: Float[np.ndarray, "view 4 4"]) -> Float[np.ndarray, "view 4 4"]:
    """The poses as they are; of cameras that lie so far off (as in the coordinates of maps) that float32 would not tell
    them apart, with the first one's place for the world's middle, which changes nothing between them."""
    places = poses[:, :3, 3]
    apart = np.abs(places - places[0]).max()
    if 0 < apart < 1e4 * np.finfo(np.float32).eps * np.abs(places).max():
        poses = poses.copy()
        poses[:, :3, 3] -= places[0]
    return poses


def _file(folder: Path, named: str) -> Path:
    """The picture of a frame, whose suffix may be left out; it lies inside the folder."""
    path = Path(os.path.abspath(folder / named))  # links are not followed: the cache of a hub is made of them
    if not path.is_relative_to(os.path.abspath(folder)):
        raise BadInput(f"{folder / FILE} names the picture {named!r}, which lies outside of its folder: move it there")
    found = path if os.path.isfile(path) else path.with_name(f"{path.name}.png")
    if not os.path.isfile(found):  # pathlib's raises where a name is too long
        raise BadInput(f"{folder / FILE} has a camera for {named!r}, but there is no such picture")
    return found


def _matrix(rows: Any, shape: tuple[int, int], where: str) -> np.ndarray:
    try:
        found = np.array(rows, dtype=np.float64)
    except (ValueError, TypeError):
        found = np.zeros(0)
    if found.shape != shape or 0 in shape or not np.isfinite(found).all():
        raise BadInput(f"{where}: give {shape[0]} rows of {shape[1] or 'equally many'} finite numbers")
    return found


def _focal(told: dict[str, Any], file: Path, where: str) -> float:
    """The focal length in widths of the square that is cut from the middle of a picture."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except UNREADABLE as error:
        raise BadInput(f"{file} cannot be read as a picture ({error})") from error
    if turned:  # cameras are of the pixels as they lie, or of the picture as it is shown: nobody knows
        raise BadInput(f"{file} is shown turned or mirrored (its EXIF orientation): save it upright, without that mark")
    known = ("camera_angle_x", "fl_x", "fl_y", "cx", "cy", "w", "h")
    numbers: dict[str, Any] = {k: told[k] for k in known if k in told}
    if wrong := [k for k, v in numbers.items() if isinstance(v, bool) or not isinstance(v, int | float)]:
        raise BadInput(f"{where}: {wrong[0]} must be a number")
    kind = told.get("camera_model", PERSPECTIVE[0])
    if str(kind).upper() not in PERSPECTIVE or told.get("is_fisheye"):
        raise BadInput(f"{where}: the lens is no pinhole's ({kind}): undistort the pictures first")
    if lens := [k for k in ("k1", "k2", "k3", "k4", "p1", "p2") if told.get(k)]:
        raise BadInput(f"{where}: the lens is distorted ({lens[0]} = {told[lens[0]]}): undistort the pictures first")
    w, h = numbers.get("w", width), numbers.get("h", height)
    if not (w > 0 and h > 0) or abs(w * height - h * width) > max(w, h) * 2:
        raise BadInput(f"{where}: the camera is of pictures of {w:g}x{h:g}, {file.name} has {width}x{height} pixels")
    for key, middle in (("cx", w / 2), ("cy", h / 2)):
        if abs(numbers.get(key, middle) - middle) > 0.02 * middle:
            raise BadInput(f"{where}: {key} lies off the middle of the picture: crop it so that the axis is its middle")
    if "fl_x" in numbers:
        long = numbers["fl_x"]
        if abs(numbers.get("fl_y", long) - long) > 0.01 * abs(long):
            raise BadInput(f"{where}: fl_x and fl_y differ: pixels are square here")
    elif "camera_angle_x" in numbers and 0 < numbers["camera_angle_x"] < math.pi:
        long = w / 2 / math.tan(numbers["camera_angle_x"] / 2)
    else:
        raise BadInput(f"{where}: says neither fl_x nor camera_angle_x, between 0 and pi: give one")
    return float(long / min(w, h))
