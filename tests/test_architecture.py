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
    ("erase", "attack", "steer", "edit", "customize", "protect", "attribute", "classify", "explain"),
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
    package = ("sfumato", *file.relative_to(SOURCE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = [*above, *(node.module or "").split(".")]
            found |= {(*module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    words = {tuple(filter(None, name)) for name in found}
    names = {name[1] for name in words if name[0] == "sfumato" and len(name) > 1}
    return {name for name in names if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()}


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
