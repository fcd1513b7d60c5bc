"""Inception-v4 and its kin: published sizes and shapes, residuals, released keys."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from sfumato.classify.inception_v4 import InceptionV4
from sfumato.errors import BadInput
from sfumato.nets.inception import Cat, Inception, Residual, load_published, published_keys, tower

TINY = {"classes": 3, "width": 1 / 16, "blocks": (1, 1, 2), "small": True}


@pytest.mark.parametrize(
    ("net", "blocks", "parameters", "shapes"),
    [
        ("inception-v4", None, 42_679_816, [(384, 35), (384, 35), (1024, 17), (1536, 8)]),
        ("inception-resnet-v1", None, 22_756_328, [(256, 35), (256, 35), (896, 17), (1792, 8)]),
        ("inception-resnet-v2", None, 55_843_464, [(320, 35), (320, 35), (1088, 17), (1536, 8)]),
        ("inception-resnet-v2-paper", None, 32_433_928, [(384, 35), (384, 35), (1152, 17), (2144, 8)]),
        ("inception-resnet-v2-paper", (10, 20, 10), 55_284_488, [(384, 35), (384, 35), (1152, 17), (2144, 8)]),
    ],
)
def test_published_nets_have_their_parameters_and_shapes(net, blocks, parameters, shapes):
    with torch.device("meta"):
        made = Inception(net, blocks=blocks).eval()
        assert sum(p.numel() for p in made.parameters()) == parameters
        maps = made.maps(torch.empty(1, 3, 299, 299))
    assert [tuple(x.shape[1:]) for x in maps] == [(c, side, side) for c, side in shapes]


def block(scale, **how):
    torch.manual_seed(0)
    return Residual(Cat(6, ("1x1 4", "1x1 4 - 3x3 5")), 6, scale, **how).double().eval()


def test_a_residual_is_affine_in_its_scale_and_the_identity_without_it():
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(block(0.0)(x.relu()), x.relu())
    sums = [block(s, activate=False)(x) for s in (0.0, 0.1, 0.3)]
    torch.testing.assert_close(sums[2] - sums[0], 3 * (sums[1] - sums[0]))
    scaled = block(1.0)
    with torch.no_grad():
        for p in scaled.lin.parameters():
            p.mul_(0.3)
    torch.testing.assert_close(scaled(x), block(0.3)(x))
    torch.testing.assert_close(block(0.3, skip=False)(x), (block(1.0, activate=False)(x) - x).relu())


def test_average_pools_leave_padding_out_of_the_count():
    pool, outputs = tower(2, "avg")
    x = torch.ones(1, 2, 4, 4)
    assert outputs == 2 and torch.equal(pool(x), x)


def test_the_control_has_the_parameters_of_the_residual_net():
    count = lambda **how: sum(p.numel() for p in Inception("inception-resnet-v1", **TINY, **how).parameters())
    assert count(join="control") == count() != count(join="concat")


# One key of every kind that the released files have.
V4 = (
    "features.0.conv.weight", "features.3.conv.bn.weight", "features.4.branch1.3.conv.weight",
    "features.5.conv.conv.weight", "features.6.branch0.conv.weight", "features.9.branch3.1.bn.running_var",
    "features.10.branch0.conv.weight", "features.10.branch1.2.conv.weight", "features.17.branch2.4.conv.weight",
    "features.18.branch0.1.conv.weight", "features.18.branch1.3.bn.bias", "features.19.branch0.conv.weight",
    "features.19.branch1_0.conv.weight", "features.20.branch1_1b.conv.weight", "features.21.branch2_2.conv.weight",
    "features.21.branch2_3a.conv.weight", "features.21.branch3.1.conv.weight", "last_linear.bias",
)  # fmt: skip
RESNET_V2 = (
    "conv2d_1a.conv.weight", "conv2d_2a.bn.bias", "conv2d_2b.conv.weight", "conv2d_3b.conv.weight",
    "conv2d_4a.conv.weight", "mixed_5b.branch0.conv.weight", "mixed_5b.branch1.1.conv.weight",
    "mixed_5b.branch3.1.conv.weight", "repeat.0.branch0.conv.weight", "repeat.9.branch2.2.bn.running_mean",
    "repeat.9.conv2d.bias", "mixed_6a.branch0.conv.weight", "mixed_6a.branch1.2.conv.weight",
    "repeat_1.19.branch1.2.conv.weight", "repeat_1.0.conv2d.weight", "mixed_7a.branch0.1.conv.weight",
    "mixed_7a.branch2.2.conv.weight", "repeat_2.8.branch1.2.conv.weight", "block8.branch0.conv.weight",
    "block8.conv2d.bias", "conv2d_7b.bn.weight", "classif.weight",
)  # fmt: skip


@pytest.mark.parametrize(("net", "known"), [("inception-v4", V4), ("inception-resnet-v2", RESNET_V2)])
def test_keys_are_those_of_the_released_weights(net, known):
    with torch.device("meta"):
        keys = published_keys(Inception(net), net)
    assert set(known) <= set(keys.values()) and len(set(keys.values())) == len(keys)
    assert not [k for k in keys.values() if re.search(r"stem|branches|reduce|inception|^lin\.|^[abc]\.", k)]


@pytest.mark.parametrize("name", ["inception-v4", "inception-resnet-v2"])
def test_released_weights_are_taken_whole_or_not_at_all(name):
    torch.manual_seed(0)
    source, target = (Inception(name, **TINY).eval() for _ in range(2))
    keys, x = published_keys(source, name), torch.randn(1, 3, 32, 32)
    state = {keys[k]: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_published(target, name, state)
    torch.testing.assert_close(target(x), source(x))
    first = next(iter(state))
    with pytest.raises(BadInput, match=f"{first} is missing"):
        load_published(target, name, {k: v for k, v in state.items() if k != first})
    with pytest.raises(BadInput, match="has no weight other"):
        load_published(target, name, {**state, "other": torch.zeros(1)})
    with pytest.raises(BadInput, match="of shape"):
        load_published(target, name, {**state, first: torch.zeros(1)})
    with pytest.raises(BadInput, match="no weights of inception-resnet-v1"):
        published_keys(source, "inception-resnet-v1")


def test_a_head_of_other_classes_is_fresh(tmp_path):
    settings = {"net": "inception-resnet-v2", "width": 1 / 16, "blocks": (1, 1, 2), "small": True, "size": 32}
    source = Inception("inception-resnet-v2", **TINY)
    keys = published_keys(source, "inception-resnet-v2")
    save_file({keys[k]: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    made = InceptionV4(**settings, weights=tmp_path / "w.safetensors").network(("a", "b"))
    assert made.head.out_features == 2 and torch.equal(made.c[0].lin.weight, source.c[0].lin.weight)


def test_the_rate_falls_by_steps():
    rate = InceptionV4(rate_every=10).rate()
    assert [rate(i) for i in (0, 9, 10, 25)] == pytest.approx([0.045, 0.045, 0.045 * 0.94, 0.045 * 0.94**2])
    method = InceptionV4()
    assert method.rate_every * method.batch / 1_281_167 == pytest.approx(2, rel=1e-4)  # epochs of ImageNet


def test_pictures_that_are_too_small_are_refused():
    with pytest.raises(BadInput, match="at least 75"):
        InceptionV4(size=64)
    with pytest.raises(BadInput, match="too small"):
        Inception("inception-v4", **TINY)(torch.zeros(1, 3, 20, 20))
