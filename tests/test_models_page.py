"""The page of models says what the methods say."""

from __future__ import annotations

from models import PAGE, page


def test_the_page_of_models_is_up_to_date():
    assert PAGE.read_text() == page(), "run: python scripts/models.py"
