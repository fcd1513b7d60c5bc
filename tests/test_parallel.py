"""Several processes train as one does, within rounding: data-parallel and sharded, also after a change of their number.

They talk through gloo on the CPU.
"""

from __future__ import annotations

import json

import pytest
import torch

from loop_cases import Line, fit, fit_sharded, game_run, line_run, play, together, weights

MODES = pytest.mark.parametrize("mode", [fit, fit_sharded], ids=["data-parallel", "sharded"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, without dropout: the batch of 7 cannot be halved evenly."""
    run = line_run(tmp_path_factory.mktemp("alone") / "run", recipe=Line(dropout=0), batch=7, grid_every=40)
    run.fit(progress=False)
    return run


def ends(folder) -> list[torch.Tensor]:
    states = [torch.load(folder / f"end-{i}.pt", weights_only=True) for i in range(2)]
    assert all(state["count"] == sum(range(41)) for state in states)
    return [torch.cat([v.flatten() for k, v in state.items() if k != "count"]) for state in states]


@MODES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one(mode, accumulate, alone, tmp_path):
    together(2, mode, str(tmp_path), {"batch": 7, "accumulate": accumulate, "grid_every": 40})
    first, second = ends(tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(alone), rtol=1e-4, atol=1e-6)
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (alone.folder, tmp_path)]
    one, two = ([json.loads(line) for line in lines] for lines in logs)
    assert [row["step"] for row in two] == [10, 20, 30, 40]
    for key in ("loss", "worst", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3)
    assert [p.name for p in (tmp_path / "grids").iterdir()] == ["0000040.png"]


@MODES
def test_a_run_goes_on_with_another_number_of_processes(mode, alone, tmp_path):
    changes = {"batch": 7, "checkpoint_every": 17}
    half = line_run(tmp_path, recipe=Line(dropout=0), **changes)
    for _ in range(17):
        half.one_step()
    half.save()
    together(2, mode, str(tmp_path), {**changes, "updates": 40})
    torch.testing.assert_close(ends(tmp_path)[0], weights(alone), rtol=1e-4, atol=1e-6)
    back = line_run(tmp_path, recipe=Line(dropout=0), **changes)
    back.fit(progress=False)
    assert torch.equal(weights(back), ends(tmp_path)[0])


def test_turns_in_two_processes(tmp_path):
    """Each turn's gradients are those of all rows, and what other turns train is left alone."""
    alone = game_run(tmp_path / "alone", updates=12)
    alone.fit(progress=False)
    (tmp_path / "two").mkdir()
    together(2, play, str(tmp_path / "two"), {"updates": 12})
    first, second = (torch.load(tmp_path / "two" / f"end-{i}.pt", weights_only=True) for i in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    torch.testing.assert_close(first["weight"], alone.recipe.maker.weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first["judge.0.weight"], alone.recipe.judge[0].weight.detach(), rtol=1e-2, atol=1e-4)
