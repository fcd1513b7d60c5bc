"""Prob-PSENN: draws of prototypes, the loss's terms, three kinds of uncertainty, and answers only where sure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import MultivariateNormal

from sfumato.classify.parts.gaussians import Distributions, fitted, log_density, raw_of, scale_tril
from sfumato.classify.parts.uncertainty import of_labels, overlap, percentile, risk_coverage
from sfumato.classify.prob_psenn import Net, ProbPSENN, disturbed, loss_terms
from sfumato.errors import BadInput
from sfumato.report.classifier import ClassifierReport

SMALL = {**ProbPSENN.EXAMPLE, "updates": 4, "batch": 4}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def made(**how):
    torch.manual_seed(0)
    return ProbPSENN(**{**ProbPSENN.EXAMPLE, **how}).network(("a", "b")).double().eval()


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of each of two classes."""
    chance = np.random.default_rng(0)
    for i in range(8):
        file = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return str(tmp_path / "pictures")


@pytest.mark.parametrize("family", ["gauss_diag", "gauss_full"])
def test_distances_to_draws_have_the_moments_of_a_quadratic_form(family):
    torch.manual_seed(0)
    q, z = Distributions(2, 3, family, 1).double(), normal(4, 3)
    d = Net.distances(z, q.sample(50_000, rng()).detach())
    tril, apart = q.tril[:, 0], z[:, None] - q.mode()
    covariance = tril @ tril.mT
    mean = apart.square().sum(-1) + covariance.diagonal(dim1=1, dim2=2).sum(1)
    quadratic = torch.einsum("nki,kij,nkj->nk", apart, covariance, apart)
    variance = 2 * (covariance @ covariance).diagonal(dim1=1, dim2=2).sum(1) + 4 * quadratic
    error = (variance / d.shape[-1]).sqrt()
    assert ((d.mean(-1) - mean).abs() < 5 * error).all()
    torch.testing.assert_close(d.var(-1), variance, rtol=0.06, atol=0)


@pytest.mark.parametrize("family", ["gauss_diag", "gauss_full", "mix"])
def test_densities_are_torchs(family):
    torch.manual_seed(0)
    q, z = Distributions(2, 3, family, 2).double(), normal(5, 3)
    known = MultivariateNormal(q.mean, scale_tril=q.tril).log_prob(z[:, None, None])
    torch.testing.assert_close(log_density(z, q.mean, q.tril), known)
    share = torch.zeros(2, 1) if q.logits is None else q.logits.log_softmax(1)
    torch.testing.assert_close(q.log_prob(z), (known + share).logsumexp(-1))


def test_scales_are_triangular_positive_and_come_back():
    raw = normal(2, 6)
    tril = scale_tril(raw, 3)
    assert (tril.diagonal(dim1=1, dim2=2) > 1e-5).all() and torch.equal(tril, tril.tril())
    torch.testing.assert_close(raw_of(tril, True), raw)
    torch.testing.assert_close(raw_of(scale_tril(raw[:, :3], 3), False), raw[:, :3])


def test_distributions_are_put_on_mean_and_covariance_of_the_latents():
    z, y = normal(40, 3), torch.arange(40) % 2
    z[y == 1] = z[y == 1] @ normal(3, 3, seed=1) + 5
    for family in ("gauss_full", "gauss_diag"):
        q = Distributions(2, 3, family, 1).double()
        q.fit(z, y, 2, rng())
        for k in range(2):
            own = z[y == k]
            torch.testing.assert_close(q.mean[k, 0], own.mean(0))
            scale = q.tril[k, 0] @ q.tril[k, 0].T
            known = own.T.cov() if family == "gauss_full" else torch.diag(own.var(0, correction=0))
            torch.testing.assert_close(scale, known, atol=1e-6, rtol=1e-6)
    several = Distributions(4, 3, "mix", 2).double()
    several.fit(z, y, 2, rng())
    own = {tuple(row) for row in z[y == 1].tolist()}
    placed = {tuple(row) for j in (1, 3) for row in several.mean[j].tolist()}
    assert len(placed) == 4 and placed <= own
    assert fitted(normal(2, 3), True)[1].isfinite().all()  # two pictures, three dimensions


def test_without_spread_it_is_a_net_of_points_that_knows_no_doubt():
    net, x = made(), normal(3, 3, 16, 16).tanh()
    with torch.no_grad():
        net.prototypes.raw.copy_(raw_of(1.1e-5 * torch.eye(3, dtype=torch.float64).expand(2, 1, 3, 3), True))
        net.weight.copy_(-0.5 * torch.eye(2))
    torch.testing.assert_close(net.predict_proba(x), net.predict_modes(x), atol=1e-4, rtol=0)
    apart = torch.cdist(net.features(x), net.prototypes.mode()) ** 2
    torch.testing.assert_close(net.predict_modes(x), (-apart / 2).softmax(1))
    assert net.uncertainty(x)["epistemic"].abs().max() < 1e-6


