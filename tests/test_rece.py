"""RECE: the search and the rounds against their defining problems and a plain loop; whole pipelines."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.erase.parts.closed_form import gram, ridge_edit
from sfumato.erase.parts.revival import Stack, adversarial_embeddings, rounds
from sfumato.erase.rece import RECE, paired_rows
from sfumato.erase.uce import UCE, aligned_rows, as_read
from sfumato.errors import BadInput

TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # several systems in a row, each with a condition number up to about 1e4
RIDGE, DIM = 0.1, 6
REGULARISERS = ("zero", "standard", "surrogate-response", "surrogate-embedding", "surrogate-both")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(seed, outs=(4, 5, 8)):
    original = [draw(seed + i, o, DIM) for i, o in enumerate(outs)]
    edited = [w + 0.3 * draw(seed + 20 + i, *w.shape) for i, w in enumerate(original)]
    return original, edited


def sums(edited, original):
    return sum(w.T @ w for w in edited), sum(w.T @ v for w, v in zip(edited, original, strict=True))


def objective(found, c, o, edited, original, regulariser, ridge):
    misses = sum((found @ w.T - c @ v.T).square().sum() for w, v in zip(edited, original, strict=True))
    response = sum(((found - c) @ w.T).square().sum() for w in edited)
    return (
        misses
        + ridge
        * {
            "zero": found.square().sum(),
            "standard": (found - o).square().sum(),
            "surrogate-response": response,
            "surrogate-embedding": (found - c).square().sum(),
            "surrogate-both": response + (found - c).square().sum(),
        }[regulariser]
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(REGULARISERS), st.floats(0.01, 2.0))
def test_gradient_of_the_search_vanishes(seed, regulariser, ridge):
    original, edited = layers(seed)
    c, o = draw(seed + 50, 5, DIM), draw(seed + 51, 5, DIM)
    found, condition = adversarial_embeddings(c, *sums(edited, original), ridge, regulariser, pull=o)
    found.requires_grad_()
    value = objective(found, c, o, edited, original, regulariser, ridge)
    (slope,) = torch.autograd.grad(value, found)
    assert slope.abs().max() < 1e-10 * (1 + value.item())
    assert condition >= 1 - 1e-12


def test_unedited_projections_give_the_concept_back():
    original, _ = layers(0)
    c = draw(9, 5, DIM)
    found, _ = adversarial_embeddings(c, *sums(original, original), ridge=1e-13)
    torch.testing.assert_close(found, c, **TIGHT)
    found, _ = adversarial_embeddings(c, *sums(original, original), ridge=0.7, regulariser="surrogate-both")
    torch.testing.assert_close(found, c, **TIGHT)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1.0), st.floats(1.5, 100.0))
def test_norm_falls_as_the_ridge_grows(seed, ridge, factor):
    original, edited = layers(seed)
    c = draw(seed + 50, 5, DIM)
    small, large = (adversarial_embeddings(c, *sums(edited, original), r)[0].norm() for r in (ridge, factor * ridge))
    assert large < small


def loop_rounds(original, weights, concepts, anchors, kept, epochs, tensor):
    """The published loop: every projection by itself, explicit inverses, targets from the weights as they are."""
    for _ in range(epochs):
        left, right = RIDGE * torch.eye(DIM, dtype=torch.float64), torch.zeros(DIM, DIM, dtype=torch.float64)
        for w, v in zip(weights, original, strict=True):
            left, right = left + w.T @ w, right + w.T @ v
        found = [c @ (torch.linalg.inv(left) @ right).T for c in concepts]
        edited = []
        for w in weights:
            a, b = 0.1 * w, 0.1 * torch.eye(DIM, dtype=torch.float64)
            for c, g in zip(found, anchors, strict=True):
                wanted = g @ w.T
                if tensor:
                    u = c @ w.T / (c @ w.T).norm()
                    wanted = wanted - (u * wanted).sum() * u
                a, b = a + wanted.T @ c, b + c.T @ c
            a, b = a + 0.1 * (kept @ w.T).T @ kept, b + 0.1 * kept.T @ kept
            edited.append(a @ torch.linalg.inv(b))
        weights = edited
    return weights


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4), st.booleans())
def test_rounds_equal_the_published_loop(seed, epochs, tensor):
    original, _ = layers(seed)
    concepts, anchors, kept = draw(seed + 60, 2, 3, DIM), draw(seed + 61, 2, 3, DIM), draw(seed + 62, 4, DIM)
    stack = Stack(original, shared=not tensor)
    pair = torch.tensor([0, 0, 0, 1, 1, 1]) if tensor else None
    rows = concepts.flatten(0, 1), anchors.flatten(0, 1), gram(kept)
    start, _ = ridge_edit(stack.original, *rows, pair=pair)
    states = list(rounds(stack, start, concepts, anchors, gram(kept), epochs=epochs, ridge=RIDGE))
    assert len(states) == epochs + 1
    weights, _ = ridge_edit(original, *rows, pair=pair)
    expected = loop_rounds(original, weights, concepts, anchors, kept, epochs, tensor)
    for a, b in zip(stack.weights(states[-1].maps), expected, strict=True):
        # Solves one after the other, each in another order of operations: seed 820 differs by 2e-10 of the largest.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_residual_is_the_unexplained_share_of_the_response():
    original, edited = layers(3)
    concepts = draw(70, 2, 3, DIM)
    common = torch.eye(DIM, dtype=torch.float64) + 0.3 * draw(71, DIM, DIM)
    for stack, maps, new in (
        (Stack(original), [common], [v @ common for v in original]),
        (Stack(original, shared=False), edited, edited),
    ):
        state = next(rounds(stack, maps, concepts, concepts, None, epochs=0, ridge=RIDGE))
        misses = whole = 0.0
        for w, v in zip(new, original, strict=True):
            misses += (state.embeddings @ w.T - concepts @ v.T).square().sum()
            whole += (concepts @ v.T).square().sum()
        assert state.residual == pytest.approx(float(misses / whole), rel=1e-10)
        assert state.edit_condition is None


# On pipelines


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def p(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("variant", ["replace", "tensor"])
def test_no_rounds_is_uce(p, variant):
    words = {"concepts": ("star", "blue circle"), "anchors": ("art",), "preserve": ("a square",), "variant": variant}
    plain, none = UCE(**words).solve(p), RECE(**words, epochs=0).solve(p)
    assert none.log["kept_round"] == 0 and len(none.log["residuals"]) == 1
    for name, w in plain.weights.items():
        torch.testing.assert_close(none.weights[name], w, rtol=1e-5, atol=1e-6)  # float32 weights


def test_apply_changes_the_key_and_value_projections_only(p):
    before = {name: w.detach().clone() for name, w in p.parameters("full").items()}
    erased = RECE(concepts=("star",)).apply(p)
    changed = {n for n, w in erased.parameters("full").items() if not torch.equal(before[n], w)}
    assert changed == set(p.parameters("xattn-strict"))
    assert all(torch.equal(w, before[name]) for name, w in p.parameters("full").items())


def test_every_round_leaves_less_to_revive(tiny_sd):
    edit = RECE(concepts=("star",), epochs=3, skip_start_token=True).solve(tiny_sd)
    residuals = edit.log["residuals"]
    assert len(residuals) == 4 and len(edit.log["edit_condition_numbers"]) == 3
    assert residuals[0] < residuals[-1] <= 1 + 1e-9  # answering nothing at all would miss just the whole
    assert edit.embeddings.shape == (4, 1, tiny_sd.context_length - 1, 16)
    assert edit.log["kept_round"] == 3


def test_the_search_beats_the_concept_itself_on_uce_and_loses_on_rece(tiny_sd):
    """What the method is for: after UCE some embedding still brings the old response back; after RECE less so."""
    words = {"concepts": ("star",), "skip_start_token": True}
    original = [x.weight.double() for x in tiny_sd.projections("cross.v", "cross.k")]
    c = tiny_sd.encode("star").tokens[0, 1:].double()

    def best(pipe):
        edited = [x.weight.double() for x in pipe.projections("cross.v", "cross.k")]
        found, _ = adversarial_embeddings(c, *sums(edited, original), RIDGE)
        return [
            float(sum((x @ w.T - c @ v.T).square().sum() for w, v in zip(edited, original, strict=True)))
            for x in (found, c)
        ]

    uce_found, uce_concept = best(UCE(concepts=("star",)).apply(tiny_sd))
    rece_found, _ = best(RECE(**words).apply(tiny_sd))
    assert uce_found < 0.7 * uce_concept
    assert rece_found > uce_found


def test_skipping_the_start_token_leaves_its_row_out_of_every_round(tiny_sd):
    stack = Stack([x.weight.detach() for x in tiny_sd.projections("cross.v", "cross.k")])
    maps, _ = UCE(concepts=("star",)).edit(tiny_sd, stack.original)
    star, nothing = (tiny_sd.encode(word).tokens[:, 1:] for word in ("star", " "))
    *_, last = rounds(stack, maps, star, nothing, gram(tiny_sd.encode("").tokens), epochs=2, ridge=RIDGE)
    found = RECE(concepts=("star",), epochs=2, skip_start_token=True).solve(tiny_sd).embeddings
    torch.testing.assert_close(found[-1], last.embeddings, **TIGHT)


def test_a_text_without_a_start_token_loses_no_word_for_it(tiny_pixart):
    plain, skipping = (RECE(concepts=("star",), skip_start_token=skip).solve(tiny_pixart) for skip in (False, True))
    assert torch.equal(plain.embeddings, skipping.embeddings)


@pytest.mark.parametrize("family", ["tiny_pixart", "tiny_sana"])
@pytest.mark.parametrize("skip", [False, True])
def test_every_row_of_a_concept_that_the_network_looks_at_is_redirected_to_one_of_its_anchors(family, skip, request):
    p, words = request.getfixturevalue(family), ("star", "blue circle")
    eraser = RECE(concepts=words, epochs=1, skip_start_token=skip)
    concept, anchor = (as_read(p, p.encode(some)) for some in eraser.pairs())
    first = 1 if skip and family == "tiny_sana" else 0
    rows, targets = paired_rows(p, concept, anchor, first)
    for i, seen in enumerate(concept.mask.sum(dim=1).tolist()):
        own = anchor.tokens[i, : int(anchor.mask[i].sum())]
        assert torch.equal(rows[i, : seen - first], concept.tokens[i, first:seen])
        assert not rows[i, seen - first :].any() and not targets[i, seen - first :].any()
        assert (targets[i, : seen - first].norm(dim=-1) > 0).all()
        assert torch.equal(targets[i, : seen - first], own[[min(n, len(own) - 1) for n in range(first, seen)]])
        # From the last word on it is what UCE says: the anchor has nothing but its first rows here.
        ends, _ = aligned_rows(p, concept[i], anchor[i], "from-last-word")
        assert torch.equal(rows[i, : seen - first][-len(ends) :], ends)
    assert eraser.solve(p).embeddings.shape[1:] == rows.shape


def test_stops_when_nothing_is_left_to_revive(tiny_sd):
    full = RECE(concepts=("star",), epochs=3).solve(tiny_sd).log["residuals"]
    edit = RECE(concepts=("star",), epochs=3, stop_residual=(full[0] + full[1]) / 2).solve(tiny_sd)
    assert edit.log["residuals"] == pytest.approx(full[:2], rel=1e-9)
    assert edit.log["kept_round"] == 1


def test_the_round_with_the_lowest_score_is_kept(tiny_sd):
    eraser, seen = RECE(concepts=("star",), epochs=3), []

    def score(pipe):
        seen.append(pipe.projections("cross.k")[0].weight.detach().clone())
        return [3.0, 1.0, 2.0, 1.0][len(seen) - 1]

    edit = eraser.solve(tiny_sd, score=score)
    assert edit.log["kept_round"] == 1 and edit.log["scores"] == [3.0, 1.0, 2.0, 1.0]
    assert torch.equal(edit.weights[f"{tiny_sd.projections('cross.k')[0].name}.weight"], seen[1])


def test_an_ill_conditioned_search_is_said(tiny_sd, monkeypatch):
    worst = max(RECE(concepts=("star",)).solve(tiny_sd).log["search_condition_numbers"])
    monkeypatch.setattr("sfumato.erase.rece.ILL_CONDITIONED", 0.9 * worst)
    with pytest.warns(UserWarning, match="raise ridge"):
        RECE(concepts=("star",)).solve(tiny_sd)


def test_a_last_search_without_a_solution_spoils_the_log_only(tiny_sd, monkeypatch):
    from sfumato.erase.parts import revival

    method = RECE(concepts=("star",), epochs=1)
    whole, calls = method.solve(tiny_sd), []
    search = revival.adversarial_embeddings

    def second_fails(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise BadInput("singular")
        return search(*args, **options)

    monkeypatch.setattr(revival, "adversarial_embeddings", second_fails)
    with pytest.warns(UserWarning, match="ill-conditioned"):
        edit = method.solve(tiny_sd)
    assert all(torch.equal(w, whole.weights[name]) for name, w in edit.weights.items())
    assert edit.log["residuals"][1] is edit.log["search_condition_numbers"][1] is None
    json.dumps(edit.log, allow_nan=False)
    calls.clear()
    with pytest.raises(BadInput, match="singular"):  # two rounds need the second search
        RECE(concepts=("star",), epochs=2).solve(tiny_sd)


def test_a_search_that_determines_nothing_is_refused():
    few = [draw(0, 2, DIM)]
    with pytest.raises(BadInput, match="choose another regulariser"):
        adversarial_embeddings(draw(1, 3, DIM), *sums(few, few), RIDGE, "surrogate-response")


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"epochs": -1}, "epochs"), ({"ridge": -0.1}, "ridge"), ({"regulariser": "none"}, "unknown regulariser")],
)
def test_bad_settings(setting, message):
    with pytest.raises(BadInput, match=message):
        RECE(concepts=("star",), **setting)


def test_without_cross_attention_each_map_that_reads_embeddings_is_searched(tiny_flux):
    eraser = RECE(concepts=("star",), epochs=2)
    edit = eraser.solve(tiny_flux)
    assert set(edit.weights) == {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}
    assert len(edit.log["residuals"]) == len(edit.log["pooled"]["residuals"]) == 3
    plain = UCE(concepts=("star",)).solve(tiny_flux)
    assert all(not torch.equal(edit.weights[name], plain.weights[name]) for name in plain.weights)
    assert edit.embeddings.shape[-1] == tiny_flux.encode("star").tokens.shape[-1]
