"""What ledger entries about classifiers share: a net trained in memory, and the pictures held out from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.classify.base import Classifier, Labelling
from sfumato.data.pictures import Pictures, to_tensor
from sfumato.train.loop import Run


@dataclass(frozen=True)
class Trained:
    """A net, the pictures held out, and the training loss of every update."""

    net: nn.Module
    unseen: Pictures
    losses: list[float]

    @property
    def labels(self) -> Tensor:
        return torch.tensor([self.unseen.label(i) for i in range(len(self.unseen))])

    def pictures(self, batch: int = 100) -> Iterator[Tensor]:
        """The pictures held out, where the net is."""
        device = next(self.net.parameters()).device
        for rows in torch.arange(len(self.unseen)).split(batch):
            yield to_tensor([self.unseen.picture(i) for i in rows.tolist()]).to(device)


def trained(method: Classifier) -> Trained:
    """Train a fresh net of this method, in memory."""
    seen, unseen, _ = method.parts()
    torch.manual_seed(method.seed)
    net = method.network(tuple(seen.label_names)).train()
    losses = Run(Labelling(method, net, seen), method).fit(progress=False)["loss"]
    return Trained(net.eval(), unseen, losses)
