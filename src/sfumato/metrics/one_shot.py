"""How well a model that is shown pictures draws others like them: one-shot distances, and whether it copies.

The protocol of arXiv:2405.14857: a few pictures of a data set are shown again and again, and what is drawn is compared
with other real pictures of the data set, not with the few that were shown, since that would reward copying them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sfumato.errors import BadInput

from .frechet import frechet_distance
from .moments import check_features
from .neighbours import neighbours


@dataclass(frozen=True)
class OneShot:
    """What was drawn, against what is real and what was shown.

    Attributes:
        frechet: Fréchet distance to the real pictures (FID, where the features are Inception's).
        precision, recall: of the real pictures' and the drawn ones' neighbourhoods (arXiv:1904.06991).
        consistency: mean cosine of what was drawn with what was shown.
        diversity: mean distance (1 - cosine) between two that were drawn of the same shown picture.
        copied: the share of what was drawn that is a copy of what was shown.
    """

    frechet: float
    precision: float
    recall: float
    consistency: float
    diversity: float
    copied: float


def copies(
    drawn: Float[Tensor, "n dim"], shown: Float[Tensor, "n dim"], real: Float[Tensor, "m dim"]
) -> Bool[Tensor, "n"]:
    """Whether what was drawn lies nearer to what was shown than the real picture that is nearest to that does.

    Two different real pictures of the data are never nearer than that, so what is can only have been copied, as far as
    the features see. ``real`` must not hold the shown pictures; of a shown picture that has its duplicate in ``real``
    nothing can be a copy. Euclidean distances, in float64.
    """
    drawn, shown, real = (x.double() for x in (drawn, shown, real))
    nearest = torch.cdist(shown, real, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    return (drawn - shown).norm(dim=1) < nearest


def one_shot(
    drawn: Float[Tensor, "n dim"], shown: Float[Tensor, "n dim"], real: Float[Tensor, "m dim"], k: int = 3
) -> OneShot:
    """All figures from features of one extractor.

    Args:
        drawn: one row each.
        shown: what each was drawn of; equal rows are the same picture.
        real: other pictures of the same data, without the shown ones.
        k: neighbours that precision and recall look at.

    Raises:
        BadInput: numbers of rows that do not match, features that do not fit, too few pictures.
    """
    for features in (drawn, shown):
        check_features(features, real.shape[1])
    if len(drawn) != len(shown):
        raise BadInput(f"{len(drawn)} pictures drawn of {len(shown)} shown: give for each the one that it was drawn of")
    near = neighbours(real, drawn, k=k)
    return OneShot(
        frechet_distance(real, drawn),
        float(near.precise.double().mean()),
        float(near.recalled.double().mean()),
        float(cosine_similarity(drawn.double(), shown.double()).mean()),
        diversity(drawn, shown),
        float(copies(drawn, shown, real).double().mean()),
    )


def diversity(drawn: Float[Tensor, "n dim"], shown: Float[Tensor, "n dim"]) -> float:
    """Mean of 1 - cosine over all pairs drawn of the same shown picture, each shown picture counting alike; nan
    where none was shown twice."""
    _, of = torch.unique(shown, dim=0, return_inverse=True)
    found = []
    for i in range(int(of.max()) + 1):
        x = torch.nn.functional.normalize(drawn[of == i].double(), dim=1)
        if (n := len(x)) > 1:
            found.append(1 - float((x.sum(0).square().sum() - n) / (n * (n - 1))))
    return sum(found) / len(found) if found else float("nan")
