"""Which eraser: by what its class says, and by a table made of a bench."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sfumato import catalog, cli
from sfumato.commands import choosing
from sfumato.errors import BadInput
from sfumato.report import measured


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "n": 3}


def method(name: str, erased: float, withstood: float | None, near: float, seconds: float, cells: int = 3) -> dict:
    held = None if withstood is None else figure(withstood)
    return {"method": name, "cells": cells, "erasure": figure(erased), "withstood": held, "near": figure(near),
            "far": figure(0.75), "seconds": seconds, "why": []}  # fmt: skip


BENCH = {
    "methods": [
        method("uce", 0.95, 0.25, 0.5, 2.0), method("rece", 1.0, 0.5, 0.25, 3.0),
        method("esd-x", 0.9, 0.75, 1.0, 400.0),
        method("spm", 0.95, 0.125, 0.5, 500.0), method("duo", 0.5, 1.0, 1.0, 600.0),
        {"method": "sfd", "cells": 0, "why": ["does not fit"]},
    ],
    "configuration": {"model": "sketch", "concepts": ["fish"], "seeds": [1, 2, 3], "attacks": ["p4d"], "n": 48},
    "model": "abc", "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps(BENCH))
    return folder


@pytest.fixture
def file(bench, tmp_path, monkeypatch):
    """The package's own table, made of the bench above."""
    out = tmp_path / "erasure.json"
    measured.make(bench, out)
    monkeypatch.setattr(measured, "FILE", out)
    return out


def test_the_table_has_the_benchs_means(file):
    found = measured.rows()
    assert found.keys() == {"uce", "rece", "esd-x", "spm", "duo"}
    ends = {"erased": [0.9, 0.9], "withstands": [0.75, 0.75], "near": [1.0, 1.0], "far": [0.75, 0.75]}
    assert found["esd-x"] == measured.Row(0.9, 0.75, 1.0, 0.75, 400.0, 3, ends)
    assert json.loads(file.read_text())["conditions"]["seeds"] == [1, 2, 3]


def test_what_withstands_the_most_comes_first_and_what_was_not_measured_last(file):
    rows = {row[0]: row for row in choosing.table()}
    assert list(rows)[:5] == ["duo", "esd-x", "rece", "uce", "spm"]
    assert len(rows) == len(catalog.methods("erase"))
    assert rows["sfd"][4:] == (*("not measured",) * 5, "0") and rows["uce"][-1] == "3"
    assert rows["uce"][4:8] == tuple(f"{x}\u202f% [{x}, {x}]" for x in ("95.0", "25.0", "50.0", "75.0"))


def test_the_table_decides(file):
    told = choosing.advice()
    assert told[0].startswith("Withstands the most: esd-x (")  # duo erases too little to count
    assert told[1].startswith("Keeps what is near the best: esd-x (")
    assert told[2].startswith("Without training, withstands the most: rece (")
    assert told[3].startswith("Can be taken off again, withstands the most: spm (")
    assert "on sketch; erased: fish; seeds 1, 2, 3; 48 pictures of each concept; under attack by: p4d" in told[-1]


def test_an_order_that_the_intervals_do_not_hold_up_is_said_to_be_none(tmp_path):
    rows = [method("uce", 1.0, 0.75, 0.5, 1.0), method("rece", 1.0, 0.5, 0.5, 1.0), method("spm", 1, 0, 0, 1)]
    rows[1]["withstood"].update(low=0.25, high=0.8)
    (tmp_path / "bench.json").write_text(json.dumps({**BENCH, "methods": rows}))
    measured.make(tmp_path, tmp_path / "t.json")
    assert choosing.advice(tmp_path / "t.json")[0].endswith("[75.0, 75.0]); as much by the intervals of: rece.")


def test_what_is_removable_as_a_lora_alone_was_measured_as_something_else(tmp_path):
    rows = [method("surgical", 1.0, 0.75, 0.5, 1.0), method("spm", 1.0, 0.5, 0.5, 1.0)]
    (tmp_path / "bench.json").write_text(json.dumps({**BENCH, "methods": rows}))
    measured.make(tmp_path, tmp_path / "t.json")
    told = [line for line in choosing.advice(tmp_path / "t.json") if line.startswith("Can be taken off again")]
    assert len(told) == 1 and "surgical" not in told[0] and "spm" in told[0]


