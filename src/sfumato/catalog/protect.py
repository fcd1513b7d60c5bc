"""Protect: keep pictures from being learnt or edited."""

from __future__ import annotations

from .method import Method

METHODS: tuple[Method, ...] = ()