def test_doubt_about_labels_is_never_negative_and_needs_two_draws():
    p = normal(6, 9, 4).softmax(-1)
    found = of_labels(p)
    assert (found["epistemic"] > 0).all()
    torch.testing.assert_close(found["total"], -(p.mean(1) * p.mean(1).log()).sum(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found["aleatoric"], -(p * p.log()).sum(-1).mean(1), atol=1e-6, rtol=0)
    assert torch.equal(of_labels(p[:, :1])["epistemic"], torch.zeros(6, dtype=torch.float64))


def terms(logits, log_q, y, **how):
    x = torch.zeros(len(y), 1, 2, 2, dtype=torch.float64)
    return loss_terms(logits, log_q, y, x, x + 0.5, **how)


def test_the_terms_are_those_of_the_paper():
    logits, log_q, y = normal(5, 7, 3), 3 * normal(5, 3, seed=1), torch.tensor([0, 2, 1, 1, 0])
    found = terms(logits, log_q, y, mean=normal(5, 2), logvar=normal(5, 2, seed=2))
    p = logits.softmax(-1)[torch.arange(5), :, y]
    torch.testing.assert_close(found["nll"], -p.log().mean())
    assert found["nll"] >= -p.mean(1).log().mean()
    assert found["reconstruction"] == 0.25  # a mean over pixels
    torch.testing.assert_close(found["prototypes"], (-log_q).amin(0).mean())
    own = -log_q[torch.arange(5), y]
    assert (own < -1).any() and (own > -1).any()
    torch.testing.assert_close(found["examples"], own.clamp(-1, 10_000).mean())
    scale = normal(5, 2, seed=2).mul(0.5).exp()
    encoder = torch.distributions.Normal(normal(5, 2), scale)
    known = torch.distributions.kl_divergence(encoder, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(found["kl"], known)
    twice = terms(logits, torch.cat([log_q, log_q], 1), y)
    torch.testing.assert_close(twice["examples"], found["examples"])


def test_overlap_is_one_of_equal_sets_and_none_of_far_ones():
    near = 20 + 3 * normal(30).abs()
    d = torch.stack([torch.stack([near, near, near + 500]), torch.stack([near, near + 500, near + 900])])
    found = overlap(d, torch.tensor([0, 0]), cells=2000)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-3, rtol=0)
    still = torch.ones(2, 2, 4, dtype=torch.float64)
    still[1, 1] = 2
    assert overlap(still, torch.tensor([0, 0])).tolist() == [1.0, 0.0]


def test_overlap_is_scipys_kernel_estimate():
    stats = pytest.importorskip("scipy.stats")
    d, cells = 8 + 4 * normal(2, 3, 12), 400
    found = overlap(d, torch.tensor([1, 2]), cells)
    for i, own in enumerate((1, 2)):
        best = 0.0
        for rival in {0, 1, 2} - {own}:
            edges = np.linspace(-10, d[i, rival].max() + 10, cells + 1)
            at = (edges[1:] + edges[:-1]) / 2
            least = np.minimum(*(stats.gaussian_kde(d[i, k].numpy())(at) for k in (own, rival)))
            best = max(best, float(least.sum() * (edges[1] - edges[0])))
        assert found[i].item() == pytest.approx(best, abs=1e-10)


def test_percentiles_of_training_pictures_are_even_and_missing_ones_do_not_count():
    known = normal(1, 100).abs()
    padded, which = torch.cat([known, torch.full((1, 50), -1.0)], 1), torch.zeros(100, dtype=torch.long)
    found = percentile(padded, known.T, which)
    torch.testing.assert_close(found.sort().values, torch.arange(100) / 100)


def test_the_surest_are_answered_first():
    right = torch.tensor([True, False, True, True])
    coverage, risk = risk_coverage(torch.tensor([0.1, 0.9, 0.3, 0.2]), right)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0] and risk.tolist() == [0, 0, 0, 0.25]
    net, x = made(), normal(4, 3, 16, 16).tanh()
    doubt = net.uncertainty(x)["epistemic"].sort().values
    said = net.select(x, float(doubt[1]))
    assert (said == -1).sum() == 2 and (net.select(x, math.inf) == net.predict_proba(x).argmax(1)).all()


