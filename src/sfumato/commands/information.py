"""``sfumato information``: what a model knows at each noise level, from its own loss on pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.commands.verb import Where, load_any
from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, at_least
from sfumato.files import atomic_folder, refuse_existing, write_json
from sfumato.memory import require_memory
from sfumato.plan import Plan
from sfumato.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.metrics.bootstrap import Estimate
    from sfumato.noise import Schedule
    from sfumato.pipeline import Model

EXAMPLE = "sfumato information --model sketch --data sketch --out information/"


@dataclass(frozen=True, kw_only=True)
class Information(Where):
    """Options of the command."""

    model: str
    """A text-to-image pipeline, or a model written by `sfumato train`."""
    data: str = "sketch"
    """Pictures that the model was not trained on: "sketch", a folder, or Parquet files."""
    caption: str = "{caption}"
    """How a Parquet row becomes a caption."""
    n: Annotated[int, at_least(2)] = 256
    """How many pictures are measured."""
    points: Annotated[int, at_least(2)] = 33
    """Noise levels, evenly spaced in log-SNR."""
    seed: Seed = 1
    """Of the noise, the choice of pictures and the sketch world's pictures."""
    batch: Count = 32
    """Pictures computed together."""
    out: Path
    """Folder for information.json and, where matplotlib is installed, information.png."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    about = f"Example: {EXAMPLE}\n\nMean squared error and mutual information as functions of the log-SNR."
    options = Information(**parse("sfumato information", args, Information, about=about)[0])
    refuse_existing(options.out, options.overwrite)
    import torch

    from sfumato.metrics.information import measure
    from sfumato.sample import times

    model = load_any(options.model, options)
    denoiser, (x, cond) = model.denoiser, _material(model, options)
    schedule = denoiser.process.schedule
    grid = _grid(schedule, options.points, model.cleanest)
    work = f"information in {options.model}: {counted(len(x), 'picture')} at {counted(len(grid), 'noise level')}"
    Plan(work, writes=[f"{options.out}/ (information.json, information.png)"]).show()
    rng = torch.Generator().manual_seed(options.seed)
    curve = measure(denoiser, x, grid, rng, cond, options.batch, progress=True)
    mmse, bits = curve.mmse(), curve.bits()
    evenly = times.information(schedule, curve.logsnr, curve.information.mean(1), 50, float(grid[0]), float(grid[-1]))
    record = {
        "options": asdict(options),
        "model": model.describe(),
        "dimensions": curve.dimensions,
        "time": curve.times.tolist(),
        "logsnr": curve.logsnr.tolist(),
        "mmse_per_dimension": [asdict(e) for e in mmse],
        "bits_per_dimension": [asdict(e) for e in bits],
        "times_of_equal_information": evenly.tolist(),
        "note": "bounds from a trained model: its mmse and its information lie above those of the data; "
        "information counts from the first log-SNR; 95 % intervals over pictures",
    }
    with atomic_folder(options.out, options.overwrite) as folder:
        write_json(folder / "information.json", record)
        drawn = _draw(folder / "information.png", curve.logsnr, mmse, bits)
    shown = range(0, len(grid), max(1, len(grid) // 8))
    rows = [(f"{curve.logsnr[i]:.1f}", _text(mmse[i]), _text(bits[i])) for i in shown]
    show_table(("log-SNR", "mmse per dimension", "bits per dimension"), rows)
    print(f"{options.out / 'information.json'}" + (f" and {options.out / 'information.png'}" if drawn else ""))
    if not drawn:
        print("no plot: matplotlib is not installed (pip install 'sfumato[plots]')")


def _material(model: Model, options: Information) -> tuple[Tensor, Any]:
    """Clean data as the model knows them, and what it is told of them; nothing where it does not know their classes."""
    import torch

    from sfumato.data.pictures import open_pictures, to_tensor

    each = 12 * model.size**2 + 4 * prod(model.latent_shape()) + 24 * options.points  # picture, latent, three figures
    require_memory(options.n * each, f"{options.n:,} pictures at {options.points:,} noise levels")
    pictures = open_pictures(options.data, model.size, options.caption, options.seed, options.n)
    rng = torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(pictures), generator=rng)[: options.n].tolist()
    if len(rows) < 2:
        raise BadInput(f"{options.data} holds {len(rows)} picture: two are the least to measure an interval")
    x = to_tensor([pictures.picture(i) for i in rows])
    parts = x.to(model.device).split(options.batch)
    with torch.no_grad():
        z = torch.cat([model.encode_image(part) for part in parts]).float()
    if z.shape[1:] != model.latent_shape():
        raise BadInput(
            f"{options.model} knows samples of shape {model.latent_shape()}, not pictures of {tuple(x.shape[1:])}"
        )
    try:
        asked = model.asked_for(pictures, rows)
    except BadInput:
        asked = None
    return z, None if asked is None else model.told(asked)


def _grid(schedule: Schedule, points: int, end: float) -> Tensor:
    """Times evenly spaced in log-SNR, between the ends of the schedule or log-SNRs of -15 and 15."""
    from sfumato.sample import times

    low, high = schedule.logsnr(1.0).item(), schedule.logsnr(end).item()
    start = 1.0 if low >= -15 else schedule.time(-15.0).item()
    return times.logsnr(schedule, points - 1, start, end if high <= 15 else schedule.time(15.0).item())


def _draw(path: Path, logsnr: Tensor, mmse: list[Estimate], bits: list[Estimate]) -> bool:
    """Both curves side by side with their intervals; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = ("mean squared error per dimension", "mutual information, bits per dimension")
    for axis, estimates, name in zip(axes, (mmse, bits), names, strict=True):
        axis.plot(logsnr, [e.value for e in estimates], color="#85371f")
        axis.fill_between(logsnr, [e.low for e in estimates], [e.high for e in estimates], color="#dca14a", alpha=0.5)
        axis.set(xlabel="log-SNR (noise to the left)", title=name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=150, metadata={"Software": "sfumato"})
    plt.close(figure)
    return True


def _text(e: Estimate) -> str:
    return f"{e.value:.4g} [{e.low:.4g}, {e.high:.4g}]"
