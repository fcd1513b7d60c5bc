"""The publications in ``papers.bib``, which is read when somebody asks for one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("papers.bib")


@dataclass(frozen=True)
class Paper:
    """One publication: its BibTeX key, the entry as it stands in the file, and its fields without their braces."""

    key: str
    bibtex: str
    fields: Mapping[str, str]

    @property
    def arxiv(self) -> str:
        return self.fields["eprint"]

    @property
    def title(self) -> str:
        return self.fields["title"]

    def __str__(self) -> str:
        return f"arXiv:{self.arxiv} {self.title}"


@cache
def papers() -> Mapping[str, Paper]:
    """Every entry of ``papers.bib`` by its key."""
    return read(FILE.read_text(encoding="utf-8"))


def read(text: str) -> dict[str, Paper]:
    """The entries of a BibTeX file whose fields stand in braces, one to a line; what is between entries is a comment.

    Raises:
        ValueError: an entry that does not end, a line in it that is no field, a key that stands there twice.
    """
    found: dict[str, Paper] = {}
    for start in re.finditer(r"^@\w+\{([^,\s]+),\n", text, flags=re.M):
        key, (body, end, _) = start[1], text[start.end() :].partition("\n}")
        if not end or key in found:
            wrong = "stands there twice" if end else "has no closing brace on a line of its own"
            raise ValueError(f"papers.bib: {key} {wrong}")
        fields = {}
        for line in body.splitlines():
            field = re.fullmatch(r"\s*(\w+)\s*=\s*\{(.*)\},?", line)
            if field is None:
                raise ValueError(f"papers.bib: {key}: not a field in braces on one line: {line.strip()}")
            # A second pair of braces around all of it keeps a title's capitals.
            fields[field[1].lower()] = re.sub(r"^\{(.*)\}$", r"\1", field[2])
        found[key] = Paper(key, start[0] + body + end, fields)
    return found
