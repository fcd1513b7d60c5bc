"""What can go wrong, in words that say what to do next."""

from __future__ import annotations

from collections.abc import Iterable


class SfumatoError(Exception):
    """Something failed; the message is one sentence for the user (exit status 1)."""


class BadInput(SfumatoError, ValueError):
    """What the user gave cannot be used; the message names it and says what would do (exit status 2)."""


def unknown(kind: str, word: str, known: Iterable[str]) -> BadInput:
    """The error for a ``word`` that is none of ``known``, with the nearest ones, or all when none is near."""
    import difflib

    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    return BadInput(f"unknown {kind} {word!r}: {hint}")
