"""A prompt for each resolution: what a pipeline's network is told at each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.pipeline import Condition, Conditioning, Model, Text2Image
from sfumato.pipeline.anatomy import Call
from sfumato.pipeline.steering import Forward, Interceptor, Run

from .calls import retold
from .chromatogram import shares

Mode = Literal["switch", "score", "embedding"]


def prompt_schedule(
    model: Model, asked: Mapping[int, Any], mode: Literal["switch", "embedding"] = "switch"
) -> Callable[[float], Condition]:
    """What to tell a model at each time so that each level gets its own prompt: ``draw(None, seeds, cond=...)``.

    Args:
        asked: level -> what is asked for at it (one thing); level m is the picture averaged over m x m elements.
        mode: "switch": that of the level with the greatest share; "embedding": embeddings mixed by the shares.

    Raises:
        BadInput: no levels; embeddings of a model that is not told texts.
    """
    if not asked or min(asked) < 1:
        raise BadInput("give a prompt for at least one level, and levels of at least 1")
    levels = tuple(asked)
    conds: list[Any] = [model.told(asked[m]) for m in levels]
    if mode == "embedding" and not all(isinstance(c, Conditioning) for c in conds):
        raise BadInput("only embeddings of texts can be mixed: use the mode 'switch' for this model")

    def at(t: float) -> Condition:
        share = shares(model.process.logsnr(float(t)), levels)
        if mode == "switch" or len(levels) == 1:
            return conds[int(share.argmax())]
        length = max(c.ids.shape[1] for c in conds)
        first, *others = [c.padded(length) for c in conds]
        mix = lambda name: sum(
            float(w) * getattr(c, name) for w, c in zip(share, (first, *others), strict=True)
        )
        mask = torch.stack([c.mask for c in (first, *others)]).any(0)
        pooled = None if first.pooled is None else mix("pooled")
        return first.replace(tokens=mix("tokens"), mask=mask, pooled=pooled)

    return at


class Composing(Interceptor):
    """Tells a pipeline's network, in the conditional rows, what the time's resolution is to show.

    Levels are those of the picture that is drawn: a smaller one that corrects it, as in upsample guidance, is told the
    same.

    Attributes:
        told: how many calls each level was given, not counting those for smaller pictures.
    """

    def __init__(self, p: Text2Image, prompts: Mapping[int, str], mode: Mode):
        self.p, self.mode = p, mode
        self.levels = (1, *prompts)
        self.conds = [p.encode(prompt) for prompt in prompts.values()]
        self.told = {str(m): 0 for m in self.levels}

    def predict(self, forward: Forward, call: Call, run: Run | None) -> Tensor:
        number = call.timestep if call.larger is None else call.larger
        time = self.p.clock.time_of(torch.as_tensor(number).cpu())
        if time.max() != time.min():
            raise BadInput("prompts by resolution need one time for all pictures of a batch")
        weights = shares(self.p.process.logsnr(float(time.max())), self.levels)
        if self.mode == "switch":
            weights = torch.nn.functional.one_hot(weights.argmax(), len(self.levels)).double()
        for m, weight in zip(self.levels, weights.tolist(), strict=True):
            self.told[str(m)] += weight > 0 and call.larger is None
        own, *others = weights.tolist()
        if own == 1:
            return forward(call)
        if self.mode == "score":
            mixed = own * forward(call)
            for weight, cond in zip(others, self.conds, strict=True):
                mixed = mixed + weight * forward(retold(call, [cond], [1.0]))
            return mixed
        return forward(retold(call, self.conds, others))
