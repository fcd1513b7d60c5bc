"""Write docs/models.md: every family of pipelines by every method, as the methods themselves say on tiny instances.

    python scripts/models.py           # write
    python scripts/models.py --check   # say whether it is out of date, exit status 1 if it is

The instances are those of the tests (tests/conftest.py, tests/tiny_families.py). "yes" is what a method's own `check`
says; the matrices in tests/matrix/ run the methods, those that train or search partly among the slow tests.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

import conftest as tests  # noqa: E402
import tiny_families  # noqa: E402
from sfumato import catalog  # noqa: E402
from sfumato.data.cases import AttackCases, Case  # noqa: E402
from sfumato.errors import BadInput  # noqa: E402
from sfumato.pipeline import Text2Image, wrap  # noqa: E402
from sfumato.pipeline.anatomy import KINDS, SUBSETS  # noqa: E402
from sfumato.pipeline.sampling import make_scheduler  # noqa: E402
from sfumato.pipeline.saving import quiet  # noqa: E402

HEAD = """# Models

Written by `python scripts/models.py`: what follows is what the methods say when they are asked on a tiny instance of
every family. A model is loaded from a folder written by `save_pretrained`, whose `model_index.json` names one of these
classes. A variant of one of them (inpainting, editing, ControlNet, a refiner) is refused, and so is a class that is not
here, in a sentence that names those that are.

How much a "yes" says: asked whether it could, the method took the tiny instance (its `check` passed, or it could be set
up there). The tests also run it on such instances, with settings that take a second: closed forms, patches and samplers
on every family at each run; other erasers, and attacks, on Stable Diffusion 1.x/2.x, PixArt-Sigma, SD3 and Z-Image,
and on the other families in the slow tests only (`pytest -m slow`). Nothing here was run on published weights,
and nothing says how well a method does its work on a family that its paper does not treat.

Names and shapes are tested on published sizes too, as [`tests/published.py`](../tests/published.py) lists them. Those
were read off diffusers' conversion scripts, its documentation and the defaults of its classes; none of them was checked
against the `config.json` that lies beside the model's own weights.
"""
WORDS = """
## What the words mean

A method names what it works on by the same words everywhere. `cross.*` and `self.*` are the projections of cross- and
self-attention. Where text and picture are joined in one softmax, `joint.*` are the projections of the picture's side
and of layers that both share, and `text.*` those of the text's side alone; in Z-Image, which has one stream, those of
the layers that only the text goes through. `text.in` and `pooled.in` are the linear maps that read the text encoders'
embeddings (in Qwen-Image and Z-Image after a norm). Flux.2's single blocks have their projections fused with the
feed-forward layer, and none of these kinds.

Of the sets of parameters, `xattn` is all of cross-attention, or the text's side of joint attention; `xattn-strict` its
keys and values; `noxattn` all but `xattn`, the time embedding and the output; `selfattn` the picture's own attention.
So ESD-x trains what only text goes through, and ESD-u the rest, on every family.

Closed forms (UCE, RECE) solve for maps of the encoders' embeddings. Those are the keys and values of cross-attention;
on SD3 and Flux.1, which have none, `text.in` and `pooled.in`, and the docstring of UCE says how far that reaches.
"""
MAKERS: dict[str, Callable[[Any], Any]] = {
    "sd": tests.make_tiny_sd,
    "sdxl": tests.make_tiny_sdxl,
    "pixart": lambda tmp: tests.make_tiny_pixart(),
    "sana": lambda tmp: tiny_families.make_tiny_sana(),
    "sd3": tests.make_tiny_sd3,
    "flux": tests.make_tiny_flux,
    "flux2": lambda tmp: tiny_families.make_tiny_flux2(),
    "qwen": lambda tmp: tiny_families.make_tiny_qwen(),
    "zimage": lambda tmp: tiny_families.make_tiny_zimage(),
}


class Folders:
    """As much of pytest's ``tmp_path_factory`` as the makers ask for."""

    def __init__(self, root: str):
        self.root, self.numbers = Path(root), itertools.count()

    def mktemp(self, name: str) -> Path:
        folder = self.root / f"{name}{next(self.numbers)}"
        folder.mkdir()
        return folder


def families() -> Iterator[Text2Image]:
    """A tiny pipeline of every family."""
    with tempfile.TemporaryDirectory() as root, quiet():
        folders = Folders(root)
        for name, make in MAKERS.items():
            yield wrap(make(folders), {"size": 32 if name == "sana" else 16})


def refusal(verb: str, method: type, p: Text2Image) -> str | None:
    """Why a method does not run on a pipeline, in its own words; None where it runs."""
    cls: Any = method
    try:
        if verb == "erase":
            cls(**{"concepts": ("star",), **cls.EXAMPLE}).check(p)
        elif verb == "attack":
            pictures = torch.zeros(2, 3, p.size, p.size)
            asked = [Case("a red star", 3, ("star",))]
            cls(**cls.EXAMPLE).check(p, AttackCases("star", asked, pictures=pictures, captions=["a star"] * 2))
        elif verb == "steer":
            with cls(**cls.EXAMPLE).patch(p):
                pass
        elif verb == "sample":
            make_scheduler(p, cls())
        elif verb == "distill":
            cls(teacher=p).open_teacher()
    except BadInput as refused:
        return str(refused)
    return None


def page() -> str:
    """The page as Markdown."""
    found = list(families())
    lines = [HEAD, "| family | pipeline | network | text encoders | what attention there is | guidance at first |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for p in found:
        encoders = ", ".join(f"`{type(getattr(p.pipe, name)).__name__}`" for _, name in p.text_parts())
        kinds = " and ".join(dict.fromkeys(site.kind for site in p.anatomy.sites()))
        names = (type(p.pipe).__name__, type(p.network).__name__)
        cells = [p.title, *(f"`{name}`" for name in names), encoders, kinds, f"{p.default_cfg_scale:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [WORDS, *table("kind", KINDS, found, lambda p, kind: kind in p.anatomy.kinds), ""]
    lines += table("set", SUBSETS, found, lambda p, subset: bool(p.anatomy._subset(subset)))
    for verb in ("erase", "attack", "steer", "sample", "distill"):
        methods = [(m.name, m.load()) for m in catalog.methods(verb)]
        said = {(name, p.family): refusal(verb, cls, p) for name, cls in methods for p in found}
        runs = lambda p, name, said=said: said[name, p.family] is None
        lines += ["", f"## {verb}", "", *table("method", [name for name, _ in methods], found, runs)]
        for name, _ in methods:
            refused = [p for p in found if said[name, p.family]]
            if refused:
                others, first = ", ".join(p.title for p in refused), refused[0]
                lines += ["", f"`{name}` is refused on {others}; on {first.title}: {said[name, first.family]}."]
    return "\n".join(lines) + "\n"


def table(what: str, rows: Any, found: list[Text2Image], has: Callable[[Text2Image, str], bool]) -> list[str]:
    """Rows by family, "yes" where a family has it."""
    lines = [f"| {what} | {' | '.join(p.title for p in found)} |", f"| --- |{' --- |' * len(found)}"]
    return lines + [f"| `{row}` | {' | '.join('yes' if has(p, row) else '–' for p in found)} |" for row in rows]


def main() -> int:
    text = page()
    stale = not PAGE.exists() or PAGE.read_text() != text
    if stale:
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: {PAGE.relative_to(ROOT)}")
    if stale and "--check" not in sys.argv:
        PAGE.write_text(text)
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    raise SystemExit(main())
