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
from sfumato.catalog.papers import FILE, papers, read
from sfumato.cli import main
from sfumato.errors import BadInput

TESTS = Path(__file__).parent
SOURCE = Path(sfumato.__file__).parent
LIST = SOURCE / "catalog"
PAPERS = papers()

every_method = pytest.mark.parametrize("method", catalog.METHODS, ids=lambda m: m.name)


@every_method
def test_entry_is_complete(method):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.name)
    for text in (method.summary, method.cost, method.when, method.beware):
        assert text.strip()
        assert "\n" not in text
    assert len(method.summary) <= 100
    assert bool(method.ledger) != bool(method.no_ledger)


@pytest.mark.parametrize("key", PAPERS)
def test_every_paper_is_complete_and_used(key):
    paper = PAPERS[key]
    kind = re.match(r"@(\w+)", paper.bibtex)[1]
    venue = {"misc": set(), "inproceedings": {"booktitle"}, "article": {"journal"}}[kind]
    assert {"title", "author", "year", "eprint", "archiveprefix", "url"} | venue <= paper.fields.keys()
    assert re.fullmatch(r"[a-z]+\d{4}[a-z]*", key) and paper.fields["year"] in key
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) and paper.fields["url"].endswith(f"/{paper.arxiv}")
    assert all(value.strip() and value.count("{") == value.count("}") for value in paper.fields.values())
    assert "et al" not in paper.fields["author"]
    assert all(", " in author for author in paper.fields["author"].split(" and "))
    used = {cited for method in catalog.METHODS for cited in method.cites}
    assert key in used.union(*catalog.CITED.values())


def test_papers_are_sorted_and_have_one_number_each():
    assert list(PAPERS) == sorted(PAPERS)
    assert len({paper.arxiv for paper in PAPERS.values()}) == len(PAPERS)


def test_cite_prints_the_entries_as_they_stand(capsys):
    assert main(["cite", "rece"]) == 0
    own, built_on = capsys.readouterr().out.strip().split("\n\n")
    assert own.startswith("@inproceedings{gong2024rece,") and "gandikota2024uce" in built_on
    text = FILE.read_text()
    assert f"{own}\n" in text and f"{built_on}\n" in text
    assert main(["cite", "audit"]) == 0
    assert "Model Integrity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("@misc{doe2026,\n  year = {2026},\n}\n\n@misc{doe2026,\n  year = {2026},\n}\n", "doe2026 stands there twice"),
        ("@misc{doe2026,\n  year = {2026}}\n", "doe2026 has no closing brace"),
        ("@misc{doe2026,\n  title = {Two\n  lines},\n}\n", "doe2026: not a field"),
    ],
)
def test_a_paper_that_cannot_be_read_is_named(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        read(text)


@pytest.mark.parametrize("verb", sorted({f.stem for f in LIST.glob("*.py")} - {"__init__", "method", "papers"}))
def test_a_verbs_file_lists_its_own_methods_and_all_are_found(verb):
    assert catalog.methods(verb) == import_module(f"sfumato.catalog.{verb}").METHODS


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
def test_ledger_entry_exists_or_its_absence_is_explained(method):
    if method.ledger:
        assert (SOURCE / "ledger" / f"{method.ledger.replace('-', '_')}.py").is_file()
    else:
        assert len(method.no_ledger.split()) >= 4


def test_names_are_unique():
    names = [method.name for method in catalog.METHODS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("word", "nearest"), [("rec", "rece"), ("ESDX", "esd-x"), ("inversion", "textual-inv")])
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
