"""How good a generator is: its distance from real pictures in a space of features, each candidate in its own cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sfumato.cells import Failed, finished
from sfumato.errors import BadInput, SfumatoError
from sfumato.metrics.extractors import Extractor, make_extractor
from sfumato.metrics.frechet import frechet_distance
from sfumato.metrics.inception_score import inception_score
from sfumato.nets.gan import GenotypeGenerator
from sfumato.train.draw import step_seed

CLUSTERS = 10
"""Of the Inception score's stand-in, where features come without classes."""
AT_ONCE = 100
STATISTICS = 5
"""Batches of noise from which batch normalisation is measured anew."""


@dataclass(frozen=True)
class Judge:
    """What candidates of a search are held against.

    Attributes:
        extractor, weights: as for `make_extractor`.
        real: features of real pictures.
        samples: pictures that each candidate draws, all from the same noise.
        seed: of that noise.
    """

    extractor: str
    weights: Path | None
    real: Float[Tensor, "n d"] = field(repr=False)
    samples: int
    seed: int

    @classmethod
    def of(
        cls, extractor: str, weights: Path | None, pictures: UInt8[Tensor, "n 3 h w"], samples: int, seed: int
    ) -> Judge:
        """The judge that knows these pictures."""
        made = make_extractor(extractor, weights)
        real = torch.cat([made(some).cpu() for some in pictures.split(AT_ONCE)])
        return cls(extractor, weights, real, samples, seed)


@dataclass(frozen=True)
class Candidate:
    """A generator to be judged: how it is made, copies of its weights, and its judge."""

    config: Mapping[str, Any]
    state: Mapping[str, Tensor] = field(repr=False)
    judge: Judge


def measure(candidate: Candidate) -> dict[str, float]:
    """"frechet", the distance of features, and "inception", one over the score; on the CPU."""
    judge, net = candidate.judge, GenotypeGenerator(**candidate.config)
    net.load_state_dict(candidate.state)
    rng = torch.Generator().manual_seed(step_seed(judge.seed, 4))
    settle(net, rng, min(AT_ONCE, judge.samples))
    extract = make_extractor(judge.extractor, judge.weights)
    z, parts = torch.randn(judge.samples, net.latent, generator=rng), []
    with torch.no_grad():
        for some in z.split(AT_ONCE):
            parts.append(extract(((net(some) + 1) * 127.5).round().clamp(0, 255).byte()).cpu())
    features = torch.cat(parts)
    score = inception_score(logits_of(features, extract, judge), splits=1)
    return {"frechet": frechet_distance(judge.real, features), "inception": 1 / score.value}


@torch.no_grad()
def settle(net: GenotypeGenerator, rng: torch.Generator, batch: int = AT_ONCE) -> None:
    """Measure the statistics of batch normalisation anew, for these weights alone; the net is in evaluation after."""
    device = net.rgb.weight.device
    net.norm.reset_running_stats()
    before, net.norm.momentum = net.norm.momentum, None
    net.train()
    for _ in range(STATISTICS):
        net(torch.randn(batch, net.latent, generator=rng).to(device))
    net.norm.momentum = before
    net.eval()


def logits_of(features: Float[Tensor, "n d"], extract: Extractor, judge: Judge) -> Float[Tensor, "n classes"]:
    """The extractor's classes; where it has none, how near each of a few real pictures is: minus half the squared
    distance, in units of the mean squared distance of real pictures from their mean."""
    known = getattr(extract, "logits", None)
    if known is not None:
        return known(features).cpu()
    real = judge.real.double()
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(step_seed(judge.seed, 5)))[:CLUSTERS]
    spread = (real - real.mean(0)).square().sum(1).mean().clamp_min(1e-12)
    return -torch.cdist(features.double(), real[rows]).square() / (2 * spread)


def judged(candidates: Sequence[Candidate], jobs: int) -> list[dict[str, float]]:
    """What `measure` says of each, over ``jobs`` processes.

    Raises:
        BadInput, SfumatoError: a candidate could not be judged.
    """
    found: dict[int, dict[str, float]] = {}
    for (i, _), scores in finished(list(enumerate(candidates)), _numbered, jobs=jobs):
        if isinstance(scores, Failed):
            raise (BadInput if scores.refused else SfumatoError)(f"a candidate could not be judged: {scores.reason}")
        found[i] = scores
    return [found[i] for i in range(len(candidates))]


def _numbered(cell: tuple[int, Candidate]) -> dict[str, float]:
    return measure(cell[1])


def copied(net: nn.Module) -> dict[str, Tensor]:
    """Copies of a net's weights on the CPU."""
    return {name: x.detach().cpu().clone() for name, x in net.state_dict().items()}
