"""DUO: its loss in float64 by the card's identities; pairs from folders, detectors and edits; LoRA files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sfumato.erase.duo import DUO, duo_loss, fresh_adapter, improvement, preference_loss, scaled
from sfumato.erase.parts.lora_files import file_names
from sfumato.erase.parts.pairs import Pairs, _until, draw_pairs, read_pairs
from sfumato.errors import BadInput

SHORT = {"updates": 2, "pairs": 2, "sampling_steps": 2, "batch": 2, "beta": 100.0, "lr": 1e-2, "rank": 2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def pairs(n: int = 3, side: int = 16, seed: int = 0) -> Pairs:
    both = torch.randint(256, (2, n, 3, side, side), generator=generator(seed), dtype=torch.uint8)
    return Pairs(*both)


# The loss


def test_the_loss_is_the_papers_sum_over_pairs():
    """Written out element by element for 4 pairs and 4 rows of noise."""
    pred, reference, target = normal(12, 2, 3, 3), normal(12, 2, 3, 3, seed=1), normal(8, 2, 3, 3, seed=2)
    total = 0.0
    for i in range(4):
        d = {}
        for name, row in (("rejected", i), ("preferred", 4 + i)):
            mine, theirs = (float(((x[row] - target[row]) ** 2).sum()) / 18 for x in (pred, reference))
            d[name] = mine - theirs
        total += math.log(1 + math.exp(7.0 * (d["preferred"] - d["rejected"]))) / 4
    total += 3.0 * float(((pred[8:] - reference[8:]) ** 2).sum()) / (4 * 18)
    assert float(duo_loss(pred, reference, target, 7.0, 3.0)) == pytest.approx(total, rel=1e-12)


def test_a_student_that_is_the_reference_stands_at_log_two_and_is_pulled_by_the_preference_alone():
    """Checks (i) and (v): the gradient is that of -(beta / 2) mean(err(x-) - err(x+))."""
    reference, target = normal(9, 4, 2, 2), normal(6, 4, 2, 2, seed=1)
    pred = reference.clone().requires_grad_()
    loss = duo_loss(pred, reference, target, 500.0, 1e6)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-12)
    loss.backward()
    again = reference.clone().requires_grad_()
    errors = (again[:6] - target).square().flatten(1).mean(dim=1)
    (-(500.0 / 2) * (errors[:3] - errors[3:]).mean()).backward()
    torch.testing.assert_close(pred.grad, again.grad, rtol=1e-12, atol=1e-12)
    assert not pred.grad[6:].any()


def test_identical_members_give_log_two_and_swapping_them_is_negating_beta():
    """Checks (ii) and (iii)."""
    a, b = improvement(*normal(3, 5, 4, 2, 2)), improvement(*normal(3, 5, 4, 2, 2, seed=1))
    assert float(preference_loss(a, a, 500.0)) == pytest.approx(math.log(2), abs=1e-12)
    assert float(preference_loss(a, b, 3.0)) == pytest.approx(float(preference_loss(b, a, -3.0)), abs=1e-12)
    assert preference_loss(a - 1e4, b, 1e3).isfinite() and preference_loss(a + 1e4, b, 1e3).isfinite()


@pytest.mark.parametrize(("beta", "lr", "weight"), [(500, 6e-5, 5e6), (250, 1.2e-4, 2.5e6), (1000, 3e-5, 1e7)])
def test_rate_and_weight_follow_beta(beta, lr, weight):
    assert scaled(3e-4, 1e6, beta) == (pytest.approx(lr), pytest.approx(weight))


def test_the_rate_follows_the_schedule(tiny_sd, monkeypatch):
    """At beta = 100 and without decay it is lr throughout, as published."""
    seen, original = [], torch.optim.AdamW.step

    def step(optimizer, *given, **more):
        seen.append(optimizer.param_groups[0]["lr"])
        return original(optimizer, *given, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = {"concepts": "star", **SHORT, "updates": 4}
    DUO(**options).train_one(tiny_sd, 0, pairs())
    DUO(**options, decay="linear", warmup=2, final_lr=0.0).train_one(tiny_sd, 0, pairs())
    assert seen == pytest.approx([1e-2] * 4 + [5e-3, 1e-2, 1e-2, 5e-3])


# A step


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd_eps", "tiny_sd3"])
def test_a_fresh_adapter_has_the_loss_log_two_and_moves_only_the_up_factors(family, request):
    pipe = request.getfixturevalue(family)
    student = pipe.copy()
    adapter = fresh_adapter(student, 4, 4.0, generator())
    loss = DUO(concepts="star", **SHORT, preserve=("circle",)).loss(pipe, student, pairs())(generator())
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    assert any(x.grad.abs().max() > 0 for x in adapter.up.values())
    assert not any(x.grad.any() for x in adapter.down.values())
    down = torch.cat([x.detach().flatten() for x in adapter.down.values()])
    assert float(down.std()) == pytest.approx(1 / 4, rel=0.2)


def test_a_step_is_the_loss_of_its_own_draws(tiny_sd):
    """Rebuilt from the generator: one noise for both members, a time each, the posterior drawn, the empty prompt."""
    duo, student, some = DUO(concepts="star", **SHORT), tiny_sd.copy(), pairs()
    adapter = fresh_adapter(student, 2, 32.0, generator(1))
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=generator(2))
    found = duo.loss(tiny_sd, student, some)(generator(5))

    rng = generator(5)
    rows = torch.randint(3, (2,), generator=rng)
    steps = torch.randint(0, 750, (2, 2), generator=rng)
    noise, first, second = torch.randn(3, 2, *tiny_sd.latent_shape(), generator=rng)
    process, empty = tiny_sd.process, tiny_sd.encode("")
    pred, reference, targets = [], [], []
    for pictures, own, side in ((some.shown, first, 0), (some.removed, second, 1)):
        posterior = tiny_sd.pipe.vae.encode(pictures.float() / 127.5 - 1).latent_dist
        latents = (posterior.mean[rows] + posterior.std[rows] * own) * tiny_sd.pipe.vae.config.scaling_factor
        t = (steps[side] + 1) / 1000
        z = process.diffuse(latents, t, noise)
        alpha, sigma = process.alpha_sigma(t, z)
        targets.append(alpha * noise - sigma * latents)  # the tiny pipeline predicts v
        pred.append(student.denoiser(z, t, empty))
        reference.append(tiny_sd.denoiser(z, t, empty))
    pred.append(student.denoiser(noise, 1.0, empty))
    reference.append(tiny_sd.denoiser(noise, 1.0, empty))
    expected = duo_loss(torch.cat(pred), torch.cat(reference), torch.cat(targets), 100.0, 1e6)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert float(found) != pytest.approx(math.log(2), rel=1e-2)


def test_no_time_lies_beyond_the_table(tiny_sd):
    """Nor where t_min is next to 1: the network is told the last timestep then."""
    seen = []
    handle = tiny_sd.network.register_forward_pre_hook(lambda *given: seen.append(given[1][1]))
    try:
        DUO(concepts="star", t_min=0.9999, t_max=1.0, **SHORT).loss(tiny_sd, tiny_sd.copy(), pairs())(generator())
    finally:
        handle.remove()
    assert seen[0].tolist() == [999] * 6


def test_only_the_pictures_own_attention_gets_an_adapter(tiny_sd, tiny_sd3):
    assert all(".attn1." in name for name in fresh_adapter(tiny_sd.copy(), 1, 1.0, generator()).layers)
    joint = fresh_adapter(tiny_sd3.copy(), 1, 1.0, generator()).layers
    assert {name.split(".attn.")[1] for name in joint} == {"to_q", "to_k", "to_v", "to_out.0"}


# Pairs


def write(folder, values):
    folder.mkdir(parents=True)
    for name, value in values.items():
        Image.fromarray(np.full((20, 24, 3), value, np.uint8)).save(folder / name)


def test_pairs_of_a_folder_go_by_their_names(tmp_path):
    write(tmp_path / "with", {"b.png": 2, "a.png": 1})
    write(tmp_path / "without", {"a.png": 11, "c.png": 12})
    found = read_pairs(tmp_path, 16)
    assert found.shown[:, 0, 0, 0].tolist() == [1, 2] and found.removed[:, 0, 0, 0].tolist() == [11, 12]
    assert found.shown.shape == (2, 3, 16, 16)
    assert found.both()[[0, 3], 0, 0, 0].tolist() == pytest.approx([1 / 127.5 - 1, 12 / 127.5 - 1])
    assert found.sheet().shape == (4, 16, 16, 3) and found.sheet()[:, 0, 0, 0].tolist() == [1, 11, 2, 12]


def test_folders_that_are_no_pairs(tmp_path, tiny_sd):
    write(tmp_path / "with", {"a.png": 1, "b.png": 2})
    with pytest.raises(BadInput, match="no folder 'without'"):
        DUO(concepts="star", data=str(tmp_path)).apply(tiny_sd)
    write(tmp_path / "without", {"a.png": 1})
    with pytest.raises(BadInput, match="2 pictures with the concept and 1 without"):
        read_pairs(tmp_path, 16)


class Scripted:
    """A detector that says what it is told to, picture after picture."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, x):
        self.asked.append(len(x))
        return torch.tensor([self.answers.pop(0) for _ in x])


