"""EAGAN: a generator and a discriminator found by evolution over supernets, in two stages, then trained anew."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, open_pictures
from sfumato.errors import BadInput
from sfumato.fields import Count, Decay, Natural, NotNegative, Positive, Share, at_least
from sfumato.files import write_json
from sfumato.memory import require_memory
from sfumato.nets.gan import (
    GenotypeDiscriminator,
    GenotypeGenerator,
    SimpleDiscriminator,
    count_discriminator,
    count_generator,
    part_of,
)
from sfumato.nets.genotypes import DISCRIMINATOR, GENERATOR, PUBLISHED, Genotype
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline import ImageModel
from sfumato.plan import Plan
from sfumato.settings import Tuned

from .loop import Run
from .outputs import InFolder
from .parts.adversarial import Adversarial, Pair, Rates, begun
from .parts.candidates import Judge, settle
from .parts.evolution import Objective, Selection
from .parts.front import write_page
from .parts.search import DiscriminatorSearch, GeneratorSearch, Stage
from .schedule import Schedule
from .state import rows_of

FOUND = "genotypes.json"


@dataclass(frozen=True, kw_only=True)
class EAGAN(Tuned, Schedule, InFolder):
    """Two-stage evolutionary search for GANs without classes (arXiv:2111.15097, algorithm 1), and the GAN it finds.

    Stage 1: each update draws a member of the population, trains the shared discriminator and then that generator, the
    weights of which lie in the supernet. After a round all members are scored; half are kept by non-dominated sorting;
    crossover and mutation of these fill up the other half. Stage 2: the generator's genotype is fixed, and every
    discriminator of the population has a copy of its weights of its own, trained with it; after a round all copies take
    the weights of the best. Then both are trained from scratch by the hinge loss. The generator draws in one step, as a
    model like any other. ``search/`` in the run's folder tells every generation, and shows their first fronts on a
    page; ``genotypes.json`` says what was found.

    What is scored: the Fréchet distance of ``extractor``'s features, one over the Inception score (features without
    classes: of soft clusters around ten real pictures), and the parameters, each candidate with its own statistics of
    batch normalisation and from the same noise. With "inception" these are the paper's; with others, stand-ins.

    Cost: 2 x ``rounds`` x ``population`` evaluations of ``samples`` pictures, ``jobs`` of them at a time, and the
    updates of both stages; ``population`` copies of a generator, with their optimiser, in stage 2.

    Differs from the paper: one batch size for both nets; stage 1's discriminator is AutoGAN's or the simple one, for
    the genotype of the paper's main result is not published; lengths are updates, not epochs. Differs from the
    published code: its traps (weights that are not copied, resets that are not applied, genes that are never drawn,
    sums in place, duplicates, first weights that do not reach convolutions under spectral normalisation) are not
    copied, and no net has unused weights: its found generator has 65,792 of them.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "pictures": 6, "size": 16, "updates": 2, "batch": 2, "checkpoint_every": 1, "track": "none", "population": 2,
        "rounds": 1, "search_warmup": 0, "round_updates": 1, "samples": 12, "extractor": "pixels", "latent": 6,
        "generator_channels": 4, "discriminator_channels": 4, "critic_updates": (1, 1, 1),
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The batches are the published scripts' of the discriminator, which sees its pictures 600 times.
        "cifar10": {"genotypes": "cifar10"},
        "stl10": {
            "genotypes": "stl10", "size": 48, "batch": 128, "updates": 98_500, "lr": 3e-4, "discriminator_lr": 2e-4,
            "clip_norm": 50.0,
        },
        # Not from the paper: for a CPU, untuned.
        "small-sketch": {
            "size": 16, "generator_channels": 16, "discriminator_channels": 16, "latent": 48, "population": 8,
            "rounds": 3, "search_warmup": 200, "round_updates": 100, "samples": 500, "extractor": "random-cnn",
            "updates": 2000, "critic_updates": (1, 2, 2), "pictures": 4000,
        },
    }  # fmt: skip

    data: str = "sketch"
    """"sketch", "digits", a folder of pictures, Parquet files, WebDataset shards, or hub:OWNER/NAME."""
    pictures: Count = 40_000
    """How many pictures of the sketch world to draw."""
    size: Annotated[int, at_least(16)] = 32
    """Side of the pictures in pixels, a multiple of 16."""
    updates: Count = 150_000
    """Updates of the generator when both nets are trained from scratch."""
    batch: Count = 40
    """Pictures in an update, of either net."""
    lr: Positive = 2e-4
    """Learning rate of the generator, also in both searches."""
    discriminator_lr: Positive = 2e-4
    """Learning rate of the discriminator."""
    critic_updates: tuple[Count, Count, Count] = (1, 5, 5)
    """Updates of the discriminator for one of the generator: in stage 1, in stage 2, and of what was found."""
    warmup: Natural = 0
    decay: Literal["cosine", "linear", "constant"] = "constant"
    betas: tuple[Decay, Decay] = (0.0, 0.9)
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 0.0
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    checkpoint_every: Count = 500
    generator_channels: Count = 256
    discriminator_channels: Count = 128
    latent: Annotated[int, at_least(3)] = 120
    """Numbers that the generator draws a picture from, a multiple of 3."""
    genotypes: Literal["search", "cifar10", "stl10"] = "search"
    """"search"; or the nets that the paper found on CIFAR-10 or STL-10, which are trained without a search."""
    opponent: Literal["autogan", "simple"] = "autogan"
    """Stage 1's discriminator: AutoGAN's genotype, or five convolutions (from 32 pixels on), the paper's GD2."""
    population: Annotated[int, at_least(2)] = 32
    """Genotypes alive at a time; half of them are kept after a round."""
    rounds: Natural = 18
    """Rounds of each stage."""
    search_warmup: Natural = 62_500
    """Updates of the discriminator, in each stage, on genotypes at random before the first round; the paper's 50 epochs
    of CIFAR-10. A stage's generators are updated once for as many of these as ``critic_updates`` says."""
    round_updates: Count = 12_500
    """Updates of the discriminator in a round; the paper's 10 epochs."""
    crossover: Share = 0.3
    """Probability that a child is crossed with a second parent."""
    mutation: Share = 0.5
    """Probability that one of its genes is changed."""
    samples: Annotated[int, at_least(2)] = 5000
    """Pictures that a candidate draws to be scored, and as many real ones at most."""
    extractor: str = "random-cnn"
    """Features of the scores: inception (with ``extractor_weights``), random-cnn, pixels, oracle, or a folder."""
    extractor_weights: Path | None = None
    """Weights of the FID's Inception: a safetensors file."""
    objectives: tuple[Objective, ...] = ("inception", "frechet", "parameters")
    """What is to be small: one over the Inception score, the Fréchet distance, the number of parameters."""
    selection: Selection = "nsga2"
    """Non-dominated sorting with crowding distance, or the published code's fronts after CARS."""
    evolve: bool = True
    """Fill up with children; otherwise at random, with the same number of evaluations, to compare with."""
    reset: bool = True
    """Stage 2: after a round all generators take the best one's weights."""
    jobs: Count = 1
    """Processes that score candidates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 16:
            raise BadInput(f"size must be a multiple of 16, got {self.size}: discriminators halve it four times")
        if self.latent % 3:
            raise BadInput(f"latent must be a multiple of 3, got {self.latent}: each cell has a third of it")
        if self.genotypes == "search" and not self.rounds:
            raise BadInput("a search budget of zero finds nothing: set rounds to at least 1, or name the genotypes")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise BadInput("name each objective once, and at least one")
        if self.selection == "cars" and len(self.objectives) < 2:
            raise BadInput("cars compares pairs of objectives: name at least two, or use nsga2")
        if self.opponent == "simple" and self.size < 32:
            raise BadInput(f"the simple discriminator halves pictures five times: size {self.size} is below 32")
        if self.opponent == "simple":
            self.require_several("the simple discriminator normalises over pictures")

    # What it is

    @classmethod
    def name(cls) -> str:
        """The catalogue's name."""
        return "eagan"

    def made(self) -> dict[str, Any]:
        """How the model is made, for its record."""
        return {"recipe": f"train {self.name()}", "config": asdict(self)}

    def generator_config(self, genotype: Genotype | None) -> dict[str, Any]:
        """How a generator is made; without a genotype the supernet."""
        return {
            "size": self.size, "channels": self.generator_channels, "latent": self.latent, "genotype": genotype,
        }  # fmt: skip

    def search_lengths(self, stage: Literal[0, 1]) -> tuple[int, int]:
        """A stage's warm-up and one of its rounds, in updates of the generator: what the loop counts."""
        critic = self.critic_updates[stage]
        return -(-self.search_warmup // critic), -(-self.round_updates // critic)

    def search_updates(self, stage: Literal[0, 1]) -> int:
        """Updates of the generator in one stage of the search."""
        warmup, updates = self.search_lengths(stage)
        return warmup + self.rounds * updates if self.genotypes == "search" else 0

    @torch.no_grad()
    def plan(self) -> Plan:
        """Memory, and the time of updates from one forward pass (scores come on top)."""
        require_memory(12 * self.size**2 * (4 + self.batch), f"batches of {self.batch:,} pictures of this size")
        net = GenotypeGenerator(**self.generator_config(PUBLISHED["generator"])).eval()
        began = time.perf_counter()
        net(torch.zeros(1, self.latent))
        seconds = (time.perf_counter() - began) * self.batch * 3
        updates = sum(u * (1 + c) for u, c in zip(self._lengths(), self.critic_updates, strict=True))
        one, searches = 4 * sum(p.numel() for p in net.parameters()), self.genotypes == "search"
        supernets = (
            4 * count_generator(**self.generator_config(None)),
            4 * count_discriminator(self.discriminator_channels),
        )
        weights = supernets if searches else (one, one)
        memory = {"weights": max(sum(weights), one * self.population * searches)}
        memory |= {"gradients": memory["weights"], "optimiser": 2 * memory["weights"]}
        budget = f"{2 * self.rounds * self.population} candidates scored" if searches else "no search"
        return Plan(f"train eagan on {self.data}: {budget}", memory=memory, seconds=seconds * updates)

    # The run

    def _run(self, out: Path, progress: bool, overwrite: bool) -> None:
        data = open_pictures(self.data, self.size, seed=self.seed, count=self.pictures)
        generator, discriminator = self.searched(data, out, progress)
        found = {
            kind.kind: {"genotype": g, "reads": kind.described(g)}
            for kind, g in ((GENERATOR, generator), (DISCRIMINATOR, discriminator))
        }
        torch.manual_seed(self.seed)
        net = begun(GenotypeGenerator(**self.generator_config(generator))).train()
        rates = Rates(self.lr, self.discriminator_lr, self.critic_updates[2], self.ema)
        pair = Pair(net, begun(self._discriminator(discriminator)), data, self.latent, rates)
        run = self._fit(pair, self.updates, out / "training", progress)
        settle(net, torch.Generator().manual_seed(self.seed))
        net.requires_grad_(False)
        model = ImageModel(
            net, GaussianProcess(Cosine()), "x0", (3, self.size, self.size), (),
            {"scheduler": "consistency", "sampling_steps": 1, "distilled_steps": 1},
        )  # fmt: skip

        def write() -> None:
            write_json(out / FOUND, found, overwrite=True)
            write_page(out / "search")
            model.save(out / "model", overwrite=overwrite, provenance=self.made())

        run.finish(write)

    def searched(
        self, data: Pictures, out: Path | None = None, progress: bool = False
    ) -> tuple[Genotype, Genotype]:
        """The genotypes of generator and discriminator, by both stages of the search or the published ones."""
        if self.genotypes != "search":
            return PUBLISHED["generator"], PUBLISHED[self.genotypes]
        judge = self._judge(data)
        first = self.stage_one(data, judge, out, progress)
        config = self.generator_config(first.population.winner)
        own = GenotypeGenerator(**config)
        part_of(own, first.generator)
        second = self.stage_two(data, judge, config, own.state_dict(), out, progress)
        return first.population.winner, second.population.winner

    def stage_one(
        self, data: Pictures, judge: Judge, out: Path | None = None, progress: bool = False
    ) -> GeneratorSearch:
        """The search for a generator, finished."""
        torch.manual_seed(self.seed)
        opponent = SimpleDiscriminator(self.discriminator_channels) if self.opponent == "simple" else (
            self._discriminator(PUBLISHED["autogan"])
        )  # fmt: skip
        supernet = begun(GenotypeGenerator(**self.generator_config(None))).train()
        rest = (data, self.latent, Rates(self.lr, self.discriminator_lr, self.critic_updates[0]))
        stage = GeneratorSearch(
            supernet, begun(opponent), GENERATOR, self.population, self._stage(0, judge, out), *rest
        )  # fmt: skip
        self._fit(stage, self.search_updates(0), None if out is None else out / "generators", progress)
        return stage

    def stage_two(
        self, data: Pictures, judge: Judge, config: Mapping[str, Any], state: Mapping[str, Tensor],
        out: Path | None = None, progress: bool = False,
    ) -> DiscriminatorSearch:  # fmt: skip
        """The search for a discriminator, finished."""
        torch.manual_seed(self.seed + 1)
        rest = (data, self.latent, Rates(self.lr, self.discriminator_lr, self.critic_updates[1]))
        stage = DiscriminatorSearch(
            begun(self._discriminator(None)), config, state, self.discriminator_channels, self.reset, DISCRIMINATOR,
            self.population, self._stage(1, judge, out), *rest,
        )  # fmt: skip
        self._fit(stage, self.search_updates(1), None if out is None else out / "discriminators", progress)
        return stage

    def _fit(self, recipe: Adversarial, updates: int, folder: Path | None, progress: bool) -> Run:
        own = {**self.beyond(), **rows_of(self.data, recipe.pictures)}
        run = Run(recipe, replace(self.schedule(), updates=updates, grid_every=0), folder, own)
        run.fit(progress)
        return run

    def _stage(self, which: Literal[0, 1], judge: Judge, out: Path | None) -> Stage:
        warmup, updates = self.search_lengths(which)
        return Stage(
            warmup, self.rounds, updates, self.objectives, self.selection, self.crossover,
            self.mutation, self.evolve, self.seed, self.jobs, judge, None if out is None else out / "search",
        )  # fmt: skip

    def _judge(self, data: Pictures) -> Judge:
        rng = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(data), generator=rng)[: self.samples].tolist()
        real = torch.stack([torch.from_numpy(data.picture(row).copy()) for row in rows]).permute(0, 3, 1, 2)
        return Judge.of(self.extractor, self.extractor_weights, real, self.samples, self.seed)

    def _discriminator(self, genotype: Genotype | None) -> nn.Module:
        return GenotypeDiscriminator(self.discriminator_channels, genotype)

    def _lengths(self) -> tuple[int, int, int]:
        return self.search_updates(0), self.search_updates(1), self.updates
