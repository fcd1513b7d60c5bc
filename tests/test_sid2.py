"""SiD2: the weighted loss in closed form on Gaussian data, its invariances, guidance in an interval, and a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

import sfumato as sf
from sfumato.errors import BadInput
from sfumato.noise import Cosine, GaussianProcess, Interpolated
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel
from sfumato.train.sid2 import SiD2, eps_weight, x_weight

IDEAL = Cosine(-math.inf, math.inf)
TINY = {"size": 16, "channels": (8, 16), "kinds": ("res", "transformer"), "blocks": (1,), "middle": 1, "head_dim": 8,
        "embedding": 16}  # fmt: skip
logsnrs, biases = st.floats(-20, 20), st.floats(-6, 3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(logsnrs, biases)
def test_the_two_forms_of_the_weight(logsnr, bias):
    x = torch.tensor(logsnr, dtype=torch.float64)
    assert_close(eps_weight(x, bias) * x.exp(), x_weight(x, bias), rtol=1e-12, atol=0)
    assert_close(eps_weight(x, None) * x.exp(), x_weight(x, None), rtol=1e-12, atol=0)


@given(logsnrs)
def test_a_large_bias_is_the_likelihood(logsnr):
    x = torch.tensor(logsnr, dtype=torch.float64)
    assert_close(x_weight(x, 60.0), x_weight(x, None), rtol=1e-12, atol=0)


@given(st.floats(0.02, 0.98), st.floats(-3, 3))
def test_plain_error_is_a_weight_of_sech(t, shift):
    """1 = w (-dlambda/dt) / 2 for w = sech((lambda - c) / 2) / pi under the ideal cosine moved by c."""
    slope, logsnr = IDEAL.dlogsnr_dt(t), IDEAL.logsnr(t) + shift
    weight = 1 / (math.pi * torch.cosh((logsnr - shift) / 2))
    assert_close(weight * -slope / 2, torch.ones((), dtype=torch.float64))


def gaussian(recipe: SiD2, std: float, prediction: str = "v"):
    data = GaussianMixture.isotropic(torch.zeros(1, 3, 1, 1), std)
    return data, MixtureDenoiser(recipe.process(), data, prediction)


def expected_loss(schedule, t, std: float, bias: float | None):
    """Mean over pictures of the loss at ``t`` of the true denoiser: -lambda'/2 w(lambda) c^2 SNR / (1 + c^2 SNR)."""
    logsnr = schedule.logsnr(t)
    signal = std**2 * logsnr.exp()
    return -schedule.dlogsnr_dt(t) / 2 * eps_weight(logsnr, bias) * signal / (1 + signal)


@pytest.mark.parametrize("bias", [-3.0, 0.0, None])
@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
def test_loss_of_the_true_denoiser(t, bias):
    recipe = SiD2(bias=bias or 0.0, loss_weight="elbo" if bias is None else "sigmoid")
    n, std = 20_000, 0.5
    data, truth = gaussian(recipe, std)
    x, eps = data.sample(n, torch.Generator().manual_seed(0)), normal(n, 3, 1, 1, seed=1)
    losses = recipe.loss(truth, x, torch.full((n,), t, dtype=torch.float64), eps, None)
    expected = expected_loss(recipe.process().schedule, torch.tensor(t), std, bias)
    assert losses.shape == (n,)
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(n)


@pytest.mark.parametrize("bias", [-3.0, 0.0, None])
def test_the_loss_knows_the_end_points_and_not_the_schedule(bias):
    """The integral over time is one over log-SNR: equal for every schedule between the same ends, by quadrature."""
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    integrals = [
        torch.trapezoid(expected_loss(schedule, t, 0.5, bias), t).item()
        for schedule in (Cosine(), Interpolated(Cosine(), 8, 64, 64, keep_bounds=True))
    ]
    assert integrals[0] == pytest.approx(integrals[1], rel=1e-5)
    if bias is None:  # and without a weight it is half of log(1 + c^2 SNR), between the ends
        ends = [math.log1p(0.25 * math.exp(x)) for x in (15.0, -15.0)]
        assert integrals[0] == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-5)


@settings(deadline=None, max_examples=8)
@given(st.floats(0.05, 0.95), biases, st.integers(0, 2**31))
def test_one_loss_whatever_is_predicted(t, bias, seed):
    """v, eps: the same x0, the same loss; in eps-space it is -lambda'/2 w(lambda) times the error of the noise."""
    recipe = SiD2(bias=bias)
    x, eps = normal(3, 3, 2, 2, seed=seed), normal(3, 3, 2, 2, seed=seed + 1)
    times = torch.full((3,), t, dtype=torch.float64)
    data = GaussianMixture.isotropic(torch.zeros(1, 3, 2, 2), 0.5)
    losses = [
        recipe.loss(MixtureDenoiser(recipe.process(), data, kind), x, times, eps, None) for kind in ("v", "eps", "x0")
    ]
    process = recipe.process()
    z = process.diffuse(x, times, eps)
    guess = MixtureDenoiser(process, data, "eps")(z, times)
    slope, weight = process.schedule.dlogsnr_dt(t), eps_weight(process.schedule.logsnr(t), bias)
    expected = -slope / 2 * weight * (guess - eps).square().mean((1, 2, 3))
    for loss in losses:
        assert_close(loss, expected, rtol=1e-8, atol=1e-12)


