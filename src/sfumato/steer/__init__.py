"""Patches: methods that steer a live pipeline inside a block, one a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("steer")
