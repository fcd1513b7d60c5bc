"""Protect: keep pictures from being learnt or edited."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = (
    Method(
        "protect", "diff-protect", "sfumato.protect.diff_protect:DiffProtect",
        ("xue2024diffprotect", "liang2023advdm", "salman2023photoguard", "liang2023mist", "gal2023textual"),
        "Small changes of pixels that move a picture's latent, so that mimics of it fail.",
        cost="100 passes of encoder (there and back) and network a picture",
        when="Pictures go public, and models on latents are to edit or learn them badly.",
        beware="Fragile: JPEG, resizing and purification undo a part, which its page measures.",
        ledger="diff-protect",
    ),
)  # fmt: skip
