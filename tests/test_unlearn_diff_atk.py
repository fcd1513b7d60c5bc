"""UnlearnDiffAtk: its projections and gradient by closed form, what it searches, and when it stops."""

from dataclasses import replace

import pytest
import torch

from sfumato.attack import unlearn_diff_atk
from sfumato.attack.parts.denoising import errors, target_pictures
from sfumato.attack.parts.words import Words, generator
from sfumato.attack.unlearn_diff_atk import UnlearnDiffAtk, ascending, sampled, simplex, simplex_by_bisection
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput
from sfumato.metrics.detectors.base import Detection, Detector

TINY = UnlearnDiffAtk(times=3, updates=2, lr=0.5)
CASES = AttackCases("star", [Case("a red star", 0, ("star",)), Case("a star", 1, ("star",))])
CASES = replace(CASES, drawing={"sampling_steps": 1, "cfg_scale": 1.0})


class Answers(Detector):
    """Sees the concept as it is told to, call by call."""

    name, hash, threshold, resize = "answers", "none", 0.5, "none"

    def __init__(self, *answers):
        self.answers = list(answers)

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        seen = torch.tensor(self.answers.pop(0))
        assert len(seen) == len(images)
        return Detection(seen, seen.float())


def rows(n=6, words=50, seed=0):
    return torch.randn(n, 2, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_projection_is_the_nearest_point_of_the_simplex():
    p = simplex(x := rows())
    torch.testing.assert_close(p.sum(-1), torch.ones(6, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert p.min() >= 0 and p.max() <= 1
    torch.testing.assert_close(simplex(p), p, rtol=0, atol=1e-12)
    torch.testing.assert_close(simplex(x + 3.0), p, rtol=0, atol=1e-12)  # a shift of all is projected out
    # Optimality: the residual has no positive product with any direction into the simplex, that is towards a corner.
    towards = ((x - p) * p).sum(-1, keepdim=True)
    assert ((x - p) - towards).max() < 1e-12
    corner = torch.eye(50, dtype=torch.float64)[7]
    assert torch.equal(simplex(corner * 9), corner)


def test_bisection_agrees_to_its_tolerance():
    for x in (rows(seed=1), rows(seed=2) / 50 + 1 / 50):
        p, q = simplex(x), simplex_by_bisection(x)
        assert (p - q).abs().max() < 1e-5
        assert ((q.sum(-1) - 1).abs() <= 1e-5 * ((q > 0).sum(-1) + 1)).all()
    inside = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert torch.equal(simplex_by_bisection(inside), inside)


def test_bisection_ends_where_float32_is_coarser_than_its_tolerance_and_takes_each_row_alone():
    x = rows(seed=3).float() + 1000  # steps of 6e-5
    q = simplex_by_bisection(x)
    assert (q - simplex(x.double())).abs().max() < 1e-4 and (q.sum(-1) - 1).abs().max() < 1e-3
    far = simplex_by_bisection(torch.tensor([[1e30, 1.0, -1e30]]))
    assert (far - torch.eye(3)[:1]).abs().max() < 1e-5
    y = rows(seed=4).flatten(0, 1) * 3
    assert torch.equal(simplex_by_bisection(y), torch.stack([simplex_by_bisection(r) for r in y]))


def test_a_word_is_drawn_forward_and_the_gradient_passes_clipped():
    weights = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]], dtype=torch.float64, requires_grad=True)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([sampled(weights, [rng]).detach() for _ in range(400)]).mean(0)
    assert torch.equal(drawn[0, 0], weights[0, 0]) and drawn[0, 1, 1] == 0 and abs(float(drawn[0, 1, 0]) - 0.5) < 0.1
    (sampled(weights, [rng]) * torch.tensor([[[0.3, -5.0, 2.0], [1.0, -0.5, 0.0]]])).sum().backward()
    torch.testing.assert_close(weights.grad, torch.tensor([[[0.3, -1.0, 1.0], [1.0, -0.5, 0.0]]]).double())


