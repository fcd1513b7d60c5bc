"""Networks by name without their last layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .networks import Timm, Wrapped, by_name


class Backbone(nn.Module):
    """A network of `by_name`, from pictures in [-1, 1] to what its last layer would see; `width` numbers each."""

    def __init__(self, name: str, size: int, widths: Sequence[int]):
        super().__init__()
        net = by_name(name, ("", " "), size, widths)
        if isinstance(net, Wrapped):
            net = Wrapped(net.wrapped.base_model)
        elif isinstance(net, Timm):
            net.wrapped.reset_classifier(0)
        else:
            net.head = nn.Identity()
        self.net = net
        training = self.training
        with torch.no_grad():
            self.width = self.eval()(torch.zeros(1, 3, size, size)).shape[1]
        self.train(training)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        return self.net.features(x)
