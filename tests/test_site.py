"""The site: its check finds links that lead nowhere, and the real one has none."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from build_site import ROOMS, dead
from sfumato import catalog

ROOT = Path(__file__).resolve().parents[1]


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html">x</a> <a href="b.html#here">x</a> <a href="https://arxiv.org">x</a>'
        '<a href="#top" id="top">x</a>'
        '<a href="c.html">x</a> <a href="b.html#gone">x</a> <img src="none.png">'
    )
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1>')
    found = [line.split(": ")[1] for line in dead(tmp_path)]
    assert found == ["c.html", "no place b.html#gone", "none.png"]


def test_every_verb_has_a_page_of_the_reference():
    assert set(catalog.verbs()) <= set(ROOMS)


def test_every_page_is_reached_from_the_front():
    listed = {line for page in (ROOT / "docs").glob("*.md") for line in page.read_text().split()}
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert not {p for p in pages if p not in listed and f"({p}.md)" not in " ".join(listed)}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("furo") is None, reason="the extra 'site' is not installed")
def test_the_site_is_built_and_no_link_in_it_is_dead(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_site.py", tmp_path / "site"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "site" / "methods" / "uce.html").exists()
