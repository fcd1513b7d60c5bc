"""Edits: methods that change a picture or its latent, one a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("edit")
