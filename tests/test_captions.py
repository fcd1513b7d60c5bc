"""Captions come from places that are named; names pair pictures; what is left out is counted."""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato.data.captions import lines_of, text_of
from sfumato.data.pictures import open_pictures
from sfumato.data.walk import in_order, in_place
from sfumato.errors import BadInput
from sfumato.metrics.partners import partners


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))


def put(folder: Path, *names: str, kind: str | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name, kind)
    return folder


def captions(folder: Path) -> dict[str, str]:
    found = open_pictures(str(folder), 8)
    return {found.name(i): found.caption(i) for i in range(len(found))}


def test_every_place_beside_a_picture(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.jpg", "d.png")
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "b.caption").write_text("two\n")
    (tmp_path / "c.jpg.txt").write_bytes("three \u2028 lines".encode("utf-16"))
    assert captions(tmp_path) == {"a": "one", "b": "two", "c": "three \u2028 lines", "d": ""}
    assert open_pictures(str(tmp_path), 8).origin == "2 from .txt files, 1 from .caption files, 1 without"


def test_only_a_folder_without_captions_is_captioned_by_names(tmp_path):
    assert captions(put(tmp_path, "a_red-star.png")) == {"a_red-star": "a red star"}
    (put(tmp_path, "DSC_0001.png") / "a_red-star.txt").write_text("a star")
    assert captions(tmp_path) == {"DSC_0001": "", "a_red-star": "a star"}


def test_tables_in_subfolders_other_spellings_and_both_kinds(tmp_path):
    composed = "caf\u00e9.png"
    put(tmp_path, f"x/{unicodedata.normalize('NFD', composed)}", "x/b.png", "y/c.png")
    (tmp_path / "x" / "metadata.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"file_name": composed, "text": "a\u2028b"}, ensure_ascii=False).encode()
        + b"\r\n" + json.dumps({"file_name": "b.png", "text": None}).encode()
    )
    (tmp_path / "metadata.csv").write_bytes('\ufefffile_name,text\r\ny/c.png,"one, two"\r\ngone.png,x\r\n'.encode())
    with pytest.warns(UserWarning, match="1 captions that name no picture"):
        found = captions(tmp_path)
    assert sorted(found.values()) == ["", "a\u2028b", "one, two"]


def test_a_bad_line_is_named(tmp_path):
    put(tmp_path, "a.png")
    no_object = "line 2 .* no JSON object"
    for line, told in (("[1]", no_object), ("{", no_object), ('{"text": "x"}', "file_name")):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
        with pytest.raises(BadInput, match=told):
            open_pictures(str(tmp_path), 8)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (["one", "two"], "one"), ([], ""), ([None, "b"], "b"), (None, ""), (3, ""), ({"a": 1}, ""),
        (" x\ufeff ", "x"), (float("nan"), ""),
    ],
)
def test_a_caption_is_text_or_none(cell, text):
    assert text_of(cell) == text


