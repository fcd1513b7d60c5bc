"""Detectors: is the concept in the picture? One file for each kind, found by being in this folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from sfumato.errors import BadInput

from .base import Detection, Detector
from .classifier import ClassifierDetector
from .imagenet import ImageNetDetector
from .nudenet import NudeNetDetector
from .onnx import OnnxDetector
from .oracle import OracleDetector
from .scenes import SceneDetector
from .trained import TrainedDetector
from .world import WorldDetector
from .zero_shot import ZeroShotDetector

__all__ = [
    "ClassifierDetector", "Detection", "Detector", "ImageNetDetector", "NudeNetDetector", "OnnxDetector",
    "OracleDetector", "SceneDetector", "TrainedDetector", "WorldDetector", "ZeroShotDetector",
    "detector_for", "kinds", "make_detector",
]  # fmt: skip


@cache
def kinds() -> dict[str, type[Detector]]:
    """Key -> class, of every detector that has a file here."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    found = [x for m in modules for x in vars(m).values() if isinstance(x, type) and issubclass(x, Detector)]
    return {cls.key: cls for cls in found if cls.key}


def make_detector(spec: str | os.PathLike | Detector, concepts: Sequence[str]) -> Detector:
    """A detector from what a command line can say.

    Args:
        spec: KEY or KEY:MODEL of a kind ("oracle", "world", "imagenet", "classifier:FOLDER", "zero-shot:FOLDER"); or a
            folder, file or hub id alone, for the kind that can read it: CLIP-style models are a `ZeroShotDetector`,
            image classifiers a `ClassifierDetector`, in ONNX an `OnnxDetector`, of `sfumato classify` a
            `TrainedDetector`. A detector is returned as it is.
        concepts: all that pictures may show, for detectors that tell them from each other.

    Raises:
        BadInput: no such model, one that no detector reads or several do; a key without the model that it needs.
    """
    if isinstance(spec, Detector):
        return spec
    text = os.fspath(spec)
    key, _, model = text.partition(":")
    if key in kinds() and not (model and os.path.isdir(text)):
        return kinds()[key].make(model, concepts)
    readers = {name: cls for name, cls in kinds().items() if cls.reads(text)}
    if len(readers) != 1:
        named = ", ".join(f"{name}:{text}" for name in readers or kinds())
        what = "several kinds of detector" if readers else "no detector"
        raise BadInput(f"{what} can look at pictures with {text}: say which is meant, {named}")
    (cls,) = readers.values()
    return cls.make(text, concepts)


def detector_for(
    vocabulary: Mapping[str, Sequence[str]], spec: str | os.PathLike | Detector | None, concepts: Sequence[str]
) -> Detector:
    """The detector asked for; by default the one that knows the world that a model of that vocabulary was trained on.

    Args:
        vocabulary: `Text2Image.vocabulary`.

    Raises:
        BadInput: none was named and the model is of the world at large; or it cannot look for one of ``concepts``.
    """
    if spec is None and not vocabulary:
        raise BadInput(
            "say how to see the concept: detector=... (a transformers image classifier or a CLIP, folder or hub id); "
            "only the sketch world has oracles"
        )
    detector = make_detector("world" if spec is None else spec, concepts)
    for concept in concepts:
        detector.check(concept)
    return detector
