"""A population of genotypes: scored, selected, and filled up again with children."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.nets.genotypes import CELLS, GENES, Genotype, Space

from .pareto import cars, fronts, nsga2

Objective = Literal["inception", "frechet", "parameters"]
Selection = Literal["nsga2", "cars"]
ATTEMPTS = 1000


class Population(nn.Module):
    """Genotypes as buffers, so that a checkpoint holds them; and the best of the last generation."""

    def __init__(self, space: Space, size: int, rng: torch.Generator):
        super().__init__()
        self.space = space
        members: list[Genotype] = []
        while len(members) < size:
            if (drawn := space.random(rng)) not in members:
                members.append(drawn)
        self.register_buffer("genotypes", torch.tensor(members))
        self.register_buffer("best", torch.zeros(CELLS, GENES, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.genotypes)

    def __getitem__(self, i: int) -> Genotype:
        return as_genotype(self.genotypes[i])

    @property
    def members(self) -> list[Genotype]:
        return [self[i] for i in range(len(self))]

    @property
    def winner(self) -> Genotype:
        """The best of the last generation."""
        return as_genotype(self.best)

    @torch.no_grad()
    def put(self, members: Sequence[Genotype]) -> None:
        """Other members in place of these."""
        self.genotypes.copy_(torch.tensor(members))

    @torch.no_grad()
    def crown(self, genotype: Genotype) -> None:
        """The best, from now on."""
        self.best.copy_(torch.tensor(genotype))


def as_genotype(x: Tensor) -> Genotype:
    """A tensor of genes as tuples."""
    return tuple(tuple(cell) for cell in x.tolist())


def table(scores: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> Tensor:
    """[n, objectives] in float64; a row with a number that is not finite is infinite in all, worse than any other."""
    made = torch.tensor([[row[name] for name in objectives] for row in scores], dtype=torch.float64)
    return torch.where(made.isfinite().all(1, keepdim=True), made, torch.inf)


def select(scores: Tensor, count: int, how: Selection, rng: torch.Generator) -> list[int]:
    """``count`` rows to keep."""
    return nsga2(scores, count) if how == "nsga2" else cars(scores, count, rng)


def winner(scores: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> int:
    """Of the first front the one with the smallest Fréchet distance; without that objective, of the first one."""
    made = table(scores, objectives)
    key = objectives.index("frechet") if "frechet" in objectives else 0
    return min(fronts(made)[0], key=lambda i: float(made[i, key]))


def children(
    space: Space, parents: Sequence[Genotype], count: int, crossover: float, mutation: float, rng: torch.Generator,
    taken: Sequence[Genotype] = (),
) -> list[Genotype]:
    """``count`` genotypes that are neither parents nor ``taken`` nor one another.

    A uniform parent is crossed with another with probability ``crossover``, then mutated with probability
    ``mutation``, again and again until there are enough new ones.
    """
    seen = {*parents, *taken}
    made: list[Genotype] = []
    for _ in range(ATTEMPTS * count):
        if len(made) == count:
            return made
        i, j = (int(torch.randint(len(parents), (), generator=rng)) for _ in range(2))
        child = parents[i]
        if _chance(crossover, rng) and i != j:
            child = space.crossed(child, parents[j], rng) or child
        if _chance(mutation, rng):
            child = space.mutated(child, rng)
        if child not in seen:
            seen.add(child)
            made.append(child)
    # parents alike, and no mutation
    while len(made) < count:
        if (child := space.random(rng)) not in seen:
            seen.add(child)
            made.append(child)
    return made


def _chance(share: float, rng: torch.Generator) -> bool:
    return float(torch.rand((), generator=rng)) < share


def told(
    members: Sequence[Genotype], scores: Sequence[Mapping[str, float]], objectives: Sequence[Objective],
    kept: Sequence[int],
) -> dict[str, Any]:
    """A generation for its record: genotypes, scores, the first front, and who is kept."""
    front = set(fronts(table(scores, objectives))[0])
    return {
        "members": [
            {"genotype": m, **s, "front": i in front, "kept": i in set(kept)}
            for i, (m, s) in enumerate(zip(members, scores, strict=True))
        ],
        "mean": {name: sum(s[name] for s in scores) / len(scores) for name in objectives},
        "best": min(s[objectives[0]] for s in scores),
    }
