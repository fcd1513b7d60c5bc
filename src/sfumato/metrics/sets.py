"""Metrics of two sets of pictures, as objects with ``update``, ``compute`` and ``reset``.

    fid = FID(make_extractor("inception", "inception.safetensors"))
    fid.update(real_batch, real=True)
    fid.update(batch, real=False)
    fid.compute()                       # a `Score`: value, interval, and everything that decides them

Under `torch.distributed` every process updates with its own pictures and ``compute``, called in all of them, answers
for all pictures; give none to two processes, as samplers do that fill up their last batch. Who has features already
calls ``update_features``, or ``measure`` with two `Features`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import sfumato
from sfumato.errors import BadInput

from .bootstrap import Estimate, influence_interval, mean_interval, rate_interval
from .extractors import Extractor
from .features import Features
from .frechet import SIZES, Gaussian, frechet_distance, frechet_infinity, frechet_influence
from .gather import gather_rows
from .inception_score import inception_score
from .kernels import Discrepancy, cmmd, kid
from .moments import RunningMoments, check_features
from .neighbours import Neighbours, neighbours
from .record import Score, scored
from .resize import to_bytes

GENERATED = "generated pictures, the real set held fixed"
RESAMPLES = 2_000
REAL = "real pictures, the generated set held fixed"


class SetMetric(ABC):
    """What the metrics share: the features of both sets, their union over processes, and the record."""

    name: str
    """What the number is called when the features are those of the FID's Inception."""
    general: str = ""
    """What it is called with any other features; "" where that makes no difference."""
    needs_real = True

    def __init__(self, extractor: Extractor | None = None, *, seed: int = 0, level: float = 0.95):
        """
        Args:
            extractor: what `update` makes features with.
            seed: of subsets, shuffles and resampling.
            level: of the interval.
        """
        self.extractor, self.seed, self.level = extractor, seed, level
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._features: dict[bool, list[Tensor]] = {True: [], False: []}

    def update(self, images: Tensor, real: bool) -> None:
        """Add pictures (n, 3, height, width): uint8, or floats in [0, 1], which are rounded to 8 bits."""
        if self.extractor is None:
            raise BadInput(f"{self.name} has no extractor: give it one, or call update_features")
        self.update_features(self.extractor(to_bytes(images)), real)

    def update_features(self, features: Float[Tensor, "n d"], real: bool) -> None:
        """Add pictures by their features."""
        seen = self._features[True] or self._features[False]
        check_features(features, seen[0].shape[1] if seen else None)
        self._features[real].append(features.detach().to("cpu", torch.float32))

    def compute(self) -> Any:
        """The `Score` of all pictures seen by all processes.

        Raises:
            BadInput: too few pictures.
        """
        sides = ((True, "real"), (False, "generated")) if self.needs_real else ((False, "generated"),)
        found = {}
        for side, word in sides:
            seen = self._features[side]
            # a process without pictures takes part, or the others would wait for it
            values = gather_rows(torch.cat(seen) if seen else torch.empty(0, 0))
            if not len(values):
                raise BadInput(f"{self.name} has seen no {word} pictures: update it with some first")
            found[side] = Features(values, **self._about())
        self.check(len(found.get(True, ())), len(found[False]))
        return self.measure(found.get(True), found[False])

    def _about(self) -> dict[str, Any]:
        e = self.extractor
        return {"extractor": e.name, "weights": e.hash, "resize": e.resize} if e else {}

    def least(self) -> tuple[int, int]:
        """How many real and generated pictures it takes at the least."""
        return (2 if self.needs_real else 0), 2

    def check(self, n_real: int, n_generated: int) -> None:
        """Raise `BadInput` where these are too few."""
        for word, n, least in zip(("real", "generated"), (n_real, n_generated), self.least(), strict=True):
            if n < least:
                raise BadInput(f"{self.name} needs at least {least} {word} pictures, and there are {n}")

    @abstractmethod
    def measure(self, real: Features, generated: Features) -> Any:
        """The `Score` of two sets of features."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def score(
        self,
        estimate: Estimate,
        real: Features | None,
        generated: Features,
        *,
        name: str = "",
        over: str = GENERATED,
        convention: str = "",
        **more: Any,
    ) -> Score:
        """The record of an estimate.

        Raises:
            BadInput: the two sets were not prepared in one way.
        """
        if real is not None:
            for field in ("extractor", "weights", "resize", "pictures"):
                if getattr(real, field) != getattr(generated, field):
                    raise BadInput(
                        f"the two sets have different features: {field} is {getattr(real, field)!r} for the real "
                        f"and {getattr(generated, field)!r} for the generated pictures"
                    )
        protocol = {
            "extractor": generated.extractor,
            "weights": generated.weights,
            "resize": generated.resize,
            "pictures": generated.pictures,
            "dtype": "float32 features, float64 sums",
            "convention": convention,
            "real": real.content if real else "",
            "seed": self.seed,
            "version": sfumato.__version__,
        }
        n_real = len(real) if real else 0
        return Score(name or self.title(generated), n_real=n_real, n_gen=len(generated), protocol=protocol,
                     **scored(estimate, over, self.level), **more)  # fmt: skip

    def title(self, generated: Features) -> str:
        """The metric's name with these features."""
        return self.name if not self.general or generated.extractor.startswith("inception-v3-2015") else self.general

    def of_influence(self, value: float, influence: Tensor, noise: float = 0.0) -> Estimate:
        return influence_interval(
            value, influence, self.generator(), noise=noise, level=self.level, resamples=RESAMPLES
        )


