"""`ImageModel`: one denoiser for pictures and frames, sampling by seed, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato as sf
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Bounded, Cosine, GaussianProcess, Interpolated, Shifted
from sfumato.noise.config import from_config, to_config
from sfumato.pipeline import ImageModel

PROCESSES = [
    GaussianProcess(Cosine()),
    GaussianProcess(Shifted(Cosine(-10, 10), 32, 64), "ve"),
    GaussianProcess(Bounded(Interpolated(Cosine(), 32, 128, 128), -15, 15)),
]


@pytest.fixture
def model() -> ImageModel:
    torch.manual_seed(0)
    network = UNet(8, 3, classes=2, channels=(8, 8), layers=1, attention=(4,))
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    return ImageModel(network.eval(), PROCESSES[0], "v", (3, 8, 8), ("cat", "dog"), {"sampling_steps": 3})


@pytest.mark.parametrize("process", PROCESSES)
def test_processes_survive_json(process):
    assert from_config(json.loads(json.dumps(to_config(process)))) == process


def test_saved_processes_name_no_foreign_class():
    with pytest.raises(BadInput, match="unknown noise process"):
        from_config({"class": "Denoiser"})
    with pytest.raises(BadInput, match="unknown noise process"):
        from_config({"class": "annotations"})
    with pytest.raises(BadInput, match="does not fit"):
        from_config({"class": "Cosine", "height": 3})


def test_a_fresh_network_predicts_nothing():
    network = UNet(8, 3, channels=(8, 8), layers=1)
    assert not network(torch.randn(2, 3, 8, 8), torch.zeros(2)).any()


def test_time_may_come_in_any_shape_that_means_one_per_picture(model):
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.3])
    expected = model.denoiser(z, t)
    for same in (0.3, t[:, None, None, None], t[:1], t.double()):
        torch.testing.assert_close(model.denoiser(z, same), expected)
    with pytest.raises(ValueError, match="one per picture"):
        model.denoiser(z, torch.rand(2, 1, 8, 8))


def test_frames_have_a_time_each():
    class Frames(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, z, logsnr, labels):
            return logsnr[..., None, None, None].expand_as(z)

    clip = ImageModel(Frames(), PROCESSES[0], "v", (4, 1, 2, 2))
    t = torch.rand(3, 4)
    found = clip.denoiser(torch.zeros(3, 4, 1, 2, 2), t)[:, :, 0, 0, 0]
    torch.testing.assert_close(found, Cosine().logsnr(t).float())
    torch.testing.assert_close(clip.denoiser(torch.zeros(3, 4, 1, 2, 2), t[:1])[:, :, 0, 0, 0], found[:1].expand(3, 4))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "addim", "heun", "dpm++"])
def test_a_picture_depends_on_its_seed_alone(model, sampler):
    together = model.draw(["cat", "dog", "cat"], [5, 6, 7], scheduler=sampler, cfg_scale=2.0)
    alone = model.draw("dog", 6, scheduler=sampler, cfg_scale=2.0)
    torch.testing.assert_close(together[1:2], alone)
    assert together.shape == (3, 3, 8, 8) and 0 <= together.min() <= together.max() <= 1


def test_guidance_of_one_and_an_empty_interval_are_no_guidance(model):
    plain = model.draw("cat", 1)
    assert torch.equal(model.draw("cat", 1, cfg_scale=3.0, cfg_interval=(90, 91)), plain)
    assert not torch.equal(model.draw("cat", 1, cfg_scale=3.0), plain)


def test_saved_and_loaded_it_samples_the_same(model, tmp_path):
    model.save(tmp_path / "m", provenance={"recipe": "test"})
    loaded = sf.load(tmp_path / "m", "cpu")
    # Equal weights (the hash below); kernels may still round differently where a file leaves them in memory.
    torch.testing.assert_close(loaded.draw("dog", 3), model.draw("dog", 3))
    assert loaded.describe() == model.describe() and loaded.defaults == model.defaults
    with pytest.raises(BadInput, match="exists already"):
        model.save(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": ["os", "system"]}, "does not have"),
        ({"process": {"class": "Nothing"}}, "unknown noise process"),
        ({"network": ["sfumato.nets", ["UNet"]]}, "does not have"),
        ({"network": "UNet"}, "network in .* is text, not a list"),
        ({"prediction": None}, "prediction in .* is null or absent, not text"),
        ({"shape": "wide"}, "shape in .* is text, not a list"),
        ({"labels": None}, "it lacks 'labels'"),
        ({"defaults": 3}, "cannot be read as a UNet"),
    ],
)
def test_a_damaged_index_is_refused(model, tmp_path, change, message):
    index = model.save(tmp_path / "m") / "model_index.json"
    value = {**json.loads(index.read_text()), **change}
    index.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
    with pytest.raises(BadInput, match=message):
        sf.load(tmp_path / "m", "cpu")


def test_missing_weights_are_refused(model, tmp_path):
    (file,) = (model.save(tmp_path / "m") / "network").glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("unet.conv_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"unet\.conv_out\.weight"):
        sf.load(tmp_path / "m", "cpu")


def test_bad_requests(model):
    with pytest.raises(BadInput, match="unknown scheduler"):
        model.draw(None, 1, scheduler="euler")
    with pytest.raises(BadInput, match="did you mean cat"):
        model.draw("cta", 1)
    with pytest.raises(BadInput, match="2 things asked for and 3 seeds"):
        model.draw(["cat", "dog"], [1, 2, 3])
