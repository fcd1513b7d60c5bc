"""What comes from elsewhere, whole or damaged: read, or refused in one sentence that names it."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from sfumato.data.cases import say
from sfumato.errors import BadInput
from sfumato.pipeline import lora


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("一张star的照片", "一张<x>的照片"),
        ("starの写真", "<x>の写真"),
        ("two stars", "two <x>s"),
        ("a star, a star", "a <x>, a <x>"),
        ("a starfish", "a starfish"),
        ("superstar", "superstar"),
        ("star_1", "star_1"),
    ],
)
def test_a_concept_is_found_in_any_script_and_in_the_plural(prompt, said):
    assert say(prompt, "star", "<x>") == said


def test_a_concept_in_a_script_without_spaces():
    assert say("美しい星の写真", "星", "<x>") == "美しい<x>の写真"


@pytest.fixture(scope="module")
def anatomy(tiny_sd):
    return tiny_sd.anatomy


def factors(anatomy, rank=2):
    """Layer -> (down, up) of two layers of cross attention."""
    layers = sorted(name for name in anatomy.targets(("cross.k", "cross.out")))[:2]
    rng = torch.Generator().manual_seed(0)
    made = {}
    for name in layers:
        out, width = anatomy.network.get_submodule(name).weight.shape
        made[name] = torch.randn(rank, width, generator=rng), torch.randn(out, rank, generator=rng)
    return made


def spell(style, made, alpha=None):
    """The factors in one of the spellings in which LoRA files are found."""
    tensors = {}
    for name, (down, up) in made.items():
        flat, old = name.replace(".", "_"), name.replace(".to_out.0", ".to_out")
        module, _, which = old.rpartition(".")
        keys = {
            "peft": (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
            "named": (f"unet.{name}.lora_A.default.weight", f"unet.{name}.lora_B.default.weight"),
            "diffusers": (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"),
            "dotted": (f"unet.{name}.lora_down.weight", f"unet.{name}.lora_up.weight"),
            "lora.down": (f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight"),
            "processor": tuple(f"unet.{module}.processor.{which}_lora.{way}.weight" for way in ("down", "up")),
            "bare": tuple(f"{module}.processor.{which}_lora.{way}.weight" for way in ("down", "up")),
            "webui": (f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight"),
        }[style]
        tensors |= {keys[0]: down, keys[1]: up}
        if alpha is not None:
            tensors[re.sub(r"\.(lora|processor).*", "", keys[0]) + ".alpha"] = torch.tensor(float(alpha))
    return {k: x.clone() for k, x in tensors.items()}


STYLES = ("peft", "named", "diffusers", "dotted", "lora.down", "processor", "bare", "webui")


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_of_a_lora_gives_the_same_factors(style, anatomy, tmp_path):
    made = factors(anatomy)
    save_file(spell(style, made), tmp_path / "a.safetensors")
    state, rank, alpha = lora.read(tmp_path / "a.safetensors", anatomy)
    assert rank == alpha == 2 and len(state) == 4
    for name, (down, up) in made.items():
        assert torch.equal(state[f"{name}.down"], down) and torch.equal(state[f"{name}.up"], up)


@pytest.mark.parametrize(
    ("style", "beside", "header", "alpha"),
    [
        ("webui", 6, {}, 6),
        ("dotted", 6, {}, 6),
        ("lora.down", 6, {}, 6),
        ("webui", 6, {"ss_network_alpha": "6"}, 6),
        ("webui", None, {"ss_network_alpha": "6"}, 6),
        ("diffusers", None, {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 6}'}, 6),
        ("diffusers", None, {"lora_adapter_metadata": '{"unet.lora_alpha": 6, "unet.use_rslora": true}'}, 6 * 2**0.5),
        ("diffusers", None, {"lora_adapter_metadata": '{"text_encoder.lora_alpha": 6}'}, 2),
        ("diffusers", None, {"network_alphas": '{"unet.a": 6, "unet.b": 6}'}, 6),
        ("diffusers", None, {"ss_network_alpha": "None"}, 2),
    ],
)
def test_the_strength_of_a_lora_is_read_wherever_it_stands(style, beside, header, alpha, anatomy, tmp_path):
    save_file(spell(style, factors(anatomy), beside), tmp_path / "a.safetensors", metadata=header)
    assert lora.read(tmp_path / "a.safetensors", anatomy)[2] == pytest.approx(alpha)


def test_the_strength_of_a_peft_folder_is_in_its_configuration(anatomy, tmp_path):
    save_file(spell("peft", factors(anatomy)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6, "target_modules": ["to_k"]}')
    assert lora.read(tmp_path / "adapter_model.safetensors", anatomy)[2] == 6


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"ss_network_alpha": "6"}, "several alphas"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 6}'}, "several alphas"),
        ({"lora_adapter_metadata": '{"unet.r": 4}'}, "has rank 2, and"),
        ({"lora_adapter_metadata": '{"unet.alpha_pattern": {"to_k": 3}}'}, "tells several alphas"),
        ({"lora_adapter_metadata": '{"unet.use_dora": true}'}, "is a DoRA"),
        ({"lora_adapter_metadata": "[1]"}, "a list, not an object"),
        ({"lora_adapter_metadata": "{"}, "not valid JSON"),
        ({"ss_network_alpha": "strong"}, "is no number"),
        ({"network_alphas": '{"unet.a": 6, "unet.b": 7}'}, "one alpha"),
    ],
)
def test_strengths_that_contradict_each_other_are_refused(header, told, anatomy, tmp_path):
    save_file(spell("webui", factors(anatomy), 3), tmp_path / "a.safetensors", metadata=header)
    refused(lambda: lora.read(tmp_path / "a.safetensors", anatomy), told, "a.safetensors")


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight", "a part for the text encoder"),
        ("lora_te_text_model_encoder_layers_0_q_proj.lora_down.weight", "a part for the text encoder"),
        ("lora_te1_text_model_encoder_layers_0_q_proj.lora_down.weight", "a part for the text encoder"),
        ("lora_unet_mid.hada_w1_a", "LyCORIS"),
        ("lora_unet_mid.lokr_w1", "LyCORIS"),
        ("unet.mid.lora_magnitude_vector.weight", "DoRA"),
        ("unet.mid.lora_B.bias", "biases"),
        ("unet.nowhere.lora_A.weight", "has no layer for unet.nowhere"),
        ("something", "has no layer for something"),
    ],
)
def test_what_a_lora_holds_beyond_two_factors_is_named(key, told, anatomy, tmp_path):
    save_file(spell("diffusers", factors(anatomy)) | {key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refused(lambda: lora.read(tmp_path / "a.safetensors", anatomy), told, "a.safetensors")


def refused(work, told, name=""):
    """``work`` ends in one sentence with ``told`` in it, that names the file and is none of Python's."""
    with pytest.raises(BadInput) as caught:
        work()
    sentence = str(caught.value)
    assert told in sentence and name in sentence
    assert "\n" not in sentence and not re.search(r"NoneType|object at 0x|__\w+__|Error\b|positional", sentence)
    assert len(re.sub(r"/\S+/", "", sentence)) <= 300
