"""CONTRIBUTING's example is a method: it runs, and its own tests pass."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from sfumato import catalog
from sfumato.catalog.papers import read

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
(BIBTEX,) = re.findall(r"```bibtex\n(.*?)```", TEXT, flags=re.S)
METHOD, ENTRY, TESTS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


@pytest.fixture(scope="module")
def flatten(tmp_path_factory):
    """The module that the first block is, under the name that it would have."""
    file = tmp_path_factory.mktemp("example") / "flatten.py"
    file.write_text(METHOD, encoding="utf-8")
    spec = spec_from_file_location("sfumato.erase.flatten", file)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_examples_tests_pass(flatten, tiny_sd):
    scope = dict(vars(flatten))
    exec(compile(TESTS, "CONTRIBUTING.md", "exec"), scope)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test(*([tiny_sd] if "tiny_sd" in inspect.signature(test).parameters else []))


def test_the_examples_entry_is_one(flatten):
    scope = {"Method": catalog.Method}
    exec(compile(f"(entry,) = ({ENTRY})", "CONTRIBUTING.md", "exec"), scope)
    entry = scope["entry"]
    assert entry.load() is flatten.Flatten and len(entry.summary) <= 100
    assert tuple(read(BIBTEX)) == entry.cites


def test_the_files_it_names_exist():
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link}
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).exists()]
