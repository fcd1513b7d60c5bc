"""KPOP: what extra rows do to attention, which step trains what, and the key as an adapter."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch.nn.functional import mse_loss

from anatomy_cases import latent, make, number, told
from sfumato.erase.esd import ESDx
from sfumato.erase.kpop import KPOP, Exchange, first_rows, hiding_loss, removal_loss
from sfumato.erase.uce import UCE
from sfumato.errors import BadInput
from sfumato.pipeline.anatomy.explicit import Listener
from sfumato.pipeline.attention import listen
from sfumato.pipeline.equip import equip
from sfumato.pipeline.keys import (
    FILE,
    HEADER,
    ConceptKey,
    KeyAdapter,
    attach,
    extended,
    inserted,
    keyed_attention,
    load_keys,
    save_keys,
)
from sfumato.pipeline.membrane import save_lora
from sfumato.train.draw import Share

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHORT = {"updates": 2, "sampling_steps": 2, "lr": 1e-3, "prompt_lr": 1e-2, "prompt_rows": 3, "insertion": "inmidout"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def attn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention(query_dim=12, cross_attention_dim=6, heads=3, dim_head=4, bias=True).double().eval()


X, CONTEXT = normal(2, 7, 12), normal(2, 5, 6, seed=1)


def by_hand(attn, x, context, key_rows, value_rows):
    """softmax(Q K^T / sqrt(d)) V head by head, for K = W_k [E; p_k] and V = W_v [E; p_v]."""
    n = len(x)
    key = attn.to_k(torch.cat([context, key_rows.expand(n, -1, -1)], 1))
    value, query, heads = attn.to_v(torch.cat([context, value_rows.expand(n, -1, -1)], 1)), attn.to_q(x), []
    for h in range(3):
        q, k, v = (y[..., 4 * h : 4 * h + 4] for y in (query, key, value))
        heads.append((torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(4)).softmax(-1) @ v)
    return attn.to_out[0](torch.cat(heads, -1))


@torch.no_grad()
def test_attention_reads_the_rows_behind_the_texts(attn):
    k, v = normal(1, 4, 6, seed=2), normal(1, 4, 6, seed=3)
    torch.testing.assert_close(keyed_attention(attn, X, CONTEXT, k, v), by_hand(attn, X, CONTEXT, k, v), **EXACT)
    torch.testing.assert_close(keyed_attention(attn, X, CONTEXT), attn(X, CONTEXT), **EXACT)


@torch.no_grad()
def test_the_whole_context_once_more_changes_nothing(attn):
    torch.testing.assert_close(keyed_attention(attn, X, CONTEXT, CONTEXT, CONTEXT), attn(X, CONTEXT), **EXACT)


@torch.no_grad()
def test_rows_of_nothing_still_dilute(attn):
    """With logit and value 0, m rows scale what each head gives by Z / (Z + m)."""
    bare = Attention(query_dim=12, cross_attention_dim=6, heads=3, dim_head=4, bias=False).double().eval()
    bare.to_out[0] = torch.nn.Identity()
    zero, m = torch.zeros(1, 4, 6, dtype=torch.float64), 4
    q, k = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (bare.to_q(X), bare.to_k(CONTEXT)))
    total = (q @ k.transpose(-1, -2) / 2).exp().sum(-1, keepdim=True)
    plain = bare(X, CONTEXT).unflatten(-1, (3, 4)).transpose(1, 2)
    expected = (plain * total / (total + m)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(keyed_attention(bare, X, CONTEXT, zero, zero), expected, **EXACT)


@torch.no_grad()
def test_copies_in_a_batch_give_equal_results(attn):
    k, v = normal(1, 4, 6, seed=2), normal(1, 4, 6, seed=3)
    three = keyed_attention(attn, X[:1].repeat(3, 1, 1), CONTEXT[:1].repeat(3, 1, 1), k, v)
    torch.testing.assert_close(three, keyed_attention(attn, X[:1], CONTEXT[:1], k, v).repeat(3, 1, 1), **EXACT)


@pytest.mark.parametrize("name", ["unet", "pixart", "sana"])
def test_on_every_network_the_whole_context_once_more_changes_nothing(name):
    """Projections, norms and masks are the layer's own, whatever network it is of."""
    anatomy, cond = make(name, torch.float64), told(dtype=torch.float64)
    cond = cond.replace(mask=torch.ones_like(cond.mask))
    call = lambda: anatomy.call(latent(anatomy, dtype=torch.float64), number(anatomy), cond)
    with torch.no_grad():
        plain, rows = call(), anatomy.text_rows(cond.tokens)
        act = lambda site, k, v: extended(site.module, k, v, rows, rows)
        quiet = listen(SimpleNamespace(anatomy=anatomy, listeners=[]), Listener("kv", lambda s: s.kind == "cross", act))
        torch.testing.assert_close(call(), plain, rtol=1e-9, atol=1e-9)
        quiet()
        assert torch.equal(call(), plain)


