"""NaN and infinity are refused where weights, pictures and figures come in or go out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import cli
from sfumato.data.frames import open_frames
from sfumato.errors import BadInput, SfumatoError
from sfumato.files import save_png
from sfumato.finite import NotFinite, finite, require_finite_pictures
from sfumato.foreign import read_tensors
from sfumato.metrics.extractors import make_extractor
from sfumato.metrics.information import measure
from sfumato.metrics.pairs import PairMetric
from sfumato.metrics.perceptual import MSE
from sfumato.metrics.resize import to_bytes
from sfumato.pipeline import load

NAN, INF = float("nan"), float("inf")


def spoil(file, number=NAN, which=0):
    """Put a number that is none into one weight of a safetensors file; the weight's name."""
    tensors = load_file(file)
    name = sorted(k for k, x in tensors.items() if x.is_floating_point() and x.ndim > 1)[which]
    tensors[name].view(-1)[-1] = number
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_one_number_that_is_none_is_found(number):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.zeros(7, 5, dtype=dtype)
        assert finite(x) and finite(torch.full_like(x, torch.finfo(dtype).max)), "a sum may overflow"
        x[3, 2] = number
        assert not finite(x)
    assert finite(torch.ones(3, dtype=torch.long)) and finite(torch.empty(0))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_command_refuses_a_model_with_a_weight_that_is_none(part, tiny_sd, tmp_path, capsys):
    bad, good = tmp_path / "bad", tmp_path / "good"
    tiny_sd.pipe.save_pretrained(bad)
    tiny_sd.pipe.save_pretrained(good)
    name = spoil(next((bad / part).glob("*.safetensors")))
    told = rf"the weight {name} of the {part} in {bad} holds numbers that are not finite"
    with pytest.raises(NotFinite, match=told):
        load(bad, device="cpu")
    if part != "unet":
        return
    out = tmp_path / "out"
    for command in (
        f"sample star --model {bad} --out {out}",
        f"erase uce --model {bad} --concept star --out {out}",
        f"audit --before {good} --after {bad} --concept star --out {out}",
        f"attack concept-inversion --model {good} --original {bad} --concept star --templates {{}} --out {out}",
        f"distill multistep-cm --teacher {bad} --data sketch --out {out}",
        f"information --model {bad} --n 2 --out {out}",
        f"steer faster-diffusion star --model {bad} --out {out}",
        f"train t2i --data sketch --start-from {bad} --size 16 --out {out}",
    ):
        capsys.readouterr()
        assert cli.main(command.split()) == 2, command
        err = capsys.readouterr().err
        assert "not finite (NaN or infinity): fetch or train it again" in err and str(bad) in err, err
        assert not out.exists()


def test_a_detector_an_adapter_and_an_array_with_such_numbers_are_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    judge = tmp_path / "judge"
    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16,
                      patch_size=8)  # fmt: skip
    with torch.random.fork_rng():
        ViTModel(small).save_pretrained(judge)
    (judge / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    assert make_extractor(judge)
    name = spoil(judge / "model.safetensors")
    with pytest.raises(NotFinite, match=f"{name} of {judge}"):
        make_extractor(judge)
    save_file({"a": torch.ones(2, 2), "b": torch.tensor([[1.0, INF]])}, tmp_path / "lora.safetensors")
    with pytest.raises(NotFinite, match=r"the weight b of .*lora\.safetensors"):
        read_tensors(tmp_path / "lora.safetensors")
    frames = np.zeros((3, 4, 1, 8, 8), np.float32)
    frames[2, 3, 0, 0, 0] = NAN
    np.save(tmp_path / "flow.npy", frames)
    clips = open_frames(str(tmp_path / "flow.npy"), 8, 2)
    assert finite(clips.clip(0))
    with pytest.raises(NotFinite, match=r"sequence 2 of .*flow\.npy"):
        clips.clip(len(clips) - 1)


def test_pictures_that_are_none_are_not_handed_out(tiny_sd, tmp_path):
    pipe, decode = tiny_sd, tiny_sd.pipe.vae.decode
    pipe.pipe.vae.decode = lambda z, **k: (decode(z, **k)[0] * torch.tensor([1.0, NAN]).view(2, 1, 1, 1),)
    try:
        with pytest.raises(NotFinite, match=r"1 of 2 pictures are not finite .*, the first of them .* of seed 8"):
            pipe.draw(["star", "star"], [7, 8], sampling_steps=1)
    finally:
        pipe.pipe.vae.decode = decode
    x = torch.rand(2, 3, 16, 16)
    require_finite_pictures(x)
    x[1, 0, 0, 0] = INF
    with pytest.raises(NotFinite, match="first of them picture 1"):
        to_bytes(x)
    with pytest.raises(BadInput, match="not finite"):
        save_png(tmp_path / "a.png", np.full((4, 4, 3), NAN))
    assert list(tmp_path.iterdir()) == []


def test_a_measure_that_is_no_number_is_refused():
    class Nowhere(MSE):
        def __call__(self, a, b):
            return super().__call__(a, b) * torch.tensor([1.0, NAN])

    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(NotFinite, match="mse of picture 1 is no number"):
        PairMetric("mse", Nowhere()).update(x, x)


def test_a_model_whose_error_is_none_measures_no_information(tiny_sd):
    class Broken:
        process, prediction = tiny_sd.denoiser.process, tiny_sd.denoiser.prediction

        def __call__(self, z, t, cond):
            return z * torch.tensor([1.0, NAN]).view(2, 1, 1, 1)

    with pytest.raises(NotFinite, match="for picture 1"):
        measure(Broken(), torch.zeros(2, 4, 8, 8), torch.tensor([0.9, 0.5]), torch.Generator().manual_seed(0))


def test_weights_that_are_none_are_not_saved(tmp_path):
    from loop_cases import Line, line_run

    class Spoils(Line):
        def after_update(self, turn, step):
            if step == 15:
                self.net[2].bias.data.fill_(NAN)

    spoiled = r"is not finite \(NaN or infinity\) after step 15: lower the learning rate"
    with pytest.raises(SfumatoError, match=rf"net\.2\.bias {spoiled}; the last good checkpoint is in"):
        line_run(tmp_path, recipe=Spoils(), checkpoint_every=5).fit(progress=False)
    assert json.loads((tmp_path / "checkpoint/run.json").read_text())["step"] == 10
    with pytest.raises(SfumatoError, match=rf"{spoiled}$"):
        line_run(None, recipe=Spoils(), updates=15).fit(progress=False)
