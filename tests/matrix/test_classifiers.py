"""What every classifier promises; a toy keeps to the shape that is promised, without the verb's base.

``run(out, progress) -> folder``: trains on a folder of pictures whose folders are classes, as a recipe does: killed,
the same call goes on to the same bits. ``read(folder) -> network`` gives it back, from pictures [n, 3, h, w] in
[-1, 1] to logits [n, classes].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.data.pictures import open_pictures, to_tensor
from sfumato.errors import BadInput
from sfumato.metrics.trained import is_trained
from sfumato.plan import Plan
from sfumato.train import draw
from sfumato.train.loop import Run
from sfumato.train.recipe import Recipe
from sfumato.train.schedule import Schedule

VERB = "classify"


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """One linear layer on the pixels."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"updates": 4, "batch": 2, "checkpoint_every": 1, "track": "none"}
    data: str
    size: int = 8
    lr: float = 0.1
    warmup: int = 0

    def plan(self) -> Plan:
        return Plan("classify linear", memory={"weights": 4 * 2 * 3 * self.size**2})

    def run(self, out: Path, progress: bool = True) -> Path:
        if out.is_file():
            raise BadInput(f"{out} is a file where a folder is to be written: choose another name")
        pictures = open_pictures(self.data, self.size)
        torch.manual_seed(self.seed)
        net = nn.Linear(3 * self.size**2, len(pictures.label_names))

        class Fitting(Recipe):
            name = "linear"

            def modules(self):
                return {"net": net}

            def batch(self, step, rng, size):
                rows = draw.integers(len(pictures), size, rng).tolist()
                return to_tensor([pictures.picture(i) for i in rows]), torch.tensor([pictures.label(i) for i in rows])

            def loss(self, batch, rng):
                return nn.functional.cross_entropy(net(batch[0].flatten(1)), batch[1]), {}

        Run(Fitting(), self, out / "training", self.beyond()).fit(progress)
        save_file({k: x.contiguous() for k, x in net.state_dict().items()}, out / "net.safetensors")
        return out

    @staticmethod
    def read(folder: Path) -> nn.Module:
        state = load_file(folder / "net.safetensors")
        net = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
        net.load_state_dict(state)
        return nn.Sequential(nn.Flatten(), net).eval().requires_grad_(False)


TOYS = (Linear,)


def logits(method, folder: Path) -> torch.Tensor:
    side = method.EXAMPLE.get("size", 8)
    return method.read(folder)(torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_it_reads_pictures_and_resumes_to_the_same_bits(method, pictures, tmp_path, monkeypatch):
    recipe, original, made = method(data=pictures, **method.EXAMPLE), Run.one_step, []
    folder = recipe.run(tmp_path / "whole", progress=False)
    whole = logits(method, folder)
    if is_trained(folder):  # the Inception score reads its classes from its features
        net, x = method.read(folder), torch.rand(3, 3, method.EXAMPLE["size"], method.EXAMPLE["size"])
        torch.testing.assert_close(net.from_features(net.features(x)), net(x))
    assert whole.shape == (3, 2) and whole.isfinite().all() and not whole.requires_grad

    def one_step(run):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(run.step)
        return original(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "one_step", one_step)
        recipe.run(tmp_path / "cut", progress=False)
    assert torch.equal(logits(method, recipe.run(tmp_path / "cut", progress=False)), whole)
    other = method(data=pictures, **method.EXAMPLE, seed=1).run(tmp_path / "other", progress=False)
    assert not torch.equal(logits(method, other), whole)


def test_plan_and_refusals(method, pictures, tmp_path):
    assert isinstance(method(data=pictures, **method.EXAMPLE).plan(), Plan)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        method(data=pictures, **method.EXAMPLE).run(tmp_path / "file", progress=False)
    with pytest.raises(BadInput, match="nowhere"):
        method(data=str(tmp_path / "nowhere"), **method.EXAMPLE).run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
