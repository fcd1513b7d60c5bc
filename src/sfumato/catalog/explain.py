"""Explain: judge explanations of a classifier."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = ()
