"""Small worlds that need no files: sketches, and handwritten digits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sfumato.data import sketch
from sfumato.errors import BadInput

from .base import Pictures


class SketchPictures(Pictures):
    """``count`` pictures of the sketch world: three in four show one object, the others two or three.

    The class is the object, the one that the caption names first where there are several.
    """

    def __init__(self, size: int, seed: int, count: int):
        self.size, self.seed, self.count = size, seed, count
        self.label_names = sketch.OBJECTS

    def __len__(self) -> int:
        return self.count

    def _scene(self, index: int):
        rng = np.random.default_rng((self.seed, index))
        n = rng.choice([1, 2, 3], p=[0.76, 0.18, 0.06])
        return sketch.sample_scene(rng, n_objects=int(n)), rng

    def caption(self, index: int) -> str:
        return sketch.caption(*self._scene(index))

    def identity(self) -> str:
        """By what the rows are drawn from; nothing is drawn."""
        return f"{self.count:,} of {type(self).__name__} with seed {self.seed}"

    def scene(self, index: int) -> sketch.Scene:
        """What picture ``index`` shows."""
        return self._scene(index)[0]

    def label(self, index: int) -> int:
        scene = self.scene(index)
        first = scene.relations[0][0] if scene.relations else 0
        return self.label_names.index(scene.objects[first].object)

    def picture(self, index: int) -> np.ndarray:
        return sketch.render(self.scene(index), self.size)


class ScenePictures(SketchPictures):
    """``count`` pictures of the sketch world for a model that is to draw what prompts ask: most show two objects.

    Pictures 2i and 2i + 1 are a scene and its twin, with colours or places exchanged (`sketch.twin`), and captions
    come in all phrasings of `sketch.training_caption`. The class is the object that `sketch.caption` names first, which
    other phrasings may name later, or not at all.
    """

    group = 2

    def _scene(self, index: int):
        rng = np.random.default_rng((self.seed, index // 2))
        scene = sketch.training_scene(rng)
        return sketch.twin(scene, rng) if index % 2 else scene, np.random.default_rng((self.seed, index, 1))

    def caption(self, index: int) -> str:
        return sketch.training_caption(*self._scene(index))

    def label(self, index: int) -> int:
        return super().label(index) if self.scene(index).objects else 0


class DigitPictures(Pictures):
    """The 1797 handwritten digits of the UCI Optical Recognition set, as scikit-learn ships them: white on black."""

    label_names = tuple("0123456789")

    def __init__(self, size: int):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise BadInput("the digits come with scikit-learn: pip install scikit-learn") from error
        digits = load_digits()
        self.size, self.labels = size, digits.target
        # Levels 0 to 16.
        self.levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def caption(self, index: int) -> str:
        return f"the digit {self.labels[index]}"

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def picture(self, index: int) -> np.ndarray:
        image = Image.fromarray(self.levels[index]).convert("RGB")
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.LANCZOS))
