"""An attack in an audit: on the edited model, on the edited model without knowledge, and on the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sfumato import catalog
from sfumato.attack.base import Attack, Found
from sfumato.attack.parts.spending import Spending
from sfumato.data.cases import AttackCases, Case, say
from sfumato.pipeline import Text2Image

from .drawing import Pictures, Setup, draw, sound_bytes, to_float, way

LEARNING = 90_000
"""Offset of the seeds of the pictures that attacks learn from, so that none is a picture of the audit."""


@dataclass(frozen=True)
class Attacked:
    """Pictures of the audit's own prompts and seeds, asked for in three ways; and what the searches took: seconds, and
    rows through the network."""

    recovered: Pictures
    control: Pictures | None
    original: Pictures
    seconds: float
    rows: int


def make_attack(attack: str | Attack, model: Text2Image) -> Attack:
    """The attack of that name with the settings that suit the model."""
    if isinstance(attack, Attack):
        return attack
    cls = catalog.get(attack, "attack").load()
    return cls(**cls.settings_for(model))


def attack_names(attacks: Sequence[Attack]) -> list[str]:
    """The catalogue's name of each; the second of a name is "NAME (2)", and so on."""
    known = {m.class_name: m.name for m in catalog.methods("attack")}
    plain = [known.get(type(a).__name__, type(a).__name__) for a in attacks]
    counts = [plain[: i + 1].count(name) for i, name in enumerate(plain)]
    return [name if k == 1 else f"{name} ({k})" for name, k in zip(plain, counts, strict=True)]


def assail(setup: Setup, name: str, concept: str, before: Attacked | None = None) -> Attacked:
    """Run the attack three times with one budget, and draw the concept's cases under each; where ``before`` is known
    what it does to the original, twice.

    - on the edited model, with pictures of ``concept`` drawn by the original: what an attacker gets back;
    - on the edited model, without any knowledge of the concept (`Attack.control`);
    - on the original, with pictures of ``concept``: it must succeed here, or it proves nothing.
    """
    attack, spent = setup.attacks[name], Spending()
    cases, other = setup.cases.targets[concept][: setup.n_attack], setup.control(concept)
    settings: dict[str, Any] = {"judge": setup.detector, "original": setup.old, "progress": setup.progress}
    given = cache(lambda word: _given(setup, attack, cases, concept, word))

    def pictures(pipe: Text2Image, search, who: str) -> Pictures | None:
        with spent.counting(setup.old, setup.new):
            found: Found | None = search()
        if found is None:
            return None
        asked = [c.prompt for c in cases], [c.seed for c in cases]
        drawn = found.draw(pipe, *asked, progress=setup.progress, **way(setup, pipe))
        return sound_bytes(drawn, f"{who} under {name}")

    own, others = given(concept), None if other is None else given(other)
    recovered = pictures(setup.new, lambda: attack.run(setup.new, own, **settings), "the edited model")
    control = pictures(setup.new, lambda: attack.control(setup.new, own, others, **settings), "the edited model")
    if before is not None:
        return Attacked(recovered, control, before.original, spent.seconds, spent.rows)
    original = pictures(setup.old, lambda: attack.run(setup.old, own, **settings), "the original model")
    return Attacked(recovered, control, original, spent.seconds, spent.rows)


def _given(setup: Setup, attack: Attack, cases: Sequence[Case], concept: str, word: str) -> AttackCases:
    """The concept's cases with ``word`` in its place, and pictures of it by the original model."""
    said = [replace(c, prompt=say(c.prompt, concept, word)) for c in cases]
    asked = AttackCases(word, said, drawing=setup.sampling)
    if not attack.learns_from:
        return asked
    captions = [said[i % len(said)].prompt for i in range(attack.learns_from)]
    seeds = [LEARNING + cases[0].seed + i for i in range(attack.learns_from)]
    pictures = to_float(draw(setup, setup.old, captions, seeds, "the original model"))
    return replace(asked, pictures=pictures, captions=captions)
