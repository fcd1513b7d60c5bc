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


CARDS = {
    "sd1.5": 0.86, "sdxl": 2.6, "pixart-sigma": 0.6, "sana-1.6b": 1.6, "sd3.5-medium": 2.5, "sd3.5-large": 8.0,
    "flux.1-dev": 12.0, "qwen-image": 20.0, "z-image": 6.0,
}  # fmt: skip
"""Billions of parameters as the models' cards round them."""
JOINT = "transformer_blocks.0.attn."
FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int, int]] = {
    "sd1.5": (("mid_block.attentions.0.transformer_blocks.0.attn2.to_k",), ("add_embedding",), 4, 4),
    "sdxl": (("mid_block.attentions.0.transformer_blocks.9.attn2.to_k", "add_embedding.linear_1"), (), 4, 4),
    "pixart-sigma": (
        ("caption_projection.linear_1", "caption_projection.linear_2", "transformer_blocks.27.attn2.to_k"),
        ("transformer_blocks.28",), 4, 8,
    ),
    "sana-1.6b": (("caption_projection", "caption_norm", "transformer_blocks.19.attn2.to_k"), (), 32, 32),
    "sd3-medium": (
        ("context_embedder", "time_text_embed.text_embedder.linear_1", f"{JOINT}add_k_proj", f"{JOINT}to_add_out"),
        ("transformer_blocks.23.attn.to_add_out", "transformer_blocks.0.attn2"), 16, 16,
    ),
    "sd3.5-medium": (
        (f"{JOINT}add_q_proj", "transformer_blocks.12.attn2.to_k"),
        ("transformer_blocks.0.attn2.add_k_proj", "transformer_blocks.13.attn2"), 16, 16,
    ),
    "sd3.5-large": (("transformer_blocks.37.attn.add_k_proj",), ("transformer_blocks.0.attn2",), 16, 16),
    "flux.1-dev": (
        ("context_embedder", "time_text_embed.guidance_embedder", f"{JOINT}add_v_proj", f"{JOINT}to_add_out",
         "single_transformer_blocks.37.attn.to_q", "single_transformer_blocks.0.proj_mlp"),
        ("single_transformer_blocks.0.attn.add_k_proj",), 64, 64,
    ),
    "flux.1-schnell": ((f"{JOINT}add_k_proj",), ("time_text_embed.guidance_embedder",), 64, 64),
    "qwen-image": (
        ("txt_norm", "txt_in", f"{JOINT}add_k_proj", "transformer_blocks.0.img_mod", "transformer_blocks.0.txt_mlp"),
        (), 64, 16,  # those of a patch of four
    ),
    "z-image": (("cap_embedder.1", "context_refiner", "layers.0.attention.to_q"), (f"{JOINT}add_k_proj",), 16, 16),
    "flux.2-dev": (
        ("context_embedder", "time_guidance_embed", f"{JOINT}add_k_proj",
         "single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"),
        ("time_text_embed", "single_transformer_blocks.0.attn.to_q"), 128, 128,
    ),
}  # fmt: skip
"""Modules that a published network has, such that it has not, and the channels that it takes and gives."""


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


@pytest.mark.parametrize("name", [p for p in NAMES if p.values[0] in FACTS])
def test_a_published_network_is_what_is_known_of_it(name):
    """Where text enters, what attention is called, which layers a variant lacks, and the size that its card gives."""
    made = network(name)
    has, lacks, given, taken = FACTS[name]
    modules = dict(made.named_modules())
    assert [m for m in has if m not in modules] == [] and [m for m in lacks if m in modules] == []
    config = made.config
    assert config.in_channels == given
    if config.get("out_channels"):  # PixArt's second half is a learned variance
        assert config.out_channels == taken
    if name in CARDS:  # which count what a file holds: the table of positions of SD3 too
        held = sum(x.numel() for x in made.state_dict().values())
        assert abs(held / 1e9 / CARDS[name] - 1) < 0.03
    if name.startswith("flux.1"):
        from diffusers.models.attention_processor import Attention

        assert not isinstance(modules[f"{JOINT}to_q".rsplit(".", 1)[0]], Attention)


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