def test_pictures_are_drawn_until_the_detector_agrees(tiny_sd):
    """The second picture is drawn twice, the edit of the first three times; the third has no edit that is right."""
    seen = Scripted(1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1)
    seen.answers = [bool(x) for x in seen.answers]
    options = {"strength": 0.5, "sampling_steps": 2, "tries": 3}
    found = draw_pairs(tiny_sd, ["star", "red star"], ["", "red"], 3, generator(), seen=seen, **options)
    assert seen.asked == [3, 1, 3, 2, 2] and not seen.answers
    assert len(found) == 2 and found.drawn == (4, 7)
    plain = draw_pairs(tiny_sd, ["star", "red star"], ["", "red"], 3, generator(), **options)
    assert len(plain) == 3 and plain.drawn == (3, 3)
    assert torch.equal(plain.shown[0], found.shown[0]) and not torch.equal(plain.shown[1], found.shown[1])
    assert not torch.equal(plain.shown, plain.removed)


def test_pictures_that_are_kept_hold_none_that_were_rejected():
    seen = Scripted(False, True, False, True, True, True)
    draw = lambda rows, starts: torch.stack([torch.full((3, 2, 2), float(i)) for i in rows])
    found, drawn = _until(draw, torch.arange(4), seen, 3, 4, generator())
    assert {i: float(x.mean()) for i, x in found.items()} == {1: 1, 3: 3, 0: 0, 2: 2} and drawn == 6
    assert all(x.untyped_storage().nbytes() == 2 * x.nbytes for x in found.values())  # two each time


