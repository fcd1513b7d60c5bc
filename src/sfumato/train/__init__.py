"""One training loop, and the recipes that run in it, one a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("train")
