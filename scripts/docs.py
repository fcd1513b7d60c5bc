"""Write what the docs take from the code: README's table of methods, docs/methods/, docs/ledger.md, docs/imports.svg.

    python scripts/docs.py           # write
    python scripts/docs.py --check   # say what is out of date, exit status 1 if anything is

One page per method: its docstring, its fields with defaults and their meaning, its presets and its BibTeX.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

from imports import rooms_picture
from sfumato import catalog, ledger
from sfumato.commands.options import field_docs

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- methods: written by scripts/docs.py -->", "<!-- end of methods -->"


def methods_table() -> str:
    """The catalogue as Markdown."""
    lines = ["| verb | method | paper | what it does |", "| --- | --- | --- | --- |"]
    for m in catalog.METHODS:
        link = f"[{m.paper.arxiv}](https://arxiv.org/abs/{m.paper.arxiv})"
        lines.append(f"| {m.verb} | [`{m.name}`](docs/methods/{m.name}.md) | {link} | {m.summary} |")
    return "\n".join(lines)


def method_page(method: catalog.Method) -> str:
    """Everything about one method that its file says."""
    cls = method.load()
    docs = field_docs(cls)
    lines = [
        f"# {method.verb} {method.name}",
        "",
        f"`sfumato {method.command} --help` · `{method.cls.replace(':', '.')}` · {method.paper.title} "
        f"([arXiv {method.paper.arxiv}](https://arxiv.org/abs/{method.paper.arxiv}))",
        "",
        f"{method.summary} **Use it for:** {method.when} **Beware:** {method.beware} **Cost:** {method.cost}.",
        "",
        "```",
        inspect.cleandoc(cls.__doc__ or ""),
        "```",
        "",
        "| setting | default | meaning |",
        "| --- | --- | --- |",
    ]
    for field in dataclasses.fields(cls):
        if field.init:
            default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            meaning = " ".join(docs.get(field.name, "").split()).replace("|", "\\|")
            lines.append(f"| `{field.name}` | {default} | {meaning} |")
    if method.presets:
        lines += ["", "| preset | settings |", "| --- | --- |"]
        for name, settings in method.presets.items():
            shown = ", ".join(f"`{k}={v!r}`" for k, v in settings.items())
            lines.append(f"| `{name}` | {shown or 'the defaults'} |")
    return "\n".join([*lines, "", "```bibtex", method.bibtex, "```", ""])


def pages() -> dict[Path, str]:
    """Path -> text of every generated page, README with its table replaced."""
    readme = (ROOT / "README.md").read_text()
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    result = {ROOT / "README.md": f"{head}{BEGIN}\n{methods_table()}\n{END}{tail}"}
    result |= {ROOT / "docs" / "methods" / f"{m.name}.md": method_page(m) for m in catalog.METHODS}
    result[ROOT / "docs" / "imports.svg"] = rooms_picture()
    result[ROOT / "docs" / "ledger.md"] = ledger.table(ROOT / "docs" / "ledger") + "\n"
    return result


def main() -> int:
    stale = {p: text for p, text in pages().items() if not p.exists() or p.read_text() != text}
    for path, text in stale.items():
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
