"""The catalogue: every method resolves, is documented, cited, tested and measured."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sfumato
from sfumato import catalog
from sfumato.errors import BadInput

TESTS = Path(__file__).parent
SOURCE = Path(sfumato.__file__).parent

every_method = pytest.mark.parametrize("method", catalog.METHODS, ids=lambda m: m.name)


@every_method
def test_entry_is_complete(method):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.name)
    assert re.fullmatch(r"\d{4}\.\d{5}", method.paper.arxiv)
    for text in (method.summary, method.cost, method.when, method.beware):
        assert text.strip()
        assert "\n" not in text
    assert len(method.summary) <= 100
    assert bool(method.ledger) != bool(method.no_ledger)


@every_method
def test_bibtex_is_well_formed(method):
    for entry in method.bibtex.split("\n\n"):
        assert re.match(r"@(inproceedings|misc)\{[a-z]+\d{4}[a-z]*,\n", entry)
        assert entry.count("{") == entry.count("}")
        for field in ("title", "author", "year", "eprint"):
            assert f"  {field} = {{" in entry
        assert " and " in entry and "et al" not in entry


@every_method
def test_class_is_a_documented_dataclass_whose_flags_are_explained(method):
    from sfumato.commands.options import flags_of

    cls = method.load()
    assert dataclasses.is_dataclass(cls)
    assert cls.__module__.startswith(f"sfumato.{method.verb}.")
    assert method.paper.arxiv in (inspect.getdoc(cls) or "") + (inspect.getmodule(cls).__doc__ or "")
    assert [flag.name for flag in flags_of(cls) if not flag.doc] == []


@every_method
def test_presets_are_settings_of_the_class(method):
    required = {
        field.name: "star"
        for field in dataclasses.fields(method.load())
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for name, preset in method.presets.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        method.load()(**required, **preset)


@every_method
def test_package_exports_the_class_lazily(method):
    assert getattr(import_module(f"sfumato.{method.verb}"), method.class_name) is method.load()


@every_method
def test_test_file_is_named_after_the_module(method):
    stem = method.cls.partition(":")[0].rpartition(".")[2]
    assert list(TESTS.rglob(f"test_{stem}.py"))


@every_method
def test_ledger_entry_exists_or_its_absence_is_explained(method):
    if method.ledger:
        assert (SOURCE / "ledger" / f"{method.ledger.replace('-', '_')}.py").is_file()
    else:
        assert len(method.no_ledger.split()) >= 4


def test_names_are_unique():
    names = [method.name for method in catalog.METHODS]
    assert len(names) == len(set(names))


def test_papers_have_one_key_and_one_number_each():
    papers = {paper for method in catalog.METHODS for paper in method.papers}
    assert len({paper.key for paper in papers}) == len({paper.arxiv for paper in papers}) == len(papers)


def test_rece_cites_uce_which_it_runs():
    keys = [paper.arxiv for paper in catalog.get("rece").papers]
    assert keys == ["2407.12383", "2308.14761"]


@pytest.mark.parametrize(("word", "nearest"), [("rec", "rece"), ("ESDX", "esd-x"), ("inversion", "con")])
def test_lookup_suggests_the_nearest_name(word, nearest):
    with pytest.raises(BadInput, match=f"did you mean {nearest}"):
        catalog.get(word)


def test_lookup_lists_the_names_when_none_is_near():
    with pytest.raises(BadInput, match="choose one of uce, rece"):
        catalog.get("zzzz", "erase")


def test_lookup_is_limited_to_the_verb():
    with pytest.raises(BadInput, match="unknown attack method 'rece'"):
        catalog.get("rece", "attack")


HEAVY = {"torch", "diffusers", "transformers", "numpy", "PIL", "tyro", "rich", "jinja2", "matplotlib"}


@pytest.mark.parametrize(
    "code",
    [
        "import sfumato",
        "import sfumato.catalog, sfumato.cli, sfumato.errors, sfumato.files",
        "import sfumato as sf; sf.erase, sf.attack, sf.catalog; dir(sf.erase)",
        "from sfumato.cli import main; assert main(['--help']) == main(['cite', 'rece']) == 0",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    code += "\nimport sys; print('loaded:', *sys.modules)"
    env = {"PYTHONPATH": str(SOURCE.parent)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    loaded = {name.partition(".")[0] for name in run.stdout.partition("loaded:")[2].split()}
    assert loaded & HEAVY == set()


def test_unknown_attributes_are_attribute_errors():
    for module in (sfumato, sfumato.erase):
        with pytest.raises(AttributeError, match="Nothing"):
            module.Nothing  # noqa: B018


def test_version_is_that_of_the_distribution():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("sfumato") == sfumato.__version__
    except PackageNotFoundError:
        pytest.skip("the package is not installed, only on the path")
