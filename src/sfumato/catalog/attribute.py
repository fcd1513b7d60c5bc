"""Attribute: which parts made an output."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = ()
