"""``sfumato score``: what it writes, what it keeps, and what it refuses, each in one sentence."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato import cli
from sfumato.data.census import content_hash, files_of, sizes_of
from sfumato.data.pictures import open_pictures
from sfumato.metrics import features as features_module
from sfumato.metrics.extractors import PixelFeatures
from sfumato.metrics.features import Features
from sfumato.metrics.frechet import frechet_distance
from sfumato.metrics.perceptual import LPIPS
from sfumato.metrics.scoring import Run, Scoring
from sfumato.metrics.sources import Source, one_size


def fill(folder, n, side=16, seed=0, width=None):
    """A folder of ``n`` pictures of noise around a colour."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(0, 256, (side, width or side, 3), dtype=np.uint8)
        Image.fromarray(pixels // 2 + 64).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def sets(tmp_path):
    return fill(tmp_path / "real", 40), fill(tmp_path / "fake", 30, seed=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


def run(out, *args):
    return cli.main(["score", *map(str, args), "--out", str(out)])


def refused(capsys, sentence, out, *args):
    assert run(out, *args) == 2
    told = capsys.readouterr().err
    assert sentence in told and "Traceback" not in told, told
    assert not out.exists()


def pixels(folder, side=16):
    return torch.stack([
        torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in sorted(folder.glob("*.png"))
    ])  # fmt: skip


def test_scores_are_written_with_their_protocol(sets, tmp_path, capsys):
    real, fake = sets
    out = tmp_path / "score.json"
    assert run(out, "--real", real, "--fake", fake, "--extractor", "pixels") == 0
    record = json.loads(out.read_text())
    assert list(record["scores"]) == sorted(["fd", "kd", "precision", "recall", "density", "coverage"])
    fd = record["scores"]["fd"]
    expected = frechet_distance(*(PixelFeatures()(pixels(s)) for s in sets))
    assert fd["value"] == pytest.approx(expected, rel=1e-10) and fd["low"] < fd["value"] < fd["high"]
    assert (fd["n_real"], fd["n_gen"]) == (40, 30) and fd["protocol"]["pictures"] == "16x16 as they are"
    assert set(fd["protocol"]) == {
        "extractor", "weights", "resize", "pictures", "dtype", "convention", "real", "seed", "version",
    }  # fmt: skip
    told = capsys.readouterr()
    assert "40 real and 30 generated pictures" in " ".join(told.err.split()) and "features" in told.err
    assert "coverage" in told.out and "fd of fewer than 10000 pictures" in told.out
    refused_again = run(out, "--real", real, "--fake", fake, "--extractor", "pixels")
    assert refused_again == 2 and "exists already" in capsys.readouterr().err


def test_features_are_taken_once(sets, tmp_path, monkeypatch, capsys):
    real, fake = sets
    args = ["--real", real, "--fake", fake, "--extractor", "pixels", "--metrics", "fid,kid"]
    assert run(tmp_path / "a.json", *args) == 0
    kept = list((tmp_path / "cache" / "features").iterdir())
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        patch.setattr("sfumato.metrics.scoring.extract", None)  # would fail if it were called
        assert run(tmp_path / "b.json", *args) == 0
        assert "need not be computed" in capsys.readouterr().err
    a, b = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in "ab")
    assert a == b
    # the files that were kept stand for the pictures
    where = {Features.load(f).content: str(f) for f in kept}
    sides = zip(sets, (40, 30), strict=True)
    by_features = [where[content_hash(str(s), open_pictures(str(s), 16), n)] for s, n in sides]
    assert run(tmp_path / "c.json", "--real", by_features[0], "--fake", by_features[1], "--metric", "fid", "kid") == 0
    assert json.loads((tmp_path / "c.json").read_text())["scores"] == a
    # another picture, another file of features
    Image.new("RGB", (16, 16)).save(fake / "000.png")
    assert run(tmp_path / "d.json", *args) == 0
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 3
    assert run(tmp_path / "e.json", *args, "--no-keep-features", "--cache", tmp_path / "no") == 0
    assert not (tmp_path / "no").exists()


def test_a_full_disk_costs_the_cache_and_not_the_scores(sets, tmp_path, monkeypatch, capsys):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features_module, "save_file", full)
    args = ["--real", sets[0], "--fake", sets[1], "--extractor", "pixels", "--metrics", "kid"]
    assert run(tmp_path / "score.json", *args) == 0
    assert "features were not kept: the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/**/*.safetensors"))


