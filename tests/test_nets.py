"""The networks of simple diffusion and SiD2: what they are when new, what they keep, what they cost."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sfumato.errors import BadInput
from sfumato.nets import ResidualUViT, SimpleUNet, SimpleUViT
from sfumato.nets.blocks import Transformer, TransformerBlock, Up, group_norm, groups, rotate, rotations

UVIT = {"size": 32, "channels": (8, 16), "blocks": (2, 1), "depth": 2, "width": 32, "head_dim": 8, "embedding": 16}
UNET = {"size": 32, "channels": (8, 16, 16), "blocks": (1, 2, 1), "head_dim": 8, "embedding": 16}
RESIDUAL = {
    "size": 32, "channels": (8, 16, 32), "kinds": ("res", "transformer", "transformer"), "blocks": (2, 1), "middle": 2,
    "head_dim": 8, "embedding": 16,
}  # fmt: skip
EVERY = {
    "uvit": lambda **k: SimpleUViT(**{**UVIT, **k}),
    "unet": lambda **k: SimpleUNet(**{**UNET, **k}),
    "residual": lambda **k: ResidualUViT(**{**RESIDUAL, **k}),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def inputs(n: int = 2, side: int = 32, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, side, side, generator=rng).to(dtype), torch.randn(n, generator=rng).to(dtype)


def stir(net: nn.Module) -> nn.Module:
    """Random weights everywhere, also where a new network has zeros."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng).to(p.dtype))
    return net


@every
@pytest.mark.parametrize("change", [{}, {"classes": 3}])
def test_new_networks_return_zero_and_then_learn(make, change):
    net, (z, logsnr) = make(**change), inputs()
    labels = torch.tensor([0, 3]) if change else None
    out = net(z, logsnr, labels)
    assert out.shape == z.shape and not out.any()
    out = stir(net)(z, logsnr, labels)
    out.square().sum().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@every
def test_a_picture_is_alone_in_its_batch(make):
    net, (z, logsnr) = stir(make().double()), inputs(dtype=torch.float64)
    assert_close(net(z, logsnr)[1:], net(z[1:], logsnr[1:]), rtol=1e-10, atol=1e-10)
    assert (net(z, logsnr) - net(z, logsnr + 1)).abs().max() > 1e-6


@every
def test_saved_and_loaded(make, tmp_path):
    net, (z, logsnr) = stir(make(classes=2)).eval(), inputs()
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    labels = torch.tensor([1, 2])
    assert_close(again(z, logsnr, labels), net(z, logsnr, labels), rtol=1e-4, atol=1e-5)


@every
def test_saving_memory_changes_no_gradient(make):
    z, logsnr = inputs(dtype=torch.float64)
    grads = []
    for save in (False, True):
        torch.manual_seed(4)
        net = stir(make(dropout=0.2).double())
        if save:
            net.enable_gradient_checkpointing()
        torch.manual_seed(5)
        net(z, logsnr).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


def test_depth_zero_is_allowed():
    net, (z, logsnr) = SimpleUViT(**{**UVIT, "depth": 0}), inputs()
    assert not net(z, logsnr).any()
    assert not list(net.transformer.parameters())


@pytest.mark.parametrize("factor, front", [(1, "5/3"), (2, "5/3"), (4, "haar"), (2, "conv")])
def test_smaller_feature_maps(factor, front):
    net = stir(SimpleUViT(**{**UVIT, "size": 64, "channels": (8,), "blocks": (1,), "factor": factor, "front": front}))
    z, logsnr = inputs(side=64)
    assert net(z, logsnr).shape == z.shape


@pytest.mark.parametrize(
    "make, size, where",
    [
        (EVERY["uvit"], 64, {16}),
        (EVERY["uvit"], 32, {16, 8}),
        (EVERY["unet"], 64, {16}),
        (EVERY["residual"], 32, {16, 8}),
    ],
)
def test_dropout_only_on_small_maps(make, size, where):
    """Sides of all feature maps that pass a dropout layer, by hooks; transformers of the Residual U-ViT only."""
    net, seen = stir(make(size=size, dropout=0.3)), set()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda m, x, y: seen.add(x[0].shape[-1] if x[0].ndim == 4 else int(x[0].shape[1] ** 0.5))
            )
    net(*inputs(side=size))
    assert seen == where


def test_the_transformer_of_a_uvit_has_no_long_skips():
    """Nothing from inside the stack is used after it: only what enters and leaves lives on."""
    assert_only_kept(SimpleUViT(**{**UVIT, "depth": 4}), lambda n: n.transformer.blocks[:-1], lambda n: n.larger)


