"""EAGAN: genotypes, supernets and what is cut out of them, selection, evolution, and a search that is killed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from sfumato.cells import finished
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.metrics.frechet import frechet_distance
from sfumato.nets.gan import (
    GenotypeDiscriminator,
    GenotypeGenerator,
    SimpleDiscriminator,
    count_discriminator,
    count_generator,
    looked_at,
    part_of,
)
from sfumato.nets.genotypes import DISCRIMINATOR, GENERATOR, PUBLISHED
from sfumato.train.eagan import EAGAN
from sfumato.train.loop import Run
from sfumato.train.parts.adversarial import begun, discriminator_loss, generator_loss
from sfumato.train.parts.candidates import _numbered, measure
from sfumato.train.parts.evolution import children, select, table, winner
from sfumato.train.parts.front import write_page
from sfumato.train.parts.pareto import cars, crowding, fronts, nsga2

SPACES = pytest.mark.parametrize("space", [GENERATOR, DISCRIMINATOR], ids=lambda s: s.kind)
SMALL = {"size": 16, "channels": 3, "latent": 6}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# Genotypes


def test_there_are_as_many_genotypes_as_the_paper_has():
    assert GENERATOR.size == (9 * 48 * 342) ** 3 and DISCRIMINATOR.size == (6 * 48 * 48 * 37) ** 3


@SPACES
def test_genotypes_drawn_changed_and_crossed_are_ones_and_every_value_comes(space):
    r, drawn = rng(), []
    for _ in range(200):
        a, b = space.random(r), space.random(r)
        child, crossed = space.mutated(a, r), space.crossed(a, b, r)
        assert all(map(space.valid, (a, b, child, crossed)))
        changed = [(i, g) for i, g in product(range(3), range(7)) if a[i][g] != child[i][g]]
        tied = {g for _, g in changed} == set(space.tied or ()) and len({i for i, _ in changed}) == 1
        assert len(changed) == 1 or tied
        taken = [(i, g) for i, g in product(range(3), range(7)) if a[i][g] != crossed[i][g]]
        assert 1 <= len(taken) <= (2 if space.tied else 1) and all(crossed[i][g] == b[i][g] for i, g in taken)
        drawn += [*a, *b]
    for gene in range(7):
        counts = Counter(cell[gene] for cell in drawn)
        assert set(counts) == set(space.values(gene)) and min(counts.values()) > 50
    # without a constraint each value is as likely as the others: chi-square with 2 or 5 degrees, 99.9 %
    counts = Counter(cell[0] for cell in drawn)
    expected = len(drawn) / len(counts)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20.5


@pytest.mark.parametrize(
    ("space", "change", "wrong"),
    [
        (GENERATOR, {2: 0, 3: 0}, "cell 2 of the generator's genotype disconnects the net: one of its genes 2, 3"),
        (GENERATOR, {4: 0, 5: 0, 6: 0}, "disconnects the net"),
        (GENERATOR, {0: 3}, "gene 0 of cell 2 .* between 0 and 2, got 3"),
        (DISCRIMINATOR, {0: 0}, "between 1 and 6"),
        (DISCRIMINATOR, {1: 0, 2: 0}, "disconnects the net"),
        (DISCRIMINATOR, {5: 2, 6: -1}, "-1 together"),
    ],
)
def test_a_genotype_that_disconnects_the_net_is_refused(space, change, wrong):
    cells = [list(cell) for cell in space.random(rng())]
    for gene, value in change.items():
        cells[1][gene] = value
    kind = GenotypeGenerator if space is GENERATOR else GenotypeDiscriminator
    with pytest.raises(BadInput, match=wrong):
        kind(genotype=cells, channels=3)
    with pytest.raises(BadInput, match="3 cells of 7"):
        kind(genotype=cells[:2], channels=3)


def test_parents_that_are_alike_do_not_keep_children_from_coming():
    a = GENERATOR.random(rng())
    assert GENERATOR.crossed(a, a, rng()) is None
    made = children(GENERATOR, [a, a], 3, 1.0, 0.0, rng())
    assert len({a, *made}) == 4
    assert GENERATOR.described(PUBLISHED["generator"])[0] == (
        "cell 1: up0 bilinear, up1 bilinear, 0>2 identity, 0>3 conv1x1, 1>3 conv3x3, 2>3 identity"
    )


# Nets


def test_published_counts():
    """Measured on the published modules; their generators have a 1x1 in cell 3 that nothing reads."""
    unread = 256**2 + 256
    g, size = PUBLISHED["generator"], {"channels": 256, "latent": 120}
    assert count_generator(32, genotype=g, **size) + unread == 7_142_403
    assert count_generator(48, genotype=g, **size) + unread == 11_550_723
    assert [count_discriminator(128, PUBLISHED[d]) for d in ("cifar10", "stl10", "autogan")] == [
        906_240, 1_578_112, 1_053_824,
    ]  # fmt: skip
    assert round(count_generator(32, **size), -5) == 72_800_000 and round(count_discriminator(128), -5) == 23_800_000
    assert sum(p.numel() for p in SimpleDiscriminator().parameters()) == 921_920


def test_a_net_cut_out_of_the_supernet_is_the_same_net_without_unused_weights():
    torch.manual_seed(0)
    generators, discriminators = GenotypeGenerator(**SMALL), begun(GenotypeDiscriminator(3))
    z, x, r = torch.randn(2, 6), torch.rand(2, 3, 16, 16) * 2 - 1, rng(1)
    for i in range(5):
        g, d = GENERATOR.random(r), DISCRIMINATOR.random(r)
        if i == 0:  # n2 of the last cell is looked at by nobody, and so is n1 of a discriminator's first
            g = (*g[:2], (0, 1, 2, 0, 3, 0, 0))
            d = ((3, 4, 0, 0, 2, 0, 3), *d[1:])
        own, judge = GenotypeGenerator(**SMALL, genotype=g), GenotypeDiscriminator(3, d)
        for net, whole, count in ((own, generators, count_generator(16, 3, 6, g)), (judge, discriminators, 0)):
            part_of(net, whole)
            assert count in (0, sum(p.numel() for p in net.parameters()))
        assert count_discriminator(3, d) == sum(p.numel() for p in judge.parameters())
        pairs = ((own.eval()(z), generators.eval()(z, genotype=g)), (judge.eval()(x), discriminators.eval()(x, d)))
        for alone, within in pairs:
            torch.testing.assert_close(alone, within, rtol=0, atol=1e-6)
        assert own(z).shape == (2, 3, 16, 16) and own(z).abs().max() <= 1 and judge(x).shape == (2, 1)
        judge.train()(own.train()(z)).sum().backward()
        # of a ReLU that is nowhere above 0 the gradient is 0, but there is one
        assert all(p.grad is not None for net in (own, judge) for p in net.parameters())
    generators.zero_grad(set_to_none=True)
    generators(z, genotype=g).sum().backward()
    assert {n for n, p in generators.named_parameters() if p.grad is not None} == {n for n, _ in own.named_parameters()}


def test_nets_begin_as_the_published_ones():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({
        "conv": torch.nn.Conv2d(40, 60, 3), "norm": torch.nn.BatchNorm2d(4000), "linear": torch.nn.Linear(9, 8),
        "up": torch.nn.ConvTranspose2d(5, 5, 3), "normed": torch.nn.utils.parametrizations.spectral_norm(
            torch.nn.Conv2d(40, 60, 3)), "head": torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(9, 1)),
    })  # fmt: skip
    before = {name: x.clone() for name, x in net.state_dict().items()}
    state = begun(net).state_dict()
    changed = {name for name, x in state.items() if not torch.equal(x, before[name])}
    xavier = {"conv.weight", "normed.parametrizations.weight.original"}
    assert changed == {*xavier, "norm.weight"} and state["norm.bias"].abs().max() == 0
    for name in xavier:
        bound = (6 / (9 * (40 + 60))) ** 0.5
        assert 0.99 * bound < state[name].abs().max() <= bound
    weight = state["norm.weight"]
    assert float(weight.mean()) == pytest.approx(1, abs=2e-3) and float(weight.std()) == pytest.approx(0.02, rel=0.05)


def test_who_is_looked_at():
    cell = lambda last: (0, 0, 1, 1, 1, 1, last)
    assert looked_at((cell(0), cell(0), cell(0))) == (False, False, False)
    assert looked_at((cell(0), cell(1), cell(0))) == (True, True, False)
    assert looked_at((cell(1), cell(0), cell(0))) == (True, False, False)


def test_the_hinge_at_its_corners():
    real, fake = torch.tensor([[1.0], [2.0]]).requires_grad_(), torch.tensor([[-1.0], [-3.0]]).requires_grad_()
    discriminator_loss(real, fake).backward()
    assert real.grad.abs().max() == 0 and fake.grad.abs().max() == 0
    assert discriminator_loss(torch.zeros(2, 1), torch.zeros(2, 1)) == 2
    assert generator_loss(torch.full((2, 1), 3.0)) == -3


# Selection


def test_fronts_are_those_of_brute_force_also_with_ties_and_duplicates():
    scores = torch.randint(4, (40, 3), generator=rng()).double()
    left, expected = set(range(40)), []
    while left:
        expected.append([
            i for i in sorted(left)
            if not any(all(scores[j] <= scores[i]) and any(scores[j] < scores[i]) for j in left)
        ])  # fmt: skip
        left -= set(expected[-1])
    assert fronts(scores) == expected
    first = expected[0]
    assert sorted(nsga2(scores, len(first))) == first and len(set(nsga2(scores, 17))) == 17
    by_hand = torch.tensor([[0.0, 4], [1, 2], [2, 1], [4, 0]])
    assert crowding(by_hand).tolist() == [torch.inf, 2 / 4 + 3 / 4, 3 / 4 + 2 / 4, torch.inf]
    assert nsga2(by_hand, 2) == [0, 3]


def test_cars_joins_the_fronts_of_an_objective_and_of_its_inverse():
    # (1/IS, FID): 0 is best in both, 3 worst in both; the inverse front protects the large
    scores = torch.tensor([[1.0, 1], [2, 5], [3, 2], [4, 9]])
    assert cars(scores, 3, rng()) == [0, 1, 3]
    assert sorted(cars(scores, 4, rng())) == [0, 1, 2, 3]
    two = [{"frechet": 2.0, "parameters": 1.0}, {"frechet": 1.0, "parameters": 5.0}]
    assert winner(two, ["frechet", "parameters"]) == 1 and winner(two, ["parameters"]) == 0


@pytest.mark.parametrize("broken", [{"frechet": float("nan")}, {"inception": float("inf")}])
def test_whoever_could_not_be_scored_is_neither_kept_nor_crowned(broken):
    objectives = ("inception", "frechet", "parameters")
    sound = [{"inception": 0.5 + 0.1 * i, "frechet": 9.0 - i, "parameters": 10.0 + i} for i in range(4)]
    scores = [{"inception": 0.1, "frechet": 1.0, "parameters": 1.0, **broken}, *sound]
    for how in ("nsga2", "cars"):
        for seed in range(5):
            assert 0 not in select(table(scores, objectives), 4, how, rng(seed))
    assert winner(scores, objectives) == 4 and winner(scores, ("parameters", "inception", "frechet")) == 4


# The search


@pytest.fixture(scope="module")
def pictures():
    return open_pictures("sketch", 16, seed=0, count=6)


def searching(**changes):
    how = {"population": 4, "rounds": 2, "objectives": ("frechet", "parameters")}
    return EAGAN(**{**EAGAN.EXAMPLE, **how, **changes})


def test_stage_two_trains_copies_of_their_own_and_resets_them_to_the_best(pictures):
    method = searching(search_warmup=2, rounds=1, round_updates=4)
    judge = method._judge(pictures)
    config = method.generator_config(PUBLISHED["generator"])
    start = GenotypeGenerator(**config).state_dict()
    seen = []

    def watch(stage):
        original, before = stage.after_update, [None]

        def after_update(turn, step):
            states = [{k: x.clone() for k, x in net.state_dict().items()} for net in stage.generators]
            if turn.name == "generator" and before[0] is not None:
                mine = 0 if step <= 2 else stage.member(step - 1)
                moved = [any(not torch.equal(s[k], b[k]) for k in s) for s, b in zip(states, before[0], strict=True)]
                seen.append((mine, moved))
            original(turn, step)
            before[0] = [{k: x.clone() for k, x in net.state_dict().items()} for net in stage.generators]

        stage.after_update = after_update

    original = EAGAN._fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EAGAN, "_fit", lambda self, stage, *rest: (watch(stage), original(self, stage, *rest))[1])
        stage = method.stage_two(pictures, judge, config, start)
    for mine, moved in seen:
        assert [i for i, changed in enumerate(moved) if changed] == [mine]
    first, *others = stage.generators
    state = first.state_dict()
    assert all(torch.equal(x, state[name]) for net in others for name, x in net.state_dict().items())
    assert len({p.data_ptr() for p in stage.generators.parameters()}) == 4 * len(list(first.parameters()))


def test_a_killed_search_goes_on_to_the_same_population(pictures, tmp_path, monkeypatch):
    method = searching()
    judge = method._judge(pictures)
    whole = method.stage_one(pictures, judge, tmp_path / "whole")
    original, steps = Run.one_step, []

    def one_step(run):
        if len(steps) == 1:
            raise KeyboardInterrupt
        steps.append(run.step)
        return original(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "one_step", one_step)
        method.stage_one(pictures, judge, tmp_path / "killed")
    again = method.stage_one(pictures, judge, tmp_path / "killed")
    assert again.population.members == whole.population.members and again.population.winner == whole.population.winner
    records = [sorted((tmp_path / name / "search").glob("*.json")) for name in ("whole", "killed")]
    assert len(records[0]) == 2 and [a.read_text() for a in records[0]] == [b.read_text() for b in records[1]]
    first, second = (json.loads(file.read_text())["members"] for file in records[0])
    write_page(tmp_path / "whole" / "search")
    page = (tmp_path / "whole" / "search" / "index.html").read_text()
    assert page.count("<polyline") == 2 and page.count("<circle") == 2 * 4
    kept = [m["genotype"] for m in first if m["kept"]]
    assert len(kept) == 2 and [m["genotype"] for m in second if m["genotype"] in kept] == kept
    assert len({str(m["genotype"]) for m in (*first, *second)}) == 6


@pytest.mark.slow
def test_scores_are_the_same_in_other_processes_and_are_what_they_are_called(pictures):
    method = searching()
    judge = method._judge(pictures)
    stage = method.stage_one(pictures, judge)
    found, sizes = stage.candidates(stage.population.members[:2])
    here = [measure(c) for c in found]
    there = {i: s for (i, _), s in finished(list(enumerate(found)), _numbered, jobs=2)}
    assert [there[0], there[1]] == here and sizes[0] == count_generator(**found[0].config)
    assert 0.1 <= here[0]["inception"] <= 1 and frechet_distance(judge.real, judge.real) < here[0]["frechet"]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"rounds": 0}, "a search budget of zero"),
        ({"population": 1}, "population"),
        ({"size": 24}, "multiple of 16"),
        ({"latent": 7}, "multiple of 3"),
        ({"objectives": ()}, "each objective once"),
        ({"selection": "cars", "objectives": ("frechet",)}, "pairs of objectives"),
        ({"opponent": "simple"}, "size 16 is below 32"),
        ({"opponent": "simple", "size": 32, "batch": 1}, "micro-batches"),
        ({"crossover": 1.5}, "crossover"),
    ],
)
def test_settings_that_cannot_be(changes, wrong):
    with pytest.raises(BadInput, match=wrong):
        searching(**changes)


def test_published_nets_need_no_search():
    method = EAGAN(**{**EAGAN.EXAMPLE, "genotypes": "stl10", "rounds": 0})
    assert method.search_updates(0) == method.search_updates(1) == 0
    assert method.searched(None) == (PUBLISHED["generator"], PUBLISHED["stl10"])
    assert "no search" in method.plan().title and replace(method, rounds=3).search_updates(1) == 0


def test_both_stages_show_their_discriminators_as_many_pictures_as_the_paper():
    method = EAGAN()
    for stage in (0, 1):
        warmup, updates = method.search_lengths(stage)
        seen = [n * method.critic_updates[stage] * method.batch for n in (warmup, updates)]
        assert seen == [50 * 50_000, 10 * 50_000]
        assert method._stage(stage, None, None).updates == updates
        assert method.search_updates(stage) == warmup + 18 * updates == method._lengths()[stage]
    assert searching(critic_updates=(1, 5, 5), round_updates=3).search_lengths(1) == (0, 1)
    # what was found: 600 epochs of 50,000 and of 105,000 pictures
    for name, pictures in (("cifar10", 50_000), ("stl10", 105_000)):
        made = EAGAN(**EAGAN.presets[name])
        epochs = made.updates * made.critic_updates[2] * made.batch / pictures
        assert epochs == pytest.approx(600, rel=1e-2)
