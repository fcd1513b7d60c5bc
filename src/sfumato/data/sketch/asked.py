"""What a phrase asks for: objects, colours, and how the objects stand to each other."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sfumato.errors import BadInput, unknown

from .scene import COLOURS, RELATIONS
from .shapes import OBJECTS

_SAME = {"to the left of": "left of", "to the right of": "right of", "over": "above", "under": "below", ",": " and "}
_FILLERS = {"a", "an", "the", "picture", "drawing", "of", "shape", "two"}
_JOINT = re.compile(rf"\b({'|'.join(RELATIONS)}|and)\b")


@dataclass(frozen=True)
class Asked:
    """Objects, each a pair (colour or None, object or None), and triples (subject, relation, reference) of indices."""

    items: tuple[tuple[str | None, str | None], ...]
    relations: tuple[tuple[int, str, int], ...] = ()


def asked(text: str) -> Asked:
    """Read "a red star left of a blue fish", "a star and a fish", "two red stars", "a moon above a tree".

    "the star" is one that was named before; every other noun phrase is another object.

    Raises:
        BadInput: a word that is none of the world's objects, colours and relations; a phrase without an object; an
            object that is to stand left of (right of, ...) itself.
    """
    plain = " ".join(text.lower().split())
    for words, word in _SAME.items():
        plain = re.sub(rf"\b{words}\b" if words.isalpha() or " " in words else words, word, plain)
    pieces = [piece.strip() for piece in _JOINT.split(plain)]
    items: list[tuple[str | None, str | None]] = []
    places, relations = [], []
    for piece in pieces[::2]:
        colour, thing = _noun(piece, text)
        before = [i for i, (c, o) in enumerate(items) if o == thing and colour in (None, c)]
        if piece.startswith("the ") and before:
            places.append(before[0])
            continue
        items += [(colour, thing)] * (2 if "two" in piece.split() else 1)
        places.append(len(items) - 1)
    for i, joint in enumerate(pieces[1::2]):
        if joint != "and":
            relations.append((places[i], joint, places[i + 1]))
    for subject, relation, reference in relations:
        if subject == reference:
            thing = items[subject][1]
            raise BadInput(f"a {thing} cannot be {relation} itself: name another object in {text!r}")
    return Asked(tuple(items), tuple(relations))


def _noun(piece: str, text: str) -> tuple[str | None, str | None]:
    """Colour and object of "a red star" or "two red stars"."""
    colour = thing = None
    for word in re.findall(r"[\w-]+", piece):
        single = next((o for o in OBJECTS if word in (o, f"{o}s", f"{o}es")), None)
        if single:
            thing = single
        elif word in COLOURS:
            colour = word
        elif word not in _FILLERS:
            raise unknown("object, colour or relation of the sketch world", word, (*OBJECTS, *COLOURS, *RELATIONS))
    if thing is None and colour is None:
        raise BadInput(f"{text!r} names no object between its relations: write it like 'a red star left of a fish'")
    return colour, thing
