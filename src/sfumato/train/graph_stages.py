"""The two stages of pictures from scene graphs as the loop sees them: layouts, and codes that follow layouts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.data.graphs import WHOLE, Vocabulary, drawn_relations
from sfumato.nets import SceneGraphTransformer
from sfumato.nets.graph_batch import GraphBatch
from sfumato.nets.layout import signs, sorted_corners
from sfumato.pipeline import GraphModel

from . import draw
from .layouts import decayed, layout_loss, one_cycle
from .recipe import Recipe, Turn


class GraphRecipe(Recipe):
    """What both stages share: graphs in batches, and a run of the graph transformer.

    Args:
        data: pictures with graphs.
        relations: "given": the data's own; "drawn": from the boxes, anew every time.
        padding: every graph of a batch is filled up to the largest with nodes of class 0, whose box is all of the
            picture.
    """

    partial = True  # the edges of the last layer lead nowhere

    def __init__(
        self,
        layout: SceneGraphTransformer,
        vocabulary: Vocabulary,
        data: Any,
        relations: Literal["given", "drawn"] = "given",
        padding: bool = True,
        directed: bool = True,
        bidirectional: bool = False,
    ):
        self.layout, self.vocabulary, self.data = layout, vocabulary, data
        self.relations, self.padding, self.directed = relations, padding, directed
        self.more = len(vocabulary.relations) if bidirectional else 0

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Any]:
        rows = draw.integers(len(self.data), size, rng).tolist()
        graphs = [self.data.graph(i) for i in rows]
        if self.relations == "drawn":
            graphs = [type(g)(g.objects, drawn_relations(g.boxes, rng), g.boxes) for g in graphs]
        nodes = max(len(g.objects) for g in graphs) + 1 if self.padding else 0
        k: Any = self.layout.config
        made = [GraphBatch.of(*self.vocabulary.encode(g), k.positions, self.directed, self.more, nodes) for g in graphs]
        boxes = [[*g.boxes, *[WHOLE] * (n.counts[0] - len(g.objects))] for g, n in zip(graphs, made, strict=True)]
        flat = torch.tensor([box for own in boxes for box in own])
        return {"rows": torch.tensor(rows), "boxes": flat, **vars(GraphBatch.cat(made))}

    def predicted(
        self, batch: dict[str, Any], rng: torch.Generator
    ) -> tuple[Float[Tensor, "node 4"], Float[Tensor, "node objects"]]:
        """Boxes and logits of all nodes of a batch, the signs of their positions drawn with ``rng``."""
        device = self.layout.device
        named = ("labels", "positions", "source", "target", "relation")
        labels, positions, *edges = (batch[name].to(device) for name in named)
        return self.layout(labels, positions * signs(positions.shape[1], rng).to(device), *edges)

    def due(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "node 4"], Int[Tensor, "node"]]:
        """The true boxes and classes."""
        device = self.layout.device
        return batch["boxes"].to(device), batch["labels"].to(device)


class LayoutTraining(GraphRecipe):
    """Stage 1: Adam, one cycle of the rate, gradients clipped to a norm of 1."""

    name = "layout"

    def __init__(self, *args: Any, updates: int, lr: float, **options: Any):
        super().__init__(*args, **options)
        self.rate = partial(one_cycle, updates=updates, highest=lr)

    def modules(self) -> dict[str, nn.Module]:
        return {"layout": self.layout}

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return layout_loss(*self.predicted(batch, rng), *self.due(batch))

    def turns(self) -> list[Turn]:
        return [Turn(name="all", loss=self.loss, optimizer=torch.optim.Adam, lr=self.rate, clip_norm=1.0)]


class CodeTraining(GraphRecipe):
    """Stage 2 as the loop sees it: the graph transformer's turn leaves its layout to the image transformer's.

    Args:
        recipe: `TrfSG2Im`, whose settings of this stage are looked at.
        codes: of every picture.
        told: as for `GraphRecipe`, behind the graph transformer.
    """

    def __init__(self, recipe: Any, model: GraphModel, codes: Int[Tensor, "n h w"], *told: Any):
        super().__init__(model.layout, *told)
        self.recipe, self.model, self.codes, self.name = recipe, model, codes.flatten(1), recipe.name()

    def modules(self) -> dict[str, nn.Module]:
        own: dict[str, nn.Module] = {"network": self.model.network}
        return own if self.recipe.true_layout else {**own, "layout": self.model.layout}

    def turns(self) -> list[Turn]:
        r, network = self.recipe, self.model.network
        linear = {f"{name}.weight" for name, part in network.named_modules() if isinstance(part, nn.Linear)}
        layout = Turn(
            name="layout", loss=self.layout_loss, trains=("layout",), optimizer=torch.optim.Adam,
            lr=lambda step: r.joint_lr, clip_norm=0.0,
        )  # fmt: skip
        image = Turn(
            name="image", loss=self.loss, trains=("network",), optimizer=decayed(linear, network, r.weight_decay),
            lr=partial(one_cycle, updates=r.updates, highest=r.lr),
        )  # fmt: skip
        return [image] if r.true_layout else [layout, image]

    def layout_loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        boxes, logits = self.predicted(batch, rng)
        batch["layout"] = boxes.detach().float(), logits.detach().argmax(-1)
        return layout_loss(boxes, logits, *self.due(batch), stage=2, box_weight=self.recipe.box_weight)

    def loss(self, batch: dict[str, Any], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        boxes, labels = batch["layout"] if "layout" in batch else self.due(batch)
        told = self.tokens(sorted_corners(boxes.clamp(0, 1)), labels, batch["counts"], rng)
        nothing = draw.uniform(len(told), rng) < self.recipe.label_dropout
        told = torch.where(nothing.to(told.device)[:, None], self.model.code.nothing().to(told.device), told)
        loss = code_loss(self.model.network, told, self.codes[batch["rows"].cpu()].to(told.device))
        return loss, {"nats": loss.detach()}

    def tokens(
        self, boxes: Float[Tensor, "node 4"], labels: Int[Tensor, "node"], counts: tuple[int, ...], rng: torch.Generator
    ) -> Int[Tensor, "batch length"]:
        """The layouts' tokens: padded graphs are shuffled alike, as published, others each by itself."""
        if self.padding:
            order = torch.randperm(counts[0], generator=rng).to(labels.device)
            return self.model.code(boxes.unflatten(0, (len(counts), -1)), labels.unflatten(0, (len(counts), -1)), order)
        parts = zip(boxes.split(counts), labels.split(counts), strict=True)
        shuffled = lambda n: torch.randperm(n, generator=rng).to(labels.device)
        return torch.cat([self.model.code(b[None], label[None], shuffled(len(label))) for b, label in parts])

    @torch.no_grad()
    def grid(self, rng: torch.Generator, n: int = 16) -> Float[Tensor, "n 3 height width"]:
        """Pictures to look at while training lasts."""
        return self.recipe.grid(self.model, self.data, rng, n)


def code_loss(
    network: nn.Module, layout: Int[Tensor, "batch length"], codes: Int[Tensor, "batch n"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the codes, each given the layout and the codes before it (teacher-forced), in nats a code."""
    logits = network(torch.cat([layout, codes], dim=1)[:, :-1])[:, layout.shape[1] - 1 :]
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