@pytest.mark.parametrize(("answers", "message"), [([False], "does the model know it"), ([True] * 2, "raise strength")])
def test_pairs_that_cannot_be_had(tiny_sd, answers, message):
    with pytest.raises(BadInput, match=message):
        draw_pairs(
            tiny_sd, ["star"], [""], 1, generator(), strength=0.5, sampling_steps=2, seen=Scripted(*answers), tries=1
        )


def test_the_detector_is_asked_before_anything_is_drawn(tiny_sd):
    with pytest.raises(BadInput, match="sketch world"):
        DUO(concepts="art", **SHORT, detector="oracle").apply(tiny_sd)


@pytest.mark.parametrize("other", [{"anchors": "square"}, {"seed": 1}, {"strength": 0.5}, {"templates": ("a {}",)}])
def test_pairs_in_a_folder_go_with_their_settings_alone(tiny_sd, tmp_path, monkeypatch, other):
    """Killed between the pairs and the first checkpoint."""
    options = {"concepts": "star", "anchors": "circle", **SHORT}

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DUO, "train_one", killed)
        DUO(**options).run(tiny_sd, tmp_path)
    with pytest.raises(BadInput, match=r"holds pairs that were made with .* another folder"):
        DUO(**{**options, **other}).run(tiny_sd, tmp_path)
    if "seed" in other:  # the cheapest of them
        model = tiny_sd.copy(own="xattn")
        torch.nn.init.zeros_(next(iter(model.parameters("xattn").values())))
        with pytest.raises(BadInput, match="model="):
            DUO(**options).run(model, tmp_path)
        expected = DUO(**options).pairs_of(tiny_sd, 0)
        monkeypatch.setattr("sfumato.erase.duo.draw_pairs", lambda *given, **more: pytest.fail("drawn again"))
        again = DUO(**{**options, "lr": 1e-3, "updates": 1}).pairs_of(tiny_sd, 0, tmp_path / "0")
        assert torch.equal(again.removed, expected.removed) and again.drawn == expected.drawn


