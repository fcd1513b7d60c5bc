"""Jump Your Steps: schedules that are searched against equal and log-linear ones, at equal numbers of network calls.

With exact models of a chain of tokens, and with trained ones of a text and of codes of pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.noise import Absorbing, ChainDenoiser, UniformTokens
from sfumato.sample import JYS
from sfumato.sample.tokens import CLEANEST, euler

from .core import Claim, Experiment, Figures, Found
from .learned_tokens import CHUNK as PICTURES
from .learned_tokens import STEPS, of_codes, of_text

LENGTH, VALUES, STAY = 64, 16, 0.9
DRAWN, CHUNK = 1000, 100
PROCESSES = {"masked": Absorbing(VALUES + 1), "uniform": UniformTokens(VALUES)}


def countdown(seed: int) -> tuple[Float[Tensor, "values"], Float[Tensor, "values values"]]:
    """Runs that count down to 0 and then begin anew anywhere, now and then broken: law of the first token, and steps.

    Which number a number is followed by, and how surely, is drawn for each seed.
    """
    rng = torch.Generator().manual_seed(seed)
    names = torch.randperm(VALUES, generator=rng)
    step = torch.full((VALUES, VALUES), (1 - STAY) / VALUES, dtype=torch.float64)
    step[names[1:], names[:-1]] += STAY
    step[names[0]] = 1 / VALUES
    surer = 0.8 + 0.4 * torch.rand(VALUES, 1, generator=rng, dtype=torch.float64)
    step = step**surer
    return torch.full((VALUES,), 1 / VALUES, dtype=torch.float64), step / step.sum(1, keepdim=True)


def log_linear(steps: int) -> Float[Tensor, "steps+1"]:
    """Equal steps in the logarithm of time from 1 to 1 / LENGTH, about where a token is left, and then to the end."""
    return torch.cat([torch.logspace(0, -np.log10(LENGTH), steps).double(), torch.tensor([CLEANEST]).double()])


def equal(steps: int) -> Float[Tensor, "steps+1"]:
    return torch.linspace(1, CLEANEST, steps + 1, dtype=torch.float64)


def pairs(x: Int[Tensor, "n length"]) -> Float[Tensor, "chunks values2"]:
    """How often each value follows each, in every `CHUNK` of sequences."""
    numbers = (x[:, :-1] * VALUES + x[:, 1:]).split(CHUNK)
    return torch.stack([torch.bincount(n.flatten(), minlength=VALUES**2).double() for n in numbers])


LEARNED = {"text": of_text, "codes": of_codes}
"""Arms with trained models."""


def measure(seed: int, arm: str) -> Figures:
    """The figures of an arm: exact models of the chain, or trained ones."""
    return LEARNED[arm](seed) if arm in LEARNED else of_chain(seed, arm)


def of_chain(seed: int, arm: str) -> Figures:
    """Search on sequences of the chain, draw along each schedule, and compare how values follow each other."""
    denoiser = ChainDenoiser(PROCESSES[arm], *countdown(seed))
    rng = torch.Generator().manual_seed(100 + seed)
    schedule = JYS(sampling_steps=max(STEPS), points=256).search(denoiser, denoiser.sample(64, LENGTH, rng))
    truth = pairs(denoiser.sample(20_000, LENGTH, rng)).sum(0)
    ways: dict[str, Callable[[int], Tensor]] = {"searched": schedule.times, "equal": equal, "log-linear": log_linear}
    noise = denoiser.process.prior(torch.rand(DRAWN, LENGTH, generator=rng, dtype=torch.float64))
    found: dict[str, list[float]] = {}
    for name, times in ways.items():
        for steps in STEPS:
            x = euler(denoiser, noise, times(steps), generator=torch.Generator().manual_seed(200 + seed))
            shares = pairs(x) / pairs(x).sum(1, keepdim=True)
            found[f"{name} {steps}"] = ((shares - truth / truth.sum()).abs().sum(1) / 2).tolist()
    return found


def compare(arms: dict[str, Figures]) -> Found:
    """The searched schedule against the others, at all numbers of steps together."""
    together = lambda arm, name: [x for n in STEPS for x in arms[arm][f"{name} {n}"]]
    return {
        "masked": (together("masked", "searched"), together("masked", "equal")),
        "masked-log": (together("masked", "searched"), together("masked", "log-linear")),
        **{arm: (together(arm, "searched"), together(arm, "equal")) for arm in ("uniform", *LEARNED)},
        **{
            f"total variation of pairs, {arm} tokens": {
                name: {str(n): float(np.mean(arms[arm][f"{name} {n}"])) for n in STEPS}
                for name in ("searched", "equal", "log-linear")
            }
            for arm in PROCESSES
        },
        **{
            f"{arm}: {what}": {
                name: {str(n): float(np.mean(arms[arm][f"{name} {n}"])) for n in STEPS}
                for name in ("searched", "equal")
            }
            for arm, what in {"text": "share of words", "codes": "total variation of neighbours"}.items()
        },
    }


_DISTANCE = (
    "Total variation distance between how often each value follows each in a hundred samples and in the chain; "
    f"{', '.join(map(str, STEPS))} steps together."
)

EXPERIMENT = Experiment(
    name="jys",
    paper="arXiv 2410.07761",
    claims={
        "masked": Claim(
            "Masked tokens are drawn better in few steps that are searched than in equal ones.",
            "Jump Your Steps",
            "equal steps",
            _DISTANCE,
            "lower",
        ),
        "masked-log": Claim(
            "Masked tokens are drawn better in few steps that are searched than in log-linear ones.",
            "Jump Your Steps",
            "steps equal in the logarithm of time",
            _DISTANCE,
            "lower",
        ),
        "uniform": Claim(
            "Tokens under uniform noise are drawn better in few steps that are searched than in equal ones.",
            "Jump Your Steps",
            "equal steps",
            _DISTANCE,
            "lower",
        ),
        "text": Claim(
            "A trained model of characters, masked, writes more words right in few steps that are searched.",
            "Jump Your Steps",
            "equal steps",
            "Share of the whole words of a window that occur in other captions of the same kind, for each window; "
            f"{', '.join(map(str, STEPS))} steps together.",
        ),
        "codes": Claim(
            "A trained model of codes of pictures, masked, draws them better in few steps that are searched.",
            "Jump Your Steps",
            "equal steps",
            "Total variation distance between how often each code stands beside and above each in "
            f"{PICTURES} samples and in other pictures; {', '.join(map(str, STEPS))} steps together.",
            "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned; settings as first written, for the budget of ten minutes",
    measure=measure,
    arms=(*PROCESSES, *LEARNED),
    compare=compare,
    cost={"masked": 40, "uniform": 40, "text": 110, "codes": 160},
    notes=f"Sequences of {LENGTH} tokens with {VALUES} values that count down, as a Markov chain whose posteriors are "
    "exact, so that what is measured there is the samplers' error alone. Text and codes are of the sketch world, with "
    "transformers of two blocks that are trained for about a minute, so that their own errors are in both. The grid "
    "has 256 steps, in place of 1,024.",
)
