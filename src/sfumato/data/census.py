"""What a source of pictures holds, told without decoding them: their sizes, and a hash of the files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sfumato.errors import BadInput
from sfumato.files import sha256_of

from .base import Pictures
from .folders import pictures_in
from .shards import TarPictures
from .tables import DEFAULT, HubPictures, described, encoded, image_column, parquet_files


def files_of(source: str) -> list[Path]:
    """The files behind a source, in the order in which they are read; none for a source that is no path."""
    if source.split(",")[0].endswith(".parquet"):
        return [f for f in parquet_files(source) if f.is_file()]
    return pictures_in(Path(source)) if Path(source).is_dir() else []


def sizes_of(source: str) -> dict[tuple[int, int], list[str]]:
    """(width, height) -> the names of the pictures that have it, by their headers; empty where any size can be drawn.

    Files that are no pictures are left out here, and named when they are read.
    """
    if source == "digits":
        return {(8, 8): ["digits"]}
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, data in _headers(source):
        try:
            with Image.open(data) as image:
                sizes.setdefault(image.size, []).append(name)
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
            continue
    return sizes


def content_hash(source: str, pictures: Pictures, n: int) -> str:
    """SHA-256 of what the first ``n`` pictures are made from: the bytes of their files in order, or their pixels."""
    total = hashlib.sha256(f"{n} pictures\n".encode())
    if files := files_of(source):
        for file in files if files[0].suffix == ".parquet" else files[:n]:
            total.update(bytes.fromhex(sha256_of(file)))
    else:
        for i in range(n):
            total.update(pictures.picture(i).tobytes())
    return total.hexdigest()


def _headers(source: str) -> Iterator[tuple[str, Path | io.BytesIO]]:
    if source.startswith("hub:"):
        rows = HubPictures(source.removeprefix("hub:"), 1, "")
        yield from ((rows.row(i), _opened(rows.cell(rows.image, i))) for i in range(len(rows)))
    if source.split(",")[0].endswith(".tar"):
        samples = TarPictures(source, 1, DEFAULT)
        yield from ((samples.row(i), io.BytesIO(samples.encoded(i))) for i in range(len(samples)))
    files = files_of(source)
    for file in files:
        if file.suffix != ".parquet":
            yield file.name, file
            continue
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            column = image_column(pq.read_schema(file).names, described(pq.read_schema(files[0]).metadata), str(file))
            for batch in pq.ParquetFile(file).iter_batches(64, columns=[column]):
                yield from ((f"in {file.name}", _opened(cell)) for cell in batch.column(column).to_pylist())
        except (pa.ArrowException, OSError, KeyError, IndexError, TypeError) as error:
            raise BadInput(f"{file} cannot be read as pictures: {str(error).splitlines()[0]}") from error


def _opened(cell: Any) -> Path | io.BytesIO:
    data = encoded(cell)
    return data if isinstance(data, Path) else io.BytesIO(data or b"")
