"""Prototype net: the loss's terms, the last layer, padding, deformation, and what it shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import conv2d

from sfumato.classify.parts.elastic import elastic
from sfumato.classify.parts.prototypes import squared_distances
from sfumato.classify.parts.same import Doubling, Halving
from sfumato.classify.prototype_net import PrototypeNet, loss_terms
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.report.classifier import ClassifierReport

SMALL = {**PrototypeNet.EXAMPLE, "updates": 2, "batch": 4}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms(latent, prototypes, weight=None):
    weight = torch.zeros(len(prototypes), 2, dtype=torch.float64) if weight is None else weight
    x = torch.zeros(len(latent), 1, 2, 2, dtype=torch.float64)
    return loss_terms(latent, prototypes, weight, x, x + 0.5, torch.zeros(len(latent), dtype=torch.long))


def made(**how):
    torch.manual_seed(0)
    return PrototypeNet(**{**PrototypeNet.EXAMPLE, **how}).network(("a", "b")).double()


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of each of two classes."""
    rng = np.random.default_rng(0)
    for i in range(8):
        file = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return str(tmp_path / "pictures")


def test_distances_are_squared_and_never_negative():
    x, y = normal(7, 5), normal(4, 5, seed=1)
    torch.testing.assert_close(squared_distances(x, y), torch.cdist(x, y) ** 2, atol=1e-10, rtol=0)
    far = 1e8 + normal(3, 5)
    assert (squared_distances(far, far) >= 0).all()


def test_both_regularisers_vanish_where_they_should_and_change_places():
    z, p = normal(6, 3), normal(4, 3, seed=1)
    assert terms(z, z[[0, 3]])["prototypes"] < 1e-12 < terms(z, z[[0, 3]])["examples"]
    both = torch.cat([z, p])
    assert terms(z, both)["examples"] < 1e-12 < terms(z, both)["prototypes"]
    torch.testing.assert_close(terms(z, p)["prototypes"], terms(p, z)["examples"])
    assert terms(z, p)["reconstruction"] == 4 * 0.25  # summed over pixels


def test_a_prototype_is_drawn_to_its_nearest_picture_only():
    z, p = normal(6, 3).requires_grad_(), normal(2, 3, seed=1)
    terms(z, p)["prototypes"].backward()
    moved = {int(i) for i in z.grad.abs().sum(1).nonzero()}
    assert moved == set(torch.cdist(p, z.detach()).argmin(1).tolist())


def test_the_released_weights_are_the_papers_times_twenty():
    net, x, y = made(grey=True), normal(4, 3, 16, 16).tanh(), torch.tensor([0, 1, 1, 0])
    rng = torch.Generator()
    released = {k: v for k, v in PrototypeNet.presets["released"].items() if k != "lr"}
    ours = PrototypeNet(**{**PrototypeNet.EXAMPLE, "grey": True}).loss(net, x, y, rng)[0]
    theirs = PrototypeNet(**{**PrototypeNet.EXAMPLE, **released}).loss(net, x, y, rng)[0]
    torch.testing.assert_close(theirs, 20 * ours)


def test_logits_do_not_depend_on_the_order_or_the_place_of_prototypes():
    net, x = made(), normal(4, 3, 16, 16).tanh()
    with torch.no_grad():
        before, latent = net(x), net.features(x)
        torch.testing.assert_close(before, torch.cdist(latent, net.prototypes) ** 2 @ net.weight)
        moved = squared_distances(latent + 3.0, net.prototypes + 3.0) @ net.weight
        torch.testing.assert_close(moved, before)
        order = torch.tensor([2, 0, 1])
        net.prototypes.copy_(net.prototypes[order])
        net.weight.copy_(net.weight[order])
        torch.testing.assert_close(net(x), before)


def test_the_published_net_has_its_shapes():
    net = PrototypeNet(grey=True).network(tuple("0123456789")).eval()
    x, sides = torch.rand(2, 1, 28, 28), []
    for layer in net.encoder:
        x = layer(x)
        sides.append(x.shape[-1])
    assert sides[::2] == [14, 7, 4, 2] and net.features(torch.rand(2, 3, 28, 28)).shape == (2, 40)
    back = []
    for layer in net.decoder:
        x = layer(x)
        back.append(x.shape[-1])
    assert back[::2] == [4, 7, 14, 28] and x.shape == (2, 1, 28, 28)
    kernels = 9 * (32 + 32 * 32 + 32 * 32 + 32 * 10)
    assert sum(p.numel() for p in net.parameters()) == 2 * kernels + 106 + 97 + 15 * 40 + 15 * 10
    x = torch.rand(1, 3, 28, 28)
    assert torch.equal(net.features(x).reshape(2, 2, 10)[0, 1], net.encoder(net.seen(x))[0, :, 0, 1])


