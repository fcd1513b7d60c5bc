"""The pipeline that a training starts from: its parts, whether they fit, and how it was made itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image, load_text2image, read_record


@dataclass(frozen=True)
class Parent:
    """A trained pipeline in float32 on the CPU, and its record."""

    name: str
    """As the user gave it."""
    pipeline: Text2Image
    record: dict[str, Any]
    """How it was made (recipe, configuration, its own parent if it had one) and the hash of its weights."""

    def part(self, component: str, like: nn.Module, settings: str) -> nn.Module:
        """A network of this pipeline, to be trained on.

        Args:
            component: its name, e.g. "vae".
            like: the network that the recipe's settings make; every tensor must have the same name and shape.
            settings: the names of those settings, for the complaint.

        Raises:
            BadInput: the shapes differ.
        """
        part = self.pipeline.parts()[component]
        ours, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (like, part))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise BadInput(
                    f"the {component} of {self.name} has another shape than these settings make ({name} is "
                    f"{theirs.get(name, 'not there')}, not {ours.get(name, 'there')}): give the {settings} that it "
                    "was trained with"
                )
        return part.train().requires_grad_(True)


def open_parent(model: str) -> Parent:
    """The pipeline ``model``: an embedded one's name, a folder or a hub id.

    Raises:
        BadInput: it cannot be loaded.
    """
    pipeline, record = load_text2image(model, "cpu"), read_record(model)
    made = record.get("provenance") or {}
    # The recorded hash is that of the weights as stored; they may have been widened here.
    sha256 = (record.get("description") or {}).get("sha256") or pipeline.describe()["sha256"]
    return Parent(model, pipeline, {**made, "sha256": sha256})


def chain(made: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings that led to a pipeline, the first one first, from its record's "provenance"."""
    steps: list[dict[str, Any]] = []
    while "config" in made:
        steps.insert(0, made)
        made = made.get("parent") or {}
    return steps
