"""The chromatogram against closed forms; prompts, warps and upscaling against what they are made of."""

from __future__ import annotations

import csv
import json
import math
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from sfumato import cli
from sfumato.errors import BadInput
from sfumato.nets import UNet, VideoUNet
from sfumato.noise import Cosine, DiscreteSchedule, GaussianProcess, Karras, RectifiedFlow, ScaledLinearBeta, Shifted
from sfumato.noise.analytic import GaussianMixture, MixtureDenoiser
from sfumato.pipeline import ImageModel, VideoModel
from sfumato.pipeline.steering import Interceptor
from sfumato.sample import ddim
from sfumato.steer import FasterDiffusion, UpsampleGuidance
from sfumato.steer.parts.cascade import Weighted
from sfumato.steer.parts.chromatogram import cosine_table, levels_of, sigmoid_table
from sfumato.steer.parts.resolutions import matched_alpha_bar, pooled, power
from sfumato.steer.resolution_chromatography import (
    SCHEDULES,
    ResolutionChromatography,
    amplitude_rate,
    chromatogram,
    half_times,
    level_gains,
    map_schedule,
    measure,
    prompt_schedule,
    rate,
    shares,
    signal,
    signal_present,
    step_rates,
)

LEVELS = (1, 2, 4, 8, 16)
IDEAL = Cosine(-math.inf, math.inf)
SMOOTH = [Cosine(), ScaledLinearBeta(), Karras(), RectifiedFlow()]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Closed forms


def test_the_signal_of_a_level():
    t = torch.linspace(0.01, 0.99, 40).double()
    a = torch.sigmoid(IDEAL.logsnr(t))
    found = signal(IDEAL.logsnr(t), LEVELS)
    torch.testing.assert_close(found[0], a, rtol=0, atol=1e-12)
    for m, row in zip(LEVELS, found, strict=True):
        torch.testing.assert_close(row, matched_alpha_bar(a, m), rtol=0, atol=1e-12)
        torch.testing.assert_close(row, a / power(a, m), rtol=0, atol=1e-12)


