"""Folders that ``sfumato classify`` wrote, for judges: which they are, and the network in them.

The method's class is found by its name in the catalogue, and nowhere else: a folder names no code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.errors import BadInput
from sfumato.foreign import read_json, reading

from .vision import Preparation

RECORD = "sfumato.json"


@dataclass(frozen=True)
class Trained:
    """A network from prepared pictures to logits, with ``features``, and what its numbers mean."""

    name: str
    network: nn.Module
    prepare: Preparation
    labels: list[str]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def described(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a classifier's folder says of itself (``classifier``, ``labels``, ``size``), and the settings of its method.

    Raises:
        BadInput: no such folder, or none of a classifier.
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        raise BadInput(f"there is no {file}: give a folder that `sfumato classify` wrote")
    record = read_json(file, {"description": dict, "provenance": dict})
    about, config = record["description"], record["provenance"].get("config")
    labels = about.get("labels")
    if "classifier" not in about or not isinstance(config, dict):
        raise BadInput(f"{folder} is no classifier's: give a folder that `sfumato classify` wrote")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise BadInput(f"{file} has labels that are no text: train the classifier again")
    if isinstance(about.get("size"), bool) or not isinstance(about.get("size"), int) or about["size"] < 1:
        raise BadInput(f"{file} says no size of pictures: train the classifier again")
    return about, config


def is_trained(folder: str | os.PathLike) -> bool:
    """Whether this is a classifier's folder that `transformers` cannot read."""
    path = Path(folder).expanduser()
    if not (path / RECORD).is_file() or (path / "config.json").exists():
        return False
    try:
        described(path)
    except BadInput:
        return False
    return True


def load_trained(folder: str | os.PathLike) -> Trained:
    """The classifier in a folder, on the fastest device.

    Raises:
        BadInput: no such folder, an unknown method, or damaged weights.
    """
    from sfumato import catalog

    path = Path(folder).expanduser()
    about, _ = described(path)
    with reading(path, "a classifier"):
        network = catalog.get(str(about["classifier"]), "classify").load().read(path)
    prepare = Preparation((about["size"],) * 2, None, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return Trained(str(path), network.to("cuda" if torch.cuda.is_available() else "cpu"), prepare, about["labels"])
