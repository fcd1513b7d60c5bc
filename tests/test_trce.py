"""TRCE: the closed form on ends of texts, the statistics of captions, and the contrast of the second stage."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import mse_loss

from sfumato.erase.parts.closed_form import gram, ridge_edit
from sfumato.erase.parts.statistics import caption_gram, read_captions
from sfumato.erase.parts.textual import OBJECT, SKETCH, STYLE, first_end, textual_edit
from sfumato.erase.trce import TRCE, Contrast, amplified, hinge, steered
from sfumato.errors import BadInput
from sfumato.pipeline.conditioning import Role
from sfumato.train.draw import Share

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SHORT = {**TRCE.EXAMPLE, "concepts": "star", "anchors": "circle"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = [normal(6, 5), normal(4, 5, seed=1)]
HARMFUL, SAFE, CAPTIONS = normal(3, 5, seed=2), normal(3, 5, seed=3), normal(40, 5, seed=4)


# Stage 1


def test_the_edit_is_the_papers_formula():
    kept, w = gram(CAPTIONS) / 8, torch.tensor([1.0, 7.0, 0.5], dtype=torch.float64)
    edited, _ = textual_edit(WEIGHTS, HARMFUL, SAFE, kept, eta=0.3, lam=0.2, row_weights=w, prompts=2)
    b = sum(w[j] * torch.outer(HARMFUL[j], HARMFUL[j]) for j in range(3)) / 2 + 0.3 * kept
    b += 0.2 * torch.eye(5, dtype=torch.float64)
    for old, new in zip(WEIGHTS, edited, strict=True):
        a = sum(w[j] * torch.outer(old @ SAFE[j], HARMFUL[j]) for j in range(3)) / 2
        a = a + 0.3 * old @ kept + 0.2 * old
        torch.testing.assert_close(new, a @ torch.linalg.inv(b), **EXACT)


def test_the_objective_is_stationary_there():
    (new,), _ = textual_edit(WEIGHTS[:1], HARMFUL, SAFE, gram(CAPTIONS) / 8, eta=0.3)
    old, new = WEIGHTS[0], new.requires_grad_()
    mapped = (HARMFUL @ new.T - SAFE @ old.T).square().sum() / 3
    (mapped + 0.3 / 8 * (CAPTIONS @ (new - old).T).square().sum()).backward()
    assert new.grad.abs().max() < 1e-10


def test_nothing_to_map_and_nothing_that_outweighs_the_captions():
    kept = gram(CAPTIONS) / 8
    for old, new in zip(WEIGHTS, textual_edit(WEIGHTS, SAFE, SAFE, kept, eta=0.3)[0], strict=True):
        assert torch.equal(old, new)
    for old, new in zip(WEIGHTS, textual_edit(WEIGHTS, HARMFUL, SAFE, kept, eta=1e12)[0], strict=True):
        torch.testing.assert_close(new, old, **EXACT)


def test_captions_of_the_harmful_rows_themselves_interpolate():
    """With B_k of the same rows: A = (s + eta n h) h^T / n, so the response lies between safe and old."""
    eta, n = 0.5, 5
    rows, goal = normal(n, 5, seed=6), normal(n, 5, seed=7)
    (new,), _ = textual_edit(WEIGHTS[:1], rows, goal, gram(rows) / n, eta=eta)
    torch.testing.assert_close(rows @ new.T, (goal + eta * rows) @ WEIGHTS[0].T / (1 + eta), **EXACT)


def test_one_row_with_lam_is_uces_formula():
    edited, _ = textual_edit(WEIGHTS, HARMFUL[:1], SAFE[:1], lam=0.5)
    expected, _ = ridge_edit(WEIGHTS, HARMFUL[:1], SAFE[:1], lam=0.5)
    for new, other in zip(edited, expected, strict=True):
        torch.testing.assert_close(new, other, **EXACT)
    with pytest.raises(BadInput, match="raise lam"):
        textual_edit(WEIGHTS, HARMFUL, SAFE, gram(HARMFUL))


def test_each_end_is_found_in_its_own_prompt(tiny_sd, tiny_pixart):
    """"hat" is three tokens of the tiny tokenizer: counting words would land inside the prompt."""
    for pipe in (tiny_sd, tiny_pixart):
        cond = pipe.encode(["a hat", "star", ""])
        end = pipe.tokenizers[0].eos_token_id
        assert first_end(cond).tolist() == [row.index(end) for row in cond.ids.tolist()]
    assert first_end(tiny_sd.encode("a hat")) > 3


def test_a_text_without_an_end_ends_with_its_last_row(tiny_sana):
    """Gemma's tokenizer closes texts with nothing: else the start, which all texts share, would be mapped to itself."""
    cond = tiny_sana.encode(["a red star", "star"])
    assert not (cond.roles == Role.END).any() and first_end(cond).tolist() == [3, 1]
    harmful, safe, _ = TRCE(**{**SHORT, "templates": ("a red {}",)}).rows(tiny_sana)
    a, b = (tiny_sana.text_rows(tiny_sana.encode(f"a red {word}"))[0, 3] for word in ("star", "circle"))
    torch.testing.assert_close(harmful[0], a)
    torch.testing.assert_close(safe[0], b)
    assert not torch.equal(a, b)


