"""GANs as the loop sees them: two that are trained by turns, a search for the one, a search for the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.files import write_json
from sfumato.nets.gan import GenotypeDiscriminator, GenotypeGenerator, count_discriminator, count_generator
from sfumato.nets.genotypes import Genotype, Space
from sfumato.train import draw
from sfumato.train.recipe import Recipe, Turn

from .candidates import Candidate, Judge, copied, judged
from .evolution import Objective, Population, Selection, children, select, table, told, winner


def discriminator_loss(real: Float[Tensor, "n 1"], fake: Float[Tensor, "n 1"]) -> Float[Tensor, ""]:
    """The hinge: E[relu(1 - D(x))] + E[relu(1 + D(G(z)))]."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def generator_loss(fake: Float[Tensor, "n 1"]) -> Float[Tensor, ""]:
    """-E[D(G(z))]."""
    return -fake.mean()


@torch.no_grad()
def begun(net: nn.Module) -> nn.Module:
    """Xavier's uniform weights for every convolution and linear layer (biases stay as torch draws them)."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            normed = hasattr(layer, "parametrizations")
            nn.init.xavier_uniform_(layer.parametrizations.weight.original if normed else layer.weight)
    return net


@dataclass(frozen=True)
class Rates:
    """How the two of a GAN take turns."""

    generator: float
    discriminator: float
    critic_updates: int
    ema: float = 0.0


@dataclass(frozen=True)
class Plan:
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


class Adversarial(Recipe):
    """Hinge losses by turns; what is drawn and what it is judged by is up to a subclass."""

    partial = True

    def __init__(self, pictures: Pictures, latent: int, rates: Rates):
        self.pictures, self.latent, self.rates = pictures, latent, rates

    @abstractmethod
    def fake(self, z: Float[Tensor, "n latent"], step: int) -> Float[Tensor, "n 3 h w"]:
        """Pictures of the generator whose turn it is."""

    @abstractmethod
    def judge(self, x: Float[Tensor, "n 3 h w"], step: int) -> Float[Tensor, "n 1"]:
        """What the discriminator whose turn it is says of them."""

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = draw.integers(len(self.pictures), size, rng).tolist()
        return {"x": to_tensor([self.pictures.picture(row) for row in rows]), "step": step}

    def turns(self) -> list[Turn]:
        r = self.rates
        first = Turn(
            name="discriminator", loss=self.first_loss, trains=["discriminator"], lr=r.discriminator, ema=0.0,
            times=r.critic_updates, fresh=True,
        )  # fmt: skip
        second: dict[str, Any] = {"trains": ["generator"], "lr": r.generator, "ema": r.ema, "fresh": True}
        return [first, Turn(name="generator", loss=self.loss, **second)]

    def first_loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the discriminator."""
        x, step = batch["x"].to(self._where), batch["step"]
        with torch.no_grad():
            fake = self.fake(self._noise(len(x), rng), step)
        return discriminator_loss(self.judge(x, step), self.judge(fake, step)), {}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the generator."""
        step = batch["step"]
        return generator_loss(self.judge(self.fake(self._noise(len(batch["x"]), rng), step), step)), {}

    def _noise(self, n: int, rng: torch.Generator) -> Tensor:
        return draw.normal((n, self.latent), rng).to(self._where)

    @property
    def _where(self) -> torch.device:
        return next(self.modules()["generator"].parameters()).device


class Pair(Adversarial):
    """One generator and one discriminator."""

    name = "eagan"
    title = "training what was found"

    def __init__(self, generator: nn.Module, discriminator: nn.Module, *rest: Any):
        super().__init__(*rest)
        self.generator, self.discriminator = generator, discriminator

    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def fake(self, z: Tensor, step: int) -> Tensor:
        return self.generator(z)

    def judge(self, x: Tensor, step: int) -> Tensor:
        return self.discriminator(x)


class Search(Adversarial):
    """What both stages share: whose turn it is, and a generation at the end of each round."""

    def __init__(self, space: Space, size: int, plan: Plan, *rest: Any):
        super().__init__(*rest)
        self.space, self.plan = space, plan
        self.population = Population(space, size, self._rng(0))

    def copies(self) -> dict[str, nn.Module]:
        return {"population": self.population}

    def member(self, step: int) -> int:
        """Whose turn update ``step`` is, counted from 0: uniform."""
        return draw.step_seed(self.plan.seed, 6, step) % len(self.population)

    def genotype(self, step: int) -> Genotype:
        """The genotype that update ``step`` trains: in the warm-up any, then a member's."""
        if step < self.plan.warmup:
            return self.space.random(self._rng(1, step))
        return self.population[self.member(step)]

    def after_update(self, turn: Turn, step: int) -> None:
        if turn.name != "generator":
            return
        if step == self.plan.warmup:
            self.warm()
        if round_ := self.plan.due(step):
            self._generation(round_)

    def warm(self) -> None:
        """The warm-up has ended."""

    @abstractmethod
    def candidates(self, members: Sequence[Genotype]) -> tuple[list[Candidate], list[int]]:
        """What is to be judged for each member, and the parameters of what is searched for."""

    def settled(self, best: int, kept: Sequence[int]) -> None:
        """A generation has been judged."""

    def _generation(self, round_: int) -> None:
        plan, members = self.plan, self.population.members
        candidates, sizes = self.candidates(members)
        found = [{**s, "parameters": float(n)} for s, n in zip(judged(candidates, plan.jobs), sizes, strict=True)]
        rng = self._rng(2, round_)
        kept = select(table(found, plan.objectives), len(members) // 2, plan.selection, rng)
        best = winner(found, plan.objectives)
        self.population.crown(members[best])
        if plan.record is not None:
            about = {"round": round_, "stage": self.space.kind, **told(members, found, plan.objectives, kept)}
            write_json(plan.record / f"{self.space.kind}-{round_:03d}.json", about, overwrite=True)
        if round_ < plan.rounds:
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
        plan = self.plan
        if plan.evolve:
            return children(self.space, parents, count, plan.crossover, plan.mutation, rng, members)
        return children(self.space, parents, count, 0.0, 0.0, rng, members)

    def _rng(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(draw.step_seed(self.plan.seed, 7, *map(ord, self.space.kind), *numbers))


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
            found.append(Candidate(config, own, self.plan.judge))
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
        return self.generators[0 if step < self.plan.warmup else self.member(step)](z)

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
        found = [Candidate(self.config, copied(net), self.plan.judge) for net in self.generators]
        sizes = [count_discriminator(self.channels, m) for m in members]
        return found, sizes


