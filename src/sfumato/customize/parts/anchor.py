"""Pictures of several subjects from the latent of an anchor picture, each marked, with its metadata and sidecar."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from sfumato import __version__
from sfumato.errors import BadInput
from sfumato.files import GENERATED, atomic_file, refuse_existing, write_json
from sfumato.finite import require_unit_range
from sfumato.foreign import reading
from sfumato.pipeline import Text2Image
from sfumato.pipeline import watermark as marks
from sfumato.pipeline.contract import Noised, Start
from sfumato.pipeline.sampling import gated, make_scheduler
from sfumato.sample.inversion import invert

Mode = Literal["noised", "raw", "inverted"]
IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MANIFEST = "Provenance"
"""Keyword of the PNG chunk with the manifest."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Marked:
    """A picture that is marked in its pixels and in its metadata.

    Attributes:
        pixels: (height, width, 3), uint8.
        payload: the number in its pixels, by which its manifest is found.
        manifest: what the metadata and the sidecar say.
        png: the file.
    """

    pixels: np.ndarray
    payload: int
    manifest: Mapping[str, Any]
    png: bytes

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the PNG, and the manifest beside it as NAME.json, the manifest first.

        Raises:
            BadInput: a name that does not end in .png, a file that exists (without ``overwrite``).
            MarkFailed: the file's mark or metadata is not read back; nothing is written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise BadInput(f"{path} must end in .png: other formats would wear the mark down")
        beside = path.with_suffix(".json")
        for target in (path, beside):
            refuse_existing(target, overwrite)
        _require(self.png, self.payload, self.manifest)
        with atomic_file(path, overwrite) as temporary:
            temporary.write_bytes(self.png)
            _require(temporary.read_bytes(), self.payload, self.manifest)
            write_json(beside, self.manifest, overwrite)


@dataclass(frozen=True)
class Report:
    """What a picture says of where it is from.

    Attributes:
        watermark: what its pixels say.
        manifest: what its metadata say; None where there is none.
        agree: whether pixels and metadata name the same number; None without metadata.
    """

    watermark: marks.Reading
    manifest: Mapping[str, Any] | None
    agree: bool | None


def verify(picture: str | os.PathLike | bytes | np.ndarray, size: tuple[int, int] | None = None) -> Report:
    """Read the mark and the metadata of a picture.

    Args:
        picture: a file, its bytes, or pixels (height, width, 3) in uint8.
        size: height and width before it was resized, as its sidecar says them; None: its own.

    Raises:
        BadInput: not a picture, or one too small to hold a mark.
    """
    manifest: Any = None
    if isinstance(picture, np.ndarray):
        marks.check_pixels(picture)
        image = Image.fromarray(picture)
    else:
        source = io.BytesIO(picture) if isinstance(picture, bytes) else Path(picture)
        with reading("the bytes" if isinstance(picture, bytes) else picture, "a picture"), Image.open(source) as opened:
            image = opened.convert("RGB")
            text = getattr(opened, "text", {}).get(MANIFEST)
            manifest = json.loads(text) if text else None
    if size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    found = marks.read(np.asarray(image))
    said = manifest.get("payload") if isinstance(manifest, dict) else None
    return Report(found, manifest, None if said is None else said == found.payload)


