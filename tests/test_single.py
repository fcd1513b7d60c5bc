from __future__ import annotations

import json
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato as sf
from sfumato.errors import BadInput
from sfumato.pipeline.single import infer, names
from sfumato.pipeline.single.facts import Facts, check_precision, layout_of
from sfumato.pipeline.single.read import told_prediction
from single_cases import ALPHAS, config_folder, make, original

LAYOUT = {"sd1": names.SD1, "sd2": names.SD2, "sdxl": names.SDXL}
KINDS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def pipes():
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tensors(pipes):
    return {kind: original(pipe, kind) for kind, pipe in pipes.items()}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sf.load(path, "cpu", **options)


def same_weights(one, other, parts=("unet", "transformer", "vae", "text_encoder", "text_encoder_2")):
    for part in parts:
        a, b = (getattr(pipe, part, None) for pipe in (one, other))
        if a is not None:
            a, b = ({k.removeprefix("text_model."): x for k, x in m.state_dict().items()} for m in (a, b))
            assert a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_pipeline_it_was_made_of(kind, pipes, tensors, tmp_path, no_network):
    file = tmp_path / "whatever.bin"  # its name says nothing
    save_file(tensors[kind], file)
    p = load(file, prediction="eps")
    same_weights(p.pipe, pipes[kind])
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipes[kind], part, None) is not None:
            ours, theirs = (getattr(pipe, part).config for pipe in (p.pipe, pipes[kind]))
            names = (
                ("hidden_act", "num_attention_heads")
                if part.startswith("text")
                else ("scaling_factor", "block_out_channels")
            )
            for name in names:
                assert getattr(ours, name, None) == getattr(theirs, name, None) or list(ours[name]) == list(
                    theirs[name]
                )
    generator = lambda: torch.Generator().manual_seed(3)
    given = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt", "generator": generator()}
    theirs = pipes[kind]("a painting of a cat", **given).images
    ours = p("a painting of a cat", **{**given, "generator": generator()}).images
    assert torch.equal(ours, theirs) and ours.std() > 0.01


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:2]), "sdxl"])
def test_diffusers_reads_the_same_bits(kind, pipes, tensors, tmp_path, no_network):
    save_file(tensors[kind], tmp_path / "m.safetensors")
    folder = config_folder(pipes[kind], tmp_path / "configs")
    theirs = type(pipes[kind]).from_single_file(tmp_path / "m.safetensors", config=str(folder), local_files_only=True)
    same_weights(load(tmp_path / "m.safetensors", prediction="eps").pipe, theirs)


def test_half_precision_averages_tables_and_marks_do_not_disturb(tensors, tmp_path):
    half = {k: x.half() for k, x in tensors["sd1"].items()}
    more = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): x for k, x in half.items() if k.startswith("model.")
    }
    spare = {"alphas_cumprod": ALPHAS.float(), "model_ema.decay": torch.tensor(0.9999), "global_step": torch.tensor(3)}
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(half | {k: x.clone() for k, x in more.items()} | spare | ids, tmp_path / "m.safetensors")
    p = load(tmp_path / "m.safetensors")
    assert p.dtype == torch.float32
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(p.network.conv_in.weight, half[key].float())
    wrong = {**half, "alphas_cumprod": ALPHAS.float().sqrt()}
    refused(wrong, tmp_path, "another noise schedule")


