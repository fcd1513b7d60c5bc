"""A small classifier of real pictures, kept as a folder of transformers: the judge in this folder's scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.files import atomic_folder
from sfumato.metrics.vision import Preparation
from sfumato.train.loop import Recipe, Run, Schedule

SIDE = 64
PREPARE = Preparation((SIDE, SIDE), None, "bilinear", (0.5,) * 3, (0.5,) * 3)


@dataclass
class Labelling(Recipe):
    """A recipe of the training loop: cross-entropy of a classifier on augmented pictures.

    ``x`` are bytes, ``y`` the numbers of their classes; ``augment`` takes and gives pictures in [0, 1].
    """

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    augment: Callable[[Tensor, torch.Generator], Tensor]

    def modules(self) -> dict[str, nn.Module]:
        return {"classifier": self.net}

    def batch(self, step: int, rng: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.x), (size,), generator=rng)
        return PREPARE(self.augment(self.x[rows].float() / 255, rng)), self.y[rows]

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = (part.to(next(self.net.parameters()).device) for part in batch)
        logits = self.net(x).logits.float()
        right = (logits.argmax(1) == y).float().mean()
        return cross_entropy(logits, y, label_smoothing=0.05), {"right": right.detach()}


def train_classifier(
    folder: Path,
    labels: list[str],
    x: Tensor,
    y: Tensor,
    test: tuple[Tensor, Tensor],
    told: str,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    updates: int,
    checkpoint_every: int = 200,
) -> Path:
    """Train on the bytes ``x`` of the classes ``y`` unless ``folder`` is there; card.json in it says how good it is.

    Args:
        folder: for the ResNet and the configuration of its image processor; the run is kept beside it.
        test: bytes and classes that it is measured on; ``told`` says which those are.
    """
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    if folder.exists():
        return folder
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[48, 96, 160, 256], depths=[1, 1, 1, 1], layer_type="basic",
        downsample_in_first_stage=False, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    net = ResNetForImageClassification(config).train()
    # The statistics of batch normalisation belong to the last weights, so those are kept and not an average.
    schedule = Schedule(
        updates=updates, batch=64, lr=3e-3, weight_decay=0.05, ema=0.0, checkpoint_every=checkpoint_every,
        warmup=min(200, updates // 4),
    )  # fmt: skip
    recipe = Labelling(folder.name, net, x, y, augment)
    Run(recipe, schedule, folder.with_name(f"{folder.name}-training"), {"labels": len(labels)}).fit()
    right = int((classify(net.cpu().eval(), test[0]) == test[1]).sum())
    card = {"right": right, "n": len(test[1]), "labels": len(labels), "updates": updates, "measured on": told}
    with atomic_folder(folder) as temporary:
        net.save_pretrained(temporary)
        size = {"height": SIDE, "width": SIDE}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(temporary)
        (temporary / "card.json").write_text(json.dumps(card, indent=1))
    print(folder.name, card, flush=True)
    return folder


@torch.no_grad()
def classify(net: nn.Module, x: Tensor) -> Tensor:
    """The classes that ``net`` sees in bytes."""
    return torch.cat([net(PREPARE(part.float() / 255)).logits.argmax(1) for part in x.split(256)])
