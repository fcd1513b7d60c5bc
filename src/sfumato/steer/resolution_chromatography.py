"""Resolution chromatography: which resolution is made when, and prompts for each of them (arXiv:2401.10247)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput, unknown
from sfumato.fields import Count
from sfumato.pipeline import Model, Text2Image
from sfumato.pipeline.steering import Place
from sfumato.sample.samplers import ddim

from .base import Analysis, Patch
from .parts.cascade import Cascade
from .parts.chromatogram import (
    SCHEDULES,
    Chromatogram,
    amplitude_rate,
    chromatogram,
    half_times,
    level_gains,
    levels_of,
    map_schedule,
    rate,
    shares,
    signal,
    signal_present,
    step_rates,
)
from .parts.composing import Composing, Mode, prompt_schedule

__all__ = [
    "SCHEDULES", "Chromatogram", "ResolutionChromatography", "amplitude_rate", "chromatogram", "half_times",
    "level_gains", "map_schedule", "measure", "prompt_schedule", "rate", "shares", "signal", "signal_present",
    "step_rates",
]  # fmt: skip


def measure(
    model: Model, asked: Any, seeds: Sequence[int], sampling_steps: int = 50, **options: Any
) -> tuple[Float[Tensor, "steps"], Float[Tensor, "steps n *dims"]]:
    """The times of a deterministic run (DDIM), and the clean pictures, in latents, that are predicted at each.

    Args:
        options: more for `Model.draw`.

    Raises:
        BadInput: a model of frames.
    """
    if len(model.latent_shape()) != 3:
        raise BadInput("a chromatogram is measured on pictures: frames have a noise level each")
    times: list[float] = []
    seen: list[Tensor] = []

    def watch(pred: Tensor, z: Tensor, t: Any, cond: Any) -> Tensor:
        times.append(float(t))
        seen.append(model.process.convert(pred, z, t, model.prediction, "x0").detach().cpu().float())
        return pred

    solver: Any = "ddim" if isinstance(model, Text2Image) else ddim
    prompts = len(asked) if isinstance(asked, Sized) and not isinstance(asked, str) else 1
    rows = max(len(seeds), prompts)  # one batch, which is seen once at each time
    model.draw(
        asked, list(seeds), sampling_steps=sampling_steps, scheduler=solver, guide=watch, batch=rows, **options
    )
    return torch.tensor(times, dtype=torch.float64), torch.stack(seen)


@dataclass(frozen=True, kw_only=True)
class ResolutionChromatography(Patch):
    """Resolution chromatography (arXiv:2401.10247): the noise schedule alone says when each resolution is made.

    Averaged over blocks of m x m elements, the noise of x_t is m times less, so that level m is as clean as a picture
    at SNR(tau_m) = m^2 SNR(t): coarse levels are made first. Its rate is R_m = -dS_m/dt with S_m = sigmoid(lambda +
    2 log m), and rho_m = R_m / sum R_k says which level is being decided. ``--analyse`` writes this chromatogram for
    the model's schedule or a published one, what each step of a run makes (of the model's own deterministic one, for a
    published schedule in equal steps), and for given prompts the one that a run of the model shows.

    ``compose`` gives prompts to coarse levels; the prompt that is drawn is that of level 1, the finest. ``upscale``
    draws at that many times the trained size: as in upsample guidance, of which it is the forerunner, the block means
    of the noise are the small picture's, here in a cascade of prime factors and with the share of the levels that the
    small picture has as the weight.

    In Python: `prompt_schedule` for any model's ``draw(cond=...)``, `map_schedule` for time warps between schedules and
    sizes, `chromatogram`, `measure`, `signal_present`.

    Cost: none for "switch" and "embedding"; one call a step for each prompt in "score". Of ``upscale`` as of upsample
    guidance, at all times.

    Differs from the paper: only its abstract and introduction, and the follow-up's equations (arXiv:2404.01709), were
    at hand. Reconstructed are the power version and the normalisation of the rates, how prompts are combined (all
    three ways are here; the default is a hard switch), and the weights of the upscaling. In latents the law is
    approximate, for the autoencoder is not linear.
    """

    NEUTRAL: ClassVar[Mapping[str, Any]] = {"compose": (), "upscale": 1}
    """One prompt for all levels, at the trained size."""
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"compose": ("4=a blue circle",)}

    place: ClassVar[Place] = "conditioning"

    compose: tuple[str, ...] = ()
    """M=PROMPT: what the picture is to show when it is averaged over blocks of M x M latents (M at least 2)."""
    mode: Mode = "switch"
    """The prompt of the level with the greatest share at a time, or predictions (score) or embeddings mixed by the
    shares."""
    upscale: Count = 1
    """How many times larger than in training the pictures are that are drawn."""
    levels: tuple[Count, ...] = ()
    """Levels to analyse, sides of blocks; by default those of 1, 2, 4 ... that divide the side of the latents."""
    schedule: str = "model"
    """The schedule to analyse: the model's own, or one of ddpm, sd, cosine, sigmoid, edm and flow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in ("model", *SCHEDULES):
            raise unknown("schedule", self.schedule, ("model", *SCHEDULES))
        self.prompts  # noqa: B018  (raises what is wrong with them)

    @property
    def prompts(self) -> dict[int, str]:
        """Level -> its prompt."""
        found: dict[int, str] = {}
        for told in self.compose:
            level, equals, prompt = told.partition("=")
            if not equals or not prompt.strip() or not level.strip().isdecimal() or int(level) < 2:
                raise BadInput(f"{told!r} gives no level a prompt: write M=PROMPT, M at least 2, as in 8=a red star")
            if int(level) in found:
                raise BadInput(f"level {int(level)} has two prompts: give it one")
            found[int(level)] = prompt.strip()
        return found

    @contextmanager
    def acting(self, p: Text2Image) -> Iterator[dict[str, Any]]:
        side = min(p.latent_shape()[-2:]) * self.upscale
        if self.prompts and (deep := max(self.prompts)) > side:
            raise BadInput(f"there is no level {deep}: the latents have {side} elements a side")
        told: dict[str, Any] = {}
        with ExitStack() as stack:
            if self.prompts:
                composing = Composing(p, self.prompts, self.mode)
                stack.enter_context(p.intercept(composing, self.place))
                told["calls"] = composing.told
            if self.upscale > 1:
                stack.enter_context(p.intercept(Cascade(p, self.upscale, told), "prediction"))
            yield told

    def analyse(
        self, model: Model, asked: Sequence[Any] | None, seeds: Sequence[int], sampling_steps: int
    ) -> Analysis:
        schedule = model.process.schedule if self.schedule == "model" else SCHEDULES[self.schedule]()
        side = model.latent_shape()[-1]
        levels = self.levels or tuple(m for m in levels_of(side) if side % m == 0)
        if wrong := [m for m in levels if side % m]:
            raise BadInput(f"blocks of {wrong[0]} do not divide a side of {side}: choose levels that do")
        theory = chromatogram(schedule, levels)
        times, names = theory.times.tolist(), [_name(m, side) for m in levels]
        curves = lambda values: {n: (times, v.tolist()) for n, v in zip(names, values, strict=True)}
        panels = {
            "signal generation rate": curves(theory.rate),
            "share of each resolution": curves(theory.share),
            "signal that is there": curves(theory.signal),
        }
        table = [
            {
                "level": m, "side": side / m, "peak": float(theory.peaks[i]), "missing": float(theory.missing[i]),
                "dominant": float((theory.dominant == m).double().mean()),
            }
            for i, m in enumerate(levels)
        ]  # fmt: skip
        if self.schedule == "model":
            grid = model.walk(sampling_steps).double()
        else:  # nobody's sampler: equal steps
            grid = torch.linspace(1, 0, sampling_steps + 1, dtype=torch.float64)
        steps = step_rates(schedule, grid, levels)
        shown = chromatogram(schedule, levels, grid[:-1]).dominant
        made = [
            {"step": i, "time": float(grid[i]), "dominant": int(shown[i])}
            | {n: float(steps[k, i]) for k, n in enumerate(names)}
            for i in range(sampling_steps)
        ]
        notes = [
            f"level {m}: {100 * float(x):.0f} % of its signal is never made, for the schedule does not start from "
            "noise alone"
            for m, x in zip(levels, theory.missing, strict=True) if x > 0.05
        ]  # fmt: skip
        if asked is not None and self.schedule != "model":
            notes.append(f"nothing was measured: the model was not trained under the schedule {self.schedule}")
        elif asked is not None:
            at, x0 = measure(model, list(asked), seeds, sampling_steps)
            present = signal_present(x0, levels)
            panels["measured: signal that is there"] = {
                n: (at.tolist(), row.tolist()) for n, row in zip(names, present, strict=True)
            }
            wider = chromatogram(schedule, levels, gains=level_gains(x0[-1], levels))
            for row, half, peak in zip(table, half_times(at, present), wider.peaks, strict=True):
                row |= {"measured": float(half), "peak_of_spectrum": float(peak)}
        tables = {"levels": table, "steps": made}
        return Analysis(axis="time, from noise to picture", panels=panels, tables=tables, notes=notes)


def _name(level: int, side: int) -> str:
    return f"{side / level:g} x {side / level:g}"
