"""An attack in an audit: on the edited model, on the edited model without knowledge, and on the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfumato import catalog
from sfumato.attack.base import Attack, Found
from sfumato.attack.parts.spending import Spending
from sfumato.data.cases import AttackCases, Case, say
from sfumato.metrics.resize import to_float
from sfumato.pipeline import Text2Image

from .drawing import Pictures, Setup, draw, sound_bytes, way

LEARNING = 90_000
"""Offset of the seeds of the pictures that attacks learn from, so that none is a picture of the audit."""


@dataclass(frozen=True)
class Attacked:
    """Pictures of the audit's own prompts and seeds, asked for in three ways; and what the searches on the edited model
    took: seconds, and rows through the networks."""

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


def assail(setup: Setup, name: str, concept: str, original: Pictures | None = None) -> Attacked:
    """Run the attack three times with one budget, and draw the concept's cases under each; where what comes of it on
    the original is given, twice.

    - on the edited model, with pictures of ``concept`` drawn by the original: what an attacker gets back;
    - on the edited model, without any knowledge of the concept (`Attack.control`);
    - on the original, with pictures of ``concept``: it must succeed here, or it proves nothing (`on_the_original`).
    """
    attack, spent, new = setup.attacks[name], Spending(), setup.new
    own, other = _given(setup, attack, concept, concept), setup.control(concept)
    others = None if other is None else _given(setup, attack, concept, other)
    with spent.counting(setup.old, new):
        found = attack.run(new, own, **_means(setup))
        floor = attack.control(new, own, others, **_means(setup))
    recovered, control = (f and _pictures(setup, name, concept, new, f, "the edited model") for f in (found, floor))
    if original is None:
        original = on_the_original(setup, name, concept, own)
    return Attacked(recovered, control, original, spent.seconds, spent.rows)


def on_the_original(setup: Setup, name: str, concept: str, given: AttackCases | None = None) -> Pictures:
    """Run the attack on the original, with pictures of ``concept``, and draw the concept's cases under it.

    Args:
        given: the cases, with what the attack learns from, if they are known.
    """
    attack = setup.attacks[name]
    given = given or _given(setup, attack, concept, concept)
    found = attack.run(setup.old, given, **_means(setup))
    return _pictures(setup, name, concept, setup.old, found, "the original model")


def _means(setup: Setup) -> dict[str, Any]:
    return {"judge": setup.detector, "original": setup.old, "progress": setup.progress}


def _pictures(setup: Setup, name: str, concept: str, pipe: Text2Image, found: Found, who: str) -> Pictures:
    cases = _attacked(setup, concept)
    asked = [c.prompt for c in cases], [c.seed for c in cases]
    drawn = found.draw(pipe, *asked, progress=setup.progress, **way(setup, pipe))
    return sound_bytes(drawn, f"{who} under {name}")


def _attacked(setup: Setup, concept: str) -> Sequence[Case]:
    """The cases of a concept that are asked for under attack."""
    return setup.cases.targets[concept][: setup.n_attack]


def _given(setup: Setup, attack: Attack, concept: str, word: str) -> AttackCases:
    """The concept's cases with ``word`` in its place, and pictures of it by the original model."""
    cases = _attacked(setup, concept)
    said = [replace(c, prompt=say(c.prompt, concept, word)) for c in cases]
    asked = AttackCases(word, said, drawing=setup.sampling)
    if not attack.learns_from:
        return asked
    captions = [said[i % len(said)].prompt for i in range(attack.learns_from)]
    seeds = [LEARNING + cases[0].seed + i for i in range(attack.learns_from)]
    pictures = to_float(draw(setup, setup.old, captions, seeds, "the original model"))
    return replace(asked, pictures=pictures, captions=captions)
