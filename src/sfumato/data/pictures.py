"""Where captioned pictures come from: the sketch world, a folder, or Parquet files, all through one door."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from sfumato.errors import BadInput

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Pictures(Protocol):
    """Pictures by index, with captions and classes where there are any. An index always gives the same row."""

    label_names: tuple[str, ...]
    """The names of the classes; empty when there are none."""

    def __len__(self) -> int: ...

    def caption(self, index: int) -> str:
        """The text of picture ``index``; "" when it has none."""
        ...

    def label(self, index: int) -> int:
        """The class of picture ``index``, a place in ``label_names``; 0 when there are no classes."""
        ...

    def picture(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels of picture ``index``, square, of the size that was asked for."""
        ...


def open_pictures(
    source: str, size: int, caption: str = "{caption}", seed: int = 0, count: int = 40_000
) -> Pictures:
    """Captioned pictures from ``source``.

    Args:
        source: "sketch"; a folder of pictures, each with its caption in NAME.txt beside it (or in ``metadata.jsonl``
            with ``file_name`` and ``text``); or Parquet files (a path, several joined by commas, or a pattern).
        size: side in pixels; pictures are fitted with their transparency on white.
        caption: how a Parquet row becomes a caption, e.g. "{caption}, {style} style" (names are columns).
        seed: of the sketch world.
        count: how many pictures of the sketch world.

    Raises:
        BadInput: nothing is found there, or a column or caption is missing.
    """
    if source == "sketch":
        return SketchPictures(size, seed, count)
    if source.split(",")[0].endswith(".parquet"):
        return ParquetPictures(source, size, caption)
    if Path(source).is_dir():
        return FolderPictures(Path(source), size)
    raise BadInput(f"no pictures at {source!r}: give 'sketch', a folder, or a .parquet file")


def to_square(data: bytes | Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Decode, lay transparency on white, centre-crop to a square and resize (Lanczos, antialiased).

    Raises:
        BadInput: the picture is corrupt.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
            image = file.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        name = "a picture" if isinstance(data, bytes) else str(data)
        raise BadInput(f"{name} cannot be read as a picture ({error})") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(
        image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    )


class SketchPictures:
    """``count`` pictures of the sketch world: three in four show one object, the others two or three.

    The class is the object, the one that the caption names first where there are several.
    """

    def __init__(self, size: int, seed: int, count: int):
        from sfumato.data import sketch

        self.size, self.seed, self.count = size, seed, count
        self.label_names: tuple[str, ...] = sketch.OBJECTS

    def __len__(self) -> int:
        return self.count

    def _scene(self, index: int):
        from sfumato.data import sketch

        rng = np.random.default_rng((self.seed, index))
        n = rng.choice([1, 2, 3], p=[0.76, 0.18, 0.06])
        return sketch.sample_scene(rng, n_objects=int(n)), rng

    def caption(self, index: int) -> str:
        from sfumato.data import sketch

        return sketch.caption(*self._scene(index))

    def label(self, index: int) -> int:
        scene = self._scene(index)[0]
        first = scene.relations[0][0] if scene.relations else 0
        return self.label_names.index(scene.objects[first].object)

    def picture(self, index: int) -> np.ndarray:
        from sfumato.data import sketch

        return sketch.render(self._scene(index)[0], self.size)


class ParquetPictures:
    """Rows of Parquet files with an ``image`` column (bytes, as ``datasets`` writes them); memory-mapped.

    The class is the column ``label``: words, or numbers whose names stand in a column ``name``.
    """

    def __init__(self, source: str, size: int, caption: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = []
        for part in source.split(","):
            path = Path(part)
            files += sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        missing = [str(f) for f in files if not f.exists()]
        if missing or not files:
            raise BadInput(f"no such Parquet file: {', '.join(missing) or source}")
        self.size, self.template = size, caption
        try:
            tables = [pq.read_table(f, memory_map=True) for f in files]
            self.table = pa.concat_tables(tables, promote_options="default")
        except (pa.ArrowException, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise BadInput(f"{source} cannot be read as Parquet files of one kind: {reason}") from error
        if "image" not in self.table.column_names:
            raise BadInput(f"{files[0]} has no column 'image'; it has {', '.join(self.table.column_names)}")
        if caption == "{caption}" and "caption" not in self.table.column_names:
            caption = ""
        self.labels, self.label_names = _classes(self.table)
        names = [n for n in self.table.column_names if f"{{{n}}}" in caption]
        rows = self.table.select(names).to_pylist() if names else [{}] * len(self.table)
        try:
            self.captions = [caption.format(**row) for row in rows]
        except (KeyError, IndexError) as error:
            raise BadInput(
                f"the caption template {caption!r} names {error}, which is no column of {files[0]}; "
                f"columns: {', '.join(self.table.column_names)}"
            ) from error

    def __len__(self) -> int:
        return len(self.table)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def label(self, index: int) -> int:
        return self.labels[index] if self.label_names else 0

    def picture(self, index: int) -> np.ndarray:
        cell = self.table["image"][index].as_py()
        return to_square(cell["bytes"] if isinstance(cell, dict) else cell, self.size)


def _classes(table: Any) -> tuple[list[int], tuple[str, ...]]:
    """Class of every row and the names of the classes, from the columns ``label`` and ``name``."""
    if "label" not in table.column_names:
        return [], ()
    labels = table["label"].to_pylist()
    if all(isinstance(label, str) for label in labels):
        names = tuple(sorted(set(labels)))
        place = {name: i for i, name in enumerate(names)}
        return [place[label] for label in labels], names
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise BadInput("the column 'label' must hold a word, or a number from 0 on, in every row")
    known = dict(zip(labels, table["name"].to_pylist(), strict=True)) if "name" in table.column_names else {}
    return labels, tuple(str(known.get(i, i)) for i in range(max(labels, default=-1) + 1))


class FolderPictures:
    """Pictures of a folder, in name order. When all of them lie in subfolders, those are the classes."""

    def __init__(self, folder: Path, size: int):
        self.size = size
        self.files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not self.files:
            raise BadInput(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        table = folder / "metadata.jsonl"
        texts = {}
        if table.exists():
            try:
                rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
                texts = {folder / row["file_name"]: row["text"] for row in rows}
            except (ValueError, LookupError, TypeError) as error:
                raise BadInput(f"{table} needs one JSON object a line, with file_name and text: {error}") from error
        self.captions = [texts.get(f) or self._beside(f) for f in self.files]
        parts = [f.relative_to(folder).parts for f in self.files]
        self.label_names = tuple(sorted({p[0] for p in parts})) if all(len(p) > 1 for p in parts) else ()
        place = {name: i for i, name in enumerate(self.label_names)}
        self.labels = [place.get(p[0], 0) for p in parts]

    @staticmethod
    def _beside(file: Path) -> str:
        text = file.with_suffix(".txt")
        return text.read_text().strip() if text.exists() else file.stem.replace("_", " ").replace("-", " ")

    def __len__(self) -> int:
        return len(self.files)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def label(self, index: int) -> int:
        return self.labels[index]

    def picture(self, index: int) -> np.ndarray:
        return to_square(self.files[index], self.size)


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures (height, width, 3) -> float (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
