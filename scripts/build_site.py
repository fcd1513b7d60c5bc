"""Build the documentation as a site, and check that every link inside of it leads somewhere.

    pip install -e '.[site]' && python scripts/build_site.py            # into site/; nothing is fetched
    python scripts/build_site.py OTHER

Open site/index.html.
"""

from __future__ import annotations

import html.parser
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

from sfumato import catalog

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "pipeline", "erase", "attack", "steer", "edit", "customize", "protect", "distill", "train", "sample", "attribute",
    "classify", "explain", "audit", "audit.chain", "bench", "metrics", "noise", "nets", "data", "report", "ledger",
    "errors", "files",
)  # fmt: skip


class Links(html.parser.HTMLParser):
    """What a page refers to, and the places in it that can be referred to."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.places = path, {""}
        self.targets: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places.update(x for x in (given.get("id"), given.get("name")) if x)
        self.targets += [x for name in ("href", "src") if (x := given.get(name))]


def dead(folder: Path) -> list[str]:
    """Links of the pages under ``folder`` that lead nowhere in it; those to other sites are not followed."""
    pages = {path.resolve(): Links(path) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlparse(target)
            if url.scheme or url.netloc:
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not file.exists():
                found.append(f"{page.path}: {target}")
            elif url.fragment and file in pages and unquote(url.fragment) not in pages[file].places:
                found.append(f"{page.path}: no place {target}")
    return found


def reference(folder: Path) -> None:
    """Pages of the reference: a room each, and each method's class."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Reference", "", "Shapes are jaxtyping's: `Float[Tensor, \"batch channel height width\"]`.", "",
             "```{toctree}", ":maxdepth: 1", "", *ROOMS, "```", ""]  # fmt: skip
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")
    for room in ROOMS:
        body = [f"# sfumato.{room}", "", "```{eval-rst}", f".. automodule:: sfumato.{room}", "   :members:", "```", ""]
        for m in catalog.methods(room) if room in catalog.verbs() else ():
            module, _, name = m.cls.partition(":")
            body += [
                f"## {m.name}", "", "```{eval-rst}", f".. autoclass:: {module}.{name}", "   :members:",
                "   :exclude-members: presets, EXAMPLE, NEUTRAL, GRID, settings_for", "   :noindex:", "```", "",
            ]  # fmt: skip
        (folder / f"{room}.md").write_text("\n".join(body), encoding="utf-8")


def main() -> int:
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        print("the site needs Sphinx, furo and MyST: pip install -e '.[site]'", file=sys.stderr)
        return 2
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"
    reference(ROOT / "docs" / "api")
    if status := build_main(["-q", "-b", "html", "-j", "auto", str(ROOT / "docs"), str(out)]):
        return status
    lost = dead(out)
    for line in lost:
        print(f"leads nowhere: {line}")
    print(f"{len(list(out.rglob('*.html')))} pages: {out / 'index.html'}")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
