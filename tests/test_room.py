"""Less memory for training erasers: activations computed again, Adam in eight bits; and what plans say of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from conftest import make_tiny_sd
from sfumato.erase import KPOP, SFD, UCE, ESDu, ESDx
from sfumato.errors import BadInput
from sfumato.pipeline import wrap
from sfumato.plan import weights_of
from sfumato.train import optimizers

ESD = ESDx(concepts="star", **ESDx.EXAMPLE)


def test_activations_computed_again_change_no_bit(tiny_sd, monkeypatch):
    calls: list[bool] = []
    block = type(tiny_sd.network.mid_block)
    forward = block.forward
    counted = lambda self, *a, **k: calls.append(torch.is_grad_enabled()) or forward(self, *a, **k)
    again: list[int] = []
    plain = ESD.apply(tiny_sd)
    real = torch.utils.checkpoint.checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: again.append(1) or real(*a, **k))
        patched.setattr(block, "forward", counted)
        made = replace(ESD, checkpointing=True).apply(tiny_sd)
    assert again and any(calls), "blocks go through torch's checkpoint"
    assert made.describe()["sha256"] == plain.describe()["sha256"] != tiny_sd.describe()["sha256"]
    assert not made.network.is_gradient_checkpointing and not tiny_sd.network.is_gradient_checkpointing


def test_a_run_goes_on_with_and_without(tiny_sd, tmp_path):
    whole = replace(ESD, checkpointing=True).run(tiny_sd, tmp_path)[1]
    assert ESD.run(tiny_sd, tmp_path)[1]["losses"] == whole["losses"]


def test_where_it_cannot_be_it_is_refused(tiny_sd, tmp_path_factory):
    with pytest.raises(BadInput, match="losses of KPOP cannot be recomputed: leave checkpointing off"):
        KPOP(concepts="star", checkpointing=True).check(tiny_sd)
    other = wrap(make_tiny_sd(tmp_path_factory))
    other.network._supports_gradient_checkpointing = False
    with pytest.raises(BadInput, match="a UNet2DConditionModel cannot recompute activations"):
        replace(ESD, checkpointing=True).check(other)
    assert SFD.recomputes and not hasattr(UCE(concepts="star"), "checkpointing")


@pytest.fixture
def bitsandbytes(monkeypatch):
    """A stand-in: torch's optimisers under bitsandbytes' names, which count steps as it does."""
    made = []

    def named(kind):
        class Small(kind):
            def __init__(self, weights, **settings):
                super().__init__(weights, **settings)
                made.append((kind.__name__, settings))

        return Small

    optim = ModuleType("bitsandbytes.optim")
    optim.Adam8bit, optim.AdamW8bit = named(torch.optim.Adam), named(torch.optim.AdamW)
    package = ModuleType("bitsandbytes")
    package.optim = optim
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: object())
    return made


def test_the_optimiser_is_the_counterpart_of_the_methods_own(bitsandbytes, tiny_sd, tmp_path):
    small = replace(ESD, optimizer="adam8bit")
    found, _ = small.run(tiny_sd)
    assert bitsandbytes == [("Adam", {"lr": ESD.lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})]
    assert found.describe()["sha256"] == ESD.apply(tiny_sd).describe()["sha256"]
    adamw = optimizers.in_eight_bits(partial(torch.optim.AdamW, betas=(0.5, 0.9), fused=True))
    assert adamw.func.__name__ == "Small" and adamw.keywords == {"betas": (0.5, 0.9)}
    assert optimizers.in_eight_bits(torch.optim.SGD) is torch.optim.SGD
    full, less = ESD.costs(tiny_sd).memory, small.costs(tiny_sd).memory
    assert full["optimiser"] == 4 * less["optimiser"] and full["gradients"] == less["gradients"]
    ESD.run(tiny_sd, tmp_path)
    with pytest.raises(BadInput, match="holds a run with optimizer=None, and this one has optimizer='adam8bit'"):
        small.run(tiny_sd, tmp_path)


def test_counted_steps_come_back_as_numbers():
    from sfumato.train.state import Updated

    weight = torch.nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([weight], lr=1.0)
    given = {}
    sgd.load_state_dict = lambda state: given.update(state["state"])
    Updated("", {"w": weight}, sgd).restore({"w/step": torch.tensor(3), "w/exp": torch.tensor(2.0)})
    assert given[0]["step"] == 3 and isinstance(given[0]["step"], int) and torch.is_tensor(given[0]["exp"])


def test_without_bitsandbytes_it_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"not installed: pip install 'sfumato\[8bit\]'"):
        ESDu(concepts="star", optimizer="adam8bit")


def test_plans_say_the_weights_of_every_part_in_their_precision(tiny_sd, tmp_path_factory):
    parts = weights_of(tiny_sd.parts())
    assert parts.keys() == {"weights of unet", "weights of vae", "weights of text_encoder"}
    assert parts.items() <= ESD.costs(tiny_sd).memory.items() and parts == UCE(concepts="star").costs(tiny_sd).memory
    half = wrap(make_tiny_sd(tmp_path_factory).to(torch.bfloat16))
    assert {2 * size for size in weights_of(half.parts()).values()} == set(parts.values())
