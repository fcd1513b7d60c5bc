"""DORSal: views drawn together against a model per view, where slots leave something open, before and after edits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data.cameras import Cameras
from sfumato.data.solids import World, shown
from sfumato.data.views import SolidViews, photographs
from sfumato.pipeline.slots import Slots, edit
from sfumato.train.dorsal import Dorsal

from .core import Claim, Experiment, Figures, Found
from .pixels import trained

Arm = Literal["together", "alone"]

UPDATES = 400
SIZE = 24
STEPS = 24
SCENES = 16
VIEWS = 3
HELD_OUT = 1000
"""Added to the seed: scenes that no network was trained on."""


def recipe(seed: int, arm: Arm, updates: int) -> Dorsal:
    """One network and one schedule; each view by itself in the arm "alone"."""
    return Dorsal(
        data="solids-uncoloured", size=SIZE, pictures=300, seed=seed, updates=updates, batch=8, lr=2e-3, warmup=50,
        ema=0.99, checkpoint_every=updates, grid_every=0, views=VIEWS, across=arm == "together", weighting="v",
        channels=(24, 40, 64), layers=1, attention_from=12, head_dim=8, embedding=96, octaves=6, first_octave=-2,
        rays=24, sampling_steps=STEPS, scheduler="ddim",
    )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the pixels of a scene's views show (numbers of solids), and its true pictures."""

    which: np.ndarray
    truth: Float[Tensor, "view 3 side side"]

    @classmethod
    def of(cls, world: World, cameras: Cameras) -> Seen:
        poses, focal = cameras.poses.double().numpy(), cameras.focal.tolist()
        pairs = list(zip(poses, focal, strict=True))
        truth = torch.from_numpy(photographs(world, cameras, SIZE)).permute(0, 3, 1, 2).float() / 255
        return cls(np.stack([shown(world, pose, f, SIZE)[0] for pose, f in pairs]), truth)

    def disagreement(self, views: Float[Tensor, "view 3 side side"]) -> float:
        """How much the hue of a solid differs between two views that both see it, in the mean; NaN: none do.

        Hue: the mean colour of the solid's pixels over the sum of its channels, which takes out how bright the light
        makes it; the distance is the sum of absolute differences, from 0 to 2. Solids of fewer than 6 pixels are not
        looked at.
        """
        found = []
        for solid in range(int(self.which.max()) + 1):
            hues = []
            for view, which in zip(views, self.which, strict=True):
                mask = torch.from_numpy(which == solid)
                if mask.sum() >= 6:
                    colour = view[:, mask].mean(1)
                    hues.append(colour / colour.sum().clamp(min=1e-3))
            found += [float((a - b).abs().sum()) for a, b in combinations(hues, 2)]
        return float(np.mean(found)) if found else float("nan")


def measure(seed: int, arm: Arm, updates: int = UPDATES, n: int = SCENES) -> Figures:
    """Train, draw scenes that were never seen, whole and without their first solid, and compare the views."""
    model: Any = trained(recipe(seed, arm, updates))
    scenes = SolidViews(SIZE, seed + HELD_OUT, 4 * n, coloured=False)
    names = (
        "views", "edits", "true views", "true edits", "colourful", "truly colourful", "changed inside", "floor error",
    )  # fmt: skip
    figures: dict[str, list[float]] = {name: [] for name in names}
    for i in range(len(scenes)):
        cameras, world = scenes.cameras(i).at(range(1, 1 + VIEWS)), scenes.world(i)
        whole, rest = Seen.of(world, cameras), Seen.of(world.without(0), cameras)
        truths = whole.disagreement(whole.truth), rest.disagreement(rest.truth)
        if not (np.isfinite(truths).all() and (whole.which == 0).any()):
            continue  # nothing is seen twice
        slots = Slots.of([scenes.objects(i)], scenes.cameras(i).poses[:1])
        both = Slots.cat([slots, edit(slots, [1])])  # slot 0 is the floor
        views, edits = model.render(both, cameras, [seed * 1000 + i] * 2)
        figures["views"].append(whole.disagreement(views))
        figures["edits"].append(rest.disagreement(edits))
        figures["true views"].append(truths[0])
        figures["true edits"].append(truths[1])
        solids = torch.from_numpy(whole.which >= 0)
        for name, drawn in (("colourful", views), ("truly colourful", whole.truth)):
            figures[name].append(float((drawn.amax(1) - drawn.amin(1))[solids].mean()))
        mask = torch.from_numpy(whole.which == 0)
        change = (views - edits).norm(dim=1) > 0.1
        figures["changed inside"].append(float((change & mask).sum() / change.sum().clamp(min=1)))
        error = (edits - rest.truth).abs().mean(1)[mask & torch.from_numpy(rest.which == -1)]
        figures["floor error"].append(float(error.mean()) if len(error) else 0.0)
        if len(figures["views"]) == n:
            break
    return figures


def compare(arms: dict[str, Figures]) -> Found:
    """Together against alone, whole and edited."""
    table = {arm: {name: float(np.mean(values)) for name, values in found.items()} for arm, found in arms.items()}
    return {
        "views": (arms["together"]["views"], arms["alone"]["views"]),
        "edits": (arms["together"]["edits"], arms["alone"]["edits"]),
        "views and edits": table,
    }


_METHOD = f"{VIEWS} views denoised together, with attention across them"
_BASELINE = "each view denoised by itself, the same network without that attention, trained as long"
_QUANTITY = (
    "Difference of the hue of a solid (colour over the sum of its channels, 0 to 2) between two views that both see it "
    "by the true geometry, in the mean over solids and pairs of views, for each scene."
)
EXPERIMENT = Experiment(
    name="dorsal",
    paper="arXiv 2306.08068",
    claims={
        "views": Claim(
            "Where slots do not say everything (here: no colours), views drawn together agree more.",
            _METHOD,
            _BASELINE,
            _QUANTITY,
            "lower",
        ),
        "edits": Claim(
            "So they do after a slot has been removed.",
            _METHOD,
            _BASELINE,
            f"{_QUANTITY} The scene is the one without its first solid.",
            "lower",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned on any seed; settings as first written, the updates as many as the budget allows.",
    measure=measure,
    arms=("together", "alone"),
    compare=compare,
    cost=150,
    notes=f"The world of solids in {SIZE} x {SIZE} pixels, {UPDATES} updates of 8 scenes for each arm; slots are the "
    "objects' descriptions without their colours, so that a model has to invent those. The table also has the true "
    "pictures' disagreement (pixels at borders), how colourful solids are drawn and truly are (the difference of the "
    "largest and the least of red, green and blue: what is grey agrees without knowing anything), the share of the "
    "pixels changed by an edit that lie on the removed solid (the rest is its shadow, and chance), and how far the "
    "floor that is then seen there is from the true one's colour, which the slots do not say either.",
)
