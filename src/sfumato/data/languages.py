"""A concept asked for in several languages: a file with a row for each, and the cases that follow from it."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import BadInput
from sfumato.foreign import reading
from sfumato.memory import require_memory

from .cases import Case

_FORM = "LANGUAGE, the concept's name in it, and any number of prompts with {concept} where the name goes"


@dataclass(frozen=True)
class Said:
    """How a concept is asked for in one language.

    Attributes:
        language: as the report calls it.
        name: the concept's name in it.
        templates: prompts with {concept} where the name goes.
    """

    language: str
    name: str
    templates: tuple[str, ...] = ("{concept}",)


def language_file(prompts: Sequence[str] | None) -> Path | None:
    """The file that stands in the place of prompts: a single one that names a file, and not the concept.

    Raises:
        BadInput: it is named as a file is, and there is none.
    """
    if not prompts or len(prompts) != 1 or "{concept}" in prompts[0]:
        return None
    path = Path(prompts[0]).expanduser()
    if path.suffix in (".txt", ".tsv", ".csv") and not path.is_file():
        raise BadInput(f"there is no file of prompts at {path}: name another, or give prompts with {{concept}}")
    return path if path.is_file() else None


def read_languages(path: str | os.PathLike) -> list[Said]:
    """The rows of a file of prompts: tab-separated, or with commas where its name ends with ``.csv``; in UTF-8.

    A row is a language, the concept's name in it, and prompts with {concept} in them (none: the name alone). Empty rows
    and those that begin with # are passed over.

    Raises:
        BadInput: no such file, a row of another form, a language twice, or no row.
    """
    path = Path(path)
    with reading(path, "prompts in several languages"), open(path, encoding="utf-8-sig", newline="") as stream:
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if path.suffix == ".csv":
            dialect = {"delimiter": ",", "strict": True}
        rows = [[cell.strip() for cell in row] for row in csv.reader(stream, **dialect)]
    found: dict[str, Said] = {}
    for number, row in enumerate(rows, 1):
        cells = [cell for cell in row if cell]
        if not cells or cells[0].startswith("#"):
            continue
        if not all(row[:2]) or len(cells) < 2 or any("{concept}" not in cell for cell in cells[2:]):
            raise BadInput(f"row {number} of {path} is not a row of prompts: give {_FORM}")
        if cells[0] in found:
            raise BadInput(f"{path} has two rows for {cells[0]!r}: put all prompts of a language into one")
        found[cells[0]] = Said(cells[0], cells[1], tuple(cells[2:]) or Said.templates)
    if not found:
        raise BadInput(f"{path} has no row: give {_FORM}")
    return list(found.values())


def language_cases(concept: str, rows: Sequence[Said], n: int, seed: int) -> list[Case]:
    """``n`` pictures in every language, one language after the other, from the same noise in each.

    Args:
        concept: what the pictures are judged by, whatever the language calls it.
    """
    require_memory(10_000 * n * len(rows), f"{n * len(rows):,} pictures")
    first, cases = seed * 100_000, []
    for said in rows:
        prompts = [template.replace("{concept}", said.name) for template in said.templates]
        cases += [Case(prompts[i % len(prompts)], first + i, (concept,), said.language) for i in range(n)]
    return cases