class FID(SetMetric):
    """Fréchet distance of the features' means and covariances: "fid" with the FID's Inception, "fd" with others.

    The finite-sample bias is part of it: compare at equal n only, or use `FIDInfinity`.
    """

    name, general = "fid", "fd"

    def __init__(self, extractor: Extractor | None = None, *, streaming: bool = False, **settings: Any):
        """
        Args:
            streaming: keep sums instead of features: one matrix of memory for any number of pictures, no interval,
                and for sets of fewer pictures than features about seven digits instead of fifteen.
        """
        self.streaming = streaming
        super().__init__(extractor, **settings)

    def reset(self) -> None:
        super().reset()
        self._sums = {True: RunningMoments(), False: RunningMoments()}

    def update_features(self, features: Float[Tensor, "n d"], real: bool) -> None:
        if self.streaming:
            self._sums[real].update(features.cpu())
        else:
            super().update_features(features, real)

    def compute(self) -> Score:
        if not self.streaming:
            return super().compute()
        x, y = (Gaussian(known=self._sums[side].reduced().moments()) for side in (True, False))
        estimate = Estimate(frechet_distance(x, y), float("nan"), float("nan"), y.n, "none")
        return self.score(estimate, self._standin(x), self._standin(y))

    def measure(self, real: Features, generated: Features) -> Score:
        value, influence = frechet_influence(real.gaussian, generated.gaussian)
        return self.score(self.of_influence(value, influence), real, generated)

    def _standin(self, known: Gaussian) -> Features:
        """A set of which only sums are known, as the record needs it."""
        return Features(torch.empty(known.n, 0), **self._about())


class FIDInfinity(SetMetric):
    """FD extrapolated to infinitely many generated pictures (Chong and Forsyth 2020); the real set is kept as it is."""

    name, general = "fid-inf", "fd-inf"

    def __init__(
        self, extractor: Extractor | None = None, *, smallest: int | None = None, draws: int = 1, **settings: Any
    ):
        """``smallest`` and ``draws`` as in `frechet.frechet_infinity`."""
        self.smallest, self.draws = smallest, draws
        super().__init__(extractor, **settings)

    def least(self) -> tuple[int, int]:
        return 2, (self.smallest or 2) + SIZES - 1

    def measure(self, real: Features, generated: Features) -> Score:
        found = frechet_infinity(
            real.gaussian, generated.values, self.generator(), smallest=self.smallest, draws=self.draws
        )
        convention = f"{len(found.sizes)} sizes from {found.sizes[0]} to {found.sizes[-1]}"
        return self.score(self.of_influence(found.value, found.influence), real, generated, convention=convention)


class KID(SetMetric):
    """Unbiased MMD^2 with a cubic kernel, times 1 (papers often print it times 1000); may be negative."""

    name, general = "kid", "kd"

    def __init__(self, extractor: Extractor | None = None, *, subsets: int = 100, size: int = 1000, **settings: Any):
        """``subsets`` and ``size`` as in `kernels.kid`."""
        self.subsets, self.size = subsets, size
        super().__init__(extractor, **settings)

    def measure(self, real: Features, generated: Features) -> Score:
        found: Discrepancy = kid(
            real.values, generated.values, self.generator(), subsets=self.subsets, size=self.size
        )
        size = min(self.size, len(real), len(generated))
        subsets = 1 if size == len(real) == len(generated) else self.subsets
        return self.score(
            self.of_influence(found.value, found.influence, found.noise), real, generated,
            convention=f"(x.y/d + 1)^3, {subsets} subsets of {size}", spread=found.spread,
        )  # fmt: skip


