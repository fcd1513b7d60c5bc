"""EAP: the search, the losses and the candidates in float64, and the two steps on tiny pipelines."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from sfumato.audit.protocol import edit_record, method_of
from sfumato.cli import main
from sfumato.erase.eap import EAP, Words, erasing_loss, gumbel_softmax, mixed, preserving_loss
from sfumato.erase.parts.candidates import allowed, legible, line_centres, similarities, similarity, spread, vocabulary
from sfumato.errors import BadInput
from sfumato.noise import GaussianProcess, ScaledLinearBeta
from sfumato.train.draw import Share
from sfumato.train.loop import Run

SHORT = {"concepts": "star", "updates": 2, "sampling_steps": 3, "lr": 1e-3}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(n: int = 1) -> Share:
    return Share((0, 0, 1), range(n), n)


# The search


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_is_the_published_formula(hard):
    logits = rand(3, 5)
    q = gumbel_softmax(logits, 2.0, hard, torch.Generator().manual_seed(1))
    u = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    soft = torch.softmax((logits - (-(u + 1e-10).log() + 1e-10).log()) / 2, -1)
    assert torch.equal(q, torch.eye(5, dtype=q.dtype)[soft.argmax(-1)] if hard else soft)


def test_a_hard_pick_is_exactly_one_word_with_the_soft_jacobian():
    jacobians = []
    for hard in (True, False):
        pick = lambda x, hard=hard: gumbel_softmax(x, 2.0, hard, torch.Generator().manual_seed(1))
        jacobians.append(torch.autograd.functional.jacobian(pick, rand(5)))
    assert jacobians[0].abs().max() > 0.01
    assert torch.equal(*jacobians)


def test_words_are_drawn_as_often_as_their_logits_say():
    """Gumbel-max: whatever the temperature, word i is the likeliest with probability softmax(logits)_i."""
    logits = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64).repeat(20_000, 1)
    shares = gumbel_softmax(logits, 5.0, True, torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.015)  # four standard errors


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_pixart", "tiny_sd3"])
def test_one_word_of_a_mixture_is_that_word_and_two_are_between(family, request):
    pipe = request.getfixturevalue(family)
    words = pipe.encode(["star", "red circle", "a"])
    one = mixed(words, torch.eye(3)[[1]])
    z = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.denoiser(z, 0.5, one), pipe.denoiser(z, 0.5, words[1]))
    weights = torch.tensor([[0.25, 0.75, 0.0]], requires_grad=True)
    two = mixed(words, weights)
    torch.testing.assert_close(two.tokens[0], 0.25 * words.tokens[0] + 0.75 * words.tokens[1])
    assert torch.equal(two.mask[0], words.mask[0] | words.mask[1])
    pipe.denoiser(z, 0.5, two).square().mean().backward()
    assert (weights.grad != 0).all()


# The losses


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_errors_of_x0_are_those_of_eps_times_sigma_over_alpha_squared(eta):
    process = GaussianProcess(ScaledLinearBeta())
    z, *eps = rand(4, 2, 4, 3, 3)
    alpha, sigma = process.alpha_sigma(0.7)
    x0 = [process.convert(e, z, 0.7, "eps", "x0") for e in eps]
    expected = (sigma / alpha) ** 2 * erasing_loss(*eps, eta)
    torch.testing.assert_close(erasing_loss(*x0, eta), expected, rtol=1e-10, atol=0)
    kept = preserving_loss(*x0[:2])
    torch.testing.assert_close(kept.mean(), (sigma / alpha) ** 2 * mse_loss(*eps[:2]), rtol=1e-10, atol=0)


def replayed(eap: EAP, pipe) -> tuple[int, list[int]]:
    """The number of steps walked and the seeds that a step draws; they are not ours to know."""
    (generator,) = step(eap.batch).generators(eap.batch, range(1))
    torch.randint(1, (eap.batch,), generator=generator)
    i = int(torch.randint(eap.sampling_steps, (), generator=generator))
    return i, torch.randint(2**31, (eap.batch,), generator=generator).tolist()


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd_eps"])
def test_with_one_candidate_it_is_esd_in_x0_with_that_prompt_preserved(family, request):
    pipe = request.getfixturevalue(family)
    eap = EAP(**SHORT, eta=1.5, keep_weight=0.3, batch=2)
    student = pipe.copy(own="xattn")
    weights = list(student.parameters("xattn").values())
    with torch.no_grad():
        for w in weights:
            w += 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    loss, _ = eap.losses(pipe, student, Words([["circle"]]))
    value, figures = loss({"step": 0}, step(2))
    i, seeds = replayed(eap, pipe)
    walk = {"sampling_steps": 3, "stop_after": i, "cfg_scale": 3.0}
    (z, t), (z_kept, _) = (student.trajectory(c, seeds, **walk) for c in ("star", "circle"))
    x0 = lambda p, z, prompt: p.process.convert(p.denoiser(z, t, p.encode(prompt)), z, t, p.prediction, "x0")
    with torch.no_grad():
        target = 2.5 * x0(pipe, z, "") - 1.5 * x0(pipe, z, "star")
        original = x0(pipe, z_kept, "circle")
    lost = mse_loss(x0(student, z, "star"), target)
    kept = mse_loss(x0(student, z_kept, "circle"), original)
    assert not torch.equal(z, z_kept) or i == 0
    for actual, expected in ((figures["erase"], lost), (figures["keep"], kept), (value, lost + 0.3 * kept)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # float32 network
    actual, expected = (torch.autograd.grad(x, weights) for x in (value, lost + 0.3 * kept))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-9)


def test_before_anything_has_moved_nothing_has_drifted(tiny_sd):
    student = tiny_sd.copy(own="xattn")
    words = Words([["circle", "red", "blue"]])
    loss, search = EAP(**SHORT).losses(tiny_sd, student, words)
    assert float(loss({"step": 0}, step())[1]["keep"].detach()) <= 1e-12
    value, _ = search({"step": 0}, step())
    value.backward()
    assert -1e-12 <= float(value.detach()) <= 0
    assert words.logits[0].grad.abs().max() <= 1e-9


def test_the_search_climbs_towards_the_word_that_has_drifted(tiny_sd, monkeypatch):
    """A student that answers otherwise by the share of one word alone: only that word's logit rises."""
    names = ["circle", "red", "blue", "square"]
    student, words = tiny_sd.copy(own="xattn"), Words([names])
    share = torch.linalg.pinv(tiny_sd.encode(names).tokens.flatten(1).double())[:, 2].float()
    plain = type(student.denoiser).__call__

    def called(denoiser, z, t, cond):
        drift = (cond.tokens.flatten(1) @ share)[:, None, None, None] if denoiser is student.denoiser else 0.0
        return plain(denoiser, z, t, cond) + drift

    monkeypatch.setattr(type(student.denoiser), "__call__", called)
    _, search = EAP(**{**SHORT, "sampling_steps": 1}, hard=False).losses(tiny_sd, student, words)
    adam = torch.optim.Adam(words.parameters(), lr=0.1)
    for i in range(5):
        adam.zero_grad()
        search({"step": i}, Share((0, i, 1), range(1), 1))[0].backward()
        adam.step()
    logits = words.logits[0].detach()
    assert logits[2] > 0.7 and (logits[[0, 1, 3]] < 0).all()


