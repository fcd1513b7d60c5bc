"""LoRA files in the names of networks' original code: what they add is what diffusers makes of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import BadInput
from sfumato.pipeline import lora, wrap
from sfumato.pipeline.lora_original import FLUX, factors, layers_of

HIDDEN, MLP = 16, 64
ROWS = {
    "double_blocks.0.img_attn.qkv": (3 * HIDDEN, HIDDEN), "double_blocks.0.img_attn.proj": (HIDDEN, HIDDEN),
    "double_blocks.0.txt_attn.qkv": (3 * HIDDEN, HIDDEN), "double_blocks.0.txt_attn.proj": (HIDDEN, HIDDEN),
    "double_blocks.0.img_mlp.0": (MLP, HIDDEN), "double_blocks.0.img_mlp.2": (HIDDEN, MLP),
    "double_blocks.0.txt_mlp.0": (MLP, HIDDEN), "double_blocks.0.txt_mlp.2": (HIDDEN, MLP),
    "double_blocks.0.img_mod.lin": (6 * HIDDEN, HIDDEN), "double_blocks.0.txt_mod.lin": (6 * HIDDEN, HIDDEN),
    "single_blocks.1.linear1": (3 * HIDDEN + MLP, HIDDEN), "single_blocks.1.linear2": (HIDDEN, HIDDEN + MLP),
    "single_blocks.1.modulation.lin": (3 * HIDDEN, HIDDEN),
}  # fmt: skip


def written(style: str = "kohya") -> dict[str, torch.Tensor]:
    """Factors of rank 2 on all these layers, as kohya's scripts or ComfyUI spell them."""
    rng, made = torch.Generator().manual_seed(0), {}
    for name, (out, width) in ROWS.items():
        down, up = torch.randn(2, width, generator=rng), torch.randn(out, 2, generator=rng)
        if style == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            made |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        else:
            key = f"diffusion_model.{name}"
            made |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return made


def added(path, p) -> dict[str, torch.Tensor]:
    products = lora.products(path, "transformer", {"transformer": p.network})
    return {name: x.alpha / x.rank * x.up @ x.down for name, x in products.items()}


def test_kohyas_file_adds_what_diffusers_makes_of_it(tiny_flux, tmp_path):
    """All but the single blocks' fused layer, whose published widths diffusers takes for granted."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    tensors = {key: x for key, x in written().items() if "linear1" not in key}
    save_file(tensors, tmp_path / "l.safetensors")
    ours = added(tmp_path / "l.safetensors", tiny_flux)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    names = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in theirs}
    assert ours.keys() == names and len(names) == 2 * 3 + 8 + 2
    for name in names:
        a, b = (theirs[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(ours[name], b @ a)


def test_the_single_blocks_fused_layer_at_the_published_widths_is_diffusers():
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    key, sizes = "lora_unet_single_blocks_3_linear1", (3072, 3072, 3072, 12288)
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 3072, generator=rng), torch.randn(sum(sizes), 2, generator=rng)
    layers = {n: SimpleNamespace(weight=range(size)) for n, size in zip(FLUX.layers(key[10:]), sizes, strict=True)}
    network = type("FluxTransformer2DModel", (), {"get_submodule": lambda self, name: None})()
    theirs = _convert_kohya_flux_lora_to_diffusers({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    ours = factors(Path("l"), key, key[10:], "up", up, layers, network)
    assert {f"transformer.{name}.lora_B.weight" for name in ours} < theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[f"transformer.{name}.lora_B.weight"])
        assert torch.equal(down, theirs[f"transformer.{name}.lora_A.weight"])


def test_the_dotted_spelling_adds_the_same_at_alpha_rank(tiny_flux, tmp_path):
    for style in ("kohya", "comfy"):
        save_file(written(style), tmp_path / f"{style}.safetensors")
    one, other = (added(tmp_path / f"{style}.safetensors", tiny_flux) for style in ("kohya", "comfy"))
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(2 * x, other[name])  # alpha was half the rank


def test_a_fused_layer_acts_as_its_parts(tiny_flux, tmp_path):
    """qkv's product, cut into three, on the very layers that the pipeline runs."""
    save_file(written(), tmp_path / "l.safetensors")
    p = tiny_flux.copy()
    adapter = p.load_adapter("l", tmp_path / "l.safetensors")
    tensors, key = written(), "lora_unet_double_blocks_0_txt_attn_qkv"
    whole = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"] / 2
    parts = [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]
    merged = p.merged()
    change = [merged.network.get_submodule(n).weight - tiny_flux.network.get_submodule(n).weight for n in parts]
    torch.testing.assert_close(torch.cat(change), whole, rtol=0, atol=1e-5)
    assert not torch.equal(p.draw("a red star", 1, sampling_steps=1), tiny_flux.draw("a red star", 1, sampling_steps=1))
    adapter.remove()


