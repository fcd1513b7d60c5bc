"""Models of tokens: the loss against what it bounds, the three kinds of tokens, schedules of a trained model."""

from __future__ import annotations

import ast
import json
import math

import pytest
import torch
from torch.testing import assert_close

from sfumato.cli import main
from sfumato.data.characters import Characters
from sfumato.data.pictures import open_pictures
from sfumato.errors import BadInput
from sfumato.nets import TokenTransformer
from sfumato.noise import Absorbing, UniformTokens
from sfumato.noise.denoiser import DiscreteDenoiser
from sfumato.pipeline import TokenModel, load
from sfumato.pipeline.token_model import codes_of
from sfumato.sample import JYS
from sfumato.train.codebook import REVIVED, CodebookRecipe, codebook, encode_codes, revive
from sfumato.train.discrete import Discrete, TokenTraining, cross_entropy
from sfumato.train.loop import Run
from sfumato.train.schedule import Schedule

TEXT = "a red star and a blue fish " * 8
NET = {"width": 16, "depth": 1, "head_dim": 8, "embedding": 16}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recipe(**changes) -> Discrete:
    return Discrete(**{**Discrete.EXAMPLE, **changes})


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def tiny(process=None, shape=(6,), symbols="abc", **defaults) -> TokenModel:
    process = process or Absorbing(4)
    values = process.states - (process.mask is not None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TokenTransformer(process.states, values, math.prod(shape), **NET)
        torch.nn.init.normal_(net.out.weight)
    return TokenModel(net.eval(), process, "posterior", shape, (), {"symbols": symbols, **defaults})


def test_a_new_network_finds_all_values_alike_likely():
    net = TokenTransformer(4, 3, 6, classes=2, **NET)
    x, t, labels = torch.randint(4, (5, 2, 3), generator=rng()), torch.rand(5, generator=rng()), torch.arange(5) % 3
    out = net(x, t, labels)
    assert out.shape == (5, 2, 3, 3) and not out.any()


def test_the_loss_of_masked_tokens_is_the_entropy_of_the_data():
    """For independent tokens and their true law, at every time: the share of masked tokens over t is 1 - e."""
    law = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    process, n = Absorbing(4), 4000
    x = torch.multinomial(law.expand(n, -1), 8, True, generator=rng())
    t = 0.1 + 0.9 * torch.arange(n).double() / n
    noisy = process.diffuse(x, t, torch.rand(x.shape, generator=rng(1), dtype=torch.float64))
    loss = cross_entropy(law.log().expand(n, 8, 3), x, noisy, t, process.mask)
    assert abs(float(loss.mean()) / float(-(law * law.log()).sum()) - 1) < 0.03
    plain = cross_entropy(law.log().expand(n, 8, 3), x, noisy, t, None)
    assert_close(plain, -law.log()[x].mean(1))


def test_what_is_not_masked_has_no_gradient():
    logits = torch.randn(1, 3, 3, generator=rng()).requires_grad_()
    x, noisy = torch.tensor([[0, 1, 2]]), torch.tensor([[3, 1, 3]])
    cross_entropy(logits, x, noisy, torch.tensor([0.5]), 3).sum().backward()
    assert not logits.grad[0, 1].any() and logits.grad[0, 0].any()


def test_windows_of_a_text(text):
    found = Characters(text, 5)
    assert found.symbols == "".join(sorted(set(TEXT))) and len(found) == len(TEXT) - 4
    assert "".join(found.symbols[i] for i in found.windows([2])[0]) == TEXT[2:7]


def test_the_mark_before_a_text_is_no_part_of_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffabc".encode())
    assert Characters(tmp_path / "a.txt", 2).symbols == "abc"


@pytest.mark.parametrize("chain", ["absorbing", "uniform"])
def test_a_text_is_learnt_a_little_and_written(text, tmp_path, chain, monkeypatch):
    method = recipe(data=text, tokens="characters", size=8, chain=chain, updates=2, classes=False)
    model = load(method.run(tmp_path / "run", progress=False), "cpu")
    assert isinstance(model, TokenModel) and isinstance(model.denoiser, DiscreteDenoiser)
    (written,) = model.write([3], sampling_steps=4)
    assert len(written) == 8 and set(written) <= set(TEXT)
    assert model.write([3], sampling_steps=4) == [written]
    if chain == "absorbing":
        asked = ["jumps", "--model", str(tmp_path / "run"), "--steps", "2", "--points", "16", "--samples", "4"]
        assert main([*asked, "--seeds", "1,2", "--out", str(tmp_path / "jumps")]) == 0
        lines = (tmp_path / "jumps" / "searched.txt").read_text().splitlines()
        assert len(lines) == 2 and len(ast.literal_eval(lines[0])) == 8
        again = ["--schedule", str(tmp_path / "jumps" / "schedule.json"), "--seeds", "1,2"]
        assert main([*asked, *again, "--out", str(tmp_path / "again")]) == 0
        assert (tmp_path / "again" / "searched.txt").read_text().splitlines() == lines
        assert main(["sample", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "no")]) == 2
        # one window, behind the mark that some editors put first, in a folder named as training takes it
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "marked.txt").write_bytes(("\ufeff" + TEXT[:8]).encode())
        assert main([*asked, "--data", "~/marked.txt", "--out", str(tmp_path / "marked")]) == 0
    tokens = model.read([TEXT[:8]])
    assert "".join(model.defaults["symbols"][i] for i in tokens[0]) == TEXT[:8]
    for call, match in (
        (lambda: model.read(["Stars!!!"]), "has no"),
        (lambda: model.read(["a", "re"]), "one length"),
        (lambda: model.draw(None, [1]), "writes text"),
        (lambda: model.tokens(None, [1], cfg_scale=2.0), "without guidance"),
        (lambda: model.tokens(None, [1], scheduler="heun"), "sampled by"),
    ):
        with pytest.raises(BadInput, match=match):
            call()