def test_columns_of_tables(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    image = [{"bytes": stream.getvalue(), "path": None}] * 2

    def table(**columns):
        pq.write_table(pa.table({"image": image, **columns}), tmp_path / "a.parquet")
        return open_pictures(str(tmp_path / "a.parquet"), 8)

    found = table(caption=[["a", "b"], None])
    assert [found.caption(i) for i in range(2)] == ["a", ""]
    assert table(prompt=["a", "b"]).caption(1) == "b"
    assert table(words=["a", "b"]).origin == "none: no column of words is known as one"
    pq.write_table(pa.table({"image": image, "caption": ["a", None], "style": ["s", "t"]}), tmp_path / "a.parquet")
    found = open_pictures(str(tmp_path / "a.parquet"), 8, "{caption}, {style}")
    assert [found.caption(i) for i in range(2)] == ["a, s", ""]
    with pytest.raises(BadInput, match=r"class 2147483648 in .*a\.parquet, where 2 different classes occur"):
        table(label=[0, 2**31])


def test_lines_end_at_line_feeds_alone():
    assert lines_of("a\u2028b\x85c\r\nd") == ["a\u2028b\x85c", "d"]


def test_what_systems_leave_behind_is_counted_and_left_out(tmp_path):
    put(tmp_path, "a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "._a.png", "b/.hidden.png")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    with pytest.warns(UserWarning, match=r"left out of .*: 4 hidden or left by a system, 1 \.svg, which is not read"):
        assert captions(tmp_path) == {"a": "a"}


def test_every_suffix_and_linked_folders(tmp_path):
    put(tmp_path / "set", "a.tif", "b.gif", "d.bmp")
    put(tmp_path / "set", "c.jfif", kind="JPEG")
    put(tmp_path / "other", "e.png")
    os.symlink(tmp_path / "other", tmp_path / "set" / "linked")
    os.symlink(tmp_path / "set", tmp_path / "set" / "linked" / "circle")
    found = open_pictures(str(tmp_path / "set"), 8)
    assert [found.name(i) for i in range(len(found))] == ["a", "b", "c", "d", "linked/e"]
    assert all(found.picture(i).shape == (8, 8, 3) for i in range(5))


def tar(path: Path, *names: str) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    with tarfile.open(path, "w") as file:
        for name in names:
            data = stream.getvalue() if name.endswith("png") else b"7" if name.endswith("cls") else name.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def test_dotted_names_in_shards(tmp_path):
    names = [f"{key}.{suffix}" for key in ("v1.5", "v1.6", "b") for suffix in ("png", "txt", "cls")]
    found = open_pictures(tar(tmp_path / "a.tar", *names), 8)
    assert [found.name(i) for i in range(3)] == ["v1.5", "v1.6", "b"] and found.caption(0) == "v1.5.txt"
    assert [found.label(i) for i in range(3)] == [7, 7, 7]
    with pytest.warns(UserWarning, match="2 hidden or left by a system, 1 further pictures of a sample"):
        found = open_pictures(tar(tmp_path / "b.tar", "a.png", "a.mask.png", "._a.png", "__MACOSX/a.png"), 8)
    assert len(found) == 1


def test_a_shard_cut_anywhere_is_refused_or_says_all_that_it_has(tmp_path):
    whole = Path(tar(tmp_path / "a.tar", *(f"{i}.png" for i in range(4)))).read_bytes()
    end = 4 * 1024
    for cut in (512, 1024 + 100, 2 * 1024 + 300, 3 * 1024 + 511, end - 200):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(BadInput, match=r"cut\.tar cannot be read as a tar file|holds no pictures"):
            open_pictures(str(tmp_path / "cut.tar"), 8)
    (tmp_path / "cut.tar").write_bytes(whole[:end])
    assert len(open_pictures(str(tmp_path / "cut.tar"), 8)) == 4  # only the closing blocks are missing


def test_tar_data_sets_of_the_hub_are_not_unpickled(tmp_path):
    pytest.importorskip("datasets")
    tar(tmp_path / "a.tar", "a.png", "a.pth")
    with pytest.raises(BadInput, match="which can run code"):
        open_pictures(f"hub:{tmp_path}", 8)


def test_numbers_are_numbers():
    assert partners(["0", "2", "10"], ["00010", "00002", "00000"]) == [2, 1, 0]
    assert partners(["a/0", "b/0"], ["b/00", "a/00"]) == [1, 0]
    assert partners(["x/0", "x/1"], ["y/1", "y/0"]) == [1, 0]
    assert partners(["", ""], ["a", "b"]) == [0, 1]
    assert partners(["3"], ["1", "3"], some=True) == [1]


@pytest.mark.parametrize(
    ("names", "others", "told"),
    [
        (["0", "1"], ["0", "2"], "1 of the generated pictures have no partner of their name: 1;"),
        (["0"], ["0", "2"], "1 of the real pictures have no partner of their name: 2;"),
        (["0", "00"], ["0"], "two pictures go by the name 00"),
        (["0"], ["0", "00"], "two pictures go by the name 00"),
        (["", ""], ["0"], "1 real pictures do not go with 2"),
    ],
)
def test_what_has_no_partner_is_named(names, others, told):
    with pytest.raises(BadInput, match=told):
        partners(names, others)


def test_names_are_not_compared_two_by_two(monkeypatch):
    compared = []

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)

    monkeypatch.setattr("sfumato.metrics.partners.in_order", Key)
    names = [f"{i}" for i in range(300)]
    assert partners(names, names[::-1]) == list(range(300))[::-1]
    assert len(compared) < 20 * 300


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=20), st.randoms())
def test_padding_and_order_never_matter(numbers, random):
    others = [f"{n:09d}" for n in numbers]
    random.shuffle(others)
    found = partners([f"{n}" for n in numbers], others)
    assert [int(others[i]) for i in found] == numbers


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8), max_size=6))
def test_any_names_can_be_ordered(names):
    with warnings.catch_warnings():
        assert len(sorted(names, key=in_order)) == len(names)