def test_the_output_layers_halves_change_places(tiny_flux, tmp_path):
    up, down = torch.arange(2 * HIDDEN).float()[:, None], torch.ones(1, HIDDEN)
    key = "lora_unet_final_layer_adaLN_modulation_1"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "l.safetensors")
    found = added(tmp_path / "l.safetensors", tiny_flux)["norm_out.linear"][:, 0]
    assert found.tolist() == [*range(HIDDEN, 2 * HIDDEN), *range(HIDDEN)]


def test_every_name_of_a_block_is_a_layer(tiny_flux):
    layers = dict(tiny_flux.network.named_modules())
    for name in ROWS:
        found = layers_of(name, tiny_flux.network)
        assert found and all(x in layers for x in found), name
    assert layers_of("double_blocks_0_img_attn_norm", tiny_flux.network) == () == FLUX.layers("blocks_0_attn")


def test_kohya_calls_t5_the_third_text_encoder(tiny_flux, tmp_path):
    layer = "encoder.block.0.layer.0.SelfAttention.k"
    weight = tiny_flux.pipe.text_encoder_2.get_submodule(layer).weight
    rng, key = torch.Generator().manual_seed(0), f"lora_te3_{layer.replace('.', '_')}"
    down, up = torch.randn(2, weight.shape[1], generator=rng), torch.randn(len(weight), 2, generator=rng)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "l.safetensors")
    p = tiny_flux.copy()
    adapter = p.load_adapter("l", tmp_path / "l.safetensors")
    change = p.merged().pipe.text_encoder_2.get_submodule(layer).weight - weight
    torch.testing.assert_close(change, up @ down / 2, rtol=1e-4, atol=1e-5)
    for style in ("webui", "diffusers"):
        adapter.save_lora(tmp_path / f"{style}.safetensors", style=style)
        again = tiny_flux.copy().load_adapter("l", tmp_path / f"{style}.safetensors")
        torch.testing.assert_close(again.delta(f"text_encoder_2.{layer}"), adapter.delta(f"text_encoder_2.{layer}"))
    assert load_file(tmp_path / "webui.safetensors").keys() == tensors.keys()
    assert f"text_encoder_2.{layer}.lora_A.weight" in load_file(tmp_path / "diffusers.safetensors")


def sd3_checkpoint(rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights of a tiny SD3.5 in the names of the original code."""
    width = HIDDEN
    both = lambda name, out, by=width: {
        **linear(name, out, rng, by), f"{name}.bias": torch.randn(out, generator=rng)
    }  # fmt: skip
    made = {"pos_embed": torch.zeros(1, 64, width), **both("context_embedder", width, 48)}
    made |= {f"x_embedder.proj.{kind}": torch.randn(width, *shape, generator=rng)
             for kind, shape in (("weight", (16, 2, 2)), ("bias", ()))}  # fmt: skip
    made |= both("t_embedder.mlp.0", width, 256) | both("t_embedder.mlp.2", width)
    made |= both("y_embedder.mlp.0", width, 40) | both("y_embedder.mlp.2", width)
    for i in range(3):
        for side in ("x_block", "context_block"):
            block, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == 2
            made |= both(f"{block}.attn.qkv", 3 * width)
            made |= {f"{block}.attn.ln_{x}.weight": torch.ones(8) for x in "qk"}
            chunks = 2 if last else 9 if side == "x_block" and i == 0 else 6
            made |= both(f"{block}.adaLN_modulation.1", chunks * width)
            if side == "x_block" and i == 0:
                made |= both(f"{block}.attn2.qkv", 3 * width) | both(f"{block}.attn2.proj", width)
                made |= {f"{block}.attn2.ln_{x}.weight": torch.ones(8) for x in "qk"}
            if not last:
                made |= both(f"{block}.attn.proj", width) | both(f"{block}.mlp.fc1", 4 * width)
                made |= both(f"{block}.mlp.fc2", width, 4 * width)
    return made | both("final_layer.linear", 64) | both("final_layer.adaLN_modulation.1", 2 * width)


def linear(name: str, out: int, rng: torch.Generator, by: int = HIDDEN) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(out, by, generator=rng)}


def flux2_checkpoint(rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Those of `tiny_flux2`'s weights that a file of factors can change, in the names of Flux.2's original code."""
    made = {}
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        made |= linear(f"{block}_attn.qkv", 3 * HIDDEN, rng) | linear(f"{block}_attn.proj", HIDDEN, rng)
        made |= linear(f"{block}_mlp.0", 6 * HIDDEN, rng) | linear(f"{block}_mlp.2", HIDDEN, rng, 3 * HIDDEN)
        made |= linear(f"double_stream_modulation_{side}.lin", 6 * HIDDEN, rng)
    for i in range(2):
        made |= linear(f"single_blocks.{i}.linear1", 9 * HIDDEN, rng)
        made |= linear(f"single_blocks.{i}.linear2", HIDDEN, rng, 4 * HIDDEN)
    made |= linear("single_stream_modulation.lin", 3 * HIDDEN, rng)
    made |= linear("img_in", HIDDEN, rng) | linear("txt_in", HIDDEN, rng, 48)
    made |= linear("time_in.in_layer", HIDDEN, rng) | linear("time_in.out_layer", HIDDEN, rng)
    return made | linear("final_layer.linear", 16, rng) | linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, rng)


