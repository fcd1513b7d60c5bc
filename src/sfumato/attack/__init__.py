"""Attacks: methods that try to bring an erased concept back, one a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("attack")