def test_pairs_and_sizes(tmp_path, sets):
    real = fill(tmp_path / "originals", 5, side=24)
    fake = fill(tmp_path / "restored", 5, side=24)
    out = tmp_path / "score.json"
    assert run(out, "--real", real, "--fake", fake, "--metrics", "psnr,ssim", "--batch", 2) == 0
    scores = json.loads(out.read_text())["scores"]
    assert scores["psnr"]["value"] == "inf" and scores["ssim"]["value"] == pytest.approx(1)
    assert scores["psnr"]["n_real"] == scores["psnr"]["n_gen"] == 5
    args = ["--real", sets[0], "--fake", fake, "--extractor", "pixels", "--metrics", "kid", "--size", 16]
    assert run(tmp_path / "other.json", *args) == 0
    score = json.loads((tmp_path / "other.json").read_text())["scores"]["kd"]
    assert score["protocol"]["pictures"] == "centre square, Lanczos, to 16x16"


def test_the_device_reaches_lpips(tmp_path, monkeypatch):
    class Tiny(LPIPS):
        name, hash, resize = "tiny", "", ""

        def __init__(self):
            self.network = nn.PReLU(1)

    monkeypatch.setattr("sfumato.metrics.scoring.LPIPS", Tiny)
    folder = str(fill(tmp_path / "originals", 3))
    made = Run(Scoring(fake=folder, real=folder, metrics=("lpips",), device="meta"))
    assert made.pairs["lpips"].measure.network.weight.device.type == "meta"


def test_the_sketch_world_has_its_oracle(tmp_path):
    out = tmp_path / "score.json"
    fake = fill(tmp_path / "fake", 12, side=64)
    assert run(out, "--real", "sketch", "--fake", fake, "--limit", 20, "--metrics", "fid,is") == 0
    scores = json.loads(out.read_text())["scores"]
    assert "oracle" in scores["fd"]["protocol"]["extractor"] and scores["fd"]["n_real"] == 20
    assert scores["is"]["value"] >= 1 and scores["is"]["n_real"] == 0


def test_parquet(tmp_path, sets):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": f.read_bytes()} for f in sorted(sets[0].glob("*.png"))]
    file = tmp_path / "real.parquet"
    pq.write_table(pa.table({"image": rows, "caption": ["x"] * len(rows)}), file)
    assert files_of(str(file)) == [file] and {k: len(v) for k, v in sizes_of(str(file)).items()} == {(16, 16): 40}
    args = ["--fake", sets[1], "--extractor", "pixels", "--metrics", "fid"]
    assert run(tmp_path / "a.json", "--real", sets[0], *args) == 0
    assert run(tmp_path / "b.json", "--real", file, *args) == 0
    a, b = (json.loads((tmp_path / f"{name}.json").read_text())["scores"]["fd"]["value"] for name in "ab")
    assert a == b
    file.write_bytes(b"PAR1")
    assert run(tmp_path / "c.json", "--real", file, *args) == 2


