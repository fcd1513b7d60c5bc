"""Sequences of text and pictures: who sees whom, and OmniGen's pipeline held to what diffusers itself does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as sf
from sfumato import cli
from sfumato.errors import BadInput
from sfumato.pipeline import Condition, Instruction, build_sequence
from sfumato.pipeline.anatomy import OmniGenAnatomy
from sfumato.pipeline.interleaved import attention_of, fitted, place, places, positions_of, tokens_of
from sfumato.pipeline.omnigen import flaws
from sfumato.sample.guidance import Guided


class Letters:
    """A tokenizer of single letters that begins every text with a token 1, as Llama's does."""

    bos_token_id = 1

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, *map(ord, text)])


def picture(seed: int = 0, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


# The sequence


def test_a_text_is_framed_and_its_pictures_stand_where_it_says():
    ids, spans = tokens_of("x<|image_2|>y<|image_1|><|image_2|>z", [2, 3], Letters())
    before = "<|user|>\nGenerate an image according to the following instructions\nx"
    n = 1 + len(before)
    assert ids[:n] == [1, *map(ord, before)] and spans == [(n, n + 3), (n + 4, n + 6), (n + 6, n + 9)]
    assert ids[n : n + 9] == [0, 0, 0, ord("y"), 0, 0, 0, 0, 0]
    assert ids[n + 9 :] == [*map(ord, "z<|end|>\n<|assistant|>\n<|diffusion|>")], "the start token comes once"
    assert places("<|image_2|>y<|image_1|><|image_2|>", 2) == [1, 0, 1]


def test_a_place_without_its_picture_and_a_picture_without_its_place_are_refused():
    for text, count, said in (
        (place(1), 0, "a place for picture 1 and came with 0 pictures"), (place(2), 1, "a place for picture 2"),
        ("<|image_0|>", 1, "a place for picture 0"), ("a star", 1, "picture 1 has no place"),
        (place(1), 2, "picture 2 has no place"),
        (f"<|image_{'9' * 5000}|>", 1, "a place for picture 999999999"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            tokens_of(text, [1] * count, Letters())
    with pytest.raises(BadInput, match="give one each"):
        build_sequence(["a"], [], [4], Letters())


TABLE = """
1000000000
1111000000
1111000000
1111000000
1111100000
1111110000
1111111111
1111111111
1111111111
1111111111
"""
"""A text of five tokens, of which three are a picture's; the time; an output of 2x2."""


def test_who_sees_whom_by_hand():
    due = torch.tensor([[int(x) for x in line] for line in TABLE.split()])
    seen = attention_of(torch.tensor([5]), [[(1, 4)]], torch.tensor([4]))
    assert torch.equal(seen[0].long(), due)
    causal = attention_of(torch.tensor([5]), [[(1, 4)]], torch.tensor([4]), bidirectional=False)[0].long()
    assert torch.equal(causal[:6, :6], torch.ones(6, 6).tril().long()) and torch.equal(causal[6:], due[6:])


def test_a_row_in_a_batch_sees_what_it_sees_alone():
    lengths, outputs, spans = torch.tensor([6, 3]), torch.tensor([2, 4]), [[(0, 2), (2, 5)], [(1, 2)]]
    seen = attention_of(lengths, spans, outputs)
    assert seen.shape == (2, 11, 11)
    for i, keep in enumerate(([*range(9)], [*range(3, 11)])):
        alone = attention_of(lengths[[i]], [spans[i]], outputs[[i]])[0]
        assert torch.equal(seen[i][keep][:, keep], alone)
    assert not seen[0][:, 9:].any(), "nobody sees behind a smaller output"
    assert not seen[1, 3:, :3].any() and seen[1, :3].all(), "nobody sees padding, which sees all"
    assert seen[0, 0, 1] and not seen[0, 1, 2], "neighbouring pictures are two"
    assert torch.equal(positions_of(lengths, 4)[0], torch.arange(11))
    assert positions_of(lengths, 4)[1].tolist() == [0, 0, 0, *range(8)]


def test_a_batch_is_padded_on_the_left():
    made = build_sequence(["a", f"{place(1)}b"], [[], [4]], [4, 4], Letters())
    short = len(tokens_of("a", [], Letters())[0])
    left = made.ids.shape[1] - short
    assert (made.ids[0, :left] == 2).all() and not made.mask[0, :left].any() and made.mask[1].all()
    (first, end), alone = made.spans[1][0], tokens_of(f"{place(1)}b", [4], Letters())
    assert (first, end) == alone[1][0] and (made.ids[1, first:end] == 0).all() and made.spans[0] == ()
    moved = build_sequence(["a" * 30 + "b", place(1)], [[], [1]], [1, 1], Letters())
    assert (moved.ids[1, slice(*moved.spans[1][0])] == 0).all() and moved.mask[1].sum() < moved.mask[0].sum()
    assert made.positions.shape == (2, made.ids.shape[1] + 5) and made.attention.shape[1:] == (left + short + 5,) * 2


def test_pictures_are_fitted_as_diffusers_does():
    from diffusers.pipelines.omnigen.processor_omnigen import crop_image

    for height, width, most in ((33, 70, 32), (100, 40, 32), (10, 50, 64), (9, 9, 64), (64, 48, 64), (130, 150, 64)):
        image = Image.fromarray(picture(height, height, width))
        ours = fitted(image, most)
        assert np.array_equal(np.asarray(ours), np.asarray(crop_image(image, most)))
        assert ours.width % 16 == ours.height % 16 == 0
    assert fitted(Image.new("RGB", (1000, 3)), 64).size == (1024, 16)  # a picture's side is at least a pixel on the way


# The pipeline


@pytest.fixture
def p(tiny_omnigen):
    return tiny_omnigen


ASKED = Instruction(f"a red {place(1)} star", (picture(0),))



def test_a_row_does_not_depend_on_how_far_it_is_padded(p):
    """Rotations too: the network would turn all rows as the first, whose padding is another."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(3, *p.latent_shape(), generator=rng)
    asked = ["art", ASKED, Instruction(f"{place(2)} of {place(1)}", (picture(1), picture(2, 48, 64)))]
    together = p.denoiser(z, 0.3, p.encode(asked))
    for i, one in enumerate(asked):
        alone = p.denoiser(z[[i]], 0.3, p.encode([one]))
        torch.testing.assert_close(together[[i]], alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(p.denoiser(z[[0]], 0.3, p.encode(asked)[[0]]), together[[0]], rtol=0, atol=2e-6)
    joined = type(p.encode("a")).cat([p.encode([x]) for x in asked])
    torch.testing.assert_close(p.denoiser(z, 0.3, joined), together, rtol=0, atol=2e-6)


def test_text_and_pictures_never_see_the_time_or_the_output(p):
    cond, states = p.encode([ASKED]), []
    length = cond.ids.shape[1]
    left = length - int(cond.lengths)  # padding sees all, and is seen by none
    hooks = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in p.network.layers]
    z = torch.randn(1, *p.latent_shape(), requires_grad=True)
    t = torch.tensor([0.4], requires_grad=True)
    try:
        args, kwargs = p.anatomy.arguments(z, t, p.anatomy.inputs(z, cond))
        p.network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(states) == 2
    for state in states:
        before = torch.autograd.grad(state[:, left:length].sum(), (z, t), retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in before)
        of_time = torch.autograd.grad(state[:, length].square().sum(), (z, t), retain_graph=True, allow_unused=True)
        assert (of_time[0] is None or not of_time[0].any()) and of_time[1].abs() > 0
        assert torch.autograd.grad(state[:, length + 1 :].square().sum(), z, retain_graph=True)[0].abs().max() > 0


def test_what_stands_before_a_picture_does_not_depend_on_it(p):
    one, other = (p.encode([Instruction(ASKED.text, (picture(i),))]) for i in (0, 1))
    left, seen = one.ids.shape[1] - int(one.lengths), []
    first = left + one.spans[0][0][0]

    hook = p.network.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    z = torch.zeros(1, *p.latent_shape())
    try:
        for cond in (one, other):
            p.denoiser(z, 0.5, cond)
    finally:
        hook.remove()
    assert torch.equal(seen[0][:, left:first], seen[1][:, left:first])
    assert not torch.allclose(seen[0][:, first:], seen[1][:, first:])


def own_pictures(p, prompt, inputs, seed, monkeypatch, **options):
    """Diffusers' own call, with the means of input pictures' latents, as here."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    monkeypatch.setattr(Posterior, "sample", lambda self, generator=None: self.mean)
    p.pipe.set_progress_bar_config(disable=True)
    sizes = {"height": p.size, "width": p.size, "max_input_image_size": p.size, "num_inference_steps": 3}
    generator = [torch.Generator().manual_seed(seed)]
    return p(prompt, inputs, generator=generator, output_type="pt", **sizes, **options).images


def test_draw_equals_the_diffusers_pipeline(p, monkeypatch):
    """For a prompt longer than what is steered away from, so that diffusers' first row is not padded."""
    long = f"{flaws()} a red star"
    theirs = own_pictures(p, [long], None, 5, monkeypatch)
    torch.testing.assert_close(p.draw(long, 5, sampling_steps=3), theirs, rtol=0, atol=1e-5)
    text, shown = f"{place(1)} of {place(2)} {long}", [Image.fromarray(picture(i, 32, 48)) for i in (0, 1)]
    theirs = own_pictures(p, [text], [shown], 5, monkeypatch, guidance_scale=3.0, img_guidance_scale=2.0)
    ours = sf.pipeline.omnigen.OmniGen(p.pipe, {**p.defaults, "image_cfg_scale": 2.0})
    drawn = ours.draw([Instruction(text, tuple(shown))], 5, sampling_steps=3, cfg_scale=3.0)
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-5)
    assert (drawn - p.draw([Instruction(text, tuple(shown))], 5, sampling_steps=3, cfg_scale=3.0)).abs().max() > 1e-4


def test_any_number_of_steps_along_the_velocity_ends_in_the_picture(p):
    x1 = torch.randn(1, *p.latent_shape(), generator=torch.Generator().manual_seed(1))
    x0 = torch.randn(1, *p.latent_shape(), generator=torch.Generator().manual_seed(3))
    for steps in (1, 2, 7):
        states = p.states("a", 3, sampling_steps=steps, cfg_scale=1.0, scheduler=None, guide=lambda *call: x0 - x1)
        (first, start), *_, (last, end) = states
        assert torch.equal(first, x0) and start == 1.0 and end == 0.0
        torch.testing.assert_close(last, x1, rtol=0, atol=1e-5)


def test_the_network_is_told_how_much_of_the_picture_there_is(p):
    assert p.clock.number(torch.tensor([1.0, 0.25, 0.0])).tolist() == [0.0, 0.75, 1.0]
    shifted = p.copy()
    shifted.pipe.scheduler = type(p.pipe.scheduler)(num_train_timesteps=1, invert_sigmas=True, shift=3.0)
    t = torch.arange(5) / 5
    for model, c in ((p, 1.0), (shifted, 3.0)):
        due = t / (t + c - c * t)
        times = [1 - at for _, at in model.states("a", 0, sampling_steps=5, cfg_scale=1.0, scheduler=None)]
        torch.testing.assert_close(torch.tensor(times[:-1]), due, rtol=0, atol=1e-6)


class Constant:
    """A denoiser whose prediction is what it is told."""

    process = prediction = None

    def __call__(self, z, t, cond):
        return cond.value


class Number(Condition):
    """A number, of which half lies between it and nothing."""

    def __init__(self, value, scale):
        self.value, self.scale = value, scale

    def guided_at(self, scale):
        return scale != 1 or bool((self.scale != 1).any())

    def between(self, empty):
        return [(Number(self.value / 2, self.scale), self.scale)]

    def __len__(self):
        return len(self.value)

    @classmethod
    def cat(cls, parts):
        return cls(torch.cat([p.value for p in parts]), parts[0].scale)


def test_guidance_on_the_pictures_and_on_all_of_the_instruction():
    z = torch.zeros(2, 1, dtype=torch.float64)
    value, nothing = torch.tensor([[3.0], [5.0]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    for on_pictures, scale in (([1.6, 2.0], 2.5), ([1.0, 1.0], 1.0), ([2.5, 2.5], 2.5), ([0.0, 1.6], 1.0)):
        s = torch.tensor(on_pictures, dtype=torch.float64)
        guided = Guided(Constant(), Number(value, s), Number(nothing, s), scale)(z, 0.5)
        due = nothing + s[:, None] * (value / 2 - nothing) + scale * (value - value / 2)
        torch.testing.assert_close(guided, due)
        if s.eq(scale).all():
            torch.testing.assert_close(guided, nothing + scale * (value - nothing))
        if scale == 1 and s.eq(1).all():
            assert torch.equal(guided, value)


def test_rows_with_and_without_pictures_are_guided_together(p):
    asked, seeds = [ASKED, "a blue star"], [1, 2]
    both = p.draw(asked, seeds, sampling_steps=2)
    for i in range(2):
        torch.testing.assert_close(p.draw(asked[i : i + 1], seeds[i], sampling_steps=2), both[[i]], rtol=0, atol=1e-5)
    cond = p.encode(asked)
    assert cond.wordless.prompts == (place(1), "") and cond.image_scale.tolist() == pytest.approx([1.6, 1.6])
    bare = cond.between(p.unconditional(2, "art"))[0][0]
    assert bare.prompts == (place(1), "art") and bare.latents[1] == ()


def test_what_is_remembered_draws_the_same(p):
    """Text and pictures are computed at the first of a walk's steps only, again where what is told changes."""
    asked, seeds = [ASKED, "a blue star"], [1, 2]
    keeping = type(p)(p.pipe, p.defaults)
    keeping.remember = True
    lengths = []
    hook = p.network.layers[0].register_forward_hook(lambda m, a, out: lengths.append(out.shape[1]))
    try:
        for settings in ({"sampling_steps": 4}, {"sampling_steps": 4, "cfg_interval": (0.6, 1.0), "batch": 1}):
            ours, due = (model.draw(asked, seeds, **settings) for model in (keeping, p))
            torch.testing.assert_close(ours, due, rtol=0, atol=1e-5)
    finally:
        hook.remove()
    outputs, all_of_it = 1 + 4, lengths[0]
    assert all_of_it > outputs and lengths[:8] == [all_of_it, *[outputs] * 3, *[all_of_it] * 4]
    assert [n > outputs for n in lengths[8:12]] == [True, False, True, False], "the second half is not guided"
    assert {type(site.module.processor).__name__ for site in p.anatomy.sites()} == {"OmniGenAttnProcessor2_0"}


def test_edited_tokens_are_listened_to_and_attention_is_seen(p):
    cond, z = p.encode(["a red star", "art"]), torch.randn(2, *p.latent_shape())
    plain = p.denoiser(z, 0.5, cond)
    assert not torch.allclose(p.denoiser(z, 0.5, cond.replace(tokens=cond.tokens * 0.5)), plain)
    with p.record_attention("joint") as seen:
        torch.testing.assert_close(p.denoiser(z, 0.5, cond), plain, rtol=0, atol=1e-5)
    assert len(seen.maps) == 2
    words = cond.tokens.clone().requires_grad_()
    p.denoiser(z, 0.5, cond.replace(tokens=words)).square().sum().backward()
    assert words.grad[cond.mask].abs().max() > 0 and not words.grad[~cond.mask].any()
    assert p.last_word_token(cond).tolist() == [cond.ids.shape[1] - 6] * 2 and p.find(cond, "red star")[0].sum() == 2


def test_what_is_saved_is_loaded_and_products_are_merged(p, tmp_path):
    made = p.copy()
    adapter = made.add_adapter("lora", 2, targets=("joint.q", "joint.out"))
    with torch.no_grad():
        for up in adapter.up.values():
            up.normal_()
    drawn = made.draw([ASKED], 1, sampling_steps=2)
    made.save(tmp_path / "model")
    again = sf.load(tmp_path / "model", "cpu")
    torch.testing.assert_close(again.draw([ASKED], 1, sampling_steps=2), drawn, rtol=0, atol=1e-4)
    assert (drawn - p.draw([ASKED], 1, sampling_steps=2)).abs().max() > 1e-4
    assert again.size == 32 and again.defaults["image_cfg_scale"] == 1.6 and again.describe()["family"] == "omnigen"
    with pytest.raises(BadInput, match="no text encoder that could learn"):
        again.add_token("<x>", "star")
    with pytest.raises(BadInput, match="edit the tokens of what it gives"):
        again.encode_ids(torch.ones(1, 4, dtype=torch.long))


def test_pictures_from_the_command_line(p, tmp_path, capsys):
    p.save(tmp_path / "model")
    ref, out = tmp_path / "ref.png", tmp_path / "out"
    Image.fromarray(picture()).save(ref)
    said = ["--model", str(tmp_path / "model"), "--sampling-steps", "2", "--seeds", "3", "--out", str(out)]
    assert cli.main(["sample", ASKED.text, "--image", str(ref), "--image-cfg-scale", "2", *said]) == 0
    model = sf.load(tmp_path / "model", "cpu")
    model.defaults["image_cfg_scale"] = 2.0
    due = model.draw([ASKED], 3, sampling_steps=2)[0].permute(1, 2, 0).numpy()
    (file,) = (f for f in out.glob("*.png") if f.name != "sheet.png")
    assert np.abs(np.asarray(Image.open(file)) / 255 - due).max() <= 1 / 255
    said[-1] = str(tmp_path / "none")
    for asked, complaint in (
        (["a star", "--image", str(ref)], "picture 1 has no place"), ([ASKED.text], "a place for picture 1"),
        (["--image", str(ref)], "is told what to do with pictures"),
    ):  # fmt: skip
        assert cli.main(["sample", *asked, *said]) != 0
        assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()


def test_the_published_network_has_its_names():
    from diffusers import OmniGenTransformer2DModel

    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    with torch.device("meta"):
        network = OmniGenTransformer2DModel(rope_scaling=factors).requires_grad_(False)
    found = OmniGenAnatomy(network)
    parts = {name: found.parameters(name) for name in ("full", "xattn", "noxattn", "selfattn")}
    sizes = {name: sum(x.numel() for x in some.values()) for name, some in parts.items()}
    assert sizes["full"] == 3_762_072_592 and sizes["xattn"] == sizes["selfattn"] == 32 * 4 * 3072**2
    assert not parts["xattn"].keys() & parts["noxattn"].keys()
    assert len(found.sites()) == 32 and len(found.projections(("joint.q", "joint.k", "joint.v", "joint.out"))) == 128
    assert found.channels == 4 and found.resolution == 64 and found.last is network.proj_out
    with pytest.raises(BadInput, match="has no projections"):
        found.projections(("cross.k",))