def test_templates_may_have_other_braces_and_one_may_stand_alone(tiny_sd):
    method = TRCE(**{**SHORT, "templates": "a {} in {x}", "prompt": "{} {0}", "updates": 1})
    assert method.templates == ("a {} in {x}",)
    a, b = (tiny_sd.encode(f"a {word} in {{x}}") for word in ("star", "circle"))
    harmful, safe, _ = method.rows(tiny_sd)
    torch.testing.assert_close(harmful, a.tokens[0, first_end(a)])
    torch.testing.assert_close(safe, b.tokens[0, first_end(b)])
    recipe = Contrast(method, tiny_sd, tiny_sd, tiny_sd)
    assert recipe.harmful.prompts == ("star {0}",) and recipe.safe.prompts == ("circle {0}",)


def test_latents_that_are_kept_hold_no_others(tiny_sd):
    recipe = Contrast(TRCE(**{**SHORT, "per_concept": 3, "updates": 3, "batch": 2}), tiny_sd, tiny_sd, tiny_sd)
    kept = [z for z, _ in (*recipe.early.values(), *recipe.free.values())]
    assert len(kept) > 4 and all(z.untyped_storage().nbytes() == z.nbytes for z in kept)


def test_a_safe_phrase_of_nothing_is_no_prompt(tiny_sdxl):
    """As guidance takes it, so that its amplified prediction is the unprompted one: on SDXL not the encoded ""."""
    bare = {**SHORT, "concepts": ("star", "square"), "anchors": ("", "circle"), "prompt": "{}", "updates": 1}
    recipe = Contrast(TRCE(**bare), tiny_sdxl, tiny_sdxl, tiny_sdxl)
    for told, null in ((recipe.safe.tokens, recipe.empty.tokens), (recipe.safe.pooled, recipe.empty.pooled)):
        assert torch.equal(told[:1], null) and told[1].abs().max() > 0


def test_rows_and_their_weights(tiny_sd):
    method = TRCE(**{**SHORT, "concepts": "a star", "token_weights": (0.25, 1.0, 0.5, 2.0), "templates": ("red {}",)})
    harmful, safe, weights = method.rows(tiny_sd)
    a, b = (tiny_sd.encode(p).tokens[0] for p in ("red a star", "red circle"))
    last = len(a) - 1  # start, red, a, star, end: at 4, and the circle's at 3
    torch.testing.assert_close(harmful, a[[0, 4, last, 2, 3]])
    torch.testing.assert_close(safe, b[[0, 3, last, last, last]])
    assert weights.tolist() == [0.25, 1.0, 0.5 * (last - 4), 2.0, 2.0]
    only = TRCE(**SHORT).rows(tiny_sd)
    assert [len(x) for x in only] == [2, 2, 2] and only[2].tolist() == [1, 1]


