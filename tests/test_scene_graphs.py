"""The script that trains pictures from scene graphs and reads what was drawn, on a tiny model."""

from __future__ import annotations

import json

import pytest

import scene_graphs
from sfumato.data.graphs import SceneGraph
from sfumato.data.scenes import Found
from sfumato.train.trf_sg2im import TrfSG2Im


def test_relations_are_read_from_boxes_and_from_what_the_oracle_finds():
    graph = SceneGraph(("red star", "blue fish"), ((0, "left of", 1),))
    boxes = [(0.0, 0.25, 0.25, 0.5), (0.5, 0.25, 0.75, 0.5)]
    assert scene_graphs.in_layout(graph, boxes) == [True]
    assert scene_graphs.in_layout(scene_graphs.turned(graph), boxes) == [False]
    star, fish = Found("star", "red", 0.2, 0.5, 0.3, 0.9), Found("fish", "blue", 0.8, 0.5, 0.3, 0.8)
    read = lambda graph, *found: tuple(scene_graphs.in_picture(graph, found).values())
    assert read(graph, star, fish) == ([True, True], [True], [True])
    assert read(scene_graphs.turned(graph), star, fish) == ([True, True], [False], [False])
    other = Found("fish", "green", 0.8, 0.5, 0.3, 0.8)
    assert read(graph, star, other) == ([True, False], [False], [False])
    blob = Found("heart", "blue", 0.8, 0.5, 0.3, 0.8)
    assert read(graph, star, blob) == ([True, False], [False], [True])
    assert read(scene_graphs.turned(graph), star, blob) == ([True, False], [False], [False])
    both_red = SceneGraph(("red star", "red fish"), ((0, "left of", 1),))
    assert read(both_red, star) == ([True, False], [False], [])


@pytest.mark.slow
def test_the_page_says_what_was_measured(tmp_path, monkeypatch, capsys):
    small = {**TrfSG2Im.EXAMPLE, "grid_every": 0}
    monkeypatch.setattr(TrfSG2Im, "presets", {"small-sketch": small})
    scene_graphs.main(["--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs"), "--n", "6"])
    record = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert record["found"]["as asked"]["layout"][1] >= 6 == record["graphs"]
    real = record["found"]["real pictures"]["objects"]
    assert 0 <= real[0] <= real[1] >= 12
    text = (tmp_path / "docs" / "trf-sg2im.md").read_text()
    assert "| turned round | " in text and (tmp_path / "docs" / "trf-sg2im.png").exists()
