"""LoRA files as trainers write them: convolutions, text encoders, a rank and an alpha for each layer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tiny_sd, make_tiny_sdxl
from sfumato.errors import BadInput
from sfumato.pipeline import load_text2image, lora, wrap
from sfumato.pipeline.equip import equip


def kohya(p, names):
    """Products of rank 1, 2, 3 ... and other alphas on these layers, in kohya's spelling; and what each adds."""
    rng = torch.Generator().manual_seed(1)
    tensors, added = {}, {}
    for i, (name, key) in enumerate(names.items(), 1):
        part, layer = lora.split(name, "unet")
        weight = p.parts()[part].get_submodule(layer).weight
        down = torch.randn(i, *weight.shape[1:], generator=rng) * 0.3
        up = torch.randn(len(weight), i, generator=rng) * 0.3
        alpha = 0.5 + i
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up.view(*up.shape, *[1] * (weight.ndim - 2)).clone()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        added[name] = alpha / i * (up @ down.flatten(1)).view(weight.shape)
    return tensors, added


def text_layer(p, part):
    return next(n for n, m in p.parts()[part].named_modules() if n.endswith("layers.1.mlp.fc1"))


def names_of(p, xl):
    deep = "middle_block_1_transformer_blocks_0_ff_net"
    unet = {
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "middle_block_1_transformer_blocks_0_attn2_to_k",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": f"{deep}_0_proj",
    }
    spelled = {name: f"lora_unet_{old if xl else name.replace('.', '_')}" for name, old in unet.items()}
    for i, (_, part) in enumerate(p.text_parts(), 1):
        layer = text_layer(p, part)
        te = f"lora_te{i if xl else ''}_text_model_{layer.removeprefix('text_model.').replace('.', '_')}"
        spelled[f"{part}.{layer}"] = te
    return spelled


