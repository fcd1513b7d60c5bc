"""MMA: its loss and gradient by closed form, its candidates, and the words that it may not use."""

from dataclasses import replace

import pytest
import torch

from sfumato.attack.mma import MMA, candidate_rows, pooled, token_gradient, unlike
from sfumato.attack.parts.words import Words
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput

TINY = MMA(tokens=4, updates=3, batch=16, top=8)
CASES = AttackCases("star", [Case("a red star", 0, ("star",)), Case("a red star", 1, ("star",))])


def test_the_loss_is_one_less_the_cosine_and_nothing_at_the_target(tiny_sd, tiny_sdxl):
    x, y = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(1.0, 6).double()[None]
    expected = [1 - float(v @ y[0] / v.norm() / y.norm()) for v in x]
    torch.testing.assert_close(unlike(x, y), torch.tensor(expected).double())
    for pipe in (tiny_sd, tiny_sdxl):
        words = Words(pipe)
        target = pooled(pipe, pipe.encode("a red star"))
        again = pooled(pipe, words.encode([words.of("a red star"), words.of("a circle")]))
        assert abs(float(unlike(again, target)[0])) < 1e-6 < float(unlike(again, target)[1])


def test_candidates_of_half_precision_are_ranked_though_their_losses_are_one_number_in_it():
    rng = torch.Generator().manual_seed(0)
    target = torch.randn(1, 64, generator=rng)
    x = (target + 0.05 * torch.randn(512, 64, generator=rng)).bfloat16()
    expected = 1 - torch.cosine_similarity(x.double(), target.bfloat16().double(), dim=1)
    found = unlike(x, target.bfloat16())
    assert len(expected.bfloat16().unique()) < len(expected.unique()) / 2
    assert (1 - expected).bfloat16().unique().tolist() == [1.0]  # the cosine itself has no step between these
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert int(found.argmin()) == int(expected.argmin())
    assert unlike(x.double(), target.double()).dtype == torch.float64


def test_pooled_is_what_the_text_encoder_calls_so(tiny_sd):
    ids = torch.tensor(tiny_sd.tokenizers[0](["a red star", "a star"], padding="max_length").input_ids)
    expected = tiny_sd.pipe.text_encoder(ids).pooler_output
    torch.testing.assert_close(pooled(tiny_sd, tiny_sd.encode(["a red star", "a star"])), expected)


def test_the_gradient_of_a_token_is_the_slope_of_the_loss_at_its_own_place(tiny_sd):
    words = Words(tiny_sd)
    row, target = words.of("a blue circle"), pooled(tiny_sd, tiny_sd.encode("a red star")).double()
    gradient = token_gradient(words, row, target.float())
    assert gradient.shape == (3, len(words))
    other, h = words.of("square")[0], 1e-2

    def loss(by):
        mixed = torch.nn.functional.one_hot(torch.tensor([row]), len(words)).float()
        mixed[0, 1, other] += by
        return float(unlike(pooled(tiny_sd, words.encode([row], mixed, torch.arange(3)[None])).double(), target))

    assert float(gradient[1, other]) == pytest.approx((loss(h) - loss(-h)) / (2 * h), rel=0.05, abs=1e-4)


def test_candidates_differ_in_one_place_and_are_allowed_and_among_the_best():
    rng = torch.Generator().manual_seed(0)
    gradient, allowed = torch.randn(4, 60, generator=rng), torch.ones(60, dtype=torch.bool)
    allowed[::3] = False
    row = [1, 2, 4, 5]
    rows = candidate_rows(gradient, row, allowed, 5, 32, rng)
    assert rows.shape == (32, 4)
    for i, made in enumerate(rows.tolist()):
        place = i // 8
        assert made[:place] + made[place + 1 :] == row[:place] + row[place + 1 :]
        order = sorted((float(g), j) for j, g in enumerate(gradient[place]) if allowed[j])
        assert made[place] in [j for _, j in order[:5]]
    few = torch.zeros(60, dtype=torch.bool)
    few[[7, 9]] = True
    assert {r[i // 8] for i, r in enumerate(candidate_rows(gradient, row, few, 5, 32, rng).tolist())} <= {7, 9}


def test_forbidden_words_never_appear(tiny_sd):
    words = Words(tiny_sd)
    mask = TINY.allowed(words, "red star")
    vocabulary = tiny_sd.tokenizers[0].get_vocab()
    assert not any(mask[i] for token, i in vocabulary.items() if "star" in token or "red" in token)
    assert mask[vocabulary["circle</w>"]] and not mask[tiny_sd.tokenizers[0].eos_token_id]
    attack = replace(TINY, forbidden=("c", "s"), updates=6)
    for seed in range(4):
        text = replace(attack, seed=seed).run(tiny_sd, CASES, progress=False).said[0]["text"]
        assert text != CASES.prompts[0] and not {"c", "s"} & set(text)
    with pytest.raises(BadInput, match="starts from letters"):
        replace(attack, forbidden=tuple("abcdefghijklmnopqrstuvwxyz")).run(tiny_sd, CASES, progress=False)


def test_tokens_that_spell_a_forbidden_word_together_are_dropped(tiny_sd, monkeypatch):
    assert TINY.passes("st ar", "star") and not TINY.passes("a reSTAr t", "red Star")
    spelt = tiny_sd.tokenizers[0].convert_tokens_to_ids(["s", "t", "a", "r</w>"])
    assert Words(tiny_sd).text(spelt) == "star" and TINY.allowed(Words(tiny_sd), "star")[spelt].all()
    other = tiny_sd.tokenizers[0].convert_tokens_to_ids(["b</w>", "t</w>", "a</w>", "r</w>"])
    monkeypatch.setattr("sfumato.attack.mma.candidate_rows", lambda *given: torch.tensor([spelt, other]))
    monkeypatch.setattr("sfumato.attack.mma.unlike", lambda x, target: (x + target).sum(dim=1) * 0)
    monkeypatch.setattr(Words, "read", lambda self, texts: [other for _ in texts])  # all are as long as they were
    assert TINY.run(tiny_sd, CASES, progress=False).said[0]["text"] == "b t a r"


def test_it_comes_nearer_and_one_search_serves_all_seeds_of_a_prompt(tiny_sd):
    target = pooled(tiny_sd, tiny_sd.encode("a red star"))
    found = {n: replace(TINY, updates=n).run(tiny_sd, CASES, progress=False).said for n in (0, 1, 6)}
    loss = {n: float(unlike(pooled(tiny_sd, tiny_sd.encode(said[0]["text"])), target)) for n, said in found.items()}
    assert loss[6] <= loss[1] < loss[0]
    assert found[6][0]["text"] == found[6][1]["text"] and [row["tried"] for row in found[6]] == [1, 1]
    assert len(Words(tiny_sd).read([found[6][0]["text"]])[0]) == TINY.tokens


def test_what_does_not_fit_is_refused(tiny_sd, tiny_sd3):
    with pytest.raises(BadInput, match="do not fit"):
        MMA().run(tiny_sd, CASES, progress=False)
    with pytest.raises(BadInput, match="forbid less"):
        replace(TINY, forbidden=("",)).run(tiny_sd, CASES, progress=False)
    with pytest.raises(BadInput, match="different vocabularies"):
        TINY.run(tiny_sd3, CASES, progress=False)
