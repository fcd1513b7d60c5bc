"""The audit: exact cases of every figure, on a tiny random pipeline and with detectors whose answers are
known."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from sfumato.attack.base import Attack, Box, Found
from sfumato.attack.concept_inversion import ConceptInversion
from sfumato.audit import Audit, Detection, Detector, audit
from sfumato.audit.integrity import BATCH, different_prompts, distances, integrity
from sfumato.commands.audit import summary
from sfumato.data.cases import AttackCases, Case, check_concepts, check_retained, say, sketch_cases, template_cases
from sfumato.data.world import WORDS
from sfumato.erase.spm import SPM
from sfumato.errors import BadInput
from sfumato.metrics.perceptual import MSE, FeatureDistance, OneMinusSSIM, lpips_missing, ssim
from sfumato.metrics.resize import to_bytes, to_float
from sfumato.report.audit import AuditReport
from sfumato.report.page import render
from sfumato.report.verdict import findings

INVERSION = ConceptInversion(updates=1, batch=2, n_images=2, init_word="art", templates=("a {}",))
SMALL = {
    "retain": ("circle", "square"), "prompts": ("a {concept}", "a red {concept}"), "n": 4, "n_retain": 3,
    "n_attack": 2, "sampling_steps": 2, "batch": 8, "distance": "mse", "attacks": (), "progress": False,
}  # fmt: skip


class Fixed(Detector):
    """Sees what it is told to see."""

    hash, threshold, resize = "none", 0.5, "none"

    def __init__(self, rule):
        self.name, self.rule = "fixed", rule

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        present = self.rule(images, concept)
        return Detection(present, present.float())


def always(images, concept):
    return torch.ones(len(images), dtype=torch.bool)


def reddish(images, concept):
    """An arbitrary rule that depends on the picture and on the concept."""
    channel = {"star": 0, "circle": 1, "square": 2}[concept]
    return images[:, channel].mean((1, 2)) > images.mean((1, 2, 3))


def variant(pipe, seeds=lambda s: s, prompts=lambda p: p):
    """The same weights behind an adapter that draws other seeds or prompts than it is asked for."""

    class Variant(type(pipe)):
        def draw(self, texts, numbers, **settings):
            return super().draw([prompts(p) for p in texts], [seeds(s) for s in numbers], **settings)

    return Variant(pipe.pipe, pipe.defaults)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    from conftest import make_tiny_sd
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sd(tmp_path_factory, seed=1))


def test_a_perfect_detector_on_an_unedited_model(tiny_sd):
    report = audit(tiny_sd, tiny_sd, ["star"], detector=Fixed(always), **SMALL)
    assert report.erasure["star"].value == 0 and report.erasure["star"].n == 4
    assert {c: r.value for c, r in report.retention.items()} == {"circle": 1, "square": 1}
    assert report.integrity.mean.value == 0 and report.integrity.floor == 0
    assert report.integrity.mean.low == report.integrity.mean.high == 0
    assert report.integrity.ceiling_seeds > 0 and report.integrity.ceiling_prompts > 0
    assert report.cost.parameters_changed == 0
    assert report.protocol["before"]["hash"] == report.protocol["after"]["hash"]


def test_pictures_are_judged_a_batch_at_a_time(tiny_sd):
    sizes = []

    def looks(x, concept):
        sizes.append(len(x))
        return reddish(x, concept)

    audit(tiny_sd, tiny_sd, ["star"], detector=Fixed(looks), **SMALL | {"n": BATCH + 2, "sampling_steps": 1})
    assert max(sizes) == BATCH and sum(sizes) == 2 * (BATCH + 2) + 2 * 2 * SMALL["n_retain"] + 2 * SMALL["n_retain"]


def test_rates_are_those_counted_by_hand(tiny_sd, other):
    report = audit(tiny_sd, other, ["star"], detector=Fixed(reddish), **SMALL | {"n": 6, "n_retain": 6})
    told = report.protocol
    asked = list(zip(told["prompts"], told["seeds"], strict=True))
    assert len(asked) == 6 + 2 * 6 and len(set(told["seeds"])) == len(asked)

    def seen(pipe, concept):
        rows = [(p, s) for p, s in asked if concept in p]
        x = to_bytes(pipe.draw([p for p, _ in rows], [s for _, s in rows], sampling_steps=2, batch=8))
        return reddish(to_float(x), concept)

    assert report.erasure["star"].value == float((~seen(other, "star")).double().mean())
    for concept in ("circle", "square"):
        old, new = seen(tiny_sd, concept), seen(other, concept)
        assert report.retention[concept].n == int(old.sum())
        assert told["detected_before"][concept] == float(old.double().mean())
        if old.any():
            assert report.retention[concept].value == float((old & new).sum() / old.sum())
        else:
            assert not report.retention[concept].measured
    there = [i for i in report.retention.values() if i.measured]
    assert report.kept["all"].value == pytest.approx(sum(i.value for i in there) / len(there))
    assert report.kept["all"].n == sum(i.n for i in there), "here each picture counts for one concept"
    parts = sum(p.numel() for m in other.parts().values() for p in m.parameters())
    assert 0 < report.cost.parameters_changed <= parts == report.cost.parameters_total
    assert told["guidance"] == tiny_sd.defaults["cfg_scale"] and told["sampling_steps"] == 2


def test_integrity_tells_permuted_seeds_from_the_same_pictures(tiny_sd):
    settings = SMALL | {"n_retain": 8, "sampling_steps": 4}
    permuted = audit(tiny_sd, variant(tiny_sd, seeds=lambda s: s ^ 1), ["star"], detector=Fixed(always), **settings)
    # The set of pictures is (nearly) the same; every single one is another: a distance of the ceiling's size.
    ratio = permuted.integrity.mean.value / permuted.integrity.ceiling_seeds
    assert 0.6 < ratio < 1.6
    assert permuted.erasure["star"].value == 0


def test_integrity_is_symmetric_and_blind_to_the_order_of_prompts():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 12, 3, 16, 16, generator=rng)
    prompts = [f"prompt {i % 5}" for i in range(12)]
    layers = [nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.Conv2d(6, 4, 3)]
    with torch.random.fork_rng():
        features = FeatureDistance(layers, "random features", side=16)
    for distance in (MSE(), OneMinusSSIM(), features):
        there = distances(distance, a, b)
        assert torch.allclose(there, distances(distance, b, a), rtol=1e-5) and (there > 0).all()
        assert (distances(distance, a, a).abs() < 1e-6).all()  # 1 - ssim rounds in float32
        estimate, means = integrity(prompts, there, torch.Generator().manual_seed(1), resamples=500)
        order = torch.randperm(12, generator=rng)
        shuffled = [prompts[i] for i in order.tolist()]
        again, _ = integrity(shuffled, there[order], torch.Generator().manual_seed(1), resamples=500)
        assert estimate.n == 5 and again.value == pytest.approx(estimate.value, rel=1e-12)
        assert (again.low, again.high) == pytest.approx((estimate.low, estimate.high), rel=1e-12)
        assert estimate.value == pytest.approx(sum(means.values()) / 5)
        assert different_prompts(distance, prompts, a) > 0
    assert different_prompts(MSE(), ["one"] * 12, a) is None
    with pytest.raises(BadInput, match="different size"):
        distances(MSE(), a, b[..., :8])


def test_distances_have_their_closed_forms():
    x = torch.rand(2, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5
    assert torch.allclose(MSE()(x, x + 0.1), torch.full((2,), 0.01, dtype=torch.float64))
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64), atol=1e-12)
    flat, c1 = torch.full_like(x, 0.2), 0.01**2
    expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)  # no variance: luminance alone
    assert torch.allclose(ssim(flat, flat + 0.4), torch.full((2,), expected, dtype=torch.float64), atol=1e-10)
    layer = nn.Conv2d(3, 3, 1, bias=False).double().requires_grad_(False)
    nn.init.dirac_(layer.weight)
    pixels = FeatureDistance([layer], "pixels", side=20, range_=(0, 1))
    one, two = torch.zeros(1, 3, 20, 20, dtype=torch.float64), torch.zeros(1, 3, 20, 20, dtype=torch.float64)
    one[:, 0], two[:, 1] = 0.7, 0.1
    assert float(pixels(one, two)) == pytest.approx(2.0)  # orthogonal everywhere, whatever the length
    assert float(pixels(one, one * 0.3)) == pytest.approx(0.0, abs=1e-12)


def test_attacks_are_bounded_and_carry_their_budget(tiny_sd, other, tmp_path):
    settings = SMALL | {"attacks": (INVERSION, replace(INVERSION, tokens=0)), "retain": ("circle",)}
    report = audit(tiny_sd, other, ["star"], detector=Fixed(reddish), **settings)
    assert list(report.attacks) == ["concept-inversion", "concept-inversion (2)"]
    for attack in report.attacks.values():
        for rate in (attack.recovered, attack.control, attack.original):
            assert rate.n == 2 and 0 <= rate.low <= rate.value <= rate.high <= 1
        assert attack.budget["updates"] == 1 and attack.budget["control"] == {"star": "circle"}
    # The second was given no tokens: it asks by the plain name and recovers what the plain prompt shows.
    rows = [(p, s) for p, s in zip(report.protocol["prompts"], report.protocol["seeds"], strict=True) if "star" in p]
    x = to_bytes(other.draw([p for p, _ in rows[:2]], [s for _, s in rows[:2]], sampling_steps=2, batch=8))
    assert attack.recovered.value == float(reddish(to_float(x), "star").double().mean())
    folder = report.save(tmp_path / "report")
    assert AuditReport.load(folder).to_json() == json.loads((folder / "report.json").read_text())
    assert "data:image/webp" in (folder / "index.html").read_text()
    assert len(report.gallery.targets["star"]) == 4 and report.gallery.retained["circle"][0].distance > 0


def test_the_seed_decides(tiny_sd, other):
    one, two = (audit(tiny_sd, other, ["star"], detector=Fixed(reddish), seed=s, **SMALL).to_json() for s in (0, 0))
    assert {k: v for k, v in one.items() if k != "created"} == {k: v for k, v in two.items() if k != "created"}
    third = audit(tiny_sd, other, ["star"], detector=Fixed(reddish), seed=1, **SMALL)
    assert not set(third.protocol["seeds"]) & set(one["protocol"]["seeds"])
    assert third.reproduce.startswith("sfumato audit --before 'in memory'") and "--seed 1" in third.reproduce


def test_sketch_cases_are_balanced_and_never_show_an_erased_concept():
    cases = sketch_cases({"star": {"object": "star"}}, None, 40, 12, seed=0)
    assert len(cases.targets["star"]) == 40 and len(cases.retained) == 12 * 11
    assert all("star" in c.prompt for c in cases.targets["star"])
    assert not any("star" in c.prompt.split() for c in cases.retained)
    counts = Counter(w for c in cases.retained for w in c.names)
    assert set(counts) == {w for words in WORDS.values() for w in words} - {"star"}
    for attribute, words in WORDS.items():
        per_word = [counts[w] for w in words if w != "star"]
        assert max(per_word) - min(per_word) <= 1, attribute
        assert min(per_word) >= 12
    assert list(cases.groups) == ["Near: objects", "Far: colours, backgrounds, styles"]
    seeds = [c.seed for row in cases.targets.values() for c in row] + [c.seed for c in cases.retained]
    assert len(set(seeds)) == len(seeds)
    assert sketch_cases({"star": {"object": "star"}}, None, 40, 12, seed=0) == cases
    assert sketch_cases({"star": {"object": "star"}}, None, 40, 12, seed=1).retained != cases.retained


def test_more_pictures_or_larger_seeds_than_there_are_noises_for_are_refused():
    for n, seed, said in ((50_001, 0, "50,000 that one audit"), (1, 10**15, "a seed of cases")):
        with pytest.raises(BadInput, match=said):
            template_cases(["a"], [], None, n, 1, seed)
        with pytest.raises(BadInput, match=said):
            sketch_cases({"star": {"object": "star"}}, (), n, 1, seed)


def test_sketch_cases_of_a_whole_kind_of_a_combination_and_of_chosen_words():
    every = {s: {"style": s} for s in WORDS["style"]}
    cases = sketch_cases(every, None, 4, 2, seed=0)
    assert not any("style" in c.prompt for c in cases.retained)
    assert all(f"{s} style" in c.prompt for s, row in cases.targets.items() for c in row)
    both = sketch_cases({"red star": {"colour": "red", "object": "star"}}, None, 8, 6, seed=0)
    assert {"red", "star"} <= {w for c in both.retained for w in c.names}
    assert not any("red star" in c.prompt for c in both.retained)
    assert all("red star" in c.prompt for c in both.targets["red star"])
    few = sketch_cases({"star": {"object": "star"}}, ["circle", "blue"], 4, 5, seed=0)
    assert few.concepts == ["circle", "blue"] and {w for c in few.retained for w in c.names} == {"circle", "blue"}


def test_bad_input_is_met_before_anything_is_drawn(tiny_sd, tiny_sdxl):
    never = variant(tiny_sd, prompts=lambda p: 1 / 0)
    for concepts, settings, words in (
        ([], {}, "at least one"),
        ([" "], {}, "at least one"),
        (["star", "star"], {}, "every concept once"),
        (["star"], {"retain": ("star",)}, "both erased and retained"),
        (["star"], {"prompts": ("a photo",)}, "{concept}"),
        (["star"], {"distance": "lipps"}, "unknown distance"),
        (["star"], {"attacks": ("concept-invasion",)}, "unknown"),
        (["star"], {"detector": None}, "say how to see the concept"),
        (["star"], {"detector": "./nothing-here"}, "cannot be read as a model of transformers"),
        (["star"], {"n": 0}, "n must be at least 1"),
    ):
        with pytest.raises(BadInput, match=words):
            audit(never, never, concepts, **{"detector": Fixed(always), **SMALL} | settings)
    assert check_concepts("a  red star", None) == ("a red star",)
    assert check_retained((" van  gogh", "Tokyo 東京")) == ("van gogh", "Tokyo 東京")
    assert not tiny_sd.vocabulary
    assert [c.prompt for c in template_cases(["x"], [], ["a {concept}"], 2, 1, 0).targets["x"]] == ["a x", "a x"]
    if reason := lpips_missing():
        with pytest.raises(BadInput, match="LPIPS cannot be measured here"):
            audit(never, never, ["star"], detector=Fixed(always), **SMALL | {"distance": "lpips"})
        assert "torch" in reason


@pytest.mark.parametrize(
    ("retain", "said"),
    [
        (("circle", " circle"), "'circle' is named twice"), (("circle", "Circle"), "'Circle' is named twice"),
        (("circle", " "), "a retained concept is empty"), (("STAR", "circle"), "'STAR' cannot be both"),
        ((" star ",), "'star' cannot be both"),
    ],
)  # fmt: skip
def test_what_is_retained_counts_once_and_is_not_erased_in_other_letters(tiny_sd, retain, said):
    with pytest.raises(BadInput, match=said):
        Audit(before=tiny_sd, after=tiny_sd, concepts=["star"], detector=Fixed(always), **SMALL | {"retain": retain})


def test_the_summary_says_what_the_original_shows_and_how_many_prompts_moved(tiny_sd, other, capsys):
    never = Fixed(lambda images, concept: torch.zeros(len(images), dtype=torch.bool))
    one = SMALL | {"retain": ("circle",), "n_retain": 1}
    report = audit(tiny_sd, other, ["star"], detector=never, **one)
    summary(report)
    told = capsys.readouterr().out
    assert "shown by the original" in told and "kept: the other concept" in told and "1 prompt" in told
    assert "n = 1" not in told.split("mse of pictures kept")[1]
    assert any("‘star’ in 0" in sentence and "not there before" in sentence for sentence in findings(report))
    seen = audit(tiny_sd, other, ["star"], detector=Fixed(always), **one)
    assert not any("not there before" in sentence for sentence in findings(seen))
    assert '<dd class="meta">, ' not in render(seen)  # one prompt has no interval, and no comma before its n


def test_an_attack_that_does_not_fit_is_refused_before_the_first_picture(tiny_sd):
    never = variant(tiny_sd, prompts=lambda p: 1 / 0)
    room = tiny_sd.context_length - 2
    with pytest.raises(BadInput, match=f"context holds {room}"):
        audit(never, never, ["star"], detector=Fixed(always), **SMALL | {"attacks": (replace(INVERSION, tokens=room),)})
    prompts = (f"{'a ' * (room - 2)}{{concept}}",)  # its templates hold two tokens, the audit's prompts do not
    settings = SMALL | {"attacks": (replace(INVERSION, tokens=3),), "prompts": prompts}
    with pytest.raises(BadInput, match=f"context holds {room}"):
        audit(never, never, ["star"], detector=Fixed(always), **settings)


def test_adapters_are_audited_as_they_act(tiny_sd, tmp_path, recwarn):
    erased = SPM(concepts=("star",), updates=2, warmup=1, sampling_steps=2, n_anchors=1, lr=0.1).apply(tiny_sd)
    method = {"method": {"name": "spm"}, "configuration": {"steps": 2}}
    tiny_sd.save(tmp_path / "original")
    erased.save(tmp_path / "erased", provenance=method)
    settings = {"detector": Fixed(reddish), **SMALL}
    here = audit(tiny_sd, erased, ["star"], **settings)
    assert not recwarn.list
    original, folder = str(tmp_path / "original"), str(tmp_path / "erased")
    equipped = audit(original, original, ["star"], adapters=[folder], **settings)
    assert not recwarn.list
    merged = audit(original, folder, ["star"], **settings)
    assert ["merged in at full strength" in str(w.message) for w in recwarn.list] == [True]
    assert equipped.integrity == here.integrity != merged.integrity
    assert equipped.protocol["after"]["adapters"] == here.protocol["after"]["adapters"]
    assert equipped.method == {"name": "spm", "steps": 2} and f"--adapters {folder}" in equipped.reproduce


def test_the_plan_counts_every_picture(tiny_sd, other):
    """As many as the audit then draws, with an attack and its control, and without."""
    plans, drawn = [], []
    counted = lambda prompts: drawn.append(prompts) or prompts
    old, new = variant(tiny_sd, prompts=counted), variant(other, prompts=counted)
    settings = {"detector": Fixed(always), **SMALL, "attacks": (INVERSION,)}
    audit(old, new, ["star"], announce=plans.append, **settings)
    assert f"{len(drawn)} pictures with 2 steps, attacks: 1" in plans[0].title
    drawn.clear()
    audit(old, new, ["star"], announce=plans.append, **settings | {"retain": ()})
    assert f"{len(drawn)} pictures" in plans[1].title
    assert plans[0].seconds > 0 and plans[0].memory["weights of both models"] > 0


def test_nothing_to_retain_is_an_audit_too(tiny_sd, other):
    report = audit(tiny_sd, other, ["star"], detector=Fixed(always), **SMALL | {"retain": ()})
    assert report.retention == {} and report.integrity is None and report.erasure["star"].value == 0
    assert report.protocol["detected_unasked"] == {"star": None}
    assert not sketch_cases({"star": {"object": "star"}}, (), 2, 2, seed=0).retained


def test_models_of_two_families_are_no_pair(tiny_sd, tiny_sdxl):
    with pytest.raises(BadInput, match="no pair"):
        audit(tiny_sd, tiny_sdxl, ["star"], retain=["moon"], detector=Fixed(always))


def broken(pipe, value=float("nan")):
    """A copy with one weight that is no number."""
    made = pipe.copy(own="full")
    next(iter(made.parameters("xattn-strict").values())).data[0, 0] = value
    return made


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_models_with_a_weight_that_is_no_number_are_refused(tiny_sd, value):
    nan, settings = broken(tiny_sd, value), {"detector": Fixed(always), **SMALL}
    for before, after, who in ((tiny_sd, nan, "edited"), (nan, tiny_sd, "original"), (nan, nan, "original")):
        with pytest.raises(BadInput, match=rf"the {who} model \(in memory\) is broken: .*attn2\.to_[kv]"):
            audit(before, after, ["star"], **settings)


def test_pictures_and_distances_that_are_no_numbers_are_refused(tiny_sd):
    class Overflows(type(tiny_sd)):
        def draw(self, *args, **settings):
            return super().draw(*args, **settings) * float("inf")

    after, settings = Overflows(tiny_sd.pipe, tiny_sd.defaults), {"detector": Fixed(always), **SMALL}
    with pytest.raises(BadInput, match=r"the edited model drew pictures that are not finite .*, 6 of 6"):
        audit(tiny_sd, after, ["star"], **settings)

    class Nowhere(MSE):
        name = "nowhere"

        def __call__(self, a, b):
            return super().__call__(a, b) / 0

    with pytest.raises(BadInput, match="distance nowhere is not finite"):
        audit(tiny_sd, tiny_sd, ["star"], **settings | {"distance": Nowhere()})


def test_the_steps_one_by_one_are_the_audit(tiny_sd, other):
    given = {"before": tiny_sd, "after": other, "concepts": "star", "detector": Fixed(reddish), **SMALL}
    one = Audit(**given)
    setup = one.prepare()
    drawn = one.draw(setup)
    assert len(drawn.kept.before) == len(drawn.kept.after) == 6 and len(drawn.asked.after) == 4
    assert torch.equal(drawn.again, drawn.kept.before) and not torch.equal(drawn.reseeded, drawn.kept.before)
    report = one.report(setup, drawn, {}, one.judge(setup, drawn, {})).to_json()
    whole = audit(**given).to_json()
    assert report | {"created": ""} == whole | {"created": ""}


@dataclass
class Reworded(Found):
    said: dict

    def draw(self, pipe, prompts, seeds, **settings):
        return pipe.draw([self.said[p, s] for p, s in zip(prompts, seeds, strict=True)], list(seeds), **settings)

    def record(self):
        return {"said": list(self.said.values())}


@dataclass(frozen=True, kw_only=True)
class Rewording(Attack):
    """As a paraphrase attack would: other words, one prompt after the other, until the judge sees the concept."""

    box: ClassVar[Box] = "black"
    words: tuple[str, ...] = ("circle", "square", "art")

    def rows(self, cases, sampling_steps):
        return 2.0 * cases * len(self.words) * sampling_steps

    needs_judge: ClassVar[bool] = True
    looks_first: ClassVar[bool] = False

    def search(self, pipe, cases, means):
        judge, said = means.judge, {}
        for case in cases.cases:
            for word in self.words:
                said[case.prompt, case.seed] = prompt = say(case.prompt, cases.concept, word)
                if judge(pipe.draw([prompt], [case.seed], **cases.drawing), cases.concept).present.all():
                    break
        return Reworded(cases.concept, self.budget(), said)

    def control(self, pipe, cases, other, *, judge=None, original=None, progress=True):
        rng = torch.Generator().manual_seed(self.seed)
        pick = lambda: self.words[int(torch.randint(len(self.words), (), generator=rng))]
        said = {(c.prompt, c.seed): say(c.prompt, cases.concept, pick()) for c in cases.cases}
        return Reworded(cases.concept, self.budget(), said)


def test_an_attack_written_elsewhere_asks_the_judge_and_brings_its_own_control(tiny_sd, other, tmp_path):
    asked = []

    def seen_in_squares(images, concept):
        asked.append((concept, len(images)))
        return torch.ones(len(images), dtype=torch.bool) if len(asked) in (2, 3) else torch.zeros(len(images)).bool()

    cases = AttackCases("star", [Case("a red star", 0, ("star",)), Case("a star", 1, ("star",))])
    cases = replace(cases, drawing={"sampling_steps": 1})
    found = Rewording().run(tiny_sd, cases, judge=Fixed(seen_in_squares))
    assert found.said == {("a red star", 0): "a red square", ("a star", 1): "a circle"}
    assert asked == [("star", 1)] * 3
    plain = tiny_sd.draw(["a red square"], [0], sampling_steps=1)
    assert torch.equal(found.draw(tiny_sd, ["a red star"], [0], sampling_steps=1), plain)
    record = json.loads((found.save(tmp_path / "attack") / "attack.json").read_text())
    assert record["said"] == ["a red square", "a circle"] and record["budget"]["box"] == "black"
    # Nothing is retained, so that only a control of its own can run.
    settings = SMALL | {"attacks": (Rewording(),), "retain": ()}
    report = audit(tiny_sd, other, ["star"], detector=Fixed(reddish), **settings)
    attack = report.attacks["Rewording"]
    assert attack.recovered.n == attack.control.n == attack.original.n == 2
    assert attack.budget["rows"] == 2 * 2 * 3 * 2 and attack.seconds > 0
