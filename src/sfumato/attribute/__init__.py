"""Attributions of pictures to the parts that made them, one method a file."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("attribute")