def test_where_padding_is_not_looked_at_there_is_no_rest_and_words_go_to_the_safe_texts_end(tiny_pixart):
    method = TRCE(**{**SHORT, "token_weights": (0.0, 1.0, 0.5, 2.0), "templates": ("red {}",), "anchors": "a circle"})
    harmful, safe, weights = method.rows(tiny_pixart)
    a, b = (tiny_pixart.text_rows(tiny_pixart.encode(p))[0] for p in ("red star", "red a circle"))
    torch.testing.assert_close(harmful, a[[2, 1]])  # red, star, end
    torch.testing.assert_close(safe, b[[3, 3]])
    assert weights.tolist() == [1.0, 2.0]


def test_stage_one_solves_for_these_rows(tiny_sd, tiny_sdxl, tiny_pixart):
    for pipe in (tiny_sd, tiny_sdxl, tiny_pixart):
        method = TRCE(**SHORT, stages="textual")
        erased, log = method.run(pipe)
        harmful, safe, _ = method.rows(pipe)
        kept = torch.cat([pipe.text_rows(pipe.encode(p))[0] for p in method.preserve]).double()
        p = pipe.projections("cross.k")[0]
        harmful, safe = harmful.double(), safe.double()
        rest = 0.1 * kept.T @ kept / 2 + 0.01 * torch.eye(kept.shape[1], dtype=torch.float64)
        a = p.weight.double() @ (safe.T @ harmful / 2 + rest)
        expected = a @ torch.linalg.inv(harmful.T @ harmful / 2 + rest)
        torch.testing.assert_close(erased.projections("cross.k")[0].weight.double(), expected, rtol=1e-3, atol=1e-4)
        before, after = pipe.parameters("full"), erased.parameters("full")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"{q.name}.weight" for q in pipe.projections("cross.k", "cross.v")}
        assert log["captions_read"] == 2 and log["edited_rows"] == 2 and log["condition_number"] > 1


def test_official_squares_eta(tiny_sd):
    weight = lambda **more: TRCE(**{**SHORT, **more}).solve(tiny_sd).weights
    a, b = weight(official=True, eta=0.2), weight(eta=0.04)
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    assert any(not torch.equal(x, a[name]) for name, x in weight(eta=0.2).items())


# Captions


def test_statistics_are_kept_and_belong_to_their_captions(tiny_sd, tmp_path):
    captions, file = ["a red star", "art"], tmp_path / "grams.safetensors"
    cond = tiny_sd.encode(captions)
    expected = gram(cond.tokens) / 2
    torch.testing.assert_close(caption_gram(tiny_sd, captions, "all", file), expected, **EXACT)
    assert torch.equal(caption_gram(tiny_sd, captions, "all", file), expected)
    torch.testing.assert_close(caption_gram(tiny_sd, captions, "text"), gram(cond.tokens[cond.mask]) / 2, **EXACT)
    changed = tiny_sd.copy("all")
    with torch.no_grad():
        changed.pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    for pipe, texts, rows in ((tiny_sd, captions[:1], "all"), (tiny_sd, captions, "text"), (changed, captions, "all")):
        with pytest.raises(BadInput, match="no statistics of these captions"):
            caption_gram(pipe, texts, rows, file)


