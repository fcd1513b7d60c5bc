"""Judges of explanations, one method a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("explain")
