"""Imports run downwards only; `LEVELS` lists the rooms from the ground up."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sfumato

SOURCE = Path(sfumato.__file__).parent
LEVELS = (
    ("noise", "data", "metrics"),
    ("pipeline", "sample", "nets", "train"),
    ("distill",),
    ("erase", "attack", "customize", "steer", "edit", "protect", "vision"),
    ("audit", "ledger", "report"),
    ("commands",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
VERBS = LEVELS[3]
COMMON = {"errors", "files", "plan", "progress", "catalog", "__init__", "__main__"}
"""Modules that every room may use; they use none of the rooms."""


def imports(file: Path) -> set[str]:
    """The rooms and common modules of this package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found |= set(names) if parts[0] == "sfumato" else set()
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {p[1] for p in parts if p[0] == "sfumato" and len(p) > 1}
    return {name for name in found if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()}


def room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_room_has_its_level():
    assert {room(file) for file in FILES} <= LEVEL.keys() | COMMON


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_downwards(file):
    here = room(file)
    used = imports(file) - {here}
    if here in COMMON:
        assert used <= COMMON | ({"cli"} if here == "__main__" else set())
        return
    assert not {other for other in used - COMMON if LEVEL[other] > LEVEL[here]}
    if here in VERBS:
        assert not used & set(VERBS), "one verb's folder never imports another's"


def test_there_are_no_circles_of_rooms():
    graph: dict[str, set[str]] = {}
    for file in FILES:
        graph.setdefault(room(file), set()).update(imports(file) - {room(file)} - COMMON)
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_relative_imports_stay_in_their_room():
    for file in FILES:
        depth = len(file.relative_to(SOURCE).parts) - 1
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= max(depth, 1), f"{file}: line {node.lineno}"
