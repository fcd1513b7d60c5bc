"""Editing a folder by its files against loading, editing and saving it; and single files in and out.

    python benchmarks/files.py                     # a U-Net of 100 million parameters in five shards
    python benchmarks/files.py --width 320         # of the size of SD 1.x
    python benchmarks/files.py --model FOLDER --concept "van gogh"

Every way runs in a process of its own, in turns; the fastest turn counts, and the peak is of the process's memory
beyond what it had when its imports were done. The two edits are compared bit for bit. On random weights: what is timed
are files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sfumato.erase.uce import UCE
from sfumato.pipeline import load_text2image as load
from sfumato.pipeline.saving import quiet
from sfumato.pipeline.single.read import read_tokenizer
from sfumato.pipeline.single.write import write

SHARDS = 5


def synthetic(folder: Path, width: int) -> Path:
    """A pipeline of the shape of SD 1.x with random weights, its network in shards."""
    widths, text = (width, 2 * width, 4 * width, 4 * width), 768
    words = CLIPTextConfig(
        vocab_size=49408, hidden_size=text, intermediate_size=4 * text, num_hidden_layers=12, num_attention_heads=12
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    network = UNet2DConditionModel(sample_size=64, block_out_channels=widths, cross_attention_dim=text)
    pipe = StableDiffusionPipeline(
        AutoencoderKL(**blocks, block_out_channels=(32, 64, 64, 64), layers_per_block=2),
        CLIPTextModel(words),
        read_tokenizer("<|endoftext|>"),
        network,
        DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    size = 4 * sum(x.numel() for x in network.parameters()) // SHARDS
    pipe.save_pretrained(folder, max_shard_size=size, safe_serialization=True)
    return folder


def whole(model: str, concept: str, out: Path) -> None:
    """Load, edit, save."""
    UCE(concepts=(concept,)).apply(load(model, "cpu")).save(out)


def by_files(model: str, concept: str, out: Path) -> None:
    """Only the tensors concerned."""
    UCE(concepts=(concept,)).run_in_folder(model, out)


def to_file(model: str, concept: str, out: Path) -> None:
    """A folder to a single file."""
    write(load(model, "cpu"), out)


def from_file(model: str, concept: str, out: Path) -> None:
    """A single file to a pipeline."""
    load(model, "cpu")


def _child(work: Callable[[str, str, Path], None], model: str, concept: str, out: Path, pipe) -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with quiet():
        work(model, concept, out)
    seconds = time.perf_counter() - start
    pipe.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def measured(work: Callable[[str, str, Path], None], model: str, concept: str, out: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one run in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(work, model, concept, out, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def bytes_of(path: Path) -> int:
    """Of the weights in a file or folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; by default one with random weights is made")
    parser.add_argument("--concept", default="star")
    parser.add_argument("--width", type=int, default=96, help="of the first level of the network that is made")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        with quiet():
            model = asked.model or str(synthetic(home / "model", asked.width))
        rows: dict[str, tuple[float, int]] = {}
        ways: list[tuple[str, Callable[[str, str, Path], None]]] = [("load, edit, save", whole), ("by files", by_files)]
        for _ in range(asked.turns):
            for label, work in ways:
                out = home / label.replace(", ", "-").replace(" ", "-")
                shutil.rmtree(out, ignore_errors=True)
                found = measured(work, model, asked.concept, out)
                rows[label] = min(found, rows.get(label, found))
        one, other = (load(home / n, "cpu").describe()["sha256"] for n in ("load-edit-save", "by-files"))
        file = home / "model.safetensors"
        rows["folder to single file"] = measured(to_file, model, asked.concept, file)
        rows["single file to pipeline"] = measured(from_file, str(file), asked.concept, home)
        size = bytes_of(Path(model))
        print(f"weights: {size / 1e6:.0f} MB; the edits agree bit for bit: {one == other}; {os.cpu_count()} CPUs")
        for label, (seconds, peak) in rows.items():
            print(f"{label:24} {seconds:7.2f} s  {size / seconds / 1e6:7.0f} MB/s  peak {peak / 1e6:7.0f} MB")
        if asked.out:
            asked.out.write_text(json.dumps({"bytes": size, "same": one == other, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
