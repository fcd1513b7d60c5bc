"""Guidance and clipping: what is returned, and how often the network is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch.testing import assert_close

from noise_cases import PROCESSES, normal
from sfumato.noise import Denoiser, Prediction
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.sample import ddim, times
from sfumato.sample.guidance import Clipped, Guided

DATA = GaussianMixture.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 1.0]]), 0.5)
Z = normal(4, 2)
ONE = torch.tensor([[1.0, 0.0]]).expand(4, 2)
ALL = torch.tensor([[0.5, 0.5]]).expand(4, 2)


@dataclass
class Counting:
    """Counts calls and rows of an exact denoiser."""

    prediction: Prediction = "v"
    rows: list[int] = field(default_factory=list)
    process = PROCESSES["cosine"]

    def __call__(self, z, t, cond=None):
        self.rows.append(len(z))
        return MixtureDenoiser(self.process, DATA, self.prediction)(z, t, cond)


def test_scale_one_is_the_conditional_model_bit_for_bit():
    plain, counting = Counting(), Counting()
    assert torch.equal(Guided(counting, ONE, ALL, 1.0)(Z, 0.5), plain(Z, 0.5, ONE))
    assert counting.rows == [4]
    assert isinstance(Guided(counting, ONE, ALL, 1.0), Denoiser)


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_inside_the_interval_is_plain_guidance(scale):
    counting = Counting()
    cond, uncond = Counting()(Z, 0.5, ONE), Counting()(Z, 0.5, ALL)
    for interval in (None, (0.0, 1.0), (0.5, 0.5)):
        guided = Guided(counting, ONE, ALL, scale, interval)(Z, 0.5)
        assert_close(guided, uncond + scale * (cond - uncond), rtol=1e-12, atol=1e-12)
    assert counting.rows == [8, 8, 8]  # both in one batch


@pytest.mark.parametrize("interval, measure", [((0.6, 1.0), "t"), ((0.0, 0.4), "t"), ((1.0, 5.0), "logsnr")])
def test_outside_the_interval_is_one_conditional_call(interval, measure):
    counting = Counting()
    guided = Guided(counting, ONE, ALL, 3.0, interval, measure)(Z, 0.5)  # log-SNR 0
    assert torch.equal(guided, Counting()(Z, 0.5, ONE))
    assert counting.rows == [4]


def test_interval_in_logsnr():
    counting = Counting()
    everywhere = Guided(counting, ONE, ALL, 3.0)(Z, 0.5)
    assert torch.equal(Guided(counting, ONE, ALL, 3.0, (-0.1, 0.1), "logsnr")(Z, 0.5), everywhere)


def test_interval_with_a_time_for_every_picture():
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    counting = Counting()
    got = Guided(counting, ONE, ALL, 3.0, (0.3, 0.7))(Z, t)
    for i, time in enumerate(t.tolist()):
        one = slice(i, i + 1)
        alone = Guided(Counting(), ONE[one], ALL[one], 3.0, (0.3, 0.7))(Z[one], time)
        assert_close(got[one], alone, rtol=1e-12, atol=1e-12)
    assert counting.rows == [8]


@pytest.mark.parametrize("uncond", [None, ALL[:1]], ids=["none", "one row for all"])
def test_conditionings_that_cannot_be_joined_take_two_calls(uncond):
    counting = Counting()
    guided = Guided(counting, ONE, uncond, 3.0)(Z, 0.5)
    assert counting.rows == [4, 4]
    assert_close(guided, Guided(Counting(), ONE, ALL, 3.0)(Z, 0.5), rtol=1e-12, atol=1e-12)


def test_guidance_is_the_same_in_every_prediction():
    process = PROCESSES["cosine"]
    x0 = [
        process.convert(Guided(Counting(kind), ONE, ALL, 4.0)(Z, 0.4), Z, 0.4, kind, "x0")
        for kind in Prediction.__args__
    ]
    for other in x0[1:]:
        assert_close(other, x0[0], rtol=1e-11, atol=1e-11)


def test_calls_of_a_guided_sampler():
    counting = Counting()
    ddim(Guided(counting, ONE, ALL, 2.0, (0.25, 0.75)), Z, times.uniform(10))
    assert counting.rows == [4] * 3 + [8] * 5 + [4] * 2  # times 1.0, 0.9, ..., 0.1


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_clipping(kind):
    process = PROCESSES["cosine"]
    clipped = Clipped(Counting(), -0.3, 0.3, kind)
    x0 = process.convert(clipped(Z, 0.3), Z, 0.3, kind, "x0")
    expected = MixtureDenoiser(process, DATA)(Z, 0.3).clamp(-0.3, 0.3)
    assert (expected.abs() == 0.3).any()
    assert_close(x0, expected, rtol=1e-11, atol=1e-11)
    assert_close(Clipped(Counting(), -99, 99, kind)(Z, 0.3), Counting(kind)(Z, 0.3), rtol=1e-11, atol=1e-11)
