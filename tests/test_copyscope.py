"""CopyScope: identities of the Shapley value, workflows of parts, and attributions that are killed and gone on with."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import cli
from sfumato.attribute import CopyScope
from sfumato.attribute.copyscope import switched_off, without
from sfumato.attribute.parts import game, similarity, study, utility
from sfumato.attribute.parts.workflow import Part, Setup, Workflow, drawn, read_workflow, tidy
from sfumato.errors import BadInput
from sfumato.metrics.extractors import PixelFeatures
from sfumato.pipeline import customization
from sfumato.pipeline.customization import Customization
from sfumato.pipeline.equip import equip
from sfumato.pipeline.lora import Product

RNG = torch.Generator().manual_seed(0)


def worths(n, *rest, seed=0):
    return torch.randn(1 << n, *rest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_players(n):
    return torch.tensor([[a >> i & 1 for i in range(n)] for a in range(1 << n)], dtype=torch.float64)


# The value


@pytest.mark.parametrize("n", [1, 2, 5])
def test_values_sum_to_what_all_are_worth(n):
    worth = worths(n, 3)
    torch.testing.assert_close(game.shapley(worth).sum(0), worth[-1] - worth[0], rtol=0, atol=1e-12)


def test_it_is_the_mean_over_all_orders_and_the_sampler_finds_it():
    worth, n = worths(4), 4
    everyone = list(itertools.permutations(range(n)))
    mean, error = game.sampled_shapley(lambda a: worth[a], everyone, antithetic=False)
    torch.testing.assert_close(mean, game.shapley(worth), rtol=0, atol=1e-12)
    some = game.orders(n, 400, torch.Generator().manual_seed(1))
    assert len(some) == 800 and some[0] == some[1][::-1]
    mean, error = game.sampled_shapley(lambda a: worth[a], some)
    assert ((mean - game.shapley(worth)).abs() < 4 * error).all() and (error < 0.1).all()
    assert game.visited([(0, 1), (1, 0)]) == [0, 1, 2, 3]
    assert float(mean.sum()) == pytest.approx(float(worth[-1] - worth[0]))


def test_equal_players_are_equal_and_idle_ones_get_nothing():
    on = with_players(4)
    either = (on[:, 0] + on[:, 1] > 0).double() + 3 * on[:, 2] * on[:, 0]
    values = game.shapley(either)
    same = game.shapley((on[:, 0] + on[:, 1] > 0).double() + on[:, 2])
    torch.testing.assert_close(same[0], same[1])
    assert values[3] == 0 and game.leave_one_out(either)[3] == 0
    torch.testing.assert_close(game.shapley((on[:, 0] + on[:, 1] > 0).double())[:2], torch.tensor([0.5, 0.5]).double())
    assert game.leave_one_out((on[:, 0] + on[:, 1] > 0).double())[:2].abs().max() == 0


def test_what_adds_up_is_worth_what_it_adds():
    weights = torch.tensor([1.5, -0.3, 0.0, 2.0, 0.7], dtype=torch.float64)
    worth = with_players(5) @ weights
    for value in (game.shapley(worth), game.leave_one_out(worth)):
        torch.testing.assert_close(value, weights)


def test_two_players_in_closed_form():
    u0, u1, u2, u12 = worth = worths(2)
    expected = torch.stack([((u1 - u0) + (u12 - u2)) / 2, ((u2 - u0) + (u12 - u1)) / 2])
    torch.testing.assert_close(game.shapley(worth), expected)


NULL = 310.18
MEASURED = {
    "Depth": 289.24, "Depth+Davinci": 239.17, "Depth+Davinci+MonaLisa": 233.21,
    "Depth+Davinci+MonaLisa+Leonardo": 220.40,
    "Davinci": 265.01, "Davinci+MonaLisa": 241.18, "Davinci+MonaLisa+Leonardo": 275.92, "MonaLisa": 336.24,
    "Leonardo": 307.06, "SDMv10": 320.48, "SDMv10+Depth+Davinci": 209.06, "SDMv10+Depth+Davinci+MonaLisa": 212.13,
    "SDMv10+Depth+Davinci+MonaLisa+Leonardo": 184.69,
}  # fmt: skip
PLAYERS = ["Depth", "Davinci", "MonaLisa", "Leonardo", "SDMv10"]


def test_the_published_table_by_the_published_code():
    measured = {tuple(names.split("+")): fid - NULL for names, fid in MEASURED.items()}
    found = dict(zip(PLAYERS, game.dividends(measured, PLAYERS).tolist(), strict=True))
    told = {"Depth": -187.86, "Davinci": -258.01, "MonaLisa": -117.57, "Leonardo": -62.08, "SDMv10": -73.02}
    assert found == pytest.approx(told, abs=0.011)
    stored = torch.tensor([-23.44, -82.10, -140.85, -34.10, 10.29], dtype=torch.float64)
    shares = [round(-x, 3) for x in game.normalised(stored).tolist()]
    assert shares == pytest.approx([0.081, 0.282, 0.484, 0.117, -0.035], abs=1.1e-3)
    with pytest.raises(BadInput, match="19 of 32 alliances were not measured: none of them"):
        game.table(measured, PLAYERS)
    with pytest.raises(BadInput, match="'Vermeer' is none of the parts"):
        game.table({"Vermeer": 1.0}, PLAYERS)


def test_values_by_dividends_are_those_of_the_published_code(tiny_sd):
    worth = worths(4, 3)
    table = {tuple(game.members(a, PLAYERS)): float(worth[a, 1]) for a in range(16)}
    torch.testing.assert_close(game.as_dividends(worth)[:, 1], game.dividends(table, PLAYERS)[:4])
    flow = painting(tiny_sd, seeds=(0, 1))
    originals = torch.zeros(2, 3, 16, 16)
    found, _ = CopyScope(distance="mse", mode="dividend").attribute(flow, originals)
    paper, _ = CopyScope(distance="mse").attribute(flow, originals)
    worth = torch.tensor([found.worth[a] for a in range(16)], dtype=torch.float64)
    assert [x.value for x in found.shapley] == pytest.approx(game.as_dividends(worth).tolist())
    assert found.about["mode"] == "dividend" and abs(found.gap) > 0.1 > 1e-9 > abs(paper.gap)
    with pytest.raises(BadInput, match="sums over all alliances"):
        CopyScope(mode="dividend", orders=2)


def test_normalised_shares():
    assert game.normalised(torch.tensor([3.0, -1.0])).tolist() == [0.75, -0.25]
    assert game.normalised(torch.zeros(2)).tolist() == [0.0, 0.0]


# What pictures are compared by


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", similarity.SIMILARITIES)
def test_equal_pictures_are_most_alike(name):
    x, y = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    measure = similarity.SIMILARITIES[name]
    best = 0.0 if name == "mse" else 1.0
    torch.testing.assert_close(measure(x, x), torch.full((2,), best, dtype=torch.float64))
    assert (measure(x, y) < best).all() and torch.equal(measure(x, y), measure(y, x))


def test_histograms_overlap_and_hashes_as_written():
    half = torch.zeros(1, 3, 8, 9, dtype=torch.float64)
    half[..., :4] = 1
    assert float(similarity.histogram(half, torch.zeros_like(half))) == pytest.approx(5 / 9)
    falling = torch.linspace(1, 0, 9, dtype=torch.float64).expand(1, 3, 8, 9)
    assert float(similarity.dhash(falling, falling.flip(-1))) == 0


def test_fusion_is_the_first_component():
    shared = rand(8, 1)
    score = similarity.fused(torch.cat([shared, 2 * shared + 1, torch.ones(8, 1).double()], dim=1))
    centred = (shared - shared.mean())[:, 0]
    torch.testing.assert_close(score / score.norm(), centred / centred.norm())


@pytest.mark.parametrize("distance", ["fid", "kid", "mse"])
def test_the_original_itself_is_nearest(distance):
    originals, others = rand(6, 3, 16, 16).float(), (rand(6, 3, 16, 16, seed=1) / 2).float()
    near = utility.Utility(distance, originals, PixelFeatures(4))
    same, other = near(originals), near(others)
    assert same.value > other.value and other.influence.shape == (6,) and abs(float(other.influence.mean())) < 1e-9
    if distance != "kid":
        assert same.value == pytest.approx(0, abs=1e-6)


def test_fid_of_gaussians_is_the_closed_form_and_its_influence_that_of_the_jackknife():
    originals, others = rand(12, 3, 8, 8).float(), rand(12, 3, 8, 8, seed=1).float()
    near = utility.Utility("fid", originals, PixelFeatures(1))
    found, (x, y) = near(others), (near.features(p).values.double() for p in (originals, others))
    a, b = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    closed = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root
    assert -found.value == pytest.approx(float(closed), rel=1e-5)


def test_views_of_one_original():
    made = utility.views(torch.full((1, 3, 16, 16), 0.5), 5)
    assert made.shape == (5, 3, 16, 16)
    torch.testing.assert_close(made, torch.full_like(made, 0.5))
    for height, width in ((8, 96), (96, 8), (40, 80)):
        down = torch.linspace(0, 1, height)[:, None].expand(height, width)
        across = torch.linspace(0, 1, width).expand(height, width)
        made = utility.views(torch.stack([down, across, down])[None], 12)
        assert made.shape == (12, 3, height, width)
        spans = torch.stack([made[:, 0, -1, 0] - made[:, 0, 0, 0], (made[:, 1, 0, -1] - made[:, 1, 0, 0]).abs()])
        assert (spans > 0.6).all() and (spans < 1.01).all() and (spans[0] - spans[1]).abs().max() < 0.15
        assert spans.min(1).values.max() < 0.95


def test_distances_that_cannot_be():
    with pytest.raises(BadInput, match="distance 'is'"):
        CopyScope(distance="is")
    with pytest.raises(BadInput, match="did you mean fid"):
        CopyScope(distance="fidd")
    with pytest.raises(BadInput, match="say with extractor which"):
        utility.Utility("fid", rand(2, 3, 4, 4))


# Shares over seeds


def test_shares_of_measured_alliances_carry_their_seeds():
    noise, on = torch.randn(8, generator=RNG, dtype=torch.float64), with_players(2)
    effect = {a: float(2 * on[a, 0]) for a in range(4)}
    measured = {a: study.Measured(x, (1 + x) * (noise - noise.mean())) for a, x in effect.items()}
    found = study.shares_of(["a", "b"], measured)
    assert [x.value for x in found.shapley] == [2.0, 0.0] and found.gap == 0 and found.seeds == 8
    assert found.shapley[0].low < 2 < found.shapley[0].high
    assert found.shapley[1].low == found.shapley[1].high == 0  # what all alliances share cancels
    assert [x.value for x in found.shares] == [1.0, 0.0] and not found.error
    some = game.orders(2, 3, torch.Generator().manual_seed(0))
    sampled = study.shares_of(["a", "b"], measured, some)
    assert [x.value for x in sampled.shapley] == [2.0, 0.0] and sampled.error == [0.0, 0.0]
    json.dumps(sampled.to_json())


# Workflows


def colour(channel, value):
    def change(x):
        x = x.clone()
        x[:, channel] = value
        return x

    return lambda setup: Setup(setup.pipe, setup.prompt, setup.control, (*setup.after, change))


def painting(tiny_sd, **more):
    """Two parts that paint red, either of which is enough; one that paints blue; one that does nothing."""
    parts = [Part(name=name, kind="python", apply=colour(0, 1.0)) for name in ("red", "rouge")]
    parts += [Part(name="blue", kind="python", apply=colour(2, 0.5))]
    parts += [Part(name="idle", kind="python", apply=lambda setup: setup)]
    settings = {"prompt": "art", "seeds": (0, 1, 2), "sampling_steps": 1, "cfg_scale": 1.0} | more
    return Workflow(model=tiny_sd, parts=tuple(parts), **settings)


@pytest.fixture(scope="module")
def painted(tiny_sd):
    """The pictures of all alliances, and an original that all parts would make."""
    flow = painting(tiny_sd)
    original = drawn(flow, 0b1111, [50, 51, 52, 53])
    return flow, original, study.pictures_of(flow, range(16))


@pytest.mark.parametrize("distance", ["fid", "mse"])
def test_redundant_parts_share_what_leaving_one_out_misses(painted, distance):
    flow, original, pictures = painted
    near = utility.Utility(distance, original, PixelFeatures(4))
    found = study.pictured(flow, pictures, near, [], 0, {})
    red, rouge, blue, idle = (x.value for x in found.shapley)
    assert red == pytest.approx(rouge) and red > 0 and blue > 0 and idle == pytest.approx(0, abs=1e-9)
    assert abs(found.loo[0].value) < 1e-6 * red and found.loo[2].value > 0
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.shares[0].low <= found.shares[0].value <= found.shares[0].high


def test_parts_switch_phrases_loras_and_checkpoints(tiny_sd, tmp_path):
    lora = tmp_path / "lora.safetensors"
    changed = tiny_sd.copy()
    adapter = changed.add_adapter("style", rank=2, generator=torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        up.data.normal_(generator=torch.Generator().manual_seed(1))
    adapter.save_lora(lora)
    other = str(tiny_sd.copy(own="all").save(tmp_path / "other"))
    flow = Workflow(
        model=tiny_sd, prompt="a {what}", sampling_steps=1, seeds=(0,),
        parts=(
            Part(name="what", kind="phrase", source="red star"), Part(name="more", kind="phrase", source="blue"),
            Part(name="style", kind="lora", source=str(lora), weight=0.5),
            Part(name="base", kind="checkpoint", source=other),
        ),
    )  # fmt: skip
    plain = lambda prompt: tiny_sd.draw([prompt], [0], sampling_steps=1)
    torch.testing.assert_close(drawn(flow, 0, [0]), plain("a"))
    torch.testing.assert_close(drawn(flow, 0b0011, [0]), plain("a red star, blue"))
    torch.testing.assert_close(drawn(flow, 0b1001, [0]), plain("a red star"))
    adapter.scale = 0.5
    torch.testing.assert_close(drawn(flow, 0b0100, [0]), changed.draw(["a"], [0], sampling_steps=1))
    assert not tiny_sd.adapters and not torch.allclose(drawn(flow, 0b0100, [0]), plain("a"), atol=1e-3)


def test_a_checkpoint_is_drawn_as_the_base_is(tiny_sd, tmp_path):
    """Its own steps, guidance and size would be taken for what its weights do."""
    other, base = tiny_sd.copy(own="all"), tiny_sd.copy()
    other.defaults = {**other.defaults, "sampling_steps": 3, "cfg_scale": 2.0}
    base.defaults = {**base.defaults, "sampling_steps": 5, "cfg_scale": 6.0}
    part = Part(name="same", kind="checkpoint", source=str(other.save(tmp_path / "other")))
    flow = Workflow(model=base, prompt="a star", parts=(part,), seeds=(0,))
    torch.testing.assert_close(drawn(flow, 1, [0]), drawn(flow, 0, [0]))
    torch.testing.assert_close(drawn(flow, 0, [0]), base.draw(["a star"], [0], sampling_steps=5, cfg_scale=6.0))
    said = replace(flow, sampling_steps=2, cfg_scale=1.0)
    torch.testing.assert_close(drawn(said, 1, [0]), base.draw(["a star"], [0], sampling_steps=2, cfg_scale=1.0))


def test_files_of_customize_bring_their_words_and_act_beside_loras(tiny_sd, tmp_path):
    layer, files = tiny_sd.projections("cross.k")[0], []
    out, into = layer.shape
    down, up = torch.randn(2, into, generator=RNG), torch.randn(out, 2, generator=RNG)
    for word, sign in (("<one>", 1), ("<two>", -2)):
        rows = (torch.randn(1, tiny_sd.pipe.text_encoder.config.hidden_size, generator=RNG),)
        files.append(tmp_path / f"{len(files)}.safetensors")
        learned = Customization({word: rows}, {layer.name: Product(down, sign * up, 1.0)})
        customization.save(files[-1], learned, tiny_sd)
    parts = tuple(Part(name=f"p{i}", kind="lora", source=str(f), weight=0.5) for i, f in enumerate(files))
    flow = Workflow(model=tiny_sd, prompt="a <one> star", sampling_steps=1, seeds=(0,), parts=parts)
    whole = equip(tiny_sd, tiny_sd, files)
    for adapter in whole.adapters.values():
        adapter.scale = 0.5
    torch.testing.assert_close(drawn(flow, 0b11, [0]), whole.draw(["a <one> star"], [0], sampling_steps=1))
    assert not torch.allclose(drawn(flow, 0b01, [0]), drawn(flow, 0b11, [0]), atol=1e-4)
    customization.save(tmp_path / "words.safetensors", Customization({"<three>": rows}), tiny_sd)
    words = Part(name="w", kind="lora", source=str(tmp_path / "words.safetensors"), weight=0.5)
    with pytest.raises(BadInput, match="words alone"):
        drawn(Workflow(model=tiny_sd, prompt="a <three>", parts=(words,)), 1, [0])


def test_a_control_that_does_nothing_draws_the_same_pictures(tiny_sd, tmp_path):
    from diffusers import ControlNetModel

    network = ControlNetModel.from_unet(tiny_sd.network, conditioning_embedding_out_channels=(8, 8))
    network.save_pretrained(tmp_path / "control")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "map.png")
    part = Part(name="depth", kind="control", source=str(tmp_path / "control"), image=str(tmp_path / "map.png"))
    flow = Workflow(model=tiny_sd, prompt="art", parts=(part,), seeds=(0, 1), sampling_steps=2, size=16)
    with torch.no_grad():
        torch.testing.assert_close(drawn(flow, 1, [0, 1]), drawn(flow, 0, [0, 1]), rtol=0, atol=5e-3)


def test_prompts_without_their_phrases():
    assert without("a red star, red on art", ["red"]) == "a star, on art"
    assert without("a reddish star", ["red"]) == "a reddish star" and tidy("a ,, b , ") == "a, b"
    assert without("a red, blue star", ["a red, blue"]) == "star" and without("a red star.", ["star"]) == "a red."
    assert without("Red star! red; a star", ["red"]) == "star!; a star" and without("a red", ["A Red"]) == ""
    assert without("a red-hot star", ["red-hot"]) == "a star" and without("a <red> star", ["<red>"]) == "a star"
    for other in ("a red-hot star", "a <red> star", "infra-red art"):
        assert without(other, ["red"]) == other


def test_a_phrase_that_no_prompt_says_is_refused(tiny_sd):
    method = CopyScope(phrases=("red", "on art"), sampling_steps=1)
    assert set(method.run(tiny_sd, ["a Red star", "a star on art."], [0, 1])) == {"red", "on art"}
    for phrase in ("blue", "sta", "", "art on"):
        with pytest.raises(BadInput, match="no prompt says"):
            CopyScope(phrases=("red", phrase), sampling_steps=1).run(tiny_sd, ["a red star on art"], [0])
    with pytest.raises(BadInput, match="one name"):
        CopyScope(phrases=("red", "Red"), sampling_steps=1).run(tiny_sd, ["a red star"], [0])


@pytest.mark.parametrize(
    ("originals", "told"),
    [
        (torch.zeros(0, 3, 16, 16), "not \\(0, 3"), (torch.full((2, 3, 16, 16), 200.0), "by 255"),
        (torch.zeros(3, 16, 16), "not \\(3, 16"), (torch.full((2, 3, 16, 16), float("nan")), "not finite"),
    ],
)  # fmt: skip
def test_originals_that_are_none(tiny_sd, originals, told):
    with pytest.raises(BadInput, match=told):
        CopyScope(distance="mse").attribute(painting(tiny_sd), originals)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"name": "a b", "kind": "phrase", "source": "x"}, "cannot name a part"),
        ({"name": "a", "kind": "words", "source": "x"}, "kind of part"),
        ({"name": "a", "kind": "lora"}, "needs source"),
        ({"name": "a", "kind": "control", "source": "x"}, "needs image"),
        ({"name": "a", "kind": "python"}, "needs apply"),
    ],
)
def test_parts_that_cannot_be(wrong, why):
    with pytest.raises(BadInput, match=why):
        Part(**wrong)


def test_workflows_that_cannot_be(tiny_sd, tmp_path):
    phrase = Part(name="a", kind="phrase", source="x")
    base = [Part(name=f"base{i}", kind="checkpoint", source="x") for i in range(2)]
    for parts, why in [((), "nobody"), ((phrase, phrase), "two parts are called a"), (base, "base model's place")]:
        with pytest.raises(BadInput, match=why):
            Workflow(model=tiny_sd, prompt="art", parts=tuple(parts))
    file = tmp_path / "flow.toml"
    for text, why in [('prompt = "a"', "lists no parts"), ('model = "x"\nparts = []', "lacks prompt"),
                      ('model="x"\nprompt="a"\nsteps=3\nparts=[]', "steps"), ("model =", "flow.toml")]:  # fmt: skip
        file.write_text(text)
        with pytest.raises(BadInput, match=why):
            read_workflow(file)
    with pytest.raises(BadInput, match="leave jobs at 1"):
        study.pictures_of(painting(tiny_sd), [0], jobs=2)


def test_too_many_parts_say_what_sampling_costs():
    with pytest.raises(BadInput, match=r"12 parts make 4,096 alliances, 262,144 pictures.* at most 454 alliances"):
        CopyScope().chosen(12, 64)
    some, alliances = CopyScope(orders=3).chosen(12)
    assert len(some) == 6 and len(alliances) <= 3 * 22 + 14 and {0, 4095, 4094, 2047} <= set(alliances)
    with pytest.raises(BadInput, match="at least 2"):
        CopyScope(orders=1)


# Runs


def test_a_killed_attribution_draws_only_what_is_left(tiny_sd, tmp_path, monkeypatch):
    flow, calls, real = painting(tiny_sd), [], study.measure

    def dies(cell):
        calls.append(cell.alliance)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(cell)

    monkeypatch.setattr(study, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        study.pictures_of(flow, range(4), tmp_path / "out")
    found = study.pictures_of(flow, range(4), tmp_path / "out")
    assert calls == [0, 1, 2, 2, 3]
    monkeypatch.setattr(study, "measure", real)
    for a, x in study.pictures_of(flow, range(4)).items():
        assert torch.equal(x, found[a])
    with pytest.raises(BadInput, match="another workflow \\(seeds differ\\)"):
        study.pictures_of(painting(tiny_sd, seeds=(0, 1)), range(4), tmp_path / "out")


def test_adapters_and_phrases_of_a_pipeline_are_parts(tiny_sd):
    p = tiny_sd.copy()
    for name, size in (("strong", 20.0), ("idle", 0.0)):
        adapter = p.add_adapter(name, rank=2, generator=torch.Generator().manual_seed(0))
        for up in adapter.up.values():
            up.data.normal_(0, 1, generator=torch.Generator().manual_seed(1)).mul_(size)
    method = CopyScope(phrases=("red", "blue"), sampling_steps=1, distance="mse")
    found = method.run(p, ["a red star", "blue art"], [0, 1])
    assert set(found) == {"strong", "idle", "red", "blue"} and found["idle"].abs().max() < 1e-9
    assert found["blue"][0] == 0 == found["red"][1] and found["red"][0] != 0 != found["blue"][1]
    assert (found["strong"] > 0).all()
    bare = p.copy().draw(["a star"], [0], sampling_steps=1).double()
    whole = p.draw(["a red star"], [0], sampling_steps=1).double()
    assert float(sum(x[0] for x in found.values())) == pytest.approx(float((bare - whole).square().mean()), rel=1e-3)
    with switched_off(p, ["strong"]):
        assert p.adapters["strong"].scale == 0
    assert p.adapters["strong"].scale == 1
    with pytest.raises(BadInput, match="no parts to judge"):
        CopyScope().run(tiny_sd, ["art"], [0])


def test_the_command_shares_out_and_writes_a_page(tiny_sd, tmp_path, capsys):
    model = tiny_sd.save(tmp_path / "tiny")
    (tmp_path / "flow.toml").write_text(
        f'model = "{model.name}"\nprompt = "a {{shape}}"\nseeds = 3\nsampling_steps = 1\n'
        '[[parts]]\nname = "shape"\nkind = "phrase"\nsource = "star"\n'
        '[[parts]]\nname = "red"\nkind = "phrase"\nsource = "red"\n'
    )
    (tmp_path / "theirs").mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / "theirs" / "one.png")
    out = tmp_path / "shares"
    args = ["attribute", "copyscope", "--workflow", str(tmp_path / "flow.toml"), "--originals",
            str(tmp_path / "theirs"), "--out", str(out), "--device", "cpu"]  # fmt: skip
    assert cli.main(args) == 2 and "--extractor which" in capsys.readouterr().err
    assert cli.main([*args, "--extractor", "pixels"]) == 0
    told = json.loads((out / "shares.json").read_text())
    assert set(told["shares"]["parts"]) == {"shape", "red"} and len(told["shares"]["alliances"]) == 4
    assert abs(told["shares"]["efficiency_gap"]) < 1e-9 and told["shares"]["views"] == 16
    page = (out / "index.html").read_text()
    assert all(line.split(":")[0] in page for line in told["findings"]) and page.count("<img") == 1 + 4 * 3
    assert "page:" in capsys.readouterr().out
