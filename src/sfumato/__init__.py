"""Train, speed up, customise, edit, erase and audit image diffusion models.

``import sfumato as sf`` loads nothing heavy: torch and diffusers come in when a name that needs them is used.
"""

from __future__ import annotations

__version__ = "0.1.0"

_ROOMS = (
    "attack", "attribute", "audit", "bench", "catalog", "classify", "customize", "data", "distill", "edit", "erase",
    "errors", "explain", "files", "ledger", "metrics", "nets", "noise", "pipeline", "protect", "report", "sample",
    "steer", "train",
)  # fmt: skip
_NAMES = {
    "load": "pipeline",
    "wrap": "pipeline",
    "Text2Image": "pipeline",
    "ImageModel": "pipeline",
    "BadInput": "errors",
}
__all__ = ["__version__", *_ROOMS, *_NAMES]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"sfumato.{name}")
    if name in _NAMES:
        return getattr(import_module(f"sfumato.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