@pytest.mark.parametrize("searches", [0, 2])
def test_the_steps_train_what_is_theirs_and_nothing_else(tiny_sd, monkeypatch, searches):
    take, seen = Run._take, []

    def watched(run, turn, *rest):
        before = {n: p.detach().clone() for n, p in run.params.items()}
        logs = take(run, turn, *rest)
        seen.append((turn.name, {n.partition(".")[0] for n, p in run.params.items() if not torch.equal(p, before[n])}))
        return logs

    monkeypatch.setattr(Run, "_take", watched)
    _, log = EAP(**SHORT, searches=searches).run(tiny_sd)
    assert seen == [("weights", {"network"}), *[("words", {"words"})] * searches] * 2
    assert len(log["losses"]) == 2 and len(log["search_losses"]) == 2 * searches
    assert all(x <= 0 for x in log["search_losses"])


def test_only_the_words_of_the_concept_drawn_are_searched(tiny_sd):
    eap = EAP(**{**SHORT, "concepts": ("star", "square")})
    words = Words([["circle", "red"], ["blue", "art"]])
    student = tiny_sd.copy(own="xattn")
    with torch.no_grad():
        next(iter(student.parameters("xattn").values())).add_(1.0)
    eap.losses(tiny_sd, student, words)[1]({"step": 0}, step())[0].backward()
    assert [w.grad is None for w in words.logits] in ([True, False], [False, True])


# The candidates


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_centres_on_a_line_are_the_best_of_all_ways_to_cut_it(k):
    values = rand(8, seed=k)
    x = values.sort().values
    ways = [[0, *cuts, 8] for cuts in combinations(range(1, 8), k - 1)]
    runs = [[x[a:b] for a, b in pairwise(way)] for way in ways]
    best = min(runs, key=lambda way: sum(float((r - r.mean()).square().sum()) for r in way))
    torch.testing.assert_close(line_centres(values, k), torch.stack([r.mean() for r in best]))


def test_words_spread_over_their_distance():
    near = torch.tensor([-5.0, -1.0, -9.0, -1.1, -5.2, -4.7, -30.0])
    assert spread(near, 6, 3) == [1, 0, 2]  # next to the centres -1.05, -4.97 and -9
    assert spread(near, 6, 0) == spread(near, 6, 6) == [1, 3, 5, 0, 4, 2]
    assert spread(near, 2, 1) in ([1], [3])


