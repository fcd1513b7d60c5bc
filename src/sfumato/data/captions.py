"""Captions of pictures: text from a place that is named here, or none at all.

Beside a picture: NAME.txt, NAME.caption or NAME.png.txt. In tables: ``metadata.jsonl`` and ``metadata.csv``, in any
folder, with the picture's path from there in ``file_name`` and its text in one of the columns `TEXTS`. A folder
without any of these is captioned by its pictures' names; in one that has some, a picture that none of them knows has
no caption.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import BadInput

TEXTS = ("caption", "text", "prompt", "captions", "texts", "sentences", "description")
"""Names under which captions go, the first of them that a table has."""
FILES = ("file_name", "filename", "file", "image")
BESIDE = (".txt", ".caption")
NAMES, NONE = "their names", "none"


class Captions:
    """The captions of a folder's pictures, and where they came from.

    Attributes:
        texts: a caption for each picture.
        written: the same without names of pictures.

    Args:
        folder: in which the tables lie.
        files: the pictures.

    Raises:
        BadInput: a table or a text that cannot be read.
    """

    def __init__(self, folder: Path, files: Sequence[Path]):
        told, self.strangers = _tables(folder, files)
        texts = _texts({f.parent for f in files})
        found = [_beside(f, texts) or told.get(_key(f)) for f in files]
        if any(found):
            found = [f or ("", NONE) for f in found]
        else:
            found = [(f.stem.replace("_", " ").replace("-", " "), NAMES) for f in files]
        self.texts = [text for text, _ in found]
        self.written = [text if origin != NAMES else "" for text, origin in found]
        self.origins = Counter(NONE if not text else origin for text, origin in found)

    def __str__(self) -> str:
        counts = [f"{n} from {origin}" for origin, n in self.origins.items() if origin != NONE]
        if missing := self.origins[NONE]:
            counts.append(f"{missing} without")
        return ", ".join(counts)


def text_of(value: Any) -> str:
    """A caption from a cell of a table: the text, the first of a list of texts, or "" where there is none."""
    if isinstance(value, (list, tuple)):
        value = next((v for v in value if isinstance(v, str) and v.strip()), None)
    return clean(value) if isinstance(value, str) else ""


def clean(text: str) -> str:
    """The text without byte-order marks and blanks around it."""
    return text.replace("\ufeff", "").strip()


def decode(data: bytes, name: str) -> str:
    """Text in UTF-8 (or UTF-16 with its mark), without its byte-order mark.

    Raises:
        BadInput: it is none.
    """
    try:
        kind = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        return data.decode(kind)
    except ValueError as error:
        raise BadInput(f"{name} is no text in UTF-8 ({error}): write it anew in UTF-8") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end at line feeds alone: U+2028 and U+0085 may stand inside a caption."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def first_of(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """The first of ``names`` that is a column."""
    columns = set(columns)
    return next((name for name in names if name in columns), None)


def _texts(folders: Iterable[Path]) -> dict[Path, Path]:
    """The texts of these folders, by their paths with the suffix in small letters; a.txt goes before a.TXT."""
    files = (f for folder in folders for f in folder.iterdir() if f.suffix.lower() in BESIDE and f.is_file())
    return {f.with_suffix(f.suffix.lower()): f for f in sorted(files, key=lambda f: f.suffix)}


def _beside(file: Path, texts: Mapping[Path, Path]) -> tuple[str, str] | None:
    """The text that lies beside a picture, and how it is called."""
    for name in (*(file.with_suffix(s) for s in BESIDE), *(file.with_name(file.name + s) for s in BESIDE)):
        if text := texts.get(name):
            return clean(decode(text.read_bytes(), str(text))), f"{name.suffix} files"
    return None


def _tables(folder: Path, files: Sequence[Path]) -> tuple[dict[str, tuple[str, str]], int]:
    """Captions by picture from all tables, and how many of their rows name no picture."""
    told: dict[str, tuple[str, str]] = {}
    strangers, known = 0, {_key(f) for f in files}
    places = {folder.joinpath(inside) for f in files for inside in f.relative_to(folder).parents}
    for place in sorted(places):
        for read, name in ((_csv, "metadata.csv"), (_jsonl, "metadata.jsonl")):
            if not (table := place / name).is_file():
                continue
            for row in read(table):
                file = row.get(first_of(FILES, row) or "")
                if not isinstance(file, str):
                    raise BadInput(f"{table} needs the picture's name in file_name, in every row")
                key = _key(place / file)
                strangers += key not in known
                column = first_of(TEXTS, row)
                told[key] = (text_of(row[column]) if column else "", name)
    return told, strangers


def _jsonl(table: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines_of(decode(table.read_bytes(), str(table))), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"line {number} of {table} is no JSON object with file_name and text: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"line {number} of {table} is no JSON object with file_name and text")
        yield row


def _csv(table: Path) -> Iterator[Mapping[str, Any]]:
    text = decode(table.read_bytes(), str(table)).replace("\r\n", "\n")
    above = len(text) - len(text.lstrip("\n"))
    # Lines are cut here, because the reader would cut at other separators too.
    rows = csv.DictReader((line + "\n" for line in text[above:].split("\n")), strict=True)
    line = lambda: f"line {above + rows.reader.line_num} of {table}"
    try:
        for row in rows:
            if None in row:  # under which the reader puts what the header has no column for
                raise BadInput(f"{line()} has more cells than the table has columns: put a text with commas in quotes")
            yield row
    except csv.Error as error:
        told = "close every quote, and double those inside of a text"
        raise BadInput(f"{line()} cannot be read as comma-separated values ({error}): {told}") from error


def _key(file: Path) -> str:
    """A path in one Unicode form: some systems store names decomposed."""
    return unicodedata.normalize("NFC", str(Path(file)))
