from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from sfumato.errors import BadInput

PIPES = ["tiny_sd", "tiny_sdxl"]


@pytest.fixture(params=PIPES)
def p(request):
    return request.getfixturevalue(request.param).copy()


def inputs(p, n=2):
    z = torch.randn(n, *p.latent_shape(), generator=torch.Generator().manual_seed(7))
    return z, 0.6, p.encode(["a red star", "a blue circle"][:n])


def processors(p):
    return {n: m.processor for n, m in p.network.named_modules() if isinstance(m, Attention)}


@torch.no_grad()
def test_recording_gives_probabilities_and_changes_nothing(p):
    plain, before = p.denoiser(*inputs(p)), processors(p)
    with p.record_attention(kind=None) as seen:
        recorded = p.denoiser(*inputs(p))
    torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-5)
    assert len(seen.maps) == len(before)
    for layer, probs in seen.maps.items():
        keys = p.context_length if layer.kind == "cross" else layer.resolution**2
        heads = p.network.get_submodule(layer.name).heads
        assert probs.shape == (2, heads, layer.resolution**2, keys)
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    assert all(processors(p)[n] is x for n, x in before.items())
    assert torch.equal(p.denoiser(*inputs(p)), plain)


@torch.no_grad()
def test_records_keep_as_many_calls_as_asked(p):
    with (
        p.record_attention(keep=None) as all_,
        p.record_attention(keep=2) as two,
        p.record_attention() as last,
    ):
        p.draw("a red star", 0, sampling_steps=3)
    assert (len(all_.calls), len(two.calls), len(last.calls)) == (3, 2, 1)
    name = next(iter(last.maps))
    assert torch.equal(last.maps[name], all_.calls[2][name]) and torch.equal(
        two.calls[0][name], all_.calls[1][name]
    )
    assert all(call.keys() == last.maps.keys() for call in all_.calls)


@torch.no_grad()
def test_only_the_wanted_layers_are_touched(p):
    before, chosen = processors(p), max(q.resolution for q in p.projections("cross.k"))
    with p.record_attention("self", where=lambda layer: layer.resolution == chosen) as seen:
        changed = {n for n, x in processors(p).items() if x is not before[n]}
        p.denoiser(*inputs(p))
    assert changed == {layer.name for layer in seen.maps}
    assert all(layer.kind == "self" and layer.resolution == chosen for layer in seen.maps)


@torch.no_grad()
def test_edits_compose_in_order_and_restore_also_after_an_exception(p):
    plain, before = p.denoiser(*inputs(p)), processors(p)

    def halve_first(layer, probs):
        return torch.cat([probs[..., :1] * 0.5, probs[..., 1:]], dim=-1)

    def renormalise(layer, probs):
        return probs / probs.sum(-1, keepdim=True)

    with p.edit_attention(halve_first), p.edit_attention(renormalise), p.record_attention() as seen:
        one = p.denoiser(*inputs(p))
        for probs in seen.maps.values():
            torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    with p.edit_attention(renormalise), p.edit_attention(halve_first), p.record_attention() as seen:
        other = p.denoiser(*inputs(p))
        for probs in seen.maps.values():  # half of the first probability is gone
            torch.testing.assert_close(probs.sum(-1) + probs[..., 0], torch.ones_like(probs[..., 0]))
    # Halving a probability before renormalising is subtracting log 2 from its logit.
    shift = lambda layer, logits: torch.cat(
        [logits[..., :1] - torch.log(torch.tensor(2.0)), logits[..., 1:]], dim=-1
    )
    with p.edit_attention(shift, stage="logits"):
        torch.testing.assert_close(p.denoiser(*inputs(p)), one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, plain, atol=1e-4) and not torch.allclose(one, other, atol=1e-4)
    with pytest.raises(ZeroDivisionError), p.edit_attention(lambda layer, probs: 1 / 0):
        p.denoiser(*inputs(p))
    assert all(processors(p)[n] is x for n, x in before.items()) and not p.listeners
    assert torch.equal(p.denoiser(*inputs(p)), plain)


@torch.no_grad()
def test_keys_and_values_may_be_appended(p):
    plain = p.denoiser(*inputs(p))
    # Appending a copy of the whole context leaves softmax attention unchanged.
    double = lambda layer, key, value: (torch.cat([key, key], dim=2), torch.cat([value, value], dim=2))
    with p.edit_attention(double, stage="kv"), p.record_attention() as seen:
        torch.testing.assert_close(p.denoiser(*inputs(p)), plain, rtol=1e-4, atol=1e-5)
    assert all(probs.shape[-1] == 2 * p.context_length for probs in seen.maps.values())


def test_attention_is_differentiable_and_adapters_act_inside(p):
    z, t, cond = inputs(p)
    adapter = p.add_adapter("a", targets="cross.k", generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    with p.record_attention() as seen:
        p.denoiser(z, t, cond)
        sum(probs[..., 1].mean() for probs in seen.maps.values()).backward()
    assert z.grad.abs().sum() > 0
    assert all(up.grad.abs().sum() > 0 for up in adapter.up.values())


@torch.no_grad()
def test_copies_do_not_inherit_edits(p):
    plain = p.denoiser(*inputs(p))
    with p.edit_attention(lambda layer, probs: probs * 0), p.tap(function=lambda h: h * 0):
        copy = p.copy()
        assert not torch.allclose(p.denoiser(*inputs(p)), plain)
        assert torch.equal(copy.denoiser(*inputs(p)), plain)
    assert torch.equal(p.denoiser(*inputs(p)), plain)


def test_tap_reads_and_replaces_the_bottleneck_differentiably(p):
    z, t, cond = inputs(p)
    plain = p.denoiser(z, t, cond).detach()
    z.requires_grad_()
    with p.tap("bottleneck") as h:
        assert torch.equal(p.denoiser(z, t, cond), plain)
    side = min(q.resolution for q in p.projections())
    assert h.value.shape[0] == 2 and h.value.shape[-1] <= side
    (gradient,) = torch.autograd.grad(h.value.square().sum(), z)
    assert gradient.abs().sum() > 0
    delta = torch.zeros_like(h.value[:1]).requires_grad_()
    with p.tap("bottleneck", lambda x: x + delta):
        assert torch.equal(p.denoiser(z, t, cond), plain)
        p.denoiser(z, t, cond).square().sum().backward()
    assert delta.grad.abs().sum() > 0
    with torch.no_grad(), p.tap(function=torch.zeros_like) as h:
        assert not torch.allclose(p.denoiser(z, t, cond), plain)
        assert not h.value.any()
    with torch.no_grad():
        assert torch.equal(p.denoiser(z, t, cond), plain)


def test_bad_input(p):
    with pytest.raises(BadInput, match="no place 'middle'"), p.tap("middle"):
        pass
    with (
        pytest.raises(BadInput, match="unknown stage of attention 'softmax'"),
        p.edit_attention(print, stage="softmax"),
    ):
        pass
    with pytest.raises(BadInput, match="unknown kind of attention 'text'"), p.record_attention("text"):
        pass
