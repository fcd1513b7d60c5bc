"""What erasers and attacks that learn have from the training loop: going on after a kill, micro-batches, precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup

from conftest import make_tiny_sd
from loop_cases import together
from sfumato.attack import ConceptInversion
from sfumato.data.cases import AttackCases
from sfumato.erase import EAP, SPM, DoCo, ESDu, ESDx
from sfumato.erase.spm import restarting_cosine
from sfumato.errors import BadInput
from sfumato.files import held
from sfumato.pipeline import load, wrap
from sfumato.train.loop import Run

FEW = {"updates": 6, "sampling_steps": 2, "batch": 2, "checkpoint_every": 2}
LEARNERS = {
    "esd-x": ESDx(concepts=("star", "circle"), lr=1e-3, preserve=("blue",), **FEW),
    "esd-u": ESDu(concepts="star", lr=1e-3, **FEW),
    "spm": SPM(concepts=("star",), lr=1e-2, warmup=1, n_anchors=1, **FEW),
    "eap": EAP(concepts=("star", "circle"), lr=1e-3, searches=2, preserve=("blue",), **FEW),
    "doco": DoCo(concepts="star", anchors="art", prompts="art", lr=1e-3, head_start=1, pictures=2, **FEW),
    "inversion": ConceptInversion(
        updates=6, batch=3, lr=0.05, init_word="square", templates=("a photo of {}", "a {}"), checkpoint_every=2
    ),
}
every_learner = pytest.mark.parametrize("name", LEARNERS)


def learn(method, pipe, folder=None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What was learned, by name, and the losses."""
    if isinstance(method, ConceptInversion):
        pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        found = method.run(pipe, AttackCases("star", pictures=pictures), progress=False, folder=folder)
        return {"word": found.embedding}, found.losses
    made, log = method.run(pipe, folder)
    losses = log["losses"] if isinstance(log["losses"], list) else [x for some in log["losses"].values() for x in some]
    weights = {f"{k}.{n}": x for k, a in made.adapters.items() for n, x in a.state_dict().items()}
    return {**made.parameters("full"), **weights}, losses


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


class Killed(BaseException):
    pass


@every_learner
def test_killed_it_goes_on_to_the_same_bits(name, tiny_sd, tmp_path, monkeypatch):
    method, one_step = LEARNERS[name], Run.one_step
    whole, told = learn(method, tiny_sd)
    made: list[int] = []

    def killed(run):
        if len(made) in (3, 6):
            made.append(-1)
            raise Killed
        made.append(run.step)
        return one_step(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "one_step", killed)
        for _ in range(2):
            with pytest.raises(Killed):
                learn(method, tiny_sd, tmp_path)
        found, losses = learn(method, tiny_sd, tmp_path)
    assert same(found, whole) and losses == told
    assert made[:8] == [0, 1, 2, -1, 2, 3, -1, 4], "from the latest checkpoint"
    with monkeypatch.context() as patched:
        patched.setattr(Run, "one_step", killed)
        assert same(learn(method, tiny_sd, tmp_path)[0], whole), "nothing is left to do"
    with pytest.raises(BadInput, match=r"holds a run with lr="):
        learn(replace(method, lr=2 * method.lr), tiny_sd, tmp_path)
    with pytest.raises(BadInput, match=r"holds a run with model="):
        other = tiny_sd.copy(own="full")
        other.parameters("full")["conv_in.bias"].data += 1
        learn(method, other, tmp_path)


@every_learner
def test_micro_batches_change_nothing_but_rounding(name, tiny_sd):
    # Adam divides small gradients by their size, so that rounding grows, on some processors more than on others: less
    # where its constant is larger, and where steps do not throw the losses about.
    method = replace(LEARNERS[name], eps=1e-5)
    method = replace(method, lr=1e-3) if name == "spm" else method
    (one, told), (cut, also) = learn(method, tiny_sd), learn(replace(method, accumulate=2), tiny_sd)
    assert told == pytest.approx(also, rel=1e-3, abs=1e-6)
    moved = sum(float((one[k] - cut[k]).abs().sum()) for k in one) / sum(float(x.abs().sum()) for x in one.values())
    assert moved < 1e-3 * max(1, method.lr / 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["esd-x", "spm", "inversion"])
