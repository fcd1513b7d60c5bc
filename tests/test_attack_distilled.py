"""Attacks on what was distilled to few steps: the cases' settings are the original's, and it draws in its own way."""

import pytest
import torch

from sfumato import catalog
from sfumato.data.cases import AttackCases, Case
from sfumato.metrics.detectors.base import Detection, Detector
from sfumato.pipeline.distilled import few_steps, own_way

DRAWING = {"sampling_steps": 2, "cfg_scale": 2.0, "scheduler": "ddim"}
CASES = AttackCases("star", [Case("a red star", 0, ("star",))], drawing=DRAWING)


class Never(Detector):
    """Sees nothing, however often it is asked."""

    name, hash, threshold, resize = "never", "none", 0.5, "none"

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        none = torch.zeros(len(images))
        return Detection(none.bool(), none)


def test_own_way_leaves_other_pipelines_their_settings(tiny_sd):
    few = tiny_sd.copy()
    few_steps(few, 1)
    assert own_way(tiny_sd, DRAWING) == DRAWING
    assert own_way(few, {**DRAWING, "batch": 3}) == {**dict.fromkeys(DRAWING), "batch": 3}


@pytest.mark.parametrize("method", [m.name for m in catalog.methods("attack")])
def test_every_attack_takes_it(method, tiny_sd):
    few, cls = tiny_sd.copy(), catalog.get(method, "attack").load()
    few_steps(few, 1)
    found = cls(**cls.EXAMPLE).run(few, CASES, judge=Never(), original=tiny_sd, progress=False)
    pictures = found.draw(few, CASES.prompts, CASES.seeds, **own_way(few, DRAWING))
    assert pictures.shape == (1, 3, few.size, few.size) and pictures.isfinite().all()
