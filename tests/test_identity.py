"""A run knows the files it began with: on others it does not go on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.classify.sla import SLA
from sfumato.data.characters import Characters
from sfumato.data.frames import open_frames
from sfumato.data.views import open_views
from sfumato.errors import BadInput
from sfumato.train.discrete import Discrete
from sfumato.train.dorsal import Dorsal
from sfumato.train.eagan import EAGAN
from sfumato.train.rolling import Rolling


def picture(file: Path, value: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, 40, 90)).save(file)


def folders(folder: Path) -> None:
    """Two classes, or two sequences."""
    for i in range(8):
        picture(folder / ("day", "night")[i % 2] / f"{i}.png", 30 * i)


def scenes(folder: Path) -> None:
    for name in "ab":
        for i in range(4):
            picture(folder / name / f"{i}.png", 30 * i)
        cameras(folder / name, [4, 4, 4, 4])


def cameras(folder: Path, away: list[float]) -> None:
    pose = lambda z: [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, z], [0, 0, 0, 1]]
    frames = [{"file_path": f"{i}.png", "transform_matrix": pose(z)} for i, z in enumerate(away)]
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.8, "frames": frames}))


def text(file: Path) -> None:
    file.write_text("one two three four five six")


CASES = {
    "classes": (SLA, {}, folders, lambda f: (f / "night").rename(f / "evening")),
    "generated": (EAGAN, {"genotypes": "cifar10", "updates": 1}, folders, lambda f: picture(f / "day" / "9.png")),
    "frames": (Rolling, {"size": 8, "updates": 1}, folders, lambda f: (f / "day/0.png").rename(f / "day/8.png")),
    "cameras": (Dorsal, {"updates": 1, "osrt_updates": 1}, scenes, lambda f: cameras(f / "a", [4, 4, 4, 5])),
    "text": (Discrete, {"tokens": "characters", "size": 4}, text, lambda f: f.write_text("one two three")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_not_go_on_with_other_files(tmp_path, case):
    kind, settings, make, change = CASES[case]
    data = tmp_path / "data"
    make(data)
    recipe = kind(**{**kind.EXAMPLE, "data": str(data), **settings})
    recipe.run(tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")  # as if it had been killed before
    change(data)
    recipe = kind(**{**kind.EXAMPLE, "data": str(data), **settings})
    with pytest.raises(BadInput, match=r"holds a run with rows=.* another folder to start anew"):
        recipe.run(tmp_path / "run", progress=False)


def test_rows_are_told_apart_by_what_they_are_and_not_by_where(tmp_path):
    """A folder that has been moved, or written again, is the same."""
    for name in ("first", "second"):
        folders(tmp_path / name / "frames")
        scenes(tmp_path / name / "views")
        text(tmp_path / name / "text.txt")
        np.save(tmp_path / name / "array.npy", np.zeros((2, 5, 1, 16, 16), np.float32))
    first, second = (
        [
            open_frames(str(tmp_path / name / "frames"), 16, 2),
            open_views(str(tmp_path / name / "views"), 16),
            Characters(tmp_path / name / "text.txt", 4),
            open_frames(str(tmp_path / name / "array.npy"), 16, 2),
        ]
        for name in ("first", "second")
    )
    assert [a.identity() for a in first] == [b.identity() for b in second]
    assert len({a.identity() for a in first}) == 4
    np.save(tmp_path / "second" / "array.npy", np.zeros((2, 6, 1, 16, 16), np.float32))
    assert open_frames(str(tmp_path / "second" / "array.npy"), 16, 2).identity() != first[3].identity()
