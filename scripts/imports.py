"""Who imports whom: the graph of the package's files, its circles and its picture (docs/imports.svg).

    python scripts/imports.py        # say which circles there are

An import counts wherever it stands, also inside a function; those for the type checker alone are told apart.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sfumato"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    named = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imported(name: str, file: Path, known: Mapping[str, Path], typed: bool = True) -> set[str]:
    """The modules of the package that a module names in an import; ``typed`` counts those under ``TYPE_CHECKING``."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _statements(ast.parse(file.read_text(encoding="utf-8")), typed):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # a name is a module of its own, or comes from the package's __init__
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        found |= {target for target in targets if target in known}
    return found - {name}


def _statements(tree: ast.AST, typed: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not typed:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from _statements(node, typed)


def graph(package: Path = PACKAGE, typed: bool = True) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    known = modules(package)
    return {name: imported(name, file, known, typed) for name, file in known.items()}


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """A shortest circle through each knot of modules that reach one another; empty where there is none."""
    reach = {start: _reachable(start, edges) for start in edges}
    found, seen = [], set()
    for start in edges:
        if start in seen or start not in reach[start]:
            continue
        knot = {other for other in reach[start] if start in reach[other]}
        seen |= knot
        found.append(min((_way_back(node, edges) for node in sorted(knot)), key=len))
    return found


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for other in edges[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def _way_back(start: str, edges: Mapping[str, set[str]]) -> list[str]:
    """The shortest way from a module to itself."""
    ways = [[start]]
    while True:
        ways = [[*way, other] for way in ways for other in sorted(edges[way[-1]]) if other == start or other not in way]
        for way in ways:
            if way[-1] == start:
                return way
