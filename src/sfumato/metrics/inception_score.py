"""The Inception score (Salimans et al. 2016, arXiv:1606.03498): are pictures recognisable, and of many kinds?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput

from .moments import check_features


@dataclass(frozen=True)
class Scored:
    """Mean over splits, standard deviation over splits (divisor: the number of splits), influences of mean 0."""

    value: float
    spread: float
    influence: Float[Tensor, "n"]


def inception_score(
    logits: Float[Tensor, "n classes"], rng: torch.Generator | None = None, *, splits: int = 10
) -> Scored:
    """exp(E_x KL(p(y|x) || p(y))), the mean over ``splits`` equal parts; between 1 and the number of classes.

    p(y) is the mean of p(y|x) within each part, so small parts lower the score: give the published 50,000 pictures
    for published numbers, which use the 1008 outputs of the 2015 network without their bias.

    Args:
        logits: of the generated pictures.
        rng: shuffles the pictures first; None leaves their order.

    Raises:
        BadInput: fewer pictures than splits, or logits that are not finite.
    """
    check_features(logits)
    n = len(logits)
    if not 1 <= splits <= n:
        raise BadInput(f"an Inception score of {splits} splits needs at least {splits} pictures, not {n}")
    order = torch.arange(n) if rng is None else torch.randperm(n, generator=rng)
    scores, influence = [], torch.zeros(n, dtype=torch.float64, device=logits.device)
    for i in range(splits):
        part = order[i * n // splits : (i + 1) * n // splits].to(logits.device)
        log_p = logits[part].to(torch.float64).log_softmax(1)
        p = log_p.exp()
        # a class whose probability underflows in all of them adds 0, not 0 * log 0
        marginal = p.mean(0).clamp(min=torch.finfo(torch.float64).tiny)
        kl = (p * (log_p - marginal.log())).sum(1)
        score = kl.mean().exp()
        scores.append(score)
        influence[part] = score * (kl - kl.mean())
    found = torch.stack(scores)
    return Scored(float(found.mean()), float(found.std(correction=0)), influence)
