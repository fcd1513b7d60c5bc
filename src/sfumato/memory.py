"""The memory of this machine, asked before the work: what cannot fit is refused in a sentence."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from sfumato.errors import BadInput
from sfumato.plan import human_bytes

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total_memory() -> int:
    """Bytes that a process here may have at the most: the machine's, or those of its container."""
    found = [2**63]
    with suppress(ValueError, OSError, AttributeError):  # not everywhere
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _LIMITS:
        with suppress(ValueError, OSError):  # "max", or no such limit
            found.append(int(Path(file).read_text()))
    return min(found)


def require_memory(need: int, what: str) -> None:
    """Refuse what would take more bytes than there are.

    Args:
        need: the least that it takes.
        what: in words, in the plural.

    Raises:
        BadInput: it does not fit.
    """
    if need > (total := total_memory()):
        raise BadInput(
            f"{what} would take {human_bytes(need)} of memory at the least, and this machine has {human_bytes(total)}: "
            "ask for fewer, or for smaller ones"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says, in one of the ways of the libraries below, that memory has run out."""
    words = ("allocate memory", "out of memory", "not enough memory", "Unable to allocate", "size calculation overflow")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
