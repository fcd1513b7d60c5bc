"""Erasers: methods that take a concept out of a text-to-image pipeline, one a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("erase")
