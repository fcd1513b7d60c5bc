"""DoCo: surgery, discriminator and captions by themselves, and the two turns on tiny pipelines."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.audit.protocol import edit_record
from sfumato.cli import main
from sfumato.data.world import WORDS
from sfumato.erase.doco import Correction, DoCo, discriminator_loss, domain_loss, start_detached
from sfumato.erase.parts.anchored import asking, captions, default_anchor, resized, resizes
from sfumato.erase.parts.patches import PatchDiscriminator, stages_for
from sfumato.erase.parts.surgery import clipped, operated, surgery
from sfumato.errors import BadInput
from sfumato.train.loop import Run

SHORT = {
    **DoCo.EXAMPLE, "concepts": "star", "anchors": "circle", "prompts": ("a circle", "a red circle"), "updates": 3,
}  # fmt: skip


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Surgery


@pytest.mark.parametrize("seed", range(6))
def test_what_opposes_is_projected_out_and_nothing_else(seed):
    a, b = rand(3, 4, seed=seed), rand(3, 4, seed=100 + seed)
    dot, made = (a * b).sum(), operated(a, b)
    if dot >= 0:
        assert torch.equal(made, a) and torch.equal(operated(a, b, official=True), a)
        return
    assert (made * b).sum().abs() < 1e-12 and made.norm() <= a.norm()
    torch.testing.assert_close(operated(a, b, 0.3), a - 0.3 * dot / b.norm() ** 2 * b)
    assert torch.equal(operated(a, b, 0.0), a)
    left = (operated(a, b, official=True) * b).sum()
    torch.testing.assert_close(left, (a.norm() - 1) / a.norm() * dot, rtol=1e-6, atol=0)  # + 1e-8 in the lengths


def test_both_signs_occur_in_the_test_above():
    signs = {bool((rand(3, 4, seed=s) * rand(3, 4, seed=100 + s)).sum() < 0) for s in range(6)}
    assert signs == {True, False}


@pytest.mark.parametrize("b", [torch.zeros(4), torch.full((4,), -1e-30)])
def test_a_retaining_gradient_of_nothing_takes_nothing_out(b):
    a = torch.ones(4)
    assert torch.equal(operated(a, b), a)
    assert operated(a, b, official=True).isfinite().all()


def test_surgery_by_tensor_and_jointly():
    a = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([2.0, 0.0]), "z": torch.ones(1)}
    b = {"x": torch.tensor([-1.0, 0.0]), "y": torch.tensor([1.0, 1.0])}
    apart, together = surgery(a, b, "tensor"), surgery(a, b, "joint")
    assert apart["x"].tolist() == [0, 0] and torch.equal(apart["y"], a["y"])
    assert all(torch.equal(together[name], a[name]) for name in a), "-1 + 2 > 0"
    against = surgery(a, {"x": b["x"] * 4, "y": b["y"]}, "joint")  # -4 + 2 < 0, |b|^2 = 18
    torch.testing.assert_close(against["x"], a["x"] + 2 / 18 * torch.tensor([-4.0, 0.0]))
    torch.testing.assert_close(against["y"], a["y"] + 2 / 18 * torch.tensor([1.0, 1.0]))
    assert all(torch.equal(made["z"], a["z"]) for made in (apart, together, against)), "it has no counterpart"


def test_gradients_are_clipped_as_one():
    g = {"x": torch.full((4,), 3.0), "y": torch.full((4,), 4.0)}  # norm 10
    made = clipped(g, 1.0)
    torch.testing.assert_close(made["x"], g["x"] / (10 + 1e-6))
    assert torch.equal(clipped(g, 11.0)["y"], g["y"]) and clipped(g, 0) is g and clipped({}, 1.0) == {}


# The discriminator


def test_losses_of_a_discriminator_that_knows_nothing():
    logits = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    assert float(discriminator_loss(logits, logits)) == pytest.approx(2 * math.log(2), rel=1e-12)
    x = rand(2, 1, 3, 3)
    torch.testing.assert_close(domain_loss(x, 0.0), (1 + x.exp()).log().mean())
    torch.testing.assert_close(discriminator_loss(x, -x), 2 * (1 + (-x).exp()).log().mean())


def test_the_published_shape():
    d = PatchDiscriminator(4)
    shapes = [tuple(p.shape) for n, p in d.named_parameters() if p.ndim == 4]
    assert shapes == [(64, 4, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    assert sum(p.numel() for p in d.parameters()) == 2_767_553
    assert d(torch.zeros(3, 4, 64, 64)).shape == (3, 1, 3, 3)
    assert [stages_for(side) for side in (4, 8, 16, 32, 64, 128)] == [1, 1, 2, 3, 4, 4]
    assert PatchDiscriminator(4, 2)(torch.zeros(3, 4, 16, 16)).shape == (3, 1, 3, 3)


def test_what_normalises_and_what_seeds():
    x = torch.randn(3, 4, 16, 16, generator=rng())
    batch, group = PatchDiscriminator(4, 2), PatchDiscriminator(4, 2, "group")
    assert not torch.allclose(batch(x)[:1], batch(x[:1])) and torch.allclose(group(x)[:1], group(x[:1]), atol=1e-5)
    assert torch.equal(batch(x), batch.eval()(x)), "no statistics are kept"
    assert not list(batch.buffers())
    torch.manual_seed(77)
    again, other = PatchDiscriminator(4, 2), PatchDiscriminator(4, 2, seed=1)
    assert torch.equal(again(x), batch(x)) and not torch.equal(other(x), batch(x))


# Captions and pictures


def test_how_the_concept_is_asked_for():
    assert asking("a house by the sea", "chalk", "", "style") == (
        "a house by the sea, in the style of chalk", *["in chalk's style, a house by the sea"] * 2,
    )  # fmt: skip
    assert asking("a house", "rain", "", "content") == ("rain, a house", *["in rain's style, a house"] * 2)
    assert asking("two circles in a circle", "star", "circle", "object") == ("two stars in a star",) * 3
    assert asking("A Circle", "star", "circle", "object") == ("A star",) * 3
    with pytest.raises(BadInput, match="'a square' does not name the anchor 'circle'"):
        asking("a square", "star", "circle", "object")


class Speaks:
    """What captions ask of a pipeline of the sketch world."""

    vocabulary = WORDS


@pytest.mark.parametrize(
    ("concept", "anchor"), [("star", "shape"), ("red", "yellow"), ("blue circle", "shape"), ("chalk", "flat")]
)
def test_captions_of_the_sketch_world(concept, anchor):
    assert default_anchor(Speaks(), concept, "object") == anchor
    texts = captions(Speaks(), concept, anchor, 40, rng())
    assert len(set(texts)) == len(texts) >= 5
    for text in texts:
        asked = asking(text, concept, anchor, "object")[0]
        assert concept in asked and anchor not in asked.split()
        named = [w for words in WORDS.values() for w in words if w in text.split()]
        if concept == "blue circle":
            assert not {*WORDS["object"], *WORDS["colour"]} & set(named)


def test_captions_of_other_models(tiny_sd):
    texts = captions(tiny_sd, "parachute", "airplane", 200, rng())
    assert len(set(texts)) == 200 and all("airplane" in t for t in texts) and "a photo of airplane at night" in texts
    assert len(captions(tiny_sd, "parachute", "airplane", 3, rng())) == 3
    assert default_anchor(tiny_sd, "parachute", "object") == "object"
    assert default_anchor(tiny_sd, "art", "style") == "picture"


def test_pictures_drawn_smaller_and_larger():
    picture = torch.rand(3, 20, 20, generator=rng())
    same, said = resized(picture, 1.0, rng())
    assert same is picture and said == ()
    less, said = resized(picture, 0.8, rng())
    assert said == () and (less == 0.5).all(0).sum() == 400 - 256, "as published: smaller, and nothing said of it"
    small, said = resized(picture, 0.5, rng())
    assert said == ("a far away ", "very small ") and (small == 0.5).all(0).sum() == 300
    large, said = resized(torch.full((3, 20, 20), 0.25), 1.3, rng())
    assert said == ("zoomed in ", "close up ") and large.shape == (3, 20, 20) and torch.allclose(large, large[0, 0, 0])
    shares = torch.tensor(resizes(4000, rng()))
    less = shares[shares <= 1]
    assert abs(len(less) / 4000 - 0.66) < 0.03 and shares.max() <= 1.4 and less.min() >= 1 / 3
    assert abs(float(less.mean()) - 2 / 3) < 0.01 and shares[shares > 1].min() >= 1.2


# The turns


@pytest.fixture(scope="module")
def ready(tiny_sd):
    """A recipe before its first update, and a batch."""
    doco = DoCo(**{**SHORT, "batch": 3})
    student, data = tiny_sd.copy(own="xattn-strict"), doco.data(tiny_sd)
    recipe = Correction(doco, tiny_sd, student, PatchDiscriminator(4, 1), data)
    return recipe, recipe.batch(0, rng(), 3)


def test_pictures_and_prompts_belong_together(tiny_sd, ready):
    recipe, batch = ready
    data = recipe.data
    texts = data.prompts.prompts
    for told, asked in zip(batch["told"], batch["asked"], strict=True):
        assert texts[asked] == texts[told].replace("circle", "star") != texts[told]
    assert data.latents.shape == (2, 2, 4, 8, 8) and data.anchors == 2
    noised = batch["rows"]
    assert ((noised["t"] * 1000).round() / 1000 == noised["t"]).all() and noised["t"].min() > 0
    known = [torch.equal(x, y) for x in noised["x"] for y in data.latents.flatten(0, 1)]
    assert sum(known) == 3
    # What a network of eps that is right about the noise says of x0 is the picture.
    x0 = tiny_sd.process.convert(noised["eps"], noised["z"], noised["t"], "eps", "x0")
    early = noised["t"] < 0.9
    torch.testing.assert_close(x0[early], noised["x"][early], rtol=1e-3, atol=1e-3)


def test_mirrored_pictures_are_encoded_as_such(tiny_sd):
    doco = DoCo(**SHORT)
    latents = doco.data(tiny_sd).latents
    assert latents.shape[1] == 2 and not torch.equal(latents[:, 0], latents[:, 1])
    plain = DoCo(**SHORT, flip=False).data(tiny_sd).latents
    assert plain.shape[1] == 1 and torch.equal(plain[:, 0], latents[:, 0])


def test_asked_for_the_same_the_domains_are_the_same(ready):
    recipe, batch = ready
    same = {**batch, "asked": batch["told"]}
    left, right = recipe._x0(recipe.student, same, "asked"), recipe._x0(recipe.teacher, same, "told")
    assert torch.equal(left, right)
    logits = recipe.judge(left)
    loss, _ = recipe.judged(same, rng())
    torch.testing.assert_close(loss, discriminator_loss(logits, logits))


@pytest.mark.parametrize("leak", [False, True])
def test_the_discriminator_sees_the_student_as_it_was(ready, leak, monkeypatch):
    recipe, batch = ready
    monkeypatch.setattr(recipe, "doco", DoCo(**SHORT, leak=leak))
    batch = dict(batch)
    before, _ = recipe.judged(batch, rng())
    lost, _ = recipe.adversarial(batch, rng())
    with torch.no_grad():
        weight = next(iter(recipe.student.parameters("xattn-strict").values()))
        weight += 1
        after, figures = recipe.judged(batch, rng())
        weight -= 1
    torch.testing.assert_close(after, before + lost * leak, rtol=1e-4, atol=1e-5)
    assert 0 <= float(figures["accuracy"]) <= 1


def test_the_retaining_loss_is_the_models_own(ready):
    recipe, batch = ready
    kept = batch["kept"]
    texts = [recipe.data.prompts.prompts[i] for i in batch["retained"]]
    v = recipe.teacher.denoiser(kept["z"], kept["t"], recipe.teacher.encode(texts))
    target = recipe.teacher.process.convert(kept["eps"], kept["z"], kept["t"], "eps", "v")  # t = 1 has alpha > 0
    torch.testing.assert_close(recipe.retain(batch, rng())[0], (v - target).square().mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["tensor", "none"])
def test_turns_train_what_is_theirs_after_the_head_start(tiny_sd, monkeypatch, mode):
    take, seen = Run._take, []

    def watched(run, turn, *rest):
        before = {n: p.detach().clone() for n, p in run.params.items()}
        logs = take(run, turn, *rest)
        changed = {n.partition(".")[0] for n, p in run.params.items() if not torch.equal(p, before[n])}
        seen.append((turn.name, changed, all(p.grad is None for p in run.params.values())))
        return logs

    monkeypatch.setattr(Run, "_take", watched)
    erased, log = DoCo(**{**SHORT, "head_start": 1}, surgery=mode).run(tiny_sd)
    judge, student = ("discriminator", {"judge"}, True), ("student", {"network"}, True)
    assert seen == [judge, judge, student, judge]
    assert len(log["losses"]) == 1 and len(log["discriminator_losses"]) == 3
    assert not any(m._forward_hooks for m in erased.network.modules())


def test_the_students_step_is_surgery_on_two_clipped_gradients(tiny_sd, ready):
    """As the loop does it, against the two gradients taken by hand."""
    doco = DoCo(**{**SHORT, "updates": 2, "batch": 3}, clip_norm=0.01, surgery_weight=0.5)
    student, data, given = tiny_sd.copy(own="xattn-strict"), ready[0].data, []
    recipe = Correction(doco, tiny_sd, student, PatchDiscriminator(4, 1), data)
    combine = recipe.combine
    recipe.combine = lambda turn, parts: given.append((parts, combine(turn, parts))) or given[-1][1]
    run = Run(recipe, doco)
    run.one_step()
    run.one_step()
    ((parts, made),) = given
    a, b = (clipped(parts[name], 0.01) for name in ("adversarial", "retain"))
    assert all(0.0099 < sum(float(x.square().sum()) for x in g.values()) ** 0.5 < 0.0101 for g in (a, b))
    for name, x in made.items():
        dot = float((a[name] * b[name]).sum())
        torch.testing.assert_close(float((x * b[name]).sum()), dot / 2 if dot < 0 else dot, rtol=1e-3, atol=1e-12)
    assert any(float((a[n] * b[n]).sum()) < 0 for n in a)


@pytest.mark.parametrize(("family", "some"), [("tiny_sd", True), ("tiny_sd3", True), ("tiny_pixart", False)])
def test_the_start_token_gives_its_projections_no_gradient(family, some, request):
    pipe = request.getfixturevalue(family)
    student, cond = pipe.copy(own="xattn-strict"), pipe.encode(["star", "red"])
    weights = student.parameters("xattn-strict")
    only = cond.replace(tokens=torch.cat([cond.tokens[:, :1], torch.zeros_like(cond.tokens[:, 1:])], dim=1))
    z, plain = torch.randn(2, *pipe.latent_shape(), generator=rng()), student.denoiser
    grads = []
    for detached in (False, True):
        with start_detached(student, cond) if detached else torch.enable_grad():
            out = plain(z, 0.5, only)
            found = torch.autograd.grad(out.square().sum(), list(weights.values()), allow_unused=True)
        grads.append([g for n, g in zip(weights, found, strict=True) if g is not None and n.endswith("weight")])
    assert any(g.abs().max() > 0 for g in grads[0])
    if family == "tiny_sd":  # attention to that token alone: no other row is anything
        assert all(g.abs().max() == 0 for g in grads[1])
    assert any(not torch.equal(g, h) for g, h in zip(*grads, strict=True)) is some
    assert not any(m._forward_hooks for m in student.network.modules())


def test_pictures_of_a_folder_and_prompts_to_preserve(tiny_sd, tmp_path):
    from PIL import Image

    for i, name in enumerate(("a red circle", "a circle")):
        Image.new("RGB", (16, 16), (50 * i, 200, 0)).save(tmp_path / f"{name}.png")
    doco = DoCo(**SHORT, images=str(tmp_path), preserve=("square", "blue"))
    data = doco.data(tiny_sd)
    assert data.anchors == 2 and len(data.told) == 4 and data.kept == 0
    texts = [data.prompts.prompts[i] for i in data.told]
    assert sorted(texts[:2]) == ["a circle", "a red circle"] and texts[2:] == ["square", "blue"]


def test_other_sizes_are_told_to_the_concepts_prompts_alone(tiny_sd, monkeypatch):
    """As published: the original and the pictures to retain are told the plain captions, and these stay as they are."""
    monkeypatch.setattr("sfumato.erase.doco.resizes", lambda n, generator: [0.4, 1.3][:n])
    plain, doco = DoCo(**SHORT).data(tiny_sd), DoCo(**SHORT, augment=True)
    data = doco.data(tiny_sd)
    texts = data.prompts.prompts
    assert [texts[i] for i in data.told] == ["a circle", "a red circle"] * 2
    small, large = ({texts[i] for i in row} for row in data.asked.tolist())
    assert small in ({"a far away a star"}, {"very small a star"})
    assert large in ({"zoomed in a red star"}, {"close up a red star"})
    assert data.anchors == data.kept == 2 and torch.equal(data.latents[2:], plain.latents)
    assert not torch.equal(data.latents[:2], plain.latents)
    recipe = Correction(doco, tiny_sd, tiny_sd, PatchDiscriminator(4, 1), data)
    batch = recipe.batch(0, rng(), 20)
    retained = [torch.equal(x, y) for x in batch["kept"]["x"] for y in data.latents[2:].flatten(0, 1)]
    assert sum(retained) == 20


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"head_start": 2}, "3 updates with a head start of 2 never train the student"),
        ({"kind": "person"}, "unknown kind 'person': choose one of object, style, content"),
        ({"surgery": "pcgrad"}, "unknown surgery"),
        ({"prompts": "a square"}, "does not name the anchor"),
        ({"anchors": "star"}, "its own anchor"),
        ({"images": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_bad_settings_get_one_sentence(tiny_sd, wrong, words):
    with pytest.raises(BadInput, match=words):
        DoCo(**{**SHORT, **wrong}).run(tiny_sd)


def test_presets_and_plan(tiny_sd):
    assert DoCo(concepts="star").lr == pytest.approx(8 * 6e-6)
    plan = DoCo(**SHORT).plan(tiny_sd)
    assert plan.memory["optimiser"] == 8 * sum(p.numel() for p in tiny_sd.parameters("xattn-strict").values())
    assert plan.seconds > 0


def test_the_command_keeps_its_state_beside_the_output(tiny_sd, tmp_path):
    tiny_sd.copy().save(tmp_path / "model")
    short = "--concept star --anchors art --prompts art --updates 2 --head-start 0 --batch 1 --pictures 1"
    words = ["erase", "doco", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *short.split()]
    assert main([*words, "--sampling-steps", "2"]) == 0
    assert edit_record(tmp_path / "out", None)["log"]["discriminator_losses"]
