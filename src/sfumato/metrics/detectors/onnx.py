"""Any image classifier in ONNX as a detector, run by onnxruntime, an extra."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import sha256_of
from sfumato.foreign import read_json, reading

from ..vision import Preparation
from .base import Detection, needed
from .labels import LabelDetector, beside, joined

_CONFIGS = "config.json (with id2label) and preprocessor_config.json, as optimum and transformers write them"


class OnnxDetector(LabelDetector):
    """A classifier in a file ``.onnx``: the concept is seen when its label is among the ``top`` most likely.

    What its labels are and how pictures are prepared stands beside the file, in ``config.json`` (``id2label``) and
    ``preprocessor_config.json``. Pictures go in as (batch, 3, height, width), or as (batch, height, width, 3) where the
    model says so; what comes out are probabilities where every row is one, or else logits.
    """

    key = "onnx"

    def __init__(self, model: str | os.PathLike, top: int = 1, batch: int = 32):
        """``model``: a file, or a folder with ``model.onnx``."""
        source = Path(model).expanduser()
        file = source / "model.onnx" if source.is_dir() else source
        if not file.is_file():
            raise BadInput(f"there is no file {file}: give a classifier in ONNX")
        self.prepare, self.labels = _about(str(file))
        if find_spec("onnxruntime") is None:
            raise BadInput("classifiers in ONNX need onnxruntime, which is not installed: pip install 'sfumato[onnx]'")
        runtime = import_module("onnxruntime")
        with reading(file, "a model in ONNX"):
            self.session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            self.input = self.session.get_inputs()[0]
            if len(self.session.get_inputs()) != 1 or len(self.input.shape) != 4 or "float" not in self.input.type:
                raise BadInput(f"{file} does not take pictures alone (as floating-point numbers): give a classifier")
        self.last = self.input.shape[-1] == 3 and self.input.shape[1] != 3
        # Large models keep their weights in files beside the model's own, whose names begin alike.
        files = sorted(f for f in file.parent.iterdir() if f.name.startswith(file.name) and f.is_file())
        self.hash = " ".join(sha256_of(f) for f in files)
        self.name = f"ONNX classifier {source}"
        self.version = f"onnxruntime {runtime.__version__}"
        self.threshold = f"top-{top}"
        self.top = top
        self.batch = batch if isinstance(self.input.shape[0], str | None) else self.input.shape[0]
        self.resize = self.prepare.rule

    @classmethod
    def reads(cls, model: str) -> bool:
        path = Path(model).expanduser()
        return (path.is_file() and path.suffix == ".onnx") or (path / "model.onnx").is_file()

    @classmethod
    def make(cls, model: str, concepts: Sequence[str]) -> OnnxDetector:
        return cls(needed(model, cls.key))

    def __call__(self, images: Float[Tensor, "n 3 height width"], concept: str) -> Detection:
        parts = [self.shares(x) for x in images.split(self.batch) if len(x)]
        return self.judged(joined(parts, self.labels), concept)

    def shares(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n label"]:
        """Probabilities of the labels."""
        pixels = self.prepare(images.float().cpu())
        n, fixed = len(pixels), self.batch if isinstance(self.input.shape[0], int) else len(pixels)
        pixels = torch.cat([pixels, pixels[-1:].expand(fixed - n, *pixels.shape[1:])])  # a model of whole batches
        pixels = pixels.permute(0, 2, 3, 1) if self.last else pixels
        kind = np.float16 if "float16" in self.input.type else np.float32
        with reading(self.name, "a classifier of pictures", "see that its configuration is that of the model"):
            out: Any = self.session.run(None, {self.input.name: np.ascontiguousarray(pixels.numpy().astype(kind))})[0]
            rows = torch.from_numpy(np.asarray(out, dtype=np.float32)).reshape(fixed, -1)[:n]
        if rows.shape[1] != len(self.labels):
            raise BadInput(f"{self.name} gives {rows.shape[1]} numbers for {len(self.labels)} labels: see config.json")
        whole = bool((rows >= 0).all() and ((rows.sum(dim=1) - 1).abs() < 1e-3).all())
        return rows if whole else rows.softmax(dim=1)


def _about(file: str) -> tuple[Preparation, list[str]]:
    """How pictures are prepared, and the labels, by the files beside a model."""
    config, prepare = beside(file, "config.json"), beside(file, "preprocessor_config.json")
    for path in (config, prepare):
        if not path.is_file():
            raise BadInput(f"{path} is missing: a classifier in ONNX needs {_CONFIGS}")
    with reading(config, "a classifier's configuration"):
        named = {int(i): label for i, label in read_json(config, {"id2label": dict})["id2label"].items()}
        labels = [named[i] for i in range(len(named))]
        if not labels or not all(isinstance(label, str) for label in labels):
            raise BadInput(f"{config} has labels (id2label) that are no text: write it again")
    with reading(prepare, "a preparation of pictures"):
        return Preparation.from_config(read_json(prepare)), labels
