"""The verb `classify`: splits, optimisers, statistics under averaged weights, and folders that judges take."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.classify.parts.data import shifted, split
from sfumato.classify.parts.networks import by_name
from sfumato.classify.parts.rules import TensorFlowRMSprop, averaged_statistics, updating
from sfumato.classify.plain import Plain
from sfumato.data.base import Pictures
from sfumato.errors import BadInput
from sfumato.metrics.detectors import make_detector
from sfumato.metrics.extractors import make_extractor
from sfumato.metrics.sets import InceptionScore
from sfumato.train.parts.candidates import logits_of
from sfumato.train.schedule import Schedule

SMALL = {**Plain.EXAMPLE, "updates": 2, "batch": 4}


class Given(Pictures):
    """Pictures of the classes ``labels``."""

    def __init__(self, labels, names=("a", "b")):
        self.labels, self.label_names = labels, names

    def __len__(self):
        return len(self.labels)

    def label(self, index):
        return self.labels[index]


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of each of two classes."""
    rng = np.random.default_rng(0)
    for i in range(8):
        file = tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return str(tmp_path / "pictures")


def test_a_split_takes_the_share_of_every_class_and_nothing_twice():
    pictures = Given([0] * 20 + [1] * 10)
    seen, unseen, told = split(pictures, 0.2, 0, "these")
    assert sorted([*seen.rows, *unseen.rows]) == list(range(30)) and "20%" in told
    assert [unseen.label(i) for i in range(len(unseen))] == [0] * 4 + [1] * 2
    assert split(pictures, 0.2, 1, "these")[1].rows != unseen.rows
    assert len(split(pictures, 0.0, 0, "these")[0]) == 30


@pytest.mark.parametrize(
    ("labels", "names", "share", "wrong"),
    [
        ([0, 0], (), 0.1, "no classes"),
        ([0, 0], ("a",), 0.1, r"one class \(a\)"),
        ([0, 0, 1], ("a", "b"), 0.1, "'b' of these has one picture"),
        ([0, 0], ("a", "b"), 0.0, "'b' of these has no picture"),
    ],
)
def test_data_that_nothing_can_be_learned_from_is_refused(labels, names, share, wrong):
    with pytest.raises(BadInput, match=wrong):
        split(Given(labels, names), share, 0, "these")


def test_pictures_are_moved_whole_and_their_border_is_repeated():
    x = torch.arange(16.0).reshape(1, 1, 4, 4).expand(64, 3, 4, 4)
    moved = shifted(x, 1, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and (moved[:, :, 1:3, 1:3] == x[:, :, 1:3, 1:3]).all((1, 2, 3)).any()
    corners = set(moved[:, 0, 1, 1].tolist())
    assert corners == {0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 8.0, 9.0, 10.0}


def test_rmsprop_has_its_constant_inside_the_root_and_squares_that_start_at_one():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    rule = TensorFlowRMSprop([w], lr=0.1, alpha=0.9, eps=1.0, momentum=0.5)
    square, momentum, value = 1.0, 0.0, 2.0
    for gradient in (3.0, -1.0, 0.5):
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        rule.step()
        square = 0.9 * square + 0.1 * gradient**2
        momentum = 0.5 * momentum + 0.1 * gradient / math.sqrt(square + 1.0)
        value -= momentum
        assert w.item() == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "rmsprop"])
def test_weight_decay_spares_biases_and_normalisation_and_the_order_is_kept(rule):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    made = updating(rule, Schedule(updates=1, batch=1, lr=0.1, weight_decay=0.3), 0.9)(list(net.parameters()), lr=0.1)
    pairs = [(p, group["weight_decay"]) for group in made.param_groups for p in group["params"]]
    assert [id(p) for p, _ in pairs] == [id(p) for p in net.parameters()]
    assert [decay for _, decay in pairs] == [0.3, 0.0, 0.0, 0.0, 0.3, 0.0]


