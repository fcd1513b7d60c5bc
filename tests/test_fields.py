"""What a setting may be is said in its type, once, for Python and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tyro.conf import Positional

from sfumato.cli import main
from sfumato.commands.options import parse
from sfumato.errors import BadInput
from sfumato.fields import (
    Bound,
    Count,
    Decay,
    NotNegative,
    Positive,
    Share,
    at_least,
    check,
    check_values,
    plain,
    within,
)


@dataclass
class Settings:
    """Some.

    Attributes:
        batch: rows.
    """

    batch: Count = 4
    lr: Positive = 1e-3
    share: Share | None = None
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    sides: tuple[Annotated[int, at_least(2)], ...] = ()
    kind: Literal["a", "b"] = "a"
    weight: NotNegative = 0.0
    name: str = ""
    words: tuple[str, ...] = ()


@dataclass
class Words:
    """Words, and an option or two.

    Attributes:
        prompts: what to draw.
        out: where to.
        concepts: several.
        over: yes or no.
    """

    prompts: Annotated[tuple[str, ...], Positional]
    out: Path
    concepts: tuple[str, ...] = ()
    over: bool = False


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 2.5}, "batch must be a whole number, got 2.5"),
        ({"batch": True}, "batch must be a whole number, got True"),
        ({"lr": 0}, "lr must be more than 0, got 0"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": "x"}, "lr must be a number, got 'x'"),
        ({"share": 1.5}, "share must be at least 0 and at most 1, got 1.5"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and less than 1, got 1.0"),
        ({"betas": (0.9,)}, "betas takes 2 values, got 1"),
        ({"sides": (2, 1)}, "sides must be at least 2, got 1"),
        ({"kind": "c"}, "unknown kind 'c'"),
        ({"weight": -1}, "weight must be at least 0, got -1"),
        ({"betas": 0.9}, "betas takes 2 values, got 0.9"),
        ({"betas": "ab"}, "betas takes 2 values, got 'ab'"),
        ({"sides": 1}, "sides must be at least 2, got 1"),
        ({"sides": "ab"}, "sides must be a whole number, got 'ab'"),
        ({"name": 3}, "name must be text, got 3"),
        ({"words": 3}, "words must be text, got 3"),
        ({"words": ("a", 3)}, "words must be text, got 3"),
    ],
)
def test_what_a_field_cannot_be(wrong, told):
    with pytest.raises(BadInput, match=told.replace("(", r"\(")):
        check(Settings(**wrong))


def test_what_a_field_can_be():
    check(Settings(batch=1, lr=1, share=0, betas=(0, 0.5), sides=(2, 9), kind="b", weight=3))
    check(Settings(words="one", sides=3))  # of which some classes make a tuple
    check(Settings(words=(w for w in "ab")))


def test_the_command_line_says_the_flag_and_the_range(capsys):
    with pytest.raises(BadInput, match="--batch must be at least 1, got 0"):
        parse("x", ["--batch", "0"], Settings)
    with pytest.raises(BadInput, match=r"--betas must be at least 0 and less than 1, got 1\.0"):
        parse("x", ["--betas", "0.5", "1"], Settings)
    (given,) = parse("x", ["--batch", "2", "--share", "0.5"], Settings)
    assert given["batch"] == 2 and given["share"] == 0.5
    with pytest.raises(SystemExit):
        parse("x", ["--help"], Settings)
    assert "at least 1" in capsys.readouterr().out


def test_a_type_without_its_bounds():
    assert plain(Count | None) == (int | None, "at least 1")
    assert plain(tuple[Share, ...]) == (tuple[float, ...], "at least 0 and at most 1")


@given(st.floats(allow_nan=False), st.floats(-9, 9), st.floats(-9, 9))
def test_bounds_hold_what_they_say(x, a, b):
    low, high = sorted((a, b))
    assert (x in within(low, high)) == (low <= x <= high)
    assert (x in Bound(low, high, True, True)) == (low < x < high)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--out", "x", "--over", "--", "-red star", "b"), ("-red star", "b")),
        (("a", "--out", "x", "--", "-red"), ("a", "-red")),
        (("--out", "x", "a", "--concept", "c", "--", "-- b"), ("a", "-- b")),
        (("--out", "x", "--", "--help"), ("--help",)),
    ],
)
def test_words_after_a_lone_double_dash_are_no_options(args, told):
    (given,) = parse("words", args, Words)
    assert given["prompts"] == told and given["out"] == Path("x")


@pytest.mark.parametrize("word", ["-- a star", "-red star", "-red"])
def test_a_word_that_looks_like_an_option_is_explained(word):
    with pytest.raises(BadInput, match="goes after all options and a lone --"):
        parse("words", (word, "--out", "x"), Words)


def test_a_value_may_begin_with_a_dash():
    (given,) = parse("words", ("--out=-x", "--concept=-a"), Words)
    assert given["out"] == Path("-x") and given["concepts"] == ("-a",)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("information --model sketch --n 0", "--n must be at least 2"),
        ("train sid2 --head-dim 0", "--head-dim must be at least 1"),
        ("train sid2 --patch 0", "--patch must be at least 1"),
        ("train sid2 --precision half", "unknown --precision 'half': choose one of"),
        ("train sid2 --weight-decay -1", "--weight-decay must be at least 0"),
        ("train t2i --pictures -1", "--pictures must be at least 1"),
        ("compare --teacher sketch --seed -1", "--seed must be at least 0"),
        ("sample a --size -3", "--size must be at least 1"),
        ("attack concept-inversion --model sketch --concept star --n 0", "--n must be at least 1"),
        ("rollout --model x --fps 0", "--fps must be at least 1"),
        ("score --fake x --batch 0", "--batch must be at least 1"),
        ("sample \udcff", "is not UTF-8"),
    ],
)
def test_the_commands_say_what_a_value_may_be(line, told, tmp_path, capsys):
    assert main([*line.split(), "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True, kw_only=True)
class Masked:
    mask_steps: tuple[int, ...] = ()
    """Steps."""
    mask_names: tuple[str, ...] = ()
    """Names."""


def test_an_option_spelt_with_underscores_is_repeated_too():
    args = ["--mask_steps", "1", "--mask-step", "2", "--mask_names=a_b", "--mask_name=c_d"]
    assert Masked(**parse("it", args, Masked)[0]) == Masked(mask_steps=(1, 2), mask_names=("a_b", "c_d"))


def test_a_number_that_no_float_can_be_is_refused():
    with pytest.raises(BadInput, match="x must be a number below 1e308"):
        check_values({"x": float}, {"x": 10**400})


def test_one_value_where_there_may_be_several_is_a_tuple_of_it():
    from sfumato.attack import MMA, RingABell

    assert MMA(forbidden="star").forbidden == ("star",), "not four letters"
    assert RingABell(contexts="a {}").contexts == ("a {}",)

    @dataclass(frozen=True)
    class Several:
        words: tuple[str, ...] | None = None
        levels: tuple[Count, ...] = (1, 2)
        text: str | tuple[str, ...] = "as it is"
        pair: tuple[int, int] = (1, 2)

        def __post_init__(self):
            check(self)

    assert Several(words="red", levels=3) == Several(words=["red"], levels=[3]) == Several(words=("red",), levels=(3,))
    assert Several().words is None and Several().text == "as it is" and Several().pair == (1, 2)
    with pytest.raises(BadInput, match="levels must be at least 1"):
        Several(levels=0)
