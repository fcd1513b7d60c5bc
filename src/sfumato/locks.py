"""Locks on folders, held while a process lives, where the system and its file system have them."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

NO_LOCKS = -1
"""In place of a lock where the system or its file system has none."""


def lock_folder(folder: Path) -> int | None:
    """An open descriptor that locks ``folder`` while its process lives, None if another holds it, or `NO_LOCKS`."""
    if fcntl is None:
        return NO_LOCKS
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None if isinstance(error, BlockingIOError) else NO_LOCKS
    return descriptor


def unlock(lock: int | None) -> None:
    """Let go of what `lock_folder` returned."""
    if lock is not None and lock != NO_LOCKS:
        os.close(lock)
