"""Quality against cost: what is counted, what is measured, and the page."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.audit.cost import Way, counted, draw, measure, ways
from sfumato.cli import main
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline import ImageModel, few_steps
from sfumato.report.cost import CostReport, Point, _log_axis, plots
from sfumato.report.schema import Interval


@pytest.fixture(scope="module")
def student(tiny_sd):
    made = tiny_sd.copy(own="full")
    few_steps(made, 3)
    return made


@pytest.fixture(scope="module")
def pixels():
    torch.manual_seed(0)
    network = UNet(8, 3, channels=(8, 8), layers=1, attention=())
    return ImageModel(network.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8))


def test_evaluations_are_counted_with_both_halves_of_guidance(tiny_sd, student, pixels):
    prompts = ["a red star"] * 3
    for way, asked, expected in (
        (Way("teacher", "", tiny_sd, {"sampling_steps": 4}), prompts, 8),
        (Way("teacher", "", tiny_sd, {"sampling_steps": 4, "cfg_scale": 1.0}), prompts, 4),
        (Way("student", "", student), prompts, 3),
        (Way("pixels", "", pixels, {"sampling_steps": 5, "scheduler": "ddim"}), None, 5),
    ):
        images, nfe, seconds = draw(way, asked, [1, 2, 3], batch=2)
        assert (len(images), nfe) == (3, expected) and seconds > 0
    with counted(tiny_sd) as count:
        pass
    assert count["rows"] == 0 and not tiny_sd.network.conv_out._forward_hooks


def test_all_ways(tiny_sd, student):
    found = ways(tiny_sd, {"three/": student}, sampling_steps=(2, 4), samplers=("ddim", "dpm++"))
    assert [(w.group, w.label) for w in found] == [
        ("teacher, ddim", "2 steps"), ("teacher, ddim", "4 steps"), ("teacher, dpm++", "2 steps"),
        ("teacher, dpm++", "4 steps"), ("students", "three/, 3 steps"),
    ]  # fmt: skip
    (known, unknown) = ways(tiny_sd, {"a": student, "b": student}, (), (), methods={"a": "slct", "b": ""})
    assert (known.group, unknown.group) == ("students, slct", "students")
    with pytest.raises(BadInput, match="steer"):
        ways(tiny_sd, {}, patches=("nothing",))


def test_what_is_around_is_entered_once_and_left(tiny_sd):
    seen = []

    @contextmanager
    def around():
        seen.append("in")
        yield
        seen.append("out")

    draw(Way("g", "", tiny_sd, {"sampling_steps": 1}, around), ["a star"] * 3, [1, 2, 3], batch=1)
    assert seen == ["in", "out"]


def test_measured_on_the_sketch_world(tiny_sd, student, tmp_path):
    """Random networks draw noise: far from real pictures, and the truth is read off no better than by chance."""
    report = measure(ways(tiny_sd, {"s": student}, (1, 2), ("ddim",)), data="sketch", n=6, n_real=20, batch=4)
    assert [p.nfe for p in report.points] == [2, 4, 3]
    for p in report.points:
        assert 0 <= p.accuracy.low <= p.accuracy.value <= p.accuracy.high < 1 and p.accuracy.n == 6
        assert p.distance.value > 1 and p.distance.n == 6
    assert report.protocol["real pictures"] == 20 and len(report.protocol["models"]) == 2
    again = measure(ways(tiny_sd, {}, (1,), ("ddim",)), data="sketch", n=6, n_real=20, batch=3)
    assert again.points[0].accuracy == report.points[0].accuracy
    report.save(tmp_path / "cost")
    page = (tmp_path / "cost" / "index.html").read_text()
    assert page.count("<svg class=\"curve\"") == 4 and "students" in page
    assert page.count("<img") == 3 * 6 and f"2 steps: {report.protocol['shown'][1]}" in page
    assert not re.search(r"(src|href)=\"http", page)
    assert len(json.loads((tmp_path / "cost" / "cost.json").read_text())["points"]) == 3


def test_real_pictures_are_good(monkeypatch, pixels):
    """The world's own pictures in the place of drawn ones: everything is there, and the distance is small."""
    from sfumato.data.pictures import open_pictures, to_tensor

    world = open_pictures("sketch", 64, seed=50_000, count=4 * (40 + 300))
    by_caption = {world.caption(i): i for i in range(len(world))}

    class Perfect:
        size, device, defaults = 64, "cpu", {}

        def describe(self):
            return {"sha256": "0"}

        def asked_for(self, pictures, rows):
            return [pictures.caption(i) for i in rows]

    def drawn(way, words, seeds, batch):
        images = to_tensor([world.picture(by_caption[w]) for w in words])
        return (images + 1) / 2, 1.0, 0.1

    monkeypatch.setattr("sfumato.audit.cost.draw", drawn)
    (point,) = measure([Way("world", "itself", Perfect())], data="sketch", n=40, n_real=300).points
    assert point.accuracy.value > 0.97
    with pytest.raises(BadInput, match="from text"):
        measure([Way("world", "itself", Perfect()), Way("other", "", pixels)], data="sketch")


