"""Language models as text encoders: the chat template around a prompt, and which rows are the prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .conditioning import Role
from .text import Layout

PROMPT = "\0"
"""What stands for a prompt in a template that is looked at."""


def templated(tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """The prompts as what a user says, in the tokenizer's own chat template, up to where an answer would begin."""
    said = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.apply_chat_template(s, tokenize=False, add_generation_prompt=True, **options) for s in said]


def around(template: str) -> tuple[str, str]:
    """What a template, in which `PROMPT` is the prompt, has before and behind it."""
    before, after = template.split(PROMPT)
    return before, after


def framed(rows: Layout, tokenizer: Any, before: str, after: str) -> Layout:
    """The rows with those of what a template has before the prompt as `Role.START`, and behind it as `Role.END`.

    Where a long prompt was cut off, its end is none of the template's.

    Args:
        rows: of the template with the prompt in it, padded on the right.
        before, after: the template's own text.
    """
    first, last = (rows["ids"].new_tensor(tokenizer(x, add_special_tokens=False).input_ids) for x in (before, after))
    roles = rows["roles"].clone()
    for i, count in enumerate(rows["mask"].sum(dim=1).tolist()):
        head, tail = slice(0, len(first)), slice(count - len(last), count)
        for part, known, role in ((head, first, Role.START), (tail, last, Role.END)):
            if 0 < len(known) <= count and bool((rows["ids"][i, part] == known).all()):
                roles[i, part] = int(role)
    return {**rows, "roles": roles}
