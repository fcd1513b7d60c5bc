"""What the command line says: of typing errors, of progress that no terminal shows, of words that it cannot print."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from sfumato import cli
from sfumato.commands.completion import script
from sfumato.commands.options import parse
from sfumato.commands.words import unmarked
from sfumato.errors import BadInput
from sfumato.hub import require_hub
from sfumato.progress import track
from sfumato.report.schema import Interval
from sfumato.report.words import worst
from sfumato.text import counted


@dataclass(frozen=True, kw_only=True)
class Options:
    size: int | None = None
    """Side, as in `sfumato sample`."""
    scale: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    steps: tuple[int, ...] = (1,)
    kind: Literal["full", "half"] | None = None
    either: float | tuple[float, float] | None = None


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("--size x", "--size takes a whole number, got 'x'"),
        ("--size=1.5", "--size takes a whole number, got '1.5'"),
        ("--size", "--size takes a whole number, and nothing follows it"),
        ("--scale x", "--scale takes a number, got 'x'"),
        ("--betas 1 x", "--betas takes 2 numbers, got '1' 'x'"),
        ("--steps x", "takes whole numbers, got 'x'"),
        ("--kind hafl", "did you mean half"),
        ("--either x", "--either takes a number or 2 numbers, got 'x'"),
        ("--size 1 2", "has no place for '2'"),
    ],
)
def test_a_typing_error_is_told_in_plain_words(args, told):
    with pytest.raises(BadInput) as error:
        parse("sfumato test", args.split(), Options)
    assert told in str(error.value) and len(str(error.value)) < 400
    assert not any(word in str(error.value) for word in ("class", "NoneType", "instantiated", "{", "literal", "'None'"))


def test_help_shows_no_markup(capsys):
    with pytest.raises(SystemExit):
        parse("sfumato test", ["--help"], Options)
    out = capsys.readouterr().out
    assert 'as in "sfumato sample"' in out and "--size INT" in out and "{full,half}" in out
    assert "None" not in out and "`" not in out and "(default: )" not in out


def test_backquotes():
    assert unmarked("``x`` of `y`, see `sfumato z --help`") == 'x of y, see "sfumato z --help"'


class Broken:
    """A stream that fails at once."""

    def __init__(self, number: int):
        self.number = number

    def write(self, text=""):
        raise OSError(self.number, "no")  # OSError makes itself a BrokenPipeError where it is one

    flush = fileno = write


@pytest.mark.parametrize(
    ("number", "command", "status"),
    [
        (errno.EPIPE, "methods", 0),
        (errno.ENOSPC, "methods", 2),
        (errno.EPIPE, "sample", 0),
        (errno.ENOSPC, "sample", 0),
    ],
)
def test_a_stdout_that_takes_nothing(number, command, status, monkeypatch, capsys):
    done = []
    broken = Broken(number)
    broken.flush = lambda: None

    def work(args):
        print("x")
        done.append(True)

    monkeypatch.setattr(f"sfumato.commands.{command}.main", work)
    monkeypatch.setattr(sys, "stdout", broken)
    assert cli.main([command]) == status and done
    told = capsys.readouterr().err
    assert ("could not be written" in told) == (number == errno.ENOSPC)
    assert ("itself is whole" in told) == (number == errno.ENOSPC and command == "sample")


def test_a_signal_while_options_are_read_keeps_its_status(monkeypatch):
    def killed(*args, **settings):
        raise SystemExit(143)

    monkeypatch.setattr("tyro.cli", killed)
    assert cli.main(["sample", "star", "--out", "x"]) == 143


def test_a_phase_is_a_line_at_its_start_and_its_end(capsys):
    assert list(track(range(3), "counting")) == [0, 1, 2]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "counting: 0 of 3" and last.startswith("counting: 3 of 3, ")


def test_a_silent_hub_is_told_at_once(monkeypatch, tmp_path):
    class Session:
        def head(self, url, timeout):
            assert timeout < 10
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    with pytest.raises(BadInput, match="does not answer"):
        require_hub("nobody/nothing-at-all")


def test_none_is_the_least_of_equals():
    one, half = Interval(1.0, 1.0, 1.0, 8), Interval(0.5, 0.4, 0.6, 8)
    assert worst({"circle": one, "square": one}) is None and worst({"circle": one, "square": half}) == "square"


def test_completion(tmp_path):
    told = script(["bash"], ["sample", "erase"])
    ask = 'source "$1"; COMP_WORDS=(sfumato %s); COMP_CWORD=%d; _sfumato; echo "${COMPREPLY[@]}"'
    (tmp_path / "c").write_text(told)
    asked = {"sam": "sample", "erase rec": "rece", "erase rece --mod": "--model", "sample --see": "--seeds"}
    for words, answer in asked.items():
        command = ["bash", "-c", ask % (words, len(words.split())), "bash", str(tmp_path / "c")]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == answer
    with pytest.raises(BadInput, match="bash"):
        script(["basj"], [])


def test_plurals():
    assert counted(1, "picture") == "1 picture" and counted(2, "picture") == "2 pictures"
