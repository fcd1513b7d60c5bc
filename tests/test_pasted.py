"""What README, docs and the commands' help offer to be pasted is understood by what it is pasted into."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import sfumato
from sfumato import catalog, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [*(c for c in cli.COMMANDS), *(m.command for m in catalog.METHODS)]


class Parsed(Exception):
    """The options are read: nothing is loaded, drawn or written."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def lines(text: str) -> list[list[str]]:
    """The arguments of every line that calls sfumato, however it is started."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            if match := re.match(r"\s*(?:(?:torchrun|accelerate launch|python)\b.*-m )?sfumato (.*)", part):
                found.append(shlex.split(match[1], comments=True))
    return found


PASTED = [(page.name, args) for page in PAGES for block in blocks(page, "") for args in lines(block)]
PYTHON = [(page, block) for page in PAGES if page.name != "CONTRIBUTING.md" for block in blocks(page, "python")]


def stop_behind(monkeypatch, args: list[str]) -> None:
    """Let the command read its options and go no further."""
    module = import_module(f"sfumato.commands.{args[0]}")
    name = next((name for name in ("read", "parse") if hasattr(module, name)), None)
    if name is None:  # commands without options of their own cost nothing
        return
    real = getattr(module, name)

    def read(*given, **settings):
        real(*given, **settings)
        raise Parsed

    monkeypatch.setattr(module, name, read)


def understood(args: list[str], monkeypatch) -> None:
    assert args[0] in cli.COMMANDS, f"no command {args[0]}"
    stop_behind(monkeypatch, args)
    try:
        assert cli._dispatch(args) == 0
    except Parsed:
        pass
    except SystemExit as exit:
        assert not exit.code


@pytest.mark.parametrize(("page", "args"), PASTED, ids=[f"{page}: {shlex.join(args)}" for page, args in PASTED])
def test_a_line_is_understood(page, args, monkeypatch, capsys):
    understood(args, monkeypatch)


def test_lines_were_found():
    assert len([args for page, args in PASTED if page == "README.md"]) > 12 and len(PASTED) > 30


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_example_of_a_help_is_understood(command, monkeypatch, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    offered = [line for line in re.findall(r"sfumato .*", _example(capsys.readouterr().out)) if line]
    assert offered and command.split()[0] in offered[0]
    for line in offered:
        with monkeypatch.context() as patched:
            understood(shlex.split(line, comments=True)[1:], patched)


def _example(text: str) -> str:
    """The example of a help, which its width may have broken, on a line."""
    return re.sub(r"\s*\n", " ", re.search(r"^Example: (.*?)\n\s*\n", text + "\n\n", flags=re.S | re.M)[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_a_page_is_refused_because_an_earlier_one_wrote_there(page):
    if page.name == "training.md":
        pytest.skip("three ways to start the same run, and the folder is its own")
    outs = [args[args.index("--out") + 1] for block in blocks(page, "") for args in lines(block) if "--out" in args]
    assert len(outs) == len(set(outs))


def test_training_says_who_has_which_flag(capsys):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    both, pixels, pipes = (re.findall(r"`(--[a-z-]+)`", text[text.index(a) : text.index(b)]) for a, b in (
        ("All have", "Only `train`"), ("Only `train`", "only `erase`"), ("only `erase`", "A run shows")
    ))  # fmt: skip
    assert len(both) > 8 and pixels and pipes
    for command, has in {"train t2i": both, "train sid2": both + pixels, "distill multistep-cm": both + pixels,
                         "erase esd-x": both + pipes, "attack concept-inversion": both + pipes}.items():  # fmt: skip
        assert cli.main([*command.split(), "--help"]) == 0
        told = capsys.readouterr().out
        assert [flag for flag in both + pixels + pipes if f"{flag} " in told or f"{flag},"in told] == has, command


def test_commands_named_in_passing_exist():
    for page in PAGES:
        for args in re.findall(r"`sfumato ([^`]*)`", page.read_text(encoding="utf-8")):
            command, *rest = args.split()
            if page.name == "CONTRIBUTING.md" and "flatten" in args:
                continue  # its example, which does not exist
            assert command in cli.COMMANDS or command.isupper() or command.startswith("-"), args
            if command in catalog.verbs() and rest and rest[0].islower() and not rest[0].startswith("-"):
                assert catalog.get(rest[0], command) or command == "sample", args


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[page.name for page, _ in PYTHON])
def test_names_in_a_block_of_python_exist(page, block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert hasattr(import_module(node.module), name.name) or import_module(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Import):
            for name in node.names:
                import_module(name.name)
    for dotted in re.findall(r"\bsf(?:\.\w+)+", block):
        found = sfumato
        for part in dotted.split(".")[1:]:
            found = getattr(found, part)


@pytest.mark.slow
def test_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "README.md", "python")
    small = block.replace('concepts=["star"])', 'concepts=["star"], n=2, n_retain=1, attacks=())')
    assert small != block
    exec(compile(small, "README", "exec"), {})
    assert (tmp_path / "erased" / "model_index.json").is_file() and (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
def test_readmes_lines_up_to_the_pictures_run(tmp_path, monkeypatch, capsys):
    """The first lines, small; those that train for long are read only."""
    monkeypatch.chdir(tmp_path)
    small = {
        "audit": ["--n", "2", "--n-retain", "1", "--attacks"],
        "sample": ["--seeds", "0", "--sampling-steps", "2"],
        "information": ["--n", "2", "--points", "2"],
    }
    for args in lines(blocks(ROOT / "README.md", "")[1]):
        if args[0] in ("choose", "erase", *small) and "student/" not in args:
            assert cli.main([*args, *small.get(args[0], [])]) == 0, capsys.readouterr().err
