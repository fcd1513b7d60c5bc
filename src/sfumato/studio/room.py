"""What a studio has, for who lays it out and who serves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .jobs import Jobs


@dataclass
class Studio:
    """What the tabs work with."""

    root: Path
    """Folder of all that is made."""
    ledger: Path | None
    largest: int
    """Bytes of a file that is sent."""
    jobs: Jobs
    pages: dict[str, Path] = field(default_factory=dict)
    """Reports from elsewhere that were asked for, by the name that the browser knows them by."""