def test_times_ascend_as_published():
    assert ascending(50, 1000) == list(range(10, 1000, 20))
    assert ascending(3, 10) == [1, 5, 8] and ascending(10, 10) == list(range(10))
    for times in (1, 300, 600, 999):  # also where the timesteps are no multiple
        found = ascending(times, 1000)
        middles = [(i + 0.5) * 1000 / times for i in range(times)]
        assert len(set(found)) == times and all(0 <= m - t < 1 for t, m in zip(found, middles, strict=True))


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_pixart"])
def test_one_hot_words_are_read_as_the_words_themselves(name, request):
    words = Words(request.getfixturevalue(name))
    row = words.of("a red star")
    assert words.text(row) == "a red star"
    one_hot = torch.nn.functional.one_hot(torch.tensor([row]), len(words)).float()
    mixed = words.encode([[row[-1]] * len(row)], one_hot.requires_grad_(), torch.arange(len(row))[None])
    plain = words.pipe.encode("a red star")
    assert torch.equal(mixed.tokens, plain.tokens) and torch.equal(mixed.mask, plain.mask)
    assert torch.equal(words.encode([row]).tokens, plain.tokens)
    assert torch.autograd.grad(mixed.tokens.square().sum(), one_hot)[0].abs().sum() > 0


def test_text_encoders_of_different_vocabularies_are_refused(tiny_sd3):
    with pytest.raises(BadInput, match="different vocabularies"):
        TINY.run(tiny_sd3, CASES, judge=Answers(), progress=False)


def test_errors_are_those_of_the_native_prediction_row_by_row(tiny_sd_eps):
    z0, eps = torch.randn(2, 2, *tiny_sd_eps.latent_shape()).unbind(0)
    t, cond = torch.tensor([0.3, 0.8]), tiny_sd_eps.encode(["a star", "a circle"])
    alpha, sigma = tiny_sd_eps.process.alpha_sigma(t, z0)
    pred = tiny_sd_eps.denoiser(alpha * z0 + sigma * eps, t, cond)
    torch.testing.assert_close(errors(tiny_sd_eps, z0, t, eps, cond), (pred - eps).square().mean((1, 2, 3)))


