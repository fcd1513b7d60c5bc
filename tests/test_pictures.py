"""Pictures from every source, through one door: rows, captions, classes, and what is said when they are bad."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import shared_data
from sfumato.data import sketch
from sfumato.data.pictures import open_pictures, to_square
from sfumato.data.shards import shards_of
from sfumato.errors import BadInput


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SFUMATO_CACHE", str(folder))
    return folder


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


def test_labels_of_scenes_are_the_object_that_the_plain_caption_names_first():
    pictures = open_pictures("sketch-scenes", 16, count=60)
    for i in range(60):
        words = sketch.caption(pictures.scene(i), np.random.default_rng(0)).replace(",", " ").split()
        found = [word for word in words if word in sketch.OBJECTS]
        assert pictures.label_names[pictures.label(i)] == (found[0] if found else sketch.OBJECTS[0])


def test_subfolders_are_classes(tmp_path):
    write(tmp_path, dog__b=png((1, 0, 0)), cat__a=png((2, 0, 0)), cat__deep__c=png((3, 0, 0)))
    pictures = open_pictures(str(tmp_path), 8)
    assert pictures.label_names == ("cat", "dog")
    assert [(pictures.picture(i)[0, 0, 0], pictures.label(i)) for i in range(3)] == [(2, 0), (3, 0), (1, 1)]


def test_a_flat_folder_has_no_classes(tmp_path):
    pictures = open_pictures(str(write(tmp_path, a=png((1, 0, 0)))), 8)
    assert pictures.label_names == () and pictures.label(0) == 0 and pictures.caption(0) == "a"


def test_the_contact_sheet_of_a_sample_is_no_picture_of_it(tmp_path):
    for name in ("000-a-red-star-seed0.png", "sheet.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(open_pictures(str(tmp_path), 8)) == 2  # somebody's picture may bear that name
    (tmp_path / "sample.json").write_text("{}")
    assert len(open_pictures(str(tmp_path), 8)) == 1


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


def test_labels_named_by_the_table_itself(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"img": {"_type": "Image"}, "label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"img": [{"bytes": png((9, 0, 0)), "path": None}], "label": [1]})
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    pictures = open_pictures(str(tmp_path / "a.parquet"), 8)
    assert pictures.label_names == ("cat", "dog", "eel") and pictures.label(0) == 1
    assert pictures.picture(0)[0, 0, 0] == 9


def test_captions_by_template(tmp_path):
    source = parquet(tmp_path / "a.parquet", caption=["x", "y"], style=["flat", "chalk"])
    assert open_pictures(source, 8, "{caption}, {style}").caption(1) == "y, chalk"
    for template, told in (("{colour}", "'colour', which is no column of"), ("{", "malformed")):
        with pytest.raises(BadInput, match=told):
            open_pictures(source, 8, template)


def test_several_parquet_files_and_the_name_of_a_bad_row(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, data in (("a", [png((1, 0, 0)), png((2, 0, 0))]), ("b", [png((3, 0, 0)), b"no picture"])):
        pq.write_table(pa.table({"image": data}), tmp_path / f"{name}.parquet")
    for source in (f"{tmp_path}/*.parquet", f"{tmp_path}/a.parquet,{tmp_path}/b.parquet"):
        pictures = open_pictures(source, 8)
        assert [pictures.picture(i)[0, 0, 0] for i in range(3)] == [1, 2, 3]
        with pytest.raises(BadInput, match=r"row 1 of .*b\.parquet"):
            pictures.picture(3)


def test_conditions_of_every_source(tmp_path):
    colours = [((i, 0, 0), (0, i, 0)) for i in range(1, 4)]
    folder = tmp_path / "folder"
    for i, (one, two) in enumerate(colours):
        write(folder, **{f"{i}": png(one), f"{i}.cond": png(two)})
    second = [{"bytes": png(two), "path": None} for _, two in [*colours]]
    table = parquet(tmp_path / "a.parquet", condition=second)
    shard = tar(tmp_path / "a.tar", [(f"{i}{s}", png(c[j])) for i, c in enumerate(colours) for j, s in enumerate(ENDS)])
    for source in (str(folder), table, shard):
        pictures = open_pictures(source, 8)
        assert pictures.conditions and len(pictures) == 3
        assert [pictures.condition(i)[0, 0, 1] for i in range(3)] == [1, 2, 3]
    (folder / "1.cond.png").unlink()
    with pytest.raises(BadInput, match=r"1\.png has no NAME\.cond\.png"):
        open_pictures(str(folder), 8)
    with pytest.raises(BadInput, match="without second pictures"):
        open_pictures("sketch", 8).condition(0)


ENDS = (".png", ".cond.png")


def tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def test_shards(tmp_path, cache, monkeypatch):
    sample = lambda i: [
        (f"d/{i}.jpg", png((10 * i, 0, 0))), (f"d/{i}.txt", f"number {i}\n".encode()), (f"d/{i}.cls", b"%d" % (2 * i)),
        (f"d/{i}.json", json.dumps({"style": "flat"}).encode()),
    ]  # fmt: skip
    tar(tmp_path / "s-08.tar", [*sample(0), *sample(1), ("d/readme.md", b"no sample")])
    tar(tmp_path / "s-09.tar", sample(2))
    for source in (f"{tmp_path}/s-{{08..09}}.tar", f"{tmp_path}/*.tar", f"{tmp_path}/s-08.tar,{tmp_path}/s-09.tar"):
        pictures = open_pictures(source, 8)
        assert [int(pictures.picture(i)[0, 0, 0]) for i in (2, 0, 1)] == [20, 0, 10]
        assert pictures.label_names == ("0", "1", "2", "3", "4")
        assert [pictures.label(i) for i in range(3)] == [0, 2, 4] and pictures.caption(2) == "number 2"
    assert open_pictures(source, 8, "{caption}, {style}").caption(0) == "number 0, flat"
    assert len(list(cache.glob("shards-*.safetensors"))) == 1, "found once, kept for all"
    monkeypatch.setattr("sfumato.data.shards._samples", lambda shard: pytest.fail("looked for again"))
    assert open_pictures(source, 8).caption(1) == "number 1"


def test_shards_are_told_apart_without_reading_their_captions(tmp_path, cache, monkeypatch):
    sample = lambda name: [(f"{name}.png", png((1, 0, 0))), (f"{name}.txt", b"a")]
    one, two = (tar(tmp_path / f"{k}.tar", [*sample("x"), *sample(k)]) for k in ("y", "z"))
    first, other = open_pictures(one, 8), open_pictures(two, 8)
    monkeypatch.setattr(type(first), "caption", lambda *_: pytest.fail("read"))
    assert first.identity() == open_pictures(one, 8).identity() != other.identity()


def test_a_changed_shard_is_looked_through_again(tmp_path):
    one = [("a.png", png((1, 0, 0)))]
    source = tar(tmp_path / "a.tar", one)
    assert len(open_pictures(source, 8)) == 1
    tar(tmp_path / "a.tar", [*one, *[(f"b{i}.png", png((2, 0, 0))) for i in range(30)]])
    assert len(open_pictures(source, 8)) == 31


def test_classes_of_shards_in_words(tmp_path):
    members = [(f"{w}.png", png((1, 0, 0))) for w in "ab"] + [("a.cls", b"dog"), ("b.cls", b"cat")]
    pictures = open_pictures(tar(tmp_path / "a.tar", members), 8)
    assert pictures.label_names == ("cat", "dog") and [pictures.label(i) for i in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:700], "cannot be read as a tar file"),
        (lambda data: b"\x1f\x8b" + data[2:], "compressed ones must be unpacked"),
        (lambda data: data[:0], "cannot be read as a tar file"),
    ],
)
def test_damaged_shards_are_named(damage, told, tmp_path):
    file = Path(tar(tmp_path / "a.tar", [(f"{i}.png", png((1, 0, 0))) for i in range(9)]))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BadInput, match=rf"a\.tar {told}" if "must" not in told else told):
        open_pictures(str(file), 8)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("a.txt", b"x")], "holds no pictures"),
        ([("a.png", png((1, 0, 0))), ("b.png", png((1, 0, 0))), ("b.cls", b"1")], r"a in .* has no class"),
        ([("a.png", png((1, 0, 0))), ("b.png", png((1, 0, 0))), ("b.cond.png", png((1, 0, 0)))], "has no condition"),
    ],
)
def test_incomplete_shards_are_refused(members, told, tmp_path):
    with pytest.raises(BadInput, match=told):
        open_pictures(tar(tmp_path / "a.tar", members), 8)


def test_missing_shards_are_named(tmp_path):
    tar(tmp_path / "a-0.tar", [("a.png", png((1, 0, 0)))])
    with pytest.raises(BadInput, match=r"no such shard: .*a-1\.tar, .*a-2\.tar"):
        shards_of(f"{tmp_path}/a-{{0..2}}.tar")


def test_hub_data_from_a_local_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": png((i, 0, 0)), "path": None} for i in range(4)]
    rows = {"img": images, "text": list("abcd"), "label": [0, 1, 1, 0]}
    features = datasets.Features(
        {"img": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(str(tmp_path / "set"))
    pictures = open_pictures(f"hub:{tmp_path}/set", 8)
    assert pictures.label_names == ("cat", "dog") and [pictures.label(i) for i in range(4)] == [0, 1, 1, 0]
    assert pictures.caption(2) == "c" and pictures.picture(2)[0, 0, 0] == 2
    assert open_pictures(f"hub:{tmp_path}/set:test", 8).caption(0) == "d"
    with pytest.raises(BadInput, match="no split 'dev'; it has train, test"):
        open_pictures(f"hub:{tmp_path}/set:dev", 8)


def test_hub_data_are_asked_for_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args):
        asked.append(args)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("sfumato.data.tables.require_hub", lambda *args: asked.append(args))
    builder = SimpleNamespace(builder_name="parquet")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: builder)
    with pytest.raises(BadInput, match=r"owner/name cannot be loaded: no route$"):
        open_pictures("hub:owner/name:small:test", 8)
    assert asked == [("owner/name", "README.md", "dataset"), ("owner/name", "small")]


def test_digits(monkeypatch):
    levels = np.zeros((2, 8, 8))
    levels[1, :4] = 16
    found = SimpleNamespace(images=levels, target=np.array([3, 7]))
    module = ModuleType("sklearn.datasets")
    module.load_digits = lambda: found
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    digits = open_pictures("digits", 16)
    assert len(digits) == 2 and digits.label_names == tuple("0123456789")
    assert digits.label(1) == 7 and digits.caption(0) == "the digit 3"
    assert digits.picture(0).max() == 0 and digits.picture(1).shape == (16, 16, 3)
    assert digits.picture(1)[0, 0].tolist() == [255] * 3 and digits.picture(1)[15, 0].tolist() == [0] * 3


def test_real_digits():
    pytest.importorskip("sklearn")
    digits = open_pictures("digits", 8)
    assert len(digits) == 1797 and digits.label(0) == 0 and digits.picture(5).max() == 255


def test_digits_without_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BadInput, match="pip install scikit-learn"):
        open_pictures("digits", 8)


def with_bad(folder: Path, good: int, *bad: int) -> str:
    """A folder of ``good`` + bad pictures in two classes, 000.png ...; the ones named are corrupt."""
    for i in range(good + len(bad)):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i % 250, i // 250, 0))[: 40 if i in bad else None])
    return str(folder)


def test_a_few_corrupt_pictures_are_named_counted_and_replaced(tmp_path):
    source = with_bad(tmp_path, 198, 4, 10)
    pictures = open_pictures(source, 8)
    # In name order, the even ones come first: rows 2 and 5 are 004 and 010.
    with pytest.warns(UserWarning, match=r"004\.png cannot be read.*skipped; 1 so far, of at most 2"):
        assert pictures.picture(2)[0, 0, 0] == 6
    with pytest.warns(UserWarning, match=r"010\.png .* 2 so far"):
        assert pictures.caption(5) == "012" and pictures.label(5) == 0
    other = open_pictures(source, 8)
    with pytest.warns(UserWarning):
        assert other.caption(2) == "006", "whatever is asked for first"


def test_too_many_corrupt_pictures_stop_the_work(tmp_path):
    source = with_bad(tmp_path, 100, 4, 10)
    pictures = open_pictures(source, 8)
    with pytest.warns(UserWarning):
        pictures.picture(2)
    with pytest.raises(BadInput, match=r"010\.png cannot be read.*; 2 of the 102 pictures of .* and 1 may be"):
        pictures.picture(5)
    with pytest.raises(BadInput, match=r"004\.png cannot be read.* and none may be"):
        open_pictures(source, 8, bad_share=0).picture(2)


def test_an_empty_class_is_named(tmp_path):
    write(tmp_path, a__x=png((1, 0, 0)))
    (tmp_path / "b").mkdir()
    with pytest.raises(BadInput, match=r"class .*b holds no pictures"):
        open_pictures(str(tmp_path), 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_picture(mode):
    grey = np.full((6, 6), 128, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    found = to_square(stream.getvalue(), 6)
    assert found.shape == (6, 6, 3)
    if mode != "1":
        assert abs(found.astype(int) - 128).max() <= 1


def test_transparency_is_white_and_the_centre_is_kept():
    pixels = np.zeros((4, 8, 4), np.uint8)
    pixels[:, 2:6] = (10, 20, 30, 255)
    pixels[0] = 0
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(stream, "PNG")
    found = to_square(stream.getvalue(), 4)
    assert (found[0] == 255).all() and (found[1:] == (10, 20, 30)).all()


def test_pictures_are_turned_upright():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    image, stream = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(stream, "PNG", exif=exif)
    assert to_square(stream.getvalue(), 8)[0, 0, 0] == 0


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInput, match=r"a picture cannot be read.*decompression bomb"):
        to_square(png((0, 0, 0), 16), 8)


WHOLE = {kind: io.BytesIO() for kind in ("PNG", "JPEG", "WEBP", "BMP")}
for kind, stream in WHOLE.items():
    Image.effect_noise((12, 12), 60).convert("RGB").save(stream, kind)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_bytes_are_a_picture_or_a_clear_complaint(kind, data):
    encoded = bytearray(WHOLE[kind].getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    encoded = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    try:
        assert to_square(encoded, 8).shape == (8, 8, 3)
    except BadInput as error:
        assert str(error).startswith("a picture cannot be read")


def test_cifar10_and_emoji():
    pytest.importorskip("pyarrow")
    cifar, emoji = shared_data() / "cifar10" / "test.parquet", shared_data() / "emoji" / "noto.parquet"
    if not (cifar.exists() and emoji.exists()):
        pytest.skip("CIFAR-10 and the emoji pictures are not at hand (shared/data)")
    pictures = open_pictures(str(cifar), 32, "a photo of a {name}")
    assert len(pictures) == 10_000 and pictures.picture(0).shape == (32, 32, 3)
    assert pictures.label_names[:4] == ("airplane", "automobile", "bird", "cat")
    assert pictures.caption(1) == f"a photo of a {pictures.label_names[pictures.label(1)]}"
    pictures = open_pictures(str(emoji), 32, "{caption}, {style} style")
    assert pictures.caption(0) == "grinning face, noto style" and pictures.label_names == ()


def test_tables_without_rows_are_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet has no rows"):
        open_pictures(str(tmp_path / "a.parquet"), 8)


def test_tables_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    source = parquet(tmp_path / "a.parquet", caption=["a"])
    monkeypatch.setattr("sfumato.memory.total_memory", lambda: 100)
    with pytest.raises(BadInput, match=r"the rows of .*a\.parquet would take"):
        open_pictures(source, 8)


def test_a_single_data_set_that_was_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [{"bytes": png((3, 0, 0)), "path": None}], "text": ["a"]})
    data.save_to_disk(str(tmp_path / "set"))
    pictures = open_pictures(f"hub:{tmp_path}/set", 8)
    assert len(pictures) == 1 and pictures.caption(0) == "a" and pictures.picture(0)[0, 0, 0] == 3


def test_where_no_picture_can_be_read_the_search_ends(tmp_path):
    source = with_bad(tmp_path, 0, 0, 1, 2)
    with pytest.warns(UserWarning), pytest.raises(BadInput, match="3 of the 3 pictures"):
        open_pictures(source, 8, bad_share=1.0).picture(0)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pictures_without_a_fixed_white_are_refused(kind):
    stream = io.BytesIO()
    Image.fromarray(np.full((6, 6), 1, kind)).save(stream, "TIFF")
    with pytest.raises(BadInput, match="more than 16 bits a channel"):
        to_square(stream.getvalue(), 6)


def test_the_transparent_grey_of_16_bits_is_white():
    grey, stream = np.full((4, 4), 257 * 9, np.uint16), io.BytesIO()
    grey[0] = 257 * 8
    Image.fromarray(grey).save(stream, "PNG", transparency=257 * 8)
    found = to_square(stream.getvalue(), 4)
    assert (found[0] == 255).all() and (found[1:] == 9).all()


@pytest.mark.parametrize("source", ["sketch", "digits", "folder"])
def test_columns_are_not_looked_for_where_there_are_none(source, tmp_path):
    """A template that is not heard would group or caption pictures by something else."""
    if source == "folder":
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        source = str(tmp_path)
    with pytest.raises(BadInput, match=r"has no columns for '{album}'"):
        open_pictures(source, 8, "{album}", count=4)
