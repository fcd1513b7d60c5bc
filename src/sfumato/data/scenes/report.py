"""The scene oracle's page: what it finds on fresh scenes, and what it takes for what."""

from __future__ import annotations

from pathlib import Path

from ..sketch import COLOURS, OBJECTS
from . import MOST, SceneOracle

PAGE = """# The scene oracle

A network of {size:.2f} M parameters that finds up to {most} objects in a picture of the [sketch world](sketch.md), with
their colours and places; from the places follows how any two stand to each other (`sfumato.data.scenes.holds`). It
ships with the package (`sfumato.data.scenes.load().read(pictures)`), and the detector `scenes` of audits looks with it
for a whole phrase: "a red star left of a blue fish" is seen when all of it is. This page is written by
`python -m sfumato.data.scenes --report docs`.

| of {n:,} fresh scenes | right |
| --- | ---: |
| objects found, in kind, colour and place | {objects:.2%} of {n_objects:,} |
| relations | {relations:.2%} of {n_relations:,} |
| scenes without a mistake | {scenes:.2%} |
| scenes with an object too many | {many:.2%} |

A third of the scenes has one object, a third two, a third three (64x64, generator seed {test_seed}, never used in
training); an object counts as found within a tenth of the picture's side. Measured with the shipped float16 weights
(sha256 `{sha256:.16}...`, training seed {seed}, {updates} updates of {batch}).

## object

{object}

## colour

{colour}
"""


def report(oracle: SceneOracle, folder: str | Path) -> None:
    """Write ``scenes.md`` to ``folder``, from the oracle's card."""
    card = oracle.card
    page = PAGE.format(
        size=card["parameters"] / 1e6,
        most=MOST,
        n=card["n"],
        objects=card["objects_right"] / card["objects"],
        n_objects=card["objects"],
        relations=card["relations_right"] / card["relations"],
        n_relations=card["relations"],
        scenes=card["scenes_right"] / card["n"],
        many=card["too_many"] / card["n"],
        test_seed=card["test_seed"],
        sha256=card["sha256"],
        seed=card["seed"],
        updates=card["config"]["updates"],
        batch=card["config"]["batch"],
        object=_table(OBJECTS, card["confusion"]["object"]),
        colour=_table(COLOURS, card["confusion"]["colour"]),
    )
    (Path(folder) / "scenes.md").write_text(page)


def _table(words: tuple[str, ...], counts: list[list[int]]) -> str:
    lines = [f"| truth \\ reading | {' | '.join(words)} | not found |", "| --- |" + " ---: |" * (len(words) + 1)]
    for i, (word, row) in enumerate(zip(words, counts, strict=True)):
        cells = [f"**{n}**" if i == j else str(n or "") for j, n in enumerate(row)]
        lines.append(f"| {word} | {' | '.join(cells)} |")
    return "\n".join(lines)
