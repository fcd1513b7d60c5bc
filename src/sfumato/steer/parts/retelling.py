"""What the conditional half of guidance is told, and a change of it on its way to the network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.pipeline import Conditioning, Text2Image
from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.steering import Forward, Interceptor, Run


def conditional(call: Call) -> Int[Tensor, "rows"]:
    """The numbers of the conditional rows; of all where there is no guidance, or none is known of."""
    n = len(call.z)
    return torch.arange(n) if call.rows is None else torch.arange(n)[call.rows.cpu()]


def heard(call: Call) -> Conditioning:
    """The conditional rows as the network is told them, with their texts, ids and roles where these are known.

    Where they are not, there are no ``prompts`` and no ``roles``, and ids are -1.
    """
    told, said = call.cond, call.said
    told = told.replace(conditional=None)[conditional(call)]
    if said is None or len(said) != len(told):
        return told
    length = told.tokens.shape[1]  # some networks are told no padding
    said = said.padded(length).part(slice(length))
    return told.replace(ids=said.ids, mask=said.mask, roles=said.roles, prompts=said.prompts)


def sections(p: Text2Image, cond: Conditioning) -> list[slice]:
    """Where each tokenizer's rows stand in a conditioning."""
    ends = list(accumulate(part.ids.shape[1] for part in p.sections(cond)))
    return [slice(*pair) for pair in zip([0, *ends[:-1]], [*ends[:-1], cond.ids.shape[1]], strict=True)]


class Retelling(Interceptor):
    """In sampling runs the network is told ``retell(cond)`` instead of ``cond``, the conditional rows of a call.

    ``retell`` gets them as `heard` has them and changes tokens, or the pooled embedding. What it made of the latest
    ones it is not asked for again.
    """

    def __init__(self, retell: Callable[[Conditioning], Conditioning]):
        self.retell = retell
        self._latest: tuple[Conditioning, Conditioning] | None = None

    def start(self, run: Run) -> None:
        _ = run.said  # while the text encoders are at hand: pipelines that offload their parts put them aside later

    def predict(self, forward: Forward, call: Call, run: Run | None) -> Tensor:
        rows = conditional(call)
        if run is None or not len(rows):
            return forward(call)
        whole, told = call.cond, self._told(heard(call))
        changes = {}
        for name in ("tokens", "pooled"):
            if (before := getattr(whole, name)) is not None:
                changes[name] = before.index_copy(0, rows.to(before.device), getattr(told, name).to(before))
        return forward(call.retold(whole.replace(**changes)))

    def _told(self, cond: Conditioning) -> Conditioning:
        if self._latest is not None and _same(self._latest[0], cond):
            return self._latest[1]
        told = self.retell(cond)
        self._latest = None if told.tokens.requires_grad else (cond, told)
        return told


def _same(a: Conditioning, b: Conditioning) -> bool:
    pairs = ((a.tokens, b.tokens), (a.pooled, b.pooled), (a.ids, b.ids))
    equal = all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
    return equal and a.prompts == b.prompts
