"""What every distillation must do, whatever its method: one shared matrix over the catalogue."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch.testing import assert_close

import sfumato as sf
from sfumato.distill.base import Distiller
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline import ImageModel, as_flow

VERB = "distill"

every_teacher = pytest.mark.parametrize("kind", ["text", "pixels"])


@pytest.fixture(scope="session")
def pixel_teacher() -> ImageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(8, 3, classes=2, channels=(8, 8), layers=1, attention=(4,), dropout=0.1)
        torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    return ImageModel(network.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8), ("cat", "dog"), {"cfg_scale": 2.0})


@pytest.fixture
def teacher(kind, tiny_sd, pixel_teacher):
    if kind == "flow":
        flow = tiny_sd.copy()
        as_flow(flow)
        return flow
    return tiny_sd if kind == "text" else pixel_teacher


def small(method: type[Distiller], teacher, pictures: str, **changes) -> Distiller:
    """The method with settings that take a second."""
    data = {"data": pictures} if "data" in {f.name for f in fields(method)} else {}
    return method(teacher=teacher, **{**method.EXAMPLE, **data, **changes})


def draw(model, seeds, **options):
    if isinstance(model, ImageModel):
        return model.draw("dog", seeds, **options)
    return model.draw("a red star", seeds, **options)


def sha(model):
    return model.describe()["sha256"]


@every_teacher
def test_a_run_leaves_its_teacher_alone_and_its_student_is_a_model_like_any_other(
    method, kind, teacher, pictures, tmp_path
):
    before, flags = sha(teacher), [p.requires_grad for p in teacher.network.parameters()]
    out = small(method, teacher, pictures).run(tmp_path / "run", progress=False)
    assert sha(teacher) == before
    assert [p.requires_grad for p in teacher.network.parameters()] == flags
    student = sf.load(out, "cpu")
    assert type(student) is type(teacher) and sha(student) != before
    assert not any(p.requires_grad for p in student.network.parameters())
    # by seed, whatever the batch, and after another round on disk
    pair = draw(student, [3, 4])
    assert torch.equal(draw(student, [3, 4]), pair)
    assert_close(draw(student, 4), pair[1:])
    student.save(tmp_path / "again")
    assert_close(draw(sf.load(tmp_path / "again", "cpu"), [3, 4]), pair)
    # the folder of the run is the student too, and its record says whose
    assert sha(sf.load(tmp_path / "run", "cpu")) == sha(student)
    assert (tmp_path / "run" / "training" / "grids" / "0000002.png").is_file()
    record = sf.pipeline.read_record(tmp_path / "run")["provenance"]
    assert record["recipe"] == f"distill {method.name()}" and record["parent"]["sha256"] == before


@pytest.mark.parametrize("kind", ["text", "pixels", "flow"])
def test_a_student_takes_the_steps_it_was_made_for_and_no_others(method, kind, teacher, pictures, tmp_path):
    distiller = small(method, teacher, pictures, updates=1)
    student = sf.load(distiller.run(tmp_path / "run", progress=False), "cpu")
    assert torch.equal(draw(student, 1), draw(student, 1, sampling_steps=distiller.sampling_steps))
    assert student.defaults["cfg_scale"] == 1.0
    for wrong in (distiller.sampling_steps + 1, 50):
        with pytest.raises(BadInput, match=f"distilled for {distiller.sampling_steps} steps"):
            draw(student, 1, sampling_steps=wrong)


@every_teacher
def test_a_killed_run_goes_on_to_the_same_bits(method, kind, teacher, pictures, tmp_path, killed_at):
    whole = small(method, teacher, pictures, updates=5).run(tmp_path / "whole", progress=False)
    with killed_at(3):
        small(method, teacher, pictures, updates=5).run(tmp_path / "cut", progress=False)
    assert not (tmp_path / "cut" / "model").exists()
    cut = small(method, teacher, pictures, updates=5).run(tmp_path / "cut", progress=False)
    assert sha(sf.load(whole, "cpu")) == sha(sf.load(cut, "cpu"))


@every_teacher
def test_other_settings_or_another_teacher_do_not_go_on_from_a_run(method, kind, teacher, pictures, tmp_path):
    distiller = small(method, teacher, pictures, updates=1)
    distiller.run(tmp_path / "run", progress=False)
    with pytest.raises(BadInput, match="sampling_steps"):
        replace(distiller, sampling_steps=distiller.sampling_steps + 1).run(tmp_path / "run", progress=False)
    other = teacher.copy(own="full")
    with torch.no_grad():
        next(iter(other.network.parameters())).add_(1)
    with pytest.raises(BadInput, match="teacher"):
        replace(distiller, teacher=other).run(tmp_path / "run", progress=False)


@every_teacher
def test_plan_says_what_it_will_cost(method, kind, teacher, pictures):
    plan = small(method, teacher, pictures).plan()
    assert plan.seconds > 0 and plan.memory["teacher"] == 4 * sum(p.numel() for p in teacher.network.parameters())


def test_bad_input(method, pictures, pixel_teacher, tmp_path):
    with pytest.raises(BadInput, match="at least 1"):
        small(method, pixel_teacher, pictures, sampling_steps=0)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        small(method, pixel_teacher, pictures).run(tmp_path / "file")
    unknown = ImageModel(pixel_teacher.network, pixel_teacher.process, "y", (3, 8, 8))
    with pytest.raises(BadInput, match="predicts 'y'"):
        small(method, unknown, pictures).run(tmp_path / "run")

    @dataclass(frozen=True)
    class Rotting:
        """A process that is none."""

    strange = ImageModel(pixel_teacher.network, Rotting(), "v", (3, 8, 8))
    with pytest.raises(BadInput, match="under Rotting"):
        small(method, strange, pictures).run(tmp_path / "run")
    with pytest.raises(BadInput, match="wrap or load"):
        small(method, object(), pictures).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_matrix_has_methods(method):
    assert issubclass(method, Distiller)
