"""The classifier of one task among several: real and drawn pictures in every step, and the rate by a plateau."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.data.base import Pictures, to_tensor

from . import draw
from .continual import Chosen, Drawn, seen_cross_entropy
from .recipe import Recipe, Turn

Epoch = Literal["longest", "shortest"]


class Plateau(nn.Module):
    """The rate is cut when accuracy has not risen for a while, and training ends when it has not for longer.

    Buffers, so that they belong to a checkpoint: the best accuracy, the epochs ``waited`` since, the rate's ``share``.
    """

    best: Tensor
    waited: Tensor
    share: Tensor
    real: Tensor

    def __init__(self, patience: int, stop: int, factor: float = 0.1):
        super().__init__()
        self.patience, self.stop, self.factor = patience, stop, factor
        for name, value in (("best", -1.0), ("waited", 0.0), ("share", 1.0), ("real", -1.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def told(self, accuracy: float) -> bool:
        """Note an epoch's accuracy; whether it is the best so far."""
        if accuracy > self.best:
            self.best.fill_(accuracy)
            self.waited.zero_()
            return True
        self.waited += 1
        if self.waited == self.patience:
            self.share *= self.factor
        return False

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return bool(self.waited >= self.stop)


class Course(Recipe):
    """A classifier of the classes ``seen`` so far, which starts from what it was after the task before.

    Args:
        net: from pictures in [-1, 1] to the logits of all classes that will ever come.
        real, drawn: pictures of this task's classes, and those that the diffusion model drew of older ones. A step has
            a batch of each.
        choose: real and drawn pictures whose accuracy says which weights are kept.
        changed: what chance does to training pictures.
        lr, momentum, weight_decay: of SGD.
    """

    name = "cpdm classifier"

    def __init__(
        self,
        net: nn.Module,
        real: Chosen,
        drawn: Drawn | None,
        choose: Sequence[Pictures],
        seen: Sequence[int],
        batch: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        plateau: Plateau,
        epoch: Epoch = "longest",
        changed: Callable[[Tensor, torch.Generator], Tensor] = lambda x, rng: x,
    ):
        self.net, self.real, self.drawn, self.choose, self.seen = net, real, drawn, choose, sorted(seen)
        self.lr, self.momentum, self.weight_decay, self.changed = lr, momentum, weight_decay, changed
        self.best, self.plateau = copy.deepcopy(net).requires_grad_(False), plateau
        self.epoch = epoch_of([len(real), *([len(drawn)] if drawn else [])], batch, epoch)

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.net}

    def copies(self) -> dict[str, nn.Module]:
        return {"best": self.best, "plateau": self.plateau}

    def batch(self, step: int, rng: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x, y = [], []
        for source in (self.real, self.drawn):
            if source:
                rows = draw.integers(len(source), size, rng).tolist()
                x.append(self.changed(to_tensor([source.picture(row) for row in rows]), rng))
                y += [source.label(row) for row in rows]
        return torch.cat(x), torch.tensor(y)

    def loss(self, batch: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.net.parameters()).device
        x, y = (part.to(device) for part in batch)
        return seen_cross_entropy(self.net(x).float(), y, self.seen).mean(), {}

    def turns(self) -> list[Turn]:
        make = partial(torch.optim.SGD, momentum=self.momentum, weight_decay=self.weight_decay)
        return [Turn(name="all", loss=self.loss, optimizer=make, lr=lambda _: self.lr * float(self.plateau.share))]

    def after_update(self, turn: Turn, step: int) -> None:
        if step % self.epoch:
            return
        right = [correct(self.net, source, self.seen) for source in self.choose if source]
        if self.plateau.told(torch.cat(right).double().mean().item()):
            self.plateau.real.fill_(right[0].double().mean())
            self.best.load_state_dict(self.net.state_dict())

    def enough(self, step: int) -> bool:
        return self.plateau.over


def epoch_of(lengths: Sequence[int], batch: int, which: Epoch) -> int:
    """Steps of an epoch over sources of these lengths, a batch of each a step: until the longest has been gone through
    (the others begin anew), or, as when two loaders are zipped, until the first ends."""
    steps = [-(-n // batch) for n in lengths]
    return max(steps) if which == "longest" else min(steps)


@torch.no_grad()
def logits_of(net: nn.Module, source: Pictures, batch: int = 256) -> Float[Tensor, "n classes"]:
    """The classifier's logits in evaluation mode, on the CPU; its mode is as before afterwards."""
    device, training = next(net.parameters()).device, net.training
    net.eval()
    starts = range(0, len(source), batch)
    rows = [range(first, min(first + batch, len(source))) for first in starts]
    found = [net(to_tensor([source.picture(i) for i in some]).to(device)).float().cpu() for some in rows]
    net.train(training)
    return torch.cat(found)


def labels_of(source: Pictures) -> Int[Tensor, "n"]:
    """The class numbers of all pictures."""
    return torch.tensor([source.label(i) for i in range(len(source))])


def correct(net: nn.Module, source: Pictures, seen: Sequence[int]) -> Tensor:
    """For each picture whether its class, among those in ``seen``, is the likeliest."""
    places = torch.tensor(sorted(seen))
    return places[logits_of(net, source)[:, places].argmax(1)] == labels_of(source)
