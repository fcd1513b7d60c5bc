"""Offloading: the same pictures and hashes, copies that train, and refusals where nothing could be computed.

The CPU stands in for the accelerator: the same hooks move the same weights, only that they do not get far.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from conftest import make_tiny_sd
from sfumato import cli
from sfumato.erase import UCE, ESDx
from sfumato.errors import BadInput
from sfumato.pipeline import load, offload, wrap

CPU = torch.device("cpu")


@pytest.fixture
def offloaded(tmp_path_factory):
    """A tiny pipeline by the way in which it is offloaded."""

    def make(how: offload.Offload):
        made = wrap(make_tiny_sd(tmp_path_factory))
        if how == "model":
            offload.begin(made.pipe, how, CPU)
        else:  # as diffusers does it, which would say "cpu:0", of which accelerate makes tensors that are no parameters
            for part in made.parts().values():
                cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
        return made

    return make


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_it_draws_the_same_pictures_and_has_the_same_hash(how, offloaded, tiny_sd, tmp_path_factory):
    made = offloaded(how)
    assert offload.kind(made.pipe) == how and made.device.type == "cpu" and offload.kind(tiny_sd.pipe) is None
    assert (how == "sequential") == made.network.conv_in.weight.is_meta
    ask = {"sampling_steps": 2, "batch": 1}
    plain = wrap(make_tiny_sd(tmp_path_factory))
    assert torch.equal(made.draw(["star", "art"], 0, **ask), plain.draw(["star", "art"], 0, **ask))
    assert made.describe()["sha256"] == plain.describe()["sha256"]
    x = torch.rand(1, 3, *[made.size] * 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.encode_image(x), plain.encode_image(x))
    made.add_adapter("a", rank=2).up["mid_block.attentions.0.proj_in"].data += 1
    assert not torch.equal(made.draw("star", 0, **ask), plain.draw("star", 0, **ask)), "adapters act"


def test_by_layers_nothing_is_edited_copied_or_saved(offloaded, tmp_path):
    made = offloaded("sequential")
    for what in (made.copy, UCE(concepts="star", anchors="art").apply, lambda p=None: made.save(tmp_path / "out")):
        with pytest.raises(BadInput, match="layer by layer, so that it can draw but not be"):
            what(made) if what is not made.copy else what()
    assert not (tmp_path / "out").exists()


def test_copies_are_offloaded_alike_but_what_they_train_stays(offloaded, tiny_sd):
    made = offloaded("model")
    shared, student = made.copy(), made.copy(own="xattn")
    assert offload.kind(shared.pipe) == offload.kind(student.pipe) == "model"
    assert offload.device_of(shared.network).type == "cpu" and offload.device_of(student.network) is None
    sent: list[object] = []
    for pipe in (made, shared, student):
        for hook in pipe.pipe._all_hooks:
            hook.hook.init_hook = lambda module, old=hook.hook.init_hook: sent.append(module) or old(module)
    student.draw("star", 0, sampling_steps=1)
    assert student.network not in sent and student.pipe.text_encoder in sent and student.autoencoder in sent
    assert not {id(m) for m in made.parts().values()} & {id(m) for m in sent}, "each is moved by its own hooks"
    shared.draw("star", 0, sampling_steps=1)
    assert shared.network in sent


EDITS = (UCE(concepts="star", anchors="art"), ESDx(concepts="star", **ESDx.EXAMPLE))


@pytest.mark.parametrize("method", EDITS, ids=lambda m: type(m).__name__)
def test_edits_of_an_offloaded_pipeline_have_the_same_bits(method, offloaded, tmp_path_factory, tmp_path):
    plain = method.apply(wrap(make_tiny_sd(tmp_path_factory)))
    made = method.apply(offloaded("model"))
    assert made.describe()["sha256"] == plain.describe()["sha256"]
    made.save(tmp_path / "made")
    assert load(tmp_path / "made", "cpu").describe()["sha256"] == plain.describe()["sha256"]


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_is_refused(tmp_path, capsys):
    with pytest.raises(BadInput, match="there is none on this machine: leave offload out"):
        load("sketch", offload="model")
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["sample", "a star", "--offload", "sequential", *out]) == 2
    assert cli.main(["erase", "uce", "--concept", "star", "--offload", "model", *out]) == 2
    assert capsys.readouterr().err.count("moves weights to an accelerator") == 2 and not Path(out[1]).exists()


def test_what_cannot_be_is_refused(tiny_sd):
    with pytest.raises(BadInput, match=r"the device is the CPU|none on this machine"):
        offload.accelerator("cpu")
    with pytest.raises(BadInput, match="unknown offload 'disk': choose from model, sequential"):
        offload.begin(tiny_sd.pipe, "disk", CPU)


def test_hooks_that_spread_a_model_over_devices_are_no_offloading(tmp_path_factory):
    made = wrap(make_tiny_sd(tmp_path_factory))
    add_hook_to_module(made.network, AlignDevicesHook(CPU))
    assert offload.kind(made.pipe) is None and offload.kind(made.copy().pipe) is None
    assert hasattr(made.network, "_hf_hook"), "left alone"
    assert torch.equal(made.copy().draw("star", 0, sampling_steps=1), made.draw("star", 0, sampling_steps=1))


def test_turned_off_again_weights_stay_where_they_are(offloaded):
    made = offloaded("model")
    sent: list[object] = []
    for hook in made.pipe._all_hooks:
        hook.hook.init_hook = sent.append
    made.pipe.remove_all_hooks()
    assert offload.kind(made.pipe) is None and offload.device_of(made.network) is None
    made.draw("star", 0, sampling_steps=1)
    assert sent == []
