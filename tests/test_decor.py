"""DECOR: the projector's identities in float64, and what pipelines are told under it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.errors import BadInput
from sfumato.pipeline.conditioning import Role
from sfumato.steer import FasterDiffusion
from sfumato.steer.decor import DECOR, basis, cosines, decompose, decor

PROMPT = "a red star and a blue circle"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, T = randn(9, 12), randn(3, 12, seed=1)


# The mathematics


def test_off_it_is_what_it_was_bit_for_bit():
    assert decor(X, T, 0.0) is X


def test_the_projector_is_one():
    v = basis(T)
    p = v @ v.mT
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p.trace(), torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(v.mT @ v, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(decor(X, T, 0.3), X - 0.3 * X @ p)


def test_what_is_left_is_orthogonal_and_the_residual_of_least_squares():
    left = decor(X, T, 1.0)
    assert (left @ T.mT).abs().max() < 1e-12
    solution = torch.linalg.lstsq(T.mT, X.mT).solution.mT
    torch.testing.assert_close(left, X - solution @ T)
    assert (left.norm(dim=-1) <= X.norm(dim=-1)).all()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_strength_is_linear_and_twice_is_once_at_another(alpha):
    whole = decor(X, T, 1.0)
    once = decor(X, T, alpha)
    torch.testing.assert_close(once, (1 - alpha) * X + alpha * whole)
    torch.testing.assert_close(decor(once, T, alpha), decor(X, T, 1 - (1 - alpha) ** 2))


def test_only_the_span_of_the_undesired_rows_matters():
    scales = torch.tensor([[3.0], [-0.1], [7.0]], dtype=torch.float64)
    for other in (T.flip(0), T * scales, torch.cat([T, T[:1], 2 * T[1:]])):
        torch.testing.assert_close(decor(X, other, 0.7), decor(X, T, 0.7))


def test_the_extremes():
    assert decor(X, X, 1.0).abs().max() < 1e-12
    across = X - X @ basis(T) @ basis(T).mT
    torch.testing.assert_close(decor(across, T, 1.0), across)
    assert basis(torch.zeros(2, 5)).shape == (5, 0) and basis(torch.zeros(0, 5)).shape == (5, 0)
    assert torch.equal(decor(X, torch.zeros_like(T), 1.0), X)


def test_it_turns_with_the_space():
    q = torch.linalg.qr(randn(12, 12, seed=2)).Q
    torch.testing.assert_close(decor(X @ q, T @ q, 0.8), decor(X, T, 0.8) @ q)


def test_rank_rows_and_lengths():
    top = torch.linalg.svd(T, full_matrices=False).Vh[:1]
    torch.testing.assert_close(decor(X, T, 1.0, rank=1), X - X @ top.mT @ top)
    torch.testing.assert_close(decor(X, T, 1.0, rank=9), decor(X, T, 1.0))
    rows = torch.arange(9) > 4
    part = decor(X, T, 1.0, rows=rows)
    assert torch.equal(part[:5], X[:5]) and torch.equal(part[5:], decor(X, T, 1.0)[5:])
    torch.testing.assert_close(decor(X, T, 0.9, keep_norm=True).norm(dim=-1), X.norm(dim=-1))
    batch = torch.stack([X, 2 * X])
    torch.testing.assert_close(decor(batch, T, 0.5)[1], 2 * decor(X, T, 0.5))
    half = decor(X.half(), T.half(), 1.0)
    assert half.dtype == torch.float16 and (half.double() @ T.mT).abs().max() < 0.02


def test_beyond_one_only_where_asked_for():
    with pytest.raises(BadInput, match="between 0 and 1"):
        decor(X, T, 1.5)
    torch.testing.assert_close(decor(X, T, 2.0, reflect=True) @ T.mT, -(X @ T.mT))


def test_the_decomposition():
    words = torch.arange(9) < 4
    made = decompose(X, {"words": words, "pad": ~words})
    torch.testing.assert_close(made.keep(range(9)), X)
    torch.testing.assert_close(made.keep([0, 2]) + made.keep([1, *range(3, 9)]), X)
    torch.testing.assert_close(made.loads["words"] + made.loads["pad"], made.values.square())
    torch.testing.assert_close(made.loads["words"], (X[:4] @ made.axes).square().sum(0))
    torch.testing.assert_close(made.energy.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_many_parallel_rows_have_the_first_axis():
    """The paper's finding: rows of padding, nearly the same, have most of the energy."""
    pad = randn(1, 12, seed=3) * 4 + 0.05 * randn(60, 12, seed=4)
    made = decompose(torch.cat([X, pad]), {"words": torch.arange(69) < 9, "pad": torch.arange(69) >= 9})
    assert made.energy[0] > 0.8 and made.loads["pad"][0] / made.values[0] ** 2 > 0.9
    assert cosines(pad, made.axes[:, :1]).min() > 0.99 > cosines(X, made.axes[:, :1]).max()


