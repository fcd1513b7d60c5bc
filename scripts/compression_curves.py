"""Bits against distortion and realism: models of `sfumato train hfd`, their squared-error decoders, JPEG and WebP.

    python scripts/compression_curves.py --others runs/photographs/           # what models may learn from
    sfumato train hfd --preset tiny-photos --lam 0.0067 --data runs/photographs/ --out runs/hfd-0.0067
    sfumato train hfd --preset tiny-photos --lam 0.05 --data runs/photographs/ --out runs/hfd-0.05
    python scripts/compression_curves.py --models runs/hfd-0.0067/model runs/hfd-0.05/model --out runs/compression
    python scripts/compression_curves.py --models ... --out ... --pictures mine/    # a folder, instead of photographs

Photographs: those that come with scikit-image and scikit-learn; without either, and without a folder, nothing is done.
``--others`` writes squares of those of scikit-image that nothing is measured on, without people, and of the nature of
Debian's mate-backgrounds, most of the colour that there is.
Every codec's bits are those of its bytes, headers included. Distortion: PSNR and SSIM, means over the pictures.
Realism: Fréchet distance of the log-energies of Haar details, between patches of the pictures and of what comes back,
all of them together, at their own resolution. Writes ``curves.json`` to ``--out``, the page, the plot and a sheet of
pictures to ``--docs``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from real_pictures import packaged, photographs, tensor
from sfumato.commands.compress import compression_model
from sfumato.data.base import to_image
from sfumato.data.folders import pictures_in
from sfumato.files import GENERATED, contact_sheet, save_png, write_json
from sfumato.ledger.pixels import distances, texture
from sfumato.metrics.perceptual import PSNR, SSIM
from sfumato.pipeline import read_record
from sfumato.progress import track

QUALITIES: Mapping[str, tuple[int, ...]] = {"JPEG": (5, 10, 20, 40, 60, 80), "WebP": (1, 10, 30, 50, 70, 85)}
PATCH = 32
SHOWN, SIDE = 4, 160
"""Pictures on the sheet, and the side of their middles there."""
LONGEST = 768
"""Side to which larger pictures are brought, so that a decoder of hundreds of steps ends in time."""
OTHERS = (
    "brick.png", "cell.png", "clock_motion.png", "coins.png", "grass.png", "gravel.png", "horse.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png",
    "retina.jpg",
)  # fmt: skip
"""Pictures of scikit-image that models may learn from."""
NATURE = Path("/usr/share/backgrounds/mate/nature")
"""And other photographs."""
SQUARE = 256
"""Side of what is cut from them, the side that ``tiny-photos`` reads."""
LEARNED = {"codec_updates": "updates of the codec", "updates": "of the network that draws details"}
"""What a page tells of a model's training."""
Codec = Callable[[Image.Image], tuple[int, Float[Tensor, "1 3 height width"]]]
"""From a picture to the bytes that it took, and what came back, in [0, 1]."""


def gathered(folder: Path | None) -> list[Image.Image]:
    """The pictures, none larger than `LONGEST`."""
    found = [to_image(f) for f in pictures_in(folder)] if folder else [real.picture for real in photographs()]
    for picture in found:
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return found


def others(folder: Path) -> int:
    """Write the squares of those of `OTHERS` and `NATURE` that are installed, and say how many."""
    found = [file for name in OTHERS if (file := packaged("skimage", f"data/{name}"))]
    nature = pictures_in(NATURE) if NATURE.is_dir() else []
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for file in [*found, *nature]:
        picture = to_image(file)
        picture.thumbnail((4 * SQUARE, 4 * SQUARE), Image.Resampling.LANCZOS)
        for top in range(0, picture.height - SQUARE + 1, SQUARE):
            for left in range(0, picture.width - SQUARE + 1, SQUARE):
                picture.crop((left, top, left + SQUARE, top + SQUARE)).save(folder / f"{file.stem}-{top}-{left}.png")
                count += 1
    return count


