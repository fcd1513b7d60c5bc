"""TrAct: the first layer's weights move as if its pre-activations were what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.data.pictures import Pictures, to_tensor
from sfumato.fields import NotNegative, Positive
from sfumato.metrics.trained import described

from .parts.preactivations import TractConv2d, TractLinear, first_layer, tract_gradient, unwrap, wrap
from .parts.standard import Standardised
from .plain import Plain

__all__ = ["TrAct", "TractConv2d", "TractLinear", "first_layer", "tract_gradient", "unwrap", "wrap"]


@dataclass(frozen=True, kw_only=True)
class TrAct(Plain):
    """Any network by name, the gradient of whose first layer's weights is TrAct's.

    arXiv:2410.23970. The weights of the first layer, a linear one or a convolution, get G^T a (a^T a / b + lambda I)^-1
    for a gradient, where a are the b input rows (patches), and G the loss's gradient by the pre-activations; the
    gradients of its bias and its input, all other layers and the trained network stay as they are. `wrap` does it to a
    layer of any network. Cost: b n^2 for a matrix of n x n and n^3 for its solution, n the numbers of a patch: 27 for
    3x3, 147 for 7x7, 768 for 16x16; and at most 2^24 unfolded numbers at a time.

    A micro-batch, and a process without ``together``, has a matrix of its own, as in the authors' code, so that the
    course of training depends a little on how batches are cut; so has each call of a layer that is called twice. What
    clips or scales by the norm of all gradients sees the first layer's changed one, so nothing is clipped by default.

    Differs from the paper: systems are solved, in float64, and nothing is inverted; in place of the authors' dual form
    for fewer rows than columns stands another that is equal to it and needs the plain gradient only. ``together``, and
    dilated or grouped convolutions (a matrix for each group), are beyond it. "sgd" is Nesterov's momentum, and weight
    decay spares biases.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cifar10": {
            "size": 32, "batch": 128, "updates": 39_000, "update_rule": "sgd", "momentum": 0.9, "lr": 0.08,
            "warmup": 0, "final_lr": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "flip": True, "shift": 0.125,
            "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.201),
        },
    }  # fmt: skip
    """``cifar10``: the paper's 100 epochs of ResNet-18, but for the network."""

    damping: Positive | None = 0.1
    """lambda, in units of the input's variance: smaller is bolder; 0.2 for long runs, 0.05 for short ones. None: the
    ordinary gradient, for comparison."""
    mean: tuple[float, float, float] = (0.735, 0.74, 0.73)
    """Mean of each channel of pixels in [0, 1], which is taken from them; by default that of the sketch world."""
    std: tuple[Positive, Positive, Positive] = (0.29, 0.28, 0.26)
    """Standard deviation, which they are then divided by; the card says what mean and mean square came of both."""
    together: bool = False
    """Take a^T a over all processes."""
    clip_norm: NotNegative = 0.0

    def network(self, labels: tuple[str, ...]) -> nn.Module:
        net = Standardised(super().network(labels), self.mean, self.std)
        if self.damping is not None:
            wrap(first_layer(net.eval(), torch.zeros(1, 3, self.size, self.size))[1], self.damping, self.together)
        return net

    def figures(self, net: nn.Module, pictures: Pictures) -> dict[str, Any]:
        """Beside the usual ones: the input's mean and mean square, and the matrix's condition, bare and damped."""
        found = super().figures(net, pictures)
        rows = range(min(self.batch, len(pictures)))
        x = to_tensor([pictures.picture(row) for row in rows]).to(next(net.parameters()).device)
        seen = net.seen(x)
        found["input"] = {"mean": float(seen.mean()), "mean_square": float(seen.square().mean())}
        if self.damping is not None:
            found["condition"] = self._condition(net, x)
        return found

    def _condition(self, net: nn.Module, x: Tensor) -> dict[str, float | None]:
        _, layer = first_layer(net, x[:1])
        given: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        with torch.no_grad():
            net(x)
        hook.remove()
        values = torch.linalg.eigvalsh(layer.gram(given[0])[0]).clamp(min=0)
        least, most = float(values[0]), float(values[-1])
        bare = most / least if least > 1e-15 * most else None
        return {"bare": bare, "damped": (most + self.damping) / (least + self.damping)}

    @classmethod
    def read(cls, folder: str | Path) -> nn.Module:
        net, (_, config) = super().read(folder), described(folder)
        if isinstance(net, Standardised):
            return unwrap(net)
        return Standardised(net, config["mean"], config["std"]).eval()
