"""An audit's report: its record, its pictures, and the folder that holds both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.files import atomic_folder

from . import page
from .images import Gallery
from .schema import AuditRecord


@dataclass(frozen=True, kw_only=True)
class AuditReport(AuditRecord):
    """What ``report.json`` keeps of an audit, with the pictures for its page."""

    gallery: Gallery | None = field(default=None, repr=False, compare=False)
    """Pictures for the page, in memory only: not part of ``report.json``."""

    def save(self, folder: str | Path, gallery: Gallery | None = None, overwrite: bool = False) -> Path:
        """Write ``report.json`` and the self-contained ``index.html``: both or, on any failure, neither.

        The pictures are ``gallery``, or else the report's own.
        """
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
            (temporary / "report.json").write_text(text + "\n", encoding="utf-8")
            (temporary / "index.html").write_text(page.render(self, gallery or self.gallery), encoding="utf-8")
        return Path(folder)
