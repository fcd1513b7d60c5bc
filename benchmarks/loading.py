"""Loading pictures on one core, decoded, cropped, scaled and mirrored: ours against the ways of torch's loaders.

    python benchmarks/loading.py                           # 400 JPEGs of 512 x 384, to 64 pixels
    python benchmarks/loading.py --format png --side 256

All read the same files of a temporary folder in batches, in one process and one thread, in turns, and the fastest turn
counts. "PIL and DataLoader" is the usual data set written by hand; torchvision's ``ImageFolder`` is timed where it is
installed. Ours reads the same pictures from a folder, a Parquet file and a WebDataset shard.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sfumato.data.pictures import open_pictures
from sfumato.train.pixels import PixelTraining
from sfumato.train.simple_diffusion import SimpleDiffusion
from timing import timed

Batches = Callable[[], Iterator[Tensor]]


def photographs(folder: Path, n: int, side: int, kind: str) -> None:
    """Smooth random pictures of 4:3 with some texture, in two classes; compressed about as well as photographs."""
    rng = np.random.default_rng(0)
    size = (side * 4 // 3, side)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(coarse) + rng.normal(0, 6, (size[1], size[0], 1))
        file = folder / "ab"[i % 2] / f"{i:05d}.{kind}"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)


def packed(folder: Path, out: Path) -> dict[str, str]:
    """The same files as a Parquet file and as a shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.*"))
    pq.write_table(pa.table({"image": [f.read_bytes() for f in files]}), out / "all.parquet")
    with tarfile.open(out / "all.tar", "w") as tar:
        for file in files:
            entry = tarfile.TarInfo(file.name)
            entry.size = file.stat().st_size
            tar.addfile(entry, io.BytesIO(file.read_bytes()))
    return {"folder": str(folder), "Parquet": str(out / "all.parquet"), "WebDataset shard": str(out / "all.tar")}


def ours(source: str, size: int, batch: int) -> Batches:
    """As the recipes of pixels draw, read and mirror their batches: as many pictures as there are, at random."""
    recipe, pictures = SimpleDiffusion(size=size, flip=True, classes=False), open_pictures(source, size)
    training = PixelTraining(recipe, recipe.model(()), pictures)

    def batches() -> Iterator[Tensor]:
        for step, rows in enumerate(torch.arange(len(pictures)).split(batch)):
            yield training.batch(step, torch.Generator().manual_seed(step), len(rows))["x"]

    return batches


class ByHand(Dataset):
    """A picture of a folder as the usual script reads it."""

    def __init__(self, folder: Path, size: int):
        self.files, self.size = sorted(folder.rglob("*.*")), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.files[index]).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.LANCZOS))
        x = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        return x.flip(-1) if torch.rand(()) < 0.5 else x


def torchvision_folder(folder: Path, size: int, batch: int) -> Batches:
    """torchvision's ``ImageFolder`` with the usual transforms."""
    from torchvision import transforms as t
    from torchvision.datasets import ImageFolder

    way = [t.Resize(size, t.InterpolationMode.LANCZOS), t.CenterCrop(size), t.RandomHorizontalFlip(), t.ToTensor()]
    loader = DataLoader(ImageFolder(str(folder), t.Compose([*way, t.Normalize(0.5, 0.5)])), batch)
    return lambda: (x for x, _ in loader)


def count(batches: Batches) -> int:
    return sum(map(len, batches()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--side", type=int, default=384, help="height of the files' pictures; the width is 4/3 of it")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures that come out")
    parser.add_argument("--format", default="jpg", choices=("jpg", "png", "webp"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        photographs(folder, args.pictures, args.side, args.format)
        loader = DataLoader(ByHand(folder, args.size), args.batch)
        ways: dict[str, Batches] = {"PIL and DataLoader": lambda: iter(loader)}
        try:
            ways["torchvision's ImageFolder"] = torchvision_folder(folder, args.size, args.batch)
        except (ImportError, RuntimeError) as error:  # the latter where its build does not fit torch's
            print(f"torchvision is not timed: {error}")
        for name, source in packed(folder, Path(scratch)).items():
            ways[f"ours, {name}"] = ours(source, args.size, args.batch)
        # The round that is not counted fills the caches of files.
        works = {name: partial(count, batches) for name, batches in ways.items()}
        best = timed(works, args.repeats)
    plain = best["PIL and DataLoader"]
    print(f"{args.pictures} pictures ({args.format}) of {args.side * 4 // 3} x {args.side} to {args.size}, one thread")
    for name, seconds in best.items():
        print(f"{name:28}{args.pictures / seconds:9.1f} pictures/s{plain / seconds:8.2f} of the first")


if __name__ == "__main__":
    main()