# In pipelines


def drawn(p, asked):
    return p.draw(asked, 1, sampling_steps=2, cfg_scale=3.0)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_zimage"])
def test_the_conditional_half_is_told_the_projected_rows(request, family):
    p = request.getfixturevalue(family).copy()
    cond, alone = p.encode(PROMPT), p.encode(["red", "circle"])
    tokens, rows, start = cond.tokens.clone(), cond.roles != Role.START, 0
    for part in p.sections(cond):
        s = slice(start, start := start + part.ids.shape[1])
        away = alone.tokens[:, s][(alone.roles == Role.WORD)[:, s]]
        tokens[:, s] = decor(cond.tokens[:, s], away, 0.8, rows=rows[:, s])
    with DECOR(undesired=("red", "circle"), alpha=0.8).patch(p) as told:
        found = drawn(p, PROMPT)
    torch.testing.assert_close(found, drawn(p, cond.replace(tokens=tokens)), rtol=0, atol=2e-5)
    assert not torch.allclose(found, drawn(p, cond), atol=1e-4)
    assert 0 < told["energy taken away"] < 1 and told["axes"][0] >= 1
    assert told["cosines"].keys() == {"a", "red", "star", "and", "blue", "circle"}


def test_from_a_prompt_without_words_nothing_is_taken(tiny_sd):
    with DECOR(undesired=("red",), rows="words").patch(tiny_sd) as told:
        assert torch.equal(drawn(tiny_sd, ""), drawn(tiny_sd, tiny_sd.encode("")))
    assert told["energy taken away"] == 0.0


def test_which_rows_are_projected(tiny_sd):
    p = tiny_sd
    cond, alone = p.encode(PROMPT), p.encode("red")
    masks = {"words": cond.roles == Role.WORD, "pad": cond.roles >= Role.END, "all": cond.roles != Role.START}
    for name, mask in masks.items():
        for pad in (False, True):
            counted = alone.roles >= Role.WORD if pad else alone.roles == Role.WORD
            expected = decor(cond.tokens, alone.tokens[counted], 0.8, rows=mask)
            with DECOR(undesired="red", alpha=0.8, rows=name, include_pad=pad).patch(p):
                found = drawn(p, PROMPT)
            torch.testing.assert_close(found, drawn(p, cond.replace(tokens=expected)), rtol=0, atol=2e-5)
    counted = alone.roles <= Role.WORD
    expected = decor(cond.tokens, alone.tokens[counted], 0.8)
    with DECOR(undesired="red", alpha=0.8, project_start=True).patch(p):
        found = drawn(p, PROMPT)
    torch.testing.assert_close(found, drawn(p, cond.replace(tokens=expected)), rtol=0, atol=2e-5)


def test_behind_the_prompt_words_have_other_rows(tiny_sd):
    p, cond = tiny_sd, tiny_sd.encode(PROMPT)
    behind = p.encode(f"{PROMPT} square")
    away = behind.tokens[p.find(behind, "square")]
    expected = decor(cond.tokens, away, 0.8, rows=cond.roles != Role.START)
    with DECOR(undesired="square", alpha=0.8, context="same_prefix").patch(p):
        found = drawn(p, PROMPT)
        with pytest.raises(BadInput, match="text behind"):
            drawn(p, cond.replace(prompts=("",)))
    torch.testing.assert_close(found, drawn(p, cond.replace(tokens=expected)), rtol=0, atol=2e-5)


