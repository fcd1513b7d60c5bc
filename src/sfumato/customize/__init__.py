"""Customisers: methods that teach a pipeline new words from a few pictures, one a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("customize")
