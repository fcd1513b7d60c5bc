"""Customise: teach a pipeline from a few pictures."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = ()
