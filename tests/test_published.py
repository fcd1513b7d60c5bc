"""Published configurations: names and shapes on the meta device, numbers with one block of the published widths.

They are as diffusers says (see `published`), and were not checked against the models' own ``config.json``.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

import anatomy_cases
from published import NETWORKS
from sfumato.pipeline import Conditioning, anatomy

LARGE = 5_000_000_000
NAMES = [pytest.param(k, marks=[pytest.mark.slow] if n[3] > LARGE or k == "sdxl" else []) for k, n in NETWORKS.items()]
FEW = {"num_layers": 1, "num_single_layers": 1, "n_layers": 1, "n_refiner_layers": 1, "dual_attention_layers": (0,)}


def network(name: str) -> nn.Module:
    kind, config, _, _ = NETWORKS[name]
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config).eval().requires_grad_(False)


def seen(name: str, made: nn.Module, side: int):
    kind = getattr(anatomy, NETWORKS[name][2])
    return kind(made, side=side) if name.startswith(("flux", "qwen", "z-")) else kind(made)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_its_name(name):
    found = seen(name, network(name), 128)
    full = found.parameters("full")
    assert sum(x.numel() for x in full.values()) == NETWORKS[name][3]
    inside = found.targets("transformer")
    for p in found.projections():
        assert found.network.get_submodule(p.name) is p.module
        assert p.kind.endswith(".in") or p.name in inside
    text, rest = found.parameters("xattn"), found.parameters("noxattn")
    assert text and rest and not text.keys() & rest.keys()
    assert sum(x.numel() for x in [*text.values(), *rest.values()]) > 0.9 * NETWORKS[name][3]
    keys = [p for p in found.projections() if p.kind in ("cross.k", "text.k")]
    assert {f"{p.name}.weight" for p in keys} < found.parameters("xattn-strict").keys()
    blocks = len(found.sites())
    assert len(keys) <= blocks <= 2 * len(found.blocks()) if "UNet" not in found.name else len(keys) == blocks // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [k for k in NETWORKS if not k.startswith("sd1") and not k.startswith(("sd2", "sdxl"))])
@torch.no_grad()
def test_a_block_of_the_published_widths_is_diffusers_own_call(name):
    """In bfloat16: with one block of each kind the largest has about two billion parameters."""
    few = {k: v for k, v in FEW.items() if k in network(name).config}
    if name != "sd3.5-medium":
        few.pop("dual_attention_layers", None)
    kind, config, _, _ = NETWORKS[name]
    with init_empty_weights(include_buffers=False):  # tables of positions are no buffers everywhere
        made = getattr(diffusers, kind)(**{**config, **few})
    made = made.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for x in made.parameters():
        x.uniform_(-0.02, 0.02, generator=rng)
    for x in made.buffers():
        x.normal_(generator=rng)  # positions too, which to_empty has emptied
    found = seen(name, made, 8)
    width = next(p.shape[1] for p in found.projections(("text.in",)))
    pooled = next((p.shape[1] for p in found.projections() if p.kind == "pooled.in"), None)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    cond = Conditioning(torch.randn(2, 5, width, generator=rng), torch.zeros(2, 5, dtype=torch.long), mask)
    cond = cond.replace(pooled=None if pooled is None else torch.randn(2, pooled, generator=rng))
    z = anatomy_cases.latent(found)
    ours = found.call(z, torch.full((2,), 0.5), cond)
    args, kwargs = found.arguments(z.bfloat16(), torch.full((2,), 0.5), found.inputs(z, cond))
    theirs = found.prediction(made(*args, **kwargs).sample, z)
    assert ours.shape == z.shape and ours.isfinite().all() and torch.equal(ours, theirs.float())
