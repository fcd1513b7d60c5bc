from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.errors import BadInput
from sfumato.pipeline import wrap

PIPES = ["tiny_sd", "tiny_sd_eps", "tiny_sdxl"]


@pytest.fixture(params=PIPES)
def p(request):
    return request.getfixturevalue(request.param)


def reference_inputs(p, prompt):
    """Token embeddings and added conditions straight from the diffusers pipeline."""
    if p.family == "sd":
        return p.pipe.encode_prompt(prompt, p.device, 1, False)[0], {}
    tokens, _, pooled, _ = p.pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    sizes = torch.tensor([[p.size, p.size, 0, 0, p.size, p.size]], dtype=torch.float32)
    return tokens, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


@torch.no_grad()
def test_encode_equals_the_pipelines_own(p):
    tokens, added = reference_inputs(p, "a red star")
    cond = p.encode(["a red star", "a photo of a blue circle"])
    assert cond.prompts == ("a red star", "a photo of a blue circle")
    torch.testing.assert_close(cond.tokens[:1], tokens)
    if added:
        torch.testing.assert_close(cond.pooled[:1], added["added_cond_kwargs"]["text_embeds"])
    assert cond.mask.sum(1).tolist() == [5, 8]  # words plus start and end token
    assert p.last_word_token(cond).tolist() == [3, 6]
    star = p.pipe.tokenizer.convert_tokens_to_ids("star</w>")
    assert cond.ids[0, p.last_word_token(cond)[0]] == star


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 1, 499, 640, 999])
def test_denoiser_is_the_network_at_the_integer_timestep_bit_for_bit(p, timestep):
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    tokens, added = reference_inputs(p, "a red star")
    if added:
        added = {"added_cond_kwargs": {k: v.expand(2, -1) for k, v in added["added_cond_kwargs"].items()}}
    expected = p.pipe.unet(z, timestep, encoder_hidden_states=tokens.expand(2, -1, -1), **added).sample
    T = p.clock.timesteps
    for t in (
        (timestep + 1) / T,
        torch.tensor((timestep + 1) / T),
        torch.full((2, 1, 1, 1), (timestep + 1) / T),
    ):
        assert torch.equal(p.denoiser(z, t, p.encode("a red star")), expected)


@torch.no_grad()
def test_predictions_agree_with_each_other_and_with_the_checkpoints_betas(p):
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(1))
    cond, timestep = p.encode(["a red star", ""]), 640
    t = (timestep + 1) / p.clock.timesteps
    abar = float(p.pipe.scheduler.alphas_cumprod[timestep])
    eps, x0 = p.denoiser.predict(z, t, cond, "eps"), p.denoiser.predict(z, t, cond, "x0")
    torch.testing.assert_close(abar**0.5 * x0 + (1 - abar) ** 0.5 * eps, z, rtol=1e-4, atol=1e-5)
    native = {"eps": eps, "v": abar**0.5 * eps - (1 - abar) ** 0.5 * x0}[p.denoiser.prediction]
    torch.testing.assert_close(native, p.denoiser(z, t, cond), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        p.denoiser.predict(z, t, cond, "score"), -eps / (1 - abar) ** 0.5, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_times_may_differ_between_pictures(p):
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(2))
    cond = p.encode(["a red star", "a blue circle"])
    both = p.denoiser.predict(z, torch.tensor([0.2, 0.9]), cond, "x0")
    for i, t in enumerate((0.2, 0.9)):
        torch.testing.assert_close(
            both[i : i + 1], p.denoiser.predict(z[i : i + 1], t, cond[i], "x0"), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="one time per picture"):
        p.denoiser(z, torch.tensor([0.1, 0.2, 0.3]), cond)