def test_captions_come_from_a_file_without_those_that_name_a_concept(tiny_sd, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a red Star\n\na blue circle\nstarry art\na photo\n")
    assert read_captions(file) == ["a red Star", "a blue circle", "starry art", "a photo"]
    method = TRCE(concepts=("star", "blue square"), captions=file, preserve="a blue", n_captions=2)
    assert method.captions_for(tiny_sd) == ["a blue circle", "starry art", "a blue"]
    file.write_text("two Stars\nsquares, all blue\nblue art\na \N{DOG FACE}\n")
    assert method.captions_for(tiny_sd) == ["blue art", "a \N{DOG FACE}", "a blue"]
    assert TRCE(concepts="\N{DOG FACE}", captions=file).captions_for(tiny_sd) == read_captions(file)[:3]
    with pytest.raises(BadInput, match="no file of captions"):
        read_captions(tmp_path / "absent.txt")
    file.write_text("\n \n")
    with pytest.raises(BadInput, match="holds no captions"):
        read_captions(file)
    with pytest.raises(BadInput, match="nothing would be preserved"):
        TRCE(concepts="star").solve(tiny_sd)


# Stage 2


def test_the_hinge():
    h, safe, unsafe = normal(3, 2, 2, 3, 3, seed=8)
    d = lambda a, b: (a - b).square().flatten(1).mean(1)
    torch.testing.assert_close(hinge(safe, safe, unsafe, 0.01), torch.zeros(2, dtype=torch.float64), **EXACT)
    near = safe + 0.01 * (unsafe - safe)
    torch.testing.assert_close(hinge(safe, safe, near, 0.5), 0.5 - d(safe, near), **EXACT)
    torch.testing.assert_close(hinge(unsafe, safe, unsafe, 0.01, beta=2.0), 2 * (d(safe, unsafe) + 0.01), **EXACT)
    assert torch.equal(amplified(h, safe, 15.0), h + 15 * (h - safe))


def test_the_hinges_gradient_does_not_depend_on_where_it_is():
    safe, unsafe = normal(2, 1, 2, 3, 3, seed=9)
    for h in (unsafe.clone(), unsafe + 0.1 * normal(1, 2, 3, 3)):
        h.requires_grad_()
        hinge(h, safe, unsafe, 0.01).sum().backward()
        torch.testing.assert_close(h.grad, 2 * (unsafe - safe) / h.numel(), **EXACT)
    h = safe.clone().requires_grad_()
    hinge(h, safe, unsafe, 0.01).sum().backward()
    assert not h.grad.any()


@pytest.fixture(scope="module")
def contrast(tiny_sd):
    method = TRCE(**{**SHORT, "concepts": ("star", "art"), "preserve": None, "updates": 3, "keep_batch": 3})
    first = tiny_sd.copy()
    student = first.copy(own=steered(tiny_sd))
    return Contrast(method, tiny_sd, first, student), method, student


def test_latents_are_those_of_the_original_at_their_own_times(tiny_sd, contrast):
    recipe, method, _ = contrast
    early = {w for i in range(3) for w in method.wanted(i)[0]}
    free = {w for i in range(3) for w in method.wanted(i)[1]}
    assert recipe.early.keys() == early and recipe.free.keys() == free
    assert {i for i, _ in early} == {0, 1} and all(k < 2 for _, k in early) and {i for i, _ in free} == {0, 1}
    from sfumato.erase.parts.finetune import seeds, step_generator

    for found, prompts, stream, cfg in ((recipe.early, ["a photo of star", "a photo of art"], 0, 3.0),
                                        (recipe.free, ["", ""], 1, 1.0)):  # fmt: skip
        starts = seeds(2, step_generator(method.seed, -1 - stream))
        for (i, k), (z, t) in found.items():
            zk, tk = tiny_sd.trajectory(prompts[i], starts[i], sampling_steps=3, stop_after=k, cfg_scale=cfg)
            torch.testing.assert_close(z[None], zk, rtol=1e-4, atol=1e-4)
            assert t == tk


def test_the_loss_is_the_papers(tiny_sd, contrast):
    recipe, method, student = contrast
    value = recipe.loss({"step": 1}, Share((0, 1, 1), range(1), 1))[0]
    (((i, k),), free), predict = method.wanted(1), tiny_sd.denoiser
    (z, t), word, empty = recipe.early[i, k], method.concepts[i], tiny_sd.encode("")
    bad, good = (tiny_sd.encode(f"a photo of {w}") for w in (word, "circle"))
    with torch.no_grad():
        m, s, u = (predict(z[None], t, c) for c in (bad, good, empty))
        goals = s + 15 * (s - u), m + 15 * (m - u)
        hinges = [(mse_loss(h, goals[0]) - mse_loss(h, goals[1]) + 0.01).clamp(min=0) for h in (m, u)]
    torch.testing.assert_close(value.detach(), (hinges[0] + hinges[1]) / 2, rtol=1e-3, atol=1e-5)  # at the start
    with torch.no_grad():
        for p in student.parameters("selfattn").values():
            p.add_(0.05)
        moved = recipe.loss({"step": 1}, Share((0, 1, 1), range(1), 1))[0]
        apart = [mse_loss(student.denoiser(z[None], t, empty), predict(z[None], t, empty)) for z, t in
                 (recipe.free[w] for w in free)]  # fmt: skip
        told = [student.denoiser(z[None], t, c) for c in (bad, empty)]
        hinges = [(mse_loss(h, goals[0]) - mse_loss(h, goals[1]) + 0.01).clamp(min=0) for h in told]
        for p in student.parameters("selfattn").values():
            p.sub_(0.05)
    torch.testing.assert_close(moved, (hinges[0] + hinges[1]) / 2 + 100 * sum(apart) / 3, rtol=1e-3, atol=1e-4)


def test_each_stage_changes_its_own(tiny_sd):
    erased, log = TRCE(**SHORT).run(tiny_sd)
    before, after = tiny_sd.parameters("full"), erased.parameters("full")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    first = {f"{p.name}.weight" for p in tiny_sd.projections("cross.k", "cross.v")}
    assert changed == first | steered(tiny_sd) and len(log["losses"]) == 2
    assert all(".attn1." in n or ".attn2.to_q." in n for n in steered(tiny_sd))
    alone = TRCE(**SHORT, stages="visual").apply(tiny_sd).parameters("full")
    assert {n for n in before if not torch.equal(before[n], alone[n])} == steered(tiny_sd)


def test_gradients_that_are_never_cleared(tiny_sd, contrast):
    recipe = Contrast(TRCE(**{**SHORT, "accumulate_forever": True}), tiny_sd, tiny_sd, contrast[2])
    name = next(iter(steered(tiny_sd)))
    x = torch.ones_like(tiny_sd.parameters("full")[name])
    sums = [recipe.gradients(recipe.turn, {f"trained.{name}": x * g})[f"trained.{name}"] for g in (1.0, math.inf, 2.0)]
    assert torch.equal(sums[0], x) and torch.equal(sums[2], 3 * x)
    assert not sums[1].isfinite().any(), "an overflow of float16, which the loop leaves out, is not in the sum"
    assert torch.equal(contrast[0].gradients(recipe.turn, {"a": x})["a"], x) and not contrast[0].copies()


def test_gradients_add_up_in_float64_too(tiny_sd):
    """Two updates of AdamW, with a margin that never clamps: the second takes the sum of both gradients."""
    pipe = tiny_sd.copy(own="full")
    pipe.network.double()
    method = TRCE(**{**SHORT, "accumulate_forever": True, "stages": "visual", "margin": 1e3})
    erased, _ = method.run(pipe)
    student = pipe.copy(own=steered(pipe))
    recipe, weights = Contrast(method, pipe, pipe, student), [student.parameters("full")[n] for n in steered(pipe)]
    adamw = recipe.turn.optimizer(weights, lr=method.lr)
    for i in range(method.updates):  # gradients are not cleared between them
        recipe.loss({"step": i}, Share((0, i, 1), range(1), 1))[0].backward()
        adamw.step()
    for name, x in zip(steered(pipe), weights, strict=True):
        torch.testing.assert_close(erased.parameters("full")[name], x.detach(), **EXACT)


def test_templates_have_a_place_for_the_concept():
    for templates in (OBJECT, STYLE, SKETCH):
        assert len(set(templates)) == 15 and all(t.count("{}") == 1 for t in templates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ("a photo",)}, "needs {}"),
        ({"prompt": "a photo"}, "needs {}"),
        ({"early_steps": 9}, "early_steps is 9"),
        ({"anchors": "star "}, "its own anchor"),
        ({"token_weights": (0.0, 0.0, 0.0, 0.0)}, "all 0"),
        ({"token_weights": 1.0}, "token_weights takes 4 values, got 1.0"),
        ({"templates": (3,)}, "templates must be text, got 3"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(BadInput, match=message):
        TRCE(**{**SHORT, **changes})


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_joint_attention_is_refused_with_the_reason(family, request):
    pipe = request.getfixturevalue(family)
    with pytest.raises(BadInput, match=r"states of the text that change .*: erasers that fit it are uce") as caught:
        TRCE(concepts=("star",), **TRCE.EXAMPLE).apply(pipe)
    assert "\n" not in str(caught.value) and not TRCE.fits(pipe)
