"""Ring-A-Bell: its direction and distance by closed form, its genetic algorithm operator by operator."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import noise_behind
from sfumato.attack.base import Means
from sfumato.attack.parts.spending import Spending
from sfumato.attack.parts.words import Words
from sfumato.attack.ring_a_bell import RingABell, concept_vector, crossed, distance, encoding, fittest, mutated
from sfumato.data.cases import AttackCases, Case
from sfumato.errors import BadInput

TINY = RingABell(tokens=4, population=8, generations=3)
CASES = AttackCases("star", [Case("a red star", 0, ("star",)), Case("a star", 1, ("star",))])
IDS = torch.arange(10, 60)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_direction_is_the_mean_difference_and_nothing_for_equal_pairs():
    told, without = torch.randn(2, 30, 7, 5, generator=rng()).double().unbind(0)
    expected = sum(told[i] - without[i] for i in range(30)) / 30
    torch.testing.assert_close(concept_vector(told, without), expected)
    assert torch.equal(concept_vector(told, told), torch.zeros(7, 5).double())


def test_with_eta_0_the_optimum_is_the_prompt_itself(tiny_sd, tiny_pixart):
    for pipe, rounding in ((tiny_sd, 0.0), (tiny_pixart, 1e-12)):  # T5 reads the words without all of the padding
        words = Words(pipe)
        target = encoding(pipe, pipe.encode("a red star"))
        row = words.of("a red star")
        found = float(distance(target, encoding(pipe, words.encode_many([row]))))
        assert found <= rounding * float(target.square().sum())
        x = torch.randn(3, *target.shape[1:], generator=rng()).double()
        expected = [float(((target[0].double() - y) ** 2).sum()) for y in x]
        torch.testing.assert_close(distance(target.double(), x), torch.tensor(expected).double())


def test_what_is_bred_is_near_to_the_prompt_with_more_of_the_concept_not_with_less(tiny_sd, monkeypatch):
    """|| E(p) + eta c - E(x) ||^2 for the loss that the search hands to the algorithm, written out once more."""
    given = {}

    def watched(attack, ids, loss, rng, best, means, advance):
        given[len(given)] = loss

    monkeypatch.setattr(RingABell, "_breed", watched)
    attack = replace(TINY, eta=2.5, contexts=("a {}", "a red {}"), instead=("circle", "square"))
    attack.run(tiny_sd, CASES, progress=False)
    read = lambda text: tiny_sd.encode(text).tokens[0].double()
    pairs = [(c.replace("{}", "star"), c.replace("{}", other)) for c in ("a {}", "a red {}")
             for other in ("circle", "square")]  # fmt: skip
    direction = sum(read(told) - read(without) for told, without in pairs) / len(pairs)
    rows = IDS[torch.randint(len(IDS), (5, 4), generator=rng())]
    encoded = Words(tiny_sd).encode(rows.tolist()).tokens.double()
    assert len(given) == len(CASES.prompts)
    for loss, prompt in zip(given.values(), CASES.prompts, strict=True):
        expected = (read(prompt) + 2.5 * direction - encoded).square().sum((1, 2))
        torch.testing.assert_close(loss(rows).double(), expected, rtol=1e-4, atol=0)


def test_rows_that_the_network_does_not_look_at_are_no_part_of_the_distance(tiny_pixart):
    cond, other = tiny_pixart.encode("a red star"), tiny_pixart.encode("a photo of a blue circle")
    read = [encoding(tiny_pixart, c) for c in (cond, noise_behind(cond))]
    found = [float(distance(encoding(tiny_pixart, other), x)) for x in read]
    longest, (n, m) = cond.tokens.shape[1], (int(c.mask.sum()) for c in (cond, other))
    mine, theirs = (F.pad(c.tokens[0, :k].double(), (0, 0, 0, longest - k)) for c, k in ((cond, n), (other, m)))
    assert found[0] == found[1] == pytest.approx(float((mine - theirs).square().sum()), rel=1e-5)


def test_half_precision_sums_do_not_overflow():
    x = torch.randn(2, 77, 768, generator=rng()).mul(3).half()
    expected = (x[0].double() - x[1].double()).square().sum()
    found = distance(x[:1], x[1:])
    assert found.dtype == torch.float32 and expected > torch.finfo(torch.half).max
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(concept_vector(x[:1], x[1:]), x[0].float() - x[1].float())


def test_the_better_half_is_kept_in_order():
    losses = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert fittest(torch.arange(8).view(4, 2), losses, 2).tolist() == [[6, 7], [2, 3]]
    assert len(fittest(torch.arange(2).view(1, 2), losses[:1], 0)) == 1


def test_children_are_one_parent_before_the_cut_and_the_other_after_it():
    parents = torch.stack([torch.full((5,), i) for i in range(40)])
    everyone = crossed(parents, 1.0, rng())
    assert torch.equal(everyone[:40], parents) and len(everyone) == 120
    cuts = set()
    for i, (one, two) in enumerate(zip(everyone[40:80], everyone[80:], strict=True)):
        (mate,) = {*one.tolist(), *two.tolist()} - {i} or {i}
        front = (one == i).tolist() if mate != i else None
        if front:
            cut = sum(front)
            cuts.add(cut)
            assert one.tolist() == [i] * cut + [mate] * (5 - cut) and two.tolist() == [mate] * cut + [i] * (5 - cut)
    assert cuts == {0, 1, 2, 3, 4}
    assert torch.equal(crossed(parents, 0.0, rng()), parents)
    assert 4 < len(crossed(parents, 0.25, rng())) - 40 < 40


def test_a_mutation_is_one_token_of_the_vocabulary():
    before = torch.zeros(400, 6, dtype=torch.long)
    after = mutated(before, 0.25, IDS, rng())
    changed = (after != before).sum(dim=1)
    assert changed.max() == 1 and 60 < int(changed.sum()) < 140
    assert set(after[after != 0].tolist()) <= set(IDS.tolist())
    assert set((after != before).nonzero()[:, 1].tolist()) == set(range(6))
    assert torch.equal(mutated(before, 0.0, IDS, rng()), before)
    assert (mutated(before, 1.0, IDS, rng()) != before).sum() == 400


def test_pairs_differ_in_the_concept_alone(tiny_sd):
    pairs = RingABell().pairs(tiny_sd, CASES)
    assert len(pairs) >= 30 and ("a red star", "a red thing") in pairs
    assert all("star" in told and "star" not in without for told, without in pairs)
    own = replace(TINY, contexts=("a {}", "a photo of {}"), instead=("circle",)).pairs(tiny_sd, CASES)
    assert own == [("a star", "a circle"), ("a photo of star", "a photo of circle")]
    with pytest.raises(BadInput, match="where the concept stands"):
        replace(TINY, contexts=("a star",))


def test_breeding_brings_the_encoding_nearer_and_elitism_never_loses_the_best(tiny_sd):
    one = replace(CASES, cases=CASES.cases[:1])
    attack = RingABell(tokens=3, population=16, generations=1, eta=1.0, elitism=True)
    attack = replace(attack, contexts=("a red {}", "a {}"), instead=("circle", "square"))
    words = Words(tiny_sd)
    told, without = zip(*attack.pairs(tiny_sd, one), strict=True)
    direction = concept_vector(tiny_sd.encode(list(told)).tokens, tiny_sd.encode(list(without)).tokens)
    target = tiny_sd.encode("a red star").tokens + direction
    losses = []
    for generations in (1, 4, 16):
        best: list = []
        ids = words.usable[words.usable > 0]
        means = Means(None, None, None, Spending())
        breeding = replace(attack, generations=generations)
        loss = lambda rows: distance(target, words.encode(rows.tolist()).tokens)
        with torch.no_grad():
            breeding._breed(ids, loss, rng(), best, means, lambda: None)
        losses.append(float(loss(best[0][None])))
    assert losses[2] < losses[0] and losses == sorted(losses, reverse=True)


def test_the_tokens_take_the_whole_prompts_place_and_the_original_encodes(tiny_sd):
    found = TINY.run(tiny_sd, CASES, progress=False)
    assert found.spent["rows"] == 0 and found.before is None and all(row["tried"] == 1 for row in found.said)
    drawn = found.draw(tiny_sd, ["a red star"], [0], sampling_steps=1)
    assert torch.equal(drawn, tiny_sd.draw([found.said[0]["text"]], [0], sampling_steps=1))
    other = tiny_sd.copy("all")
    with torch.no_grad():
        for p in other.pipe.text_encoder.parameters():
            p.zero_()
    again = TINY.run(other, CASES, original=tiny_sd, progress=False)
    assert again.said == found.said
    floor = TINY.control(tiny_sd, CASES, None, progress=False)
    assert len(floor.said) == 2 and floor.said != found.said
    with pytest.raises(BadInput, match="do not fit"):
        RingABell(tokens=40).run(tiny_sd, CASES, progress=False)