def test_the_gradient_of_recovery_by_finite_differences(attn):
    goal = normal(2, 7, 12, seed=9)
    rows = [normal(1, 2, 6, seed=s).requires_grad_() for s in (2, 3)]
    assert torch.autograd.gradcheck(lambda k, v: mse_loss(keyed_attention(attn, X, CONTEXT, k, v), goal), rows)


def test_the_losses_are_the_equations():
    bare, keyed, target, original = normal(4, 2, 3, 3)
    sq = lambda a, b: ((a - b) ** 2).sum() / a.numel()
    both = sq(bare, target) + 0.3 * sq(keyed, target)
    torch.testing.assert_close(removal_loss(bare, keyed, target, 0.3), both, **EXACT)
    hidden = sq(bare, target) + 0.3 * sq(keyed, original)
    torch.testing.assert_close(hiding_loss(bare, keyed, target, original, 0.3), hidden, **EXACT)


def test_prompts_start_at_the_words_in_turn():
    words = normal(2, 500, seed=4)
    rows = first_rows(words, 5, 1e-3, torch.Generator().manual_seed(0))
    assert rows.shape == (5, 500)
    moved = (rows - words[[0, 1, 0, 1, 0]]).norm(dim=-1) / words[[0, 1, 0, 1, 0]].norm(dim=-1)
    assert ((moved > 0.8e-3) & (moved < 1.2e-3)).all()


def exchange(pipe, **changes):
    student = pipe.copy(own="xattn")
    return Exchange(KPOP(concepts="star", **{**SHORT, **changes}), pipe, student), student


def share(step: int = 0, rows: int = 1) -> Share:
    return Share((0, step, 1), range(rows), rows)


@pytest.mark.parametrize("goal", ["hide", "remove"])
def test_without_the_prompts_part_it_is_esd(tiny_sd, goal):
    """The same step of ESD, in the network's own space; in the clean latent's, weighed."""
    own, _ = exchange(tiny_sd, goal=goal, keyed_weight=0.0, space="network", sampling_steps=5)
    x0, _ = exchange(tiny_sd, goal=goal, keyed_weight=0.0, sampling_steps=5)
    losses = []
    for recipe in (own, x0):
        batch = {"step": 3}
        recipe.transfer_loss(batch, share())
        losses.append(float(recipe.weights_loss(batch, share())[0].detach()))
    z, t, which, *_ = own.drawn(3, slice(0, 1))
    e0, ec = (tiny_sd.denoiser(z, t, tiny_sd.encode(p)) for p in ("", "star"))
    assert which.tolist() == [0]
    assert losses[0] == pytest.approx(float(mse_loss(ec, e0 - (ec - e0))), rel=1e-4)
    assert tiny_sd.prediction == "v"  # x0 = alpha z - sigma v
    assert losses[1] == pytest.approx(float(tiny_sd.process.alpha_sigma(t)[1] ** 2) * losses[0], rel=1e-4)


