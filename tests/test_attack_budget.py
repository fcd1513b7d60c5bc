"""What an attack spends, what ends it, and what it adds to what succeeded without it."""

import pytest
import torch

from sfumato.attack.base import Attack, Found
from sfumato.attack.parts.outcome import outcome
from sfumato.attack.parts.spending import Exhausted, Spending
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput
from sfumato.metrics.detectors.base import Detection, Detector

CASES = AttackCases("star", [Case("a red star", i, ("star",)) for i in range(3)], drawing={"sampling_steps": 2})


class First(Detector):
    """Sees the concept in the first picture that it is shown."""

    name, hash, threshold, resize = "first", "none", 0.5, "none"

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        seen = torch.arange(len(images)) == 0
        return Detection(seen, seen.float())


class Drawn(Found):
    def draw(self, pipe, prompts, seeds, **settings):
        return pipe.draw(list(prompts), list(seeds), **settings)

    def record(self):
        return {}


class Drawing(Attack):
    """Draws again and again until all is spent."""

    box = "black"

    def search(self, pipe, cases, means):
        assert means.open == [False, True, True] or means.judge is None
        with means.spending.allowed():
            while True:
                pipe.draw("a star", 0, sampling_steps=2, cfg_scale=1.0)
        return Drawn(cases.concept, self.budget())


def test_rows_are_counted_and_a_gradient_costs_two_more(tiny_sd):
    z, spent = torch.randn(3, *tiny_sd.latent_shape()), Spending()
    cond = tiny_sd.encode(["a star"] * 3)
    with spent.counting(tiny_sd, tiny_sd.copy()):
        tiny_sd.denoiser(z, 0.5, cond)
        assert spent.rows == 3
        tiny_sd.denoiser(z.requires_grad_(), 0.5, cond)
        assert spent.rows == 3 + 9 and spent.seconds > 0
        with torch.no_grad():
            tiny_sd.draw(["a star", "a circle"], [0, 1], sampling_steps=3, cfg_scale=2.0)
    assert spent.rows == 12 + 2 * 2 * 3
    seconds = spent.seconds
    tiny_sd.denoiser(z, 0.5, cond)
    assert spent.rows == 24 and spent.seconds == seconds, "nothing is counted outside"


def test_rows_never_exceed_the_limit_and_what_was_found_counts(tiny_sd):
    plain = 3 * 2 * (1 if tiny_sd.defaults["cfg_scale"] == 1 else 2)  # the cases' plain prompts, for the judge
    found = Drawing(max_rows=plain + 7).run(tiny_sd, CASES, judge=First(), progress=False)
    assert found.spent["rows"] == plain + 7 and found.spent["exhausted"]
    assert found.before == [True, False, False]
    found = Drawing(max_seconds=0.2).run(tiny_sd, CASES, progress=False)
    assert found.spent["exhausted"] and found.spent["seconds"] >= 0.2 and found.before is None
    with pytest.raises(BadInput, match="raise max_rows"):
        Drawing(max_rows=2).run(tiny_sd, CASES, judge=First(), progress=False)
    assert not tiny_sd.last._forward_hooks
    with pytest.raises(BadInput, match="max_rows must be at least 0"):
        Drawing(max_rows=-1)


def test_an_attack_that_asks_needs_somebody_to_ask(tiny_sd):
    class Asking(Drawing):
        needs_judge = True

    with pytest.raises(BadInput, match="detector"):
        Asking().run(tiny_sd, CASES, progress=False)
    with pytest.raises(TypeError, match="abstract method"):
        type("SilentAttack", (Attack,), {"box": "black"})()


def test_success_before_is_counted_apart():
    before = torch.tensor([True, True, False, False, False, False])
    after = torch.tensor([True, False, True, True, True, False])
    told = outcome(before, after, torch.Generator().manual_seed(0))
    assert told.before.value == pytest.approx(2 / 6) and told.before.n == 6
    assert told.further.value == pytest.approx(3 / 4) and told.further.n == 4
    assert told.total.value == pytest.approx(5 / 6) and told.before.value <= told.total.value <= 1
    assert told.total.low < told.total.value < told.total.high
    with pytest.raises(BadInput, match="6 cases before"):
        outcome(before, after[:5], torch.Generator())


def test_a_search_may_go_on_counting_later():
    spent = Spending(max_seconds=1e-9)
    with spent.counting(), pytest.raises(Exhausted):
        spent.check()
    with spent.counting(), spent.allowed():
        spent.check()
        pytest.fail("it is spent")
