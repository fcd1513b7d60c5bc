"""Gradient projection: linear maps that learn without changing what they return for inputs of earlier tasks.

The inputs that a layer y = W x saw lie in the span of an orthonormal U. An update dW is replaced by dW (I - U U^T), so
that (W + dW) u = W u for every u of the span (arXiv:2103.09762, eq. 6). A `Projector` does so for any ``nn.Linear``
under any optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import BadInput


def grown_basis(
    basis: Float[Tensor, "width rank"], inputs: Float[Tensor, "width n"], threshold: float = 1.0
) -> Float[Tensor, "width larger"]:
    """The basis, and as many further directions as hold ``threshold`` of the energy of ``inputs`` (its columns).

    With R' = R - U U^T R and its singular values s' and left singular vectors, the first k of these are joined to U, k
    the smallest with ||U U^T R||_F^2 + sum_{i <= k} s'_i^2 >= threshold ||R||_F^2 (arXiv:2103.09762, eq. 5 and, for
    later tasks, 8 and 9); then all are orthonormalised anew. With a basis of no columns it is the first task's rule.
    Computed in float64. The published code of that paper takes one direction fewer in the first task.

    Raises:
        BadInput: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise BadInput(f"threshold must lie in (0, 1], got {threshold}: it is a share of the inputs' energy")
    u, r = basis.double(), inputs.double()
    total = r.square().sum()
    if not total > 0:
        return u
    rest = r - u @ (u.mT @ r)
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    # What is left of inputs that lie in the span is rounding, in the precision that they came in.
    noise = torch.finfo(inputs.dtype).eps * max(r.shape) * total.sqrt()
    covered = (total - rest.square().sum()) + torch.cat([values.new_zeros(1), values.square().cumsum(0)])
    short = int((covered < threshold * total * (1 - 1e-12)).sum())
    k = min(short, int((values > noise).sum()), len(u) - u.shape[1])
    return torch.linalg.qr(torch.cat([u, left[:, :k]], dim=1))[0] if k else u


def projected_update(
    update: Float[Tensor, "out width"], basis: Float[Tensor, "width rank"]
) -> Float[Tensor, "out width"]:
    """dW (I - U U^T): the update without what acts on the span of ``basis``."""
    return update - (update @ basis) @ basis.mT


class Projector:
    """Keeps what some linear layers return for the inputs that it was shown, whatever an optimiser does to them.

    Before a task: `begin`. After every step of the optimiser: `project`. After the task: `grow`, with its inputs.
    The update is projected and not only the gradient, for Adam's scaling, weight decay and momentum leave the allowed
    set; and it is the update since `begin`, so that rounding does not add up. A bias is one more column of the weight,
    whose input is always 1.

    Attributes:
        bases: the directions of the inputs of each layer, float64; none at first.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self.layers = dict(layers)
        self.bases = {name: torch.zeros(self._width(layer), 0, dtype=torch.float64) for name, layer in layers.items()}
        self.start: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """The weights that `project` measures from are the present ones."""
        self.start = {name: self._whole(layer) for name, layer in self.layers.items()}

    @torch.no_grad()
    def project(self) -> None:
        """Take out of the layers what their updates do to old inputs; layers without any are not touched."""
        for name, layer in self.layers.items():
            basis = self.bases[name].to(layer.weight.device)
            if not basis.shape[1]:
                continue
            start = self.start[name].to(layer.weight.device)
            kept = start + projected_update(self._whole(layer) - start, basis)
            layer.weight.copy_(kept[:, : layer.in_features])
            if layer.bias is not None:
                layer.bias.copy_(kept[:, -1])

    def grow(self, inputs: Mapping[str, Float[Tensor, "n width"]], threshold: float = 1.0) -> None:
        """Add what these layers saw, rows of inputs, to what is kept; see `grown_basis`."""
        for name, rows in inputs.items():
            layer = self.layers[name]
            wide = rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
            self.bases[name] = grown_basis(self.bases[name], wide.detach().mT.cpu(), threshold)

    @staticmethod
    def _width(layer: nn.Linear) -> int:
        return layer.in_features + (layer.bias is not None)

    @staticmethod
    def _whole(layer: nn.Linear) -> Tensor:
        weight = layer.weight.double()
        return weight.clone() if layer.bias is None else torch.cat([weight, layer.bias.double()[:, None]], dim=1)


@contextmanager
def inputs_of(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, list[Float[Tensor, "n width"]]]]:
    """What the layers are given while the block lasts: rows of inputs by the layer's name."""
    heard: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, rows=heard[name]: rows.append(args[0].detach().flatten(0, -2)))
        for name, layer in layers.items()
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
