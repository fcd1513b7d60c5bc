"""GOAR, and ROAR, KAR and ROAD beside it: damage pictures where an attribution points, train again, count errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.fields import Count, Natural, NotNegative, Positive, within
from sfumato.files import tensors_sha256
from sfumato.train.draw import step_seed

from .base import Judge, Judgement
from .parts.attributions import attribution, maps_of
from .parts.curves import curve, kept_first, score_of
from .parts.damage import radius
from .parts.data import Labelled
from .parts.kept import Kept
from .parts.projector import DiffusionProjector
from .parts.retraining import Retrain, from_scratch
from .parts.study import Study
from .parts.ways import Metric, Ways

LENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
Time = Annotated[float, within(1e-3, 1)]


@dataclass(frozen=True, kw_only=True)
class GOAR(Judge):
    """Which attribution finds what a classifier goes by: the more errors after its damage and retraining, the better.

    "goar" (arXiv:2407.12401): every picture, of training and test, is moved along its own attribution by the same
    length, x(eps) = x - eps r a / |a| with r the mean distance of pictures from their mean; a diffusion model of such
    pictures brings it back to the manifold (noise to t0, then denoising), with the same noise for all attributions;
    a classifier is trained from scratch on the moved pictures, and its errors on moved test pictures, summed over all
    eps, are the score. Rotating the space of pictures, attributions with it, changes nothing; scaling single axes
    does, for a gradient is read as a direction in the Euclidean metric. "roar" (arXiv:1806.10758): the share t of
    values, of all channels, that the squared map ranks highest become their channel's mean. "kar" keeps only these:
    there the fewest errors win. "road" (arXiv:2202.00449): whole pixels are replaced by noisy linear imputation, and
    the classifier itself is asked, without training.

    Maps are made once, by the classifier that is explained, for the class that it predicts. Besides the score: the
    errors of that classifier on the damaged pictures without retraining, and the leakage probe: how often a classifier
    trained on nothing but unit directions (or masks) is right; what it reads there, it may read in damaged pictures,
    and errors then mean less. Controls: "random", "zero", and "minus:", "shuffled:" or "blurred:" before a name.

    Cost: attributions times strengths times ``runs`` trainings, and with a projector ``sampling_steps`` network calls a
    picture, attribution and strength. ROAD: one dense linear system in the pixels that are gone a picture.

    Reconstructed, for there is no code and the paper's constants are not at hand: the unit of length r, the grid of
    lengths, the sign, the times to noise to, DDIM, the sum over the grid.
    Differs from the papers: ROAR's random baseline ranks at random, so that it takes out exactly its share; without
    ``retrain`` the recipe of retraining is a short one of its own; "road" ranks pixels by the sum over channels.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "attributions": ("gradient", "random"), "strengths": (0.4,), "runs": 1, "updates": 4, "retrain_batch": 4,
        "held_out": 0.3,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "roar": {"metric": "roar", "runs": 5}, "kar": {"metric": "kar", "runs": 5}, "road": {"metric": "road"},
    }  # fmt: skip

    metric: Metric = "goar"
    """What is done to pictures: moved; values taken out; all others taken out; pixels imputed."""
    attributions: tuple[str, ...] = ("gradient", "input-gradient", "integrated-gradients", "smoothgrad", "random")
    """Of gradient, input-gradient, integrated-gradients, smoothgrad, random, zero, edges, captum:CLASS (where it is
    installed), with minus:, squared:, shuffled: or blurred: before a name to change its maps."""
    strengths: tuple[NotNegative, ...] = ()
    """Lengths in units of the mean distance from the mean picture, or shares of values; by default 0.05 to 0.8, or 0.1
    to 0.9."""
    towards: bool = False
    """Of "goar": move with the attribution, which adds evidence, instead of against it."""
    target: Literal["predicted", "label"] = "predicted"
    """The class that maps are made for."""
    squared: bool = True
    """Of "roar", "kar" and "road": rank by the squares of a map's numbers."""
    noise_times: tuple[Time, Time] = (0.1, 0.3)
    """Of the projector: times in (0, 1] to noise to, at the smallest strength and at the largest."""
    sampling_steps: Count = 20
    """Of the projector: steps from there to the picture."""
    ancestral: bool = False
    """Of the projector: DDPM's steps instead of DDIM's."""
    imputation_noise: NotNegative = 0.01
    """Of "road": deviation of the noise on imputed pixels."""
    retrained: Literal["auto", "yes", "no"] = "auto"
    """Whether the score is of retrained classifiers; "auto": in all metrics but "road"."""
    runs: Count = 3
    """Classifiers trained for each strength, from seeds that all attributions share."""
    score: Literal["sum", "area"] = "sum"
    """Errors summed over strengths, or the area under their share, divided by the length of the grid."""
    leakage: bool = True
    """Train the probe as well: one more classifier for each attribution."""
    updates: Natural = 0
    """Updates of retraining; 0: those of the classifier's own recipe, or 500 where it is not known."""
    retrain_batch: Count = 64
    """Pictures an update, where the classifier's own recipe is not known."""
    lr: Positive = 1e-3
    """Learning rate, where the classifier's own recipe is not known."""
    shown: Natural = 4
    """Test pictures on the page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric != "goar" and any(s > 1 for s in self.strengths):
            raise BadInput(f"strengths of {self.metric} are shares of at most 1, got {max(self.strengths):g}")
        if not self.attributions:
            raise BadInput("name at least one attribution to judge, such as gradient")
        for names in (self.attributions, self.strengths):
            if len(set(names)) < len(names):
                raise BadInput(f"each attribution and strength once, got {', '.join(map(str, names))}")

    @property
    def grid(self) -> tuple[float, ...]:
        """The strengths, from small to large."""
        return tuple(sorted(self.strengths or (LENGTHS if self.metric == "goar" else SHARES)))

    @property
    def trains(self) -> bool:
        """Whether classifiers are trained again."""
        return self.retrained == "yes" or (self.retrained == "auto" and self.metric != "road")

    def trainings(self, attributions: int | None = None) -> int:
        """How many classifiers `judge` trains."""
        n = len(self.attributions) if attributions is None else attributions
        damaged = self.runs * (1 + n * len(self.grid)) if self.trains else 0
        return damaged + n * self.leakage

    def judged(
        self, network: nn.Module, seen: Labelled, unseen: Labelled, asked: Mapping[str, Any], folder: Path | None,
        advance: Callable[[], None],
    ) -> Judgement:
        rules = {**{name: attribution(name) for name in self.attributions}, **asked["others"]}
        if twice := set(self.attributions) & set(asked["others"]):
            raise BadInput(f"{min(twice)!r} is a built-in attribution that is judged, too: give the other another name")
        retrain: Retrain = asked["retrain"] or from_scratch(network, self.updates or 500, self.retrain_batch, self.lr)
        ways = self._ways(asked["projector"], seen)
        about = self._about(network, seen, unseen, asked)
        study = Study(network, seen, unseen, ways, retrain, Kept(folder, about), self.seed, self.batch, self.shown)
        study.advance = advance
        runs = range(self.runs if self.trains else 0)
        clean = [study.point("clean", i, lambda: (seen.pictures, unseen.pictures)) for i in runs]  # of all attributions
        classes = study.classes if self.target == "predicted" else study.labels
        found, strips = {}, {}
        for name, rule in rules.items():
            # from the name, not the place in the list: which others are judged changes nothing
            rng = torch.Generator().manual_seed(step_seed(self.seed, 0, *name.encode()))
            maps = maps_of(rule, name, network, study.pictures, classes, rng, self.batch)
            points = [study.strength(name, maps, s, runs) for s in self.grid]
            probe = study.probe(name, maps) if self.leakage else None
            found[name] = self._figures(points, probe, maps, len(unseen))
            strips[name] = study.strip(maps, classes, points)
        best = sorted(found, key=lambda m: found[m]["score"]["value"], reverse=not kept_first(self.metric))
        figures = {
            "metric": self.metric,
            "strengths": list(self.grid),
            "pictures": {"trained on": len(seen), "measured on": len(unseen)},
            "wrong": {
                "as it is": float((study.classes[len(seen) :] != unseen.labels).double().mean()),
                "retrained": curve([x["wrong"] for x in clean], len(unseen), self.seed),
            },
            "projector": ways.project is not None,
            "radius": ways.radius,
            "attributions": found,
            "ranking": best,
        }
        return Judgement(figures, strips)

    def _ways(self, projector: Any, seen: Labelled) -> Ways:
        if projector is not None and self.metric != "goar":
            raise BadInput(f"{self.metric} takes values out and projects nothing: leave the projector out")
        if hasattr(projector, "denoiser"):
            projector = DiffusionProjector(projector, self.sampling_steps, self.ancestral, self.seed, self.batch)
            projector.check(seen.pictures.shape[1:])
        return Ways(
            self.metric, self.grid, radius(seen.pictures), seen.pictures.mean((0, 2, 3)), projector, self.noise_times,
            1 if self.towards else -1, self.squared, self.imputation_noise, self.seed,
        )  # fmt: skip

    def _figures(self, points: list[Any], probe: float | None, maps: Tensor, n: int) -> dict[str, Any]:
        """What was found of one attribution."""
        counts = [[x["wrong"] for x in point["runs"]] for point in points]
        alone = [point["original"]["wrong"] for point in points]
        curves = [
            {"strength": s, "retrained": curve(c, n, self.seed), "as it is": x / n}
            for s, c, x in zip(self.grid, counts, alone, strict=True)
        ]
        runs = list(zip(*counts, strict=True)) if self.trains else [alone]
        score = score_of(runs, self.grid, n, self.score, self.seed)
        return {"curve": curves, "score": score, "leakage": probe, "signed": bool((maps < 0).any())}

    def _about(
        self, network: nn.Module, seen: Labelled, unseen: Labelled, asked: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What points depend on; more attributions and runs only add to them."""
        free = {"attributions", "runs", "score", "leakage", "retrained"}
        data = {"x": seen.pictures, "y": seen.labels, "test x": unseen.pictures, "test y": unseen.labels}
        projector = asked["projector"]
        known = projector.describe().get("sha256") if hasattr(projector, "describe") else projector is not None
        return {
            **{name: value for name, value in asdict(self).items() if name not in free},
            "network": tensors_sha256(network.state_dict()), "data": tensors_sha256(data), "projector": known,
            "own recipe": asked["retrain"] is not None,
        }  # fmt: skip
