"""The two stages of a search for a GAN: whose turn it is, and a generation at the end of each round."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.files import write_json
from sfumato.nets.gan import GenotypeDiscriminator, GenotypeGenerator, count_discriminator, count_generator
from sfumato.nets.genotypes import Genotype, Space
from sfumato.train import draw
from sfumato.train.recipe import Turn

from .adversarial import Adversarial
from .candidates import Candidate, Judge, copied, judged
from .evolution import Objective, Population, Selection, children, select, table, told, winner


@dataclass(frozen=True)
class Stage:
    """A stage of the search: how long, how it selects, how children are made, who judges.

    Attributes:
        warmup, rounds, updates: updates before the first round, rounds, updates of each.
        evolve: children of those that stay; otherwise new ones at random, to compare with.
        jobs: processes that judge.
        record: where generations are told, or nowhere.
    """

    warmup: int
    rounds: int
    updates: int
    objectives: Sequence[Objective]
    selection: Selection
    crossover: float
    mutation: float
    evolve: bool
    seed: int
    jobs: int
    judge: Judge
    record: Path | None

    def due(self, step: int) -> int:
        """Which round ends with update ``step``, counted from 1; 0: none."""
        after = step - self.warmup
        return after // self.updates if after > 0 and after % self.updates == 0 else 0


class Search(Adversarial):
    """What both stages share: whose turn it is, and a generation at the end of each round."""

    def __init__(self, space: Space, size: int, stage: Stage, *rest: Any):
        super().__init__(*rest)
        self.space, self.stage = space, stage
        self.population = Population(space, size, self._rng(0))

    def copies(self) -> dict[str, nn.Module]:
        return {"population": self.population}

    def member(self, step: int) -> int:
        """Whose turn update ``step`` is, counted from 0: uniform."""
        return draw.step_seed(self.stage.seed, 6, step) % len(self.population)

    def genotype(self, step: int) -> Genotype:
        """The genotype that update ``step`` trains: in the warm-up any, then a member's."""
        if step < self.stage.warmup:
            return self.space.random(self._rng(1, step))
        return self.population[self.member(step)]

    def after_update(self, turn: Turn, step: int) -> None:
        if turn.name != "generator":
            return
        if step == self.stage.warmup:
            self.warm()
        if round_ := self.stage.due(step):
            self._generation(round_)

    def warm(self) -> None:
        """The warm-up has ended."""

    @abstractmethod
    def candidates(self, members: Sequence[Genotype]) -> tuple[list[Candidate], list[int]]:
        """What is to be judged for each member, and the parameters of what is searched for."""

    def settled(self, best: int, kept: Sequence[int]) -> None:
        """A generation has been judged."""

    def _generation(self, round_: int) -> None:
        stage, members = self.stage, self.population.members
        candidates, sizes = self.candidates(members)
        found = [{**s, "parameters": float(n)} for s, n in zip(judged(candidates, stage.jobs), sizes, strict=True)]
        rng = self._rng(2, round_)
        kept = select(table(found, stage.objectives), len(members) // 2, stage.selection, rng)
        best = winner(found, stage.objectives)
        self.population.crown(members[best])
        if stage.record is not None:
            about = {"round": round_, "stage": self.space.kind, **told(members, found, stage.objectives, kept)}
            write_json(stage.record / f"{self.space.kind}-{round_:03d}.json", about, overwrite=True)
        if round_ < stage.rounds:
            fresh = self._children([members[i] for i in kept], len(members) - len(kept), members, rng)
            # whoever stays keeps its place
            free = (i for i in range(len(members)) if i not in set(kept))
            for i, child in zip(free, fresh, strict=True):
                members[i] = child
            self.population.put(members)
        self.settled(best, kept)

    def _children(
        self, parents: Sequence[Genotype], count: int, members: Sequence[Genotype], rng: torch.Generator
    ) -> list[Genotype]:
        stage = self.stage
        if stage.evolve:
            return children(self.space, parents, count, stage.crossover, stage.mutation, rng, members)
        return children(self.space, parents, count, 0.0, 0.0, rng, members)

    def _rng(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(draw.step_seed(self.stage.seed, 7, *map(ord, self.space.kind), *numbers))


class GeneratorSearch(Search):
    """Stage 1: the generators of a supernet against one discriminator."""

    name = "eagan-generator"
    title = "searching a generator"

    def __init__(self, generator: GenotypeGenerator, discriminator: nn.Module, *rest: Any):
        super().__init__(*rest)
        self.generator, self.discriminator = generator, discriminator

    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def fake(self, z: Tensor, step: int) -> Tensor:
        return self.generator(z, genotype=self.genotype(step))

    def judge(self, x: Tensor, step: int) -> Tensor:
        return self.discriminator(x)

    def config(self, genotype: Genotype) -> dict[str, Any]:
        """How the net of a genotype is made."""
        c = self.generator.config
        return {"size": c.size, "channels": c.channels, "latent": c.latent, "genotype": genotype}

    def candidates(self, members: Sequence[Genotype]) -> tuple[list[Candidate], list[int]]:
        state = self.generator.state_dict()
        found, sizes = [], []
        for genotype in members:
            config = self.config(genotype)
            with torch.device("meta"):
                net = GenotypeGenerator(**config)
            own = {name: state[name].detach().cpu().clone() for name in net.state_dict()}
            found.append(Candidate(config, own, self.stage.judge))
            sizes.append(count_generator(**config))
        return found, sizes


class DiscriminatorSearch(Search):
    """Stage 2: the discriminators of a supernet, each with a generator of its own, all of one genotype.

    Args:
        config: how the generator is made.
        state: the weights with which it begins.
        channels: of the discriminators.
        reset: after a round all generators take the weights of the best one.
    """

    name = "eagan-discriminator"
    title = "searching a discriminator"

    def __init__(
        self, discriminator: GenotypeDiscriminator, config: Mapping[str, Any], state: Mapping[str, Tensor],
        channels: int, reset: bool, *rest: Any,
    ):  # fmt: skip
        super().__init__(*rest)
        self.discriminator, self.channels, self.reset, self.config = discriminator, channels, reset, dict(config)
        self.generators = nn.ModuleList([GenotypeGenerator(**self.config) for _ in range(len(self.population))])
        for net in self.generators:
            net.load_state_dict(state)
            net.train()

    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generators, "discriminator": self.discriminator}

    def fake(self, z: Tensor, step: int) -> Tensor:
        return self.generators[0 if step < self.stage.warmup else self.member(step)](z)

    def judge(self, x: Tensor, step: int) -> Tensor:
        return self.discriminator(x, self.genotype(step))

    def warm(self) -> None:
        self._all_take(0)

    def settled(self, best: int, kept: Sequence[int]) -> None:
        if self.reset:
            self._all_take(best)

    def _all_take(self, best: int) -> None:
        state = self.generators[best].state_dict()
        for i, net in enumerate(self.generators):
            if i != best:
                net.load_state_dict(state)  # which copies into their own tensors

    def candidates(self, members: Sequence[Genotype]) -> tuple[list[Candidate], list[int]]:
        found = [Candidate(self.config, copied(net), self.stage.judge) for net in self.generators]
        sizes = [count_discriminator(self.channels, m) for m in members]
        return found, sizes


