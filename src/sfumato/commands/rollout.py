"""``sfumato rollout``: frames without end from a model of frames, as an animation and a contact sheet."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sfumato.commands.options import STEPS, parse
from sfumato.commands.sample import contact_sheet, read_seeds
from sfumato.errors import BadInput
from sfumato.fields import Count
from sfumato.files import GENERATED, atomic_folder, refuse_existing, save_png, write_json
from sfumato.plan import Plan
from sfumato.text import counted

EXAMPLE = "sfumato rollout --model run/model --frames 64 --out frames/"
HELD_OUT = 10**6
"""Added to the seed of the data that a model was trained on."""
COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Options of the command."""

    model: Path
    """Folder of a model of frames, such as `sfumato train rolling` writes."""
    out: Path
    """Folder for the animation, the contact sheet, the frames and the record."""
    frames: Count = 64
    """How many frames to draw; there is no limit."""
    seeds: str = "0-3"
    """Seeds, as in 7 or 0-3 or 1,5,9: one sequence each."""
    data: str | None = None
    """Where the context comes from; by default what the model was trained on, drawn anew."""
    truth: bool = False
    """Show what really follows the context beside each sequence, and measure the error of every frame."""
    sampling_steps: Count | None = None
    """Network calls for each frame; by default the model's own."""
    frame_times: Literal["rolling", "standard"] | None = None
    """Frame by frame, or block by block; by default as the model was trained."""
    finish: bool = False
    """Let the last window run out instead of dropping its noisy frames."""
    fps: Count = 12
    """Frames a second of the animation."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default the fastest there is."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    options = Rollout(**parse("sfumato rollout", args, Rollout, about=f"Example: {EXAMPLE}", aliases=STEPS)[0])
    seeds = read_seeds(options.seeds)
    refuse_existing(options.out, options.overwrite)

    from safetensors.torch import save_file

    from sfumato.pipeline import load, read_record

    model = load(str(options.model), device=options.device)
    if not hasattr(model, "rollout"):
        raise BadInput(f"{options.model} is no model of frames: `sfumato train rolling` makes one")
    made = read_record(options.model).get("provenance")
    trained = made.get("config") if isinstance(made, dict) and isinstance(made.get("config"), dict) else {}
    source = options.data or trained.get("data")
    if source is None and model.window.clean:
        raise BadInput(f"{options.model} does not say what it was trained on: name a source of context with --data")
    steps = options.sampling_steps or model.defaults["sampling_steps"]
    writes = [f"{options.out}/ (rollout.gif, sheet.png, frames.safetensors, rollout.json)"]
    sequences = counted(len(seeds), "sequence")
    title = f"{sequences} of {counted(options.frames, 'frame')}, {counted(steps, 'network call')} each"
    Plan(title, writes=writes).show()
    clips = context(model, source, len(seeds), options.frames * options.truth, int(trained.get("seed", 0)) + HELD_OUT)
    given, follows = clips[:, : model.window.clean], clips[:, model.window.clean :]
    drawn = model.rollout(
        seeds,
        given,
        options.frames,
        sampling_steps=steps,
        schedule=options.frame_times,
        finish=options.finish,
        progress=True,
    )
    tensors, record = {"context": given, "frames": drawn}, {**asdict(options), "seeds": seeds, "sampling_steps": steps}
    shown = drawn
    if options.truth:
        tensors["truth"] = follows
        record["error"] = (drawn - follows).square().mean((0, 2, 3, 4)).tolist()
        shown = drawn.new_empty(2 * len(seeds), *drawn.shape[1:])
        shown[0::2], shown[1::2] = drawn, follows
    record |= {"model": model.describe(), "data": source, "source": GENERATED}
    pictures = as_pictures(shown)
    with atomic_folder(options.out, options.overwrite) as folder:
        moments = [contact_sheet(moment, len(moment)) for moment in pictures.swapaxes(0, 1)]
        animate(folder / "rollout.gif", moments, options.fps)
        columns = np.linspace(0, options.frames - 1, min(COLUMNS, options.frames)).round().astype(int)
        sheet = contact_sheet(pictures[:, columns].reshape(-1, *pictures.shape[2:]), len(columns))
        save_png(folder / "sheet.png", sheet, {"model": str(options.model), "seeds": seeds, "frames": columns.tolist()})
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "frames.safetensors")
        write_json(folder / "rollout.json", record)
    print(f"{sequences} in {options.out / 'rollout.gif'}, side by side in {options.out / 'sheet.png'}")


def context(model, source: str | None, n: int, more: int, seed: int):
    """``n`` clips of context, followed by ``more`` true frames; [n, 0, ...] for a model that needs none of both."""
    import torch

    from sfumato.data.frames import open_frames, stack

    length = model.window.clean + more
    if not length:
        return torch.zeros(n, 0, *model.shape[1:])
    if source is None:
        raise BadInput("to show the truth, name its source with --data")
    clips = open_frames(source, model.shape[-1], length, seed=seed, count=max(n, 100), progress=True)
    if len(clips) < n:
        raise BadInput(f"{source} has {len(clips)} clips of {length} frames: give at most as many seeds, not {n}")
    return stack(clips, [i * len(clips) // n for i in range(n)])


def as_pictures(frames) -> np.ndarray:
    """Frames [n, frame, channel, height, width] around [-1, 1] as uint8 [n, frame, height, width, 3]."""
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).byte().movedim(2, -1)
    return pixels.expand(*pixels.shape[:-1], 3).numpy()


def animate(path: Path, pictures: list[np.ndarray], fps: int) -> None:
    """An endless GIF."""
    from PIL import Image

    first, *rest = (Image.fromarray(picture) for picture in pictures)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
