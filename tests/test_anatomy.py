"""Every kind of network by the same names: its parts, how it is called, its attention in the open."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxPipeline, QwenImagePipeline

from anatomy_cases import LENGTH, MAKERS, POOLED, WIDTH, latent, make, number, told
from sfumato.errors import BadInput
from sfumato.pipeline import attention
from sfumato.pipeline.anatomy import KINDS, SUBSETS

every = pytest.mark.parametrize("name", MAKERS)
JOINT = ("sd3", "sd35", "flux", "qwen", "flux2", "zimage")
CROSS = [f"{where}.{what}" for where in ("cross", "self") for what in ("q", "k", "v", "out")]
TEXT = [f"{where}.{what}" for where in ("joint", "text") for what in ("q", "k", "v", "out")]
HAS = {
    "unet": CROSS,
    "pixart": [*CROSS, "text.in"],
    "sana": [*CROSS, "text.in"],
    "sd3": [*TEXT, "text.in", "pooled.in"],
    "sd35": [*CROSS[4:], *TEXT, "text.in", "pooled.in"],
    "flux": [*TEXT, "text.in", "pooled.in"],
    "qwen": [*TEXT, "text.in"],
    "flux2": [*TEXT, "text.in"],
    "zimage": [*CROSS[4:], *TEXT, "text.in"],
}


def host(anatomy):
    """As much of a `Text2Image` as attention asks for."""
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    told = {"listeners": [], "control": None, "told_by": "encode_prompt"}
    return SimpleNamespace(anatomy=anatomy, network=anatomy.network, pipe=pipe, **told)


@torch.no_grad()
def run(anatomy, rows=2, dtype=torch.float32, cond=None):
    z = latent(anatomy, rows, dtype)
    return anatomy.call(z, number(anatomy, rows=rows), told(rows, dtype=dtype) if cond is None else cond)


# Parts


@pytest.mark.parametrize("name", ["unet", "pixart", "sana"])
def test_text_rows_are_what_the_keys_and_values_of_cross_attention_read(name):
    anatomy, seen = make(name), []
    for p in anatomy.projections(("cross.k", "cross.v")):
        p.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(anatomy)
    rows = anatomy.text_rows(told().tokens)
    assert len(seen) == len(anatomy.projections(("cross.k", "cross.v")))
    for x in seen:
        torch.testing.assert_close(x, rows)


@every
def test_projections_are_the_linear_layers_of_that_name_and_width(name):
    anatomy = make(name)
    assert list(anatomy.kinds) == [kind for kind in KINDS if kind in HAS[name]]
    for p in anatomy.projections():
        assert anatomy.network.get_submodule(p.name) is p.module
        assert p.shape == tuple(p.weight.shape)
    for kind, width in (("text.in", WIDTH), ("pooled.in", POOLED)):
        if kind in anatomy.kinds:
            (p,) = anatomy.projections((kind,))
            assert p.shape[1] == width and p.resolution == 0
    for kind in set(KINDS) - set(HAS[name]):
        with pytest.raises(BadInput, match=f"has no projections '{kind}': it has .*{anatomy.kinds[0]}"):
            anatomy.projections((kind,))


@every
def test_text_reaches_the_network_by_the_projections_that_say_so(name):
    """With all that reads text at zero, the prediction no longer depends on the prompt."""
    anatomy = make(name)
    one, other = told(seed=0), told(seed=1)
    assert not torch.allclose(run(anatomy, cond=one), run(anatomy, cond=other), atol=1e-4)
    kinds = [k for k in ("text.in", "pooled.in") if k in anatomy.kinds] or ["cross.k", "cross.v"]
    for p in anatomy.projections(kinds):
        p.module.weight.zero_()
    assert torch.equal(run(anatomy, cond=one), run(anatomy, cond=other))


@every
def test_sets_of_parameters_are_disjoint_and_named_after_what_they_do(name):
    anatomy = make(name)
    full, xattn, rest = (anatomy.parameters(s) for s in ("full", "xattn", "noxattn"))
    assert full.keys() == dict(anatomy.network.named_parameters()).keys()
    assert not xattn.keys() & rest.keys() and xattn.keys() | rest.keys() < full.keys()
    strict = anatomy.parameters("xattn-strict")
    side = "text" if name in JOINT else "cross"
    weights = {f"{p.name}.weight" for p in anatomy.projections((f"{side}.k", f"{side}.v"))}
    assert weights == {n for n in strict if n.endswith("weight")} and strict.keys() < xattn.keys()
    left = {n.split(".")[0] for n in full.keys() - xattn.keys() - rest.keys()}
    allowed = {"time_embedding", "conv_norm_out", "conv_out", "adaln_single", "time_embed", "time_text_embed"}
    allowed |= {"norm_out", "proj_out", "scale_shift_table", "time_guidance_embed", "t_embedder", "all_final_layer"}
    assert left <= allowed
    if any(kind.startswith("self") for kind in anatomy.kinds):
        own = anatomy.parameters("selfattn")
        assert own and own.keys() < rest.keys()
    else:
        with pytest.raises(BadInput, match=r"'selfattn' is empty in a .*: choose from full, xattn"):
            anatomy.parameters("selfattn")
    with pytest.raises(BadInput, match="choose from full"):
        anatomy.parameters("attention")
    assert set(SUBSETS) == {"full", *anatomy.subsets}


@every
def test_adapters_find_their_layers_and_taps_their_places(name):
    anatomy = make(name)
    inside = anatomy.targets("transformer")
    attention_ones = {p.name for p in anatomy.projections() if not p.kind.endswith(".in")}
    assert attention_ones < inside.keys()
    assert any(n not in attention_ones for n in inside), "feed-forward layers count too"
    assert set(anatomy.targets(anatomy.kinds[0])) == {p.name for p in anatomy.projections(anatomy.kinds[:1])}
    with pytest.raises(BadInput, match="unknown adapter target 'everything'"):
        anatomy.targets("everything")
    middle = anatomy.place("bottleneck")
    ran = []
    hooks = [
        anatomy.network.get_submodule(n).register_forward_hook(lambda *_, n=n: ran.append(n))
        for n in anatomy.blocks()
    ]
    rows = []
    hooks.append(anatomy.last.register_forward_hook(lambda m, a, out: rows.append(len(out))))
    run(anatomy)
    for hook in hooks:
        hook.remove()
    assert ran == list(anatomy.blocks()) and middle == ran[len(ran) // 2]
    assert rows == [2]
    assert anatomy.place(ran[0]) == ran[0]
    with pytest.raises(BadInput, match=rf"no place 'middle'.*{ran[-1]}"):
        anatomy.place("middle")


# Calls


def plain_call(name, network, z, timestep, cond):
    """The network as diffusers' own pipeline calls it, by keyword."""
    t = torch.full((len(z),), timestep)
    words = {"encoder_hidden_states": cond.tokens}
    if name == "unet":
        return network(z, t, **words).sample
    if name == "pixart":
        mask, size = cond.mask.long(), {"resolution": None, "aspect_ratio": None}
        out = network(z, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=size, **words).sample
        return out.chunk(2, dim=1)[0]
    if name == "sana":
        return network(z, timestep=t * 0.001, encoder_attention_mask=cond.mask, **words).sample
    n, c, h, w = z.shape
    if name == "zimage":
        said = [x[m] for x, m in zip(cond.tokens, cond.mask, strict=True)]
        return torch.stack(network(list(z[:, :, None]), t * 0.001, said).sample)[:, :, 0]
    if name == "qwen":
        packed, shapes = QwenImagePipeline._pack_latents(z, n, c, h, w), [[(1, h // 2, w // 2)]] * n
        out = network(packed, timestep=t * 0.001, encoder_hidden_states_mask=cond.mask, img_shapes=shapes, **words)
        return QwenImagePipeline._unpack_latents(out.sample, h, w, 1)[:, :, 0]
    if name == "flux2":
        pack, ids = Flux2KleinPipeline._pack_latents, Flux2KleinPipeline._prepare_latent_ids(z)
        told = {"guidance": torch.full((n,), 4.0), "txt_ids": Flux2KleinPipeline._prepare_text_ids(cond.tokens)}
        out = network(pack(z), timestep=t * 0.001, img_ids=ids, **told, **words).sample
        return Flux2KleinPipeline._unpack_latents_with_ids(out, ids, h, w)
    words["pooled_projections"] = cond.pooled
    if name in ("sd3", "sd35"):
        return network(hidden_states=z, timestep=t, **words).sample
    out = network(
        hidden_states=FluxPipeline._pack_latents(z, n, c, h, w), timestep=t * 0.001, guidance=torch.full((n,), 3.5),
        txt_ids=torch.zeros(cond.tokens.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, z.device, z.dtype), **words,
    ).sample  # fmt: skip
    return FluxPipeline._unpack_latents(out, h, w, 1)


@torch.no_grad()
@every
@pytest.mark.parametrize("shape", [(8, 8), (4, 8)])
def test_a_call_is_diffusers_own_bit_for_bit(name, shape):
    anatomy, cond = make(name), told()
    z = latent(anatomy, shape=shape)
    ours = anatomy.call(z, number(anatomy), cond)
    assert ours.shape == z.shape
    assert torch.equal(ours, plain_call(name, anatomy.network, z, 500.0, cond))


@torch.no_grad()
@every
def test_a_foreign_call_is_read_back_whether_positional_or_by_name(name):
    anatomy, cond, z = make(name), told(), latent(make(name))
    calls = []
    original = anatomy.network.forward

    def listen(*args, **kwargs):
        calls.append((anatomy.read(args, kwargs), anatomy.asks_for_dict(args, kwargs)))
        return original(*args, **kwargs)

    anatomy.network.forward = listen
    plain_call(name, anatomy.network, z, 500.0, cond)
    anatomy.call(z, number(anatomy), cond)
    del anatomy.network.forward
    for (call, as_dict), wanted in zip(calls, (True, False), strict=True):
        assert as_dict is wanted
        assert torch.equal(call.z, z) and torch.equal(call.timestep, number(anatomy))
        seen = cond.mask if name == "zimage" else torch.ones_like(cond.mask)  # which is given no padding
        assert torch.equal(call.cond.tokens[seen], cond.tokens[seen])
        if call.cond.pooled is not None:
            assert torch.equal(call.cond.pooled, cond.pooled)
        assert ("pooled.in" in anatomy.kinds) == (call.cond.pooled is not None)
        if name in ("pixart", "sana", "qwen", "zimage"):
            assert torch.equal(call.cond.mask, cond.mask)
        args, kwargs = anatomy.arguments(call.z, call.timestep, call.inputs)
        again = anatomy.prediction(original(*args, **kwargs).sample, z)
        assert torch.equal(again, anatomy.call(z, number(anatomy), cond))
    given = list(kwargs.items()) if name != "unet" else [("timestep", args[1]), *kwargs.items()]
    order = [p for p in anatomy._signature.parameters if p not in ("self", anatomy.first)]
    values = dict(given)
    positional = [values.get(p) for p in order[: max(order.index(p) for p in values) + 1]]
    again = anatomy.read((args[0], *positional), {})
    assert torch.equal(again.z, z) and torch.equal(again.cond.tokens[seen], cond.tokens[seen])


@pytest.mark.parametrize("name", ["flux", "qwen", "zimage"])
def test_packing_an_odd_latent_is_refused(name):
    anatomy = make(name)
    with pytest.raises(BadInput, match="7x8 cannot be"):
        anatomy.call(latent(anatomy, shape=(7, 8)), number(anatomy), told())


@torch.no_grad()
def test_a_guidance_distilled_network_is_told_a_number():
    anatomy, z, cond = make("flux"), latent(make("flux")), told()
    usual, other = (anatomy.call(z, number(anatomy), cond, guidance=g) for g in (None, 1.0))
    assert torch.equal(usual, anatomy.call(z, number(anatomy), cond, guidance=3.5)) and not torch.allclose(usual, other)


# Attention


@torch.no_grad()
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_in_the_open_is_the_layers_own(name, dtype):
    anatomy = make(name, dtype)
    plain = run(anatomy, dtype=dtype)
    before = {site: site.module.processor for site in anatomy.sites()}
    with attention.record(host(anatomy), None, lambda site: True, 1) as seen:
        shown = run(anatomy, dtype=dtype)
    # Some compute in float32 themselves, whatever the network's precision: Sana's linear attention, complex rotations.
    tolerance = 1e-5 if dtype == torch.float32 or name in ("sana", "qwen", "zimage") else 1e-10
    assert (shown - plain).abs().max() <= tolerance * plain.abs().max()
    assert set(seen.maps) == set(anatomy.sites())
    for site, probs in seen.maps.items():
        picture, text = site.resolution**2, LENGTH
        picture, text = (32, 32) if name == "zimage" else (picture, text)  # padded to multiples of it
        shape = {"cross": (picture, text), "self": (picture, picture), "joint": (text + picture,) * 2}[site.kind]
        assert probs.shape == (2, site.module.heads, *shape)
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    assert all(site.module.processor is x for site, x in before.items())
    assert torch.equal(run(anatomy, dtype=dtype), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart", "sana", "qwen"])
def test_attention_does_not_look_at_padding(name):
    anatomy = make(name)
    with attention.record(host(anatomy), "joint" if name in JOINT else "cross", lambda site: True, 1) as seen:
        run(anatomy)
    for probs in seen.maps.values():
        assert probs[1, ..., 3:LENGTH].max() == 0 and probs[0, ..., 3:LENGTH].min() > 0


@torch.no_grad()
@every
def test_keys_may_be_appended(name):
    anatomy = make(name)
    plain = run(anatomy, cond=told().replace(mask=torch.ones(2, LENGTH, dtype=torch.bool)))
    double = lambda site, key, value: (torch.cat([key, key], dim=2), torch.cat([value, value], dim=2))
    with attention.edit(host(anatomy), double, None, lambda site: True, "kv"):
        doubled = run(anatomy, cond=told().replace(mask=torch.ones(2, LENGTH, dtype=torch.bool)))
    torch.testing.assert_close(doubled, plain, rtol=1e-4, atol=1e-5)


def blind(site, logits):
    """The picture does not see the text."""
    logits = logits.clone()
    logits[:, :, site.text :, : site.text] = -torch.inf
    return logits


@torch.no_grad()
@pytest.mark.parametrize("name", JOINT)
def test_the_text_side_of_joint_attention_is_where_text_enters(name):
    anatomy = make(name)
    one, other = told(seed=0), told(seed=1)
    other = other.replace(pooled=one.pooled)
    assert not torch.allclose(run(anatomy, cond=one), run(anatomy, cond=other), atol=1e-4)
    with attention.edit(host(anatomy), blind, "joint", lambda site: True, "logits"):
        assert torch.equal(run(anatomy, cond=one), run(anatomy, cond=other))


@torch.no_grad()
@pytest.mark.parametrize("name", JOINT)
def test_an_edit_of_the_texts_rows_changes_the_text_only(name):
    """In the last block where the picture is read, what the text's queries get is thrown away."""
    anatomy, plain = make(name), None
    last = [site for site in anatomy.sites() if site.kind == "joint"][-1].name

    def shake(site, probs):
        probs = probs.clone()
        probs[:, :, : site.text] = probs[:, :, : site.text].flip(-1)
        return probs

    keep = lambda site, probs: probs
    for where, same in ((lambda site: site.name == last, True), (lambda site: site.name != last, False)):
        with attention.edit(host(anatomy), keep, "joint", where, "probs"):
            plain = run(anatomy)
        with attention.edit(host(anatomy), shake, "joint", where, "probs"):
            assert torch.allclose(run(anatomy), plain, atol=1e-6) is same


@every
def test_kinds_of_attention_that_a_network_has_not_are_refused(name):
    anatomy = make(name)
    kinds = {site.kind for site in anatomy.sites()}
    for kind in {"cross", "self", "joint"} - kinds:
        with (
            pytest.raises(BadInput, match=f"has no {kind} attention: it has"),
            attention.edit(host(anatomy), print, kind, lambda site: True, "probs"),
        ):
            pass


def test_processors_with_weights_of_their_own_are_not_put_aside():
    """An IP-Adapter's pictures would silently no longer count."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    anatomy = make("unet")
    site = next(site for site in anatomy.sites() if site.kind == "cross")
    site.module.set_processor(IPAdapterAttnProcessor2_0(16, WIDTH))
    with (
        pytest.raises(BadInput, match="beside IPAdapterAttnProcessor2_0"),
        attention.record(host(anatomy), "cross", lambda site: True, 1),
    ):
        pass
    with attention.record(host(anatomy), "self", lambda site: True, 1) as seen:
        assert not seen.calls
    assert isinstance(site.module.processor, IPAdapterAttnProcessor2_0)


def test_linear_attention_has_no_logits_and_is_left_as_it_was():
    anatomy = make("sana")
    before = {site: site.module.processor for site in anatomy.sites()}
    with (
        pytest.raises(BadInput, match="linear and has no logits"),
        attention.edit(host(anatomy), print, None, lambda site: True, "logits"),
    ):
        pass
    assert all(site.module.processor is x for site, x in before.items())