def compose(
    pipe: Text2Image,
    anchor: Float[Tensor, "3 height width"],
    prompt: str,
    seeds: int | Sequence[int] = 0,
    *,
    strength: float = 0.6,
    mode: Mode = "noised",
    sampling_steps: int = 50,
    cfg_scale: float | None = 7.5,
    captured: bool = False,
    batch: int = 32,
) -> list[Marked]:
    """Draw subjects together from an anchor picture; one marked picture a seed, each read back from its file's bytes.

    Of ``sampling_steps`` steps the last int(sampling_steps strength) are taken (of a flow, rounded up), from the time
    t0 on, and the walk begins with the anchor's latent z_a (the posterior's mean):

    - "noised": alpha(t0) z_a + sigma(t0) eps, as image to image begins;
    - "raw": z_a itself, the literal reading of the paper's abstract, which the network never saw at a large t0
      (unconfirmed which of the two the paper takes);
    - "inverted": z_a by DDIM backwards to t0 under the empty prompt, which keeps most of the layout.

    Args:
        pipe: knows the subjects: what `AnchoredComposition.run` makes, or ``attach`` with its file.
        anchor: in [0, 1]; of the pipeline's size.
        prompt: names the subjects by their words.
        strength: in (0, 1]; small keeps the anchor, 1 draws anew.
        cfg_scale: guidance; None: the model's.
        captured: the anchor is a photograph, which the metadata then say.

    Raises:
        BadInput: a pipeline that knows no declared subject, a prompt that names none, less than one step.
        MarkFailed: a mark or metadata is not read back; no picture is returned.
    """
    subjects = pipe.defaults.get("marked")
    if not subjects:
        raise BadInput("this pipeline knows no declared subject: teach it some with AnchoredComposition")
    named = {word: told for word, told in subjects.items() if word in prompt}
    if not named:
        raise BadInput(f"the prompt names no subject: say {' and '.join(subjects)} in it")
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    start, scheduler = begin(pipe, anchor, strength, mode, sampling_steps)
    drawn = pipe.draw(
        prompt, seeds, sampling_steps=sampling_steps, cfg_scale=cfg_scale, scheduler=scheduler, size=anchor.shape[-1],
        start=start, batch=batch,
    )  # fmt: skip
    numbers = marks.payloads(subjects, [prompt] * len(seeds), seeds, drawn.shape[-1])
    source = "compositeWithTrainedAlgorithmicMedia" if captured else "trainedAlgorithmicMedia"
    same = {
        "prompt": prompt, "subjects": named, "model": pipe.describe()["sha256"], "strength": strength, "mode": mode,
        "sampling_steps": sampling_steps, "anchor_sha256": _sha256(marks.as_levels(anchor)),
        "digital_source_type": IPTC + source, "software": f"sfumato {__version__}", "size": list(drawn.shape[-2:]),
        "watermark": {"method": "QIM on 8x8 cosine blocks", "bits": marks.bits_for(*drawn.shape[-2:])},
        "c2pa": "none",
    }  # fmt: skip
    made = []
    for x, seed, number in zip(drawn, seeds, numbers, strict=True):
        pixels = marks.as_levels(x)
        manifest = {**same, "seed": seed, "payload": number, "pixels_sha256": _sha256(pixels)}
        png = _png(pixels, manifest)
        _require(png, number, manifest)
        _log.info("composed %s", json.dumps(manifest, sort_keys=True))
        made.append(Marked(pixels, number, manifest, png))
    return made


@torch.no_grad()
def begin(
    pipe: Text2Image, anchor: Float[Tensor, "3 height width"], strength: float, mode: Mode, sampling_steps: int
) -> tuple[Start, str | None]:
    """Where a walk from the anchor begins (see `compose`), and whose steps it takes.

    Raises:
        BadInput: not a square picture in [0, 1], an unknown mode, less than one step.
    """
    if anchor.ndim != 3 or anchor.shape[0] != 3 or anchor.shape[1] != anchor.shape[2]:
        raise BadInput(f"an anchor is a square picture (3, side, side) in [0, 1], not {tuple(anchor.shape)}")
    require_unit_range(anchor, "the anchor", 1e-3)
    noised = Noised(anchor[None], strength)  # checks the strength
    first = pipe.clock.first_step(strength, sampling_steps)
    if mode == "noised":
        return noised, None
    if mode not in ("raw", "inverted"):
        raise BadInput(f"unknown mode {mode!r}: noised, raw or inverted")
    z = pipe.encode_image(anchor[None].to(pipe.device) * 2 - 1)
    solver = make_scheduler(pipe, "ddim")
    pipe.clock.begin(solver, sampling_steps, tuple(z.shape))
    times = [pipe.clock.time(t) for t in solver.timesteps]
    if mode == "inverted":
        end = 0.0 if solver.config.get("set_alpha_to_one", True) else pipe.cleanest
        back = torch.tensor([end, *times[first:][::-1]], dtype=torch.float64)
        nothing = pipe.unconditional(1)
        with gated(pipe, nothing):
            z = invert(pipe.denoiser, z, back, nothing)
    return (z, times[first]), "ddim"


def _png(pixels: np.ndarray, manifest: Mapping[str, Any]) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    told = {"Software": manifest["software"], "Source": GENERATED, MANIFEST: json.dumps(manifest, sort_keys=True)}
    for key, value in told.items():
        chunks.add_itxt(key, value)
    chunks.add_itxt("XML:com.adobe.xmp", _XMP.format(manifest["digital_source_type"]))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="{}"/></rdf:RDF></x:xmpmeta>'
)


def _require(png: bytes, payload: int, manifest: Mapping[str, Any]) -> None:
    """Refuse a file from which mark or metadata are not read as they should be."""
    found = verify(png)
    if found.watermark.payload != payload or not found.watermark.marked:
        raise marks.MarkFailed("the mark was not read back from the picture's file: nothing was returned or written")
    if found.manifest != json.loads(json.dumps(manifest)):
        raise marks.MarkFailed("the metadata were not read back from the picture's file: nothing was written")


def _sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
