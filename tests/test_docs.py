"""The docs say what the code says."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_generated_pages_are_up_to_date():
    spec = spec_from_file_location("docs_script", ROOT / "scripts" / "docs.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    stale = [path.name for path, text in script.pages().items() if not path.exists() or path.read_text() != text]
    assert not stale, "run: python scripts/docs.py"


def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "pip install -e . && sfumato demo" in text and "pip install -e '.[test]' && pytest" in text
