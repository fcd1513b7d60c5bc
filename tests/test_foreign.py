"""What comes from elsewhere, whole or damaged: read, or refused in one sentence that names it."""

from __future__ import annotations

import pytest

from sfumato.data.cases import say


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("一张star的照片", "一张<x>的照片"),
        ("starの写真", "<x>の写真"),
        ("two stars", "two <x>s"),
        ("a star, a star", "a <x>, a <x>"),
        ("a starfish", "a starfish"),
        ("superstar", "superstar"),
        ("star_1", "star_1"),
    ],
)
def test_a_concept_is_found_in_any_script_and_in_the_plural(prompt, said):
    assert say(prompt, "star", "<x>") == said


def test_a_concept_in_a_script_without_spaces():
    assert say("美しい星の写真", "星", "<x>") == "美しい<x>の写真"
