"""P4D: its projection, its places and its loss by closed form; what it keeps and what it compares."""

from dataclasses import replace

import pytest
import torch

from sfumato.attack import p4d
from sfumato.attack.p4d import P4D, nearest, places
from sfumato.attack.parts.denoising import predicted
from sfumato.attack.parts.words import Words, generator, random_words
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput
from sfumato.metrics.detectors.base import Detection, Detector
from sfumato.metrics.vision import ClipModel

TINY = P4D(tokens=3, updates=3, check_every=2)
CASES = AttackCases("star", [Case("a red star", 0, ("star",)), Case("a star", 1, ("star",))])
CASES = replace(CASES, drawing={"sampling_steps": 1, "cfg_scale": 1.0})


class Scores(Detector):
    """Gives the scores that it is told to, call by call; from 0.5 on the concept is seen."""

    name, hash, threshold, resize = "scores", "none", 0.5, "none"

    def __init__(self, *scores):
        self.scores = list(scores)

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        score = torch.tensor(self.scores.pop(0))
        assert len(score) == len(images)
        return Detection(score >= 0.5, score)


def other_weights(pipe, subset="full"):
    """A pipeline that predicts otherwise: what an eraser leaves."""
    other = pipe.copy(own=subset)
    with torch.no_grad():
        for i, p in enumerate(other.parameters(subset).values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return other


@pytest.mark.parametrize("form", ["n", "k"])
def test_updates_are_adamws_on_the_embeddings_with_the_gradient_at_their_nearest_words(form, tiny_sd, monkeypatch):
    """Loss, its aim by the original, gradient and step, written out once more."""
    erased, case = other_weights(tiny_sd), replace(CASES, cases=CASES.cases[:1])
    lr, decay, seen = 0.2, 0.3, []

    def watched(x, table):
        seen.append(x.clone())
        return nearest(x, table)

    monkeypatch.setattr(p4d, "nearest", watched)
    attack = replace(TINY, form=form, pad="end", updates=3, check_every=9, lr=lr, weight_decay=decay)
    attack.run(erased, case, judge=Scores([0.0], [0.1]), original=tiny_sd, progress=False)

    words, rng = Words(erased), generator(attack.seed, 0)
    (table,), prompt = words.tables(), words.of("a red star")
    if form == "n":
        row, free = random_words(words, attack.tokens, rng), [0, 1, 2]
    else:  # two free tokens: before the three words, and at their end
        first, last = random_words(words, 2, rng)
        row, free = [first, *prompt, last], [0, 4]
    e = table[row].detach().clone()
    z0 = erased.encode_image(tiny_sd.draw(case.prompts, case.seeds, **case.drawing) * 2 - 1, rng)
    m, v = torch.zeros_like(e), torch.zeros_like(e)
    for step in range(1, 3):
        torch.testing.assert_close(seen[step - 1][0], e, rtol=0, atol=1e-5)
        ids = list(row)
        for k in free:
            cosine = torch.cosine_similarity(e[k][None], table[words.usable])
            ids[k] = int(words.usable[int(cosine.argmax())])
        t = erased.clock.time(int(torch.randint(erased.clock.timesteps, (), generator=rng)))
        t, eps = torch.tensor([t], dtype=torch.float64), torch.randn(z0.shape[1:], generator=rng)[None]
        alpha, sigma = erased.process.alpha_sigma(t, z0)
        z = alpha * z0 + sigma * eps
        with torch.no_grad():
            aim = tiny_sd.denoiser(z, t, tiny_sd.encode("a red star"))
        one_hot = torch.nn.functional.one_hot(torch.tensor([ids]), len(words)).float().requires_grad_()
        pred = erased.denoiser(z, t, words.encode([ids], one_hot, torch.arange(len(ids))[None]))
        # The gradient by one-hot rows is the table times that by the embeddings, which a square system gives back.
        (by_words,) = torch.autograd.grad((pred - aim).square().mean(), [one_hot])
        g = torch.linalg.lstsq(table.double(), by_words[0].double().T).solution.T.to(e)
        g[[k for k in range(len(ids)) if k not in free]] = 0
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        e = e * (1 - lr * decay) - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(seen[2][0], e, rtol=0, atol=1e-4)
    assert (seen[2] - seen[0]).abs().max() > 0.1


def test_the_text_predicts_what_the_original_does_on_times_and_noise_that_were_not_searched_on(tiny_sd):
    erased, case = other_weights(tiny_sd), replace(CASES, cases=CASES.cases[:1])
    attack = replace(TINY, tokens=4, updates=61, check_every=60)
    found = attack.run(erased, case, judge=Scores([0.0], [0.1], [0.2]), original=tiny_sd, progress=False)
    n, rng = 64, torch.Generator().manual_seed(1)
    z0 = erased.encode_image(tiny_sd.draw(case.prompts, case.seeds, **case.drawing) * 2 - 1).expand(n, -1, -1, -1)
    t, eps = torch.rand(n, generator=rng, dtype=torch.float64), torch.randn(z0.shape, generator=rng)
    z = erased.process.diffuse(z0, t, eps)
    aim = predicted(tiny_sd, z, t, tiny_sd.encode(["a red star"] * n))
    loss = lambda text: float((predicted(erased, z, t, erased.encode([text] * n)) - aim).square().mean())
    with torch.no_grad():
        blind = [loss(attack.blind(erased, "a red star", "star", rng)) for _ in range(16)]
        assert loss(found.said[0]["text"]) < sorted(blind)[len(blind) // 4]


def test_free_tokens_stand_before_every_third_word():
    assert places(7, 3) == [0, 4, 8]
    assert places(6, 3) == [0, 4, 8]  # one at the end where 3 divides the length
    for n in range(12):
        combined = range(n + n // 3 + 1)
        assert places(n, 3) == [i for i in combined if i % 4 == 0]


def test_the_projection_is_the_word_of_greatest_cosine():
    rng = torch.Generator().manual_seed(0)
    table, x = torch.randn(40, 6, generator=rng).double(), torch.randn(2, 3, 6, generator=rng).double()
    cosine = [[torch.cosine_similarity(x[i, j][None], table).argmax() for j in range(3)] for i in range(2)]
    assert nearest(x, table).tolist() == [[int(c) for c in row] for row in cosine]
    assert nearest(table[None] * 0.3, table).tolist() == [list(range(40))]  # shrinking moves no word


def test_the_loss_is_zero_for_one_model_and_the_prompt_itself(tiny_sd):
    words, prompt = Words(tiny_sd), "a red star"
    row = words.of(prompt)
    put = words.tables()[0][torch.tensor([row])].float().requires_grad_()
    z, t = torch.randn(1, *tiny_sd.latent_shape()), torch.tensor([0.4])
    aim = predicted(tiny_sd, z, t, tiny_sd.encode(prompt))
    at = torch.arange(len(row))[None]
    loss = (predicted(tiny_sd, z, t, replace(TINY, pad="end")._encode(tiny_sd, words, [row], put, at)) - aim).square()
    assert float(loss.detach().sum()) == 0
    padded = replace(TINY, pad="official")._encode(tiny_sd, words, [row], put, at)
    assert padded.ids[0].tolist()[len(row) + 2 :] == [0] * (len(padded.ids[0]) - len(row) - 2)
    assert float((predicted(tiny_sd, z, t, padded) - aim).detach().square().sum()) > 0


def test_p4d_k_keeps_the_words_of_the_prompt(tiny_sd):
    attack = replace(TINY, form="k", every=2, updates=5, weight_decay=0.3)
    judge = Scores([0.1, 0.2], [0.3], [0.3], [0.2], [0.2], [0.4], [0.4])
    found = attack.run(tiny_sd, CASES, judge=judge, original=tiny_sd.copy(), progress=False)
    words = Words(tiny_sd)
    start, free = attack._start(words, "k", words.of("a red star"), torch.Generator().manual_seed(0))
    assert free == [0, 3] and start[1:3] == words.of("a red") and start[4:] == words.of("star")
    assert all(row["tried"] == 3 for row in found.said) and judge.scores == []
    for row in found.said:
        assert "star" in row["text"] and "a" in row["text"] and row["text"] != row["prompt"]


def test_the_surest_text_is_kept_and_none_after_success_if_it_shall_stop(tiny_sd):
    one = replace(CASES, cases=CASES.cases[:1])
    judge = Scores([0.0], [0.6], [0.7], [0.1])
    attack = replace(TINY, updates=5)
    found = attack.run(tiny_sd, one, judge=judge, original=tiny_sd.copy(), progress=False)
    assert found.said[0]["score"] == pytest.approx(0.7) and found.said[0]["seen"] and found.said[0]["tried"] == 3
    judge = Scores([0.0], [0.6])
    found = replace(attack, stop=True).run(tiny_sd, one, judge=judge, original=tiny_sd.copy(), progress=False)
    assert found.said[0]["tried"] == 1 and judge.scores == []
    union = replace(TINY, form="union")
    assert union.tries == 2 * TINY.tries == 4
    floor = union.control(tiny_sd, one, None, judge=Scores([0.0], *[[0.1]] * 4), original=tiny_sd, progress=False)
    assert floor.said[0]["tried"] == 4


def test_a_clip_chooses_what_is_nearest_to_the_originals_picture(tiny_sd, monkeypatch):
    class Bright:
        def images(self, x):
            share = x.flatten(1).mean(dim=1)
            return torch.stack([share, (1 - share**2).sqrt()], dim=1)

    monkeypatch.setattr(ClipModel, "load", classmethod(lambda cls, model: Bright()))
    one = replace(CASES, cases=CASES.cases[:1])
    attack = replace(TINY, updates=5, clip="a folder", lr=5.0)
    found = attack.run(tiny_sd, one, judge=Scores([0.0], [0.1], [0.9], [0.2]), original=tiny_sd.copy(), progress=False)
    aim, (said,) = tiny_sd.draw(one.prompts, one.seeds, **one.drawing), found.said
    drawn = found.draw(tiny_sd, one.prompts, one.seeds, **one.drawing)
    assert said["score"] == pytest.approx(float((Bright().images(aim) * Bright().images(drawn)).sum()), abs=1e-5)
    assert said["tried"] == 3


def test_of_the_union_a_success_counts_before_what_is_nearer_to_the_originals_picture(tiny_sd, monkeypatch):
    class Rising:
        """Finds every picture nearer than the one before."""

        asked = 0

        def images(self, x):
            self.asked += 1
            return torch.full((len(x), 1), float(self.asked))

    one = replace(CASES, cases=CASES.cases[:1])
    union = replace(TINY, form="union", clip="a folder", check_every=5)  # one look at each form
    for n, k, wins in ((0.9, 0.1, 2.0), (0.1, 0.9, 3.0), (0.9, 0.9, 3.0), (0.1, 0.1, 3.0)):
        monkeypatch.setattr(ClipModel, "load", classmethod(lambda cls, model: Rising()))
        judge = Scores([0.0], [n], [k])
        (said,) = union.run(tiny_sd, one, judge=judge, original=tiny_sd.copy(), progress=False).said
        assert (said["score"], said["seen"], said["tried"]) == (wins, max(n, k) > 0.5, 2)


def test_the_control_chooses_among_its_texts_as_the_attack_does(tiny_sd, monkeypatch):
    """By the CLIP, which may leave a success for a nearer picture; of each form apart; by the judge without a CLIP."""
    one, original = replace(CASES, cases=CASES.cases[:1]), tiny_sd.copy()

    class Given:
        """Finds the pictures as near as it is told to, one after the other, after the original's own."""

        def __init__(self, *near):
            self.near = [1.0, *near]

        def images(self, x):
            return torch.full((len(x), 1), self.near.pop(0))

    def said(attack, near, seen):
        load = lambda: monkeypatch.setattr(ClipModel, "load", classmethod(lambda cls, model: Given(*near)))
        judges = [Scores([0.0], *([x] for x in seen)) for _ in range(2)]
        load()
        found = attack.run(tiny_sd, one, judge=judges[0], original=original, progress=False).said[0]
        load()
        floor = attack.control(tiny_sd, one, None, judge=judges[1], original=original, progress=False).said[0]
        tell = lambda row: (row["score"], row["seen"], row["tried"])
        assert judges[0].scores == judges[1].scores and tell(floor) == tell(found)
        return tell(found)

    clip = replace(TINY, clip="a folder")  # two looks
    assert said(clip, (0.2, 0.3), (0.9, 0.1)) == (pytest.approx(0.3), False, 2)
    assert said(replace(clip, stop=True), (0.2,), (0.9, 0.1)) == (pytest.approx(0.2), True, 1)
    union = replace(clip, form="union")
    assert said(union, (0.2, 0.3, 0.8, 0.9), (0.9, 0.1, 0.1, 0.1)) == (pytest.approx(0.9), False, 4)
    assert said(union, (0.3, 0.2, 0.8, 0.9), (0.9, 0.1, 0.1, 0.1)) == (pytest.approx(0.3), True, 4)
    assert said(TINY, (), (0.9, 0.1)) == (pytest.approx(0.9), True, 2)
    assert said(replace(TINY, stop=True), (), (0.9, 0.1)) == (pytest.approx(0.9), True, 1)


def test_its_own_filter_stands_inside_the_loss(tiny_sd):
    original = tiny_sd.copy()
    judge = lambda: Scores([0.0, 0.0], [0.2, 0.2], [0.3, 0.3])
    plain = replace(TINY, lr=5.0)
    found = plain.run(tiny_sd, CASES, judge=judge(), original=original, progress=False)
    filtered = replace(plain, negative="star").run(tiny_sd, CASES, judge=judge(), original=original, progress=False)
    assert [r["prompt"] for r in filtered.said] == [r["prompt"] for r in found.said]
    assert filtered.spent["rows"] == found.spent["rows"] + 2 * TINY.updates
    # Planned as counted: updates, checks; the targets and the plain prompts are pictures beside it.
    beside = 2 * 1 + 2 * 1
    assert found.spent["rows"] - beside == plain.updates * 4 * 2 + 2 * 2


def test_what_it_needs(tiny_sd, tiny_sdxl):
    with pytest.raises(BadInput, match="several"):
        TINY.run(tiny_sdxl, CASES, judge=Scores([0, 0]), progress=False)
    with pytest.raises(BadInput, match="original model's predictions"):
        TINY.run(tiny_sd, CASES, judge=Scores([0.0, 0.0]), progress=False)
    with pytest.raises(BadInput, match="do not fit"):
        replace(TINY, tokens=16).run(tiny_sd, CASES, judge=Scores(), progress=False)
    with pytest.raises(BadInput, match="with the free tokens"):
        replace(TINY, form="k", every=1).check(tiny_sd, AttackCases("star", [Case("a photo of a red star", 0, ())]))
