"""What every judge of explanations promises. The verb has no method yet: a toy keeps the promise from rotting.

``run(network, pictures, labels) -> figures``: a classifier (pictures [n, 3, h, w] in [-1, 1] to logits), pictures
and their classes to figures by name, in JSON's types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import BadInput

VERB = "explain"


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """How far the logit of the class falls when the pixels that it depends on most are taken out."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"share": 0.2}
    share: float = 0.1
    seed: int = 0

    def run(self, network: nn.Module, pictures: Tensor, labels: Tensor) -> dict[str, Any]:
        if len(pictures) != len(labels):
            raise BadInput(f"give one label for each picture: got {len(labels)} for {len(pictures)}")
        x = pictures.clone().requires_grad_()
        rows = torch.arange(len(x))
        (slope,) = torch.autograd.grad(network(x)[rows, labels].sum(), x)
        flat = (slope * pictures).flatten(1)
        kept = torch.ones_like(flat).scatter(1, flat.topk(int(self.share * flat.shape[1])).indices, 0.0)
        with torch.no_grad():
            fall = network(pictures) - network(pictures * kept.view_as(pictures))
        return {"fall": float(fall[rows, labels].mean()), "pictures": len(pictures)}


TOYS = (Deletion,)


@pytest.fixture(scope="module")
def judged() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).eval().requires_grad_(False)
        return network, torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([0, 1, 0, 1])


def test_figures_of_a_network_left_as_it_was(method, judged):
    network, pictures, labels = judged
    before = [x.clone() for x in (*network.state_dict().values(), pictures)]
    told = method(**method.EXAMPLE).run(network, pictures, labels)
    assert told and json.loads(json.dumps(told, allow_nan=False)) == told
    assert all(map(torch.equal, before, (*network.state_dict().values(), pictures)))
    assert not any(x.requires_grad or x.grad is not None for x in network.parameters()) and not network.training
    torch.manual_seed(999)
    assert method(**method.EXAMPLE).run(network, pictures, labels) == told


def test_it_tells_one_network_from_another(method, judged):
    network, pictures, labels = judged
    blind = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).requires_grad_(False)
    nn.init.zeros_(blind[1].weight)
    figures = [method(**method.EXAMPLE).run(net, pictures, labels) for net in (network, blind)]
    assert figures[0] != figures[1]


def test_pictures_without_labels_are_refused(method, judged):
    with pytest.raises(BadInput, match="label"):
        method(**method.EXAMPLE).run(judged[0], judged[1], judged[2][:2])
