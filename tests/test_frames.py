"""Clips of frames from every source, through one door."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfumato.data.arrays import ArrayFrames
from sfumato.data.frames import open_frames, stack
from sfumato.errors import BadInput


def test_sketch_clips_move_and_come_back_the_same():
    clips = open_frames("sketch", 24, 4, seed=3, count=20)
    assert len(clips) == 20 and clips.channels == 3 and clips.bounded
    one = clips.clip(7)
    assert one.shape == (4, 3, 24, 24) and one.dtype == torch.float32
    assert one.abs().max() <= 1
    assert torch.equal(one, open_frames("sketch", 24, 4, seed=3).clip(7))
    assert not torch.equal(one, clips.clip(8))
    assert not torch.equal(one, open_frames("sketch", 24, 4, seed=4).clip(7))
    assert all(not torch.equal(one[i], one[i + 1]) for i in range(3))
    assert torch.equal(open_frames("sketch", 24, 2, seed=3).clip(7), one[:2])  # a longer clip goes on from a shorter
    assert torch.equal(stack(clips, [7, 2]), torch.stack([one, clips.clip(2)]))


def test_the_fluid_comes_through_the_same_door(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "sfumato.data.kolmogorov.KolmogorovFlow.trajectories",
        lambda self, n, frames, every, generator, **_: torch.ones(n, frames, self.size, self.size).double(),
    )
    clips = open_frames("kolmogorov", 8, 4)
    assert clips.channels == 1 and not clips.bounded
    assert clips.clip(0).shape == (4, 1, 8, 8)
    assert list(tmp_path.glob("kolmogorov-*.safetensors"))


def test_folders_of_frames(tmp_path):
    for name, n in (("b", 4), ("a", 3), ("short", 1)):
        (tmp_path / name).mkdir()
        for i in range(n):
            value = 10 * i + (100 if name == "b" else 0)
            Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(tmp_path / name / f"{i:03d}.png")
    clips = open_frames(str(tmp_path), 6, 3)
    assert len(clips) == 1 + 2
    first = lambda i: ((clips.clip(i)[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert [first(i) for i in range(3)] == [[0, 10, 20], [100, 110, 120], [110, 120, 130]]
    with pytest.raises(BadInput, match="holds 5 pictures"):
        open_frames(str(tmp_path), 6, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere", 8, 2), "no frames at 'nowhere'"), (("sketch", 8, 0), "one frame"), (("sketch", 0, 1), "one pixel")],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(BadInput, match=message):
        open_frames(*arguments)


def save(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        save_file({"frames": torch.from_numpy(array), "other": torch.zeros(1)}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_arrays_of_frames(suffix, tmp_path):
    array = np.arange(2 * 5, dtype=np.float32).reshape(2, 5, 1, 1, 1) * np.ones((1, 1, 3, 4, 4), np.float32)
    clips = open_frames(save(tmp_path / f"a{suffix}", array), 4, 3)
    assert len(clips) == 2 * 3 and clips.channels == 3 and not clips.bounded
    assert [clips.clip(i)[:, 0, 0, 0].tolist() for i in (0, 2, 3)] == [[0, 1, 2], [2, 3, 4], [5, 6, 7]]
    assert open_frames(save(tmp_path / f"b{suffix}", array / 9), 4, 3).bounded
    one = open_frames(save(tmp_path / f"c{suffix}", (array[0] * 51).astype(np.uint8)), 4, 5)
    assert len(one) == 1 and one.bounded and one.clip(0).shape == (5, 3, 4, 4)
    assert one.clip(0)[:, 0, 0, 0].tolist() == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6], abs=1e-6)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((3, 4, 4)), "shape"),
        (np.zeros((2, 5, 1, 4, 8)), "4x8 pixels, not 4x4"),
        (np.zeros((2, 2, 1, 4, 4)), "have 2 frames, fewer than the 3"),
        (np.zeros((2, 5, 1, 4, 4), np.int64), "int64"),
        (np.full((2, 5, 1, 4, 4), "x"), "holds str"),
        (np.array([{}], dtype=object), "cannot be read as an array"),
    ],
)
def test_other_arrays_are_refused(array, told, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(BadInput, match=told):
        open_frames(str(tmp_path / "a.npy"), 4, 3)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_damaged_and_missing_arrays_are_named(suffix, tmp_path):
    for data in (None, b"", b"\x93NUMPY and more"):
        if data is not None:
            (tmp_path / f"a{suffix}").write_bytes(data)
        with pytest.raises(BadInput, match=rf"a\{suffix} cannot be read as an array"):
            open_frames(str(tmp_path / f"a{suffix}"), 4, 3)


def test_frames_come_in_the_order_in_which_people_count(tmp_path):
    for place in ("scene10", "scene2", ".ipynb_checkpoints"):
        (tmp_path / place).mkdir()
        for i in range(1, 13):
            Image.new("RGB", (4, 4), (i + 100 * (place == "scene10"), 0, 0)).save(tmp_path / place / f"frame{i}.png")
    clips = open_frames(str(tmp_path), 4, 12)
    red = lambda i: ((clips.clip(i)[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert [red(i) for i in range(len(clips))] == [list(range(1, 13)), list(range(101, 113))]


def test_a_long_sequence_is_looked_at_in_pieces(tmp_path, monkeypatch):
    array = np.zeros((200, 1, 4, 4), np.float32)
    array[-1] = 2
    looked, part = [], ArrayFrames._part
    monkeypatch.setattr(ArrayFrames, "_part", lambda *a: looked.append(part(*a)) or looked[-1])
    assert not open_frames(save(tmp_path / "a.npy", array), 4, 3).bounded
    assert max(len(piece) for piece in looked) < 100


@pytest.mark.parametrize("kind", [">f4", ">f8"])
def test_arrays_of_the_other_order_of_bytes_are_read(kind, tmp_path):
    array = np.linspace(-1, 1, 3 * 16).reshape(3, 1, 4, 4)
    clips = open_frames(save(tmp_path / "a.npy", array.astype(kind)), 4, 3)
    np.testing.assert_allclose(clips.clip(0).numpy(), array, atol=1e-7)