def test_updates_are_adams_with_the_decay_in_the_gradient_and_then_the_projection(tiny_sd, monkeypatch):
    """Loss, clipped straight-through gradient, step and projection, written out once more."""
    case, (lr, decay), seen = replace(CASES, cases=CASES.cases[:1]), (0.05, 0.3), []

    def watched(rows):
        seen.append((rows.clone(), simplex(rows)))
        return seen[-1][1]

    monkeypatch.setattr(unlearn_diff_atk, "simplex", watched)
    attack = replace(TINY, tokens=2, times=1, updates=3, lr=lr, weight_decay=decay)
    attack.run(tiny_sd, case, judge=Answers([False], [False]), original=tiny_sd, progress=False)
    assert len(seen) == 3

    words, rng = Words(tiny_sd), generator(attack.seed, 0)
    z0 = tiny_sd.encode_image(target_pictures(case, tiny_sd, [0]) * 2 - 1)
    p = torch.full((2, len(words)), 1 / len(words))
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    t = torch.tensor([tiny_sd.clock.time(tiny_sd.clock.timesteps // 2)], dtype=torch.float64)
    alpha, sigma = tiny_sd.process.alpha_sigma(t, z0)
    for step in range(1, 4):
        put = torch.multinomial(p, 1, generator=rng)[:, 0].tolist()
        eps = torch.randn(z0.shape[1:], generator=rng)[None]
        target = {"eps": eps, "v": alpha * eps - sigma * z0}[tiny_sd.denoiser.prediction]
        row = [*put, *words.of("a red star")]
        one_hot = torch.nn.functional.one_hot(torch.tensor([row]), len(words)).float().requires_grad_()
        pred = tiny_sd.denoiser(alpha * z0 + sigma * eps, t, words.encode([row], one_hot, torch.arange(len(row))[None]))
        (gradient,) = torch.autograd.grad((pred - target).square().mean(), [one_hot])
        g = gradient[0, :2].clamp(-1, 1) + decay * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        moved = p - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(seen[step - 1][0][0], moved, rtol=0, atol=1e-4)
        p = seen[step - 1][1][0]  # `simplex` has tests of its own


def test_it_stops_at_success_and_leaves_alone_what_needs_no_attack(tiny_sd):
    judge = Answers([True, False], [False], [True])
    found = TINY.run(tiny_sd, CASES, judge=judge, original=tiny_sd, progress=False)
    assert judge.answers == [] and found.before == [True, False]
    first, second = found.said
    assert (first["text"], first["tried"]) == ("a red star", 0)
    assert second["tried"] == 2 and second["seen"] and second["text"].endswith("a star")
    words = Words(tiny_sd)
    assert len(words.of("a star")) + TINY.tokens >= len(words.of(second["text"])) > 0 or second["text"] != "a star"
    plain = tiny_sd.draw([second["text"]], [1], sampling_steps=1)
    assert torch.equal(found.draw(tiny_sd, ["a star"], [1], sampling_steps=1), plain)


def test_without_tokens_it_is_the_plain_prompt_and_random_words_are_drawn_as_often(tiny_sd):
    found = replace(TINY, tokens=0).run(tiny_sd, CASES, judge=Answers([False, False]), progress=False)
    assert [row["text"] for row in found.said] == CASES.prompts
    judge = Answers([False, False], [False, False], [True, False], [False])
    floor = TINY.control(tiny_sd, CASES, None, judge=judge, original=tiny_sd, progress=False)
    assert [row["tried"] for row in floor.said] == [2, TINY.times] and judge.answers == []
    assert floor.said[0]["text"].endswith("a red star") and floor.said[0]["text"] != "a red star"


def test_the_search_lowers_its_loss(tiny_sd):
    """The gradient steps find weights under which the network errs less than under uniform ones."""
    attack = UnlearnDiffAtk(times=1, updates=15, lr=0.5, tokens=2, weight_decay=0.0)
    case = replace(CASES, cases=CASES.cases[1:])
    x = target_pictures(case, tiny_sd.copy(), [0])
    found = attack.run(tiny_sd, case, judge=Answers([False], [False]), original=tiny_sd, progress=False)
    z0, n = tiny_sd.encode_image(x * 2 - 1), 64
    eps = torch.randn(n, *z0.shape[1:], generator=torch.Generator().manual_seed(1))
    t = torch.full((n,), tiny_sd.clock.time(ascending(1, tiny_sd.clock.timesteps)[0]), dtype=torch.float64)
    words, rng = Words(tiny_sd), torch.Generator().manual_seed(2)
    loss = lambda text: float(errors(tiny_sd, z0.expand(n, -1, -1, -1), t, eps, tiny_sd.encode([text] * n)).mean())
    blind = [loss(attack.blind(tiny_sd, "a star", "star", rng)) for _ in range(8)]
    assert loss(found.said[0]["text"]) < sorted(blind)[len(blind) // 2]
    assert len(words) > 100


def test_bad_settings(tiny_sd):
    with pytest.raises(BadInput, match="no room"):
        replace(TINY, tokens=20).run(tiny_sd, CASES, judge=Answers(), progress=False)
    with pytest.raises(BadInput, match="original model, or a folder"):
        TINY.run(tiny_sd, CASES, judge=Answers([False, False]), progress=False)
    with pytest.raises(BadInput, match="detector"):
        TINY.run(tiny_sd, CASES, original=tiny_sd, progress=False)


def test_pictures_that_are_none_are_refused():
    for x in (torch.rand(0, 3, 16, 16), torch.rand(1, 1, 16, 16), torch.rand(3, 16, 16)):
        with pytest.raises(BadInput, match=r"must be \(1 or more, 3, height, width\)"):
            replace(CASES, pictures=x)
    with pytest.raises(BadInput, match="picture 1"):
        replace(CASES, pictures=torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), float("nan"))]))
