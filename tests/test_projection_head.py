"""Projection head: heads, losses, probes, and the linear laboratory against its closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, cross_entropy

from sfumato.classify.parts.contrastive import info_nce, spectral, sup_con
from sfumato.classify.parts.heads import Reweight, make_head, symmetric_relu
from sfumato.classify.parts.laboratory import (
    amplitudes,
    balanced_start,
    best_gram,
    descend,
    diagonal_net,
    moments,
    profile,
    risk,
    risk_gradient,
)  # fmt: skip
from sfumato.classify.parts.probes import balanced, by_group, effective_rank, linear_probe, spectrum
from sfumato.classify.projection_head import ProjectionHead, grouped, represented
from sfumato.errors import BadInput
from sfumato.report.classifier import ClassifierReport

SMALL = {**ProjectionHead.EXAMPLE, "updates": 2, "batch": 4}
STRENGTH = torch.tensor([0.8, 1.0, 1.4], dtype=torch.float64)
FLIPS = torch.tensor([0.0, 0.3, 0.1], dtype=torch.float64)
NOISE = 0.5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of each of two classes."""
    rng = np.random.default_rng(0)
    for i in range(8):
        file = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return str(tmp_path / "pictures")


# The laboratory


def test_the_gradient_of_the_spectral_risk():
    sigma, m = moments(STRENGTH, FLIPS, NOISE, torch.linalg.qr(normal(4, 3)).Q)
    w = normal(2, 4, seed=1).requires_grad_()
    (known,) = torch.autograd.grad(risk(w, sigma, m), w)
    torch.testing.assert_close(risk_gradient(w, sigma, m), known)
    torch.testing.assert_close(known, -4 * w @ m + 4 * w @ sigma @ w.T @ w @ sigma)


def test_moments_and_risk_are_those_of_drawn_data():
    rng, n = torch.Generator().manual_seed(0), 100_000
    v, w = torch.linalg.qr(normal(4, 3)).Q, 0.5 * normal(2, 4, seed=1)
    sigma, m = moments(STRENGTH, FLIPS, NOISE, v)
    signs = torch.where(torch.rand(n, 3, generator=rng) < 0.5, -1.0, 1.0).double()

    def view():
        kept = torch.where(torch.rand(n, 3, generator=rng) < FLIPS, -1.0, 1.0)
        return (signs * kept * STRENGTH) @ v.T + NOISE * torch.randn(n, 4, generator=rng, dtype=torch.float64)

    first, second = view() @ w.T, view() @ w.T
    near, apart = (first * second).sum(1).mean(), (first * second.roll(1, 0)).sum(1).square().mean()
    g = w.T @ w
    assert near.item() == pytest.approx((g @ m).trace().item(), rel=0.02)
    assert apart.item() == pytest.approx((g @ sigma @ g @ sigma).trace().item(), rel=0.03)
    assert risk(w, sigma, m).item() == pytest.approx((-2 * near + apart).item(), abs=0.02)


def test_the_minimum_is_reached_from_a_balanced_start_and_its_root_before_the_head():
    sigma, m = moments(STRENGTH, FLIPS, NOISE)
    start = balanced_start(3, 2, 0.4, torch.Generator().manual_seed(0))
    first, second = descend(start, sigma, m, lr=0.05, steps=2000)
    w = second @ first
    torch.testing.assert_close(w.T @ w, best_gram(sigma, m), atol=1e-6, rtol=0)
    torch.testing.assert_close(best_gram(sigma, m), torch.linalg.inv(sigma) @ m @ torch.linalg.inv(sigma))
    torch.testing.assert_close(best_gram(sigma, m), torch.diag(profile(STRENGTH, FLIPS, NOISE) ** 2))
    torch.testing.assert_close(torch.linalg.svdvals(first) ** 2, torch.linalg.svdvals(w), atol=0.02, rtol=0)
    drift = first @ first.T - second.T @ second
    assert drift.abs().max() < 0.02  # conserved but for the step's length
    before = STRENGTH * torch.linalg.vector_norm(first, dim=0)
    torch.testing.assert_close(before, amplitudes(STRENGTH, FLIPS, NOISE)[0], atol=0.02, rtol=0)


