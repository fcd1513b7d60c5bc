"""What can go wrong, in words that say what to do next."""


class SfumatoError(Exception):
    """Something failed; the message is one sentence for the user (exit status 1)."""


class BadInput(SfumatoError, ValueError):
    """What the user gave cannot be used; the message names it and says what would do (exit status 2)."""
