"""Pictures in the rows of tables: Parquet files, and data sets that `datasets` loads."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np

from sfumato.errors import BadInput
from sfumato.hub import require_hub
from sfumato.memory import require_memory

from .base import Pictures, to_square
from .captions import TEXTS, first_of, text_of

IMAGE = ("image", "img")
CONDITION = ("condition", "conditioning_image")
DEFAULT = "{caption}"


class TablePictures(Pictures):
    """Rows with encoded pictures. The class is the column ``label``: words, or numbers with names.

    Names of numbers come from the table's own description, as `datasets` writes it, or from a column ``name``.

    Args:
        size: side in pixels.
        caption: the template of captions.
        columns: names of the columns.
        features: descriptions of columns in the manner of `datasets`; empty where there is none.
        source: what the table is called in complaints.

    Raises:
        BadInput: a column is missing or cannot be understood, or there are no rows.
    """

    def __init__(self, size: int, caption: str, columns: Sequence[str], features: dict[str, Any], source: str):
        self.size, self.columns, self.source = size, list(columns), source
        if not len(self):
            raise BadInput(f"{source} has no rows: give a table that holds pictures")
        self.image = image_column(columns, features, source)
        self.second = first_of(CONDITION, columns)
        self.conditions = self.second is not None
        if caption == DEFAULT and "caption" not in columns:
            told = first_of(TEXTS, columns)
            caption = f"{{{told}}}" if told else ""
        self.template, self.fields = caption, fields_of(caption)
        columns_told = ", ".join(c for c in columns if c not in (self.image, self.second))
        self.origin = f"by {caption!r}" if caption else f"none: no column of {columns_told or 'text'} is known as one"
        for field in self.fields:
            if field not in columns:
                raise BadInput(
                    f"the caption template {caption!r} names {field!r}, which is no column of {source}; "
                    f"columns: {', '.join(columns)}"
                )
        if "label" in columns:
            names = self.column("name") if "name" in columns else None
            self.labels, self.label_names = _classes(self.column("label"), names, features.get("label"), source)

    @abstractmethod
    def column(self, name: str) -> list:
        """All values of a column."""

    @abstractmethod
    def cell(self, name: str, index: int) -> Any:
        """One value; a picture as its bytes, or a dict with ``bytes`` or ``path``."""

    def row(self, index: int) -> str:
        """What row ``index`` is called in complaints."""
        return f"row {index} of {self.source}"

    def caption(self, index: int) -> str:
        """The template filled in; "" for a row that lacks one of its parts."""
        return filled(self.template, {name: self.cell(name, index) for name in self.fields}, self.row(index))

    def label(self, index: int) -> int:
        return int(self.labels[index]) if self.label_names else 0

    def picture(self, index: int) -> np.ndarray:
        return self._decode(self.image, index)

    def condition(self, index: int) -> np.ndarray:
        return self._decode(self.second, index) if self.second else super().condition(index)

    def _decode(self, name: str, index: int) -> np.ndarray:
        data = encoded(self.cell(name, index))
        if data is None:
            raise BadInput(f"{self.row(index)} holds no picture in its column {name!r}")
        return to_square(data, self.size, f"{self.row(index)}, column {name!r},")


def image_column(columns: Sequence[str], features: dict[str, Any], source: str) -> str:
    """The column of the pictures.

    Raises:
        BadInput: there is none.
    """
    described = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image"]
    if (found := first_of([*IMAGE, *described], columns)) is None:
        raise BadInput(f"{source} has no column 'image'; it has {', '.join(columns)}")
    return found


def encoded(cell: Any) -> bytes | Path | None:
    """The picture in a cell, as bytes or as its file; None where there is none."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else None)
    return cell if isinstance(cell, (bytes, Path)) else None