def test_three_layers_share_the_weight_in_thirds():
    weight, found = profile(STRENGTH, FLIPS, NOISE), amplitudes(STRENGTH, FLIPS, NOISE, layers=3)
    for layer in range(3):
        torch.testing.assert_close(found[layer], STRENGTH * weight ** ((layer + 1) / 3))
    sigma, m = moments(STRENGTH, FLIPS, NOISE)
    layers = descend(balanced_start(3, 3, 0.5, torch.Generator().manual_seed(0)), sigma, m, lr=0.05, steps=1200)
    values = [torch.linalg.svdvals(x) for x in (layers[0], layers[1] @ layers[0], layers[2] @ layers[1] @ layers[0])]
    for layer, value in enumerate(values):
        torch.testing.assert_close(value, weight.sort(descending=True).values ** ((layer + 1) / 3), atol=1e-2, rtol=0)


def test_a_narrow_net_keeps_the_strongest_directions():
    sigma, m = moments(STRENGTH, FLIPS, NOISE)
    gain = ((1 - 2 * FLIPS) * STRENGTH) ** 2 / (STRENGTH**2 + NOISE**2)
    kept = gain.argsort(descending=True)[:2]
    known = torch.zeros(3, dtype=torch.float64)
    known[kept] = profile(STRENGTH, FLIPS, NOISE)[kept] ** 2
    torch.testing.assert_close(best_gram(sigma, m, width=2), torch.diag(known))


def test_what_is_below_the_threshold_is_before_the_head_only():
    x = torch.tensor([[0.5, -2.0, 2.0]], dtype=torch.float64)
    z, h = diagonal_net(x, torch.ones(3), torch.ones(3), 1.0)
    assert torch.equal(z, x) and h.tolist() == [[0.0, -1.0, 1.0]]


# Heads


def test_reweighting():
    z = normal(2, 5)
    assert torch.equal(Reweight(5, 1.0)(z), z)
    jacobian = torch.autograd.functional.jacobian(Reweight(5, 1.3), z[0])
    torch.testing.assert_close(jacobian, torch.diag(1.3 ** -torch.arange(5.0)).double(), rtol=1e-6, atol=0)
    wide = Reweight(2048, 1.05)
    assert wide.carried == 284 and wide.weights.isfinite().all() and not list(wide.parameters())


def test_heads_keep_the_width_and_one_starts_as_the_identity():
    t = torch.linspace(-2, 2, 9)
    assert torch.equal(symmetric_relu(t, 0.0), t)
    assert symmetric_relu(t, 1.0).tolist() == [-1, -0.5, 0, 0, 0, 0, 0, 0.5, 1]
    z = normal(3, 6).float()
    assert torch.equal(make_head("identity", 6, 0, 1.0)(z), z) and torch.equal(make_head("none", 6, 0, 1.0)(z), z)
    layers = {kind: len(list(make_head(kind, 6, 4, 1.1).parameters())) for kind in ("linear", "mlp", "mlp2")}
    assert layers == {"linear": 2, "mlp": 4, "mlp2": 6}


# Losses


def test_the_spectral_loss_is_its_double_sum():
    first, second = normal(5, 3), normal(5, 3, seed=1)
    pairs = [(first[i] @ second[j]) ** 2 for i in range(5) for j in range(5) if i != j]
    known = -2 * sum(a @ b for a, b in zip(first, second, strict=True)) / 5 + sum(pairs) / len(pairs)
    torch.testing.assert_close(spectral(first, second), known)