def test_similarities_are_the_published_ones():
    concept, words = rand(7), rand(3, 7, seed=1)
    torch.testing.assert_close(similarity(concept, words), -(concept - words + 1e-6).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(similarity(concept, words, "cosine"), cosine_similarity(concept[None], words))


def test_the_concept_and_what_is_near_it_are_no_candidates_unless_asked_for():
    words = ["Church", "churches", "chapel", "tree", "river"]
    away = torch.tensor([[0.0, 4.0, 1.0, 5.0, 6.0]])
    left = lambda **options: [words[i] for i in allowed(words, away, ["church"], **options)]
    assert left(radius=0.5) == ["tree", "river"]
    assert left(radius=0.0) == ["chapel", "tree", "river"]
    assert left() == words
    assert left(exclude=("Tree ",)) == ["Church", "churches", "chapel", "river"]


def test_legible_words():
    given = ["tree", "Tree", "tree", "two words", "caf\u00e9", "a1", "", "red</w>"]
    assert legible(given) == ["tree", "Tree", "red</w>"]


def test_whole_words_of_tokenizers(tiny_sd, tiny_pixart):
    known = {"photo", "of", "red", "blue", "star", "circle", "square", "an", "art"}
    assert set(vocabulary(tiny_sd)) == known and vocabulary(tiny_sd)[0] == "photo"
    assert set(vocabulary(tiny_pixart)) == known


def test_candidates_of_a_pipeline(tiny_sd):
    given = ("red", "Stars", "circle", "a photo", "blue")
    some = EAP(concepts="star", vocabulary=given, preserve=("a photo", "red")).candidates(tiny_sd)
    assert set(some[0]) == {"red", "circle", "blue", "a photo"} and some[0][-1] == "a photo" and len(some[0]) == 4
    published = EAP(concepts=("star", "square"), **EAP.presets["paper"]).candidates(tiny_sd)
    assert published[0][0] == "star" and set(published[1]) == set(vocabulary(tiny_sd))
    few = EAP(concepts="star", vocabulary=("red", "circle", "blue"), nearest=2, centres=1).candidates(tiny_sd)
    assert len(few[0]) == 1


def test_what_was_found_is_told(tiny_sd):
    _, log = EAP(**{**SHORT, "updates": 3}, batch=2, vocabulary=("red", "circle")).run(tiny_sd)
    words = log["words"]["star"]
    assert {w["word"] for w in words} == {"red", "circle"} and words[0]["logit"] >= words[1]["logit"]
    assert sum(w["preserved"] for w in words) == 6
    assert {w["first"] for w in words} & {0} and {w["last"] for w in words} & {2}
    assert any(w["drift"] is not None and w["drift"] > 0 for w in words)
    assert log["found"] == {"words found while erasing star": [w["word"] for w in words]}


def test_command_record_and_report_name_the_words(tiny_sd, tmp_path, capsys):
    tiny_sd.copy().save(tmp_path / "model")
    short = "--concept star --vocabulary red circle --updates 1 --sampling-steps 1"
    words = ["erase", "eap", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *short.split()]
    assert main(words) == 0
    told = method_of(edit_record(tmp_path / "out", None))
    assert told["name"] == "eap" and told["vocabulary"] == ["red", "circle"]
    ((label, found),) = told["found"].items()
    assert set(found) == {"red", "circle"} and f"{label}: {', '.join(found)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"variant": "xattn"}, "x, u, full"),
        ({"anchors": "Star"}, "its own anchor"),
        ({"vocabulary": ("stars", "two words")}, "no word is left to preserve while 'star' is erased"),
        ({"preserve": (" ",)}, "tokenizer"),
    ],
)
def test_bad_settings_get_one_sentence(tiny_sd, wrong, words):
    with pytest.raises(BadInput, match=words):
        EAP(**{**SHORT, **wrong}).run(tiny_sd)


def test_the_plan_counts_what_is_trained(tiny_sd):
    plan = EAP(**SHORT, variant="u").plan(tiny_sd)
    assert plan.memory["optimiser"] == 8 * sum(p.numel() for p in tiny_sd.parameters("noxattn").values())
    assert plan.seconds > 0


def test_what_is_near_a_concept_is_told_by_what_the_network_looks_at(tiny_pixart, noisy_padding):
    eap = EAP(**SHORT, vocabulary=("circle", "square", "art", "photo", "red"), similarity="l2")
    plain = eap.candidates(tiny_pixart)
    noisy_padding()
    assert eap.candidates(tiny_pixart) == plain


def test_how_near_a_word_is_depends_on_no_other_word_of_the_batch(tiny_omnigen):
    words = ("circle", "a photo of a blue square", "art")
    near = lambda some: similarities(["star"], some, "l2", lambda x: tiny_omnigen.as_seen(tiny_omnigen.encode(x)))
    torch.testing.assert_close(near(words), torch.cat([near([word]) for word in words], dim=1))
