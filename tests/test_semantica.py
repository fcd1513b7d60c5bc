"""Semantica: pairs that belong together, what the network is told of a picture, variations on the command line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as sf
from sfumato import cli
from sfumato.data.base import Pictures
from sfumato.errors import BadInput
from sfumato.ledger import core
from sfumato.metrics.one_shot import copies, diversity, one_shot
from sfumato.nets import VariationUViT
from sfumato.pipeline import Labels, Seen, VariationModel
from sfumato.train.episodes import Pairs, episodes_of
from sfumato.train.semantica import Semantica, SemanticaTraining


class Album(Pictures):
    """Noise, named and captioned by album."""

    def __init__(self, *albums: str, size: int = 8):
        self.albums, self.size = albums, size

    def __len__(self):
        return len(self.albums)

    def name(self, index):
        return f"{self.albums[index]}/{index}"

    def caption(self, index):
        return self.albums[index]

    def picture(self, index):
        return np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes) -> Semantica:
    return Semantica(**{**Semantica.EXAMPLE, **changes})


def stirred(recipe: Semantica) -> VariationModel:
    """A model that no longer returns zeros."""
    torch.manual_seed(0)
    model = recipe.model(())
    with torch.no_grad():
        for p in model.network.parameters():
            p += 0.1 * torch.randn(p.shape)
    model.network.eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def model() -> VariationModel:
    return stirred(small())


# Episodes and pairs


@pytest.mark.parametrize("by", ["folders", "{album}"])
def test_episodes_are_folders_or_texts_and_a_picture_alone_is_left_out(by):
    with pytest.warns(UserWarning, match="1 episodes of one picture"):
        found = episodes_of(Album("a", "b", "a", "b", "a", "c"), by)
    assert [rows.tolist() for rows in found] == [[0, 2, 4], [1, 3]]


def test_episodes_that_cannot_be():
    with pytest.raises(BadInput, match="no episode has two pictures"):
        episodes_of(Album("a", "b"), "folders")
    with pytest.raises(BadInput, match="no classes"):
        episodes_of(Album("a", "a"), "classes")


def test_pairs_are_different_pictures_of_an_episode_within_the_bounds_and_each_is_as_likely():
    features = torch.randn(12, 6, generator=rng()).abs()
    episodes = [torch.arange(3), torch.arange(3, 12)]
    pairs = Pairs(features, episodes, (0.5, 0.9))
    unit = torch.nn.functional.normalize(features, dim=1)
    cosine = unit @ unit.T
    allowed = (cosine >= 0.5) & (cosine <= 0.9) & ~torch.eye(12, dtype=torch.bool)
    allowed[:3, 3:] = allowed[3:, :3] = False
    n = 3000
    drawn = pairs.draw(n, rng(1))
    counts = torch.zeros(12, 12).index_put((drawn[:, 0], drawn[:, 1]), torch.ones(n), accumulate=True)
    assert (counts[~allowed] == 0).all() and (counts[allowed] > 0).all()
    expected = torch.zeros(12, 12)
    for rows in episodes:
        block = allowed[rows][:, rows]
        expected[rows[:, None], rows] = n / 2 * block / block.sum()
    chi = ((counts - expected)[allowed].square() / expected[allowed]).sum()
    freedom = int(allowed.sum()) - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5
    possible = 3 * 2 + 9 * 8
    assert pairs.kept == pytest.approx(int(allowed.sum()) / possible)


def test_bounds_as_shares_are_quantiles_and_an_episode_without_pairs_goes():
    features = torch.cat([torch.ones(4, 3), torch.randn(40, 3, generator=rng())])
    pairs = Pairs(features, [torch.arange(4), torch.arange(4, 44)], (0.25, 0.75), quantiles=True)
    low, high = pairs.bounds
    assert low < high and len(Pairs(features, [torch.arange(4), torch.arange(4, 44)], (-1, 0.9)).episodes) == 1
    alone = Pairs(features, [torch.arange(4, 44)], (0.25, 0.75), quantiles=True)
    assert alone.kept == pytest.approx(0.5, abs=0.03)
    with pytest.raises(BadInput, match="widen --similar"):
        Pairs(features[:4], [torch.arange(4)], (0.0, 0.9))


def test_bounds_of_all_keep_all_whatever_rounding_makes_of_the_same_picture_twice():
    features = torch.randn(1, 7, generator=rng()).repeat(40, 1) * torch.arange(1, 41)[:, None]
    assert Pairs(features, [torch.arange(40)], (-1, 1)).kept == 1


@pytest.mark.parametrize("change", [{"similar": (0.9, 0.3)}, {"similar": (-0.5, 0.3)}, {"episodes": "album"},
                                    {"largest_episode": 1}])  # fmt: skip
def test_settings_that_cannot_be(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        small(**change)


# The network and what it is told


def test_a_fresh_network_does_not_listen_yet_and_returns_zeros():
    net = VariationUViT(8, whole=5, tokens=3, token_width=4, channels=(8,), blocks=(1,), depth=1, width=16, head_dim=8)
    z, logsnr = torch.randn(2, 3, 8, 8, generator=rng()), torch.zeros(2)
    with torch.no_grad():
        assert (net(z, logsnr, (torch.ones(2, 5), torch.ones(2).bool(), torch.ones(2, 3, 4))) == 0).all()
        torch.nn.init.normal_(net.exit.conv.weight)
        shown = net(z, logsnr, (torch.ones(2, 5), torch.tensor([True, True]), torch.ones(2, 3, 4)))
        nothing = net(z, logsnr, (torch.ones(2, 5), torch.tensor([False, False]), torch.ones(2, 3, 4)))
    assert torch.equal(shown, nothing) and shown.abs().max() > 0


def test_what_is_shown_is_heard_and_not_where_none_is_given(model):
    z = torch.randn(3, 3, 8, 8, generator=rng())
    cond = model.told(torch.rand(3, 3, 8, 8, generator=rng()))
    assert isinstance(cond, Seen) and cond.tokens.shape == (3, 1, 256) and cond.given.all()
    out = model.denoiser(z, 0.5, cond)
    other = cond.replace(given=torch.tensor([True, False, True]))
    mixed = model.denoiser(z, 0.5, other)
    torch.testing.assert_close(mixed[[0, 2]], out[[0, 2]])
    torch.testing.assert_close(mixed[1:2], model.denoiser(z[1:2], 0.5, model.unconditional()))
    assert (mixed[1] - out[1]).abs().max() > 1e-3
    back = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.denoiser(z[back], 0.5, cond[back]), out[back])


def test_guidance_of_one_is_the_plain_model_and_of_nought_shows_nothing(model):
    shown = torch.rand(2, 3, 8, 8, generator=rng())
    nothing = model.draw(None, [0, 1])
    torch.testing.assert_close(model.draw(shown, [0, 1], cfg_scale=0.0), nothing)
    plain = model.draw(shown, [0, 1], cfg_scale=1.0)
    torch.testing.assert_close(plain, model.draw(shown, [0, 1]))
    assert (plain - nothing).abs().max() > 1e-3


def test_the_oracle_is_an_encoder_of_places():
    eye = sf.pipeline.seeing.Eye("oracle")
    pictures = torch.randint(256, (2, 3, 16, 16), generator=rng(), dtype=torch.uint8)
    tokens = eye.tokens(pictures)
    assert tokens.shape == (2, 16, 160) and eye.whole(pictures).shape == (2, 128)
    rest = eye.extractor.network.trunk[6:](tokens.mT.unflatten(2, (4, 4)))
    torch.testing.assert_close(rest, eye.whole(pictures))


def test_a_vision_model_of_transformers_is_one(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    told = {"image_processor_type": "BitImageProcessor", "size": {"height": 28, "width": 28}}
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(told))
    made = small(encoder=str(tmp_path / "dino")).model(())
    cond = made.told(torch.rand(2, 3, 8, 8, generator=rng()))
    assert cond.tokens.shape == (2, 5, 8)
    torch.testing.assert_close(cond.whole, cond.tokens[:, 0])
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    with pytest.raises(BadInput, match="another encoder"):
        made.copy().told(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("variant", ["tokens", "cls"])
def test_with_every_condition_dropped_the_loss_is_the_same_for_all_and_the_encoder_learns_nothing(variant):
    recipe = small(label_dropout=0.999999, variant=variant, encoder="oracle")
    pictures = recipe.open()
    made = stirred(recipe)
    made.network.requires_grad_(True)
    training = SemanticaTraining(recipe, made, pictures, recipe.groups(pictures))
    batch = training.batch(0, rng(), 3)
    assert not batch["given"].any()
    other = {**batch, "shown": 255 - batch["shown"]}
    loss, again = (training.loss(b, rng(1))[0] for b in (batch, other))
    assert torch.equal(loss, again)
    full = {**batch, "given": ~batch["given"]}
    assert training.loss(full, rng(1))[0] != loss
    training.loss(full, rng(1))[0].backward()
    assert made.network.project_whole.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in made.eye.extractor.network.parameters())


def test_the_baseline_shows_the_picture_itself_and_pairs_never_do():
    for pairs, same, flip in (("same", True, False), ("same", True, True), ("different", False, False)):
        recipe = small(pairs=pairs, flip=flip)
        pictures = recipe.open()
        training = SemanticaTraining(recipe, recipe.model(()), pictures, recipe.groups(pictures))
        batch = training.batch(0, rng(), 4)
        equal = (batch["shown"].float() / 127.5 - 1 - batch["x"]).abs().flatten(1).amax(1) < 1e-6
        assert equal.tolist() == [same] * 4


# Asked from outside


def test_variations_on_the_command_line(model, tmp_path):
    path, ref, out = model.save(tmp_path / "model"), tmp_path / "ref.png", tmp_path / "out"
    Image.fromarray(Album("a").picture(0)).save(ref)
    assert cli.main(["sample", "--image", str(ref), "--seeds", "0-1", "--model", str(path), "--out", str(out)]) == 0
    expected = model.draw(ref, 1)[0].permute(1, 2, 0).numpy()
    found = np.asarray(Image.open(out / "001-ref-seed1.png")) / 255
    assert np.abs(found - expected).max() <= 2 / 255
    assert json.loads((out / "sample.json").read_text())["prompts"] == [str(ref)]
    assert sf.load(path, "cpu").describe()["encoder"] == "random-cnn"


def test_who_is_shown_what_it_cannot_see_says_so(model, tmp_path, capsys):
    for asked in ("a star", 3, [], [tmp_path / "none.png"]):
        with pytest.raises(BadInput, match="is shown pictures"):
            model.told(asked)
    with pytest.raises(BadInput, match="is told pictures, not Labels"):
        model.told(Labels(torch.zeros(1, dtype=torch.long)))
    ref = tmp_path / "ref.png"
    Image.fromarray(Album("a").picture(0)).save(ref)
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["sample", "--image", str(ref), *out]) != 0
    assert "told prompts, not pictures" in capsys.readouterr().err
    assert cli.main(["sample", "a star", "--image", str(ref), *out]) != 0
    assert "not both" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_data_set_asks_for_its_own_pictures(model):
    album = Album("a", "a", "a")
    drawn = model.draw(model.asked_for(album, [1, 2]), [0, 0])
    shown = torch.stack([torch.from_numpy(album.picture(i)) for i in (1, 2)]).permute(0, 3, 1, 2)
    torch.testing.assert_close(drawn, model.draw(shown, [0, 0]))


# One-shot figures


def test_a_copier_is_precise_recalls_little_and_is_caught():
    real, few = (torch.randn(n, 4, generator=rng(i)).double() for i, n in ((0, 400), (1, 5)))
    shown = few.repeat_interleave(40, 0)
    copier = one_shot(shown.clone(), shown, real)
    honest = one_shot(torch.randn(200, 4, generator=rng(2)).double(), shown, real)
    assert copier.copied == 1 and copier.consistency == pytest.approx(1) and copier.diversity == pytest.approx(0)
    assert copier.precision > 0.7 and copier.recall <= 5 / 400
    assert honest.copied < 0.1 and honest.recall > 0.6 and honest.frechet < copier.frechet
    assert one_shot(real, real.roll(1, 0), real).frechet < 1e-6


def test_a_copy_is_nearer_than_any_other_picture_and_diversity_is_of_the_same_shown():
    shown, real = torch.tensor([[0.0], [10.0]]), torch.tensor([[2.0], [9.0]])
    assert copies(torch.tensor([[1.9], [11.1]]), shown, real).tolist() == [True, False]
    drawn = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert diversity(drawn, torch.tensor([[1.0], [1.0], [2.0], [2.0]])) == pytest.approx(0.5)


# The ledger


def test_strangers_change_places_and_nobody_is_lost():
    from sfumato.ledger.semantica import mixed

    episodes = [torch.arange(60), torch.arange(60, 100)]
    found = mixed(episodes, 0.3, 0)
    assert [len(rows) for rows in found] == [60, 40] and torch.cat(found).sort().values.equal(torch.arange(100))
    assert 0 < int((found[0] >= 60).sum()) == int((found[1] < 60).sum()) <= 15
    assert all(map(torch.equal, mixed(episodes, 0.0, 0), episodes))


@pytest.mark.slow
def test_the_entry_runs_in_miniature():
    experiment = core.load("semantica")
    found = experiment.found({arm: experiment.measure(9, arm, updates=2, n=4) for arm in experiment.arms})
    for method, baseline in (found[name] for name in experiment.claims):
        assert len(method) == len(baseline) > 2 and all(map(math.isfinite, [*method, *baseline]))
    assert found["one-shot figures"].keys() == set(experiment.arms)