def classic(kind: str, quality: int) -> Codec:
    """Pillow's encoder of that kind, at that quality."""

    def codec(picture: Image.Image) -> tuple[int, Tensor]:
        stream = BytesIO()
        picture.save(stream, kind, quality=quality)
        with Image.open(stream) as back:
            return len(stream.getvalue()), tensor(back.convert("RGB"))

    return codec


def learned(model: Any, realism: float, sampling_steps: int | None, tile: int | None) -> Codec:
    """A model's bytes, and what it makes of them."""

    def codec(picture: Image.Image) -> tuple[int, Tensor]:
        data = model.compress(np.asarray(picture))
        back = model.decompress(data, realism=realism, sampling_steps=sampling_steps, tile=tile)
        return len(data), (back[None] * 255).round() / 255

    return codec


def measured(codec: Codec, pictures: list[Image.Image], label: str = "coding") -> tuple[dict[str, float], np.ndarray]:
    """One point of a curve, and the middles of the first pictures that came back."""
    rates, psnr, ssim, ours, theirs = [], [], [], [], []
    middles: list[np.ndarray] = []
    for picture in track(pictures, label):
        size, back = codec(picture)
        if len(middles) < SHOWN:
            middles.append(middle(back))
        truth = tensor(picture)
        rates.append(8 * size / (picture.width * picture.height))
        psnr.append(float(PSNR()(back, truth)))
        ssim.append(float(SSIM()(back, truth)))
        ours.append(patches(back))
        theirs.append(patches(truth))
    ours, theirs = texture(2 * torch.cat(ours) - 1), texture(2 * torch.cat(theirs) - 1)
    mean = lambda values: sum(values) / len(values)
    point = {
        "bpp": mean(rates), "PSNR": mean(psnr), "SSIM": mean(ssim), "distance": distances(ours, theirs, len(ours))[0],
    }  # fmt: skip
    return point, np.stack(middles)


