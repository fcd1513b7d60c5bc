"""Metric objects: update, compute, reset; several processes; the record that refuses false comparisons; features."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from sfumato.data import sketch
from sfumato.errors import BadInput
from sfumato.metrics.extractors import (
    CallableFeatures,
    InceptionFeatures,
    OracleFeatures,
    PixelFeatures,
    RandomFeatures,
)
from sfumato.metrics.features import Batches, Features, extract, from_cache, into_cache
from sfumato.metrics.frechet import frechet_distance
from sfumato.metrics.pairs import PairMetric
from sfumato.metrics.perceptual import PSNR, SSIM, OneMinusSSIM
from sfumato.metrics.record import Score, compare
from sfumato.metrics.sets import CMMD, FID, KID, Fidelity, FIDInfinity, InceptionScore


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pictures(n=24, side=16, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Classifier(PixelFeatures):
    """Pixels, read as the logits of their first three."""

    def logits(self, features):
        return 5 * features[:, :3]


def test_update_compute_reset():
    fid, x, y = FID(PixelFeatures()), pictures(30), pictures(20, seed=1)
    for part in x.split(7):
        fid.update(part, real=True)
    fid.update(y.float() / 255, real=False)
    score = fid.compute()
    features = [PixelFeatures()(s) for s in (x, y)]
    assert score.value == pytest.approx(frechet_distance(*features), rel=1e-10)
    assert score.low < score.value < score.high
    assert (score.metric, score.n_real, score.n_gen, score.better) == ("fd", 30, 20, "lower")
    assert score.protocol["extractor"] == "pixels, 768 numbers"
    assert score.protocol["resize"] == "torch-antialias to 16x16"
    assert fid.compute() == score
    fid.reset()
    with pytest.raises(BadInput, match="has seen no real pictures"):
        fid.compute()
    with pytest.raises(BadInput, match="has no extractor"):
        FID().update(x, real=True)


def test_streaming_sums_give_the_same_distance():
    x, y = normal(200, 12), normal(150, 12, 1) + 1
    kept, streamed = FID(), FID(streaming=True)
    for metric in (kept, streamed):
        metric.update_features(x, real=True)
        for part in y.split(40):
            metric.update_features(part, real=False)
    a, b = kept.compute(), streamed.compute()
    assert b.value == pytest.approx(a.value, rel=1e-10) and math.isnan(b.low) and b.interval == "none"
    assert (b.n_real, b.n_gen) == (200, 150) and compare(a, b) == pytest.approx(0, abs=1e-8)


def test_every_metric_gives_a_record():
    x, y = Features(normal(80, 6)), Features(normal(60, 6, 1) + 0.3)
    scores = [m().measure(x, y) for m in (FID, KID, CMMD, FIDInfinity)] + list(Fidelity().measure(x, y).values())
    assert [s.metric for s in scores] == ["fd", "kd", "cmmd", "fd-inf", "precision", "recall", "density", "coverage"]
    assert all(s.low <= s.value <= s.high and (s.n_real, s.n_gen) == (80, 60) for s in scores)
    found = InceptionScore(Classifier(), splits=2)
    found.update(pictures(), real=False)
    score = found.compute()
    assert 1 <= score.value <= 3 and score.n_real == 0
    assert score.protocol["convention"] == "2 shuffled splits, 3 outputs, ddof 0"
    inception = {"extractor": "inception-v3-2015, 2048 pooled features"}
    assert FID().measure(replace(x, **inception), replace(y, **inception)).metric == "fid"
    assert InceptionFeatures.without == "bias" and OracleFeatures().network.heads["object"].bias.abs().max() > 0
    told = InceptionScore(OracleFeatures(), splits=2).measure(None, Features(normal(20, 128))).protocol["convention"]
    assert "outputs, ddof" in told and "without" not in told
    classifier = Classifier()
    classifier.without = "bias"
    told = InceptionScore(classifier, splits=2).measure(None, Features(normal(20, 6))).protocol["convention"]
    assert "3 outputs without bias" in told
    with pytest.raises(BadInput, match="classifies"):
        InceptionScore(PixelFeatures())
    with pytest.raises(BadInput, match="resize is 'a' for the real and '' for the generated"):
        FID().measure(replace(x, resize="a"), y)


def test_the_seed_decides():
    x, y = Features(normal(80, 6)), Features(normal(60, 6, 1))
    measure = lambda seed: KID(size=20, subsets=5, seed=seed).measure(x, y)
    assert measure(1) == measure(1) and measure(1).value != measure(2).value


def test_records_are_compared_only_where_nothing_else_differs():
    x, y = Features(normal(80, 6), content="a"), Features(normal(60, 6, 1))
    a, b = FID().measure(x, y), FID().measure(x, Features(normal(60, 6, 2)))
    assert a - b == a.value - b.value and (a < b) == (a.value < b.value)
    assert sorted([a, b])[0].value == min(a.value, b.value)
    for field, other in (
        ("metric", KID().measure(x, y)),
        ("extractor", FID().measure(replace(x, extractor="e"), replace(y, extractor="e"))),
        ("weights", FID().measure(replace(x, weights="w"), replace(y, weights="w"))),
        ("resize", FID().measure(replace(x, resize="r"), replace(y, resize="r"))),
        ("real", FID().measure(replace(x, content="b"), y)),
        ("seed", FID(seed=1).measure(x, y)),
        ("n_real", FID().measure(replace(x, values=x.values[:70]), y)),
        ("n_gen", FID().measure(x, replace(y, values=y.values[:50]))),
        ("version", replace(a, protocol={**a.protocol, "version": "0.0.9"})),
        ("convention", replace(a, protocol={**a.protocol, "convention": "k = 9"})),
        ("dtype", replace(a, protocol={**a.protocol, "dtype": "float16"})),
    ):
        with pytest.raises(BadInput, match=f"cannot be compared: {field} is "):
            compare(a, other)
    with pytest.raises(BadInput, match="cannot be compared"):
        sorted([a, KID().measure(x, y)])


def test_a_record_survives_json():
    for value in (1.5, math.inf):
        score = Score("psnr", value, math.nan, math.nan, 3, 3, {"resize": "none"}, None, "none", "higher")
        again = Score.from_json(json.loads(json.dumps(score.to_json(), allow_nan=False)))
        assert again.value == value and math.isnan(again.low) and replace(again, low=0, high=0) == replace(
            score, low=0, high=0
        )
    with pytest.raises(BadInput, match="not the record of a score"):
        Score.from_json({"metric": "fid"})


def test_pairs():
    x = pictures(6, 24)
    psnr, ssim = PairMetric("psnr", PSNR(), better="higher"), PairMetric("ssim", SSIM(), better="higher")
    assert psnr.update(x, x).tolist() == [math.inf] * 6 and ssim.update(x, x).tolist() == pytest.approx([1] * 6)
    assert psnr.compute().value == math.inf and math.isnan(psnr.compute().low)
    psnr.reset()
    psnr.update(x.float() / 255 * 0.5, x.float() / 255 * 0.5 + 20 / 255)  # whole levels, so rounding keeps the offset
    assert psnr.compute().value == pytest.approx(-20 * math.log10(20 / 255), abs=0.02)
    with pytest.raises(BadInput, match="24x24 is not 20x20"):
        ssim.update(x, pictures(6, 20))
    with pytest.raises(BadInput, match="pairs 6 pictures with 5"):
        ssim.update(x, x[:5])
    with pytest.raises(BadInput, match="seen no pictures"):
        PairMetric("ssim", SSIM()).compute()


def test_psnr_of_an_offset():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 0.5
    for d in (0.1, 0.003):
        assert PSNR()(x, x + d).tolist() == pytest.approx([-20 * math.log10(d)] * 2)
    assert float(PSNR()(x, x)[0]) == math.inf


@pytest.mark.parametrize("measure", [PSNR(), SSIM(), OneMinusSSIM()])
def test_pictures_of_another_range_are_refused(measure):
    x = torch.rand(2, 3, 16, 16)
    for wrong in (255 * x, 2 * x - 1, (255 * x).long()):
        with pytest.raises(BadInput, match=r"\[0, 1\]"):
            measure(x, wrong)
        with pytest.raises(BadInput, match=r"\[0, 1\]"):
            PairMetric(measure.name, measure).update(wrong, wrong)
        with pytest.raises(BadInput, match=r"\[0, 1\]"):
            FID(PixelFeatures()).update(wrong, real=True)


def work(rank, world, port, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    metrics, streaming, pairs = everything()
    # unequal shares: the first process has seen more, and no pair comes from the second
    x, y = normal(90, 5), normal(70, 5, 1) + 0.5
    share = (slice(0, 60), slice(0, 50)) if rank == 0 else (slice(60, 90), slice(50, 70))
    for metric in (*metrics, streaming):
        metric.update_features(x[share[0]], real=True)
        metric.update_features(y[share[1]], real=False)
    if rank == 0:
        pairs.update(pictures(5), pictures(5, seed=1))
    empty = FID(streaming=True)
    if rank == 1:
        empty.update_features(x, real=True)
        empty.update_features(y, real=False)
    scores = [m.compute() for m in (*metrics, streaming, pairs, empty)]
    (folder / f"{rank}.json").write_text(json.dumps([s.to_json() for s in scores]))
    dist.destroy_process_group()


def everything():
    return [FID(), KID(size=40, subsets=3), CMMD()], FID(streaming=True), PairMetric("psnr", PSNR())


def test_two_processes_answer_for_all_pictures(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (2, port, tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    metrics, streaming, pairs = everything()
    x, y = normal(90, 5), normal(70, 5, 1) + 0.5
    for metric in (*metrics, streaming):
        metric.update_features(x, real=True)
        metric.update_features(y, real=False)
    pairs.update(pictures(5), pictures(5, seed=1))
    alone = [m.compute() for m in (*metrics, streaming, pairs, streaming)]
    for found, expected in zip(map(Score.from_json, first), alone, strict=True):
        assert found.value == pytest.approx(expected.value, rel=1e-12), found.metric
        assert (found.n_real, found.n_gen) == (expected.n_real, expected.n_gen)


class Shelf:
    """Pictures by index, as the data room has them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def caption(self, index):
        return ""

    def picture(self, index):
        return self.images[index].permute(1, 2, 0).numpy()


