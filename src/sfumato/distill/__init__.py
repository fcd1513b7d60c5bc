"""Recipes with a teacher, one a file: from many steps to few."""

from sfumato.catalog import exports

__getattr__, __dir__ = exports("distill")
