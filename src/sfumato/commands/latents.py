"""``sfumato latents``: how heavy the tails of an autoencoder's latents are, and of their temporal differences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sfumato.commands.options import parse
from sfumato.commands.tables import show_table
from sfumato.errors import BadInput
from sfumato.fields import Count, Seed, at_least
from sfumato.files import atomic_folder, refuse_existing, write_json
from sfumato.plan import Plan
from sfumato.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.metrics.tails import Tails

EXAMPLE = "sfumato latents --autoencoder sketch --data sketch --out latents/"
ABOUT = f"""Example: {EXAMPLE}

Latents are standardised by channel to deviation 0.5. A temporal difference is that of two predictions of the clean
latent at neighbouring noise levels: by a consistency model (--model), or by the ideal denoiser of the latents
measured."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Options of the command."""

    autoencoder: str = "sketch"
    """An embedded model, a folder of a pipeline or of an autoencoder, or a hub id."""
    model: str | None = None
    """A model that `sfumato train slct` wrote, whose temporal differences are measured; it brings its autoencoder."""
    data: str = "sketch"
    """Pictures: "sketch", "digits", a folder, Parquet files, WebDataset shards, or hub:OWNER/NAME."""
    size: Count = 64
    """Side of the pictures in pixels; a model brings its own."""
    n: Annotated[int, at_least(2)] = 256
    """How many pictures."""
    levels: Annotated[int, at_least(3)] = 41
    """Noise levels of the grid, 0.002 to 80."""
    seed: Seed = 1
    """Of the noise and of the sketch world's pictures."""
    batch: Count = 32
    """Pictures computed together."""
    out: Path
    """Folder for latents.json and, where matplotlib is installed, latents.png."""
    overwrite: bool = False
    """Replace the output if it exists."""


def main(args: list[str]) -> None:
    options = Latents(**parse("sfumato latents", args, Latents, about=ABOUT)[0])
    refuse_existing(options.out, options.overwrite)

    from sfumato.metrics.tails import tails
    from sfumato.train.consistency import noise_levels

    source = options.model or options.autoencoder
    Plan(f"tails of the latents of {source}", writes=[f"{options.out}/ (latents.json, latents.png)"]).show()
    x, model = material(options)
    grid = noise_levels(options.levels)
    differences = measured(x, grid, model, options)
    whole, channels = tails(x), [tails(x[:, i]) for i in range(x.shape[1])]
    steps = [tails(d) for d in differences]
    record = {
        "options": asdict(options),
        "pictures": len(x),
        "shape": list(x.shape[1:]),
        "latents": asdict(whole),
        "channels": [asdict(t) for t in channels],
        "noise_levels": grid.tolist(),
        "temporal_differences": [asdict(t) for t in steps],
        "predicted_by": options.model or "the ideal denoiser of the latents measured",
    }
    with atomic_folder(options.out, options.overwrite) as folder:
        write_json(folder / "latents.json", record)
        drawn = draw(folder / "latents.png", x, grid, steps)
    shown = {"latents": whole, **{f"channel {i}": t for i, t in enumerate(channels)}}
    shown |= {f"difference at {grid[i]:.3g}": steps[i] for i in range(0, len(steps), max(1, len(steps) // 6))}
    show_table(("", "quartiles", "beyond the outer fences", "extremes", "excess kurtosis"), map(row, shown.items()))
    if not drawn:
        print("no plot: matplotlib is not installed (pip install 'sfumato[plots]')")
    print(f"{counted(len(x), 'picture')}; written: {options.out}")


def row(named: tuple[str, Tails]) -> tuple[str, ...]:
    """A line of the table."""
    name, t = named
    extremes = f"{t.least:.3g} to {t.most:.3g}"
    return name, f"{t.low:.3g} to {t.high:.3g}", f"{100 * t.far:.3g} %", extremes, f"{t.kurtosis:.3g}"


def material(options: Latents) -> tuple[Tensor, Any]:
    """Standardised latents of the pictures, and the model if one is named."""
    import torch

    from sfumato.data.pictures import open_pictures, to_tensor
    from sfumato.pipeline import load, open_autoencoder, standardised

    model = None if options.model is None else load(options.model, "cpu")
    if model is not None and (model.denoiser.prediction != "x0" or model.autoencoder is None):
        raise BadInput(f"{options.model} is no consistency model of latents: `sfumato train slct` makes one")
    size = options.size if model is None else model.size
    vae: Any = open_autoencoder(options.autoencoder) if model is None else model.autoencoder
    pictures = open_pictures(options.data, size, seed=options.seed, count=options.n)
    found, count = [], min(options.n, len(pictures))
    with torch.no_grad():
        for start in range(0, count, options.batch):
            rows = range(start, min(start + options.batch, count))
            encoded = vae.encode(to_tensor([pictures.picture(i) for i in rows]))
            found.append(encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent)
    z = torch.cat(found)
    return (standardised(vae, z) if model is None else model.scale_latents(z)), model


def measured(x: Tensor, grid: Tensor, model: Any, options: Latents) -> list[Tensor]:
    """The temporal differences of all latents at every step of the grid."""
    import torch

    from sfumato.metrics.tails import posterior_mean, temporal_differences

    rng, found = torch.Generator().manual_seed(options.seed), []

    def f(z: Tensor, sigma: Tensor) -> Tensor:
        if model is None:
            return posterior_mean(z, sigma, x)
        return model.denoiser(z, model.process.schedule.time(-2 * sigma.log()).clamp(0, 1), None)

    with torch.no_grad():
        for high, low in zip(grid[:-1].to(x), grid[1:].to(x), strict=True):
            parts = [
                temporal_differences(f, some, torch.randn(some.shape, generator=rng), *(
                    level.expand(len(some)) for level in (high, low)
                ))
                for some in x.split(options.batch)
            ]  # fmt: skip
            found.append(torch.cat(parts))
    return found


def draw(path: Path, x: Tensor, grid: Tensor, steps: list[Tails]) -> bool:
    """The density of the latents beside a normal one, and the box of the differences at each noise level."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    values = x.flatten().numpy()
    left.hist(values, bins=200, density=True, log=True, color="tab:blue", label="latents")
    places = np.linspace(-4 * values.std(), 4 * values.std(), 200)
    normal = np.exp(-((places - values.mean()) ** 2) / (2 * values.var())) / np.sqrt(2 * np.pi * values.var())
    left.plot(places, normal, color="black", label="normal, same variance")
    left.set(xlabel="value", ylabel="density")
    left.legend()
    levels = grid[:-1].numpy()
    right.fill_between(levels, [t.low for t in steps], [t.high for t in steps], alpha=0.5, label="quartiles")
    for name, pick in (("outer fences", lambda t: t.outer), ("extremes", lambda t: (t.least, t.most))):
        for side in (0, 1):
            style = {"label": name} if side else {}
            colour = "tab:orange" if name == "extremes" else "tab:green"
            right.plot(levels, [pick(t)[side] for t in steps], color=colour, **style)
    right.set(xscale="log", yscale="symlog", xlabel="noise level", ylabel="temporal difference")
    right.set_yscale("symlog", linthresh=1e-3)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
