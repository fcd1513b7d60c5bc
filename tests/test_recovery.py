"""Recovery: what it trains, what it leaves, when the concept counts as back."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sfumato.attack.parts.denoising import errors
from sfumato.attack.recovery import Recovery, Relearned, holding
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput
from sfumato.metrics.detectors.base import Detection, Detector

TINY = Recovery(n_images=2, updates=4, lr=1e-2, batch=2, every=2, subset="xattn")
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CASES = AttackCases("star", [Case("a red star", 0, ("star",)), Case("a star", 1, ("star",))], PICTURES)
CASES = replace(CASES, drawing={"sampling_steps": 1, "cfg_scale": 1.0})


class Growing(Detector):
    """Sees the concept in as many of the pictures as it was asked before."""

    name, hash, threshold, resize = "growing", "none", 0.5, "none"

    def __init__(self, also=lambda: None):
        self.calls, self.also = 0, also

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        seen = torch.arange(len(images)) < self.calls
        self.calls += 1
        self.also()
        return Detection(seen, seen.float())


def test_the_share_is_told_at_each_look_and_the_first_that_is_enough(tiny_sd, tmp_path):
    found = TINY.run(tiny_sd, CASES, judge=Growing(), progress=False)
    assert found.curve == [
        {"updates": 0, "share": 0.0}, {"updates": 2, "share": 0.5}, {"updates": 4, "share": 1.0},
    ]  # fmt: skip
    assert found.needed == 2 and replace(found, enough=0.9).needed == 4 and found.before == [False, False]
    assert replace(found, curve=[]).needed is None and len(found.losses) == 4
    folder = found.save(tmp_path / "found")
    assert json.loads((folder / "attack.json").read_text())["needed"] == 2
    assert load_file(folder / "weights.safetensors").keys() == tiny_sd.parameters("xattn").keys()
    # Updates, looks, and the plain prompts.
    assert found.spent["rows"] == 3 * 4 * 2 + 2 * 2 + 2
    assert TINY.rows(2, 1) == 3 * 4 * 2 + 2 * 2 * 2


def test_the_last_weights_are_looked_at_wherever_training_ends(tiny_sd):
    run = lambda attack: attack.run(tiny_sd, CASES, judge=Growing(), progress=False)
    seen = lambda found: [look["updates"] for look in found.curve]
    for updates, looks in ((5, [0, 2, 4, 5]), (4, [0, 2, 4]), (1, [0, 1])):
        assert seen(run(replace(TINY, updates=updates))) == looks
    assert replace(TINY, updates=5).rows(2, 1) == 3 * 5 * 2 + 2 * 2 * 3
    # The plain prompts are 2 rows, an update is 6, a look 2: what is left pays for no look at the end.
    for rows, looks in ((13, [0, 1]), (14, [0, 2]), (15, [0, 2]), (22, [0, 2, 3]), (28, [0, 2, 4])):
        found = run(replace(TINY, updates=50, max_rows=rows))
        assert seen(found) == looks and found.spent["exhausted"] and found.spent["rows"] <= rows


def test_what_other_cases_or_another_judge_have_shown_is_not_gone_on_with(tiny_sd, tmp_path):
    class Other(Growing):
        hash = "another"

    class Chooses(Growing):
        concepts = ("star", "circle")

    def run(cases=CASES, judge=Growing, updates=4):
        attack = replace(TINY, checkpoint_every=2, updates=updates)
        return attack.run(tiny_sd, cases, judge=judge and judge(), folder=tmp_path, progress=False)

    whole = run()
    reseeded = replace(CASES, cases=[replace(case, seed=7) for case in CASES.cases])
    asked = replace(CASES, cases=[replace(CASES.cases[0], prompt="the star"), CASES.cases[1]])
    others = {
        "cases": [reseeded, asked, replace(CASES, cases=CASES.cases[:1])],
        "drawing": [replace(CASES, drawing={**CASES.drawing, "cfg_scale": 2.0})],
    }
    for name, changed in others.items():
        for cases in changed:
            with pytest.raises(BadInput, match=f"{name}="):
                run(cases)
    for judge in (Other, Chooses, None):
        with pytest.raises(BadInput, match="judge="):
            run(judge=judge)
    assert run().curve[:2] == whole.curve[:2]
    with pytest.raises(BadInput, match=r"looks=2.*looks=4"):  # not that the checkpoint were damaged
        run(updates=8)


def test_only_the_subset_is_trained_and_pipelines_that_share_its_storage_never_notice(tiny_sd):
    before = {n: p.detach().clone() for n, p in tiny_sd.parameters("full").items()}
    erased = tiny_sd.copy()

    def look():
        assert all(torch.equal(before[n], p) for n, p in tiny_sd.parameters("full").items())

    found = TINY.run(erased, CASES, judge=Growing(look), original=tiny_sd, progress=False)
    changed = {n for n, x in found.weights.items() if not torch.equal(x, before[n])}
    assert changed and found.weights.keys() == tiny_sd.parameters("xattn").keys()
    look()
    shared = {n: p.data_ptr() for n, p in tiny_sd.parameters("full").items()}
    assert {n: p.data_ptr() for n, p in erased.parameters("full").items()} == shared


def test_without_updates_nothing_has_changed(tiny_sd):
    found = replace(TINY, updates=0).run(tiny_sd, CASES, progress=False)
    assert found.curve == [] and found.losses == []
    asked = (["a red star"], [0])
    assert torch.equal(found.draw(tiny_sd, *asked, sampling_steps=1), tiny_sd.draw(*asked, sampling_steps=1))


def test_it_learns_its_pictures_with_their_prompts(tiny_sd):
    attack = replace(TINY, updates=10, batch=8, every=50, subset="full", lr=3e-3)
    captions = ["a red star", "a blue star"]
    found = attack.run(tiny_sd, replace(CASES, captions=captions), progress=False)
    z0 = tiny_sd.encode_image(PICTURES * 2 - 1).repeat(16, 1, 1, 1)
    rng = torch.Generator().manual_seed(9)
    t, eps = torch.rand(32, generator=rng), torch.randn(z0.shape, generator=rng)
    with torch.no_grad():
        cond = tiny_sd.encode(captions * 16)
        plain = errors(tiny_sd, z0, t, eps, cond).mean()
        with holding(tiny_sd, found.weights):
            learned = errors(tiny_sd, z0, t, eps, cond).mean()
    assert learned < plain  # on noise that it was not trained on


def test_what_is_spent_ends_the_training_and_what_was_learned_until_then_counts(tiny_sd):
    found = replace(TINY, max_rows=13, updates=50, every=100).run(tiny_sd, CASES, progress=False)
    assert found.spent == {"rows": 12, "seconds": found.spent["seconds"], "exhausted": True}
    whole = replace(TINY, updates=2, every=100).run(tiny_sd, CASES, progress=False)
    assert all(torch.equal(found.weights[n], x) for n, x in whole.weights.items())


def test_pictures_are_drawn_by_the_original_with_other_seeds_or_asked_for(tiny_sd):
    bare = replace(CASES, pictures=None)
    found = TINY.run(tiny_sd, bare, original=tiny_sd, progress=False)
    assert isinstance(found, Relearned) and len(found.losses) == 4
    with pytest.raises(BadInput, match="learns from pictures"):
        TINY.run(tiny_sd, bare, progress=False)
    with pytest.raises(BadInput, match="does not name 'star'"):
        found.draw(tiny_sd, ["a circle"], [0])
    with pytest.raises(BadInput, match="another model"), holding(tiny_sd, {"mid.block": torch.zeros(1)}):
        pass
    with pytest.raises(BadInput, match="template"):
        replace(TINY, template="a star").run(tiny_sd, CASES, progress=False)
