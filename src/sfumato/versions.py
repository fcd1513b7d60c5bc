"""The versions that decide a result, for records and protocols."""

from __future__ import annotations


def versions() -> dict[str, str]:
    """Version of this package, of Python and of the libraries that decide a result."""
    import platform
    from importlib.metadata import version

    from sfumato import __version__

    names = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    return {"sfumato": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}
