"""The documentation as a site: ``python scripts/build_site.py`` builds it, offline."""

from __future__ import annotations

import re
from pathlib import Path

from sfumato import __version__

project, author, release = "sfumato", "the authors of sfumato", __version__
copyright = "Apache 2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme, html_title = "furo", "sfumato"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#9c4526", "color-brand-content": "#56677a"},
    "dark_css_variables": {"color-brand-primary": "#e69468", "color-brand-content": "#a9b8c8"},
}
myst_enable_extensions, myst_heading_anchors = ["colon_fence", "deflist"], 3
autodoc_typehints, autodoc_member_order = "signature", "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header", "docutils", "autodoc", "ref.python", "toc.not_included"]
"""Docstrings are plain text with Markdown's code and Napoleon's sections, so docutils finds much that is none."""

HERE = Path(__file__).parent
_LINK = re.compile(r"\[([^\]\[]+)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


ROOT_PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages whose text stands at the root of the repository."""


def _links(app: object, name: str, source: list[str]) -> None:
    """Links to files that are not of the site, such as sources, become plain names: a page must stand alone."""
    here = (HERE / name).parent
    if name in ROOT_PAGES:
        here = HERE.parent
        source[0] = (here / ROOT_PAGES[name]).read_text(encoding="utf-8")

    def plain(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        file = (here / target).resolve()
        return found[0] if file.is_relative_to(HERE) and not file.is_dir() else text

    if name in ROOT_PAGES or (HERE / f"{name}.md").exists():
        source[0] = _LINK.sub(plain, source[0])
    if name in ROOT_PAGES:
        source[0] = source[0].replace("](docs/", "](")


_MARKED = re.compile(r"(``.+?``|`[^`]+`|:\w+:`[^`]+`)")


def _plain_words(app: object, what: str, name: str, it: object, options: object, lines: list[str]) -> None:
    """Docstrings mean their stars, bars and underscores as they stand."""
    for i, line in enumerate(lines):
        parts = _MARKED.split(line)
        parts[::2] = [re.sub(r"(\*|\||(?<=\w)_(?=\W|$))", r"\\\1", text) for text in parts[::2]]
        # what is marked may be part of a word, which needs an empty escape behind it
        for k in range(1, len(parts), 2):
            parts[k] += "\\ " if parts[k + 1][:1].isalnum() or parts[k + 1][:1] in tuple("^=_") else ""
        lines[i] = "".join(parts)


def setup(app: object) -> None:
    app.connect("source-read", _links)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", _plain_words, priority=400)  # type: ignore[attr-defined]