def test_the_matched_times_compose():
    """tau_m(tau_k(t)) = tau_mk(t), and tau_1(t) = t."""
    t = torch.linspace(0.1, 0.9, 9).double()
    found = chromatogram(RectifiedFlow(), (1, 2, 3, 6), t)
    torch.testing.assert_close(found.tau[0], t, rtol=0, atol=1e-12)
    again = chromatogram(RectifiedFlow(), (2,), found.tau[2]).tau[0]
    torch.testing.assert_close(again, found.tau[3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SMOOTH, ids=lambda s: type(s).__name__)
def test_rates_integrate_to_the_signal_that_is_made(schedule):
    times = torch.linspace(1, 1e-8, 40_001, dtype=torch.float64)  # at 0 itself a log-SNR may be infinite
    found = chromatogram(schedule, LEVELS, times)
    made = -torch.trapezoid(found.rate, times, dim=1)
    torch.testing.assert_close(made, 1 - found.missing, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.share.sum(0), torch.ones_like(times), rtol=0, atol=1e-12)
    steps = step_rates(schedule, times[::500], LEVELS)
    ends = signal(schedule.logsnr(times[[0, -1]]), LEVELS)
    torch.testing.assert_close(steps.sum(1), ends[:, 1] - ends[:, 0], rtol=0, atol=1e-12)


def test_rates_are_derivatives():
    t = torch.linspace(0.05, 0.95, 19).double().requires_grad_()
    logsnr, slope = IDEAL.logsnr(t), IDEAL.dlogsnr_dt(t)
    for found, of in ((rate, lambda s: s), (amplitude_rate, torch.sqrt)):
        expected = [-torch.autograd.grad(of(row).sum(), t, retain_graph=True)[0] for row in signal(logsnr, LEVELS)]
        torch.testing.assert_close(found(logsnr, slope, LEVELS), torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_every_level_peaks_where_the_snr_is_one_over_its_square():
    logsnr = torch.linspace(-8, 2, 10_001).double()
    bumps = rate(logsnr, -torch.ones_like(logsnr), LEVELS)
    for m, bump in zip(LEVELS, bumps, strict=True):
        assert abs(float(logsnr[bump.argmax()]) + 2 * math.log(m)) < 1e-3 and abs(float(bump.max()) - 0.25) < 1e-6


def test_closed_form_times():
    peaks = chromatogram(IDEAL, LEVELS).peaks
    expected = [2 / math.pi * math.atan(m) for m in LEVELS]
    torch.testing.assert_close(peaks, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    flow = chromatogram(RectifiedFlow(), LEVELS).peaks
    expected = [m / (1 + m) for m in LEVELS]
    torch.testing.assert_close(flow, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    sigma = GaussianProcess(Karras()).alpha_sigma(chromatogram(Karras(), LEVELS).peaks)[1]
    torch.testing.assert_close(sigma, torch.tensor(LEVELS).double(), rtol=1e-9, atol=0)
    table = chromatogram(ScaledLinearBeta().discrete(), (2,)).peaks
    assert abs(float(table - chromatogram(ScaledLinearBeta(), (2,)).peaks)) < 1e-3


def test_stable_diffusion_never_makes_its_coarsest_levels():
    missing = chromatogram(SCHEDULES["sd"](), levels_of(64)).missing
    a = 0.004660
    assert float(missing[-1]) == pytest.approx(64**2 * a / (1 + (64**2 - 1) * a), abs=1e-3) and missing[-1] > 0.9
    assert (missing.diff() > 0).all() and missing[0] < 0.01
    assert chromatogram(SCHEDULES["flow"](), levels_of(64)).missing.max() < 1e-3


def test_published_schedules():
    cosine, t = cosine_table(), torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    f = lambda x: torch.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(torch.sigmoid(cosine.logsnr(t)), f(t) / f(t * 0), rtol=1e-9, atol=0)
    assert float(sigmoid_table().logsnr(0.5)) == pytest.approx(0.0, abs=1e-9)
    assert float(sigmoid_table().logsnr(1.0)) == -math.inf
    for make in SCHEDULES.values():
        found = chromatogram(make(), LEVELS)
        assert all(x.isfinite().all() for x in (found.rate, found.share, found.signal, found.tau, found.peaks))
        assert found.dominant[0] == 16 and found.dominant[-1] == 1


# Warps


@pytest.mark.parametrize("schedule", SMOOTH, ids=lambda s: type(s).__name__)
def test_a_warp_gives_one_schedule_the_chromatogram_of_another(schedule):
    t = torch.linspace(0.2, 0.8, 13).double()
    there, back = map_schedule(schedule, RectifiedFlow()), map_schedule(RectifiedFlow(), schedule)
    torch.testing.assert_close(back(there(t)), t, rtol=0, atol=1e-9)
    at, wanted = chromatogram(schedule, LEVELS, there(t)), chromatogram(RectifiedFlow(), LEVELS, t)
    torch.testing.assert_close(at.signal, wanted.signal, rtol=0, atol=1e-9)
    dense = (there(t + 1e-6) - there(t - 1e-6)) / 2e-6
    torch.testing.assert_close(at.rate * dense, wanted.rate, rtol=1e-4, atol=1e-6)


def test_a_warp_between_sizes_keeps_the_coarse_curves():
    """Level 2 m of pictures twice as large is where level m was."""
    t, warp = torch.linspace(0.1, 0.9, 9).double(), map_schedule(RectifiedFlow(), RectifiedFlow(), 2)
    small = chromatogram(RectifiedFlow(), (1, 2, 4), t).signal
    large = chromatogram(RectifiedFlow(), (2, 4, 8), warp(t)).signal
    torch.testing.assert_close(large, small, rtol=0, atol=1e-12)
    shifted = Shifted(RectifiedFlow(), 1, 2)
    torch.testing.assert_close(shifted.logsnr(t), RectifiedFlow().logsnr(warp(t)), rtol=0, atol=1e-9)


# What a run shows


def test_means_have_the_variance_and_the_correlation_that_the_theory_says():
    a, n, m = 0.3, 4000, 2
    x0 = noise(n, 1, 4, 4, seed=1)
    means, eps = pooled(x0, (m, m)), noise(n, 1, 4, 4, seed=2)
    x = pooled(math.sqrt(a) * x0 + math.sqrt(1 - a) * eps, (m, m))
    assert float(x.var()) == pytest.approx(a * float(means.var()) + (1 - a) / m**2, rel=0.03)
    unit = 2 * means  # of unit variance, as the theory's data have it at every level
    noisy = (math.sqrt(a) * unit + math.sqrt(1 - a) / m * noise(*means.shape, seed=3)) / math.sqrt(float(power(a, m)))
    slope = float((noisy * unit).sum() / unit.square().sum())
    assert slope == pytest.approx(math.sqrt(float(signal(torch.tensor(a).double().logit(), (m,)))), rel=0.03)


def test_the_gain_of_smooth_and_of_white_pictures():
    blocky = noise(50, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(level_gains(blocky, (1, 2, 4)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    white = level_gains(noise(4000, 1, 8, 8), (1, 2, 4))
    torch.testing.assert_close(white, -2 * torch.tensor([1, 2, 4]).double().log(), rtol=0, atol=0.05)
    x = torch.linspace(-3, 3, 7).double()
    torch.testing.assert_close(signal(x, (1, 2, 4), white), torch.sigmoid(x).expand(3, -1), rtol=0, atol=0.02)


def coarse_and_fine() -> GaussianMixture:
    """Gaussian pictures whose means of 4 x 4 vary as much as what is within them does."""
    blocks = torch.kron(torch.eye(2), torch.ones(4, 1)).double()
    mean = torch.kron(blocks, blocks)
    return GaussianMixture.gaussian(torch.zeros(1, 8, 8).double(), mean @ mean.T + 0.05 * torch.eye(64).double())


def test_a_run_of_an_exact_model_makes_coarse_levels_first():
    process, data = GaussianProcess(RectifiedFlow()), coarse_and_fine()
    model, seen, times = MixtureDenoiser(process, data), [], torch.linspace(1, 0, 101).double()

    class Watched:
        prediction = "x0"

        def __call__(self, z, t, cond=None):
            seen.append(model(z, t))
            return seen[-1]

    Watched.process = process
    ddim(Watched(), noise(64, 1, 8, 8), times)
    x0 = torch.stack(seen)
    fine = x0 - pooled(x0, (4, 4)).repeat_interleave(4, -1).repeat_interleave(4, -2)
    coarse, detail = half_times(times[:-1], torch.cat([signal_present(x0, (4,)), signal_present(fine, (1,))]))
    assert coarse > detail + 0.2
    assert signal_present(x0, (1, 2, 4))[:, -1].tolist() == pytest.approx([1.0] * 3)


def test_half_times():
    times = torch.tensor([1.0, 0.8, 0.6, 0.4]).double()
    present = torch.tensor([[0.0, 0.4, 0.6, 1.0], [0.5, 0.6, 0.7, 1.0], [0.0, 0.1, 0.2, 0.3]]).double()
    assert half_times(times, present)[:2].tolist() == pytest.approx([0.7, 1.0])
    assert half_times(times, present)[2].isnan()
    with pytest.raises(BadInput, match="two or more seeds"):
        signal_present(noise(3, 1, 1, 4, 4), (1,))


# Prompts


def test_one_prompt_is_plain_sampling_and_a_switch_is_made_of_both_runs(tiny_sd):
    p, options = tiny_sd, {"sampling_steps": 6, "cfg_scale": 3.0, "scheduler": "ddim"}
    plain = p.draw("a red star", 3, **options)
    assert torch.equal(p.draw(None, 3, cond=prompt_schedule(p, {1: "a red star"}), **options), plain)
    schedule = prompt_schedule(p, {1: "a red star", 4: "a blue circle"})
    composed = p.draw(None, 3, cond=schedule, **options)
    coarse = list(p.states("a blue circle", 3, sampling_steps=6, cfg_scale=3.0))
    switch = next(i for i, (_, t) in enumerate(coarse) if schedule(t).prompts == ("a red star",))
    assert 0 < switch < 6
    rest = p.draw("a red star", 3, start=coarse[switch], **options)
    torch.testing.assert_close(composed, rest, rtol=0, atol=1e-5)
    with ResolutionChromatography(compose=("4=a blue circle",)).patch(p) as told:
        torch.testing.assert_close(p.draw("a red star", 3, **options), composed, rtol=0, atol=1e-6)
    assert told["calls"] == {"1": 6 - switch, "4": switch}


@pytest.mark.parametrize("mode", ["score", "embedding"])
def test_mixtures(tiny_sd, mode):
    p, t = tiny_sd, 0.6
    z = torch.randn(2, *p.latent_shape(), generator=torch.Generator().manual_seed(0))
    own, other = p.encode(["a red star", "art"]), p.encode(["a blue circle"] * 2)
    w = shares(p.process.logsnr(t), (1, 4)).tolist()
    assert 0.05 < w[0] < 0.95
    with ResolutionChromatography(compose=("4=a blue circle",), mode=mode).patch(p), torch.no_grad():
        found = p.denoiser(z, t, own)
    with torch.no_grad():
        if mode == "score":
            expected = w[0] * p.denoiser(z, t, own) + w[1] * p.denoiser(z, t, other)
        else:
            expected = p.denoiser(z, t, own.replace(tokens=w[0] * own.tokens + w[1] * other.tokens))
            mixed = prompt_schedule(p, {1: "a red star", 4: "a blue circle"}, "embedding")(t)
            torch.testing.assert_close(p.denoiser(z[:1], t, mixed), found[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_where_there_is_no_signal_shares_are_their_limit():
    t = torch.tensor([1.0, 0.9999, 0.0001, 0.0]).double()
    found = shares(RectifiedFlow().logsnr(t), (1, 4))
    torch.testing.assert_close(found.sum(0), torch.ones(4).double())
    torch.testing.assert_close(found[:, 0], torch.tensor([1 / 17, 16 / 17]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, [0, 3]], found[:, [1, 2]], rtol=2e-3, atol=0)


@pytest.mark.parametrize("mode", ["switch", "score", "embedding"])
def test_a_flow_begins_with_the_coarse_prompt(tiny_sd3, mode):
    p, options = tiny_sd3, {"sampling_steps": 3, "cfg_scale": 1.0}
    with ResolutionChromatography(compose=("4=a blue circle",), mode=mode).patch(p) as told:
        drawn = p.draw("a red star", 3, **options)
    assert drawn.isfinite().all() and told["calls"]["4"] == (2 if mode == "switch" else 3)
    prompts = {1: "a red star", 4: "a blue circle"}
    if mode == "embedding":
        w = shares(p.process.logsnr(1.0), (1, 4)).tolist()
        own, other = (p.encode(prompt).tokens for prompt in prompts.values())
        mixed = prompt_schedule(p, prompts, mode)(1.0).tokens
        torch.testing.assert_close(mixed, w[0] * own + w[1] * other, rtol=0, atol=1e-6)
        assert w[1] > 0.9
    elif mode == "switch":
        assert prompt_schedule(p, prompts, mode)(1.0).prompts == ("a blue circle",)
        scheduled = p.draw(None, 3, cond=prompt_schedule(p, prompts), **options)
        torch.testing.assert_close(scheduled, drawn, rtol=0, atol=1e-5)


def test_what_runs_the_network_in_parts_is_given_the_changed_prompt(tiny_sd):
    p, options = tiny_sd, {"sampling_steps": 4, "scheduler": "ddim"}
    compose = ResolutionChromatography(compose=("2=a blue circle",))
    with FasterDiffusion(keys=(0,), alpha=0.0, mode="serial").patch(p):
        expected = p.draw(None, 3, cond=prompt_schedule(p, {1: "a red star", 2: "a blue circle"}), **options)
        with compose.patch(p):
            torch.testing.assert_close(p.draw("a red star", 3, **options), expected, rtol=0, atol=1e-5)


def pixels() -> ImageModel:
    torch.manual_seed(0)
    network = UNet(8, 3, 2, channels=(8, 8), layers=1, attention=())
    for x in network.parameters():
        torch.nn.init.normal_(x, std=0.2) if x.abs().max() == 0 else None
    return ImageModel(network.eval(), GaussianProcess(Cosine()), "v", (3, 8, 8), ("star", "circle"))


def test_classes_can_be_scheduled_too():
    model = pixels()
    schedule = prompt_schedule(model, {1: "star", 8: "circle"})
    assert [int(schedule(t).numbers) for t in (0.95, 0.3)] == [1, 0]
    drawn = model.draw(None, [0, 1], cond=schedule, sampling_steps=4, scheduler="ddim")
    assert not torch.equal(drawn, model.draw("star", [0, 1], sampling_steps=4, scheduler="ddim"))
    with pytest.raises(BadInput, match="use the mode 'switch'"):
        prompt_schedule(model, {1: "star", 8: "circle"}, "embedding")


# Upscaling


def test_the_weight_of_upscaling_is_the_share_of_the_coarse_levels():
    class Network:
        process, prediction = GaussianProcess(RectifiedFlow()), "flow"

    rule = Weighted(Network(), (2, 2), side=8)
    t = torch.tensor([0.3, 0.6, 0.95]).double()
    torch.testing.assert_close(rule.weight(t), 1 - shares(RectifiedFlow().logsnr(t), (1, 2, 4, 8))[0])
    assert (rule.weight(t).diff() > 0).all()


def test_upscaling_is_a_cascade_of_prime_factors(tiny_sd):
    size = 4 * tiny_sd.size
    with ResolutionChromatography(upscale=4).patch(tiny_sd) as told:
        assert tiny_sd.draw("art", 0, sampling_steps=2, size=size, cfg_scale=1.0).shape[-1] == size
        assert told["small_runs"] == 2
        with pytest.raises(BadInput, match=f"pictures of {size} pixels"):
            tiny_sd.draw("art", 0, sampling_steps=2)


def test_it_nests_with_upsample_guidance(tiny_sd):
    compose, larger = ResolutionChromatography(compose=("8=a blue circle",)), UpsampleGuidance()
    draw = lambda: tiny_sd.draw("art", 0, sampling_steps=2, size=2 * tiny_sd.size)
    with compose.patch(tiny_sd), larger.patch(tiny_sd):
        first = draw()
    with larger.patch(tiny_sd), compose.patch(tiny_sd):
        assert torch.equal(draw(), first)


@pytest.mark.parametrize("mode", ["switch", "embedding"])
@pytest.mark.parametrize("upscale", [1, 2, 4])
def test_small_pictures_are_told_what_the_large_one_is(tiny_sd, mode, upscale):
    told, steps, scale = {}, 10, max(2, upscale)

    class Watch(Interceptor):
        def predict(self, forward, call, run):
            told.setdefault(run.index, []).append((call.z.shape[-1], call.inputs["encoder_hidden_states"]))
            return forward(call)

    compose = ResolutionChromatography(compose=("2=a blue circle",), mode=mode, upscale=upscale)
    with ExitStack() as stack:
        counted = stack.enter_context(compose.patch(tiny_sd))
        if upscale == 1:
            stack.enter_context(UpsampleGuidance(eta=1.0).patch(tiny_sd))
        stack.enter_context(tiny_sd.intercept(Watch(), "features"))  # the innermost
        tiny_sd.draw("a red star", 0, sampling_steps=steps, size=scale * tiny_sd.size, cfg_scale=1.0, scheduler="ddim")
    for calls in told.values():
        assert all(torch.equal(tokens, calls[0][1]) for _, tokens in calls)
    sides = {side for calls in told.values() for side, _ in calls}
    assert sides == {tiny_sd.latent_shape()[-1] * n for n in range(1, scale + 1) if scale % n == 0}
    assert len({float(calls[0][1].sum()) for calls in told.values()}) > 1, "prompts changed on the way"
    if mode == "switch":
        assert sum(counted["calls"].values()) == steps


# Analysis and bad input


def test_a_models_chromatogram_on_the_command_line(tiny_sd, tmp_path, capsys):
    model, out = str(tiny_sd.save(tmp_path / "tiny")), tmp_path / "analysis"
    args = ["steer", "resolution-chromatography", "a red star", "--model", model, "--seeds", "0-2", "--steps", "4"]
    assert cli.main([*args, "--analyse", "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads((out / "analysis.json").read_text())
    levels = record["tables"]["levels"]
    assert [row["level"] for row in levels] == [1, 2, 4, 8] and all("measured" in row for row in levels)
    assert "measured: signal that is there" in record["panels"] and len(record["tables"]["steps"]) == 4
    peaks = [float(row["peak"]) for row in csv.DictReader((out / "levels.csv").open())]
    expected = chromatogram(tiny_sd.process.schedule, (1, 2, 4, 8)).peaks.tolist()
    assert peaks == pytest.approx(expected) and (out / "analysis.png").is_file()
    assert "never made" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd3", "tiny_flux"])
def test_the_steps_of_an_analysis_are_those_of_a_run(request, family):
    p, method = request.getfixturevalue(family), ResolutionChromatography(levels=(1, 4))
    at, _ = measure(p, ["a red star"], [0, 1], 4)
    rows = method.analyse(p, None, [0], 4).tables["steps"]
    assert [row["time"] for row in rows] == pytest.approx(at.tolist(), abs=1e-9)
    end = float(p.walk(4)[-1])
    assert end == pytest.approx(p.cleanest if "set_alpha_to_one" in p.pipe.scheduler.config else 0.0)
    due = signal(p.process.schedule.logsnr(torch.tensor([*at.tolist(), end], dtype=torch.float64)), (1, 4)).diff(dim=1)
    for level, name in zip(due, [x for x in rows[0] if " x " in x], strict=True):
        assert [row[name] for row in rows] == pytest.approx(level.tolist(), abs=1e-9)


def test_the_chromatogram_of_a_published_schedule_needs_no_prompt():
    found = ResolutionChromatography(schedule="edm", levels=(1, 4)).analyse(pixels(), None, [0], 5)
    assert [row["level"] for row in found.tables["levels"]] == [1, 4] and not found.notes
    made = sum(row["2 x 2"] for row in found.tables["steps"])
    assert made == pytest.approx(1 - found.tables["levels"][1]["missing"], abs=1e-9)


def test_the_levels_of_a_side_that_is_no_power_of_two_are_those_that_divide_it():
    model = pixels()
    model.shape = (3, 12, 12)
    found = ResolutionChromatography().analyse(model, None, [0], 5)
    assert [row["level"] for row in found.tables["levels"]] == [1, 2, 4]


def test_measuring_records_the_whole_run():
    times, x0 = measure(pixels(), ["star", "circle", "star"], [0, 1, 2], 5)
    assert times.tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2]) and x0.shape == (5, 3, 3, 8, 8)
    once, each = (measure(pixels(), ["star", "circle"], seeds, 5)[1] for seeds in ([3], [3, 3]))
    assert torch.equal(once, each)
    torch.manual_seed(0)
    network = VideoUNet(8, 4, 1, channels=(8, 8), layers=1, head_dim=8, embedding=16)
    with pytest.raises(BadInput, match="frames have a noise level each"):
        measure(VideoModel(network.eval(), GaussianProcess(Cosine()), "v", (4, 1, 8, 8)), None, [0])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"compose": ("a star",)}, "M=PROMPT"),
        ({"compose": ("1=a star",)}, "M at least 2"),
        ({"compose": ("4=a star", "4=art")}, "two prompts"),
        ({"schedule": "edn"}, "did you mean edm"),
        ({"levels": (0,)}, "must be at least 1"),
        ({"mode": "both"}, "switch"),
    ],
)
def test_bad_settings(given, told):
    with pytest.raises(BadInput, match=told):
        ResolutionChromatography(**given)


def test_levels_that_a_model_does_not_have(tiny_sd):
    with pytest.raises(BadInput, match="no level 64"), ResolutionChromatography(compose=("64=a star",)).patch(tiny_sd):
        pass
    with pytest.raises(BadInput, match="blocks of 3 do not divide"):
        ResolutionChromatography(levels=(3,)).analyse(tiny_sd, None, [0], 5)
    with pytest.raises(BadInput, match="at least 1 element"):
        chromatogram(Cosine(), ())
    with pytest.raises(BadInput, match="leave --analyse out"):
        FasterDiffusion().analyse(tiny_sd, None, [0], 5)


def test_a_table_that_ends_without_signal():
    table = DiscreteSchedule.from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.1, 0.0]).double())
    found = chromatogram(table, (1, 64))
    assert found.rate.isfinite().all() and found.missing[1] < 1e-5
