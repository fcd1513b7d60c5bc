"""The mark in the pixels: exact after rounding, read after JPEG and resizing, not found where there is none."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import BadInput
from sfumato.pipeline import watermark as marks

RNG = np.random.default_rng(0)


def picture(side: int, kind: str) -> np.ndarray:
    if kind == "noise":
        return RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    if kind == "smooth":
        small = Image.fromarray(RNG.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    colour = {"white": (255, 255, 255), "black": (0, 0, 0), "red": (255, 0, 0)}[kind]
    return np.tile(np.array(colour, np.uint8), (side, side, 1))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize("kind", ["noise", "smooth", "white", "black", "red"])
def test_every_coefficient_after_rounding_and_hardly_seen(kind):
    x = picture(64, kind)
    for payload in (0, 0xBEEF, 2**16 - 1):
        made = marks.embed(x, payload)
        found = marks.read(made)
        assert (found.payload, found.agreeing, found.votes) == (payload, 512, 512) and found.marked
        assert psnr(x, made) > 38


@pytest.mark.parametrize(("quality", "least"), [(95, 1.0), (90, 1.0), (75, 0.97)])
def test_jpeg(quality, least):
    made, file = marks.embed(picture(64, "smooth"), 12345), io.BytesIO()
    Image.fromarray(made).save(file, "JPEG", quality=quality)
    found = marks.read(np.asarray(Image.open(file)))
    assert found.payload == 12345 and found.marked and found.agreeing >= least * found.votes


@pytest.mark.parametrize("factor", [0.5, 0.75, 2.0])
def test_resized_and_back(factor):
    made = Image.fromarray(marks.embed(picture(256, "smooth"), 0xDEADBEEF))
    away = made.resize((int(256 * factor),) * 2, Image.Resampling.LANCZOS)
    found = marks.read(np.asarray(away.resize((256, 256), Image.Resampling.LANCZOS)))
    assert found.payload == 0xDEADBEEF and found.bits == 32 and found.marked


def test_pictures_without_a_mark_agree_by_chance_alone():
    bits, n = 16, 200
    agreeing, low = 0, 1.0
    for i in range(n):
        x = picture(32, "noise" if i % 2 else "smooth")
        found = marks.read(x)
        low = min(low, found.p_value)
        # agreement with a number that was fixed beforehand
        which, dither = marks._plan(found.votes, bits)
        phase = np.mod(marks._coefficients(x.astype(float)) - dither, marks.STEP) / marks.STEP
        agreeing += int(((np.abs(phase - 0.5) < 0.25) == ((0xA5C3 >> which) & 1)).sum())
    votes = n * found.votes
    assert abs(agreeing - votes / 2) < 4 * math.sqrt(votes) / 2 and low > marks.SIGNIFICANT


def test_the_tail_of_a_coin():
    assert marks.tail(4, 4) == 1 / 16 and marks.tail(4, 0) == 1.0 and marks.tail(4, 2) == 11 / 16
    assert marks.tail(5000, 2700) >= 0.5 * math.erfc((2700 - 2500) / math.sqrt(2 * 1250))


def test_what_cannot_be_marked_is_refused():
    with pytest.raises(BadInput, match="16 pixels"):
        marks.embed(picture(8, "noise"), 1)
    with pytest.raises(BadInput, match=r"2\*\*16"):
        marks.embed(picture(16, "noise"), 2**16)
    with pytest.raises(BadInput, match="uint8"):
        marks.read(np.zeros((16, 16, 3)))
    with pytest.raises(marks.MarkFailed, match="not read back"):
        marks.require(picture(32, "smooth"), 5)