# Files


def test_a_file_for_each_concept_that_acts_as_the_adapter_does(tiny_sd, tmp_path):
    erased = DUO(concepts=("star", "blue circle"), **SHORT).apply(tiny_sd)
    erased.save(tmp_path / "erased")
    files = sorted(f.name for f in (tmp_path / "erased" / "lora").iterdir())
    assert files == ["README.md", "blue-circle.png", "blue-circle.safetensors", "star.png", "star.safetensors"]
    with safe_open(tmp_path / "erased" / "lora" / "star.safetensors", "pt") as opened:
        assert all(".attn1." in key and key.startswith("unet.") for key in opened.keys())  # noqa: SIM118
    plain = tiny_sd.copy()
    for name in ("star", "blue-circle"):
        plain.load_adapter(name, tmp_path / "erased" / "lora" / f"{name}.safetensors")
    z, t, cond = normal(2, *tiny_sd.latent_shape()).float(), 0.5, tiny_sd.encode(["star", "art"])
    with torch.no_grad():
        expected = erased.denoiser(z, t, cond)
        torch.testing.assert_close(plain.denoiser(z, t, cond), expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(tiny_sd.denoiser(z, t, cond), expected, rtol=1e-4, atol=1e-6)
        # fused and unfused
        torch.testing.assert_close(erased.merged().denoiser(z, t, cond), expected, rtol=1e-4, atol=1e-5)


def test_names_of_files():
    assert file_names(["Red Star!", "red star", "...", "été"]) == ["red-star", "red-star-1", "concept", "été"]
    assert file_names(["x 2", "x", "x!"]) == ["x-2", "x", "x-3"], "a number may be a concept's own"
    long = ["é" * 300, "é" * 301, " ".join(["a picture of"] * 30)]
    assert file_names(long) == ["é" * 40, f"{'é' * 40}-1", "-".join(["a-picture-of"] * 6) + "-a"]


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_long_concept_is_saved(tiny_sd, tmp_path):
    erased = DUO(concepts=" ".join(["a photo of a red star"] * 16), **{**SHORT, "updates": 1}).apply(tiny_sd)
    erased.save(tmp_path / "e")
    assert len(list((tmp_path / "e" / "lora").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"beta": 0.0}, {"t_max": 0.0}, {"strength": 0.0}, {"templates": ("a star",)}, {"rank": 0}, {"tries": 0},
     {"data": ("a", "b")}],
)  # fmt: skip
def test_bad_settings(wrong):
    said = {"data": "folder of pairs", "templates": "template", "t_max": "t_min"}
    with pytest.raises(BadInput, match=said.get(next(iter(wrong)), next(iter(wrong)))):
        DUO(concepts="star", **wrong)
