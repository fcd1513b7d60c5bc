"""How the matrices are spread over methods and families, and what they all look at."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato import catalog
from sfumato.attack.base import Attack
from sfumato.attribute.base import Attribution
from sfumato.customize.base import Customizer
from sfumato.edit.base import Edit
from sfumato.erase.base import Eraser
from sfumato.erase.parts.edit import ClosedForm
from sfumato.pipeline import Text2Image, VideoModel
from sfumato.protect.base import Protection

from .families import FAMILIES, OF_A_KIND

LONG = (Attack, Attribution, Customizer, Edit, Eraser, Protection)
"""Bases of the methods that train, search, or look for directions."""
CAPTIONS = ("a red star", "a blue circle", "a photo of a square")


def pytest_generate_tests(metafunc) -> None:
    """``method``: all of the file's ``VERB`` and its own ``TOYS``; ``family``: every family; both: every pair.

    A file may say in ``SUITS`` which of the verb's methods its promises are for.
    """
    names = metafunc.fixturenames
    if "method" in names:
        suits = getattr(metafunc.module, "SUITS", lambda cls: True)
        found = [(m.name, m.load()) for m in catalog.methods(metafunc.module.VERB) if suits(m.load())]
        found += [(cls.__name__, cls) for cls in getattr(metafunc.module, "TOYS", ())]
        if "family" in names:
            pairs = [_pair(name, cls, family) for name, cls in found for family in FAMILIES]
            metafunc.parametrize(("method", "family"), pairs)
        else:
            metafunc.parametrize("method", [cls for _, cls in found], ids=[name for name, _ in found])
    elif "family" in names:
        metafunc.parametrize("family", FAMILIES)


def _pair(name: str, method: type, family: str) -> Any:
    """A method on a family: among the slow tests where it takes long, and does on others of that anatomy."""
    long = issubclass(method, LONG) and not issubclass(method, ClosedForm) and family in OF_A_KIND
    return pytest.param(method, family, id=f"{name}-{family}", marks=[pytest.mark.slow] if long else [])


@pytest.fixture
def pipe(request) -> Text2Image:
    """A copy of the family's tiny pipeline (of SD's, where the test is not spread over families)."""
    family = request.node.callspec.params.get("family") if hasattr(request.node, "callspec") else None
    made = request.getfixturevalue(family or "tiny_sd").copy()
    made.pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> str:
    """Six pictures with captions, in two folders that are their classes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(6):
        file = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(CAPTIONS[i % 3])
    return str(folder)


def in_half(pipe: Text2Image) -> Text2Image:
    """A copy in bfloat16."""
    made = pipe.copy("all")
    for part in made.parts().values():
        part.to(torch.bfloat16)
    return made


def draw(model: Any, asked: Any = None, seeds: Any = (3, 4)) -> Tensor:
    """Pictures in two steps, or those that the model was distilled to: of ``asked``, or of prompts where it takes some,
    or of nothing in particular."""
    if asked is None and isinstance(model, Text2Image):
        asked = ["a red star", "art"]
    steps = {} if isinstance(model, VideoModel) else {"sampling_steps": model.distilled_steps or 2}
    return model.draw(asked, list(seeds), **steps)


def call(pipe: Text2Image, prompts: list[str], seeds: list[int], sampling_steps: int = 2, **options: Any) -> Tensor:
    """Pictures of the size that `draw` has, through diffusers' own pipeline."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    # PixArt draws at the nearest of its own sizes unless told otherwise.
    binning = {"use_resolution_binning"} & inspect.signature(type(pipe.pipe).__call__).parameters.keys()
    options = {"num_inference_steps": sampling_steps, "height": pipe.size, "width": pipe.size, **options}
    options |= {"output_type": "pt", **dict.fromkeys(binning, False)}
    return pipe(list(prompts), generator=generators, **options).images


def state(model: Any) -> dict[str, Any]:
    """All that a method could leave behind in a model: weights, flags, hooks, processors, adapters, settings."""
    seen: dict[str, Any] = {"adapters": sorted(getattr(model, "adapters", {})), "defaults": dict(model.defaults)}
    scheduler = getattr(getattr(model, "pipe", None), "scheduler", None)
    seen["scheduler"] = None if scheduler is None else (type(scheduler), dict(scheduler.config))
    for part, module in model.parts().items():
        for name, layer in module.named_modules():
            hooks = [key for key, value in vars(layer).items() if key.endswith("_hooks") and value]
            seen[part, name] = (hooks, type(getattr(layer, "processor", None)), layer.training)
        seen |= {(part, name, "flags"): (x.requires_grad, x.grad is None) for name, x in module.named_parameters()}
    return seen | {("weights", *key): bits for key, bits in bits_of(model).items()}


def bits_of(model: Any) -> dict[tuple[str, str], str]:
    """A hash of every weight of a model, and of every factor of its adapters."""
    tensors = {(part, name): x for part, m in model.parts().items() for name, x in m.state_dict().items()}
    for key, adapter in getattr(model, "adapters", {}).items():
        tensors |= {(f"adapter {key}", name): x for name, x in adapter.state_dict().items()}
    return {key: hashlib.sha256(_bytes(x)).hexdigest() for key, x in tensors.items()}


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The model is after the block what it was before, in weights, flags and hooks."""
    if isinstance(model, Text2Image):
        model.encode("star")  # transformers puts hooks of its own on its models when they are first called
    before = state(model)
    yield
    after = state(model)
    assert [key for key in before if before[key] != after.get(key)] == [] and before.keys() == after.keys()


def frozen(model: Any) -> bool:
    """Whether no parameter of the model, or of its adapters, asks for a gradient or holds one."""
    parameters = [x for m in model.parts().values() for x in m.parameters()]
    parameters += [x for adapter in getattr(model, "adapters", {}).values() for x in adapter.parameters()]
    return not any(x.requires_grad or x.grad is not None for x in parameters)


def with_number(model: Text2Image, part: str, number: float) -> tuple[Text2Image, str]:
    """A copy with one weight of ``part`` set to ``number``, and that tensor's name."""
    module: nn.Module = model.parts()[part]
    name = max(name for name, x in module.named_parameters() if x.ndim > 1)
    made = model.copy({f"{part}.{name}"})
    with torch.no_grad():
        made.parts()[part].get_parameter(name).view(-1)[0] = number
    made.parts()[part].requires_grad_(False)
    return made, name


def files_of(folder: Path) -> set[str]:
    """The files below a folder."""
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
