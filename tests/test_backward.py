"""What a backward pass holds: computed without weights, and measured."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sfumato import catalog
from sfumato.commands.cards import made, need
from sfumato.errors import BadInput
from sfumato.pipeline import wrap
from sfumato.pipeline.backward import Learning, activations
from sfumato.pipeline.single.published import published


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A U-Net whose activations are megabytes: what small tensors cost beside their numbers does not show."""
    from diffusers import UNet2DConditionModel

    from conftest import make_tiny_sd

    pipe = make_tiny_sd(tmp_path_factory)
    pipe.register_modules(unet=UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval())  # fmt: skip
    return wrap(pipe)


def measured(pipe, learning: Learning, checkpointing: bool) -> int:
    """The peak of the CPU's allocator in a real forward and backward pass, beside weights and gradients."""
    adapted = learning.trained == "lora"
    student = pipe.copy(own=None if learning.trained in ("none", "lora") else learning.trained)
    if adapted:
        student.add_adapter("x", rank=learning.rank)
    if checkpointing:
        student.network.enable_gradient_checkpointing()
    z, t = torch.randn(learning.rows, *student.latent_shape()), torch.zeros(learning.rows)
    cond = student.unconditional(learning.rows)
    if learning.trained == "none":
        cond = cond.replace(tokens=cond.tokens.clone().requires_grad_())
    parameters = [*student.network.parameters(), *(p for a in student.adapters.values() for p in a.parameters())]
    for p in parameters:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step() -> None:
        student.anatomy.call(z, t, cond).square().mean().backward()

    step()  # what is made once only
    gc.collect()  # what earlier tests left would be freed in between, and counted as the step's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    live = peak = 0
    told = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(told, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["xattn", "full", "lora", "none"])
def test_the_computed_peak_is_that_of_the_allocator_to_a_tenth(small, trained, checkpointing):
    learning = Learning(2, trained)
    computed, found = activations(small, learning, checkpointing), measured(small, learning, checkpointing)
    assert 0.9 < computed / found < 1.1, (computed, found)


def test_recomputing_holds_less_and_rows_add_up(small):
    plain, again = (activations(small, Learning(4, "xattn"), c) for c in (False, True))
    assert again < 0.6 * plain
    one, two, three = (activations(small, Learning(n, "xattn")) for n in (1, 2, 3))
    assert abs((three - two) - (two - one)) < 0.02 * one


def test_the_original_is_left_as_it_was(small):
    activations(small, Learning(1, "full"), checkpointing=True)
    assert not any(p.is_meta or p.requires_grad for p in small.network.parameters())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in small.network.modules())


@pytest.mark.parametrize("name", ["esd-x", "spm", "kpop", "surgical", "eap", "trce", "duo", "doco", "integrity"])
def test_an_eraser_differentiates_as_many_rows_as_it_says(tiny_sd, name, monkeypatch):
    """Counted where the network is called with gradients, between one backward pass and the next."""
    from torch.nn.modules.module import register_module_forward_hook

    cls = catalog.get(name, "erase").load()
    method = cls(concepts=("star",), **cls.EXAMPLE)
    counted, held = 0, []

    def count(module, args, output):
        nonlocal counted
        if isinstance(module, type(tiny_sd.network)) and output[0].requires_grad:
            counted += len(output[0])

    real = torch.autograd.backward

    def backward(*args, **kwargs):
        nonlocal counted
        held.append(counted)
        counted = 0
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    handle = register_module_forward_hook(count)
    try:
        method.apply(tiny_sd)
    finally:
        handle.remove()
    assert max(held) == method.learning(tiny_sd).rows


def test_the_parts_of_a_step_add_up(tiny_sd):
    found = need(tiny_sd, made("erase", "esd-x"))
    numbers = sum(p.numel() for p in tiny_sd.parameters("xattn").values())
    assert (found.trained, found.gradients, found.optimiser, found.optimiser_8bit) == (
        4 * numbers, 4 * numbers, 8 * numbers, 2 * numbers,
    )  # fmt: skip
    assert found.plain == found.weights + 16 * numbers + found.activations
    assert found.recomputed < found.activations and found.least < found.plain
    assert need(tiny_sd, made("erase", "sfd")).trained == 8 * sum(p.numel() for p in tiny_sd.network.parameters())
    assert need(tiny_sd, made("erase", "uce")).rows() == [] and need(tiny_sd, made("attack", "mma")).rows() == []
    with pytest.raises(BadInput, match="does not fit this"):
        need(tiny_sd, _Unfit())


class _Unfit:
    @staticmethod
    def fits(pipe):
        return False


def test_the_published_shapes_have_the_published_numbers():
    pipe = published("sd1")
    assert sum(p.numel() for p in pipe.network.parameters()) == 859_520_964  # as in tests/published.py
    assert all(p.is_meta for part in pipe.parts().values() for p in part.parameters())


def test_the_doctor_answers_for_published_shapes(capsys):
    from sfumato import cli

    assert cli.main(["doctor", "--model", "sd1", "--method", "unlearn-diff-atk"]) == 0
    out = capsys.readouterr().out
    assert "unlearn-diff-atk: activations" in out and "859,520,964" in out
    assert cli.main(["doctor", "--model", "sd1", "--method", "nothing"]) == 2
