"""The U-Net of frames: its shape, its times, and who sees whom."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from noise_cases import normal
from sfumato.errors import BadInput
from sfumato.nets import VideoUNet

TINY = {"size": 8, "frames": 3, "in_channels": 1, "channels": (8, 16), "layers": 1, "head_dim": 8, "embedding": 16}


def network(**changes) -> VideoUNet:
    """A tiny network, no longer new: what starts at zero has been moved off it."""
    torch.manual_seed(0)
    net = VideoUNet(**{**TINY, **changes})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.double().eval()


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("size", [8, 16])
def test_a_new_network_returns_exactly_zero(patch, size):
    net = VideoUNet(**{**TINY, "size": size, "patch": patch, "in_channels": 3})
    z = torch.randn(2, 3, 3, size, size)
    assert torch.equal(net(z, torch.zeros(2, 3)), torch.zeros_like(z))


def test_every_frame_sees_every_frame_and_its_own_time():
    net, z, logsnr = network(), normal(1, 3, 1, 8, 8), normal(1, 3)
    before = net(z, logsnr)
    for frame in range(3):
        other = z.clone()
        other[:, frame] += 1
        assert ((net(other, logsnr) - before).flatten(2).abs().amax(2) > 1e-6).all()
        later = logsnr.clone()
        later[:, frame] += 1
        assert ((net(z, later) - before).flatten(2).abs().amax(2) > 1e-8).all()


def test_frames_know_their_place():
    """The same frame at the same time everywhere still gets three answers."""
    z = normal(1, 1, 1, 8, 8).expand(-1, 3, -1, -1, -1)
    out = network()(z, torch.zeros(1, 3, dtype=torch.float64))[0]
    assert min((out[i] - out[j]).abs().max() for i in range(3) for j in range(i)) > 1e-6


def test_sequences_of_a_batch_do_not_meet():
    net, z, logsnr = network(), normal(3, 3, 1, 8, 8), normal(3, 3)
    assert_close(net(z, logsnr)[1:2], net(z[1:2], logsnr[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("patch", [1, 2])
def test_periodic_networks_commute_with_shifts(patch):
    """By whole places of the coarsest level, and only when the borders are joined."""
    z, logsnr, step = normal(1, 3, 1, 8, 8), normal(1, 3), 2 * patch
    error = {}
    for periodic in (True, False):
        net = network(periodic=periodic, patch=patch)
        moved = net(z.roll((step, -step), (-2, -1)), logsnr)
        error[periodic] = (moved - net(z, logsnr).roll((step, -step), (-2, -1))).abs().max()
    assert error[True] < 1e-12 < 1e-4 < error[False]


def test_classes_reach_every_frame():
    net, z, logsnr = network(classes=2), normal(2, 3, 1, 8, 8), normal(2, 3)
    one, other = (net(z, logsnr, torch.tensor([0, label])) for label in (1, 2))
    assert torch.equal(one[0], other[0])
    assert ((one[1] - other[1]).flatten(1).abs().amax(1) > 1e-8).all()


def test_saved_and_loaded_it_is_the_same(tmp_path):
    net = network(periodic=True).float()
    net.save_pretrained(tmp_path)
    again = VideoUNet.from_pretrained(tmp_path).eval()
    z, logsnr = normal(1, 3, 1, 8, 8).float(), normal(1, 3).float()
    assert torch.equal(net(z, logsnr), again(z, logsnr))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 9}, "not divide a side of 9"), ({"patch": 8}, "do not divide"), ({"head_dim": 6}, "whole heads of 6")],
)
def test_sizes_that_do_not_divide_are_named(change, message):
    with pytest.raises(BadInput, match=message):
        VideoUNet(**{**TINY, **change})


def test_another_number_of_frames_is_named():
    with pytest.raises(BadInput, match="windows of 3 frames, not 4"):
        network()(normal(1, 4, 1, 8, 8), normal(1, 4))