def test_statistics_are_those_of_the_batches_and_weights_at_hand():
    torch.manual_seed(0)
    net, batches = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), [torch.randn(5, 3, 2, 2) for _ in range(3)]
    net(10 + torch.randn(8, 3, 2, 2))
    averaged_statistics(net, batches)
    seen = [net[0](x).transpose(0, 1).flatten(1) for x in batches]
    torch.testing.assert_close(net[1].running_mean, torch.stack([s.mean(1) for s in seen]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([s.var(1) for s in seen]).mean(0))
    assert net[1].momentum == 0.1 and not net[1].training


def test_a_folder_is_a_detector_and_an_extractor(pictures, tmp_path):
    folder = Plain(data=pictures, **SMALL).run(tmp_path / "run", progress=False)
    detector, x = make_detector(folder, ["cat"]), torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        shares = Plain.read(folder)(2 * x - 1).softmax(1)
    torch.testing.assert_close(detector(x, "cat").score, shares[:, 0])
    features = make_extractor(str(folder))
    assert features((x * 255).byte()).shape == (3, 16)
    card = json.loads((folder / "card.json").read_text())
    assert card["top1"]["n"] == 2 and card["trained_on"] == 6 and "held out" in card["measured_on"]


@dataclass(frozen=True, kw_only=True)
class Own(Plain):
    """A network that `transformers` does not know, under the catalogue's name of another."""

    @classmethod
    def name(cls):
        return "plain"

    def network(self, labels):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.append(nn.Linear(4, len(labels)))
        net.features, net.from_features = (lambda x: net[:4](x)), (lambda features: net[4:](features))
        return net


def test_a_folder_of_another_network_is_one_too(pictures, tmp_path, monkeypatch):
    from sfumato import catalog

    folder = Own(data=pictures, **SMALL, ema=0.9).run(tmp_path / "run", progress=False)
    monkeypatch.setattr(catalog.Method, "load", lambda self: Own)
    detector, x = make_detector(folder, ["dog"]), torch.rand(3, 3, 16, 16)
    assert type(detector).key == "trained"
    torch.testing.assert_close(detector(x, "dog").score, Own.read(folder)(2 * x - 1).softmax(1)[:, 1])
    extractor, pixels = make_extractor(str(folder)), (x * 255).byte()
    features = extractor(pixels)
    assert features.shape == (3, 4)
    torch.testing.assert_close(extractor.logits(features).cpu(), Own.read(folder)(2 * (pixels / 255) - 1))
    score = InceptionScore(extractor, splits=1)
    score.update(pixels, real=False)
    found = score.compute()
    assert 1 <= found.value <= 2 and found.protocol["convention"] == "1 shuffled splits, 2 outputs, ddof 0"
    assert logits_of(features, extractor, None).shape == (3, 2)  # a search's judge asks its classes
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput):
        make_detector(folder, ["dog"])


@pytest.mark.parametrize("name", ["nets", "timm:", "transformers:no-such-type"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(BadInput, match=r"unknown"):
        by_name(name, ("a", "b"), 16, (8, 16))


def test_the_command_writes_a_page_where_there_is_something_to_see(pictures, tmp_path, capsys):
    from sfumato.cli import main

    out, plain = tmp_path / "run", tmp_path / "plain"
    small = ["--data", pictures, "--size", "16", "--updates", "1", "--batch", "2", "--track", "none"]
    asked = ["classify", "prototype-net", *small, "--prototypes", "3", "--out", str(out)]
    assert main(asked) == 0
    assert f"page: {out / 'index.html'}" in capsys.readouterr().out
    assert {s["title"] for s in json.loads((out / "report.json").read_text())["sheets"]} == {"Prototypes", "Decisions"}
    (out / "index.html").unlink()
    assert main(asked) == 0 and (out / "index.html").is_file()  # a run that was killed before its page
    assert main(["classify", "plain", *small, "--widths", "8", "16", "--warmup", "0", "--out", str(plain)]) == 0
    assert (plain / "model").is_dir() and not (plain / "index.html").exists()
