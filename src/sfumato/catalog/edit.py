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
    Method(
        "edit", "riemannian", "sfumato.edit.riemannian:Riemannian", ("park2023unsupervised", "park2023understanding"),
        "Moves the latent along geodesics of what pooled features say of it, and gives the contrast back.",
        cost="a backward pass for each channel, and one for each move; a draw for each stop",
        when="Large edits along one direction, or one direction for many pictures (global directions).",
        beware="Parts are reconstructed: see its page. Global directions make sense near the noise only.",
        ledger="riemannian",
    ),
)  # fmt: skip