def test_plain_error_to_compare_with():
    recipe = SiD2(loss_weight="eps")
    data, truth = gaussian(recipe, 0.5)
    x, eps, t = data.sample(5, torch.Generator().manual_seed(0)), normal(5, 3, 1, 1), torch.rand(5, dtype=torch.float64)
    z = truth.process.diffuse(x, t, eps)
    guess = truth.process.convert(truth(z, t), z, t, "v", "eps")
    assert_close(recipe.loss(truth, x, t, eps, None), (guess - eps).square().mean((1, 2, 3)))


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_single_precision_holds_at_both_ends(end, prediction):
    recipe = SiD2(prediction=prediction, **TINY)
    blank = lambda z, t, cond: torch.zeros_like(z)
    blank.process, blank.prediction = recipe.process(), prediction
    x, eps, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.full((4,), end).double()
    single = recipe.loss(blank, x, t, eps, None)
    double = recipe.loss(blank, x.double(), t, eps.double(), None)
    assert single.dtype == torch.float32 and torch.isfinite(single).all()
    assert_close(single.double(), double, rtol=2e-2, atol=1e-6)


class Counting(torch.nn.Module):
    """A network that answers with its class number, and counts the rows it is given."""

    device, dtype = torch.device("cpu"), torch.float32
    rows = 0

    def forward(self, z, logsnr, labels):
        self.rows += len(z)
        return (0.1 * z + 0.05 * labels[:, None, None, None]).to(z.dtype)


def model(**defaults) -> ImageModel:
    defaults = {"sampling_steps": 10, **defaults}
    return ImageModel(Counting(), GaussianProcess(Cosine()), "v", (3, 4, 4), ("a", "b"), defaults)


def test_an_interval_that_covers_everything_is_plain_guidance():
    wide = model().draw("b", 3, cfg_scale=2.0, cfg_interval=(-20, 20))
    assert torch.equal(wide, model().draw("b", 3, cfg_scale=2.0))
    assert not torch.equal(wide, model().draw("b", 3))


def test_an_empty_interval_is_the_conditional_model_for_half_the_calls():
    empty, plain, guided = model(), model(), model()
    x = empty.draw("b", 3, cfg_scale=2.0, cfg_interval=(50, 60))
    assert torch.equal(x, plain.draw("b", 3, cfg_scale=1.0))
    guided.draw("b", 3, cfg_scale=2.0)
    assert (empty.network.rows, plain.network.rows, guided.network.rows) == (10, 10, 20)


def test_guidance_inside_the_interval_alone():
    """Steps whose log-SNR lies inside cost two rows, the others one."""
    some, process = model(), GaussianProcess(Cosine())
    some.draw("b", 3, cfg_scale=2.0, cfg_interval=(-1, 3))
    levels = process.schedule.logsnr(torch.linspace(1, 0, 11, dtype=torch.float64))[:-1]
    inside = ((levels >= -1) & (levels <= 3)).sum().item()
    assert 0 < inside < 10 and some.network.rows == 10 + inside


def test_presets_follow_the_resolution():
    bias = {name: SiD2(**p).bias for name, p in SiD2.presets.items() if name.startswith("imagenet")}
    expected = {"imagenet-128": 0.0, "imagenet-256-patch2": -1.0, "imagenet-256": -1.0, "imagenet-512": -3.0}
    assert bias == expected
    for name, preset in SiD2.presets.items():
        with torch.device("meta"):
            net = SiD2(**preset).network(10)
        assert (sum(p.numel() for p in net.parameters()) < 5e6) == name.startswith("small"), name


def test_the_schedule_of_512_pixels_is_noisier_than_the_plain_cosine():
    schedule = SiD2(**SiD2.presets["imagenet-512"]).process().schedule
    assert schedule == Interpolated(Cosine(), 32, 512, 512)
    assert_close(schedule.logsnr(1.0), torch.tensor(-15 + 2 * math.log(32 / 512)).double(), rtol=1e-6, atol=0)


def test_shapes_that_do_not_fit_are_refused_before_training():
    with pytest.raises(BadInput, match="one entry a level"):
        SiD2(**{**TINY, "kinds": ("res",)}).network(0)
    with pytest.raises(BadInput, match="bias"):
        SiD2(**{**TINY, "bias": 1000.0})
    with pytest.raises(BadInput, match="the lower first"):
        SiD2(**{**TINY, "cfg_interval": (3.0, -3.0)})


def test_a_small_run(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    recipe = SiD2(**TINY, data=str(tmp_path / "data"), updates=2, batch=2, warmup=1, cfg_interval=(-1.0, 3.0))
    recipe.run(tmp_path / "run", progress=False)
    loaded = sf.load(tmp_path / "run" / "model", "cpu")
    assert loaded.process == recipe.process() and tuple(loaded.defaults["cfg_interval"]) == (-1, 3)
    assert loaded.draw(None, [0, 1], sampling_steps=2).shape == (2, 3, 16, 16)
