"""A denoiser of tokens, on the simplest process there is: the contract that discrete samplers stand on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from sfumato.noise import DiscreteDenoiser, GaussianProcess, RectifiedFlow

WORDS = 3
LAW = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@dataclass(frozen=True)
class Masking:
    """Each token is masked by time t with probability t; the mask is the last state."""

    states: int = WORDS + 1

    def diffuse(self, x, t, uniform):
        return torch.where(uniform < t, self.states - 1, x)

    def convert(self, pred, x, t, source, target):
        masked = (x == self.states - 1)[..., None]
        own = torch.nn.functional.one_hot(x, self.states).to(pred)
        posterior = {"posterior": pred, "score": pred * t / (1 - t), "rates": pred * t}[source]
        posterior = torch.where(masked, posterior * (1 - own), own)
        if target == "posterior":
            return posterior
        if target == "score":
            return torch.where(masked, posterior * (1 - t) / t, 0) + own
        return torch.where(masked, posterior / t, 0)


@dataclass(frozen=True)
class Independent:
    """The true denoiser of tokens drawn one by one from `LAW`."""

    process: Masking = Masking()
    prediction: str = "posterior"

    def __call__(self, x, t, cond=None):
        law = torch.cat([LAW, LAW.new_zeros(1)]).expand(*x.shape, self.process.states)
        return self.process.convert(law, x, t, "posterior", self.prediction)


def test_it_is_a_denoiser_of_tokens_and_a_gaussian_one_has_another_process():
    assert isinstance(Independent(), DiscreteDenoiser)
    assert not hasattr(GaussianProcess(RectifiedFlow()), "states")


@pytest.mark.parametrize("kind", ["posterior", "score", "rates"])
def test_kinds_of_prediction_say_the_same(kind):
    denoiser, x, t = Independent(prediction=kind), torch.tensor([[3, 0, 3, 2]]), 0.4
    rates = denoiser.process.convert(denoiser(x, t), x, t, kind, "rates")
    assert torch.allclose(rates[0, 0, :3], LAW / t)
    assert torch.allclose(rates.sum(-1)[x == 3], LAW.new_tensor(1 / t)), "the rate of leaving the mask"
    assert (rates[x != 3] == 0).all(), "what is not masked stays"


def test_masks_at_two_times_are_of_one_path():
    x, uniform = torch.zeros(200, dtype=torch.long), torch.rand(200, generator=torch.Generator().manual_seed(0))
    early, late = (Masking().diffuse(x, t, uniform) == WORDS for t in (0.3, 0.7))
    assert (late | ~early).all() and late.sum() > early.sum() > 0


@pytest.mark.parametrize("times", [(1.0, 0.5, 0.1), (1.0, 0.9, 0.4, 0.2, 0.1)])
def test_leaps_with_the_rates_keep_the_law_at_every_time(times):
    """Tau-leaping is exact for independent tokens: after any steps to time t a share t is masked, the rest as data."""
    denoiser, masked = Independent(prediction="rates"), torch.tensor([WORDS])
    law = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    for t, s in pairwise(times):
        jump = (t - s) * denoiser(masked, t)[0]
        law = law + law[-1] * jump - law[-1] * jump.sum() * torch.eye(4, dtype=torch.float64)[-1]
        assert torch.allclose(law, torch.cat([(1 - s) * LAW, LAW.new_tensor([s])]))
