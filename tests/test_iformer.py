"""iFormer: published sizes and keys, the ways through its mixer, spectra, and augmentation in pairs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from sfumato.classify.iformer import InceptionTransformer
from sfumato.classify.parts.mixing import cropped, erased, mixed
from sfumato.classify.parts.randaugment import CHANGES, rand_augmented
from sfumato.classify.parts.spectra import high_share, log_amplitude, profile, spectra
from sfumato.errors import BadInput
from sfumato.nets.iformer import PLANS, Block, IFormer, Mixer, Plan, load_published, published_keys, ramped
from sfumato.train.draw import Share

rng = torch.Generator().manual_seed(0)
TINY = Plan((1, 1, 1, 1), (8, 8, 12, 12), (2, 2, 3, 3), (1, 1, 2, 2))


def normal(*shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def mixer(*how, **more):
    torch.manual_seed(0)
    return Mixer(*how, **more).double().eval()


@pytest.mark.parametrize(
    ("name", "parameters", "dims"),
    [
        ("small", 19_866_344, (96, 192, 320, 384)),
        ("base", 47_866_216, (96, 192, 384, 512)),
        ("large", 86_637_096, (96, 192, 448, 640)),
    ],
)
def test_published_nets_have_their_parameters_and_shapes(name, parameters, dims):
    with torch.device("meta"):
        net = IFormer(name).eval()
        assert sum(p.numel() for p in net.parameters()) == parameters
        shapes = [tuple(x.shape) for x in net.maps(torch.empty(2, 3, 224, 224))]
    assert shapes == [(2, dim, side, side) for dim, side in zip(dims, (56, 28, 14, 7), strict=True)]
    assert all(stage.place.shape[1] == shape[-1] for stage, shape in zip(net.stages, shapes, strict=True))
    scaled = [block.scale1 is not None for stage in net.stages for block in stage.blocks]
    assert scaled == [i >= sum(PLANS[name].depths[:2]) for i in range(sum(PLANS[name].depths))]
    keys = published_keys(net)
    assert set(KNOWN) <= set(keys.values()) and len(set(keys.values())) == len(keys)
    assert not [key for key in keys.values() if re.search(r"stages|embed\.\d|\.mixer|mlp\.\d|scale\d", key)]


# One key of every kind that the released files have.
KNOWN = (
    "patch_embed.proj1.weight", "patch_embed.norm1.running_var", "patch_embed.proj2.bias", "patch_embed.norm2.weight",
    "patch_embed2.proj.weight", "patch_embed4.norm.bias", "pos_embed1", "pos_embed4", "blocks1.0.norm1.weight",
    "blocks1.2.attn.high_mixer.conv1.weight", "blocks2.1.attn.high_mixer.proj1.weight",
    "blocks3.8.attn.high_mixer.proj2.bias", "blocks3.0.attn.low_mixer.qkv.bias", "blocks4.2.attn.conv_fuse.weight",
    "blocks4.0.attn.proj.bias", "blocks1.0.norm2.bias", "blocks2.2.mlp.fc1.weight", "blocks4.1.mlp.fc2.bias",
    "blocks3.0.layer_scale_1", "blocks4.2.layer_scale_2", "norm.weight", "head.bias",
)  # fmt: skip


def test_ways_are_what_they_are_said_to_be():
    net, x = mixer(12, 3, 1, pool=2), normal(2, 12, 6, 6)
    ways = net.ways(x)
    depthwise = F.conv2d(F.conv2d(x[:, :4], net.conv[0].weight), net.conv[1].weight, padding=1, groups=8)
    torch.testing.assert_close(ways["conv"], F.gelu(depthwise))
    pooled = F.max_pool2d(x[:, 4:8], 3, 1, 1)
    torch.testing.assert_close(ways["pool"], F.gelu(F.conv2d(pooled, net.pool[1].weight, net.pool[1].bias)))
    tokens = x[:, 8:].unflatten(2, (3, 2)).unflatten(4, (3, 2)).mean((3, 5)).flatten(2).mT
    q, k, v = net.qkv(tokens).chunk(3, -1)
    y = ((q @ k.mT / 2).softmax(-1) @ v).mT.unflatten(2, (3, 3))
    torch.testing.assert_close(ways["attention"], y.repeat_interleave(2, 2).repeat_interleave(2, 3))
    y = torch.cat(list(ways.values()), 1)
    fused = F.conv2d(y + F.conv2d(y, net.fuse.weight, padding=1, groups=20), net.out.weight, net.out.bias)
    torch.testing.assert_close(net(x.permute(0, 2, 3, 1)), fused.permute(0, 2, 3, 1))


def test_heads_attend_apart():
    net, x = mixer(8, 2, 2), normal(1, 8, 3, 3)
    q, k, v = net.qkv(x.flatten(2).mT).chunk(3, -1)
    heads = [(q[..., s] @ k[..., s].mT / 2).softmax(-1) @ v[..., s] for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(net.ways(x)["attention"].flatten(2).mT, torch.cat(heads, -1))


def test_attention_follows_a_permutation_of_places_and_pools_a_monotone_map():
    net, x = mixer(12, 3, 1), normal(1, 12, 4, 4)
    order = torch.randperm(16, generator=rng)
    moved = x.flatten(2)[..., order].unflatten(2, (4, 4))
    a, b = net.ways(x), net.ways(moved)
    for way, follows in (("attention", True), ("conv", False), ("pool", False)):
        expected = a[way].flatten(2)[..., order].unflatten(2, (4, 4))
        assert torch.allclose(b[way], expected) == follows
    first = net.pool[0]
    torch.testing.assert_close(first(x.exp()), first(x).exp())


def test_all_or_none_attend():
    whole, none, x = mixer(8, 2, 2), mixer(8, 2, 0), normal(1, 5, 5, 8)
    assert list(whole.ways(x.permute(0, 3, 1, 2))) == ["attention"] and whole.fuse.out_channels == 8
    assert list(none.ways(x.permute(0, 3, 1, 2))) == ["conv", "pool"] and none.fuse.out_channels == 16
    assert whole(x).shape == none(x).shape == x.shape


def test_odd_and_oblong_maps_are_taken():
    net, x = mixer(8, 2, 1, pool=2), normal(1, 8, 5, 7)
    y = net.ways(x)["attention"]
    assert y.shape == (1, 4, 5, 7)
    even = torch.full((1, 8, 5, 5), 3.0).double()  # windows that are cut count what they hold
    y = net.ways(even)["attention"]
    torch.testing.assert_close(y, y[..., :1, :1].expand(1, 4, 5, 5))
    with torch.no_grad():
        assert IFormer(TINY, 3, 32).eval()(torch.zeros(1, 3, 50, 70)).shape == (1, 3)


def test_without_layer_scale_the_last_stages_are_the_identity():
    torch.manual_seed(0)
    block, x = Block(8, 2, 1, 1, scale=0.0).double(), normal(2, 4, 4, 8)
    assert torch.equal(block(x), x) and Block(8, 2, 1, 1).scale1 is None


def test_blocks_are_left_out_of_whole_pictures_and_kept_in_the_mean():
    torch.manual_seed(0)
    block, x = Block(8, 2, 1, 1, drop=0.25).double(), normal(400, 2, 2, 8)
    change = block._kept(torch.ones_like(x), None)
    per_picture = change.flatten(1)
    assert set(per_picture.unique().tolist()) == {0.0, 1 / 0.75} and (per_picture == per_picture[:, :1]).all()
    assert abs(change.mean() - 1) < 0.1
    assert torch.equal(block.eval()._kept(x, None), x)
    drops = [b.drop for s in IFormer(TINY, 2, 32, drop_path=0.3).stages for b in s.blocks]
    assert drops == pytest.approx([0, 0.1, 0.2, 0.3])


def test_tables_of_places_are_resized():
    torch.manual_seed(0)
    net = IFormer(TINY, 2, 32).eval()
    stage, x = net.stages[0], torch.randn(1, 3, 48, 48)
    place = F.interpolate(stage.place.permute(0, 3, 1, 2), (12, 12), mode="bilinear")
    torch.testing.assert_close(stage.enter(x) - stage.embed(x).permute(0, 2, 3, 1), place.permute(0, 2, 3, 1))
    assert [s.place.shape[1] for s in IFormer(TINY, 2, 32, small=True).stages] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("ramp", "heads"),
    [("published", (1, 1, 3)), ("reversed", (2, 1, 2)), ("constant", (1, 2, 2)), ("attention", (2, 4, 4)),
     ("none", (0, 0, 0))],
)  # fmt: skip
def test_ramps(ramp, heads):
    assert ramped(Plan((1, 2), (8, 16), (2, 4), (1, 1, 3)), ramp) == heads


def test_released_weights_are_taken_whole_or_not_at_all(tmp_path):
    torch.manual_seed(0)
    source, target = (IFormer(TINY, 3, 32).eval() for _ in range(2))
    keys, x = published_keys(source), torch.randn(1, 3, 32, 32)
    state = {keys[k]: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_published(target, state)
    torch.testing.assert_close(target(x), source(x))
    with pytest.raises(BadInput, match=r"pos_embed1 is missing"):
        load_published(target, {k: v for k, v in state.items() if k != "pos_embed1"})
    with pytest.raises(BadInput, match="has no weight other"):
        load_published(target, {**state, "other": torch.zeros(1)})
    with pytest.raises(BadInput, match="tables for 224 pixels"):
        load_published(IFormer(TINY, 3, 64), state)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    of = {name: getattr(TINY, name) for name in ("depths", "dims", "heads", "attention")}
    made = InceptionTransformer(**of, size=48, table=32, weights=tmp_path / "w.safetensors").network(("a", "b"))
    assert made.net.head.out_features == 2 and torch.equal(made.net.stages[0].place, source.stages[0].place)


def test_spectra():
    ramp = torch.arange(16.0).double()
    wave = lambda k: torch.cos(2 * torch.pi * k / 16 * ramp).expand(2, 3, 16, 16)
    assert high_share(wave(2)) == pytest.approx(0, abs=1e-12) and high_share(wave(6)) == pytest.approx(1)
    assert high_share(wave(2) + 2 * wave(6) + 5) == pytest.approx(4 / 5)
    spectrum = log_amplitude(wave(3))
    assert spectrum.argmax() in (8 * 16 + 5, 8 * 16 + 11)
    assert spectrum[8, 11].item() == pytest.approx(torch.log(torch.tensor(8.0)).item(), abs=1e-5)
    assert len(profile(wave(2))) == 8 and profile(wave(2))[2] > profile(wave(2))[5]
    torch.manual_seed(0)
    net = IFormer(TINY, 2, 32).eval()
    told = spectra(net, torch.randn(2, 3, 32, 32))
    assert [(t["stage"], t["block"]) for t in told] == [(i, 1) for i in (1, 2, 3, 4)]
    assert told[0].keys() == {"stage", "block", "conv", "pool", "attention"} and told[3]["conv"]["high"] is None
    # the low way of the first stage repeats means of 2x2, which the others do not
    assert told[0]["attention"]["high"] < min(told[0]["conv"]["high"], told[0]["pool"]["high"])


def test_pictures_are_mixed_in_pairs_and_labels_by_what_is_seen():
    x = torch.stack([torch.full((3, 20, 30), float(i)) for i in range(4)])
    assert mixed(x, 0, 0, 0.5, rng) == (x, 1.0)
    shares = []
    for _ in range(20):
        y, share = mixed(x, 0.8, 0, 0.5, rng)
        torch.testing.assert_close(y, share * x + (1 - share) * x.flip(0))
        y, share = mixed(x, 0, 1.0, 0.5, rng)
        assert (y[0] == 0).float().mean().item() == pytest.approx(share, abs=1e-6)
        assert set(y[1].unique().tolist()) <= {1.0, 2.0}
        shares.append(share)
    assert max(shares) - min(shares) > 0.3


def test_crops_and_boxes_of_noise():
    x = torch.linspace(-1, 1, 24).expand(8, 3, 24, 24)
    assert cropped(x, 0.3, rng).shape == x.shape
    torch.testing.assert_close(cropped(x, 1.0, rng, aspect=1.0), x)
    spread = lambda y: (y.amax((1, 2, 3)) - y.amin((1, 2, 3))).tolist()
    assert len({round(width, 3) for width in spread(cropped(x, 0.05, rng))}) > 5
    noise = ((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(erased(x, 0, noise, rng), x)
    changed = (erased(x, 1, noise, rng) != x).all(1).float().mean((1, 2))
    assert changed.min() > 0.005 and changed.max() < 0.45


def test_changes_of_randaugment():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": (7, 8, 9)}
    change = lambda name, level: np.asarray(CHANGES[name](Image.fromarray(pixels), level, how)).astype(int)
    assert (change("invert", 0.9) == 255 - pixels).all()
    assert (change("posterize", -0.9) == pixels // 128 * 128).all() and (change("posterize", 0.5) % 64 == 0).all()
    assert (change("solarize", 0.5) == np.where(pixels < 128, pixels, 255 - pixels)).all()
    assert (change("solarize-add", 0.9) == np.where(pixels < 128, pixels + 99.0, pixels)).all()
    right, down = change("translate-x", 5 / 9), change("translate-y", -4 / 9)  # by 3 pixels, and by -2
    assert (right[:, :9] == pixels[:, 3:]).all() and (right[:, 9:] == (7, 8, 9)).all()
    assert abs(down[3:] - pixels[1:8]).max() <= 1 and (down[:2] == (7, 8, 9)).all()
    assert abs(change("brightness", -1.0) - pixels / 10).max() <= 1 and abs(change("contrast", 0.0) - pixels).max() == 0
    assert all(change(name, level).shape == pixels.shape for name in CHANGES for level in (-1.0, 0.0, 1.0))
    assert (change("rotate", 0.0) == pixels).all() and not (change("rotate", 0.9) == change("rotate", -0.9)).all()


def test_randaugment_changes_some_pictures_and_is_the_rows_own():
    x = torch.randint(256, (12, 3, 8, 8), generator=rng) / 127.5 - 1
    torch.testing.assert_close(rand_augmented(x, 9, rng, chance=0.0), x)
    whole = rand_augmented(x, 9, Share((0, 1), range(12), 12))
    kept = [torch.allclose(a, b) for a, b in zip(whole, x, strict=True)]
    assert any(kept) and not all(kept) and whole.abs().max() <= 1
    part = rand_augmented(x[5:], 9, Share((0, 1), range(5, 12), 12))
    assert torch.equal(part, whole[5:])


def test_the_rate_warms_up_falls_and_rests():
    rate = InceptionTransformer(updates=110, warmup=10, cooldown=10, lr=1.0, final_lr=0.1, first_lr=0.0).rate()
    assert [rate(i) for i in (0, 5, 50, 100, 109)] == pytest.approx([0, 0.5, 0.55, 0.1, 0.1])


def test_the_loss_weighs_both_labels():
    how = {**InceptionTransformer.EXAMPLE, "mixup": 1.0, "cutmix": 0.0, "label_smoothing": 0.1}
    method = InceptionTransformer(**how)
    torch.manual_seed(0)
    net, y = method.network(("a", "b", "c")).eval(), torch.tensor([0, 1, 1, 2])
    x = torch.randn(4, 3, 16, 16, generator=rng)
    loss, _ = method.loss(net, x, y, torch.Generator().manual_seed(3))
    blended, share = mixed(x, 1.0, 0.0, 0.5, torch.Generator().manual_seed(3))
    one_hot = lambda y: 0.9 * F.one_hot(y, 3) + 0.1 / 3
    target = share * one_hot(y) + (1 - share) * one_hot(y.flip(0))
    torch.testing.assert_close(loss, F.cross_entropy(net(blended), target))


def test_a_folder_has_spectra_on_its_card(tmp_path):
    how = {**InceptionTransformer.EXAMPLE, "updates": 1, "batch": 4, "pictures": 100}
    folder = InceptionTransformer(**how).run(tmp_path / "run", progress=False)
    card = json.loads((folder / "card.json").read_text())
    assert len(card["spectra"]) == 4 and 0 < card["spectra"][0]["conv"]["high"] < 1
    assert isinstance(InceptionTransformer.read(folder).net, IFormer)


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ({"attention": (1, 1, 2)}, "one number for each"),
        ({"attention": (1, 1, 2, 4)}, "cannot have 4 attend"),
        ({"dims": (10, 8, 12, 12)}, "even number"),
        ({"weights": "w.safetensors"}, "leave small or weights out"),
        ({"size": 16, "batch": 1}, "micro-batches"),
    ],
)
def test_nets_that_cannot_be_made_are_refused(how, wrong):
    with pytest.raises(BadInput, match=wrong):
        InceptionTransformer(**{**InceptionTransformer.EXAMPLE, **how})
