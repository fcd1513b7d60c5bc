"""Scene graphs as tensors, several of them one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .layout import laplacian_positions


@dataclass(frozen=True)
class GraphBatch:
    """Nodes and edges of one or more graphs.

    Attributes:
        labels: class of each node.
        positions: see `laplacian_positions`, before the signs.
        source, target, relation: of each edge.
        counts: nodes of each graph.
    """

    labels: Int[Tensor, "node"]
    positions: Float[Tensor, "node k"]
    source: Int[Tensor, "edge"]
    target: Int[Tensor, "edge"]
    relation: Int[Tensor, "edge"]
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        labels: Sequence[int],
        triples: Sequence[tuple[int, int, int]],
        k: int,
        directed: bool = True,
        bidirectional: int = 0,
        nodes: int = 0,
    ) -> GraphBatch:
        """One graph.

        Args:
            triples: (subject, relation, reference); an edge runs from subject to reference.
            k, directed: of the positions, see `laplacian_positions`.
            bidirectional: so many relations there are, if every edge is to have one back, whose relation's number is
                larger by that; 0: none. The positions are those of the edges there.
            nodes: at least so many; those that are added are of class 0 and have no edges.
        """
        labels = [*labels, *[0] * (nodes - len(labels))]
        source, relation, target = torch.tensor(triples, dtype=torch.long).reshape(-1, 3).T
        positions = laplacian_positions(source, target, len(labels), k, directed).float()
        if bidirectional:
            source, target = torch.cat([source, target]), torch.cat([target, source])
            relation = torch.cat([relation, relation + bidirectional])
        return cls(torch.tensor(labels), positions, source, target, relation, (len(labels),))

    @classmethod
    def cat(cls, graphs: Sequence[GraphBatch]) -> GraphBatch:
        """All graphs, whose nodes are numbered on."""
        first = torch.tensor([0, *(len(g.labels) for g in graphs)]).cumsum(0).tolist()
        moved = lambda name: torch.cat([getattr(g, name) + n for g, n in zip(graphs, first, strict=False)])
        together = lambda name: torch.cat([getattr(g, name) for g in graphs])
        return cls(
            together("labels"), together("positions"), moved("source"), moved("target"), together("relation"),
            tuple(n for g in graphs for n in g.counts),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same on another device."""
        tensors = ("labels", "positions", "source", "target", "relation")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})
