"""UCE against its defining problem, against a plain per-projection loop, and on whole pipelines."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LENGTH
from sfumato.erase.parts.closed_form import condition_number, gram, orthogonal_targets, rank_update, ridge_edit
from sfumato.erase.rece import RECE
from sfumato.erase.trce import TRCE
from sfumato.erase.uce import TEMPLATES, UCE, aligned_rows
from sfumato.errors import BadInput

# Systems below have condition numbers up to about 1e4, so 1e-11 leaves a factor of ten over float64 rounding.
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(seed, n=4, p=5, dim=7, outs=(3, 6, 11)):
    weights = [draw(seed + 10 + i, o, dim) for i, o in enumerate(outs)]
    return weights, draw(seed, n, dim), draw(seed + 1, n, dim), draw(seed + 2, p, dim)


def loop_edit(weights, blocks, preserved, erase_scale, preserve_scale, lam, tensor=False):
    """The published procedure: for every projection, sum over every prompt pair and row, then invert."""
    edited = []
    for w in weights:
        left, right = lam * w, lam * torch.eye(w.shape[1], dtype=w.dtype)
        for sources, targets in blocks:
            old = torch.stack([w @ c for c in sources])
            wanted = torch.stack([w @ g for g in targets])
            if tensor:
                u = old / old.norm()
                wanted = wanted - (u * wanted).sum() * u
            for c, v in zip(sources, wanted, strict=True):
                left = left + erase_scale * torch.outer(v, c)
                right = right + erase_scale * torch.outer(c, c)
        for row in preserved:
            left = left + preserve_scale * torch.outer(w @ row, row)
            right = right + preserve_scale * torch.outer(row, row)
        edited.append(left @ torch.linalg.inv(right))
    return edited


scales = st.floats(0.05, 3.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), scales, scales, scales, st.booleans(), st.integers(1, 9))
def test_equals_the_loop_over_projections_prompts_and_rows(seed, es, ps, lam, tensor, n):
    weights, sources, targets, kept = problem(seed, n=n)
    cut = max(1, n // 3)
    blocks = [(sources[:cut], targets[:cut])] + ([(sources[cut:], targets[cut:])] if n > cut else [])
    pair = torch.tensor([0] * cut + [1] * (n - cut))
    ours, condition = ridge_edit(
        weights, sources, targets, gram(kept),
        erase_scale=es, preserve_scale=ps, lam=lam, pair=pair if tensor else None,
    )  # fmt: skip
    expected = loop_edit(weights, blocks, kept, es, ps, lam, tensor)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    assert condition >= 1 - 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), scales, scales, scales)
def test_gradient_of_the_objective_vanishes(seed, es, ps, lam):
    weights, sources, targets, kept = problem(seed)
    edited, _ = ridge_edit(weights, sources, targets, gram(kept), erase_scale=es, preserve_scale=ps, lam=lam)
    for w, new in zip(weights, edited, strict=True):
        new.requires_grad_()
        objective = (
            es * (sources @ new.T - targets @ w.T).square().sum()
            + ps * (kept @ (new - w).T).square().sum()
            + lam * (new - w).square().sum()
        )
        (slope,) = torch.autograd.grad(objective, new)
        assert slope.abs().max() < 1e-11 * (1 + objective.item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_edit_is_no_change_bit_for_bit(dtype):
    weights, sources, targets, kept = problem(3)
    weights = [w.to(dtype) for w in weights]
    for same in (
        ridge_edit(weights, sources, sources, gram(kept))[0],
        ridge_edit(weights, sources, targets, gram(kept), erase_scale=0.0)[0],
        ridge_edit(weights, sources, targets, erase_scale=0.0, preserve_scale=0.0)[0],
    ):
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(same, weights, strict=True))


def test_large_lam_keeps_the_weights_and_no_lam_fits_exactly():
    weights, sources, targets, kept = problem(5, n=3, p=4, dim=7)
    stiff, _ = ridge_edit(weights, sources, targets, gram(kept), lam=1e12)
    free, _ = ridge_edit(weights, sources, targets, gram(kept), lam=1e-11)
    for w, a, b in zip(weights, stiff, free, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-9, atol=1e-9)
        # The misfit of a ridge solution is of the order of lam times the condition of the rows.
        torch.testing.assert_close(sources @ b.T, targets @ w.T, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(kept @ b.T, kept @ w.T, rtol=1e-7, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(5)), st.permutations(range(5)))
def test_order_of_concepts_and_preserved_prompts_does_not_matter(seed, concepts, kept_order):
    weights, sources, targets, kept = problem(seed, n=5, p=5)
    a, _ = ridge_edit(weights, sources, targets, gram(kept))
    b, _ = ridge_edit(weights, sources[concepts], targets[concepts], gram(kept[kept_order]))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


def test_gram_of_all_rows_is_the_sum_over_prompts():
    prompts = draw(1, 6, 4, 7, dtype=torch.float32)
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for prompt, row in itertools.product(range(6), range(4)):
        x = prompts[prompt, row].double()
        expected += torch.outer(x, x)
    torch.testing.assert_close(gram(prompts), expected, **TIGHT)


def test_rank_update_is_the_same_in_either_order():
    weights, left, right, _ = problem(2, n=6, dim=8, outs=(2, 5))  # 2 n out > dim (n + out): one whole matrix
    many = rank_update(weights, left, right)
    few = [sum(rank_update([w], left[[i]], right[[i]])[0] - w for i in range(6)) + w for w in weights]
    for a, b in zip(many, few, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_tensor_targets_have_no_component_along_the_old_response():
    weights, sources, targets, _ = problem(8, n=6)
    pair = torch.tensor([0, 0, 1, 1, 1, 2])
    for w in weights:
        bent = orthogonal_targets(w, sources, targets, pair)
        for k in range(3):
            rows = pair == k
            assert abs(((bent[rows] @ w.T) * (sources[rows] @ w.T)).sum()) < 1e-11
        silent = orthogonal_targets(w, torch.zeros_like(sources), targets, pair)
        assert torch.equal(silent, targets)


@pytest.mark.parametrize("seed", range(5))
def test_condition_number(seed):
    system = gram(draw(seed, 60, 20)) + 0.1 * torch.eye(20)
    values = torch.linalg.eigvalsh(system)
    estimate = condition_number(system, torch.linalg.cholesky(system))
    true = float(values[-1] / values[0])
    assert 0.9 * true < estimate <= true * (1 + 1e-12)


def test_singular_system_is_refused():
    weights, sources, targets, _ = problem(1, n=2)
    with pytest.raises(BadInput, match="raise lam"):
        ridge_edit(weights, sources, targets, lam=0.0)


def test_float32_weights_lose_no_more_than_rounding():
    weights, sources, targets, kept = problem(4, dim=30, outs=(40,))
    exact = ridge_edit(weights, sources, targets, gram(kept))[0][0]
    rounded = ridge_edit([weights[0].float()], sources, targets, gram(kept))[0][0]
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 20 * torch.finfo(torch.float32).eps * exact.abs().max()


# On pipelines


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def p(request):
    return request.getfixturevalue(request.param)


def weights_of(pipe):
    return {name: w.detach().clone() for name, w in pipe.parameters("full").items()}


def test_rows_are_aligned_from_the_last_word_to_the_end(p):
    # Tokens: start, words, end, padding. The last words are at 3 ("a red star") and at 1 ("art").
    concept, anchor, length = p.encode("a red star"), p.encode("art"), p.context_length
    c, a = aligned_rows(p, concept, anchor, "from-last-word")
    assert torch.equal(c, concept.tokens[0, 3:]) and torch.equal(a, anchor.tokens[0, 1 : length - 2])
    a, c = aligned_rows(p, anchor, concept, "from-last-word")
    assert torch.equal(c, concept.tokens[0, 3:]) and torch.equal(a, anchor.tokens[0, 1 : length - 2])
    c, a = aligned_rows(p, concept, p.encode(" "), "last-word")
    assert torch.equal(c, concept.tokens[0, 3:4]) and torch.equal(a, p.encode("").tokens[0, :1])


@pytest.mark.parametrize("tokens", ["from-last-word", "last-word"])
@pytest.mark.parametrize("variant", ["replace", "tensor"])
def test_pipeline_edit_equals_the_loop(p, tokens, variant):
    words = {"concepts": ("star", "blue circle"), "anchors": "art", "preserve": ("a square",)}
    eraser = UCE(**words, tokens=tokens, variant=variant)
    edit = eraser.solve(p)
    blocks = []
    for word in eraser.concepts:
        c, a = p.encode(word), p.encode("art")
        last, first = int(p.last_word_token(c)), 1
        count = 1 if tokens == "last-word" else p.context_length - last
        blocks.append((c.tokens[0, last : last + count].double(), a.tokens[0, first : first + count].double()))
    if tokens == "last-word":
        kept, scale = p.encode("a square").tokens[0, 2:3].double(), 1.0
    else:
        kept, scale = p.encode(["", "a square"]).tokens.flatten(0, 1).double(), 0.5
    old = [x.weight.detach().double() for x in p.projections("cross.v", "cross.k")]
    expected = loop_edit(old, blocks, kept, 1.0, scale, 0.5, variant == "tensor")
    assert edit.log["preserve_scale"] == scale and edit.log["condition_number"] > 1
    for new, want in zip(edit.weights.values(), expected, strict=True):
        assert new.dtype == torch.float32
        torch.testing.assert_close(new.double(), want, rtol=1e-5, atol=1e-6)


def test_apply_changes_the_key_and_value_projections_only(p):
    before = weights_of(p)
    erased = UCE(concepts=("star",)).apply(p)
    after = weights_of(erased)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(p.parameters("xattn-strict"))
    assert all(torch.equal(w, before[name]) for name, w in p.parameters("full").items())
    assert not any(w.requires_grad for w in erased.parameters("full").values())


def test_the_concept_then_projects_to_its_anchor(tiny_sd):
    erased = UCE(concepts=("star",), anchors=("circle",), lam=1e-8, preserve_scale=0.0).apply(tiny_sd)
    star, circle = (tiny_sd.encode(w).tokens[0, 1] for w in ("star", "circle"))
    for old, new in zip(tiny_sd.projections("cross.k"), erased.projections("cross.k"), strict=True):
        torch.testing.assert_close(new.weight @ star, old.weight @ circle, rtol=1e-3, atol=1e-4)


def test_default_preserve_scale_counts_the_empty_prompt(tiny_sd):
    kept = ["red", "blue", "circle"]
    for number, expected in ((0, 1.0), (2, 0.333), (3, 0.25)):
        assert UCE(concepts=("star",), preserve=kept[:number]).solve(tiny_sd).log["preserve_scale"] == expected


def test_expansion_adds_five_phrases_per_concept(tiny_sd):
    _, _, pair = UCE(concepts=("star", "square"), expand_prompts="object").rows(tiny_sd)
    assert pair.unique().tolist() == list(range(12))
    assert all(len(TEMPLATES[kind]) == 5 for kind in ("style", "object"))


@pytest.mark.parametrize("tokens", ["from-last-word", "last-word"])
def test_a_phrase_goes_to_the_bare_anchor_or_to_the_anchors_phrase(tiny_sd, tokens):
    uce = UCE(concepts=("star",), anchors=("circle",), tokens=tokens, expand_prompts="style")
    sources, targets, pair = uce.rows(tiny_sd)
    phrase = TEMPLATES["style"][1]
    goal = phrase.format("circle") if tokens == "last-word" else "circle"
    concept, anchor = tiny_sd.encode([phrase.format("star")]), tiny_sd.encode([goal])
    expected = aligned_rows(tiny_sd, concept, anchor, tokens)
    torch.testing.assert_close((sources[pair == 2], targets[pair == 2]), expected)


def test_an_own_anchor_is_said_and_changes_nothing(tiny_sd):
    with pytest.warns(UserWarning, match="its own anchor"):
        edit = UCE(concepts=("star",), anchors=("star",)).solve(tiny_sd)
    old = tiny_sd.parameters("xattn-strict")
    assert all(torch.equal(w, old[name]) for name, w in edit.weights.items())


def test_an_anchor_that_is_erased_too_is_said(tiny_sd):
    edit = UCE(concepts=("star", "circle"), anchors=("circle", ""))
    with pytest.warns(UserWarning, match="'star' would turn into 'circle', which is erased too"):
        edit.solve(tiny_sd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"concepts": ("star",), "tokens": "all"}, "unknown tokens"),
        ({"concepts": ("star",), "variant": "bend"}, "unknown variant"),
        ({"concepts": ("star",), "expand_prompts": "art"}, "unknown expand_prompts"),
        ({"concepts": ("star",), "lam": -1.0}, "lam must be at least 0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(BadInput, match=message):
        UCE(**arguments)


def test_an_anchor_that_the_tokenizer_cannot_read_is_refused_by_the_edit_alone_too(tiny_pixart):
    with pytest.raises(BadInput, match="tokenizer cannot read all of '星'"):
        UCE(concepts=("star",), anchors=("星",)).solve(tiny_pixart)
    assert UCE(concepts=("star",), anchors=(" ",)).solve(tiny_pixart).weights


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_without_cross_attention_the_maps_that_read_the_embeddings_are_edited(family, request):
    p = request.getfixturevalue(family)
    erased = UCE(concepts=("star",), anchors=("circle",), lam=1e-6, preserve=()).apply(p)
    before, after = p.parameters("full"), erased.parameters("full")
    read = {f"{kind}.weight" for kind in ("context_embedder", "time_text_embed.text_embedder.linear_1")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == read
    star, circle = p.encode("star"), p.encode("circle")
    pooled = "time_text_embed.text_embedder.linear_1.weight"
    goal = circle.pooled @ before[pooled].T
    left = (star.pooled @ after[pooled].T - goal).norm() / (star.pooled @ before[pooled].T - goal).norm()
    assert left < 0.9  # the empty prompt, which is preserved, pulls the other way
    z = torch.randn(1, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    away = lambda pipe, cond: (pipe.denoiser(z, 0.7, cond) - p.denoiser(z, 0.7, circle)).norm()
    assert away(erased, star) < away(p, star)


def test_the_rows_of_several_encoders_are_aligned_each(tiny_sd3):
    concept, anchor = tiny_sd3.encode("a red star"), tiny_sd3.encode("circle")
    c, a = aligned_rows(tiny_sd3, concept, anchor, "last-word")
    clip, t5 = LENGTH, 2  # where "star" stands for CLIP (behind the start token), and for T5
    assert torch.equal(c, concept.tokens[0, [3, clip + t5]]) and torch.equal(a, anchor.tokens[0, [1, clip]])
    c, a = aligned_rows(tiny_sd3, concept, anchor, "from-last-word")
    assert len(c) == len(a) == (LENGTH - 3) + (256 - 2)
    assert torch.equal(c[0], concept.tokens[0, 3]) and torch.equal(c[LENGTH - 3], concept.tokens[0, LENGTH + 2])


@pytest.mark.parametrize("family", ["tiny_qwen", "tiny_zimage", "tiny_flux2"])
def test_where_no_embedding_is_read_directly_it_refuses(family, request):
    with pytest.raises(BadInput, match=r"UCE does not fit .* no cross.k or cross.v: erasers that fit it are .*esd"):
        UCE(concepts=("star",)).apply(request.getfixturevalue(family))


@pytest.mark.parametrize("family", ["tiny_pixart", "tiny_sana"])
def test_where_the_network_projects_the_text_first_its_keys_and_values_are_solved_for_what_they_read(family, request):
    """Without ridge and preservation the concept's row is mapped to where the anchor's was, exactly."""
    pipe = request.getfixturevalue(family)
    edited = UCE(concepts=("star",), anchors=("circle",), preserve=(), lam=1e-9, tokens="last-word").apply(pipe)
    concept, anchor = (pipe.encode(word) for word in ("star", "circle"))
    row = lambda cond: pipe.text_rows(cond)[0, int(pipe.last_word_token(cond))]
    for old, new in zip(*(p.projections("cross.k", "cross.v") for p in (pipe, edited)), strict=True):
        torch.testing.assert_close(new.weight @ row(concept), old.weight @ row(anchor), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eraser", [UCE, RECE, partial(TRCE, stages="textual", lam=0.1)])
def test_what_the_network_does_not_look_at_counts_for_nothing(eraser, tiny_pixart, noisy_padding):
    asked = eraser(concepts=("star",), anchors=("a photo",), preserve=("red square", "art"))
    plain = asked.solve(tiny_pixart)
    noisy_padding()
    found = asked.solve(tiny_pixart)
    assert all(torch.equal(weight, plain.weights[name]) for name, weight in found.weights.items())


def test_where_padding_is_not_looked_at_rows_go_as_far_as_the_end_and_the_anchors_last_stands_for_more(tiny_pixart):
    row = lambda text, place: tiny_pixart.text_rows(tiny_pixart.encode(text))[0, place]
    for anchor, places in (("circle", (0, 1)), ("a photo", (1, 2)), ("", (0, 0))):
        sources, targets, _ = UCE(concepts=("star",), anchors=(anchor,)).rows(tiny_pixart)
        torch.testing.assert_close(sources, torch.stack([row("star", 0), row("star", 1)]))
        torch.testing.assert_close(targets, torch.stack([row(anchor or " ", place) for place in places]))
