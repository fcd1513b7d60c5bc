"""Names of others cannot change what stands around them: on pages, in cards, on the terminal."""

from __future__ import annotations

import dataclasses
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_fixtures import make_report
from sfumato import cli
from sfumato.commands.tables import show_table
from sfumato.plan import Plan
from sfumato.progress import track
from sfumato.report import page
from sfumato.text import isolated, plain, shown, visible


@given(st.text())
def test_nothing_that_acts_is_left_and_nothing_else_is_touched(text):
    found = visible(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in found if c not in "\u200c\u200d")
    if not any(unicodedata.category(c)[0] in "CZ" for c in text):
        assert found == text


def test_escapes():
    assert visible("a\x1b[31m\u202eb\nc\u2028") == r"a\x1b[31m\u202eb\nc\u2028"
    assert visible("\U000e0041") == r"\U000e0041"
    assert isolated("star") == "star" and isolated("כוכב") == "\u2068כוכב\u2069"
    assert isolated("כ\u2069ב") == "\u2068כ\\u2069ב\u2069", "a name cannot end its own isolation"
    assert shown({"\u202ea": ["\x07", 1, None]}) == {r"\u202ea": [r"\x07", 1, None]}
    assert plain("<b>[x](y)*`&") == r"&lt;b&gt;\[x\]\(y\)\*\`&amp;"


@pytest.mark.parametrize("name", ["st\u202ear", "<img src=x>", "[/x]", "[red]", "כוכב", "x" * 3000])
def test_a_name_is_a_name_everywhere(name, capsys):
    report = make_report()
    concept = report.concepts[0]
    renamed = dataclasses.replace(
        report, concepts=[name], erasure={name: report.erasure[concept]}, protocol={**report.protocol, name: name}
    )
    html = page.render(renamed)
    assert "\u202e" not in html and "<img src=x>" not in html
    assert list(track([1], name)) == [1]
    Plan(title=name, writes=[name]).show()
    show_table(("name",), [(name,)], title=name)
    out, err = capsys.readouterr()
    assert "\u202e" not in out + err and "\x1b" not in out
    if name.startswith("["):
        assert name in out and name in err


def test_complaints_do_not_act_on_the_terminal(capsys):
    assert cli.main(["sta\x1b[2Jr"]) == 2
    assert r"\x1b[2J" in capsys.readouterr().err