def test_supervised_contrast_is_its_double_sum_and_simclrs_is_its_case_of_one_picture_a_class():
    h, y = normal(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        likeness = {j: cosine_similarity(h[i], h[j], dim=0) / 0.5 for j in others}
        near = [likeness[j] for j in others if y[j] == y[i]]
        total += torch.stack(list(likeness.values())).logsumexp(0) - sum(near) / len(near)
    torch.testing.assert_close(sup_con(h, y, 0.5), total / 6)
    torch.testing.assert_close(info_nce(h[:3], h[3:], 0.5), sup_con(h, torch.arange(3).repeat(2), 0.5))


# Probes


def test_a_probe_is_at_its_minimum_and_takes_features_of_any_size():
    z, y = normal(60, 3), (normal(60, seed=1) > 0).long()
    weight, bias = linear_probe(z, y, 2, decay=0.1)
    spread = z.std(0, correction=0)
    w = (weight * spread).requires_grad_()
    b = (bias + weight @ z.mean(0)).requires_grad_()
    loss = cross_entropy((z - z.mean(0)) / spread @ w.T + b, y) + 0.05 * w.square().sum()
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, (w, b)))
    scale = torch.tensor([1e3, 1.0, 1e-3], dtype=torch.float64)
    other, shift = linear_probe(z * scale, y, 2, decay=0.1)
    torch.testing.assert_close(z * scale @ other.T + shift, z @ weight.T + bias, atol=1e-5, rtol=0)
    still = torch.cat([z, torch.ones(60, 1)], 1)
    assert torch.equal(linear_probe(still, y, 2, 0.1)[0][:, 3], torch.zeros(2, dtype=torch.float64))


def test_groups_are_balanced_and_the_worst_is_found():
    groups = torch.tensor([0] * 10 + [1] * 3 + [2] * 5)
    rows = balanced(groups, torch.Generator().manual_seed(0))
    assert groups[rows].bincount().tolist() == [3, 3, 3] and len(set(rows.tolist())) == 9
    right = torch.tensor([True] * 10 + [True, False, False] + [True] * 5)
    assert by_group(right, groups) == (16 / 18, pytest.approx(1 / 3))
    with pytest.raises(BadInput, match="group 1 has no pictures"):
        balanced(torch.tensor([0, 2]), torch.Generator())


def test_spectra():
    z = normal(5000, 3) @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    torch.testing.assert_close(spectrum(z), torch.tensor([9.0, 4.0, 1.0]).double(), rtol=0.1, atol=0)
    assert effective_rank(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)


# The method


@pytest.mark.parametrize("objective", ["info-nce", "spectral", "sup-con", "cross-entropy"])
def test_every_objective_reaches_the_encoder_through_the_head(objective, pictures):
    method = ProjectionHead(**{**SMALL, "data": pictures, "objective": objective})
    seen, _, _ = method.parts()
    recipe = method.recipe(method.network(("cat", "dog")), seen)
    rng = torch.Generator().manual_seed(0)
    loss, _ = recipe.loss(recipe.batch(0, rng, 4), rng)
    loss.backward()
    reached = {name for name, p in recipe.net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("encoder.") for name in reached) and "head.0.weight" in reached
    assert not any(name.startswith("probe.") for name in reached)
    assert ("pretext.weight" in reached) == (objective == "cross-entropy")


def test_labels_of_training_are_groups_of_neighbours():
    assert grouped(torch.arange(5), 5, 2).tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(BadInput, match="cannot be put into 3 groups"):
        ProjectionHead(groups=3).network(("a", "b"))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="ratio of the largest weight"):
        ProjectionHead(span=0.5)
    for objective in ("spectral", "info-nce", "sup-con"):
        with pytest.raises(BadInput, match="micro-batches of at least 2"):
            ProjectionHead(objective=objective, batch=4, accumulate=4)
    net = ProjectionHead(**{**SMALL, "head": "reweight", "span": 100.0}).network(("a", "b"))
    assert net.head.weights[0] / net.head.weights[-1] == pytest.approx(100, rel=1e-5)


def test_a_page_holds_both_sides_of_the_head_against_each_other(pictures, tmp_path):
    method = ProjectionHead(**{**SMALL, "data": pictures, "head": "reweight"})
    folder = method.run(tmp_path / "run", progress=False)
    net = method.read(folder)
    seen, _, _ = method.parts()
    z, h, y = represented(net, seen, list(range(len(seen))), 4)
    torch.testing.assert_close(h, z * net.head.weights)
    assert (net.probe(z).argmax(1) == y).all()  # fitted in the end: six pictures, sixteen features
    first, neighbours = method.sheets(folder)
    assert {"before the head", "after the head"} <= first.told.keys() and len(neighbours.rows) == 2
    assert math.isfinite(first.told["after the head"]["effective rank"])
    ClassifierReport("projection-head", {}, {}, (first, neighbours)).write(tmp_path)
    assert (tmp_path / "index.html").read_text().count("<img") == 2 * 7
