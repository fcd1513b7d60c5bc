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
    Method(
        "edit", "grad-sam", "sfumato.edit.grad_sam:GradSAM", ("pathania2024enhancing", "barkan2021gradsam"),
        "Forms a subject in a picture and keeps its background, by masks from attention's gradients.",
        cost="two calls of the network for each mask step and subject, and two draws",
        when="To put something into a picture of a place, without training, and see where the model put it.",
        beware="Masks decide: look at them. One that covers nearly all or nothing says that the word was not found.",
        ledger="grad-sam",
    ),
)  # fmt: skip
