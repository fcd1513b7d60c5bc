"""Who imports whom: the circles of the package's files, and a picture.

    python scripts/imports.py                     # name a circle if there is one, exit status 1
    python scripts/imports.py --draw files.svg    # every file against every file; docs/imports.svg has the rooms

An import counts wherever it stands, also inside a function; those for the type checker alone can be left out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
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
    """A shortest circle, its first name once more at the end, of each knot of modules that reach one another."""
    reach = {start: _reachable(start, edges) for start in edges}
    found, seen = [], set()
    for start in sorted(edges):
        if start in reach[start] and start not in seen:
            knot = {other for other in reach[start] if start in reach[other]}
            seen |= knot
            found.append(min((_way_back(module, edges) for module in sorted(knot)), key=len))
    return found


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _way_back(start: str, edges: Mapping[str, set[str]]) -> list[str]:
    """The shortest way from a module, which reaches itself, to itself."""
    came_from, waiting = dict.fromkeys(sorted(edges[start]), start), sorted(edges[start])
    while start not in came_from:
        here = waiting.pop(0)
        for other in sorted(edges[here] - came_from.keys()):
            came_from[other] = here
            waiting.append(other)
    way = [came_from[start], start]
    while way[0] != start:
        way.insert(0, came_from[way[0]])
    return way


def room(name: str) -> str:
    """The folder of the package, or the module beside the folders, that a module belongs to."""
    return name.split(".")[1] if "." in name else name


def of_rooms(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Room -> the rooms that its files import."""
    rooms: dict[str, set[str]] = {}
    for name, used in edges.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in used} - {room(name)})
    return rooms


def from_the_ground(edges: Mapping[str, set[str]]) -> list[str]:
    """All names, each after those that it imports, by name where that leaves a choice; circles by name."""
    order: list[str] = []
    left = set(edges)
    while left:
        ready = {name for name in left if not (edges[name] & left) - {name}} or {min(left)}
        order += sorted(ready)
        left -= ready
    return order


def picture(order: Sequence[str], edges: Mapping[str, set[str]], cell: int = 22) -> str:
    """A matrix as SVG: a dot where the name of a row imports that of a column; above the diagonal it is red."""
    font, place = 0.6 * cell, {name: i for i, name in enumerate(order)}
    margin, side = 0.62 * font * max(map(len, order)) + 12, cell * len(order)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {margin + side + 8:.0f} {margin + side + 8:.0f}" '
        f'font-family="monospace" font-size="{font:.1f}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for name, i in place.items():
        at = margin + i * cell
        middle = at + cell / 2
        if i % 2 == 0:
            lines.append(f'<rect x="0" y="{at:.1f}" width="{margin + side:.1f}" height="{cell}" fill="#f3f3f3"/>')
        lines.append(f'<rect x="{at:.1f}" y="{at:.1f}" width="{cell}" height="{cell}" fill="#cccccc"/>')
        label = f'text-anchor="end" dominant-baseline="central">{escape(name)}</text>'
        lines.append(f'<text x="{margin - 6:.1f}" y="{middle:.1f}" {label}')
        label = label.replace("end", "start", 1)
        lines.append(f'<text transform="translate({middle:.1f} {margin - 6:.1f}) rotate(-90)" {label}')
        for other in sorted(edges[name] - {name}, key=place.__getitem__):
            where = f'cx="{margin + (place[other] + 0.5) * cell:.1f}" cy="{middle:.1f}" r="{cell / 4:.1f}"'
            colour = "#1a5fb4" if place[other] < i else "#c01c28"
            lines.append(f'<circle {where} fill="{colour}"><title>{name} imports {other}</title></circle>')
    return "\n".join([*lines, "</svg>", ""])


def rooms_picture() -> str:
    """docs/imports.svg."""
    edges = of_rooms(graph())
    return picture(from_the_ground(edges), edges)


def main(args: Sequence[str]) -> int:
    edges = graph()
    if args[:1] == ["--draw"]:
        order = []
        for place in from_the_ground(of_rooms(edges)):
            inside = {name for name in edges if room(name) == place}
            order += from_the_ground({name: edges[name] & inside for name in inside})
        Path(args[1]).write_text(picture(order, edges, cell=10), encoding="utf-8")
        return 0
    found = circles(edges)
    for circle in found:
        print("circle:", " -> ".join(circle))
    print(f"{len(edges)} files, {sum(map(len, edges.values()))} imports, {len(found) or 'no'} circles")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
