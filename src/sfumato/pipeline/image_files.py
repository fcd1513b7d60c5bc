"""Reading the folder of an `ImageModel`, or of another of the project's own models, back."""

from __future__ import annotations

import importlib
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ModelMixin

from sfumato.errors import BadInput
from sfumato.foreign import reading, shortened
from sfumato.noise.config import from_config

from .image import NETS, ImageModel
from .saving import quiet


def load_image_model(cls: type[ImageModel], folder: Path, index: dict[str, Any], device: torch.device) -> ImageModel:
    """The model of type ``cls`` that `ImageModel.save` wrote.

    Raises:
        BadInput: an unknown network, or files that do not fit.
    """
    kinds = {"network": _own_network(folder, index["network"])}
    for name, known in cls.further.items():
        if name not in index:  # whether it can do without is for the model to say
            continue
        classes = {kind.__name__: kind for kind in known}
        told = (index.get(name) or [None])[-1]
        if told not in classes:
            raise BadInput(f"{folder} has as its {name} no {' or '.join(classes)}: fetch or write it again")
        kinds[name] = classes[told]
    parts = {name: _read_part(folder, name, kind).to(device) for name, kind in kinds.items()}
    with reading(folder, f"a {kinds['network'].__name__}"):
        process = from_config(index["process"])
        said = (index["prediction"], tuple(index["shape"]), tuple(index["labels"]), dict(index["defaults"]))
        return cls(parts.pop("network"), process, *said, **parts)


def _own_network(folder: Path, named: list[Any]) -> type[ModelMixin]:
    """The class of `sfumato.nets` that an index names."""
    library, name = named if len(named) == 2 and all(isinstance(word, str) for word in named) else ("", "")
    kind = getattr(importlib.import_module(NETS), name, None) if library == NETS else None
    if not isinstance(kind, type) or not issubclass(kind, ModelMixin):
        told = shortened(f"{library}.{name}", 100)
        raise BadInput(f"{folder} names a network {told!r}, which {NETS} does not have")
    return kind


def _read_part(folder: Path, part: str, kind: type[ModelMixin]) -> Any:
    """A frozen network of this class, all of whose weights are there."""
    with reading(folder, f"a {kind.__name__}"):
        with quiet():
            network = cast(Any, kind).from_pretrained(folder / part, use_safetensors=True, local_files_only=True)
        states = chain(network.named_parameters(), network.named_buffers())
        if missing := [key for key, x in states if x.is_meta]:
            raise BadInput(f"the weight {missing[0]} of the {part} in {folder} is missing: fetch or write it again")
        return network.requires_grad_(False).eval()
