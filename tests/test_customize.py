"""Customisation: files that diffusers alone loads, the command, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sfumato import cli, customize
from sfumato.customize import DreamBoothLoRA, TextualInversion, anchored_composition, dreambooth_lora
from sfumato.customize.parts import crafting
from sfumato.data.pictures import read_pictures
from sfumato.errors import BadInput
from sfumato.pipeline import wrap
from sfumato.pipeline.customization import HEADER, HOW, Customization, attach, holds_one, load, save
from sfumato.pipeline.equip import equip
from sfumato.pipeline.lora import Product
from sfumato.train.words import Latents, denoising_loss

PROMPTS = ["a <mine>", "a star"]


@pytest.fixture
def learned(request):
    """Two new words, one of two vectors, and a product, for a pipeline."""

    def make(pipe) -> Customization:
        rng, words = torch.Generator().manual_seed(0), {}
        for word, vectors in (("<mine>", 2), ("<other>", 1)):
            encoders = [getattr(pipe.pipe, name) for _, name in pipe.text_parts()]
            widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
            words[word] = tuple(torch.randn(vectors, width, generator=rng) for width in widths)
        projection = pipe.projections("cross.k")[0]
        out, into = projection.shape
        down, up = torch.randn(2, into, generator=rng), torch.randn(out, 2, generator=rng)
        return Customization(words, {projection.name: Product(down, up, 1.0)}, about={"seed": 0})

    return make


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_a_file_is_attached_as_it_was_learned(name, learned, request, tmp_path):
    pipe = request.getfixturevalue(name)
    if name == "tiny_sd3":
        one = Customization(learned_words(pipe))
    else:
        one = learned(pipe)
    save(tmp_path / "mine.safetensors", one, pipe)
    assert holds_one(tmp_path / "mine.safetensors")
    direct, read = attach(pipe, [one]), equip(pipe, "tiny", [tmp_path / "mine.safetensors"])
    settings = {"sampling_steps": 2, "cfg_scale": 2.0}
    pictures = read.draw(PROMPTS, [1, 2], **settings)
    torch.testing.assert_close(pictures, direct.draw(PROMPTS, [1, 2], **settings), rtol=0, atol=1e-6)
    assert not torch.equal(pictures[0], pipe.draw(PROMPTS, [1, 2], **settings)[0])
    again = load(tmp_path / "mine.safetensors", pipe)
    assert all(torch.equal(a, b) for w in one.words for a, b in zip(one.words[w], again.words[w], strict=True))
    assert again.about == one.about


def learned_words(pipe):
    rng = torch.Generator().manual_seed(0)
    encoders = [getattr(pipe.pipe, name) for _, name in pipe.text_parts()]
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
    return {"<mine>": tuple(torch.randn(1, width, generator=rng) for width in widths)}


def test_diffusers_alone_loads_the_file(tiny_sd, learned, tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "mine.safetensors"
    save(file, one := learned(tiny_sd), tiny_sd)
    ours = attach(tiny_sd, [one]).draw("a <mine> <other>", 3, sampling_steps=2)
    bare = DiffusionPipeline.from_pretrained(tiny_sd.save(tmp_path / "model"))
    exec(HOW.format(path=file, words=list(one.words)), {"safetensors": safetensors, "pipe": bare})
    torch.testing.assert_close(wrap(bare).draw("a <mine> <other>", 3, sampling_steps=2), ours, rtol=0, atol=1e-5)


def test_diffusers_alone_loads_two_encoders_words(tiny_sdxl, tmp_path):
    words = learned_words(tiny_sdxl)
    save(tmp_path / "mine.safetensors", Customization(words), tiny_sdxl)
    tensors = load_file(tmp_path / "mine.safetensors")
    bare = DiffusionPipeline.from_pretrained(tiny_sdxl.save(tmp_path / "model"))
    for key, tok, enc in (("clip_l", "tokenizer", "text_encoder"), ("clip_g", "tokenizer_2", "text_encoder_2")):
        parts = {"tokenizer": getattr(bare, tok), "text_encoder": getattr(bare, enc)}
        bare.load_textual_inversion(tensors[key], token="<mine>", **parts)
    theirs = wrap(bare).encode("a <mine>").tokens
    torch.testing.assert_close(theirs, attach(tiny_sdxl, [Customization(words)]).encode("a <mine>").tokens)


def test_files_that_do_not_fit_are_refused(tiny_sd, tiny_sdxl, learned, tmp_path):
    save(tmp_path / "one.safetensors", learned(tiny_sd), tiny_sd)
    with pytest.raises(BadInput, match="does not fit"):
        equip(tiny_sdxl, "tiny", [tmp_path / "one.safetensors"])
    with pytest.raises(BadInput, match="already a word of this model: choose a new one, such as <mine-2>"):
        equip(tiny_sd, "tiny", [tmp_path / "one.safetensors"] * 2)
    with pytest.raises(BadInput, match="exists"):
        save(tmp_path / "one.safetensors", learned(tiny_sd), tiny_sd)


PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "pictures", "prompts", "told"),
    [
        ({"word": "star"}, PICTURES, None, "already a word"),
        ({"word": "my star"}, PICTURES, None, "one word without spaces"),
        ({"tokens": 11}, PICTURES, None, "new tokens do not fit"),
        ({"tokens": 9}, PICTURES, None, "do not fit into 'a photo of {}'"),
        ({}, PICTURES, ["a red star", "a blue circle"], "names none of what is to be learned"),
        ({}, PICTURES, ["a star"], "one prompt for each picture"),
        ({}, torch.cat([PICTURES, torch.full((1, 3, 16, 16), 0.5)]), None, "picture 2 is of one colour"),
        ({}, PICTURES * 255, None, "values in"),
        ({}, PICTURES[:0], None, "at least|tensor"),
        ({"templates": ("a photo",)}, PICTURES, None, "every template needs"),
    ],
)
def test_bad_input(tiny_sd, settings, pictures, prompts, told):
    with pytest.raises(BadInput, match=told):
        TextualInversion(**{**TextualInversion.EXAMPLE, **settings}).run(tiny_sd, pictures, prompts)


def test_the_class_must_be_named_to_be_kept(tiny_sd):
    with pytest.raises(BadInput, match="name the class"):
        DreamBoothLoRA(updates=1).run(tiny_sd, PICTURES)


@pytest.fixture(scope="module")
def given(tiny_sd, tmp_path_factory):
    """A model's folder, and one of pictures, the first with a prompt."""
    folder = tmp_path_factory.mktemp("given")
    tiny_sd.save(folder / "model")
    (folder / "mine").mkdir()
    for i in range(2):
        array = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / "mine" / f"{i}.png")
    (folder / "mine" / "0.txt").write_text("a red star")
    return folder


