"""Settings that suit a model: the one place where a method's class is asked what to choose for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

from sfumato.fields import check

EMBEDDED = ("sketch", "sketch-dit")
"""Models inside the package."""
ALIKE = {"sketch-dit": "sketch"}
"""Whose presets suit a model that has none of its own: it draws the same pictures at the same size."""


def settings_for(cls: type[Any], model: Any) -> dict[str, Any]:
    """What the presets of ``cls`` say for ``model``; empty, so the class's own defaults, where they say nothing.

    Args:
        cls: a method's class, with or without ``presets``.
        model: a pipeline, or the name of an embedded model, or None.
    """
    presets = getattr(cls, "presets", {})
    return dict(presets.get(preset_for(presets, model), {}))


def preset_for(presets: Container[str], model: Any) -> str | None:
    """The one of ``presets`` that suits ``model``, as for `settings_for`; None where none is meant for it."""
    origin = model if isinstance(model, str) else getattr(model, "origin", None)
    return next((name for name in (origin, ALIKE.get(str(origin))) if name is not None and name in presets), None)


class Tuned:
    """What every method's class has: settings by name, and which of them suit a model.

    Published settings suit models a hundred times the size of an embedded one, so a method may have a preset named
    like it, for itself and for whatever was made from it.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings by name: published ones other than the defaults, and those for embedded models."""
    GRID: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Values of settings, by name, of which `sfumato bench tune` tries some; empty: there is nothing to tune."""

    def __post_init__(self) -> None:
        """Refuse settings that are not what their types say."""
        if dataclasses.is_dataclass(self):
            check(self)
        beyond = getattr(super(), "__post_init__", None)
        if beyond is not None:
            beyond()

    @classmethod
    def settings_for(cls, model: Any) -> dict[str, Any]:
        """The settings that suit ``model``: ``RECE(concepts=["star"], **RECE.settings_for(pipe)).apply(pipe)``.

        Those of the preset named like the embedded model that it is or was made from (`Text2Image.origin`), or like one
        that is `ALIKE`; none, so the class's defaults, for all others. The command line chooses by the same rule.

        Args:
            model: a pipeline, or the name of an embedded model.
        """
        return settings_for(cls, model)