@pytest.mark.parametrize(("eta", "cfg_scale"), [(0.0, 3.0), (0.0, 1.0), (0.7, 3.0)])
def test_sample_equals_the_diffusers_pipeline(p, eta, cfg_scale):
    prompts, seeds = ["a red star", "a photo of a blue circle"], [3, 11]
    ours = p.draw(prompts, seeds, sampling_steps=5, cfg_scale=cfg_scale, scheduler="ddim", eta=eta)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    p.pipe.set_progress_bar_config(disable=True)
    theirs = p.pipe(
        prompts,
        num_inference_steps=5,
        guidance_scale=cfg_scale,
        eta=eta,
        generator=generators,
        output_type="pt",
    ).images
    assert ours.shape == (2, 3, p.size, p.size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_negative_prompt_equals_the_diffusers_pipeline(p):
    ours = p.draw("a red star", 5, sampling_steps=4, cfg_scale=4.0, negative="a blue square")
    p.pipe.set_progress_bar_config(disable=True)
    theirs = p.pipe(
        "a red star",
        negative_prompt="a blue square",
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_a_seeds_picture_does_not_depend_on_its_batch(p, scheduler):
    prompts = ["a red star", "a blue circle", "a red star", "an art photo", ""]
    seeds = [4, 0, 7, 4, 2]
    eta = 0.5 if scheduler == "ddim" else 0.0

    def draw(order, **options):
        chosen = [prompts[i] for i in order], [seeds[i] for i in order]
        return p.draw(*chosen, sampling_steps=4, scheduler=scheduler, eta=eta, **options)

    together = draw(range(5))
    # float32 kernels sum in another order for another batch size: equal up to 1e-5 of the range, far below
    # 1/255.
    for size in (1, 2, 3):
        torch.testing.assert_close(draw(range(5), batch=size), together, rtol=0, atol=1e-5)
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(draw(order, batch=2), together[order], rtol=0, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-2  # same prompt, other seed


def test_the_progress_bar_changes_nothing(tiny_sd):
    options = {"sampling_steps": 2, "batch": 1}
    with_bar = tiny_sd.draw("a red star", [1, 2], progress=True, **options)
    assert torch.equal(with_bar, tiny_sd.draw("a red star", [1, 2], **options))


def test_sampling_leaves_the_pipeline_as_it_was(p):
    before = dict(vars(p.pipe.scheduler))
    p.draw("a red star", [1, 2], sampling_steps=3)
    after = vars(p.pipe.scheduler)
    assert before.keys() == after.keys()
    assert all(torch.equal(a, after[k]) if torch.is_tensor(a) else a is after[k] for k, a in before.items())


def test_guidance_interval(p):
    plain = p.draw("a red star", 1, sampling_steps=4, cfg_scale=1.0)
    guided = p.draw("a red star", 1, sampling_steps=4, cfg_scale=6.0)
    options = {"sampling_steps": 4, "cfg_scale": 6.0}
    assert torch.equal(guided, p.draw("a red star", 1, cfg_interval=(0.0, 1.0), **options))
    torch.testing.assert_close(
        plain, p.draw("a red star", 1, cfg_interval=(2.0, 3.0), **options), rtol=0, atol=1e-6
    )
    some = p.draw("a red star", 1, cfg_interval=(0.0, 0.5), **options)
    assert not torch.allclose(some, guided) and not torch.allclose(some, plain)


def test_trajectory_is_the_sampling_loop_stopped(p):
    seeds, steps = [5, 6], 4
    noise = torch.stack(
        [torch.randn(p.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    z, t = p.trajectory("a red star", seeds, sampling_steps=steps, stop_after=0)
    assert torch.equal(z, noise) and t == pytest.approx(752 / 1000)  # leading spacing: 1 + 750, offset 1
    z, t = p.trajectory("a red star", seeds, sampling_steps=steps, stop_after=steps, cfg_scale=2.0)
    pictures = ((p.decode_latents(z) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(
        pictures, p.draw("a red star", seeds, sampling_steps=steps, cfg_scale=2.0, scheduler="ddim")
    )
    assert t == 0.0
    middle, t2 = p.trajectory("a red star", seeds, sampling_steps=steps, stop_after=2, cfg_scale=1.0)
    from diffusers import DDIMScheduler

    solver = DDIMScheduler.from_config(p.pipe.scheduler.config)
    solver.set_timesteps(steps)
    z = noise
    with torch.no_grad():
        for timestep in solver.timesteps[:2]:
            z = solver.step(
                p.denoiser(z, (float(timestep) + 1) / 1000, p.encode("a red star")), timestep, z
            ).prev_sample
    torch.testing.assert_close(middle, z)
    assert t2 == pytest.approx((float(solver.timesteps[2]) + 1) / 1000)


def test_conditioning_can_be_given_instead_of_prompts(p):
    by_prompt = p.draw(["a red star", "a blue circle"], [1, 2], sampling_steps=2)
    assert torch.equal(
        by_prompt, p.draw(None, [1, 2], cond=p.encode(["a red star", "a blue circle"]), sampling_steps=2)
    )
    one = p.draw(None, [1, 2], cond=p.encode("a red star"), sampling_steps=2)
    torch.testing.assert_close(one, p.draw("a red star", [1, 2], sampling_steps=2))


def test_pictures_and_latents(p):
    x = torch.rand(2, 3, p.size, p.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = p.encode_image(x)
    assert z.shape == (2, *p.latent_shape())
    with torch.no_grad():
        mode = p.pipe.vae.encode(x).latent_dist.mode() * p.pipe.vae.config.scaling_factor
    torch.testing.assert_close(z, mode)
    draw = p.encode_image(x, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(draw, z)
    assert torch.equal(draw, p.encode_image(x, generator=torch.Generator().manual_seed(1)))
    x.requires_grad_()
    p.decode_latents(p.encode_image(x)).square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert all(w.grad is None for w in p.pipe.vae.parameters())


def test_too_long_a_prompt_warns_of_what_is_cut_off(p):
    with pytest.warns(UserWarning, match="cut off: 'blue circle'"):
        cond = p.encode("a photo of a red star of a red star blue circle")
    assert cond.tokens.shape[1] == p.context_length == 12


def test_projections_list_every_attention_layer_with_its_resolution(p):
    from diffusers.models.attention_processor import Attention

    layers = {n: m for n, m in p.network.named_modules() if isinstance(m, Attention) and n.endswith("attn2")}
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, n=n: seen.__setitem__(n, a[0].shape[1]))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        p.denoiser(torch.randn(1, *p.latent_shape()), 0.5, p.encode("a"))
    for hook in hooks:
        hook.remove()
    found = p.projections("cross.k", "cross.v")
    assert len(found) == 2 * len(layers)
    for q in found:
        assert q.module is p.network.get_submodule(q.name) and q.weight is q.module.weight
        assert q.shape[1] == p.encode("a").tokens.shape[-1]
        assert q.resolution**2 == seen[q.name.rsplit(".", 1)[0]]
    assert len(p.projections()) == 16 * len(layers) / 2
    with pytest.raises(BadInput, match=r"cross\.w"):
        p.projections("cross.w")


def test_subsets_of_parameters(p):
    everything = p.parameters("full")
    assert everything.keys() == dict(p.network.named_parameters()).keys()
    xattn, rest = p.parameters("xattn"), p.parameters("noxattn")
    assert not xattn.keys() & rest.keys()
    left = everything.keys() - xattn.keys() - rest.keys()
    assert {n.split(".")[0] for n in left} <= {"time_embedding", "add_embedding", "conv_norm_out", "conv_out"}
    strict = p.parameters("xattn-strict")
    assert strict.keys() < xattn.keys() and len(strict) == len(p.projections("cross.k", "cross.v"))
    assert p.parameters("selfattn").keys() < rest.keys()
    with pytest.raises(BadInput, match="choose from full"):
        p.parameters("attention")


@pytest.mark.parametrize("own", [None, "xattn", "all", ["conv_in.weight", "text_encoder"]])
def test_copies_share_what_they_do_not_own(p, own):
    if isinstance(own, list):
        own = ["conv_in.weight", next(f"text_encoder.{n}" for n, _ in p.pipe.text_encoder.named_parameters())]
    copy = p.copy(own)
    full = {
        f"{k}.{n}": (w, w2)
        for k, m in p.parts().items()
        for (n, w), (_, w2) in zip(m.named_parameters(), copy.parts()[k].named_parameters(), strict=True)
    }
    owned = (
        {
            None: set(),
            "xattn": {f"unet.{n}" for n in p.parameters("xattn")} if own == "xattn" else set(),
            "all": set(full),
        }.get(own)
        if not isinstance(own, list)
        else {"unet.conv_in.weight", own[1]}
    )
    for name, (w, w2) in full.items():
        assert w is not w2 and torch.equal(w, w2)
        assert (w.data_ptr() == w2.data_ptr()) == (name not in owned)
        assert w2.requires_grad == (name in owned) and not w.requires_grad
    assert copy.defaults == p.defaults and type(copy.pipe) is type(p.pipe)
    assert copy.pipe.scheduler is not p.pipe.scheduler


def test_a_copys_layers_are_deepcopys_with_containers_of_their_own(p):
    from copy import deepcopy

    p.network.conv_in.register_forward_hook(hook := lambda *args: None)
    p.network.conv_in.seen = p.network.conv_out.seen = {}  # one object in two places is one object in a copy
    try:
        ours, theirs = p.copy().network, deepcopy(p.network)
    finally:
        p.network.conv_in._forward_hooks.clear()
        del p.network.conv_in.seen, p.network.conv_out.seen
    assert list(ours.conv_in._forward_hooks.values()) == [hook]
    assert ours.conv_in.seen is ours.conv_out.seen
    for one, other, original in zip(ours.modules(), theirs.modules(), p.network.modules(), strict=True):
        assert type(one) is type(other) and list(vars(one)) == list(vars(other))
        for name, held in vars(one).items():
            assert type(held) is type(vars(other)[name]), name
            if isinstance(held, (dict, set)):
                assert list(held) == list(vars(other)[name]) and held is not vars(original).get(name), name


def test_a_copy_keeps_scheduler_settings_that_diffusers_would_correct(tiny_sd):
    from diffusers import DDIMScheduler

    whole = tiny_sd.copy()
    settings = {k: v for k, v in whole.pipe.scheduler.config.items() if not k.startswith("_")}
    whole.pipe.scheduler = DDIMScheduler(**{**settings, "steps_offset": 0})
    whole = wrap(whole.pipe)
    assert whole.copy().pipe.scheduler.config.steps_offset == 0
    draw = lambda p: p.draw("star", 0, sampling_steps=2)
    assert torch.equal(draw(whole.copy()), draw(whole))
    assert not torch.equal(draw(whole), draw(tiny_sd))


def test_training_a_copy_never_changes_the_original(p):
    before, picture = p.describe()["sha256"], p.draw("a red star", 0, sampling_steps=2)
    copy = p.copy("xattn")
    optimizer = torch.optim.SGD(copy.parameters("xattn").values(), lr=0.1)
    z = torch.randn(1, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    copy.denoiser(z, 0.5, copy.encode("a red star")).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for q in copy.projections("cross.v"):
            q.weight.mul_(2)
    assert copy.describe()["sha256"] != before
    assert not torch.allclose(picture, copy.draw("a red star", 0, sampling_steps=2))
    assert p.describe()["sha256"] == before
    assert torch.equal(picture, p.draw("a red star", 0, sampling_steps=2))


def test_unknown_names_are_refused(p):
    with pytest.raises(BadInput, match="no parameter named 'conv_inn'"):
        p.copy(["conv_inn"])
    with pytest.raises(BadInput, match="unknown scheduler 'eular'"):
        p.draw("a", 0, scheduler="eular")
    with pytest.raises(BadInput, match="2 things asked for and 3 seeds"):
        p.draw(["a", "b"], [0, 1, 2])
    with pytest.raises(BadInput, match="not a multiple of 2"):
        p.draw("a", 0, size=15)
    with pytest.raises(BadInput, match="stop_after"):
        p.trajectory("a", 0, sampling_steps=2, stop_after=3)


def test_other_sizes(p):
    x = p.draw("a red star", 0, sampling_steps=2, size=24)
    assert x.shape == (1, 3, 24, 24) and np.isfinite(x.numpy()).all()


def test_wrap_is_idempotent_and_calls_go_to_the_pipeline(p):
    assert wrap(p) is p
    p.pipe.set_progress_bar_config(disable=True)
    assert p("a red star", num_inference_steps=1).images[0].size == (p.size, p.size)