def test_the_command_learns_and_sample_draws(given, tmp_path, capsys):
    model, out = ["--model", str(given / "model"), "--device", "cpu"], tmp_path / "mine.safetensors"
    line = ["customize", "textual-inversion", *model, "--images", str(given / "mine"), "--out", str(out)]
    line += ["--updates", "2", "--batch", "2", "--init-word", "star", "--template", "a photo of {}", "--no-progress"]
    assert cli.main(line) == 0
    assert f'sfumato sample "a <mine>" --model {given / "model"} --adapter {out}' in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        assert list(file.keys()) == ["<mine>"]
        about = json.loads(file.metadata()[HEADER])["about"]
    assert about["method"]["name"] == "textual-inversion" and about["configuration"]["updates"] == 2
    assert len(about["losses"]) == 2 and not (tmp_path / "mine.safetensors.training").exists()
    drawn = ["a <mine>", "--adapter", str(out), "--steps", "2", "--out", str(tmp_path / "pictures")]
    assert cli.main(["sample", *drawn, *model]) == 0
    assert (tmp_path / "pictures" / "sheet.png").exists()
    assert cli.main(line) == 2 and "exists" in capsys.readouterr().err
    assert cli.main([*line[:-1], "--out", str(tmp_path / "mine.bin")]) == 2


def test_names_of_pictures_are_no_prompts(given, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        (photos / f"IMG_123{i}.png").write_bytes((given / "mine" / f"{i}.png").read_bytes())
    pictures, prompts = read_pictures(photos, 16, names=False)
    assert len(pictures) == 2 and prompts == ["", ""]
    assert read_pictures(photos, 16)[1] == ["IMG 1230", "IMG 1231"]
    model, out = ["--model", str(given / "model"), "--device", "cpu"], tmp_path / "mine.safetensors"
    line = ["customize", "textual-inversion", *model, "--images", str(photos), "--out", str(out), "--updates", "1"]
    assert cli.main([*line, "--template", "a photo of {}", "--no-progress"]) == 0
    (photos / "IMG_1231.txt").write_text("a <mine> at night")
    assert read_pictures(photos, 16, names=False)[1] == ["", "a <mine> at night"]


@pytest.mark.parametrize("name", ["DreamBoothLoRA", "AttenCraft", "AnchoredComposition"])
def test_pictures_that_keep_the_model_are_of_the_posterior_too(tiny_sd, name, monkeypatch):
    """Their latents are drawn anew, as those of the given pictures are, or both are means."""
    seen, few = [], torch.zeros(1, 1, *tiny_sd.latent_shape())
    watched = lambda pipe, z0, *rest: seen.append(z0) or denoising_loss(pipe, z0, *rest)
    for module in (dreambooth_lora, anchored_composition, crafting):
        monkeypatch.setattr(module, "denoising_loss", watched)
    monkeypatch.setattr(dreambooth_lora.DreamBoothLoRA, "prior", lambda self, pipe: Latents(few, few + 1))
    monkeypatch.setattr(crafting.Course, "of_prior", lambda self, pipe: Latents(few, few + 1))
    for sample in (False, True):
        seen.clear()
        method = getattr(customize, name)
        settings = {**method.EXAMPLE, "sample_posterior": sample, "batch": 4, "updates": 1}
        method(**settings).learn(tiny_sd, torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        z0 = seen[-1]
        assert len(z0) == 4 and (z0[0] - z0[1]).abs().max() > 0 if sample else not z0.any()
        assert not sample or float(z0.std()) == pytest.approx(1, abs=0.2)