def test_a_bench_without_attacks_says_nothing_of_what_is_withstood(tmp_path):
    bench = {**BENCH, "methods": [method("uce", 0.95, None, 0.5, 1.0)]}
    bench["configuration"] = {**BENCH["configuration"], "attacks": []}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    measured.make(tmp_path, tmp_path / "t.json")
    told = choosing.advice(tmp_path / "t.json")
    assert told[0].startswith("Keeps") and "under attack by: no attack" in told[-1]


def test_the_attacks_that_are_named_are_those_that_were_run_on_the_weights_as_they_are(tmp_path):
    rows = [{**method("uce", 0.95, 0.5, 0.5, 1.0), "recovered": {"mma": figure(0.5), "recovery": figure(1.0)}}]
    cells = [{"method": "uce", "retraining": ["recovery"]}]
    bench = {**BENCH, "methods": rows, "cells": cells, "configuration": {**BENCH["configuration"], "attacks": None}}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    measured.make(tmp_path, tmp_path / "t.json")
    assert measured.conditions(tmp_path / "t.json").endswith("under attack by: mma")


def test_a_table_in_which_nothing_erases_enough_chooses_nothing(tmp_path):
    bench = {**BENCH, "methods": [method("uce", 0.5, None, 0.5, 1.0)]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    measured.make(tmp_path / "bench.json", tmp_path / "t.json")
    assert choosing.advice(tmp_path / "t.json")[0].startswith("No method erased in")
    assert measured.rows(tmp_path / "t.json")["uce"].withstands is None


def test_without_a_table_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "FILE", tmp_path / "nothing.json")
    assert choosing.advice() == [choosing.NONE]
    assert {row[4:9] for row in choosing.table()} == {("not measured",) * 5}
    assert cli.main(["choose", "erase"]) == 0
    assert "Nothing was measured yet" in capsys.readouterr().out


def test_facts_are_those_of_the_classes():
    facts = {m.name: choosing.facts(m.load()) for m in catalog.methods("erase")}
    assert [n for n, f in facts.items() if f["trains"] == "no"] == ["uce", "rece"]
    assert {n for n, f in facts.items() if f["pictures"] != "no"} == {"doco", "duo", "integrity"}
    assert facts["spm"]["removable"] == facts["duo"]["removable"] == "yes"
    assert facts["surgical"]["removable"] == "with --trained lora" and facts["esd-x"]["removable"] == "no"


@pytest.mark.parametrize("name", ["esd-x", "spm", "surgical"])
def test_what_is_removable_is_attached_beside_the_weights(tiny_sd, name):
    cls = catalog.get(name, "erase").load()
    settings = {**cls.EXAMPLE, "updates": 1, **({"trained": "lora"} if name == "surgical" else {})}
    made = cls(concepts=("star",), **settings).apply(tiny_sd)
    assert bool(made.adapters) == (choosing.facts(cls)["removable"] != "no")


def test_the_commands(bench, file, tmp_path, capsys):
    assert cli.main(["bench", "table", "--bench", str(bench), "--out", str(tmp_path / "mine.json")]) == 0
    assert "Withstands the most: esd-x" in capsys.readouterr().out
    assert (tmp_path / "mine.json").read_text() == file.read_text()
    assert cli.main(["choose", "erase"]) == 0
    assert "Withstands the most: esd-x" in capsys.readouterr().out
    assert cli.main(["erase", "uce", "--help"]) == 0
    assert "withstands: 25.0" in capsys.readouterr().out


def test_bad_input(bench, tmp_path):
    with pytest.raises(BadInput, match="holds no bench"):
        measured.make(tmp_path, tmp_path / "x.json")
    with pytest.raises(BadInput, match="exists"):
        measured.make(bench, bench / "bench.json")
    with pytest.raises(BadInput, match="no cell of this bench was measured"):
        measured.table_of({**BENCH, "methods": [{"method": "sfd", "cells": 0}]})
    with pytest.raises(BadInput, match="which is no number"):
        measured.table_of({**BENCH, "methods": [{"method": "uce", "cells": 1, "erasure": {"value": "much"}}]})
