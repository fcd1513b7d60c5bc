"""Jump Your Steps: where the few steps of a sampler of tokens should be (arXiv:2410.07761)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NoReturn

from jaxtyping import Float, Int
from torch import Tensor

from ..errors import BadInput
from ..fields import Count, Positive, Seed
from ..noise.denoiser import DiscreteDenoiser
from ..settings import Tuned
from .jumps import JumpSchedule, golden_section, grid_of, hierarchy
from .klub import Gain
from .samplers import Callback, Generators
from .tokens import euler, k_gillespie, tau_leaping

SAMPLERS = {"euler": euler, "tau_leaping": tau_leaping, "k_gillespie": k_gillespie}


@dataclass(frozen=True, kw_only=True)
class JYS(Tuned):
    """Chooses the times of 2, 4, 8 ... jumps of a trained model of tokens, from a few samples and without training.

    arXiv:2410.07761. Samplers that update many tokens at once err where tokens ignore each other, and how much depends
    on where the steps are. From one step on, every step is split where the split changes most: where KLUB, an upper
    bound of the KL divergence between the laws of paths after it and before it, is largest (`sfumato.sample.klub`),
    found by golden-section search with common random numbers and put on a grid. So one search serves all numbers of
    steps that are powers of two. ``schedule = JYS(sampling_steps=16).search(denoiser, data)``, then
    ``JYS()(denoiser, x, schedule.times(16), generator=rng)``, or ``model.draw(..., schedule=schedule)``.

    Cost of a search: about 20 network calls on all samples for each split; afterwards none.

    Differs from the paper: the objective is the whole bound, where the published code has one of its three terms
    (``terms``="official"); where an interval is too narrow for ``guard``, it shrinks to a quarter of it, and
    a split never falls on an end of its interval, where the code moves that end. The rates of
    (x_t1, t1) are computed once for an interval, where the code computes them anew. For k-Gillespie with
    ``estimator``="path" the tokens that jump are those that the forward process would unmask, which has the same law,
    for all have the same rate.
    """

    tokens: ClassVar[bool] = True
    """It samples tokens."""
    noisy: ClassVar[bool] = True
    order: ClassVar[int] = 1
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"terms": "official"},
        "official-cifar10": {"terms": "official", "kind": "tau_leaping", "guard": 1e-2, "sampling_steps": 256},
        "countdown": {"samples": 1024, "sampling_steps": 64},
    }
    """"official*": the published code's settings; "countdown": the paper's samples and steps for countdowns."""

    sampling_steps: Count = 16
    """The largest number of steps to search, a power of two; all smaller ones come with it."""
    kind: Literal["euler", "tau_leaping", "k_gillespie"] = "euler"
    """The sampler: at most one jump a token and step; Poisson jumps of ordered values; a number of masks at a time."""
    terms: Literal["full", "official"] = "full"
    """The bound, or the term of it that the published code evaluates."""
    estimator: Literal["data", "path"] = "data"
    """Whether the second state comes from the data's noise, or by a step of the sampler."""
    bracket: Literal["official", "textbook"] = "official"
    """What the golden-section search does with the far end after a better probe."""
    points: Count = 1024
    """M: steps of the grid; k-Gillespie's has one for each token."""
    guard: Positive = 1e-3
    """How near to an interval's ends the search goes."""
    samples: Count = 64
    """Sequences that the bound is estimated on."""
    seed: Seed = 42
    """Of the random numbers, the same at every evaluation."""
    batch: Count = 64
    """Sequences computed together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling_steps & (self.sampling_steps - 1):
            raise BadInput(f"sampling_steps must be a power of two, got {self.sampling_steps}")

    def search(
        self, denoiser: DiscreteDenoiser, data: Int[Tensor, "n *dims"], cond: Any = None, model: str = ""
    ) -> JumpSchedule:
        """The schedules for ``denoiser``.

        Args:
            data: clean sequences, of the data or of the model; the first ``samples`` are used.
            cond: what the denoiser is told about them.
            model: what identifies the model, for the schedule's file.

        Raises:
            BadInput: more steps than the grid has, or than tokens; a sampler that does not suit the chain.
        """
        data = data[: self.samples]
        gain = Gain(denoiser, data, self.kind, self.terms, self.estimator, self.seed, self.batch, cond)
        if self.kind == "k_gillespie":
            last = data[0].numel()
            grid: list[float] = [float(k) for k in range(last + 1)]
        else:
            last, grid = self.points, grid_of(self.points)
        indices, gains = hierarchy(lambda a, b: self.split(gain, grid, a, b), self.sampling_steps, last)
        return JumpSchedule(indices, grid, self.kind, gains, model, asdict(self))

    def split(self, gain: Gain, grid: list[float], first: int, second: int) -> tuple[int, float]:
        """The index between ``first`` and ``second`` whose time gains most, and how much.

        The search is over times (or counts), whose best is put on the nearest point of the grid between the two.
        """
        t1, t3 = grid[first], grid[second]
        lost = lambda t2: -gain(t1, t2, t3)
        if self.kind == "k_gillespie":
            best, seen = golden_section(lost, t1 + 1.001, t3 - 1.001, 0.25, self.bracket)
            return min(max(round(best), first + 1), second - 1), -seen[best]
        guard = min(self.guard, (t1 - t3) / 4)
        best, seen = golden_section(lost, t3 + guard, t1 - guard, 0.25 / self.points, self.bracket)
        index = round((1 - best) / (1 - grid[-1]) * self.points)
        return min(max(index, first + 1), second - 1), -seen[best]

    def __call__(
        self,
        denoiser: DiscreteDenoiser,
        z: Int[Tensor, "batch *dims"],
        times: Float[Tensor, "steps+1"],
        cond: Any = None,
        generator: Generators | None = None,
        callback: Callback | None = None,
    ) -> Int[Tensor, "batch *dims"]:
        """Clean tokens from ``z`` by the sampler ``kind`` along ``times``, and one call; see `JumpSchedule.times`.

        Raises:
            BadInput: a denoiser of something else than tokens.
        """
        return SAMPLERS[self.kind](denoiser, z, times, cond, generator, callback)

    def scheduler(self, config: Any = None) -> NoReturn:
        """Refused: diffusers' schedulers are for pictures and latents, not for tokens."""
        raise BadInput("JYS is for models of tokens, which pipelines are not: `sfumato train discrete` makes one")
