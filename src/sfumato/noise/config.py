"""Processes and schedules to and from plain JSON values, so that a saved model says what it was trained under."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import BadInput


def to_config(value: Any) -> Any:
    """A process or schedule as nested plain values: its class under ``"class"``, then its fields."""
    if is_dataclass(value):
        return {"class": type(value).__name__, **{f.name: to_config(getattr(value, f.name)) for f in fields(value)}}
    return list(value) if isinstance(value, tuple) else value


def from_config(config: Any) -> Any:
    """The inverse of `to_config`.

    Only the classes that `sfumato.noise` exports can be named, so a file cannot make this call anything else.

    Raises:
        BadInput: an unknown class, or fields that it does not have.
    """
    from sfumato import noise

    if isinstance(config, list):
        return tuple(config)
    if not isinstance(config, dict):
        return config
    given = {k: from_config(v) for k, v in config.items() if k != "class"}
    kind = getattr(noise, str(config.get("class")), None)
    if config.get("class") not in noise.__all__ or not is_dataclass(kind):
        raise BadInput(f"unknown noise process or schedule {config.get('class')!r}: a newer version may know it")
    try:
        return kind(**given)  # type: ignore[operator]
    except TypeError as error:
        raise BadInput(f"{config['class']} does not fit its saved settings: {error}") from error
