from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import make_tiny_sdxl
from sfumato.errors import BadInput
from sfumato.pipeline import Noised, load, wrap

PIPES = ["tiny_sd", "tiny_sdxl"]


@pytest.fixture(params=PIPES)
def p(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def saved(tiny_sd, tmp_path):
    return tiny_sd.save(tmp_path / "model")


def test_what_is_saved_is_loaded_bit_for_bit(p, tmp_path):
    folder = p.save(tmp_path / "model", provenance={"method": "none", "seed": 3})
    again = load(folder, device="cpu")
    assert type(again) is type(p) and again.describe() == p.describe()
    assert torch.equal(again.draw("a red star", 1, sampling_steps=2), p.draw("a red star", 1, sampling_steps=2))
    record = json.loads((folder / "sfumato.json").read_text())
    assert record["provenance"] == {"method": "none", "seed": 3}
    assert record["description"]["sha256"] == p.describe()["sha256"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and p.describe()["sha256"] in card
    assert os.listdir(tmp_path) == ["model"]


def test_what_is_saved_loads_in_diffusers(p, tmp_path):
    from diffusers import DiffusionPipeline

    folder = p.save(str(tmp_path / "model"))
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    theirs = pipe(
        "a red star", num_inference_steps=2, guidance_scale=3.0, output_type="pt", generator=generator
    )
    ours = p.draw("a red star", 1, sampling_steps=2, cfg_scale=3.0)
    torch.testing.assert_close(theirs.images, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_is_saved_loads_without_this_package(p, tmp_path):
    folder = p.save(tmp_path / "model")
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline;"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True);"
        "pipe.set_progress_bar_config(disable=True);"
        "x = pipe('a red star', num_inference_steps=2, guidance_scale=3.0, output_type='pt',"
        "         generator=torch.Generator().manual_seed(1)).images;"
        "assert 'sfumato' not in sys.modules; torch.manual_seed(0); import safetensors.torch as s;"
        "s.save_file({'x': x}, sys.argv[2])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = tmp_path / "x.safetensors"
    subprocess.run(
        [sys.executable, "-c", code, str(folder), str(out)], check=True, env=environment, timeout=300
    )
    ours = p.draw("a red star", 1, sampling_steps=2, cfg_scale=3.0)
    torch.testing.assert_close(load_file(out)["x"], ours, rtol=0, atol=1e-5)


def test_files_suit_every_version_of_transformers(p, tmp_path):
    folder = p.save(tmp_path / "model")
    for tokenizer, encoder in p.text_parts():
        with safe_open(folder / encoder / "model.safetensors", "pt") as opened:
            names = set(opened.keys())
        assert all(n.startswith(("text_model.", "text_projection.")) for n in names)
        assert "text_model.embeddings.token_embedding.weight" in names
        vocab = json.loads((folder / tokenizer / "vocab.json").read_text(encoding="utf-8"))
        assert vocab == getattr(p.pipe, tokenizer).get_vocab()
        merges = (folder / tokenizer / "merges.txt").read_text(encoding="utf-8").split("\n")
        assert "sta r</w>" in merges


def test_sampling_defaults_travel_with_the_folder(tiny_sd, tmp_path):
    p = tiny_sd.copy()
    assert p.defaults["cfg_scale"] == 7.5
    p.defaults["cfg_scale"] = 3.0
    folder = p.save(tmp_path / "model")
    assert load(folder, device="cpu").defaults["cfg_scale"] == 3.0
    (folder / "sfumato.json").write_text("not ours")
    assert load(folder, device="cpu").defaults["cfg_scale"] == 7.5


def test_dtype(saved):
    p = load(saved, device="cpu", dtype=torch.bfloat16)
    assert p.dtype == torch.bfloat16
    x = p.draw("a red star", 0, sampling_steps=2)
    assert x.dtype == torch.float32 and x.isfinite().all()


@torch.no_grad()
def test_in_float16_the_pipeline_s_own_call_draws_too(p, tmp_path):
    """Its autoencoder overflows in float16, and computes in float32; diffusers gives it what the network has."""
    made = load(p.save(tmp_path / "model"), device="cpu", dtype=torch.float16)
    made.pipe.set_progress_bar_config(disable=True)
    ask = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "pt"}
    called = made.pipe("a red star", generator=torch.Generator().manual_seed(0), **ask).images
    assert called.dtype == torch.float32 and called.isfinite().all()
    assert made.draw("a red star", 0, sampling_steps=1, cfg_scale=1.0).isfinite().all()
    again = load(made.copy("all").save(tmp_path / "again"), device="cpu", dtype=torch.float16)
    by_layers = load(tmp_path / "again", device="cpu", dtype=torch.float16)
    cpu_offload(by_layers.pipe.vae, torch.device("cpu"))
    z, x = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16, 16)
    for vae in (one.pipe.vae for one in (made, made.copy(), made.copy("all"), again, by_layers)):
        assert vae.dtype == torch.float32 and made.dtype == again.dtype == torch.float16
        pictures = [vae.decode(half).sample for half in (z.half(), z.half().float())]
        latents = [vae.encode(half).latent_dist.mean for half in (x.half(), x.half().float())]
        assert torch.equal(*pictures) and torch.equal(*latents) and pictures[0].dtype == torch.float32


def test_a_float16_pipeline_that_is_wrapped_draws_and_encodes_and_stays_as_it_was(tmp_path_factory):
    """Its autoencoder's activations leave float16 and come back, as in the released one of SDXL."""
    made = [make_tiny_sdxl(tmp_path_factory) for _ in range(2)]
    for pipe in made:
        with torch.no_grad():
            for half in (pipe.vae.encoder, pipe.vae.decoder):
                half.mid_block.resnets[1].conv2.weight.mul_(4e5)
    exact, pipe = made[0], made[1].to(torch.float16)
    assert all(x.isfinite().all() for x in pipe.vae.parameters())
    p, x = wrap(pipe), 2 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    z = p.encode_image(x.half())
    torch.testing.assert_close(z.float(), wrap(exact).encode_image(x), rtol=0.02, atol=0.02)
    seen = x.clone().requires_grad_()
    mean, _ = p.posterior(seen)
    (slope,) = torch.autograd.grad(mean.sum(), seen)
    assert slope.isfinite().all() and slope.any()
    pictures = p.decode_latents(z)
    torch.testing.assert_close(pictures.float(), wrap(exact).decode_latents(z.float()), rtol=0.02, atol=0.02)
    assert p.draw("a red star", 3, sampling_steps=2).isfinite().all()
    start = Noised((x + 1) / 2, 0.6)
    assert p.copy().draw("a red star", 3, sampling_steps=2, start=start).isfinite().all()
    assert {x.dtype for x in pipe.vae.parameters()} == {torch.float16}
    cpu_offload(pipe.vae, torch.device("cpu"))
    with pytest.raises(BadInput, match="make it float32 before"):
        p.encode_image(x)


def test_an_existing_folder_is_kept_unless_overwritten(tiny_sd, saved):
    before = (saved / "model_index.json").stat().st_mtime_ns
    with pytest.raises(BadInput, match="exists already"):
        tiny_sd.save(saved)
    assert (saved / "model_index.json").stat().st_mtime_ns == before
    (saved / "old").touch()
    tiny_sd.save(saved, overwrite=True)
    assert not (saved / "old").exists()


def test_a_full_disk_leaves_nothing(tiny_sd, tmp_path, monkeypatch):
    import errno

    from diffusers import AutoencoderKL

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full)
    with pytest.raises(BadInput, match="disk is full"):
        tiny_sd.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_hash_is_of_the_weights_alone(tiny_sd, tiny_sd_eps):
    sha = tiny_sd.describe()["sha256"]
    assert tiny_sd.copy().describe()["sha256"] == sha == tiny_sd.copy("all").describe()["sha256"]
    assert tiny_sd_eps.describe()["sha256"] == sha  # the same weights under another scheduler
    changed = tiny_sd.copy("full")
    with torch.no_grad():
        next(iter(changed.parameters("full").values())).view(-1)[0] += 1
    assert changed.describe()["sha256"] != sha