def test_bad_input(sets, tmp_path, capsys):
    real, fake = sets
    out = tmp_path / "out" / "score.json"
    no = lambda sentence, *args: refused(capsys, sentence, out, *args)
    both = ("--real", real, "--fake", fake)
    pixel = (*both, "--extractor", "pixels")
    no("did you mean fid", *pixel, "--metrics", "fidd")
    no("say with --extractor which features to compare", *both)
    no("needs --real", "--fake", fake, "--extractor", "pixels")
    no("no pictures at", "--real", tmp_path / "nowhere", "--fake", fake, "--extractor", "pixels")
    (tmp_path / "empty").mkdir()
    no("holds no pictures", "--real", real, "--fake", tmp_path / "empty", "--extractor", "pixels")
    no("--limit must be at least 1, got 0", *pixel, "--limit", 0)
    no("there is no file of features", "--real", tmp_path / "x.safetensors", "--fake", fake, "--extractor", "pixels")
    no("classifies", *pixel, "--metrics", "is")
    # sizes
    wide = fill(tmp_path / "wide", 3, side=16, width=20)
    no("3 of 20x16 (000.png)", "--real", real, "--fake", wide, "--extractor", "pixels")
    mixed = fill(tmp_path / "mixed", 3, side=32)
    Image.new("RGB", (16, 16)).save(mixed / "odd.png")
    no("1 of 16x16 (odd.png)", "--real", mixed, "--fake", mixed, "--extractor", "pixels")
    # numbers
    few = fill(tmp_path / "few", 3)
    no("at least 6 real pictures, and there are 3", "--real", few, *pixel[2:], "--metric", "density")
    no("fid needs at least 2 real pictures, and there are 1", *pixel, "--metrics", "fid", "--limit", 1)
    no("fid-inf needs at least 16 generated pictures, and there are 9", *pixel, "--metrics", "fid-inf", "--limit", 9)
    no("10 of the real pictures have no partner of their name: 030, 031, 032,", *both, "--metrics", "psnr")
    no("SSIM needs pictures of at least 11 pixels", "--real", fill(tmp_path / "tiny", 2, side=8), "--fake",
       tmp_path / "tiny", "--metrics", "ssim")  # fmt: skip
    # weights and texts
    (tmp_path / "w.pth").write_bytes(b"x")
    no("is a pickle", *both, "--weights", tmp_path / "w.pth")
    no("there are no Inception weights", *both, "--weights", tmp_path / "absent.safetensors")
    no("pixels does not take any", *pixel, "--weights", tmp_path / "w.pth")
    no("needs --clip MODEL and --prompts FILE", "--fake", fake, "--metrics", "clip")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\n\n")
    no("has 1 prompts in 2 lines for 30 pictures", "--fake", fake, "--metrics", "clip", "--clip", "none/such",
       "--prompts", prompts)  # fmt: skip
    assert not list(tmp_path.glob("cache/**/*.safetensors"))  # all of it was found before the work began
    (fake / "007.png").write_bytes(b"no picture")
    no("007.png cannot be read as a picture", *pixel)
    assert not out.parent.exists()


def test_help_gives_the_conversion(capsys):
    assert cli.main(["score", "--help"]) == 0
    told = capsys.readouterr().out
    assert "weights_only=True" in told and "--prompts" in told and "Example:" in told


def test_sizes_of_every_source_are_known(tmp_path, sets, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("sklearn")
    files = sorted(sets[0].glob("*.png"))
    rows = [{"bytes": f.read_bytes(), "path": None} for f in files]
    pq.write_table(pa.table({"img": rows}), tmp_path / "cifar.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"img": rows})}).save_to_disk(str(tmp_path / "set"))
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for file in files:
            shard.add(file, file.name)
    for source in (tmp_path / "cifar.parquet", f"hub:{tmp_path}/set", tmp_path / "a.tar"):
        assert {size: len(names) for size, names in sizes_of(str(source)).items()} == {(16, 16): 40}, source
        assert one_size([Source(str(source))], None) == (16, "16x16 as they are")
    assert one_size([Source("digits")], None) == (8, "8x8 as they are")
    assert one_size([Source("sketch", 2)], None) == (64, "64x64 as they are")
    no = lambda sentence, *args: refused(capsys, sentence, tmp_path / "out" / "score.json", *args)
    no("and these are others", "--real", tmp_path / "a.tar", "--fake", "digits", "--extractor", "pixels")
