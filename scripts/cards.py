"""Write docs/cards.md: what one optimisation step of each eraser and attack needs of a card, at SD 1.x and SDXL shapes.

    python scripts/cards.py           # write
    python scripts/cards.py --check   # say whether it is out of date, exit status 1 if it is

Nothing is loaded: networks of the published shapes are traced on torch's meta device, as `sfumato doctor --model sd1
--method esd-x` does for one of them. A minute or two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from sfumato import catalog
from sfumato.commands.cards import Need, made, need
from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image
from sfumato.pipeline.saving import quiet
from sfumato.pipeline.single.published import SHAPES, published
from sfumato.plan import human_bytes
from sfumato.settings import settings_for

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cards.md"
TITLES = {"sd1": "Stable Diffusion 1.x, 512 x 512", "sdxl": "SDXL, 1024 x 1024"}
HEAD = """# What fits on a card

Written by `python scripts/cards.py`: the memory of one optimisation step of each eraser and attack, with the method's
own settings (its batch too), one concept, and everything in float32. `sfumato doctor --model DIR --method NAME` says
the same of a model that you have, and `--model sd1` or `--model sdxl` of these shapes, part by part; `--dtype bfloat16`
with weights of half the size.

It is computed, not measured: the network's forward and backward pass is traced without weights, and what is alive is
added up. On a small pipeline on the CPU the peak of the allocator is within a tenth of it
([`tests/test_backward.py`](../tests/test_backward.py)). Attention is taken to be fused. What comes on top on a real
card: the driver's context (some hundred megabytes), workspaces of convolutions, and what the allocator rounds up.
Seconds are not here: they depend on the card, and none was at hand.

- **rows**: rows of the denoising network that a step differentiates at once. None: no gradient goes through it, and
  what is needed is the model itself.
- **activations**: at their peak; **recomputed**: the same with `--checkpointing`, where a method has it.
- **a step**: weights of the whole model (text encoders and autoencoder too), the copy of what is trained, gradients,
  Adam's averages and activations. **at the least**: recomputed where that is possible, and `--optimizer adam8bit` where
  there is an optimiser. DoCo's discriminator, the text encoder's own activations and pictures that are drawn beforehand
  are left out.
"""


@cache
def shape(name: str) -> Text2Image:
    with quiet():
        return published(name)


def asked(pipe: Text2Image, verb: str, name: str) -> Need | str:
    """What it needs, or why it does not fit."""
    cls = catalog.get(name, verb).load()
    try:
        return need(pipe, made(verb, name, **settings_for(cls, None)))
    except BadInput as error:
        return str(error)


def line(name: str, found: Need | str) -> str:
    if isinstance(found, str):
        return f"| [`{name}`](methods/{name}.md) | does not fit |  |  |  |  |  |"
    told: list[Any] = [f"[`{name}`](methods/{name}.md)"]
    if found.learning is None or not found.learning.rows:
        told += ["none", "", "", "", human_bytes(found.plain), human_bytes(found.plain)]
    else:
        last = "" if found.recomputed is None else human_bytes(found.recomputed)
        told += [found.learning.rows, f"{found.trained // 4 / 1e6:,.1f} M", human_bytes(found.activations), last]
        told += [human_bytes(found.plain), human_bytes(found.least)]
    return f"| {' | '.join(map(str, told))} |"


def table(pipe: Text2Image, verb: str, need_of: Callable[[Text2Image, str, str], Need | str] = asked) -> str:
    header = "| method | rows | trained | activations | recomputed | a step | at the least |"
    rows = [line(m.name, need_of(pipe, verb, m.name)) for m in catalog.methods(verb)]
    return "\n".join([header, "| --- " * 7 + "|", *rows])


def page() -> str:
    parts = [HEAD]
    for name in SHAPES:
        weights = human_bytes(4 * sum(p.numel() for m in shape(name).parts().values() for p in m.parameters()))
        parts.append(f"## {TITLES[name]}\n\nThe model itself: {weights} in float32.\n")
        parts += [f"### {verb}\n\n{table(shape(name), verb)}\n" for verb in ("erase", "attack")]
    return "\n".join(parts)


def main(args: list[str]) -> int:
    text = page()
    if "--check" in args:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
        print("docs/cards.md is out of date: python scripts/cards.py" if stale else "up to date")
        return int(stale)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