def test_models_without_text_have_no_accuracy_elsewhere(pixels, tmp_path):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    report = measure(ways(pixels, {}, (2,), ("ddim",)), data=str(tmp_path), n=4, n_real=8, extractor="pixels")
    assert report.points[0].accuracy is None and len(plots(report)) == 2
    small = {"n": 4, "n_real": 8, "extractor": "pixels"}
    assert measure(ways(pixels, {}, (2,), ("ddim",)), data="sketch", **small).points[0].accuracy is None
    with pytest.raises(BadInput, match="data=FOLDER"):
        measure(ways(pixels, {}, (2,), ("ddim",)), **small)
    with pytest.raises(BadInput, match="too few"):
        measure(ways(pixels, {}, (2,), ("ddim",)), data=str(tmp_path), n=11, extractor="pixels")


def test_plots_place_what_is_better_higher_and_what_costs_more_further_right():
    rate = lambda v: Interval(v, v - 0.05, v + 0.02, 9)
    points = [Point("a", "1 step", 1, 0.1, rate(0.6), rate(8.0)), Point("a", "4 steps", 4, 0.4, rate(0.9), rate(0.5))]
    accuracy, _, distance, _ = plots(CostReport(points, {}))
    for plot, better in ((accuracy, 1), (distance, 0)):
        first, second = plot.groups["a"]
        assert 0 < first.x < second.x < 100
        assert (second.y < first.y) == (better == 1) or plot is distance
        assert first.high < first.y < first.low
    assert len(list(accuracy.lines("a"))) == 1
    (alone, _) = plots(CostReport([Point("students", f"s, {n} steps", n, n, None, rate(1)) for n in (1, 2)], {}))
    assert not list(alone.lines("students")), "each is another network"
    sure = [Point("a", f"{n} steps", n, n, Interval(1.0, 1.0, 1.0, 9), rate(1)) for n in (1, 2)]
    assert all(dot.y == sure_dot.y for dot, sure_dot in pairwise(plots(CostReport(sure, {}))[0].groups["a"]))
    unknown = [Point("a", "1 step", 1, 1, Interval(None, None, None, 0), rate(1))]
    assert len(plots(CostReport(unknown, {}))) == 2


def test_command(tiny_sd, student, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # a narrow table breaks its heads
    tiny_sd.save(tmp_path / "teacher")
    student.save(tmp_path / "student", provenance={"recipe": "distill multistep-cm"})
    out = tmp_path / "cost"
    args = ["compare", "--teacher", str(tmp_path / "teacher"), "--students", str(tmp_path / "student")]
    args += ["--steps", "1", "2", "--samplers", "ddim", "--n", "4", "--n-real", "8", "--out", str(out)]
    assert main(args) == 2 and "data=FOLDER" in capsys.readouterr().err  # no model of the sketch world
    args += ["--data", "sketch"]
    assert main(args) == 0
    assert "students, multistep-cm" in (out / "index.html").read_text() and "Fréchet" in capsys.readouterr().out
    assert main(args) == 2 and main(["compare", "--out", str(tmp_path / "x")]) == 2
    assert main([*args[:3], str(tmp_path), "--out", str(tmp_path / "x")]) == 2


def test_a_patch_of_the_catalogue_is_a_way(tiny_sd):
    (way,) = ways(tiny_sd, {}, sampling_steps=(4,), samplers=(), patches=("faster-diffusion:uniform",))
    assert (way.group, way.label) == ("teacher, faster-diffusion", "uniform, 4 steps")
    patched, nfe, _ = draw(way, ["a red star"] * 2, [1, 2], batch=2)
    alone = Way("teacher", "", tiny_sd, {"sampling_steps": 4, "scheduler": "ddim"})
    plain, _, _ = draw(alone, ["a red star"] * 2, [1, 2], 2)
    assert nfe == 8, "the decoder runs at every step, for both halves of guidance"
    assert not torch.equal(patched, plain)
    with pytest.raises(BadInput, match="preset of faster-diffusion"):
        ways(tiny_sd, {}, patches=("faster-diffusion:nothing",))


@given(st.floats(1e-4, 1e4), st.floats(1.0, 1e4))
def test_an_axis_can_be_read(least, spread):
    low, high, ticks = _log_axis([least, least * spread])
    values = [v for v, _ in ticks]
    assert values == sorted(set(values)) and all(low <= v <= high for v in values)
    assert len(ticks) >= 2 and len({text for _, text in ticks}) == len(ticks)
