"""The graph transformer of arXiv:2303.04634: from a scene graph to a box and a class for every node."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn


def edge_attention(
    q: Float[Tensor, "node heads d"],
    k: Float[Tensor, "node heads d"],
    v: Float[Tensor, "node heads d"],
    e: Float[Tensor, "edge heads d"],
    source: Int[Tensor, "edge"],
    target: Int[Tensor, "edge"],
) -> tuple[Float[Tensor, "node heads d"], Float[Tensor, "edge heads d"]]:
    """Attention along edges j -> i that have features (arXiv:2012.09699): what nodes hear, and the edges' scores.

    s_ij = k_j * q_i / sqrt(d) * e_ij, by element; w_ij = exp(clamp(sum_d s_ij, -5, 5));
    h_i = sum_j w_ij v_j / (sum_j w_ij + 1e-6), which is 0 where no edge comes in.
    """
    score = k[source] * q[target] / q.shape[-1] ** 0.5 * e
    weight = score.sum(-1, keepdim=True).clamp(-5, 5).exp()
    said = weight * v[source]
    total = said.new_zeros(v.shape).index_add(0, target, said)
    norm = weight.new_zeros(*v.shape[:2], 1).index_add(0, target, weight)
    return total / (norm + 1e-6), score


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation over rows; of fewer than two, which have no variance, by what it has seen before."""

    def forward(self, x: Float[Tensor, "row channel"]) -> Float[Tensor, "row channel"]:
        if self.training and len(x) < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class Half(nn.Module):
    """What follows attention, for nodes or for edges: projection, residual, norm, feed-forward, residual, norm."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.drop, self.out = nn.Dropout(dropout), nn.Linear(width, width)
        self.norm1, self.norm2 = RowNorm(width), RowNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x: Float[Tensor, "row width"], said: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        x = self.norm1(x + self.out(self.drop(said)))
        return self.norm2(x + self.mlp(x))


class GraphLayer(nn.Module):
    """One layer: nodes hear along the edges, and edges take over their scores."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.e = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.nodes, self.edges = Half(width, dropout), Half(width, dropout)

    def forward(
        self,
        h: Float[Tensor, "node width"],
        e: Float[Tensor, "edge width"],
        source: Int[Tensor, "edge"],
        target: Int[Tensor, "edge"],
    ) -> tuple[Float[Tensor, "node width"], Float[Tensor, "edge width"]]:
        apart = lambda x: x.unflatten(-1, (self.heads, -1))
        told = apart(self.q(h)), apart(self.k(h)), apart(self.v(h)), apart(self.e(e))
        heard, score = edge_attention(*told, source, target)
        return self.nodes(h, heard.flatten(1)), self.edges(e, score.flatten(1))


class SceneGraphTransformer(ModelMixin, ConfigMixin):
    """Boxes and class logits of all nodes of one or more graphs, whose nodes and edges stand one after the other.

    Args:
        objects, relations: how many names of each there are.
        width, depth, heads: channels, layers, and heads of attention.
        positions: how many eigenvectors a node is told.
        dropout: in and before the layers.
        edge_features: tell the edges their relation; False: all edges are alike.
        head: "published": boxes end in a SiLU and logits in a GELU, whose least value is -0.17; "plain": boxes end in
            a sigmoid, logits in nothing.
    """

    @register_to_config
    def __init__(
        self,
        objects: int = 2,
        relations: int = 1,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        positions: int = 32,
        dropout: float = 0.1,
        edge_features: bool = True,
        head: Literal["published", "plain"] = "published",
    ):
        super().__init__()
        self.place = nn.Linear(positions, width)
        self.object = nn.Embedding(objects, width)
        self.relation: nn.Module = nn.Embedding(relations, width) if edge_features else nn.Linear(1, width)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(GraphLayer(width, heads, dropout) for _ in range(depth))
        half, quarter, plain = width // 2, width // 4, head == "plain"
        self.box = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 4),
            nn.Sigmoid() if plain else nn.SiLU(),
        )  # fmt: skip
        self.label = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, objects), nn.Identity() if plain else nn.GELU()
        )
        for layer in (*self.box, *self.label):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight)

    def forward(
        self,
        labels: Int[Tensor, "node"],
        positions: Float[Tensor, "node k"],
        source: Int[Tensor, "edge"],
        target: Int[Tensor, "edge"],
        relation: Int[Tensor, "edge"],
    ) -> tuple[Float[Tensor, "node 4"], Float[Tensor, "node objects"]]:
        """Boxes (left, top, right, bottom, in no way held to [0, 1] or in order) and class logits."""
        weight = self.place.weight
        h = self.drop(self.object(labels)) + self.place(positions.to(weight))
        e = self.relation(relation if self.config.edge_features else weight.new_ones(len(relation), 1))
        for layer in self.layers:
            h, e = layer(h, e, source, target)
        return self.box(h), self.label(h)
