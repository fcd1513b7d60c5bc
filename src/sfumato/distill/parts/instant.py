"""The instant variant of moment matching (arXiv:2406.04103, algorithm 3): one small step of the teacher itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.train.recipe import Gradients


def preconditioned(gradient: Tensor, square: Tensor, count: int, decay: float, eps: float) -> Tensor:
    """Lam times a gradient, Lam = 1 / (sqrt(v) + eps): Adam's scaling by the running mean of squares.

    Args:
        square: the running mean, with ``gradient`` in it already; it started from zero.
        count: gradients in it, at least 1.
        decay: of the running mean.
    """
    return gradient / ((square / (1 - decay**count)).sqrt() + eps)


def change_along(
    predict: Callable[[Mapping[str, Tensor]], Float[Tensor, "batch *dims"]],
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> Float[Tensor, "batch *dims"]:
    """J nu: by how much a prediction changes when its weights move along ``direction``; forward-mode, no gradient.

    Args:
        predict: from weights by name to the prediction.
        direction: one tensor for each of ``weights``.
    """
    primal: dict[str, Any] = {name: w.detach() for name, w in weights.items()}
    tangent = {name: direction[name].to(w) for name, w in primal.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        return torch.func.jvp(predict, (primal,), (tangent,))[1]


class Gradient:
    """nu of the instant variant: the teacher's scaled gradient on what the student makes, and what it would change.

    ``squares`` are the running means of squared gradients and their number; a checkpoint holds them.
    """

    def __init__(self, teacher: Any):
        self.network = teacher.network
        wide = lambda p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        squares = {name: wide(p) for name, p in self.network.named_parameters()}
        self.squares = nn.Module()
        self.squares._buffers.update({**squares, "count": torch.zeros((), dtype=torch.int64)})
        self.direction: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, gradients: Gradients, decay: float, eps: float) -> None:
        """nu from the mean gradient of one batch."""
        buffers: Any = self.squares._buffers
        buffers["count"] += 1
        for name, square in ((n, s) for n, s in buffers.items() if n != "count"):
            gradient = gradients.get(f"auxiliary.{name}")
            # what overflowed in half precision says nothing; what had no part in the loss has no gradient
            gradient = torch.zeros_like(square) if gradient is None else gradient.to(square).nan_to_num(0.0, 0.0, 0.0)
            square.lerp_(gradient.square(), 1 - decay)
            self.direction[name] = preconditioned(gradient, square, int(buffers["count"]), decay, eps)

    def change(self, prediction: Any) -> Tensor:
        """By how much what ``prediction()`` asks of the teacher's network changes along nu."""
        asked = _Asked(self.network)
        norms = (layer for layer in self.network.modules() if isinstance(layer, nn.GroupNorm))
        # torch's forward mode of this layer cannot take what is transposed
        whole = [layer.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),)) for layer in norms]
        weights = {f"network.{name}": p for name, p in self.network.named_parameters()}
        direction = {f"network.{name}": nu for name, nu in self.direction.items()}
        call = lambda given: torch.func.functional_call(asked, given, (prediction,))
        try:
            return change_along(call, weights, direction)
        finally:
            for hook in whole:
                hook.remove()


class _Asked(nn.Module):
    """Something that asks a network, as a module, so that torch can give the network other weights meanwhile."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, ask: Any) -> Tensor:
        return ask()