def zimage_checkpoint(rng: torch.Generator) -> dict[str, torch.Tensor]:
    """The same of `tiny_zimage`, in the names of Z-Image's."""
    made = {}
    for block in ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"):
        made |= linear(f"{block}.attention.qkv", 3 * HIDDEN, rng) | linear(f"{block}.attention.out", HIDDEN, rng)
        made |= linear(f"{block}.feed_forward.w1", 42, rng) | linear(f"{block}.feed_forward.w2", HIDDEN, rng, 42)
        if not block.startswith("context"):
            made |= linear(f"{block}.adaLN_modulation.0", 4 * HIDDEN, rng)
    made |= linear("x_embedder", HIDDEN, rng) | linear("cap_embedder.1", HIDDEN, rng)
    return made | linear("final_layer.linear", 16, rng) | linear("final_layer.adaLN_modulation.1", HIDDEN, rng)


def sd35(tmp_path_factory):
    from conftest import make_tiny_sd3

    return wrap(make_tiny_sd3(tmp_path_factory, dual=(0,)))


@pytest.mark.parametrize("style", ["kohya", "comfy"])
@pytest.mark.parametrize(("family", "checkpoint", "converter"), [
    ("sd35", sd3_checkpoint, "sd3"), ("tiny_flux2", flux2_checkpoint, "flux2"),
    ("tiny_zimage", zimage_checkpoint, "z_image"),
])  # fmt: skip
def test_a_file_adds_what_diffusers_makes_of_the_changed_weights(
    request, tmp_path_factory, tmp_path, style, family, checkpoint, converter
):
    """Every layer of the original with its product added to the weight, brought to diffusers by its own converter."""
    from diffusers.loaders import single_file_utils

    rng = torch.Generator().manual_seed(0)
    plain = checkpoint(rng)
    changed, tensors = dict(plain), {}
    for key in (key for key, x in plain.items() if x.ndim > 1 and key.endswith(".weight")):
        name, x = key.removesuffix(".weight"), plain[key]
        down, up = torch.randn(2, *x.shape[1:], generator=rng), torch.randn(len(x), 2, generator=rng)
        changed[key] = x + torch.tensordot(up, down, 1)
        spelled = f"lora_unet_{name.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{name}"
        a, b = ("lora_down", "lora_up") if style == "kohya" else ("lora_A", "lora_B")
        tensors |= {f"{spelled}.{a}.weight": down, f"{spelled}.{b}.weight": up.view(*up.shape, *[1] * (x.ndim - 2))}
    save_file(tensors, tmp_path / "l.safetensors")
    p = (sd35(tmp_path_factory) if family == "sd35" else request.getfixturevalue(family)).copy()
    made = lora.products(tmp_path / "l.safetensors", "transformer", {"transformer": p.network})
    convert = getattr(single_file_utils, f"convert_{converter}_transformer_checkpoint_to_diffusers")
    before, after = convert(dict(plain)), convert(changed)
    moved = {key.removesuffix(".weight") for key in after if not torch.equal(before[key], after[key])}
    assert made.keys() == moved and len(moved) > 20
    for name, x in made.items():
        change = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(torch.tensordot(x.up, x.down, 1) * x.alpha / x.rank, change, rtol=1e-4, atol=1e-4)
    p.load_adapter("l", tmp_path / "l.safetensors").remove()


def test_bad_input(tiny_flux, tiny_sd3, tmp_path):
    file = tmp_path / "l.safetensors"
    tensors, key = written(), "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({**tensors, f"{key}.lora_up.weight": torch.ones(7, 2)}, file)
    with pytest.raises(BadInput, match=r"has 7 rows, and .*to_q and .*to_k and .*to_v have 48"):
        added(file, tiny_flux)
    save_file({k: x for k, x in tensors.items() if k != f"{key}.lora_up.weight"}, file)
    with pytest.raises(BadInput, match=r"lacks the up factor of transformer_blocks.0.attn.to_q"):
        added(file, tiny_flux)
    save_file({f"{key.replace('_0_', '_9_')}.lora_down.weight": torch.ones(2, HIDDEN)}, file)
    with pytest.raises(BadInput, match="no layer for lora_unet_double_blocks_9_img_attn_qkv"):
        added(file, tiny_flux)
    save_file(tensors, file)
    with pytest.raises(BadInput, match="seems to be made for Flux"):
        added(file, tiny_sd3)
    save_file({"diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.ones(2, HIDDEN)}, file)
    with pytest.raises(BadInput, match="seems to be made for Z-Image"):
        added(file, tiny_sd3)
    key = "lora_unet_joint_blocks_0_x_block_attn2_qkv"  # 3.5 medium's alone
    save_file({f"{key}.lora_down.weight": torch.ones(2, HIDDEN), f"{key}.lora_up.weight": torch.ones(48, 2)}, file)
    with pytest.raises(BadInput, match=f"no layer for {key}.*seems to be made for SD3"):
        added(file, tiny_sd3)