def test_at_the_start_a_silent_prompt_has_nothing_to_recover(tiny_sd):
    recipe, student = exchange(tiny_sd)
    silent = lambda site, logits: torch.cat([logits[..., :-3], torch.full_like(logits[..., -3:], -1e9)], -1)
    with student.edit_attention(silent, "cross", recipe.inside, "logits"):
        assert float(recipe.transfer_loss({"step": 0}, share())[0].detach()) < 1e-9
    assert float(recipe.transfer_loss({"step": 0}, share())[0].detach()) > 1e-9


def test_each_step_trains_its_own(tiny_sd):
    method = KPOP(concepts=("star", "circle"), batch=2, **SHORT)
    erased, keys, losses = method.train(tiny_sd)
    before, after = tiny_sd.parameters("full"), erased.parameters("full")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(tiny_sd.parameters("xattn"))
    start = Exchange(method, tiny_sd, tiny_sd.copy()).rows
    assert [k.concept for k in keys] == ["star", "circle"] and keys[0].base == erased.describe()["sha256"]
    assert all(not torch.equal(x.key_rows, k) for x, k in zip(keys, start[0], strict=True))
    assert {name: len(x) for name, x in losses.items()} == {"transfer": 2, "hide": 2}
    assert losses["transfer"][0] > 0 and losses["hide"][0] > 0