def test_description(p):
    d = p.describe()
    assert d["family"] == p.family and d["prediction"] == p.denoiser.prediction and d["size"] == 16
    assert d["schedule"] == {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timesteps": 1000,
        "rescale_betas_zero_snr": False,
    }
    assert d["parameters"]["unet"] == sum(w.numel() for w in p.parameters("full").values())
    assert len(d["sha256"]) == 64 and "sha256" not in p.describe(weights=False)


def refused(model, match):
    with pytest.raises(BadInput, match=match) as caught:
        load(model, device="cpu")
    assert "\n" not in str(caught.value)


def test_names_that_are_no_models(tmp_path):
    refused("skecth", "there is no model 'skecth': give an embedded one \\(sketch, sketch-dit\\)")
    refused(tmp_path / "nowhere", "there is no model")
    refused(tmp_path, "no model_index.json")


def test_pickles_are_refused_with_a_way_out(saved, tmp_path):
    for name in ("model.ckpt", "model.pt", "model.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        refused(tmp_path / name, "is a pickle.*save_pretrained")
    only = tmp_path / "only"
    only.mkdir()
    (only / "model.ckpt").write_bytes(b"\x80\x04.")
    refused(only, "holds a pickle \\(model.ckpt\\)")
    (saved / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (saved / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(saved, r"unet/diffusion_pytorch_model\.bin is a pickle.*save_pretrained")


def test_a_single_file_of_an_unknown_layout_is_refused_with_a_way_out(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "single file.*begins with x: .* give its diffusers folder")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_weights_are_named(saved, damage):
    file = saved / "vae" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(
        {"truncated": data[: len(data) // 2], "header": b"\xff" * 64 + data[64:], "empty": b""}[damage]
    )
    refused(saved, r"vae/diffusion_pytorch_model\.safetensors cannot be read: it is truncated or corrupt")


@pytest.mark.parametrize(
    ("file", "weight"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("text_encoder/model.safetensors", "text_model.final_layer_norm.weight"),
    ],
)
def test_missing_weights_are_refused(saved, file, weight):
    tensors = load_file(saved / file)
    tensors.pop(weight)
    save_file(tensors, saved / file, metadata={"format": "pt"})
    refused(saved, weight.removeprefix("text_model."))


def test_unsupported_families_are_refused_with_those_supported(saved):
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps({**index, "_class_name": "LuminaPipeline"}))
    refused(saved, "LuminaPipeline, which is not supported; supported are Stable Diffusion 1.x/2.x .* SDXL")
    for data in (b"{", b"[]", b"\xff\xfe{"):
        (saved / "model_index.json").write_bytes(data)
        refused(saved, "model_index.json")


def test_variants_with_other_inputs_are_refused(tiny_sd):
    from diffusers import DDPMPipeline, UNet2DConditionModel

    with pytest.raises(BadInput, match="DDPMPipeline, which is not supported"):
        wrap(DDPMPipeline(tiny_sd.network, tiny_sd.pipe.scheduler))
    pipe = tiny_sd.copy().pipe
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    with pytest.raises(BadInput, match="inpainting"):
        wrap(pipe)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    from diffusers import DiffusionPipeline

    def offline(*args, **kwargs):
        raise OSError("no network")

    # The hub answers, but not with this.
    monkeypatch.setattr(sys.modules["sfumato.pipeline.load"], "require_hub", lambda *args: None)
    monkeypatch.setattr(DiffusionPipeline, "load_config", offline)
    refused("somebody/something", "neither a folder here nor a diffusers pipeline that can be fetched")