class CMMD(SetMetric):
    """Biased MMD^2 with a Gaussian kernel, on features scaled to unit length, times 1000; CLIP features for CMMD."""

    name = "cmmd"

    def __init__(self, extractor: Extractor | None = None, *, sigma: float = 10.0, **settings: Any):
        """``sigma`` as in `kernels.cmmd`."""
        self.sigma = sigma
        super().__init__(extractor, **settings)

    def measure(self, real: Features, generated: Features) -> Score:
        x, y = (s.values.double() / s.values.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
                for s in (real, generated))  # fmt: skip
        found = cmmd(x, y, sigma=self.sigma)
        convention = f"unit length, sigma {self.sigma:g}, times 1000"
        return self.score(self.of_influence(found.value, found.influence), real, generated, convention=convention)


class InceptionScore(SetMetric):
    """exp of the mean KL divergence of p(y|x) from p(y); needs an extractor with ``logits``, and no real pictures.

    Says something about pictures of the kinds that the classifier knows.
    """

    name, needs_real = "is", False

    def __init__(self, extractor: Extractor, *, splits: int = 10, **settings: Any):
        """``splits`` as in `inception_score.inception_score`.

        Raises:
            BadInput: an extractor that does not classify.
        """
        if not hasattr(extractor, "logits"):
            raise BadInput(f"the Inception score needs an extractor that classifies, which {extractor.name} does not")
        self.splits = splits
        super().__init__(extractor, **settings)

    def least(self) -> tuple[int, int]:
        return 0, self.splits

    def measure(self, real: Features | None, generated: Features) -> Score:
        logits = self.extractor.logits(generated.values).cpu()  # type: ignore[attr-defined]
        found = inception_score(logits, self.generator(), splits=self.splits)
        without = f" without {left}" if (left := getattr(self.extractor, "without", "")) else ""
        return self.score(
            self.of_influence(found.value, found.influence), None, generated, better="higher", spread=found.spread,
            convention=f"{self.splits} shuffled splits, {logits.shape[1]} outputs{without}, ddof 0",
            over="generated pictures",
        )  # fmt: skip


class Fidelity(SetMetric):
    """Improved precision and recall, density and coverage; ``compute`` gives a dict of the four."""

    name = "precision, recall, density and coverage"

    def __init__(self, extractor: Extractor | None = None, *, k: int = 3, k_density: int = 5, **settings: Any):
        """``k`` and ``k_density`` as in `neighbours.neighbours`."""
        self.k, self.k_density = k, k_density
        super().__init__(extractor, **settings)

    def least(self) -> tuple[int, int]:
        return max(self.k, self.k_density) + 1, self.k + 1

    def measure(self, real: Features, generated: Features) -> dict[str, Score]:
        found: Neighbours = neighbours(real.values, generated.values, k=self.k, k_density=self.k_density)
        pr, dc = f"k = {self.k}, <=", f"k = {self.k_density}, <"
        drawn = {"generator": self.generator(), "level": self.level, "resamples": RESAMPLES}
        rate = lambda hits: rate_interval(hits.cpu(), **drawn)
        density = mean_interval(found.density, **drawn)
        rows = {
            "precision": (rate(found.precise), pr, GENERATED),
            "recall": (rate(found.recalled), pr, REAL),
            "density": (density, dc, GENERATED),
            "coverage": (rate(found.covered), dc, REAL),
        }
        return {
            name: self.score(estimate, real, generated, name=name, over=over, convention=convention, better="higher")
            for name, (estimate, convention, over) in rows.items()
        }


SETS: dict[str, type[SetMetric]] = {
    "fid": FID, "fid-inf": FIDInfinity, "kid": KID, "is": InceptionScore, "precision": Fidelity, "recall": Fidelity,
    "density": Fidelity, "coverage": Fidelity, "cmmd": CMMD,
}  # fmt: skip
"""What each metric of two sets is measured by."""
