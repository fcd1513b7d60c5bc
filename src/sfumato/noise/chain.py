"""The exact denoiser of a Markov chain of tokens: what samplers and schedules of tokens are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .denoiser import DiscretePrediction
from .discrete import TokenProcess, _rows, pick
from .schedule import Time


@dataclass(frozen=True, eq=False)
class ChainDenoiser:
    """p(x0_d | x_t) of sequences x0 that are a Markov chain, by the forward-backward recursion, in float64.

    Attributes:
        process: its states may be one more than the chain's, the mask.
        first: the law of the first token.
        step: the probability of the next token, rows = from.
    """

    process: TokenProcess
    first: Float[Tensor, "values"]
    step: Float[Tensor, "values values"]
    prediction: DiscretePrediction = "posterior"

    def __call__(self, x: Int[Tensor, "batch length"], t: Time, cond: Any = None) -> Tensor:
        """Cost: length times values^2 for each sequence."""
        seen = _rows(self.process.marginal(t).mT, x)[..., : len(self.first)].double()
        first, step = self.first.double(), self.step.double()
        length = x.shape[1]
        ahead, behind = [first * seen[:, 0]], [torch.ones_like(seen[:, 0])]
        for d in range(1, length):
            ahead.append(_law((ahead[-1] @ step) * seen[:, d]))
            behind.append(_law((behind[-1] * seen[:, length - d]) @ step.mT))
        law = _law(torch.stack(ahead, 1) * torch.stack(behind[::-1], 1))
        law = torch.nn.functional.pad(law, (0, self.process.states - len(self.first)))
        return self.process.convert(law, x, t, "posterior", self.prediction)

    def sample(self, n: int, length: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """Sequences of the chain."""
        uniform = torch.rand(n, length, generator=generator, dtype=torch.float64)
        tokens = [pick(self.first.double().expand(n, -1), uniform[:, 0])]
        for d in range(1, length):
            tokens.append(pick(self.step.double()[tokens[-1]], uniform[:, d]))
        return torch.stack(tokens, 1)

    def log_likelihood(self, x: Int[Tensor, "batch length"]) -> Float[Tensor, "batch"]:
        """log p(x) of clean sequences."""
        return self.first.double().log()[x[:, 0]] + self.step.double().log()[x[:, :-1], x[:, 1:]].sum(1)


def _law(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)
