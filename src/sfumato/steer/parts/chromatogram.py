"""The resolution chromatogram of a noise schedule: when each resolution's signal is made (arXiv:2401.10247).

A level m is the picture averaged over blocks of m x m elements; 1 is the picture itself. All of it depends on the
log-SNR lambda alone: S_m = sigmoid(lambda + 2 log m) is the share of signal in the power of the means, and it rises
where lambda is about -2 log m, the coarsest level first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.noise import DiscreteSchedule, Karras, LinearBeta, RectifiedFlow, ScaledLinearBeta
from sfumato.noise.schedule import Schedule, Time, float64

from .resolutions import pooled

MOST = 20.0
"""Log-SNRs beyond it are taken for it: nothing more happens there."""


def levels_of(side: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to ``side``."""
    return tuple(2**i for i in range(side.bit_length()))


def signal(
    logsnr: Float[Tensor, "*times"], levels: Sequence[int], gains: Float[Tensor, "levels"] | None = None
) -> Float[Tensor, "levels *times"]:
    """S_m = sigmoid(lambda + 2 log m) = m^2 a / (1 + (m^2 - 1) a), in float64.

    Args:
        gains: log(Var(D_m x0) / Var(x0)) to add for pictures that are smooth, of `level_gains`; None is data like
            white noise at every level, as the theory has it.
    """
    return torch.sigmoid(_seen(logsnr, levels, gains))


def rate(
    logsnr: Float[Tensor, "*times"],
    slope: Float[Tensor, "*times"],
    levels: Sequence[int],
    gains: Float[Tensor, "levels"] | None = None,
) -> Float[Tensor, "levels *times"]:
    """R_m = -dS_m/dt = -lambda'(t) S_m (1 - S_m): the signal generation rate, which integrates to S_m(0) - S_m(1)."""
    x = _seen(logsnr, levels, gains)
    return -slope * torch.sigmoid(x) * torch.sigmoid(-x)


def amplitude_rate(
    logsnr: Float[Tensor, "*times"],
    slope: Float[Tensor, "*times"],
    levels: Sequence[int],
    gains: Float[Tensor, "levels"] | None = None,
) -> Float[Tensor, "levels *times"]:
    """-d sqrt(S_m)/dt, the rate of the amplitude."""
    x = _seen(logsnr, levels, gains)
    return -slope * torch.sigmoid(x).sqrt() * torch.sigmoid(-x) / 2


def shares(
    logsnr: Float[Tensor, "*times"], levels: Sequence[int], gains: Float[Tensor, "levels"] | None = None
) -> Float[Tensor, "levels *times"]:
    """rho_m = R_m / sum_k R_k, the relative chromatogram of these levels; it sums to 1 at every time.

    At the ends of a schedule, where log-SNRs are infinite, it is what it comes to towards them.
    """
    x = _seen(float64(logsnr).clamp(-MOST, MOST), levels, gains)
    return torch.softmax(torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x), dim=0)


def step_rates(
    schedule: Schedule, times: Float[Tensor, "steps+1"], levels: Sequence[int]
) -> Float[Tensor, "levels steps"]:
    """S_m(t_(i+1)) - S_m(t_i), what each step of a sampler makes of each level; their sum telescopes."""
    return signal(schedule.logsnr(times), levels).diff(dim=1)


@dataclass(frozen=True, eq=False)
class Chromatogram:
    """The chromatogram of a schedule at some times.

    Attributes:
        levels: the sides m of the blocks, in elements.
        times: in [0, 1], 1 = noise.
        logsnr: of the full picture, held to [-20, 20].
        tau: the time of a whole picture that is as noisy as the means.
        signal: S_m.
        rate, amplitude: -dS_m/dt and -d sqrt(S_m)/dt.
        share: rho_m.
        dominant: the level with the greatest share at each time.
        peaks: the time at which S_m is a half; a level that starts beyond that has 1.
        missing: 1 - (S_m(0) - S_m(1)): signal that the schedule never makes, for instance of the mean brightness.
    """

    levels: tuple[int, ...]
    times: Float[Tensor, "times"]
    logsnr: Float[Tensor, "times"]
    tau: Float[Tensor, "levels times"]
    signal: Float[Tensor, "levels times"]
    rate: Float[Tensor, "levels times"]
    amplitude: Float[Tensor, "levels times"]
    share: Float[Tensor, "levels times"]
    dominant: Int[Tensor, "times"]
    peaks: Float[Tensor, "levels"]
    missing: Float[Tensor, "levels"]


