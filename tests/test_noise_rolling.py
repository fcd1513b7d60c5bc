"""Local times of rolling diffusion: the identities of its two phases, for all windows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from noise_cases import IDEAL, normal
from sfumato.errors import BadInput
from sfumato.noise import Cosine, GaussianProcess, Window
from sfumato.noise.rolling import masks

PHASES = ("rolling", "init", "standard")


@st.composite
def windows(draw) -> Window:
    frames = draw(st.integers(1, 20))
    return Window(frames, draw(st.integers(0, frames - 1)))


unit = st.floats(0, 1)


@given(windows(), unit)
def test_times_are_the_formulas_frame_by_frame(window, t):
    n, length = window.clean, window.noisy
    for w in range(window.frames):
        assert window.times("rolling", t)[w] == min(max((w - n + t) / length, 0), 1)
        assert window.times("init", t)[w] == (min((w - n) / length + t, 1) if w >= n else 0)
        assert window.times("standard", t)[w] == (t if w >= n else 0)


@given(windows())
def test_a_pass_ends_where_the_next_begins_after_the_shift(window):
    start, end = window.times("rolling", 1.0), window.times("rolling", 0.0)
    assert torch.equal(torch.cat([end[1:], torch.ones(1, dtype=torch.float64)]), start)
    generated = torch.arange(window.noisy, dtype=torch.float64)
    assert torch.equal(end[window.clean :], generated / window.noisy)
    assert torch.equal(start[window.clean :], (generated + 1) / window.noisy)


@given(windows())
def test_init_leads_from_noise_to_where_rolling_starts(window):
    start = window.times("init", 1.0)
    assert torch.equal(start, window.times("standard", 1.0))
    assert torch.equal(window.times("init", 0.0), window.times("rolling", 0.0))


@given(windows(), unit, st.integers(0, 30))
def test_chained_shifts_are_one_global_schedule(window, t, passes):
    """Frame k of a long clip in pass j stands at place k - j of the window: clip((k - n + t - j) / (W - n))."""
    place = torch.arange(window.frames, dtype=torch.float64) + passes
    expected = ((place - window.clean + (t - passes)) / window.noisy).clamp(0, 1)
    assert_close(window.times("rolling", t), expected, rtol=0, atol=1e-13)
    standing = window.times("rolling", t - passes)  # a window that does not move on
    kept = max(window.frames - passes, 0)
    assert_close(standing[passes:], window.times("rolling", t)[:kept], rtol=0, atol=1e-13)
    assert (standing[: passes + window.clean] == 0).all()


@given(st.integers(0, 12), unit)
def test_one_frame_under_way_is_ordinary_next_frame_diffusion(clean, t):
    window = Window(clean + 1, clean)
    expected = torch.tensor([0.0] * clean + [t], dtype=torch.float64)
    for phase in PHASES:
        assert torch.equal(window.times(phase, t), expected)


@given(windows(), unit, unit, st.sampled_from(PHASES))
def test_times_grow_along_the_window_and_with_t(window, one, other, phase):
    low, high = sorted((one, other))
    later = window.times(phase, high)
    assert (later.diff() >= 0).all()
    assert (later >= window.times(phase, low)).all()
    assert (later >= 0).all() and (later <= 1).all()
    assert (later[: window.clean] == 0).all()


@given(windows(), st.floats(0.01, 0.99), st.sampled_from(PHASES))
def test_moving_frames_are_those_whose_time_changes(window, t, phase):
    step = 1e-9
    before, after = window.times(phase, t), window.times(phase, t - step)
    clean, noise, inside = masks(before, after)
    assert torch.equal(clean.int() + noise.int() + inside.int(), torch.ones(window.frames, dtype=torch.int32))
    at_a_corner = any(abs(before[w] + x - y) < 1e-6 for w in range(window.frames) for x in (0, step) for y in (1,))
    if phase != "init" or not at_a_corner:
        assert torch.equal(window.moving(phase, t), inside)
        assert torch.equal(window.moving(phase, t), before != after)


def test_moving_by_hand():
    window = Window(5, 1)  # local times of init at t: t, t + 1/4, t + 1/2, t + 3/4
    assert window.moving("init", 0.4).tolist() == [False, True, True, True, False]
    assert window.moving("init", 0.9).tolist() == [False, True, False, False, False]
    assert window.moving("rolling", 0.9).tolist() == [False, True, True, True, True]
    assert window.moving("init", 1.0).tolist() == [False, True, False, False, False]
    assert window.times("init", 0.4).tolist() == pytest.approx([0, 0.4, 0.65, 0.9, 1])


@given(windows(), st.sampled_from(PHASES))
def test_batches_of_times(window, phase):
    t = torch.rand(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = window.times(phase, t)
    assert together.shape == (3, 2, window.frames)
    assert torch.equal(together[1, 0], window.times(phase, t[1, 0].item()))


@given(windows(), unit, unit, st.sampled_from(PHASES), st.sampled_from([Cosine(), IDEAL]))
def test_clean_and_noise_frames_are_left_alone_to_the_bit(window, one, other, phase, schedule):
    process = GaussianProcess(schedule)
    t, s = (window.times(phase, x)[None] for x in (max(one, other), min(one, other)))
    z, x0 = normal(2, window.frames, 1, 2, 2), normal(2, window.frames, 1, 2, 2, seed=1)
    mean, var = process.posterior(z, x0, t, s)
    moved = process.sample(mean, var, normal(*z.shape, seed=2))
    clean, noise, _ = masks(t[0], s[0])
    assert torch.equal(moved[:, clean | noise], z[:, clean | noise])


@given(windows(), st.floats(0.1, 0.9), st.floats(0.2, 0.8))
def test_window_frames_take_the_ordinary_posterior_each_at_its_own_times(window, t, share):
    """mean = alpha_s (z (1 - c) / alpha_t + c x0), var = sigma_s^2 c, c = 1 - exp(lambda_t - lambda_s)."""
    process = GaussianProcess(Cosine())
    z, x0 = normal(1, window.frames, 1, 1, 1), normal(1, window.frames, 1, 1, 1, seed=1)
    times, ends = window.times("rolling", t), window.times("rolling", t * share)
    mean, var = process.posterior(z, x0, times[None], ends[None])
    for w in range(window.frames):
        gap = process.logsnr(times[w]) - process.logsnr(ends[w])
        c = -math.expm1(gap)
        (alpha_t, _), (alpha_s, sigma_s) = process.alpha_sigma(times[w]), process.alpha_sigma(ends[w])
        expected = alpha_s * (z[0, w] * (1 - c) / alpha_t + c * x0[0, w])
        assert_close(mean[0, w], expected, rtol=1e-9, atol=1e-12)
        assert_close(var[0, w].flatten()[0], sigma_s**2 * c, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 0), (3, 3), (2, 5), (4, -1)])
def test_windows_without_a_frame_to_generate_are_refused(shape):
    with pytest.raises(BadInput, match="cannot begin"):
        Window(*shape)


def test_unknown_phase_is_named():
    with pytest.raises(BadInput, match="'warm'"):
        Window(3, 1).times("warm", 0.5)