def test_numbers_alike_but_for_zeros_keep_one_order(tmp_path):
    files = [tmp_path / name for name in ("2.png", "1.png", "01.png")]
    assert in_place(files, tmp_path) == in_place(files[::-1], tmp_path) == [files[2], files[1], files[0]]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a.png,a cat, black\n", r"line 2 of .*metadata\.csv has more cells"),
        ('\na.png,"a cat\nb.png,"a dog"\n', r"line 4 of .*metadata\.csv cannot be read"),
        ('a.png,"a cat\n', r"metadata\.csv cannot be read"),
    ],
)
def test_tables_whose_captions_would_be_cut_or_merged_are_refused(rows, told, tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows)
    with pytest.raises(BadInput, match=told):
        open_pictures(str(tmp_path), 8)


def test_empty_lines_stay_inside_of_quotes(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text('\nfile_name,text\n\na.png,"one\n\ntwo"\n\nb.png,three\n')
    assert captions(tmp_path) == {"a": "one\n\ntwo", "b": "three"}


def test_suffixes_in_capitals_have_their_companions(tmp_path):
    put(tmp_path, "a.PNG", "a.COND.PNG", "b.png", "b.cond.JPG")
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.png.Txt").write_text("two")
    assert captions(tmp_path) == {"a": "one", "b": "two"}
    found = open_pictures(str(tmp_path), 8)
    assert found.conditions and found.origin == "2 from .txt files"
    assert found.condition(0)[0, 0, 0] == len("a.COND.PNG")


def test_conditions_of_dotted_names_and_names_in_capitals_in_shards(tmp_path):
    found = open_pictures(tar(tmp_path / "a.tar", "1.1x.png", "1.1x.cond.png", "2.png", "2.COND.png"), 8)
    assert [found.name(i) for i in range(len(found))] == ["1.1x", "2"] and found.conditions
    found = open_pictures(tar(tmp_path / "b.tar", "Img.V2.png", "Img.v2.png", "C.PNG.png", "C.TXT"), 8)
    assert [found.name(i) for i in range(len(found))] == ["Img.V2", "Img.v2", "C.PNG"]


def test_what_a_shard_holds_twice_is_counted_and_links_are_followed(tmp_path):
    source = tar(tmp_path / "a.tar", "a.jpg.png", "a.png", "a.bmp", "a.png")
    with tarfile.open(source, "a") as file:
        for name, kind, target in (("b.png", tarfile.LNKTYPE, "a.png"), ("c.png", tarfile.LNKTYPE, "gone.png"),
                                   ("d.png", tarfile.SYMTYPE, "a.png")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
    with pytest.warns(UserWarning, match="3 further pictures of a sample, 2 links to what is no earlier member"):
        found = open_pictures(source, 8)
    assert [found.name(i) for i in range(len(found))] == ["a", "b"]
    assert (found.picture(1) == found.picture(0)).all()


def test_a_class_that_only_looks_like_a_number_is_a_word(tmp_path):
    with tarfile.open(tar(tmp_path / "a.tar", "a.png"), "a") as file:
        info = tarfile.TarInfo("a.cls")
        info.size = len("\u00b2".encode())
        file.addfile(info, io.BytesIO("\u00b2".encode()))
    assert open_pictures(str(tmp_path / "a.tar"), 8).label_names == ("\u00b2",)