def facts(tensors, header=None):
    """A file's header, without the file."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
    shapes = {k: tuple(x.shape) for k, x in tensors.items()}
    return Facts(
        Path("m.safetensors"), shapes, {k: kinds.get(x.dtype, "I64") for k, x in tensors.items()}, header or {}
    )


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_clips_names_may_lack_their_prefix(kind, tensors, tmp_path):
    """As converters write them that copy the names of transformers 5."""
    bare = {key.replace(".text_model.", "."): x for key, x in tensors[kind].items()}
    assert bare.keys() != tensors[kind].keys()
    save_file(bare, tmp_path / "bare.safetensors")
    save_file(tensors[kind], tmp_path / "full.safetensors")
    same_weights(*(sf.load(tmp_path / f"{name}.safetensors", "cpu").pipe for name in ("bare", "full")))


def test_what_is_predicted(tensors, tmp_path):
    def told(kind, asked=None, header=None, **more):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return told_prediction(facts({**tensors[kind], **more}, header), LAYOUT[kind], asked)

    assert told("sd1") == told("sdxl") == told("sd2", "eps") == "eps" and told("sd1", "v") == "v"
    with pytest.warns(UserWarning, match="--prediction eps"):
        assert told_prediction(facts(tensors["sd2"]), LAYOUT["sd2"], None) == "v"
    assert told("sdxl", v_pred=torch.zeros(0)) == "v"
    says = {"modelspec.prediction_type": "epsilon"}
    assert told("sd2", header=says) == "eps" and told("sd1", header={"modelspec.prediction_type": "v"}) == "v"
    with pytest.warns(UserWarning, match="says that it predicts eps: it is read as v, as asked"):
        assert told_prediction(facts(tensors["sd2"], says), LAYOUT["sd2"], "v") == "v"
    made = infer.configs(facts({**tensors["sdxl"], "ztsnr": torch.zeros(0)}), LAYOUT["sdxl"], "v_prediction")
    assert made["scheduler"]["rescale_betas_zero_snr"] and made["scheduler"]["prediction_type"] == "v_prediction"
    for predicted, side in (("v_prediction", 96), ("epsilon", 64)):
        assert infer.configs(facts(tensors["sd2"]), LAYOUT["sd2"], predicted)["unet"]["sample_size"] == side
    with pytest.raises(BadInput, match="says itself that it predicts v: leave prediction out"):
        sf.load("sketch", "cpu", prediction="eps")


def no_model(tensors, match):
    with pytest.raises(BadInput, match=match) as caught:
        layout_of(facts(tensors))
    assert "\n" not in str(caught.value)


def refused(tensors, folder, match):
    file = folder / "bad.safetensors"
    save_file(tensors, file)
    with pytest.raises(BadInput, match=match) as caught:
        sf.load(file, "cpu", prediction="eps")
    assert "\n" not in str(caught.value)


UNET, VAE = "model.diffusion_model.", "first_stage_model."


def test_parts_of_models_are_refused(tensors, tmp_path):
    whole = tensors["sd1"]
    only = lambda *prefixes: {k: x for k, x in whole.items() if k.startswith(prefixes)}
    no_model(only(UNET), "a part of a model.*no autoencoder and no text encoder")
    no_model(only(UNET, VAE), "a part of a model.*no text encoder: ")
    no_model(only(UNET, "cond"), "a part of a model.*no autoencoder: ")
    no_model(only(VAE, "cond"), "no denoising network")
    no_model(only(VAE), "an autoencoder alone")
    no_model({k.removeprefix(VAE): x for k, x in only(VAE).items()}, "an autoencoder alone")
    one = {k: x for k, x in tensors["sdxl"].items() if "embedders.1" not in k}
    no_model(one, "not the text encoders of one layout")
    gone = {k: x for k, x in whole.items() if "output_blocks.2.0.in_layers.2.bias" not in k}
    refused(gone, tmp_path, r"lacks model.diffusion_model.output_blocks.2.0.in_layers.2.bias")


def test_other_kinds_of_files_are_refused_by_what_they_are(pipes, tensors):
    whole, x = tensors["sd1"], torch.zeros(4, 4)
    for key, match in (
        ("lora_unet_mid.lora_down.weight", "a LoRA or a relative"),
        ("unet.mid.lora_A.weight", "a LoRA or a relative"),
        ("lora_unet_mid.hada_w1_a", "a LoRA or a relative"),
        ("emb_params", "a learned word"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "of a family whose single files are not read"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "of a family whose single files"),
        ("transformer_blocks.0.attn.to_q.weight", "of a family whose single files"),
        ("some.thing", "begins with some.thing"),
    ):
        no_model({key: x}, match)
    no_model(pipes["sd1"].unet.state_dict(), "one network out of a diffusers folder")
    first = f"{UNET}input_blocks.0.0.weight"
    for channels, what in ((9, "inpainting"), (8, "picture-editing"), (5, "depth-to-image")):
        no_model({**whole, first: torch.zeros(32, channels, 3, 3)}, f"{what} checkpoint")
    moved = {k.replace("embedders.1", "embedders.0"): v for k, v in tensors["sdxl"].items() if "embedders.0" not in k}
    no_model(moved, "is a refiner")
    no_model({**whole, "edm_mean": x}, "EDM")


def test_what_does_not_fit_is_named(tensors, tmp_path):
    whole, x = tensors["sd1"], torch.zeros(4, 4)
    more = {**whole, f"{UNET}extra.weight": x, "odd": x.clone()}
    refused(more, tmp_path, "none of its networks uses: model.diffusion_model.extra.weight, odd:")
    other = {**whole, f"{UNET}out.0.weight": torch.zeros(5)}
    refused(other, tmp_path, r"out.0.weight is \(5,\), where \(32,\) is expected")
    words = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    refused({**whole, words: torch.zeros(100, 64)}, tmp_path, "knows 100 tokens")


def test_precisions(tensors, tmp_path):
    whole, key = tensors["sd1"], f"{UNET}input_blocks.0.0.weight"
    mixed = {**whole, key: whole[key].half()}
    refused(mixed, tmp_path, "mixes precisions in its unet: .* is float32, .* is float16: say which .*--dtype")
    assert load(tmp_path / "bad.safetensors", dtype=torch.float32).dtype == torch.float32
    check_precision(facts(mixed), "vae", {k for k in whole if k.startswith(VAE)}, False)  # each part is looked at alone
    with pytest.raises(BadInput, match="in F8_E4M3"):
        check_precision(facts({**whole, key: whole[key].to(torch.float8_e4m3fn)}), "unet", {key}, True)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"PK\x03\x04rest", "is a pickle"),
        (b"\x80\x02}q", "is a pickle"),
        (b"GGUF\x03", "GGUF"),
        (b"", "truncated or corrupt"),
        (b"\xff" * 64, "truncated or corrupt"),
    ],
)
def test_files_that_are_no_safetensors(data, match, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(BadInput, match=match):
        sf.load(tmp_path / "m.safetensors", "cpu")


def test_the_tokenizer_is_clips(real_clip_tokenizer):
    from sfumato.pipeline.single.read import read_tokenizer

    openai, openclip = read_tokenizer("<|endoftext|>"), read_tokenizer("!")
    text = "A photo of Élodie's café, 3 cats & a ☆!"
    assert openai.get_vocab() == openclip.get_vocab() == real_clip_tokenizer.get_vocab()
    assert openai(text).input_ids == real_clip_tokenizer(text).input_ids
    # what pads is a special token, so that OpenCLIP's "!" stands for itself also where it ends a sentence
    whole = openclip(text, padding="max_length", max_length=77).input_ids
    assert whole[: len(whole) - whole[::-1].index(49407)][:-3] == real_clip_tokenizer(text).input_ids[:-3]
    assert whole[-1] == 0 and openai(text, padding="max_length", max_length=77).input_ids[-1] == 49407


def test_the_licence_of_the_vocabulary_stands_beside_it():
    from sfumato.pipeline.single.read import MERGES

    assert "MIT License" in (MERGES.parent / "LICENSE").read_text() and MERGES.stat().st_size < 250_000


def test_on_the_command_line(tensors, tmp_path, capsys):
    from sfumato.cli import main

    save_file(tensors["sd2"], tmp_path / "m.safetensors")
    line = [
        "erase",
        "uce",
        "--model",
        str(tmp_path / "m.safetensors"),
        "--concept",
        "cat",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*line, "--prediction", "eps"]) == 0
    p = sf.load(tmp_path / "out", "cpu")
    assert p.prediction == "eps"
    record = json.loads((tmp_path / "out" / "sfumato.json").read_text())
    assert record["provenance"]["parent"]["model"] == str(tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == tensors["sd2"].keys()


PUBLISHED = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize(
    "kind", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow)]
)
def test_networks_of_published_size(kind):
    """Without weights: diffusers' converter finds each name, and our shapes give the published configuration back."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    from sfumato.pipeline.single import infer, names
    from sfumato.pipeline.single.facts import Facts, layout_of
    from sfumato.pipeline.single.read import slots_of
    from single_cases import clip

    layout = {"sd1": names.SD1, "sd2": names.SD2, "sdxl": names.SDXL}[kind]
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with init_empty_weights():
        parts = {
            "unet": UNet2DConditionModel(**PUBLISHED[kind]),
            "vae": AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2),
            "text_encoder": clip(768, layers=12) if kind != "sd2" else clip(1024, act="gelu", layers=23),
        }
        if kind == "sdxl":
            parts["text_encoder_2"] = clip(1280, True, "gelu", 32)
    shapes = {}
    for part, module in parts.items():
        slots = slots_of(layout, part, module)
        shapes |= {slot.key: slot.shape(module.get_parameter(name).shape) for name, slot in slots.items()}
    found = Facts(Path("model"), shapes, {}, {})
    assert layout_of(found) is layout
    found = infer.configs(found, layout, "epsilon")
    for name, value in PUBLISHED[kind].items():
        ours = found["unet"][name]
        assert (ours if isinstance(ours, (str, int)) else tuple(ours)) in (value, (value,) * 4), name
    assert found["vae"]["block_out_channels"] == [128, 256, 512, 512] and found["vae"]["layers_per_block"] == 2
    assert found["text_encoder"]["num_hidden_layers"] == parts["text_encoder"].config.num_hidden_layers
    made = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    theirs = convert_ldm_unet_checkpoint(dict(made), parts["unet"].config)
    assert {k: x.shape for k, x in theirs.items()} == {k: x.shape for k, x in parts["unet"].named_parameters()}
    theirs = convert_ldm_vae_checkpoint(dict(made), parts["vae"].config)
    assert {k: x.shape for k, x in theirs.items()} == {k: x.shape for k, x in parts["vae"].named_parameters()}
