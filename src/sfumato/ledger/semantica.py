"""Semantica: pairs against the same picture (copying), and filtering pairs by likeness against none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.data import oracle
from sfumato.data.pictures import Pictures, open_pictures
from sfumato.metrics.extractors import make_extractor
from sfumato.metrics.one_shot import diversity, one_shot
from sfumato.train.episodes import Episodes
from sfumato.train.semantica import Semantica, pixels

from .core import Claim, Experiment, Figures, Found
from .pixels import trained

UPDATES = 300
SIZE = 32
STEPS = 32
SHOWN = 24
EACH = 6
"""Pictures drawn of each that is shown."""
STRANGERS = 0.3
"""Share of the pictures that lie in an episode that they do not belong to."""
ALL, FILTERED = (0.0, 1.0), (0.5, 0.98)
"""Shares of the cosines. With three in ten pictures out of place half of the pairs are unrelated."""


@dataclass(frozen=True, kw_only=True)
class Mixed(Semantica):
    """`Semantica` on episodes of which some pictures have changed places."""

    strangers: float = 0.0

    def groups(self, pictures: Pictures) -> Episodes:
        return mixed(super().groups(pictures), self.strangers, self.seed)


def mixed(episodes: Episodes, share: float, seed: int) -> Episodes:
    """The same episodes with this share of all pictures moved around among their places."""
    rng = torch.Generator().manual_seed(seed)
    rows: Int[Tensor, "n"] = torch.cat(list(episodes))
    places = torch.randperm(len(rows), generator=rng)[: round(share * len(rows))]
    rows[places] = rows[places[torch.randperm(len(places), generator=rng)]]
    return list(rows.split([len(episode) for episode in episodes]))


ARMS: dict[str, dict[str, Any]] = {
    "pairs": {"similar": ALL},
    "same": {"similar": ALL, "pairs": "same"},
    "filtered": {"similar": FILTERED, "strangers": STRANGERS},
    "unfiltered": {"similar": ALL, "strangers": STRANGERS},
}


def recipe(seed: int, updates: int, **arm: Any) -> Mixed:
    """One network for all arms."""
    return Mixed(
        size=SIZE, pictures=3000, seed=seed, updates=updates, batch=48, lr=2e-3, warmup=50, ema=0.99,
        checkpoint_every=updates, quantiles=True, largest_episode=400, factor=2, channels=(32,), blocks=(1,), depth=2,
        width=96, head_dim=32, embedding=96, dropout=0.0, sampling_steps=STEPS, **arm,
    )  # fmt: skip


def measure(seed: int, arm: str, updates: int = UPDATES, n: int = SHOWN) -> Figures:
    """Train on some episodes and draw of pictures of the world that the model has not seen."""
    model: Any = trained(recipe(seed, updates, **ARMS[arm]))
    world = open_pictures("sketch", SIZE, seed=1000 + seed, count=n + 400)
    shown, real = pixels(world, list(range(n))), pixels(world, list(range(n, n + 400)))
    cond = model.seen(shown).repeat(EACH)
    drawn = model.draw(None, range(1000 * seed, 1000 * seed + n * EACH), cond=cond, batch=48)
    bytes_drawn = (drawn * 255).round().to(torch.uint8)
    read = oracle.load()(drawn)["object"].argmax(1)
    due = torch.tensor([world.label(i) for i in range(n)]).repeat_interleave(EACH)
    judge = make_extractor("random-cnn")  # not the encoder that the model was shown the pictures by
    features, of, others = judge(bytes_drawn), judge(shown).repeat_interleave(EACH, 0), judge(real)
    figures = one_shot(features, of, others)
    each = [diversity(*(x[i * EACH : (i + 1) * EACH] for x in (features, of))) for i in range(n)]
    return {
        "diversity": each,
        "same object": (read == due).double().tolist(),
        "one-shot": {
            "Fréchet distance": figures.frechet, "precision": figures.precision, "recall": figures.recall,
            "copied": figures.copied, "consistency": figures.consistency, "diversity": figures.diversity,
            "same object": float((read == due).double().mean()),
        },
    }  # fmt: skip


def compare(arms: dict[str, Figures]) -> Found:
    """Pairs against the same picture, filtering against none."""
    return {
        "copying": (arms["pairs"]["diversity"], arms["same"]["diversity"]),
        "filtering": (arms["filtered"]["same object"], arms["unfiltered"]["same object"]),
        "one-shot figures": {arm: figures["one-shot"] for arm, figures in arms.items()},
    }


EXPERIMENT = Experiment(
    name="semantica",
    paper="arXiv 2405.14857",
    claims={
        "copying": Claim(
            "Shown one picture, a model trained on pairs draws more various pictures than one trained to draw the "
            "picture that it is shown.",
            "pairs of different pictures of a class",
            "the same picture shown and drawn",
            f"Mean distance (1 - cosine of random convolutional features) between {EACH} pictures drawn of one shown, "
            "for each shown picture.",
        ),
        "filtering": Claim(
            "Where three in ten pictures lie in the wrong episode, leaving out pairs that are too unlike or too much "
            "alike draws the object that is shown more often.",
            "pairs between the 50th and the 98th hundredth of the cosines",
            "all pairs",
            "Whether the scenes' oracle reads in what was drawn the object of what was shown, for each picture drawn.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed; settings as first written.",
    measure=measure,
    arms=tuple(ARMS),
    compare=compare,
    cost=90,
    notes=f"One U-ViT shown pictures by the scenes' oracle (its tokens), {UPDATES} updates of 48 pairs for each arm; "
    "episodes are the objects of the sketch world. The table's figures are by random convolutional features: the "
    "Fréchet distance of few drawn pictures compares the arms, and is no FID. The oracle reads what was drawn and is "
    "the encoder too, in both arms of its claim.",
)
