from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput
from sfumato.pipeline import wrap
from sfumato.pipeline.adapter import Adapter
from sfumato.pipeline.anatomy import UNetAnatomy
from sfumato.pipeline.membrane import save_lora

PIPES = ["tiny_sd", "tiny_sdxl"]


@pytest.fixture(params=PIPES)
def p(request):
    return request.getfixturevalue(request.param).copy()


def trained(p, name="a", seed=0, **options):
    """An adapter whose up factors are not zero."""
    generator = torch.Generator().manual_seed(seed)
    adapter = p.add_adapter(name, generator=generator, **options)
    with torch.no_grad():
        for up in adapter.up.values():
            up.copy_(torch.randn(up.shape, generator=generator) * 0.3)
    return adapter


def inputs(p, n=2):
    z = torch.randn(n, *p.latent_shape(), generator=torch.Generator().manual_seed(7))
    return z, 0.6, p.encode(["a red star", "a blue circle", "an art photo", "a square"][:n])


@torch.no_grad()
def test_fresh_scaled_to_zero_and_removed_are_the_plain_network_bit_for_bit(p):
    plain = p.denoiser(*inputs(p))
    fresh = p.add_adapter("fresh", rank=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(p.denoiser(*inputs(p)), plain)
    fresh.remove()
    adapter = trained(p)
    assert not torch.allclose(p.denoiser(*inputs(p)), plain)
    for zero in (0.0, 0, torch.zeros(2), torch.tensor(0.0)):
        adapter.scale = zero
        assert torch.equal(p.denoiser(*inputs(p)), plain)
    adapter.scale = 1.0
    adapter.remove()
    adapter.remove()
    assert torch.equal(p.denoiser(*inputs(p)), plain) and not p.adapters
    assert not any(m._forward_hooks for m in p.network.modules())


@torch.no_grad()
def test_one_scale_per_row_and_per_half_of_a_guided_batch(p):
    adapter = trained(p)
    z, t, cond = inputs(p, 4)
    each = []
    for i, s in enumerate((0.5, -1.0, 0.5, -1.0)):
        adapter.scale = s
        each.append(p.denoiser(z[i : i + 1], t, cond[i]))
    adapter.scale = torch.tensor([0.5, -1.0])
    torch.testing.assert_close(p.denoiser(z, t, cond), torch.cat(each), rtol=1e-4, atol=1e-5)
    adapter.scale = torch.ones(3)
    with pytest.raises(ValueError, match="3 adapter scales"):
        p.denoiser(z, t, cond)


@torch.no_grad()
def test_several_adapters_are_a_sum_of_products(p):
    a, b = trained(p, "a", seed=1, rank=2), trained(p, "b", seed=2, alpha=3.0)
    a.scale, b.scale = 0.7, -0.4
    both = p.denoiser(*inputs(p))
    merged = a.merge(0.7)
    assert not merged.adapters
    for name in b.layers:
        merged.network.get_submodule(name).weight += b.delta(name, -0.4).float()
    torch.testing.assert_close(both, merged.denoiser(*inputs(p)), rtol=1e-4, atol=1e-5)
    a.remove()
    b.remove()
    b, a = trained(p, "b", seed=2, alpha=3.0), trained(p, "a", seed=1, rank=2)
    a.scale, b.scale = 0.7, -0.4
    torch.testing.assert_close(p.denoiser(*inputs(p)), both, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merging_makes_a_new_pipeline_and_leaves_this_one(p):
    before = {n: w.clone() for n, w in p.parameters("full").items()}
    adapter = trained(p)
    hooked = p.denoiser(*inputs(p))
    merged = adapter.merge()
    torch.testing.assert_close(merged.denoiser(*inputs(p)), hooked, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(w, before[n]) for n, w in p.parameters("full").items())
    changed = {n for n, w in merged.parameters("full").items() if not torch.equal(w, before[n])}
    assert changed == {f"{n}.weight" for n in adapter.layers}
    assert torch.equal(p.denoiser(*inputs(p)), hooked)


@torch.no_grad()
def test_weights_elsewhere_than_the_factors_are_merged_where_they_are(p):
    """As where they are offloaded: the meta device stands in for the machine's own memory."""
    adapter, other = trained(p), p.copy("all")
    other.network.to("meta")
    adapter.add_to(other, 1.0)
    assert all(x.is_meta for x in other.network.parameters())


@torch.no_grad()
def test_a_copy_leaves_adapters_behind(p):
    plain = p.denoiser(*inputs(p))
    adapter = trained(p)
    assert torch.equal(p.copy().denoiser(*inputs(p)), plain)
    assert not torch.allclose(p.denoiser(*inputs(p)), plain)
    adapter.remove()


def test_only_the_factors_receive_gradients(p):
    adapter = p.add_adapter(
        "a", rank=2, targets=("self.q", "self.v"), generator=torch.Generator().manual_seed(0)
    )
    assert set(adapter.layers) == {q.name for q in p.projections("self.q", "self.v")}
    p.denoiser(*inputs(p)).square().sum().backward()
    assert all(up.grad.abs().sum() > 0 for up in adapter.up.values())
    # With U = 0 the gradient with respect to V is U^T (...) = 0.
    assert all(down.grad.abs().sum() == 0 for down in adapter.down.values())
    assert all(w.grad is None for w in p.parameters("full").values())


def test_down_factors_are_kaiming_uniform(p):
    adapter = p.add_adapter("a", rank=64, generator=torch.Generator().manual_seed(0))
    for name, down in adapter.down.items():
        bound = adapter.layers[name].weight[0].numel() ** -0.5
        assert down.abs().max() <= bound
        assert float(down.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    other = p.add_adapter("b", rank=64, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), other.parameters(), strict=True))


def test_convolutions_keep_their_kernel_stride_and_padding():
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    adapter = Adapter(UNetAnatomy(network), 2, 1.0, ["down_blocks.0.downsamplers.0.conv", "conv_in"])
    with torch.no_grad():
        for up in adapter.up.values():
            up.normal_()
    z = torch.randn(1, 4, 8, 8)
    for name, layer in adapter.layers.items():
        x = torch.randn(1, layer.in_channels, 8, 8)
        hooked = layer(x)
        merged = torch.nn.functional.conv2d(
            x, layer.weight + adapter.delta(name).float(), layer.bias, layer.stride, layer.padding
        )
        torch.testing.assert_close(hooked, merged, rtol=1e-4, atol=1e-5)
    assert network(z, 3, torch.randn(1, 3, 8)).sample.shape == z.shape


def test_the_gate_sets_one_scale_per_picture_while_sampling(p):
    adapter = trained(p)
    prompts, seeds = ["a red star", "a blue circle", "a square"], [1, 2, 3]
    adapter.scale = 0.0
    plain = p.draw(prompts, seeds, sampling_steps=2)
    adapter.scale = 1.0
    full = p.draw(prompts, seeds, sampling_steps=2)
    adapter.gate = lambda cond: torch.tensor([1.0 if "star" in q else 0.0 for q in cond.prompts])
    for batch_size in (1, 2, 3):
        gated = p.draw(prompts, seeds, sampling_steps=2, batch=batch_size)
        torch.testing.assert_close(gated[:1], full[:1], rtol=0, atol=1e-5)
        torch.testing.assert_close(gated[1:], plain[1:], rtol=0, atol=1e-5)
    assert adapter.scale == 1.0
    assert not torch.allclose(full, plain, atol=1e-3)


@pytest.mark.parametrize("style", ["diffusers", "webui"])
@pytest.mark.parametrize("targets", ["transformer", ("cross.k", "cross.v")])
def test_the_lora_file_loads_in_diffusers_and_here(request, tmp_path, style, targets, tmp_path_factory):
    import conftest

    for make in (conftest.make_tiny_sd, conftest.make_tiny_sdxl):
        pipe = make(tmp_path_factory)
        pipe.set_progress_bar_config(disable=True)
        p = wrap(pipe)
        adapter = trained(p, rank=2, alpha=3.0, targets=targets)
        ours = p.draw("a red star", 4, sampling_steps=3, cfg_scale=2.0)
        file = tmp_path / f"{make.__name__}.safetensors"
        adapter.save_lora(file, style=style, metadata={"prompt": "a red star"})
        with pytest.raises(BadInput, match="exists already"):
            adapter.save_lora(file, style=style)
        adapter.remove()
        again = p.load_adapter("again", file)
        torch.testing.assert_close(p.draw("a red star", 4, sampling_steps=3, cfg_scale=2.0), ours, rtol=0, atol=1e-5)
        again.remove()
        plain = p.draw("a red star", 4, sampling_steps=3, cfg_scale=2.0)
        pipe.load_lora_weights(file)
        theirs = pipe(
            "a red star",
            num_inference_steps=3,
            guidance_scale=2.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(4),
        ).images
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        assert (plain - ours).abs().max() > 1e-2


def test_a_spelling_that_no_other_tool_reads_is_refused(tiny_sd3, tmp_path):
    p, file = tiny_sd3.copy(), tmp_path / "a.safetensors"
    adapter = p.add_adapter("a", rank=2, generator=torch.Generator().manual_seed(0))
    for save in (lambda style: adapter.save_lora(file, style), lambda style: save_lora(file, p, style)):
        with pytest.raises(BadInput, match="no other tool reads kohya's spelling of sd3"):
            save("webui")
        assert not file.exists()
        save("diffusers")
        file.unlink()


def test_state_dict_round_trip_is_strict(p):
    a = trained(p, "a", seed=1)
    b = p.add_adapter("b")
    b.load_state_dict(a.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    state = a.state_dict()
    name, x = state.popitem()
    with pytest.raises(BadInput, match="missing"):
        b.load_state_dict(state)
    with pytest.raises(BadInput, match="unused"):
        b.load_state_dict({**state, name: x, "elsewhere.down": x})
    with pytest.raises(BadInput, match="not"):
        b.load_state_dict({**state, name: x[:1]})


def test_bad_input(p, tmp_path):
    p.add_adapter("a")
    with pytest.raises(BadInput, match="already an adapter 'a'"):
        p.add_adapter("a")
    with pytest.raises(BadInput, match="rank"):
        p.add_adapter("b", rank=0)
    with pytest.raises(BadInput, match=r"cross\.x"):
        p.add_adapter("b", targets="cross.x")
    with pytest.raises(BadInput, match="no adapter file"):
        p.load_adapter("b", tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(BadInput, match=r"bad\.safetensors cannot be read: it is truncated or corrupt"):
        p.load_adapter("b", tmp_path / "bad.safetensors")
    with pytest.raises(BadInput, match=r"not a \.safetensors"):
        p.load_adapter("b", tmp_path / "bad.bin")
    assert list(p.adapters) == ["a"]


def test_a_lora_of_another_network_is_refused(tiny_sd, tiny_sdxl, tmp_path):
    adapter = trained(tiny_sdxl.copy())
    adapter.save_lora(tmp_path / "xl.safetensors")
    p = tiny_sd.copy()
    with pytest.raises(BadInput, match="does not fit this network"):
        p.load_adapter("xl", tmp_path / "xl.safetensors")
    assert not p.adapters


def test_rank_one_on_the_shape_of_sd1_has_423936_parameters():
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        network = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    adapter = Adapter(UNetAnatomy(network), rank=1)
    # 16 transformer blocks of 32 C + 1536 with C = 320 (5 times), 640 (5) and 1280 (6).
    expected = sum(32 * c + 1536 for c in [320] * 5 + [640] * 5 + [1280] * 6)
    assert sum(x.numel() for x in adapter.parameters()) == expected == 423_936