def chromatogram(
    schedule: Schedule,
    levels: Sequence[int],
    times: Float[Tensor, "times"] | None = None,
    gains: Float[Tensor, "levels"] | None = None,
) -> Chromatogram:
    """The chromatogram of a schedule, in float64; ``times`` are 201 equal ones unless given.

    Which of the rates the paper plots, and how it normalises them, is a reconstruction: both rates, and the share of
    each level in the sum of the power rates, are given.

    Raises:
        BadInput: no level, or one below 1.
    """
    if not levels or min(levels) < 1:
        raise BadInput(f"levels are sides of blocks of at least 1 element, got {list(levels)}")
    times = torch.linspace(1, 0, 201, dtype=torch.float64) if times is None else float64(times).cpu()
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    logsnr, slope = schedule.logsnr(times), schedule.dlogsnr_dt(times)
    slope = torch.where((logsnr.abs() >= MOST) | slope.isinf(), 0.0, slope)  # a table may end in one leap
    logsnr = logsnr.clamp(-MOST, MOST)
    shift = _shifts(levels, gains)
    start, end = signal(schedule.logsnr(ends), levels, gains).unbind(1)
    share = shares(logsnr, levels, gains)
    return Chromatogram(
        tuple(levels),
        times,
        logsnr,
        schedule.time(logsnr + shift[:, None]).clamp(0, 1),
        signal(logsnr, levels, gains),
        rate(logsnr, slope, levels, gains),
        amplitude_rate(logsnr, slope, levels, gains),
        share,
        torch.tensor(list(levels))[share.argmax(0)],
        schedule.time(-shift).clamp(0, 1),
        1 - (end - start),
    )


def map_schedule(source: Schedule, wanted: Schedule, scale: float = 1.0) -> Callable[[Time], Float[Tensor, "..."]]:
    """The time warp that gives a model trained under ``source`` the chromatogram of ``wanted``.

    t' = lambda_source^-1(lambda_wanted(t) - 2 log scale): the time to ask the model for where a run under ``wanted`` is
    at t. ``scale`` is how many times larger the picture's side is than ``wanted`` was meant for; the shift keeps the
    curves of its coarse levels where they were (arXiv:2301.11093).
    """
    if scale <= 0:
        raise BadInput(f"scale must be positive, got {scale}")
    return lambda t: source.time(wanted.logsnr(t) - 2 * math.log(scale)).clamp(0, 1)


def level_gains(x0: Float[Tensor, "n *dims"], levels: Sequence[int]) -> Float[Tensor, "levels"]:
    """log(Var(D_m x0) / Var(x0)) over pictures: 0 for pictures that are the same within blocks, -2 log m for noise."""
    variances = [_centred(pooled(x0.double(), (m, m))).square().mean() for m in levels]
    return torch.stack(variances).log() - _centred(x0.double()).square().mean().log()


def signal_present(x0: Float[Tensor, "steps n *dims"], levels: Sequence[int]) -> Float[Tensor, "levels steps"]:
    """F_m = <D_m x0_t - mean, D_m x0_0 - mean> / |D_m x0_0 - mean|^2: the share of the final signal that is there.

    Args:
        x0: the clean pictures predicted at each step of a run, the last of which are the final ones; the mean is
            that of the final pictures.

    Raises:
        BadInput: less than two pictures, which have no signal beside their mean.
    """
    if x0.shape[1] < 2:
        raise BadInput("a chromatogram is measured on several pictures: give two or more seeds")
    rows = []
    for m in levels:
        means = pooled(x0.double(), (m, m))
        final = means[-1] - means[-1].mean(0)
        inner = ((means - means[-1].mean(0)) * final).flatten(1).sum(1)
        rows.append(inner / final.square().sum())
    return torch.stack(rows)


def half_times(times: Float[Tensor, "steps"], present: Float[Tensor, "levels steps"]) -> Float[Tensor, "levels"]:
    """The time at which half of the signal is there for the first time, from noise on, between two steps; NaN: never.

    Args:
        times: falling.
        present: of `signal_present`.
    """
    found = []
    for row in present:
        above = (row >= 0.5).nonzero()
        i = int(above[0]) if len(above) else -1
        if i > 0:
            share = (0.5 - row[i - 1]) / (row[i] - row[i - 1])
            found.append(times[i - 1] + share * (times[i] - times[i - 1]))
        else:
            found.append(times[0] if i == 0 else times.new_tensor(math.nan))
    return torch.stack(found).double()


def cosine_table(s: float = 0.008, steps: int = 1000) -> DiscreteSchedule:
    """The cosine schedule with an offset and betas of at most 0.999 (arXiv:2102.09672, eq. 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return DiscreteSchedule.from_alphas_cumprod(torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0))


def sigmoid_table(start: float = -3.0, end: float = 3.0, tau: float = 1.0, steps: int = 1000) -> DiscreteSchedule:
    """The sigmoid schedule (arXiv:2301.10972, algorithm 1) at the end of each of ``steps`` steps."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    low, high, at = (torch.sigmoid(float64(x) / tau) for x in (start, end, t * (end - start) + start))
    return DiscreteSchedule.from_alphas_cumprod((high - at) / (high - low))


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "ddpm": lambda: LinearBeta().discrete(),
    "sd": lambda: ScaledLinearBeta().discrete(),
    "cosine": cosine_table,
    "sigmoid": sigmoid_table,
    "edm": Karras,
    "flow": RectifiedFlow,
}
"""Published schedules by name."""


def _shifts(levels: Sequence[int], gains: Tensor | None) -> Float[Tensor, "levels"]:
    shift = 2 * torch.tensor(list(levels), dtype=torch.float64).log()
    return shift if gains is None else shift + gains.double()


def _seen(logsnr: Tensor, levels: Sequence[int], gains: Tensor | None) -> Float[Tensor, "levels *times"]:
    logsnr = float64(logsnr)
    shifts = _shifts(levels, gains).to(logsnr.device)
    return logsnr + shifts.reshape(-1, *[1] * logsnr.ndim)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0)
