"""Pictures from every source, through one door: rows, captions, classes, and what is said when they are bad."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from sfumato.data import sketch
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput


def png(colour: tuple[int, int, int], side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".png").write_bytes(data)
    return folder


def parquet(path: Path, **columns: list) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    n = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [{"bytes": png((i, 0, 0)), "path": None} for i in range(n)], **columns}), path)
    return str(path)


def test_sketch_labels_are_the_object_that_the_caption_names_first():
    pictures = open_pictures("sketch", 16, count=60)
    assert pictures.label_names == sketch.OBJECTS
    named = 0
    for i in range(60):
        words = pictures.caption(i).replace(",", " ").split()
        found = [word for word in words if word in sketch.OBJECTS]
        if found:
            named += 1
            assert pictures.label_names[pictures.label(i)] == found[0]
    assert named > 50


def test_subfolders_are_classes(tmp_path):
    write(tmp_path, dog__b=png((1, 0, 0)), cat__a=png((2, 0, 0)), cat__deep__c=png((3, 0, 0)))
    pictures = open_pictures(str(tmp_path), 8)
    assert pictures.label_names == ("cat", "dog")
    assert [(pictures.picture(i)[0, 0, 0], pictures.label(i)) for i in range(3)] == [(2, 0), (3, 0), (1, 1)]


def test_a_flat_folder_has_no_classes(tmp_path):
    pictures = open_pictures(str(write(tmp_path, a=png((1, 0, 0)))), 8)
    assert pictures.label_names == () and pictures.label(0) == 0 and pictures.caption(0) == "a"


def test_parquet_labels_with_names(tmp_path):
    pictures = open_pictures(parquet(tmp_path / "a.parquet", label=[2, 0, 2], name=["cat", "dog", "cat"]), 8)
    assert pictures.label_names == ("dog", "1", "cat")
    assert [pictures.label(i) for i in range(3)] == [2, 0, 2]
    assert pictures.caption(0) == ""


def test_parquet_labels_as_words(tmp_path):
    pictures = open_pictures(parquet(tmp_path / "a.parquet", label=["dog", "cat"]), 8)
    assert pictures.label_names == ("cat", "dog") and pictures.label(0) == 1


def test_parquet_without_labels(tmp_path):
    pictures = open_pictures(parquet(tmp_path / "a.parquet", caption=["x", "y"]), 8)
    assert pictures.label_names == () and pictures.label(1) == 0 and pictures.caption(1) == "y"


def test_a_row_without_a_label_is_refused(tmp_path):
    with pytest.raises(BadInput, match="column 'label'"):
        open_pictures(parquet(tmp_path / "a.parquet", label=[0, None]), 8)