def test_a_word_that_the_prompt_has_too_is_the_one_behind_it(tiny_sd):
    p, cond = tiny_sd, tiny_sd.encode("a red star")
    behind = p.encode("a red star red")
    away = behind.tokens[:, 4]  # start, a, red, star, red
    assert torch.equal(p.find(behind, "red")[0].nonzero()[:, 0], torch.tensor([2, 4]))
    expected = decor(cond.tokens, away, 0.8, rows=cond.roles != Role.START)
    with DECOR(undesired="red", alpha=0.8, context="same_prefix").patch(p):
        found = drawn(p, "a red star")
    torch.testing.assert_close(found, drawn(p, cond.replace(tokens=expected)), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_word_that_the_prompt_has_too_is_missed_where_it_is_cut_off(tiny_sd):
    with DECOR(undesired="red", context="same_prefix").patch(tiny_sd), pytest.raises(BadInput, match="cut off behind"):
        drawn(tiny_sd, "red " * 90)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd3"])
def test_behind_no_words_they_are_alone(request, family):
    p, pictures = request.getfixturevalue(family), []
    for context in ("same_prefix", "alone"):
        with DECOR(undesired="square", alpha=0.8, context=context).patch(p):
            pictures.append(drawn(p, ""))
    assert torch.equal(*pictures)


def test_sdxl_by_encoder_and_pooled(tiny_sdxl):
    p, cond, alone = tiny_sdxl, tiny_sdxl.encode(PROMPT), tiny_sdxl.encode("red")
    widths = [e.config.hidden_size for e in (p.pipe.text_encoder, p.pipe.text_encoder_2)]
    away, rows = alone.tokens[alone.roles == Role.WORD], cond.roles != Role.START
    halves = zip(cond.tokens.split(widths, -1), away.split(widths, -1), strict=True)
    tokens = torch.cat([decor(x, a, 0.8, rows=rows) for x, a in halves], -1)
    expected = cond.replace(tokens=tokens, pooled=decor(cond.pooled, alone.pooled, 0.8))
    with DECOR(undesired="red", alpha=0.8, per_encoder=True, pooled=True).patch(p):
        found = drawn(p, PROMPT)
    torch.testing.assert_close(found, drawn(p, expected), rtol=0, atol=2e-5)


def test_a_lora_of_the_text_encoder_acts_on_the_undesired_words_too(tiny_sd):
    p = tiny_sd.copy()
    plain = p.encode("red").tokens
    layer = next(n for n, m in p.pipe.text_encoder.named_modules() if isinstance(m, nn.Linear))
    adapter = p.add_adapter("a", rank=2, targets=[f"text_encoder.{layer}"], generator=torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        nn.init.normal_(up, generator=torch.Generator().manual_seed(1))
    cond, alone = p.encode(PROMPT), p.encode("red")
    assert not torch.allclose(alone.tokens, plain, atol=1e-3)
    rows = cond.roles != Role.START
    expected = decor(cond.tokens, alone.tokens[alone.roles == Role.WORD], 1.0, rows=rows)
    with DECOR(undesired="red", alpha=1.0).patch(p):
        found = drawn(p, PROMPT)
    torch.testing.assert_close(found, drawn(p, cond.replace(tokens=expected)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3"])
def test_the_analysis_of_prompts(request, family):
    p = request.getfixturevalue(family)
    found = DECOR(undesired="star").analyse(p, [PROMPT, "art", PROMPT], [0, 1, 2], 1)
    assert found.tables.keys() == {"axes", "rows", "cosines"}
    encoders = len(p.sections(p.encode("art")))
    assert len(found.panels) == 2 * encoders
    first = [row for row in found.tables["axes"] if row["prompt"] == PROMPT and row["encoder"] == 0]
    assert sum(row["energy"] for row in first) == pytest.approx(1, abs=1e-4)
    for row in first:
        assert row["start"] + row["words"] + row["padding"] == pytest.approx(1, abs=1e-3) or row["energy"] < 1e-9
    assert {row["word"] for row in found.tables["rows"]} == {*PROMPT.split(), "art"}
    assert "cosines" not in DECOR().analyse(p, ["art"]).tables
    with pytest.raises(BadInput, match="give a prompt"):
        DECOR().analyse(p, None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "name the words"),
        ({"undesired": "red", "pooled": True}, "no pooled embedding"),
        ({"undesired": "red", "per_encoder": True}, "side by side"),
        ({"undesired": "red " * 90 + "star"}, "cut off"),
    ],
)
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_what_a_pipeline_cannot_do(tiny_sd, given, told):
    with pytest.raises(BadInput, match=told), DECOR(**given).patch(tiny_sd):
        pass


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_prompt_that_leaves_no_room_behind_it(tiny_sd):
    patch = DECOR(undesired="star", context="same_prefix")
    with patch.patch(tiny_sd), pytest.raises(BadInput, match="cut off behind"):
        drawn(tiny_sd, "red " * 90)


@pytest.mark.parametrize(
    ("given", "told"),
    [({"alpha": 1.5}, "reflects"), ({"undesired": ("red", " ")}, "is empty"), ({"alpha": -1.0}, "at least 0")],
)
def test_settings_that_make_no_sense(given, told):
    with pytest.raises(BadInput, match=told):
        DECOR(**given)


def test_it_acts_where_the_network_runs_in_parts(tiny_sd):
    p = tiny_sd.copy()
    draw = lambda: p.draw(PROMPT, 1, sampling_steps=4, cfg_scale=3.0)
    patch = DECOR(undesired="red", alpha=0.8)
    with FasterDiffusion(every=2, alpha=0.0).patch(p):
        without = draw()
        with patch.patch(p):
            both = draw()
    assert not torch.allclose(both, without, atol=1e-4)
    with patch.patch(p), FasterDiffusion(**FasterDiffusion.NEUTRAL).patch(p):
        whole = draw()
    with patch.patch(p):
        assert torch.equal(draw(), whole)
