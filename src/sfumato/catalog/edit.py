"""Edit: change a picture or a latent."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "edit", "pullback", "sfumato.edit.pullback:Pullback", ("park2023understanding",),
        "Moves the latent along the directions that change the bottleneck's features most; no training.",
        cost="rank products with the Jacobian, forward and backward, 10 to 50 times; a draw for each stop",
        when="To see what a model can change about a picture, or how its latent space is bent.",
        beware="What a direction means is found out by looking; early times change all, late ones texture.",
        ledger="pullback",
    ),
)  # fmt: skip
