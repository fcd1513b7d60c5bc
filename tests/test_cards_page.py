"""docs/cards.md says what the methods say."""

from __future__ import annotations

import pytest

from cards import PAGE, page
from sfumato import catalog


def test_every_eraser_and_attack_has_a_row_for_each_shape():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for m in (*catalog.methods("erase"), *catalog.methods("attack")):
        assert sum(line.startswith(f"| [`{m.name}`]") for line in lines) == 2, "run: python scripts/cards.py"


@pytest.mark.slow
def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python scripts/cards.py"