def test_features_are_in_order_whatever_the_batch():
    shelf = Shelf(pictures(23))
    whole = extract(shelf, PixelFeatures())
    assert torch.equal(whole, PixelFeatures()(shelf.images))
    assert torch.equal(extract(shelf, PixelFeatures(), batch=5), whole)
    assert torch.equal(extract(shelf, PixelFeatures(), 9, batch=4), whole[:9])
    assert [len(b) for b in Batches(shelf, 23, 10)] == [10, 10, 3]
    with pytest.raises(BadInput, match=r"gave \(23, 3, 16, 16\) for 23 pictures"):
        extract(shelf, CallableFeatures(lambda x: x.float(), "no vectors"))
    with pytest.raises(BadInput, match="no pictures"):
        extract(shelf, PixelFeatures(), 0)


def test_features_are_kept_whole_and_found_again(tmp_path):
    kept = Features(normal(9, 4), "e", "w", "r", "p", "c")
    file = into_cache(tmp_path, kept)
    found = from_cache(tmp_path, kept.about())
    assert torch.equal(found.values, kept.values) and found.about() == kept.about()
    assert torch.equal(found.gaussian.moments.cov, kept.gaussian.moments.cov)
    assert found.gaussian.moments.cov.dtype == torch.float64 and found.values.dtype == torch.float32
    for other in ("extractor", "weights", "resize", "pictures", "content"):
        assert from_cache(tmp_path, {**kept.about(), other: "x"}) is None
    file.write_bytes(file.read_bytes()[:-20])
    assert from_cache(tmp_path, kept.about()) is None  # damaged: made anew
    assert into_cache(tmp_path, kept) == file and from_cache(tmp_path, kept.about()) is not None
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="holds no features that sfumato wrote"):
        Features.load(tmp_path / "other.safetensors")