class ParquetPictures(TablePictures):
    """Rows of Parquet files. They are read whole, for rows are asked for in any order; memory is counted first."""

    def __init__(self, source: str, size: int, caption: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = parquet_files(source)
        missing = [str(f) for f in files if not f.exists()]
        if missing or not files:
            raise BadInput(f"no such Parquet file: {', '.join(missing) or source}")
        try:
            groups = [pq.read_metadata(f) for f in files]
            size_of = sum(m.row_group(i).total_byte_size for m in groups for i in range(m.num_row_groups))
            require_memory(size_of, f"the rows of {source}")
            tables = [pq.read_table(f) for f in files]
            self.table = pa.concat_tables(tables, promote_options="default")
        except (pa.ArrowException, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise BadInput(f"{source} cannot be read as Parquet files of one kind: {reason}") from error
        self.files, self.ends = files, np.cumsum([len(table) for table in tables])
        features = described(tables[0].schema.metadata)
        super().__init__(size, caption, self.table.column_names, features, str(files[0]))

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> list:
        return self.table[name].to_pylist()

    def cell(self, name: str, index: int) -> Any:
        return self.table[name][index].as_py()

    def row(self, index: int) -> str:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return f"row {index - (int(self.ends[file - 1]) if file else 0)} of {self.files[file]}"


def described(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What `datasets` wrote of the columns; {} where it wrote nothing that can be read."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


class HubPictures(TablePictures):
    """Rows of a data set that `datasets` loads by name or from a local folder; memory-mapped."""

    def __init__(self, source: str, size: int, caption: str):
        try:
            import datasets
        except ImportError as error:
            raise BadInput("data sets of the hub need another package: pip install datasets") from error
        if int(datasets.__version__.split(".")[0]) < 4:
            raise BadInput(
                f"datasets {datasets.__version__} would run a script that lies in a data set: pip install 'datasets>=4'"
            )
        name, *where = source.split(":")
        if not name or len(where) > 2:
            raise BadInput(f"hub:{source} names no data set: write hub:OWNER/NAME, or hub:OWNER/NAME:CONFIG:SPLIT")
        try:
            # What `save_to_disk` wrote is not what `load_dataset` reads: a dict of splits, or a single one.
            saved = any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json"))
            loaded = datasets.load_from_disk(name) if saved else _loaded(datasets, name, where[:-1])
            if isinstance(loaded, datasets.Dataset):
                loaded = {str(loaded.split or "train"): loaded}
        except BadInput:
            raise
        except Exception as error:  # whatever the network, the hub or a builder raises
            raise BadInput(f"the data set {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        splits = list(loaded)
        split = where[-1] if where else "train" if "train" in splits else splits[0]
        if split not in splits:
            raise BadInput(f"{name} has no split {split!r}; it has {', '.join(splits)}")
        rows = loaded[split]
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        self.rows, self.views = rows, {column: rows.select_columns([column]) for column in rows.column_names}
        features = json.loads(json.dumps(rows.features.to_dict(), default=str))
        super().__init__(size, caption, rows.column_names, features, f"{name} ({split})")

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list:
        return list(self.rows[name])

    def cell(self, name: str, index: int) -> Any:
        return self.views[name][index][name]


def _loaded(datasets: Any, name: str, config: Sequence[str]) -> Any:
    """`datasets.load_dataset`, but for tar files, whose .pth and .pkl members it would unpickle, which runs code.

    Raises:
        BadInput: the data set is one of tar files.
    """
    tars: list[Any] = sorted(Path(name).rglob("*.tar*")) if Path(name).is_dir() else []
    if not tars and not Path(name).exists():
        if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists():
            require_hub(name, "README.md", "dataset")
        tars = [name] if datasets.load_dataset_builder(name, *config).builder_name == "webdataset" else []
    if tars:
        raise BadInput(
            f"{name} is a data set of tar files, which can run code when `datasets` reads them: download them and give "
            "their own paths, for example FOLDER/*.tar"
        )
    return datasets.load_dataset(name, *config)


def parquet_files(source: str) -> list[Path]:
    """The files that a path, several joined by commas, or a pattern names, in the order in which they are read."""
    files: list[Path] = []
    for part in source.split(","):
        path = Path(part)
        files += sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    return files


def fields_of(template: str) -> list[str]:
    """The names in braces of a caption's template.

    Raises:
        BadInput: it is malformed.
    """
    try:
        found = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise BadInput(f"the caption template {template!r} is malformed: {error}") from error
    return sorted({re.split(r"[.\[]", field)[0] for field in found})


def filled(template: str, values: Mapping[str, Any], row: str) -> str:
    """A caption by its template; "" where one of its parts is missing.

    Raises:
        BadInput: a part is neither text nor a number, or has not the part that the template names.
    """
    told = {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)) or value is None or isinstance(value, str):
            value = text_of(value)
            if not value:
                return ""
        told[name] = value
    try:
        text = template.format(**told)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{row} does not fit the caption {template!r}: {error}") from error
    if any(isinstance(v, (bytes, Mapping)) and f"{{{k}}}" in template for k, v in told.items()):
        raise BadInput(f"{row} holds no text for the caption {template!r}: name a column of text with --caption")
    return text


def _classes(
    labels: list, names: list | None, feature: Any, source: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of every row and the names of the classes."""
    if all(isinstance(label, str) for label in labels):
        words = sorted(set(labels))
        place = {name: i for i, name in enumerate(words)}
        return np.array([place[label] for label in labels]), tuple(words)
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise BadInput(f"the column 'label' of {source} must hold a word, or a number from 0 on, in every row")
    told = feature.get("names") if isinstance(feature, dict) else None
    check_labels(labels, len(told or ()), source)
    known = dict(enumerate(told)) if told else dict(zip(labels, names, strict=True)) if names else {}
    count = max(max(labels, default=-1) + 1, len(told or ()))
    return np.array(labels), tuple(str(known.get(i, i)) for i in range(count))


def check_labels(labels: Iterable[int], named: int, source: str) -> None:
    """Class numbers are places in a list of names: one number beyond reason would make a list that fills the memory.

    Raises:
        BadInput: a number is larger than there can be classes.
    """
    labels = list(labels)
    top = max(labels, default=0)
    if top >= max(named, 10 * len(set(labels)), 10_000):
        raise BadInput(
            f"class {top} in {source}, where {len(set(labels))} different classes occur: number them from 0 on, or "
            "name them in words"
        )
