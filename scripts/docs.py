"""Write what the docs take from the code: README's table of verbs, docs/methods/, docs/gallery.md, docs/ledger.md,
docs/imports.svg.

    python scripts/docs.py           # write
    python scripts/docs.py --check   # say what is out of date, exit status 1 if anything is

One page per method: its docstring, its fields with defaults and their meaning, its presets, a picture by it, what the
ledger measured of it, and its BibTeX; and one of all methods, by verb.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path

import gallery
from imports import rooms_picture
from sfumato import catalog, ledger
from sfumato.commands import choosing
from sfumato.commands.options import field_docs

ROOT = Path(__file__).resolve().parents[1]
VERBS = {
    "erase": "take a concept out of a model",
    "attack": "try to bring it back",
    "steer": "a live pipeline, by a patch that leaves no trace",
    "edit": "a picture, or one drawn from a prompt",
    "customize": "a pipeline, with a few pictures",
    "protect": "pictures from being imitated",
    "distill": "from many sampling steps to few",
    "train": "a model",
    "sample": "from it",
    "attribute": "a likeness to the parts that made it",
    "classify": "train a classifier: a judge of audits",
    "explain": "judge explanations of a classifier",
}
BEGIN, END = "<!-- methods: written by scripts/docs.py -->", "<!-- end of methods -->"


def verbs_table() -> str:
    """The catalogue by verb as Markdown, a row each."""
    lines = ["| verb | | methods |", "| --- | --- | --- |"]
    for verb in catalog.verbs():
        links = [f"[`{m.name}`](docs/methods/{m.name}.md)" for m in catalog.methods(verb)]
        lines.append(f"| **{verb}** | {VERBS[verb]} | {', '.join(links)} |")
    return "\n".join(lines)


def methods_page() -> str:
    """All methods, by verb."""
    count = len(catalog.METHODS)
    lines = ["# Methods", "", f"{count} published systems behind one interface, each in one file.", ""]
    for verb in catalog.verbs():
        lines += [f"## {verb}: {VERBS[verb]}", ""]
        lines += ["| method | paper | what it does | use it for |", "| --- | --- | --- | --- |"]
        for m in catalog.methods(verb):
            link = f"[{m.paper.arxiv}](https://arxiv.org/abs/{m.paper.arxiv})"
            lines.append(f"| [`{m.name}`]({m.name}.md) | {link} | {m.summary} | {m.when} |")
        lines.append("")
    return "\n".join(lines)


def choose_page() -> str:
    """Which method for which purpose: what `sfumato choose VERB` prints."""
    lines = ["# Choose a method", "", "`sfumato choose VERB` prints these tables at the prompt.", ""]
    for verb in catalog.verbs():
        lines += [f"## {verb}", "", "| method | use it for | cost | beware |", "| --- | --- | --- | --- |"]
        for m in catalog.methods(verb):
            lines.append(f"| [`{m.name}`](methods/{m.name}.md) | {m.when} | {m.cost} | {m.beware} |")
        lines.append("")
        if verb == "erase":
            row = lambda cells: f"| {' | '.join(cells)} |"
            lines += [row(choosing.HEADER), row(["---"] * len(choosing.HEADER)), *map(row, choosing.table()), ""]
            lines += [*choosing.advice(), ""]
    return "\n".join(lines)


def measured(method: catalog.Method) -> list[str]:
    """What the ledger says of a method, as Markdown."""
    if not method.ledger:
        return ["", f"Not in the ledger: {method.no_ledger}"]
    path = ledger.RECORDS / f"{method.ledger}.json"
    if not path.exists():
        return ["", f"Its claims are written down and not yet measured: `sfumato ledger {method.ledger}`."]
    record = json.loads(path.read_text())
    seeds = ", ".join(str(one["seed"]) for one in next(iter(record["claims"].values()))["per_seed"])
    lines = ["", f"Measured by `sfumato ledger {method.ledger}`, seeds {seeds}:", ""]
    lines += ["| claim | method | baseline | difference [95 %] | verdict |", "| --- | --- | --- | --- | --- |"]
    for claim in record["claims"].values():
        sides = [f"{claim[side]}: {claim[f'{side}_mean']:.3g}" for side in ("method", "baseline")]
        e, verdict = claim["effect"], f"**{ledger.said(claim)}**"
        difference = f"{e['value']:+.3g} [{e['low']:+.3g}, {e['high']:+.3g}]"
        told = [f"{claim['sentence']} {claim['quantity']}", *sides, difference, verdict]
        lines.append("| " + " | ".join(told) + " |")
    few = any(ledger.DAGGER in line for line in lines)
    return [*lines, *(["", f"{ledger.DAGGER}: {ledger.FEW}."] if few else [])]


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
    picture = ["", *gallery.section(method.name, "../gallery")] if gallery.pictured(method.name) else []
    return "\n".join([*lines, *picture, *measured(method), "", "```bibtex", method.bibtex, "```", ""])


def pages() -> dict[Path, str]:
    """Path -> text of every generated page, README with its table replaced."""
    readme = (ROOT / "README.md").read_text()
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    result = {ROOT / "README.md": f"{head}{BEGIN}\n{verbs_table()}\n{END}{tail}"}
    result |= {ROOT / "docs" / "methods" / f"{m.name}.md": method_page(m) for m in catalog.METHODS}
    result[ROOT / "docs" / "methods" / "index.md"] = methods_page()
    result[ROOT / "docs" / "choose.md"] = choose_page()
    result[ROOT / "docs" / "gallery.md"] = gallery.gallery_page()
    result[ROOT / "docs" / "imports.svg"] = rooms_picture()
    result[ROOT / "docs" / "ledger.md"] = ledger.table() + "\n"
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
