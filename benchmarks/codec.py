"""What bytes cost: a picture compressed and decompressed by ELIC's full-size codec, part by part.

    python benchmarks/codec.py                             # 768 x 512 pixels, one thread
    python benchmarks/codec.py --width 1920 --height 1088 --threads 2

Untrained networks, whose sums take as long as trained ones'; their latents are scaled so that there are bits to write.
"entropy" is what tells means and scales, in fixed point, and the range coder. Where CompressAI is installed, its
``Elic2022Official`` does the same with its own entropy coder, in turns with ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from sfumato.nets import Elic
from sfumato.pipeline.bitstream import RangeReader, RangeWriter
from timing import timed


def ours(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The parts of our way there and back."""
    codec = Elic().eval().requires_grad_(False)
    with torch.no_grad():
        for layers in codec.merge:
            layers[-1].bias[: layers[-1].out_channels // 2] += 2.0
    codec.freeze()
    height, width = x.shape[-2:]
    y = codec.g_a(x)
    y = 2 * (y - y.mean()) / y.std()

    def write() -> bytes:
        writer = RangeWriter()
        codec.coded(writer, height, width, y)
        return writer.payload()

    payload = write()
    print(f"{8 * len(payload) / (height * width):.3f} bits per pixel")
    return {
        "analysis": lambda: codec.g_a(x),
        "entropy, writing": write,
        "entropy, reading": lambda: codec.coded(RangeReader(payload), height, width),
        "synthesis": lambda: codec.g_s(y),
    }


def theirs(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """CompressAI's whole way there and back, where it is installed."""
    try:
        from compressai.models import Elic2022Official
    except ImportError:
        print("CompressAI is not installed: ours alone")
        return {}
    model: Any = Elic2022Official().eval()
    model.update(force=True)
    with torch.no_grad():
        packed = model.compress(x)
    return {
        "CompressAI, compress": lambda: model.compress(x),
        "CompressAI, decompress": lambda: model.decompress(packed["strings"], packed["shape"]),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--height", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.rand(1, 3, options.height, options.width)
    works = {**ours(2 * x - 1), **theirs(x)}
    for name, seconds in timed(works, options.repeats).items():
        print(f"{name:24} {seconds:8.2f} s")


if __name__ == "__main__":
    main()
