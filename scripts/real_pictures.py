"""Metrics and detectors on real pictures: do detectors see what is there, and do distances grow with damage?

    python scripts/real_pictures.py                            # every detector that is installed
    python scripts/real_pictures.py --detector imagenet:lite2 --json audit.json

Photographs: those that come with scikit-image and scikit-learn. Stamps: Debian's tuxpaint-stamps-default, with their
captions, each whose caption is one of the detector's labels. What is not installed is left out, and said. Nothing is
fetched.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFilter
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import wilson
from sfumato.metrics.detectors import Detector, make_detector
from sfumato.metrics.detectors.labels import LabelDetector, plain
from sfumato.metrics.perceptual import MSE, Distance, OneMinusSSIM

STAMPS = Path("/usr/share/tuxpaint/stamps")
PHOTOGRAPHS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("skimage", "data/chelsea.png"): ("tabby", "tiger cat", "Egyptian cat"),
    ("skimage", "data/coffee.png"): ("espresso", "coffee mug", "cup"),
    ("skimage", "data/rocket.jpg"): ("missile", "projectile, missile"),
    ("sklearn", "datasets/images/china.jpg"): ("palace",),
    ("sklearn", "datasets/images/flower.jpg"): ("daisy",),
}
"""(package, file) -> labels of ImageNet any of which is right."""
SIDE = 256
"""Pixels of the pictures between which distances are measured."""


@dataclass(frozen=True)
class Real:
    """A real picture, with the names of what it shows, any of which is right."""

    file: str
    picture: Image.Image
    names: tuple[str, ...]


def packaged(package: str, name: str) -> Path | None:
    """A file of a package; None where it is not installed."""
    spec = find_spec(package)
    file = Path(spec.origin).parent / name if spec and spec.origin else None
    return file if file is not None and file.is_file() else None


def photographs() -> list[Real]:
    """The photographs of the packages that are installed."""
    found = []
    for (package, name), names in PHOTOGRAPHS.items():
        if file := packaged(package, name):
            found.append(Real(f"{package}: {file.name}", Image.open(file).convert("RGB"), names))
    return found


def stamps(folder: Path = STAMPS) -> list[Real]:
    """Stamps on white, with their English captions as names."""
    found = []
    for file in sorted(folder.rglob("*.png")):
        text = file.with_suffix(".txt")
        if text.is_file():
            drawn = Image.open(file).convert("RGBA")
            paper = Image.new("RGBA", drawn.size, "white")
            found.append(Real(file.name, Image.alpha_composite(paper, drawn).convert("RGB"), (caption(text),)))
    return found


def caption(file: Path) -> str:
    """The English caption of a stamp, the first line of its file, without article and full stop."""
    line = file.read_text(encoding="utf-8").splitlines()[0].strip().rstrip(".!")
    return line.split(" ", 1)[1] if line.lower().startswith(("a ", "an ", "the ")) else line


def tensor(picture: Image.Image) -> Float[Tensor, "1 3 height width"]:
    """A picture in [0, 1]."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255


def seen(detector: Detector, pictures: Sequence[Real]) -> dict[str, Any]:
    """How often a detector finds what a picture shows, and how often what another one shows."""
    hits, missed, false, wrong = 0, [], 0, 0
    for i, one in enumerate(pictures):
        x = tensor(one.picture)
        there = any(bool(detector(x, name).present) for name in one.names if knows(detector, name))
        hits += there
        missed += [] if there else [one.file]
        near = pictures[(i + 1) % len(pictures)].names if len(pictures) > 1 else ()
        others = [name for name in near if knows(detector, name) and name not in one.names]
        wrong += bool(others)
        false += any(bool(detector(x, name).present) for name in others)
    rate = lambda k, n: {"rate": k / n, "interval": wilson(k, n)[:2], "n": n} if n else None
    return {"found": rate(hits, len(pictures)), "found where it is not": rate(false, wrong), "missed": missed}


def knows(detector: Detector, name: str) -> bool:
    """Whether a detector can look for a name."""
    try:
        detector.check(name)
    except BadInput:
        return False
    return True


def known(detector: Detector, pictures: Sequence[Real]) -> list[Real]:
    """The pictures that show something that a detector has a label for."""
    if isinstance(detector, LabelDetector):
        labels = {plain(part) for label in detector.labels for part in (label, *label.split(","))}
        return [one for one in pictures if any(plain(name) in labels for name in one.names)]
    return [one for one in pictures if any(knows(detector, name) for name in one.names)]


def blur(picture: Image.Image, radius: int) -> Image.Image:
    """The picture after a Gaussian blur."""
    return picture.filter(ImageFilter.GaussianBlur(radius))


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """The picture after JPEG."""
    stream = BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


DAMAGES: Mapping[str, Sequence[Callable[[Image.Image], Image.Image]]] = {
    "blur of 1, 2, 4 pixels": [partial(blur, radius=radius) for radius in (1, 2, 4)],
    "JPEG of quality 90, 50, 10": [partial(jpeg, quality=quality) for quality in (90, 50, 10)],
}
"""Each in three strengths, weak to strong."""


def growing(distance: Distance, pictures: Sequence[Real]) -> dict[str, Any]:
    """Mean distances from the damaged pictures, and the share of pictures for which each step of damage is further."""
    small = [one.picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for one in pictures]
    whole = torch.cat([tensor(picture) for picture in small])
    told: dict[str, Any] = {"to itself": float(distance(whole, whole).max())}
    for name, steps in DAMAGES.items():
        rows = torch.stack([distance(whole, torch.cat([tensor(damage(p)) for p in small])) for damage in steps])
        ordered = ((rows[1:] > rows[:-1]).all(dim=0) & (rows[0] > 0)).double().mean()
        told[name] = {"means": rows.mean(dim=1).tolist(), "in order": float(ordered)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="imagenet", help="as for sfumato audit")
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of stamps with captions")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    sets = {"photographs": photographs(), "stamps": stamps(options.stamps)}
    told: dict[str, Any] = {}
    for name, pictures in sets.items():
        print(f"{name}: {len(pictures)}" + ("" if pictures else " (not installed)"))
    try:
        detector = make_detector(options.detector, [])
    except BadInput as error:
        print(f"no detector: {error}")
    else:
        told["detector"] = {**detector.describe(), "resize": detector.resize}
        print(f"detector: {told['detector']}")
        for name, pictures in sets.items():
            if some := known(detector, pictures):
                told[f"seen in {name}"] = seen(detector, some)
                print(f"seen in {name}: {told[f'seen in {name}']}")
    for distance in (MSE(), OneMinusSSIM()):
        if sets["photographs"]:
            told[f"distance {distance.name}"] = growing(distance, sets["photographs"])
            print(f"distance {distance.name}: {told[f'distance {distance.name}']}")
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
