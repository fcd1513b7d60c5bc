"""Networks of standardised pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .folder import inner


class Standardised(nn.Module):
    """A network of standardised pictures, as one from pictures in [-1, 1] to logits.

    Args:
        net: the network, which has `features`.
        mean, std: of each channel of pixels in [0, 1].
    """

    def __init__(self, net: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.net, self.standard = net, (tuple(mean), tuple(std))

    @property
    def wrapped(self) -> nn.Module:
        """The network that another library knows, or the project's own."""
        return inner(self.net)

    def seen(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """What the network sees of ``x`` in [-1, 1]."""
        mean, std = (x.new_tensor(part)[:, None, None] for part in self.standard)
        return ((x + 1) / 2 - mean) / std

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        return self.net(self.seen(x))

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """What the last layer sees."""
        return self.net.features(self.seen(x))

    def from_features(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Logits of these features."""
        return self.net.from_features(features)