def middle(x: Float[Tensor, "1 3 height width"]) -> np.ndarray:
    """The square of `SIDE` pixels in the middle of a picture in [0, 1]; of smaller ones all, on white."""
    top, left = (max(0, n - SIDE) // 2 for n in x.shape[-2:])
    cut = x[0, :, top : top + SIDE, left : left + SIDE]
    whole = torch.nn.functional.pad(cut, (0, SIDE - cut.shape[2], 0, SIDE - cut.shape[1]), value=1.0)
    return (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def patches(x: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "n 3 patch patch"]:
    """The squares of `PATCH` pixels side by side in a picture; what is left over is left out."""
    cut = x[0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return cut.movedim(0, 2).flatten(0, 1)


def curves(
    models: list[Any], pictures: list[Image.Image], steps: int | None, tile: int | None
) -> tuple[dict[str, Any], np.ndarray]:
    """All curves by name, each a list of points in the order of their bits; and the sheet: a row for each of the first
    pictures, itself, then what comes back of the fewest bits of models, of the others at the quality nearest to them.
    """
    codecs = {kind: [classic(kind, q) for q in qualities] for kind, qualities in QUALITIES.items()}
    for name, realism in (("squared error", 0.0), ("HFD", 1.0)):
        codecs[name] = [learned(model, realism, steps, tile) for model in models]
    found = {}
    for name, several in codecs.items():
        points = [measured(codec, pictures, f"{name}, {i} of {len(several)}") for i, codec in enumerate(several, 1)]
        found[name] = sorted(points, key=lambda each: each[0]["bpp"])
    fewest = found["HFD"][0][0]["bpp"]
    nearest = [min(points, key=lambda each: abs(each[0]["bpp"] - fewest)) for points in found.values()]
    truth = np.stack([middle(tensor(picture)) for picture in pictures[:SHOWN]])
    columns = [truth, *(shown for _, shown in nearest)]
    sheet = contact_sheet(np.stack(columns, axis=1).reshape(-1, SIDE, SIDE, 3), len(columns))
    for point, _ in nearest:
        point["shown"] = True
    return {name: [point for point, _ in points] for name, points in found.items()}, sheet


def in_words(model: str) -> str:
    """How a model was made, by its record."""
    made = read_record(model).get("provenance", {}).get("config")
    if made is None:
        return f"{Path(model).name}, which does not say how it was made"
    return f"lam {made['lam']:g}, " + ", ".join(f"{made[key]:,} {words}" for key, words in LEARNED.items())


def page(found: Mapping[str, Any], n: int, models: list[str], docs: Path) -> None:
    """``compression.png`` and ``compression.md``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    columns = {"PSNR": "PSNR in dB", "SSIM": "SSIM", "distance": "Fréchet distance of texture"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (key, label) in zip(axes, columns.items(), strict=True):
        for name, points in found.items():
            axis.plot([p["bpp"] for p in points], [p[key] for p in points], marker="o", label=name)
        axis.set(xlabel="bits per pixel", ylabel=label, xscale="log")
    axes[2].set_yscale("log")
    for scale in (*(axis.xaxis for axis in axes), axes[2].yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(FormatStrFormatter("%g"))
        scale.set_minor_locator(NullLocator())
    axes[0].legend()
    docs.mkdir(parents=True, exist_ok=True)
    figure.savefig(docs / "compression.png", dpi=120)
    plt.close(figure)
    bold = lambda p: f"**{p['bpp']:.3f}**" if p.get("shown") else f"{p['bpp']:.3f}"
    rows = [
        f"| {name} | {bold(p)} | {p['PSNR']:.2f} | {p['SSIM']:.3f} | {p['distance']:.3g} |"
        for name, points in found.items()
        for p in points
    ]
    lines = [
        "# Compression: bits, distortion and realism", "",
        f"{n} pictures. Models: {'; '.join(models)}. `scripts/compression_curves.py` measured them and made this page. "
        "Bits are those of the bytes, headers included. Models of this size and training show that the method works, "
        "not what it can do.", "",
        "| codec | bits per pixel | PSNR | SSIM | distance of texture |", "| --- | --- | --- | --- | --- |", *rows, "",
        "![curves](compression.png)", "",
        f"The middles of the first {min(n, SHOWN)} pictures: themselves; then, at the bits printed in bold above, "
        f"{', '.join(found)}.", "",
        "![pictures](compression-pictures.png)", "",
        f"Distance: Fréchet, of the log-energies of Haar details in patches of {PATCH} pixels; lower is better. "
        "\"squared error\" is the codec's own decoder, \"HFD\" what is drawn given its picture: the same bytes.", "",
    ]  # fmt: skip
    (docs / "compression.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="folders that sfumato train hfd wrote")
    parser.add_argument("--others", type=Path, help="write squares of other photographs there, and stop")
    parser.add_argument("--pictures", type=Path, help="a folder, instead of the photographs of installed packages")
    parser.add_argument("--out", type=Path, default=Path("runs/compression"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--sampling-steps", type=int, help="by default each model's own")
    parser.add_argument("--tile", type=int, help="draw in tiles of so many pixels a side")
    parser.add_argument("--device")
    args = parser.parse_args()
    if args.others:
        print(f"{others(args.others)} squares: {args.others}")
        return
    if not args.models:
        parser.error("name the models to measure with --models")
    pictures = gathered(args.pictures)
    if not pictures:
        print("no photographs here: install scikit-image, or name a folder with --pictures")
        return
    models = [compression_model(name, args.device) for name in args.models]
    found, sheet = curves(models, pictures, args.sampling_steps, args.tile)
    made = [in_words(name) for name in args.models]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "curves.json", {"pictures": len(pictures), "models": made, "curves": found}, True)
    page(found, len(pictures), made, args.docs)
    told = {"Source": GENERATED, "model": "; ".join(made)}
    save_png(args.docs / "compression-pictures.png", sheet, told, overwrite=True)
    print(f"{len(pictures)} pictures: {args.docs / 'compression.md'}")


if __name__ == "__main__":
    main()
