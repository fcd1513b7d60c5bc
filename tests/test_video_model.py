"""`VideoModel`: roll-outs by seed, saved and loaded."""

from __future__ import annotations

import pytest
import torch

import sfumato as sf
from sfumato.errors import BadInput
from sfumato.nets import VideoUNet
from sfumato.noise import Cosine, GaussianProcess, Window
from sfumato.pipeline import VideoModel
from sfumato.sample import ddpm, rollout


@pytest.fixture
def model() -> VideoModel:
    torch.manual_seed(0)
    network = VideoUNet(8, 4, 1, channels=(8, 16), layers=1, head_dim=8, embedding=16)
    with torch.no_grad():  # a new network is 0, and its frames do not meet
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    defaults = {"context": 2, "sampling_steps": 2, "clip": False}
    return VideoModel(network.eval(), GaussianProcess(Cosine()), "v", (4, 1, 8, 8), (), defaults)


def context(n: int = 3, frames: int = 2) -> torch.Tensor:
    return 3 * torch.randn(n, frames, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_rollout_is_the_functions(model):
    got = model.rollout([7], context(1), 5)
    generator = [torch.Generator().manual_seed(7)]
    assert torch.equal(got, rollout(model.denoiser, context(1), 5, Window(4, 2), 2, generator=generator))


@pytest.mark.parametrize("options", [{}, {"schedule": "standard"}, {"finish": True}, {"scheduler": "ddim"}])
def test_sequences_do_not_depend_on_their_batch(model, options):
    together = model.rollout([1, 2, 3], context(), 5, **options)
    assert together.shape == (3, 5, 1, 8, 8)
    torch.testing.assert_close(model.rollout([1, 2, 3], context(), 5, batch=2, **options), together)
    torch.testing.assert_close(model.rollout(2, context()[1:2], 5, **options), together[1:2])


def test_options_matter(model):
    plain = model.rollout(1, context(1), 5)
    for options in ({"schedule": "standard"}, {"finish": True}, {"scheduler": "ddim"}, {"sampling_steps": 3}):
        assert not torch.allclose(model.rollout(1, context(1), 5, **options), plain)
    assert torch.equal(model.rollout(1, context(1), 5, scheduler=ddpm), plain)


def test_samples_are_pictures(model):
    drawn = model.draw(context(2), [1, 2], n_frames=3)
    assert drawn.shape == (2, 3, 1, 8, 8)
    assert torch.equal(drawn, ((model.rollout([1, 2], context(2), 3) + 1) / 2).clamp(0, 1))
    assert model.draw(context(1), 1).shape[1] == 2


def test_the_last_frames_of_a_longer_context_count(model):
    assert torch.equal(model.rollout(1, context(1, 5), 3), model.rollout(1, context(1, 5)[:, -2:], 3))


def test_saved_and_loaded_it_rolls_out_the_same(model, tmp_path):
    model.save(tmp_path / "model")
    again = sf.load(tmp_path / "model", device="cpu")
    assert type(again) is VideoModel
    assert again.window == Window(4, 2)
    assert torch.equal(again.rollout(1, context(1), 3), model.rollout(1, context(1), 3))


def test_models_without_context_need_none(model):
    free = VideoModel(model.network, model.process, "v", (4, 1, 8, 8), (), {"sampling_steps": 1})
    assert free.rollout([1, 2]).shape == (2, 4, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1,), {}, "goes on from 2 frames of shape"),
        ((1, context(1, 1)), {}, "or more, 1, 8, 8"),
        ((1, context(2)), {}, "for 1 sequences"),
        ((1, torch.zeros(1, 2, 3, 8, 8)), {}, "goes on from"),
        ((1, context(1)), {"scheduler": "ddmp"}, "did you mean ddpm"),
        ((1, context(1)), {"schedule": "role"}, "unknown schedule"),
    ],
)
def test_bad_input_is_named(model, arguments, options, message):
    with pytest.raises(BadInput, match=message):
        model.rollout(*arguments, **options)


def test_frames_have_no_classes(model):
    with pytest.raises(BadInput, match="knows no 'star'"):
        model.draw("star", 1)


def test_a_model_of_pictures_is_refused(model):
    with pytest.raises(BadInput, match="samples \\(frame, channel, height, width\\)"):
        VideoModel(model.network, model.process, "v", (1, 8, 8))