@pytest.mark.parametrize("xl", [False, True])
def test_ranks_alphas_convolutions_and_text_encoders(xl, tmp_path, tmp_path_factory):
    pipe = (make_tiny_sdxl if xl else make_tiny_sd)(tmp_path_factory)
    p, file = wrap(pipe), tmp_path / "l.safetensors"
    tensors, added = kohya(p, names_of(p, xl))
    save_file(tensors, file, metadata={"ss_network_alpha": "1.0"})
    by_hand = p.copy([f"{name}.weight" for name in added])
    with torch.no_grad():
        for name, x in added.items():
            part, layer = lora.split(name, "unet")
            by_hand.parts()[part].get_submodule(layer).weight += x
    draw = lambda q: q.draw("a red star", 4, sampling_steps=2, cfg_scale=2.0)
    wanted, plain = draw(by_hand), draw(p)
    adapter = p.load_adapter("l", file)
    assert adapter.layers.keys() == added.keys() and adapter.rank == len(added)
    torch.testing.assert_close(draw(p), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(draw(p.merged()), wanted, rtol=0, atol=1e-4)
    adapter.save_lora(tmp_path / "again.safetensors")
    adapter.scale = 0.0
    assert torch.equal(draw(p), plain)
    adapter.remove()
    again = p.load_adapter("again", tmp_path / "again.safetensors")
    torch.testing.assert_close(draw(p), wanted, rtol=0, atol=1e-4)
    again.remove()
    attached = equip(p, "model", [file])
    assert list(attached.adapters) == ["lora.0"] and not p.adapters
    torch.testing.assert_close(draw(attached), wanted, rtol=0, atol=1e-4)


def test_a_lora_acts_at_the_strength_that_stands_behind_its_name(tiny_sd, tmp_path):
    file = tmp_path / "l.safetensors"
    save_file(kohya(tiny_sd, names_of(tiny_sd, False))[0], file)
    draw = lambda p: p.draw("a red star", 4, sampling_steps=2, cfg_scale=2.0)
    by_hand = equip(tiny_sd, "model", [file])
    (adapter,) = by_hand.adapters.values()
    adapter.scale = 0.5
    expected = draw(by_hand)
    for said in (f"{file}:0.5", (file, 0.5)):
        attached = equip(tiny_sd, "model", [said])
        assert torch.equal(draw(attached), expected) and not torch.allclose(expected, draw(tiny_sd), atol=1e-3)
        assert attached.describe()["adapters"]["lora.0"]["strength"] == 0.5
    attached.save(tmp_path / "merged")
    torch.testing.assert_close(draw(load_text2image(tmp_path / "merged", "cpu")), expected, rtol=0, atol=1e-4)
    (tmp_path / "odd:0.5").mkdir()
    save_file(kohya(tiny_sd, names_of(tiny_sd, False))[0], tmp_path / "odd:0.5" / "adapter_model.safetensors")
    assert "strength" not in equip(tiny_sd, "model", [tmp_path / "odd:0.5"]).describe()["adapters"]["lora.0"]
    for bad in (f"{file}:half", f"{file}:", f"{file}:inf", (file, float("nan"))):
        with pytest.raises(BadInput, match="strength"):
            equip(tiny_sd, "model", [bad])


def test_text_encoders_in_the_spellings_of_diffusers(tiny_sd, tmp_path):
    p, layer = tiny_sd.copy(), text_layer(tiny_sd, "text_encoder")
    tensors, _ = kohya(p, {f"text_encoder.{layer}": "x"})
    down, up = tensors["x.lora_down.weight"], tensors["x.lora_up.weight"]
    full = f"text_model.{layer.removeprefix('text_model.')}"
    for prefix in (f"text_encoder.{full}", f"text_encoder.base_model.model.{layer}", f"base_model.model.{full}"):
        for a, b in ((".lora_A", ".lora_B"), (".lora_linear_layer.down", ".lora_linear_layer.up")):
            save_file({f"{prefix}{a}.weight": down, f"{prefix}{b}.weight": up}, tmp_path / "l.safetensors")
            adapter = p.load_adapter("l", tmp_path / "l.safetensors")
            assert torch.equal(adapter.up[f"text_encoder.{layer}"], up)
            adapter.remove()


def refused(p, tensors, folder, match):
    save_file(tensors, folder / "bad.safetensors")
    with pytest.raises(BadInput, match=match) as caught:
        p.load_adapter("bad", folder / "bad.safetensors")
    assert "\n" not in str(caught.value) and not p.adapters


def test_what_is_no_plain_lora_is_refused_by_name(tiny_sd, tmp_path):
    p = tiny_sd.copy()
    tensors, _ = kohya(p, {"mid_block.attentions.0.proj_in": "lora_unet_mid_block_attentions_0_proj_in"})
    key = "lora_unet_mid_block_attentions_0_proj_in"
    for name, match in (
        ("dora_scale", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lora_mid.weight", "no plain product"),
        ("oft_blocks", "no plain|no layer"), ("diff", "whole weights"),
    ):  # fmt: skip
        refused(p, {**tensors, f"{key}.{name}": torch.ones(2, 2)}, tmp_path, match)
    half = {k: x for k, x in tensors.items() if "lora_up" not in k}
    refused(p, half, tmp_path, "incomplete: it lacks the up factor of mid_block.attentions.0.proj_in")


def test_what_is_no_lora_at_all_is_told(tiny_sd, tmp_path):
    for key, match in (
        ("emb_params", r"learned word .*\(emb_params\)"), ("<cat>", "learned word"),
        ("first_stage_model.decoder.conv_in.weight", "a whole model"), ("conv_in.weight", "weights of a network"),
        ("odd", "holds no LoRA: fetch"),
    ):  # fmt: skip
        refused(tiny_sd.copy(), {key: torch.ones(2, 2)}, tmp_path, match)
    (tmp_path / "l.pt").write_bytes(b"x")
    for given, match in ((tmp_path / "l.pt", "is not a .safetensors file"), (tmp_path, "no adapter file in ")):
        with pytest.raises(BadInput, match=match):
            equip(tiny_sd, "model", [given])


def test_loras_of_other_families_are_refused(tiny_sd, tmp_path):
    p = tiny_sd.copy()
    pair = lambda key, width=8: {
        f"{key}.lora_down.weight": torch.ones(2, width),
        f"{key}.lora_up.weight": torch.ones(16, 2),
    }
    refused(
        p, pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), tmp_path, "of another family, with a text_encoder_2"
    )
    refused(p, pair("lora_unet_double_blocks_0_img_attn_qkv"), tmp_path, "no layer for .*made for Flux")
    refused(p, pair("transformer.transformer_blocks.0.attn.add_k_proj"), tmp_path, "made for SD3 or Flux")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    refused(p, pair(key, 2048), tmp_path, r"\(2, 2048\).*made for SDXL")
    refused(p, pair(key, 1024), tmp_path, r"made for Stable Diffusion 2.x")


def test_a_dynamic_alpha_is_said_beside_each_layer(tiny_sd, tmp_path):
    """As kohya's resizing of LoRAs writes it."""
    key, x = "lora_unet_mid_block_attentions_0_proj_in", tiny_sd.network.mid_block.attentions[0].proj_in.weight
    tensors = {f"{key}.lora_down.weight": torch.ones(2, *x.shape[1:]), f"{key}.lora_up.weight": torch.ones(len(x), 2)}
    file, header = tmp_path / "l.safetensors", {"ss_network_alpha": "Dynamic"}
    save_file({**tensors, f"{key}.alpha": torch.tensor(3.0)}, file, metadata=header)
    assert lora.read(file, tiny_sd.anatomy)[1:] == (2, 3.0)
    save_file(tensors, file, metadata=header)
    with pytest.raises(BadInput, match=r"'Dynamic' as its ss_network_alpha, and .* has no alpha of its own"):
        lora.read(file, tiny_sd.anatomy)
    save_file(tensors, file, metadata={"ss_network_alpha": "much"})
    with pytest.raises(BadInput, match="is no number"):
        lora.read(file, tiny_sd.anatomy)


def test_files_in_half_precision_are_rescaled_in_full(tiny_sd):
    down, up = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).half()
    products = {"a": lora.Product(down, up.T, 1.1), "b": lora.Product(down[:2], up.T[:, :2], 1.1)}
    state, rank, alpha = lora.uniform(products)
    assert rank == alpha == 3
    for name, x in products.items():
        made = state[f"{name}.up"].double() @ state[f"{name}.down"].double()
        wanted = x.alpha / x.rank * (x.up.double() @ x.down.double())
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)


def test_mixed_ranks_of_one_network_keep_the_products(tiny_sd, tmp_path):
    tensors, added = kohya(tiny_sd, {k: v for k, v in names_of(tiny_sd, False).items() if v.startswith("lora_unet")})
    save_file(tensors, tmp_path / "l.safetensors")
    state, rank, alpha = lora.read(tmp_path / "l.safetensors", tiny_sd.anatomy)
    assert rank == alpha == len(added)
    for name, x in added.items():
        down, up = state[f"{name}.down"], state[f"{name}.up"]
        assert len(down) == rank == up.shape[1]
        torch.testing.assert_close((up @ down.flatten(1)).view(x.shape), x)
    assert load_file(tmp_path / "l.safetensors").keys() == tensors.keys()
