"""The script that audits detectors and distances on real pictures, on pictures made up here."""

from __future__ import annotations

import torch
from PIL import Image

import real_pictures
from sfumato.metrics.detectors import Detection
from sfumato.metrics.detectors.labels import LabelDetector
from sfumato.metrics.perceptual import MSE


class Bright(LabelDetector):
    """"lamp" in bright pictures, "cave" in dark ones."""

    name, labels = "bright", ("lamp, light", "cave")
    threshold = "top-1"

    def __call__(self, images, concept) -> Detection:
        light = images.mean((1, 2, 3))
        return self.judged(torch.stack([light, 1 - light], 1), concept)


def test_stamps_are_read_with_their_captions(tmp_path):
    stamp = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    (tmp_path / "animals").mkdir()
    for name, text in (("lamp", "A light.\nde=Eine Lampe.\n"), ("bear", "Polar bear\n")):
        stamp.save(tmp_path / "animals" / f"{name}.png")
        (tmp_path / "animals" / f"{name}.txt").write_text(text, encoding="utf-8")
    stamp.save(tmp_path / "animals" / "nameless.png")
    bear, lamp = real_pictures.stamps(tmp_path)
    assert lamp.names == ("light",) and bear.names == ("Polar bear",)
    assert lamp.picture.getpixel((0, 0)) == (255, 255, 255), "stamps lie on white"
    assert [one.file for one in real_pictures.known(Bright(), [bear, lamp])] == ["lamp.png"]


def test_what_is_found_is_counted_against_what_is_not_there():
    made = lambda name, light: real_pictures.Real(name, Image.new("RGB", (8, 8), (light,) * 3), (name,))
    told = real_pictures.seen(Bright(), [made("lamp", 250), made("cave", 5), made("cave", 200)])
    assert told["found"]["rate"] == 2 / 3 and told["missed"] == ["cave"]
    assert told["found where it is not"]["rate"] == 1 / 2 and told["found where it is not"]["n"] == 2


def test_distances_grow_with_damage():
    rng = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 32, 32, generator=rng), (64, 64), mode="bicubic")[0]
    array = (noise.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    told = real_pictures.growing(MSE(), [real_pictures.Real("x", Image.fromarray(array), ())])
    assert told.pop("to itself") == 0 and told.keys() == real_pictures.DAMAGES.keys()
    assert all(found["in order"] == 1 and sorted(found["means"]) == found["means"] for found in told.values())
