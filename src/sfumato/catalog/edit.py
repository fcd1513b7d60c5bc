"""Edit: change a picture or a latent."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = ()