def test_a_pipeline_of_half_precision_learns_in_float32(name, dtype, tmp_path_factory):
    """Every weight that float32 would change by more than half precision resolves is changed."""
    plain = make_tiny_sd(tmp_path_factory)
    method = LEARNERS[name]
    if name == "esd-x":
        method = replace(method, updates=12, lr=1e-4, sampling_steps=1, preserve=())
    full, told = learn(method, wrap(plain))
    half = wrap(make_tiny_sd(tmp_path_factory).to(dtype))
    before = {k: x.detach().clone() for k, x in half.parameters("full").items()}
    found, losses = learn(method, half)
    assert losses[0] == pytest.approx(told[0], rel=0.5) and all(x.isfinite().all() for x in found.values())
    if name != "esd-x":  # factors and rows are float32 by themselves
        assert all(x.dtype == torch.float32 for k, x in found.items() if k not in before)
        return
    trained = list(half.parameters("xattn"))
    assert all(found[k].dtype == dtype for k in before)
    changed = sum(int((found[k] != before[k]).sum()) for k in trained)
    expected = sum(int((full[k].to(dtype) != before[k]).sum()) for k in trained)
    total = sum(before[k].numel() for k in trained)
    assert changed > 0.8 * expected > 0.3 * total, "the optimiser alone would lose nearly all of it"


@pytest.mark.parametrize("name", ["esd-x", "spm"])
def test_mixed_precision_is_close_to_float32(name, tiny_sd):
    method = LEARNERS[name]
    (_, told), (found, losses) = learn(method, tiny_sd), learn(replace(method, precision="bf16"), tiny_sd)
    assert losses != told and losses[0] == pytest.approx(told[0], rel=0.5)
    assert all(x.dtype == torch.float32 for x in found.values())


def test_two_at_once_in_one_folder_are_refused(tiny_sd, tmp_path):
    with held(tmp_path / "training"), pytest.raises(BadInput, match="another run is at work"):
        learn(LEARNERS["esd-x"], tiny_sd, tmp_path)


def test_what_is_attacked_keeps_its_own_gradients(tiny_sd):
    """Learning a word asks for no gradients of an adapter that somebody else trains."""
    pipe = tiny_sd.copy()
    adapter = pipe.add_adapter("mine", generator=torch.Generator().manual_seed(0))
    learn(LEARNERS["inversion"], pipe)
    assert all(p.requires_grad and p.grad is None for p in adapter.parameters())


@pytest.mark.parametrize("warmup, updates, cycles", [(0, 7, 1), (3, 40, 3), (500, 3000, 3)])
def test_the_restarting_cosine_is_that_of_diffusers(warmup, updates, cycles):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, updates, cycles).lr_lambdas[0]
    assert [restarting_cosine(i, warmup, updates, cycles) for i in range(updates)] == list(map(theirs, range(updates)))


SHARED = replace(LEARNERS["esd-x"], updates=2, sampling_steps=1)


def erase_in_parallel(model: str, out: str) -> None:
    found, _ = learn(SHARED, load(model, "cpu"), Path(out) / "state")
    torch.save(found, Path(out) / f"end-{torch.distributed.get_rank()}.pt")


@pytest.mark.slow
def test_two_processes_erase_as_one_does(tiny_sd, tmp_path):
    tiny_sd.copy().save(tmp_path / "model")
    together(2, erase_in_parallel, str(tmp_path / "model"), str(tmp_path))
    alone, _ = learn(SHARED, tiny_sd)
    first, second = (torch.load(tmp_path / f"end-{i}.pt", weights_only=True) for i in range(2))
    assert same(first, second)
    assert max(float((alone[k] - first[k]).abs().max()) for k in alone) < 1e-3
