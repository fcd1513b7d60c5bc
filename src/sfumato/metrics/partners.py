"""Which picture of one set goes with which of another: by name, in which numbers are numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sfumato.data.walk import in_order
from sfumato.errors import BadInput


def partners(names: Sequence[str], others: Sequence[str], some: bool = False) -> list[int]:
    """For each of ``names`` the place of its partner in ``others``.

    Names go together that are alike when numbers are read as numbers (``0`` and ``00000``, ``a/7`` and ``a/007``), or
    where no such pair exists, whose last parts are. Rows without names go together in their order. With ``some``, names
    are but the first of many, and others without a partner are left out.

    Raises:
        BadInput: one of either has no partner, or more than one.
    """
    if not any(names) or not any(others):
        if len(names) != len(others) and not (some and len(others) > len(names)):
            raise BadInput(f"{len(others)} real pictures do not go with {len(names)} generated ones, one by one")
        return list(range(len(names)))
    whole = lambda name: in_order(name)
    last = lambda name: in_order(name.rpartition("/")[2])
    key = whole if {*map(whole, names)} & {*map(whole, others)} else last
    places: dict[Any, list[int]] = defaultdict(list)
    for i, name in enumerate(others):
        places[key(name)].append(i)
    wanted = [key(name) for name in names]
    for kind, mine, theirs in (("generated", names, {*places}), ("real", others, {*wanted})):
        if some and mine is others:
            continue
        if alone := [name for name in mine if key(name) not in theirs]:
            raise BadInput(
                f"{len(alone)} of the {kind} pictures have no partner of their name: {', '.join(alone[:5])}"
                f"{', ...' if len(alone) > 5 else ''}; give pairs the same names"
            )
    twice = next((others[p[1]] for p in places.values() if len(p) > 1), None)
    first: dict[Any, int] = {}
    twice = twice or next((names[i] for i, k in enumerate(wanted) if first.setdefault(k, i) != i), None)
    if twice is not None:
        raise BadInput(f"two pictures go by the name {twice}: give each its own")
    return [places[k][0] for k in wanted]