def test_nothing_inside_a_level_is_kept_for_the_way_up():
    net = ResidualUViT(**{**RESIDUAL, "blocks": (3, 3), "middle": 3})
    inner = [b for level in net.way_down for b in level.blocks[:-1]] + list(net.bottom.blocks[:-1])
    assert_only_kept(net, lambda n: inner, lambda n: n.larger[-1])


def assert_only_kept(net, inside, after) -> None:
    alive: list[weakref.ref] = []
    for block in inside(net):
        block.register_forward_hook(lambda m, x, y: alive.append(weakref.ref(y)))

    def look(module, x):
        gc.collect()
        found.append(sum(r() is not None for r in alive))

    found: list[int] = []
    after(net).register_forward_pre_hook(look)
    with torch.no_grad():
        stir(net)(*inputs())
    assert alive and found == [0]


def test_the_skips_of_a_unet_are_kept():
    """The control of the two tests above: in the U-Net every block's output lives until the way up."""
    net, alive, found = SimpleUNet(**UNET), [], []
    for level in net.levels.down:
        for block in level:
            block.register_forward_hook(lambda m, x, y: alive.append(weakref.ref(y)))
    net.levels.up[-1][0].register_forward_pre_hook(lambda m, x: found.append(sum(r() is not None for r in alive)))
    with torch.no_grad():
        net(*inputs())
    assert found == [len(alive)] == [4]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_new_residual_uvit_passes_its_input_on_exactly(positions):
    torch.manual_seed(0)
    net = ResidualUViT(**RESIDUAL, positions=positions)
    x = torch.randn(2, 8, 32, 32)
    emb = net.embed(torch.zeros(2), None)
    assert (net.body(x, emb) - x).abs().max() == 0