def test_explanations_begin_with_the_prediction():
    net, x = made(prototypes=4).requires_grad_(False), normal(3, 3, 16, 16).tanh()
    for told, p in zip(net.explain(x), net.predict_proba(x), strict=True):
        assert told[0].label == p.argmax() and [e.share for e in told] == [float(p[e.label]) for e in told]
        assert told[0].distances.shape == (4,) and told[0].draws.shape == (3, 3, 16, 16)
    assert net.uncertainty(x, 8)["explanatory_overlap"].shape == (3,)


def test_pictures_are_disturbed_each_by_itself_and_stay_in_range():
    x = normal(3, 3, 8, 8).tanh()
    assert torch.equal(disturbed(x, 0.0, 0.0, rng()), x)
    light = disturbed(x, 0.1, 0.0, rng()) - x
    middle = x.abs() < 0.7
    shades = [light[i][middle[i]] for i in range(3)]
    assert all((s - s[0]).abs().max() < 1e-12 for s in shades) and len({round(float(s[0]), 6) for s in shades}) == 3
    assert disturbed(x, 1.0, 0.2, rng()).abs().max() <= 1


def test_the_autoencoder_is_trained_alone_then_distributions_are_put_on_its_latents(pictures):
    method = ProbPSENN(**{**SMALL, "data": pictures})
    seen, _, _ = method.parts()
    net = method.network(("cat", "dog"))
    recipe = method.recipe(net, seen)
    before = net.prototypes.mean.clone()
    loss, figures = recipe.loss(recipe.batch(0, rng(), 4), rng())
    assert set(figures) == {"reconstruction", "kl"}
    assert torch.autograd.grad(loss, net.prototypes.mean, allow_unused=True) == (None,)
    recipe.after_update(None, 1)
    assert torch.equal(net.prototypes.mean, before)
    recipe.after_update(None, 2)
    assert net.training and not torch.equal(net.prototypes.mean, before)
    loss, figures = recipe.loss(recipe.batch(2, rng(), 4), rng())
    assert len(figures) == 5 and torch.autograd.grad(loss, net.prototypes.raw)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("how", "wrong"),
    [({"prototypes": 2}, "2 prototypes cannot stand for 3"), ({"prototypes": 4}, "4 prototypes cannot be spread")],
)
def test_prototypes_that_do_not_fit_the_classes_are_refused(how, wrong):
    with pytest.raises(BadInput, match=wrong):
        ProbPSENN(**how).network(("a", "b", "c"))


@pytest.mark.parametrize("n", [39, 40])
def test_latents_that_span_no_volume_get_one(n):
    """Rounding may let a singular covariance's factorisation pass: its least variance is 1e-4 of the mean one."""
    for seed in range(8):
        z = torch.randn(n, 40, generator=torch.Generator().manual_seed(seed))
        _, tril = fitted(z, full=True)
        assert tril.diagonal().min() ** 2 > 0.9e-4 * z.T.cov().diagonal().mean()


def test_other_settings_that_cannot_be_are_refused(pictures):
    with pytest.raises(BadInput, match="multiple of 8, got 28"):
        ProbPSENN(size=28)
    with pytest.raises(BadInput, match="give fewer"):
        ProbPSENN(updates=5, pretrain_updates=6)
    with pytest.raises(BadInput, match="micro-batches of at least 2"):
        ProbPSENN(batch=1)
    with pytest.raises(BadInput, match="'cat' has one picture to train on"):
        ProbPSENN(**{**SMALL, "data": pictures, "held_out": 0.75}).parts()


def test_the_published_encoder_has_its_layers():
    net = ProbPSENN(grey=True).network(tuple("0123456789"))
    conv = 16 * (32 + 32 * 32 + 32 * 64 + 64 * 256) + 256 * 80 + (32 + 32 + 64 + 256 + 80) + 2 * (32 + 32 + 64 + 256)
    assert sum(p.numel() for p in net.encoder.parameters()) == conv
    assert net.decode(torch.zeros(2, 40)).shape == (2, 1, 32, 32)


def test_a_page_shows_prototypes_doubts_and_what_to_answer(pictures, tmp_path):
    method = ProbPSENN(**{**SMALL, "data": pictures})
    folder = method.run(tmp_path / "run", progress=False)
    net = method.read(folder)
    assert (net.reference >= 0).sum(1).tolist() == [3, 3]
    sheets = method.sheets(folder)
    assert [s.title for s in sheets] == ["Prototypes", "Decisions", "Doubts", "Answering only where sure"]
    ClassifierReport("prob-psenn", {}, {}, sheets).write(tmp_path)
    assert '<svg class="curve"' in (tmp_path / "index.html").read_text()