@pytest.fixture(scope="module")
def shapes():
    """Pictures of the sketch world at 32 pixels, and their backgrounds: the class that fills most of them."""
    rng = np.random.default_rng(0)
    scenes = [sketch.sample_scene(rng, n_objects=1) for _ in range(320)]
    images = np.stack([sketch.render(scene, 32) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2), [scene.background for scene in scenes]


def blurred(images, sigma):
    at = torch.arange(-6, 7, dtype=torch.float32)
    row = torch.exp(-at.square() / (2 * sigma**2))
    kernel = (row[:, None] * row / row.sum() ** 2).expand(3, 1, 13, 13)
    x = torch.nn.functional.pad(images.float(), (6, 6, 6, 6), mode="reflect")
    return torch.nn.functional.conv2d(x, kernel, groups=3).round().to(torch.uint8)


def noisy(images, sigma):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * sigma
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("damage, amounts", [(blurred, (0.6, 1.2, 2.4)), (noisy, (5, 15, 45))])
@pytest.mark.parametrize("metric", [FID, KID, CMMD])
def test_distances_rise_with_damage(metric, damage, amounts, shapes):
    images, _ = shapes
    extractor = RandomFeatures()
    real = Features(extractor(images))
    values = [metric().measure(real, real).value]
    values += [metric().measure(real, Features(extractor(damage(images, a)))).value for a in amounts]
    assert all(a < b for a, b in pairwise(values)), values


@pytest.mark.parametrize("metric", [FID, KID, CMMD])
def test_distances_rise_with_the_share_of_dropped_classes_that_is_missing(metric, shapes):
    images, words = shapes
    lost = set(sorted(set(words))[3:])
    real = Features(RandomFeatures()(images))
    dropped = [i for i in range(160) if words[i] in lost]
    others = [i for i in range(160, 320) if words[i] not in lost][: len(dropped)]
    values = []
    for share in (0, 0.5, 1.0):
        n = round(share * len(others))
        missing = dict(zip(dropped[:n], others, strict=False))
        rows = [missing.get(i, i) for i in range(160)]  # one size, or the bias of small sets would tell
        values.append(metric().measure(real, Features(real.values[rows])).value)
    assert all(a < b for a, b in pairwise(values)), values


def test_recall_and_coverage_fall_when_modes_are_dropped_and_precision_stays():
    """A mixture of eight far clusters, of which the generated set has fewer and fewer."""
    rng = torch.Generator().manual_seed(0)
    centres = 12 * torch.randn(8, 4, generator=rng)
    draw = lambda modes: centres[torch.randint(modes, (400,), generator=rng)] + torch.randn(400, 4, generator=rng)
    real = Features(draw(8))
    rows = [Fidelity().measure(real, Features(draw(modes))) for modes in (8, 4, 1)]
    for name in ("recall", "coverage"):
        values = [row[name].value for row in rows]
        assert values[0] > values[1] + 0.2 > values[2] + 0.4, name
    for name in ("precision", "density"):
        assert all(abs(row[name].value - rows[0][name].value) < 0.2 for row in rows), name