@given(st.lists(st.integers(4, 1024), min_size=1, max_size=4))
def test_groups_divide_all_channels_and_leave_no_channel_alone(channels):
    found = groups(*channels)
    assert found <= 32 and all(c % found == 0 and c // found >= 4 for c in channels)


def test_groups_of_published_networks_are_32():
    assert groups(128, 256, 512, 1024) == groups(256, 256, 256) == 32


def test_normalisation_keeps_the_brightness_of_small_networks_too():
    """Only what all channels of a group have in common is lost: a channel alone in its group would lose its mean."""
    x, brighter = torch.randn(2, 32, 8, 8), torch.randn(32, 1, 1)
    norm = group_norm(32)
    assert (norm(x + brighter) - norm(x)).mean((2, 3)).abs().mean() > 0.1
    assert_close(norm(x + 3.0), norm(x))


def test_zero_goes_up_as_zero():
    assert not Up(8, 4)(torch.zeros(1, 8, 2, 2)).any()


def test_a_level_subtracts_what_it_sent_down():
    """With blocks that add a constant in the middle, the way up adds that constant through every `Up`, and no more."""
    net = ResidualUViT(**{**RESIDUAL, "kinds": ("res",) * 3}).double()
    x, c = torch.randn(1, 8, 32, 32, dtype=torch.float64), torch.randn(1, 32, 1, 1, dtype=torch.float64)
    net.bottom.forward = lambda h, emb, save_memory: h + c
    expected = x + net.larger[0](net.larger[1](c.expand(1, 32, 8, 8)))
    assert_close(net.body(x, net.embed(torch.zeros(1), None)), expected)


@pytest.mark.parametrize("conditioned", [True, False])
def test_conditioning_of_every_block_can_be_switched_off(conditioned):
    net = stir(ResidualUViT(**RESIDUAL, classes=2, conditioned=conditioned).double())
    (z, logsnr), labels = inputs(dtype=torch.float64), torch.tensor([0, 1])
    modulated = [b for b in net.modules() if getattr(b, "modulation", None) or getattr(b, "film", None)]
    assert bool(modulated) == conditioned
    for other in (net(z, logsnr + 1, labels), net(z, logsnr, 1 - labels)):
        assert (other - net(z, logsnr, labels)).abs().max() > 1e-6


def test_the_patch_changes_no_other_parameter():
    """Patches of 2 at 64 px and of 1 at 32 px: one body."""
    sizes = [
        {n: p.shape for n, p in ResidualUViT(**{**RESIDUAL, "size": s, "patch": p}).named_parameters()
         if not n.startswith(("entry", "exit"))}
        for s, p in ((64, 2), (32, 1))
    ]  # fmt: skip
    assert sizes[0] == sizes[1]


def test_half_the_patch_is_four_times_the_work():
    """Of all that acts on tokens or pixels one by one; attention between tokens costs sixteen times as much."""
    counts = []
    for patch in (2, 1):
        net, total = ResidualUViT(**{**RESIDUAL, "patch": patch}), [0]

        def count(m, x, y, total=total):
            if y.ndim > 2:  # not the embedding, which is one a picture
                total[0] += y.numel() * m.weight[0].numel()

        for name, m in net.named_modules():
            if isinstance(m, nn.Linear | nn.Conv2d) and not name.startswith(("entry", "exit")):
                m.register_forward_hook(count)
        net(*inputs())
        counts.append(total[0])
    assert counts[1] == 4 * counts[0]


def saved_bytes(net: nn.Module) -> int:
    """Memory that a forward pass keeps for the gradient, each storage once, the weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = net(*inputs())
    assert out.requires_grad
    return sum(kept.values())


def test_residual_levels_keep_less_for_the_gradient_than_concatenated_skips():
    same = {"size": 32, "channels": (16, 32), "embedding": 16}
    residual = ResidualUViT(**same, kinds=("res", "res"), blocks=(3,), middle=6)
    concatenating = SimpleUNet(**same, blocks=(3, 3), attention=())
    assert saved_bytes(residual) < saved_bytes(concatenating)


def test_rotary_positions_depend_on_differences_only():
    x = torch.randn(2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turns = rotations(5, 7, 8, x)
    grid = turns.reshape(5, 7, -1)
    q, k = x[0, 0], x[0, 1]
    at = lambda v, i, j: rotate(v[None], grid[i, j][None])[0]
    assert_close(at(q, 1, 2) @ at(k, 3, 5), at(q, 2, 3) @ at(k, 4, 6))
    assert_close(at(q, 1, 2).norm(), q.norm())
    assert not torch.allclose(at(q, 1, 2) @ at(k, 3, 5), at(q, 1, 2) @ at(k, 3, 4))


def test_heads_of_any_size_turn_what_they_can():
    x = torch.randn(1, 4, 6)
    assert rotate(x, rotations(2, 2, 6, x)).shape == x.shape


def test_queries_and_keys_are_normalised():
    """Attention does not change when queries and keys are scaled up."""
    block = TransformerBlock(16, None, 8)
    nn.init.normal_(block.attention.out.weight)
    x = torch.randn(1, 5, 16)
    before = block(x, None)
    with torch.no_grad():
        block.attention.qkv.weight[:32] *= 10
        block.attention.qkv.bias[:32] *= 10
    assert_close(block(x, None), before, rtol=1e-4, atol=1e-5)


def test_learned_positions_break_the_symmetry_between_places():
    torch.manual_seed(0)
    stack = stir(Transformer(8, 1, 2, None, 8))
    out = stack(torch.ones(1, 8, 2, 2), None)
    assert out[0, :, 0, 0].sub(out[0, :, 1, 1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SimpleUViT(**{**UVIT, "size": 34}), "34 does not allow"),
        (lambda: SimpleUNet(**{**UNET, "size": 30}), "30 does not allow"),
        (lambda: SimpleUNet(**{**UNET, "blocks": (1, 1)}), "2 have blocks"),
        (lambda: ResidualUViT(**{**RESIDUAL, "size": 34}), "34 does not allow"),
        (lambda: ResidualUViT(**{**RESIDUAL, "kinds": ("res", "res")}), "one entry a level"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make, told):
    with pytest.raises(BadInput, match=told):
        make()


def gflops(net: nn.Module, size: int) -> float:
    """Multiply-adds of one picture, in 10^9."""
    place = {"device": "meta"}
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, size, size, **place), torch.zeros(1, **place), torch.zeros(1, dtype=int, **place))
    return counter.get_total_flops() / 2e9


def test_published_costs():
    """Networks of the presets cost what later papers' tables print: 137 and 653 (SiD2 at 256 px with patches of 2
    and 1), 555 (simple diffusion, half of 1110 guided; about 2 billion parameters)."""
    from sfumato.train import sid2, simple_diffusion

    with torch.device("meta"):
        for preset, printed in (("imagenet-256-patch2", 137), ("imagenet-256", 653)):
            net = sid2.SiD2(**sid2.SiD2.presets[preset]).network(1000)
            assert gflops(net, 256) == pytest.approx(printed, rel=0.012)
        recipe = simple_diffusion.SimpleDiffusion
        net = recipe(**recipe.presets["imagenet-256-uvit"]).network(1000)
    assert gflops(net, 256) == pytest.approx(555, rel=0.012)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(2e9, rel=0.1)
