"""Imports run downwards only, without circles of rooms or of files; `LEVELS` lists the rooms from the ground up."""

from __future__ import annotations

import pytest

from imports import circles, graph, of_rooms, room

LEVELS = (
    ("noise", "data", "metrics"),
    ("pipeline", "sample", "nets", "train"),
    ("distill",),
    ("erase", "attack", "steer", "edit", "customize", "protect", "attribute", "classify", "explain"),
    ("audit", "ledger", "report"),
    ("bench",),
    ("commands",),
    ("cli",),
    ("studio",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
VERBS = LEVELS[3]
COMMON = {
    "catalog", "cells", "errors", "fields", "files", "finite", "foreign", "hub", "locks", "memory", "plan", "progress",
    "settings", "text", "versions", "sfumato",
    "__main__",
}  # fmt: skip
"""Modules that every room may use; they use none of the rooms."""
EDGES = graph()


def test_every_room_has_its_level():
    assert set(map(room, EDGES)) <= LEVEL.keys() | COMMON


@pytest.mark.parametrize("name", EDGES)
def test_imports_run_downwards(name):
    here = room(name)
    used = set(map(room, EDGES[name])) - {here}
    if here in COMMON:
        assert used <= COMMON | ({"cli"} if here == "__main__" else set())
        return
    assert not {other for other in used - COMMON if LEVEL[other] > LEVEL[here]}
    if here in VERBS:
        assert not used & set(VERBS), "one verb's folder never imports another's"


def test_there_are_no_circles_of_rooms():
    assert circles(of_rooms(EDGES)) == []


def test_there_are_no_circles_of_files():
    assert circles(graph(typed=False)) == []


def test_there_are_none_for_the_type_checker_either():
    assert circles(EDGES) == []


def test_a_circle_is_found_and_named(tmp_path):
    """Whatever way an import is written, in a function or for the type checker."""
    files = {
        "__init__.py": "",
        "a/__init__.py": "from .one import x\n",
        "a/one.py": "from . import two\nfrom ..b import y as x\n",
        "a/two.py": "def f():\n    import p.a.three\n",
        "a/three.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import x\n",
        "b/__init__.py": "from p import c\nfrom .. import a as y\n",
        "c.py": "import os\n",
    }
    for name, text in files.items():
        file = tmp_path / "p" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    edges = graph(tmp_path / "p")
    assert edges["p.a.one"] == {"p.a.two", "p.b"} and edges["p.b"] == {"p.c", "p.a"} and edges["p.c"] == set()
    assert circles(edges) == [["p.a", "p.a.one", "p.b", "p.a"]]
    assert circles(of_rooms(edges)) == [["a", "b", "a"]]
    without = {**graph(tmp_path / "p", typed=False), "p.b": {"p.c"}}
    assert circles(without) == [] and circles({**without, "p.a.three": {"p.a.one"}}) == [
        ["p.a.one", "p.a.two", "p.a.three", "p.a.one"]
    ]