def test_both_rates_follow_the_schedule(tiny_sd, monkeypatch):
    """Without decay they are constant, as published."""
    seen, original = [], torch.optim.Adam.step

    def step(optimizer, *given, **more):
        seen.append(optimizer.param_groups[0]["lr"])
        return original(optimizer, *given, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    KPOP(concepts="star", **SHORT).train(tiny_sd)
    KPOP(concepts="star", **SHORT, decay="linear", final_lr=0.0).train(tiny_sd)
    assert seen == pytest.approx([1e-2, 1e-3] * 3 + [5e-3, 5e-4])


def test_the_prompt_learns_and_the_weights_stay_in_its_step(tiny_sd):
    recipe, _ = exchange(tiny_sd, keyed_weight=1.0)
    batch = {"step": 1}
    recipe.transfer_loss(batch, share())[0].backward()
    assert all(x.grad.abs().max() > 0 for x in recipe.rows)
    frozen = KPOP(concepts="star", **{**SHORT, "prompt_lr": 1e-30}).train(tiny_sd)[1]
    torch.testing.assert_close(frozen[0].key_rows, exchange(tiny_sd)[0].rows[0][0].detach(), rtol=1e-6, atol=1e-7)


# The key


@pytest.fixture(scope="module")
def key(tiny_sd):
    return ConceptKey("star", "inmidout", normal(3, 16).float(), normal(3, 16, seed=1).float())


def predict(pipe, prompts=("star", "art")):
    z = normal(len(prompts), *pipe.latent_shape(), seed=5).float()
    with torch.no_grad():
        return pipe.denoiser(z, 0.5, pipe.encode(list(prompts)))


def test_an_attached_key_acts_and_goes_without_a_trace(tiny_sd, key):
    made = attach(tiny_sd, [key])
    assert not torch.allclose(predict(made), predict(tiny_sd), atol=1e-4)
    assert list(made.adapters) == ["key.star"] and not tiny_sd.adapters
    made.adapters["key.star"].scale = 0.0
    torch.testing.assert_close(predict(made), predict(tiny_sd), rtol=1e-5, atol=1e-5)
    made.adapters["key.star"].remove()
    assert torch.equal(predict(made), predict(tiny_sd)) and not made.adapters
    made.adapters = {}


def test_it_acts_on_the_conditional_half_alone(tiny_sd, key):
    """Drawn with guidance 0, nothing but the unconditional half counts."""
    options = {"sampling_steps": 2, "cfg_scale": 0.0}
    plain, made = tiny_sd.draw("star", 0, **options), attach(tiny_sd, [key])
    torch.testing.assert_close(made.draw("star", 0, **options), plain, rtol=1e-4, atol=1e-5)
    both = attach(tiny_sd, [key], "both").draw("star", 0, **options)
    assert not torch.allclose(both, plain, atol=1e-3)
    assert not torch.allclose(*(p.draw("star", 0, sampling_steps=2) for p in (made, tiny_sd)), atol=1e-3)


def test_of_several_each_acts_where_it_is_named(tiny_sd, key):
    other = ConceptKey("blue circle", "mid", normal(2, 16, seed=7).float(), normal(2, 16, seed=8).float())
    both, alone = attach(tiny_sd, [key, other]), attach(tiny_sd, [key])
    prompts, options = ["a red star", "a blue circle", "a circle"], {"sampling_steps": 2, "cfg_scale": 1.0}
    drawn = both.draw(prompts, [0, 1, 2], **options)
    torch.testing.assert_close(drawn[:1], alone.draw(prompts[0], 0, **options), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn[2:], tiny_sd.draw(prompts[2], 2, **options), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(drawn[1:2], tiny_sd.draw(prompts[1], 1, **options), atol=1e-3)


def test_where_the_rows_are_read(tiny_sd, tiny_sdxl, tiny_pixart):
    for pipe in (tiny_sd, tiny_sdxl, tiny_pixart):
        every = [s.name for s in pipe.anatomy.sites() if s.kind == "cross"]
        mid, midout, inmidout = ([s.name for s in inserted(pipe.anatomy, i)] for i in ("mid", "midout", "inmidout"))
        assert inmidout == every and set(mid) <= set(midout) < set(every)
    assert all(s.name.startswith("mid_block.") for s in inserted(tiny_sd.anatomy, "mid"))
    assert not any(s.name.startswith("down_blocks.") for s in inserted(tiny_sd.anatomy, "midout"))


def test_the_file_is_an_adapter_like_any_other(tiny_sd, key, tmp_path):
    erased = KPOP(concepts="star", **SHORT).apply(tiny_sd)
    erased.save(tmp_path / "erased")
    (kept,) = load_keys(tmp_path / "erased")
    assert (kept.concept, kept.insertion, kept.key_rows.shape) == ("star", "inmidout", (3, 16))
    expected = attach(erased, [kept]).draw("star", 0, sampling_steps=2)
    for file in (tmp_path / "erased", tmp_path / "erased" / FILE):
        assert torch.equal(equip(erased, tmp_path / "erased", [file]).draw("star", 0, sampling_steps=2), expected)
    assert not torch.equal(erased.draw("star", 0, sampling_steps=2), expected)
    assert equip(erased, "any", []) is erased
    assert not KPOP(concepts="star", **{**SHORT, "goal": "remove", "updates": 1}).apply(tiny_sd).companions


def test_a_key_acts_beside_what_else_is_attached(tiny_sd, key, tmp_path):
    """As from a command, which can only name the files: as if the products were in the weights."""
    save_keys(tmp_path / "key.safetensors", [key])
    other = tiny_sd.copy()
    adapter = other.add_adapter("a", targets="cross.k", generator=torch.Generator().manual_seed(0))
    for up in adapter.up.values():
        torch.nn.init.constant_(up, 0.5)
    adapter.save_lora(tmp_path / "lora.safetensors")
    made = equip(tiny_sd, "any", [tmp_path / "key.safetensors", tmp_path / "lora.safetensors"])
    assert set(made.adapters) == {"lora.0", "key.star"}
    expected = attach(other.merged(), [key])
    drawn = [p.draw("star", 0, sampling_steps=2) for p in (made, expected, attach(tiny_sd, [key]), other)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    assert all((drawn[0] - x).abs().max() > 1e-3 for x in drawn[2:])


def test_records_tell_keys_apart_and_no_weights_stand_for_one(tiny_sd, key, tmp_path):
    made = attach(tiny_sd, [key])
    told = made.describe()["adapters"]["key.star"]
    assert told["key"] == "star" and json.loads(json.dumps(told)) == told
    other = attach(tiny_sd, [ConceptKey("star", "inmidout", key.value_rows, key.key_rows)])
    assert other.describe()["adapters"]["key.star"]["sha256"] != told["sha256"]
    alone = lambda: save_lora(tmp_path / "a", made)
    for refused in (lambda: made.save(tmp_path / "a"), made.merged, made.adapters["key.star"].save_lora, alone):
        with pytest.raises(BadInput, match="remove it first"):
            refused()
    assert not (tmp_path / "a").exists()
    with pytest.raises(BadInput, match="merge or remove"):
        attach(made, [key])


@pytest.mark.parametrize("several", [False, True])
def test_nothing_is_solved_for_beneath_keys(tiny_sd, key, several, monkeypatch):
    """One alone acts always, several have gates: no weights stand for them, whichever it is."""
    made = attach(tiny_sd, [key, replace(key, concept="circle")][: 1 + several])
    monkeypatch.setattr(UCE, "solve", lambda *_: pytest.fail("it was solved"))
    with pytest.raises(BadInput, match="the key of 'star' is no part of any weights: remove it first"):
        UCE(concepts=("square",)).apply(made)
    assert len(made.adapters) == 1 + several


def test_keys_that_are_none(tiny_sd, tiny_sdxl, key, tmp_path):
    with pytest.raises(BadInput, match="at least one"):
        attach(tiny_sd, [])
    with pytest.raises(BadInput, match="reads 40"):
        attach(tiny_sdxl, [key])
    with pytest.raises(BadInput, match="two keys of 'star'"):  # the first could not be removed any more
        attach(tiny_sd, [key, key])
    for k, v in ((key.key_rows[:2], key.value_rows), (key.key_rows[None],) * 2, (key.key_rows[:0],) * 2):
        with pytest.raises(BadInput, match="as many rows for keys as for values"):
            attach(tiny_sd, [ConceptKey("star", "mid", k, v)])
    with pytest.raises(BadInput, match="not finite"):
        attach(tiny_sd, [ConceptKey("star", "mid", key.key_rows * torch.nan, key.value_rows)])
    with pytest.raises(BadInput, match="leave preserve out"):  # it would have changed nothing
        KPOP(concepts=("star",), preserve=("art",)).check(tiny_sd)
    with pytest.raises(BadInput, match="halves"):
        KeyAdapter(tiny_sd.copy(), key, "neither")
    with pytest.raises(BadInput, match="no key file"):
        load_keys(tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="holds no keys"):
        load_keys(tmp_path / "other.safetensors")
    head = json.dumps([{"concept": "star", "insertion": "mid", "base": ""}])
    save_file({"0.key": torch.zeros(2, 16)}, tmp_path / "half.safetensors", metadata={HEADER: head})
    with pytest.raises(BadInput, match=r"lacks '0.value'"):
        load_keys(tmp_path / "half.safetensors")
    bad = {f"0.{n}": torch.full((2, 16), torch.nan) for n in ("key", "value")}
    save_file(bad, tmp_path / "nan.safetensors", metadata={HEADER: head})
    with pytest.raises(BadInput, match="not finite"):
        load_keys(tmp_path / "nan.safetensors")
    save_keys(tmp_path / "key.safetensors", [key])
    with pytest.raises(BadInput, match="exists"):
        save_keys(tmp_path / "key.safetensors", [key])


def test_a_middle_without_cross_attention(tiny_sd, monkeypatch):
    monkeypatch.setattr(type(tiny_sd.anatomy), "sites", lambda self: [])
    with pytest.raises(BadInput, match="use 'midout'"):
        inserted(tiny_sd.anatomy, "mid")


def test_the_plan_counts_weights_and_prompts(tiny_sd):
    kpop = KPOP(concepts=("star", "circle"), **SHORT)
    trained = sum(p.numel() for p in tiny_sd.parameters("xattn").values()) + 2 * 2 * 3 * 16
    assert kpop.plan(tiny_sd).memory["gradients"] == 4 * trained
    assert ESDx(concepts="star").plan(tiny_sd).memory["gradients"] < 4 * trained


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_joint_attention_is_refused_with_the_reason(family, request):
    pipe = request.getfixturevalue(family)
    with pytest.raises(BadInput, match=r"states of the text that change .*: erasers that fit it are uce") as caught:
        KPOP(concepts=("star",), **KPOP.EXAMPLE).apply(pipe)
    assert "\n" not in str(caught.value) and not KPOP.fits(pipe)
