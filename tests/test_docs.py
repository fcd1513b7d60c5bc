"""The docs say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from docs import pages

ROOT = Path(__file__).resolve().parents[1]


def test_generated_pages_are_up_to_date():
    stale = [path.name for path, text in pages().items() if not path.exists() or path.read_text() != text]
    assert not stale, "run: python scripts/docs.py"


def test_headings_hold_no_links():
    """A heading that does is none that the site's table of contents can name: the site would not be built."""
    found = [
        f"{page.name}: {line}"
        for page in (ROOT / "docs").rglob("*.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"#+ .*\]\(", line)
    ]
    assert not found


def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install -e . && sfumato demo" in text and "pip install -e '.[test]' && pytest" in text


def test_the_scripts_that_pages_name_are_there():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs" / "results").glob("*.md"),
    ]
    named = {name for page in pages for name in re.findall(r"\b((?:scripts|benchmarks)/\w+\.py)", page.read_text())}
    assert named and not {name for name in named if not (ROOT / name).is_file()}