def test_codes_that_nothing_is_nearest_to_are_set_to_latents():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = codebook(8, (8, 8), 12).requires_grad_(False)
    table, x = vae.quantize.embedding.weight, torch.rand(4, 3, 8, 8, generator=rng()) * 2 - 1
    latents = vae.encode(x).latents.movedim(1, -1).flatten(0, -2)
    table[3:] = 100 + table[3:]
    table[:3] = latents[[1, 20, 40]]
    before, used = table.clone(), codes_of(vae, x).unique()
    assert used.tolist() == [0, 1, 2] and revive(vae, latents, rng(1)) == 9
    assert torch.equal(table[:3], before[:3])  # what is used stays
    assert (table[3:, None] == latents).all(-1).any(1).all() and len(codes_of(vae, x).unique()) > 3
    after = table.clone()
    table.copy_(before)
    revive(vae, latents, rng(1))
    assert torch.equal(table, after)  # the same draw on every process, and after a kill


def test_a_codebook_that_collapsed_is_used_again_by_training(tmp_path):
    pictures = open_pictures("sketch", 8, count=64)
    schedule = Schedule(updates=40, batch=4, lr=1e-3, warmup=0, track="none", ema=0.0)
    used = {}
    for name, every in (("revived", REVIVED), ("never", 10**9)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = codebook(8, (8, 8), 16)
        with torch.no_grad():
            vae.quantize.embedding.weight[1:] += 100
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sfumato.train.codebook.REVIVED", every)
            Run(CodebookRecipe(vae, pictures, schedule), schedule, tmp_path / name).fit(progress=False)
        used[name] = len(encode_codes(vae, pictures).unique())
        used[name, "logged"] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["perplexity"]
    assert used["never"] == 1 and used["revived"] > 4
    assert used["never", "logged"] == pytest.approx(1) and used["revived", "logged"] > 2


def test_codes_of_pictures(tmp_path):
    method = recipe(
        data="sketch", tokens="codes", size=8, codes=5, code_channels=(8, 8), code_updates=2, code_batch=2, updates=1
    )
    model = load(method.run(tmp_path / "run", progress=False), "cpu")
    assert model.latent_shape() == (4, 4) and model.size == 8 and "star" in model.labels
    x = torch.rand(2, 3, 8, 8, generator=rng()) * 2 - 1
    codes = model.encode_image(x)
    assert codes.shape == (2, 4, 4) and codes.max() < 5
    assert_close(model.decode_latents(codes), model.vae(x).sample, rtol=1e-4, atol=1e-5)
    drawn = model.tokens(["star", "fish"], [1, 2])
    assert drawn.shape == (2, 4, 4) and drawn.max() < 5
    pictures = model.draw(["star", "fish"], [1, 2])
    assert pictures.shape == (2, 3, 8, 8) and torch.equal(model.copy().draw(["star", "fish"], [1, 2]), pictures)


def test_levels_are_kept_exactly():
    model = TokenTraining(recipe(), recipe().model(()), None).model
    levels = torch.arange(256).view(16, 4, 4)
    assert torch.equal(model.encode_image(model.decode_latents(levels)), levels)


def test_what_is_drawn_does_not_depend_on_the_batch():
    for process, kind in ((Absorbing(4), "k_gillespie"), (Absorbing(4), "euler"), (UniformTokens(3), "tau_leaping")):
        model = tiny(process)
        together = model.tokens(None, [1, 2, 3], sampling_steps=3, scheduler=kind)
        assert torch.equal(model.tokens(None, [2], sampling_steps=3, scheduler=kind), together[1:2])
        assert together.shape == (3, 6) and together.max() < 3


def test_a_schedule_belongs_to_its_model(tmp_path):
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.network.out.weight.add_(1.0 * torch.randn(other.network.out.weight.shape, generator=rng()))
    data = torch.randint(3, (8, 6), generator=rng())
    schedule = model.search(data, JYS(sampling_steps=4, points=32))
    drawn = model.tokens(None, [1, 2], sampling_steps=4, schedule=schedule)
    again = type(schedule).load(schedule.save(tmp_path / "s.json"), model.describe()["sha256"])
    assert torch.equal(model.tokens(None, [1, 2], sampling_steps=4, schedule=again), drawn)
    with pytest.raises(BadInput, match="another model"):
        other.tokens(None, [1], sampling_steps=4, schedule=schedule)
    with pytest.raises(BadInput, match="none for 3"):
        model.tokens(None, [1], sampling_steps=3, schedule=schedule)
    with pytest.raises(BadInput, match="more than the 6 tokens"):
        model.tokens(None, [1], sampling_steps=7, scheduler="k_gillespie")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"chain": "gaussian", "tokens": "codes"}, "in an order"),
        ({"chain": "uniform", "sampler": "k_gillespie"}, "absorbing"),
        ({"sampler": "tau_leaping"}, "without a mask"),
        ({"tokens": "codes", "size": 12}, "multiple of 8"),
        ({"eps": 1.0}, "eps"),
        ({"size": 4, "sampler": "k_gillespie", "sampling_steps": 17}, "more than the 16"),
        ({"tokens": "characters", "size": 8, "sampler": "k_gillespie", "sampling_steps": 9}, "more than the 8"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, match):
    with pytest.raises(BadInput, match=match):
        recipe(**change)


def test_a_width_that_is_no_whole_heads_is_refused():
    with pytest.raises(BadInput, match="whole heads"):
        recipe(width=24, head_dim=16).network(0)


def test_texts_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "many.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 1100))))
    for name, match in (("short", "more text"), ("bytes", "UTF-8"), ("many", "at most 1,024"), ("no", "no text at")):
        with pytest.raises(BadInput, match=match):
            Characters(tmp_path / f"{name}.txt", 8)
