"""Genotypes of GANs (arXiv:2111.15097): three cells of seven genes, how they are drawn, changed and crossed.

A gene is the number of an operation on an edge of a cell. Of a generator's cell these are two ways up and five edges;
of a discriminator's five edges and two ways down, which are both -1 where the cell keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from sfumato.errors import BadInput

Genotype: TypeAlias = tuple[tuple[int, ...], ...]
CELLS, GENES = 3, 7

NORMAL = ("none", "identity", "conv1x1", "conv3x3", "conv5x5", "dilated3x3", "dilated5x5")
UP = ("nearest", "bilinear", "transposed")
DOWN = ("average", "maximum", "conv3x3", "conv5x5", "dilated3x3", "dilated5x5")


@dataclass(frozen=True)
class Space:
    """All genotypes of one kind.

    Attributes:
        names: what each gene chooses from.
        low: the smallest value of each gene.
        needed: genes of which not all may be 0, for else a node of the cell has no input.
        tied: two genes that are -1 together.
        edges: what each gene is called.
    """

    kind: str
    names: tuple[tuple[str, ...], ...]
    low: tuple[int, ...]
    needed: tuple[tuple[int, ...], ...]
    tied: tuple[int, int] | None
    edges: tuple[str, ...]

    def values(self, gene: int) -> range:
        """What a gene may be, whatever the others are."""
        return range(self.low[gene], len(self.names[gene]))

    @property
    def size(self) -> int:
        """How many different genotypes there are."""
        free = set(range(GENES)) - {g for group in self.needed for g in group} - set(self.tied or ())
        count = math.prod(len(self.values(g)) for g in free)
        count *= math.prod(math.prod(len(self.values(g)) for g in group) - 1 for group in self.needed)
        if self.tied:
            count *= 1 + math.prod(len(self.values(g)) - 1 for g in self.tied)
        return count**CELLS

    def check(self, genotype: Sequence[Sequence[int]]) -> Genotype:
        """The genotype as tuples.

        Raises:
            BadInput: another shape, a gene out of its range, or genes that leave a node without input.
        """
        made = tuple(tuple(int(g) for g in cell) for cell in genotype)
        if len(made) != CELLS or any(len(cell) != GENES for cell in made):
            raise BadInput(f"a genotype has {CELLS} cells of {GENES} genes each, not {made}")
        for i, cell in enumerate(made):
            where = f"cell {i + 1} of the {self.kind}'s genotype"
            for gene, value in enumerate(cell):
                if value not in self.values(gene):
                    first, last = self.values(gene)[0], self.values(gene)[-1]
                    raise BadInput(f"gene {gene} of {where} must lie between {first} and {last}, got {value}")
            for group in self.needed:
                if not any(cell[g] for g in group):
                    genes = ", ".join(map(str, group))
                    raise BadInput(f"{where} disconnects the net: one of its genes {genes} must not be 0 (none)")
            if self.tied and (cell[self.tied[0]] < 0) != (cell[self.tied[1]] < 0):
                raise BadInput(f"genes {self.tied[0]} and {self.tied[1]} of {where} must be -1 together, or neither")
        return made

    def valid(self, genotype: Genotype) -> bool:
        """Whether `check` takes it."""
        try:
            self.check(genotype)
        except BadInput:
            return False
        return True

    def random(self, rng: torch.Generator) -> Genotype:
        """Each gene uniform; genes that leave a node without input are drawn again, and tied ones follow the first."""
        return tuple(self._cell(rng) for _ in range(CELLS))

    def _cell(self, rng: torch.Generator) -> tuple[int, ...]:
        cell = [self._drawn(g, rng) for g in range(GENES)]
        for group in self.needed:
            while not any(cell[g] for g in group):
                for g in group:
                    cell[g] = self._drawn(g, rng)
        return self._repaired(cell, rng)

    def _drawn(self, gene: int, rng: torch.Generator) -> int:
        values = self.values(gene)
        return values[int(torch.randint(len(values), (), generator=rng))]

    def _repaired(self, cell: list[int], rng: torch.Generator) -> tuple[int, ...]:
        """The second of the tied genes as the first wants it: -1, or drawn anew from the others."""
        if self.tied:
            first, second = self.tied
            if cell[first] < 0:
                cell[second] = -1
            elif cell[second] < 0:
                cell[second] = int(torch.randint(len(self.names[second]), (), generator=rng))
        return tuple(cell)

    def mutated(self, parent: Genotype, rng: torch.Generator) -> Genotype:
        """The parent with one gene changed (and what is tied to it): a uniform cell and place, then a uniform value
        of those that are allowed there."""
        while True:
            i, g = int(torch.randint(CELLS, (), generator=rng)), int(torch.randint(GENES, (), generator=rng))
            cell = list(parent[i])
            if self.tied and g == self.tied[1] and cell[self.tied[0]] < 0:
                continue
            cell[g] = self._drawn(g, rng)
            second = bool(self.tied) and g == self.tied[1] and cell[g] < 0
            if cell[g] == parent[i][g] or second:
                continue
            child = (*parent[:i], self._repaired(cell, rng), *parent[i + 1 :])
            if self.valid(child):
                return child

    def crossed(self, a: Genotype, b: Genotype, rng: torch.Generator) -> Genotype | None:
        """``a`` with one gene of ``b`` (tied ones together), of those that change it and may stand there; None where
        there is none."""
        children = []
        for i in range(CELLS):
            for g in range(GENES):
                cell = list(a[i])
                cell[g] = b[i][g]
                if self.tied and g in self.tied and min(cell[t] for t in self.tied) < 0:
                    for t in self.tied:
                        cell[t] = b[i][t]
                child = (*a[:i], tuple(cell), *a[i + 1 :])
                if child != a and self.valid(child):
                    children.append(child)
        return children[int(torch.randint(len(children), (), generator=rng))] if children else None

    def described(self, genotype: Genotype) -> list[str]:
        """One line a cell: edge and operation, without edges that are not there."""
        lines = []
        for i, cell in enumerate(genotype):
            on = [(e, n[v]) for e, n, v in zip(self.edges, self.names, cell, strict=True) if v >= 0 and n[v] != "none"]
            lines.append(f"cell {i + 1}: " + ", ".join(f"{edge} {name}" for edge, name in on))
        return lines


GENERATOR = Space(
    "generator", (UP, UP, *[NORMAL] * 5), (0,) * 7, ((2, 3), (4, 5, 6)), None,
    ("up0", "up1", "0>2", "1>2", "0>3", "1>3", "2>3"),
)  # fmt: skip
DISCRIMINATOR = Space(
    "discriminator", (*[NORMAL] * 5, DOWN, DOWN), (1, 0, 0, 0, 0, -1, -1), ((1, 2), (3, 4)), (5, 6),
    ("0>1", "0>2", "1>2", "1>3", "0>3", "down2", "down3"),
)  # fmt: skip

PUBLISHED: dict[str, Genotype] = {
    "generator": ((1, 1, 1, 0, 2, 3, 1), (1, 1, 0, 1, 3, 0, 5), (0, 1, 0, 3, 0, 0, 3)),
    "cifar10": ((3, 0, 3, 0, 2, 0, 0), (1, 0, 3, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
    "stl10": ((3, 0, 3, 0, 2, 0, 0), (4, 0, 4, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
    "autogan": ((3, 0, 3, 0, 2, 0, 0), (3, 0, 3, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
}
"""What the paper found (a generator, and a discriminator for each data set), and AutoGAN's discriminator."""