@pytest.mark.parametrize("side", [6, 7])
def test_padding_is_at_the_end_of_even_sides_and_the_way_back_is_the_transpose(side):
    torch.manual_seed(0)
    there, back = Halving(2, 3).double(), Doubling(3, 2, side).double()
    x, y = normal(1, 2, side, side), normal(1, 3, (side + 1) // 2, (side + 1) // 2, seed=1)
    wide = torch.zeros(1, 2, side + 2, side + 2, dtype=torch.float64)
    first = side % 2  # what TensorFlow pads in front: nothing of an even side
    wide[..., first : first + side, first : first + side] = x
    known = conv2d(wide, there.weight, there.bias, stride=2)[..., : y.shape[-1], : y.shape[-1]]
    torch.testing.assert_close(there(x), known)
    with torch.no_grad():
        back.weight.copy_(there.weight)
        for layer in (there, back):
            layer.bias.zero_()
    torch.testing.assert_close((there(x) * y).sum(), (x * back(y)).sum())


def test_deformation_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, noise = normal(2, 1, 12, 9).abs(), torch.rand(2, 2, 12, 9, generator=torch.Generator().manual_seed(1)).double()
    noise = 2 * noise - 1
    ours = elastic(x, noise, sigma=2.0, alpha=40.0)
    rows, columns = np.mgrid[0:12, 0:9]
    for picture, (dx, dy), moved in zip(x[:, 0].numpy(), noise.numpy(), ours[:, 0], strict=True):
        dx, dy = (40 * ndimage.gaussian_filter(d, 2.0, mode="constant") for d in (dx, dy))
        known = ndimage.map_coordinates(picture, (rows + dx, columns + dy), order=1)
        torch.testing.assert_close(moved, torch.from_numpy(known))
        assert (known == 0).any()
    torch.testing.assert_close(elastic(x, noise, alpha=0.0), x)


def test_reasons_are_sorted_and_add_up_to_the_logits():
    net, x = made(), normal(2, 3, 16, 16).tanh()
    for reasons, logits in zip(net.explain(x), net(x), strict=True):
        distances = [r.distance for r in reasons]
        assert distances == sorted(distances) and len(reasons) == 3
        torch.testing.assert_close(sum(r.contributions for r in reasons), logits)
    assert net.prototype_images().shape == (3, 3, 16, 16)


def test_a_fixed_last_layer_spreads_prototypes_over_classes():
    net = made(last_layer="fixed", other_weight=0.5)
    assert net.weight.tolist() == [[-1, 0.5], [0.5, -1], [-1, 0.5]]
    assert net.prototype_classes().tolist() == [0, 1, 0] and "weight" not in dict(net.named_parameters())


def test_projected_prototypes_are_latents_of_training_pictures(pictures):
    method = PrototypeNet(**{**SMALL, "data": pictures, "project": True})
    net = method.network(("cat", "dog"))
    seen, _, _ = method.parts()
    method.settle(net, seen)
    x = torch.stack([torch.from_numpy(seen.picture(i).copy()) for i in range(len(seen))]).movedim(-1, 1) / 127.5 - 1
    assert torch.cdist(net.prototypes, net.features(x)).min(1).values.max() < 1e-4


def test_fewer_prototypes_than_classes_are_refused():
    with pytest.raises(BadInput, match="2 prototypes cannot stand for 3 classes"):
        PrototypeNet(prototypes=2).network(("a", "b", "c"))


def test_a_page_shows_prototypes_beside_training_pictures(pictures, tmp_path):
    method = PrototypeNet(**{**SMALL, "data": pictures})
    folder = method.run(tmp_path / "run", progress=False)
    prototypes, decisions = method.sheets(folder)
    assert [len(row.pictures) for row in prototypes.rows] == [4] * 3
    assert len(decisions.rows) == len(open_pictures(pictures, 16)) - 6
    card = {"top1": {"value": 0.51234567, "low": 0.4, "high": 0.6, "n": 9}}
    ClassifierReport("prototype-net", {}, card, (prototypes, decisions)).write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 3 * 4 + 2 * 5 and "0.512 [0.400, 0.600] of 9" in page
