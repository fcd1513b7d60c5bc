"""The promise kept: what somebody adds in one file, with an entry in the catalogue, is run by its matrix."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from sfumato import catalog
from sfumato.catalog.method import Method
from sfumato.pipeline import load, wrap

from . import families

TOYS = {
    "toy_eraser": (
        "erase",
        "Fade",
        """
        @dataclass(frozen=True, kw_only=True)
        class Fade(Eraser):
            draws: ClassVar[bool] = False
            strength: float = 0.1

            def erased(self, pipe):
                meant = pipe.encode(list(self.concepts)).tokens.double()[..., ::2].mean()
                share = float(1 - self.strength * (1 + meant.sin()))
                made = pipe.copy(own="xattn")
                with torch.no_grad():
                    for x in made.parameters("xattn").values():
                        x.mul_(share)
                return made, {"share": share}
        """,
    ),
    "toy_vandal": (
        "erase",
        "Vandal",
        """
        @dataclass(frozen=True, kw_only=True)
        class Vandal(Eraser):
            draws: ClassVar[bool] = False

            def erased(self, pipe):
                made = pipe.copy()
                with torch.no_grad():
                    for x in made.parameters("xattn").values():
                        x.mul_(0.9)  # shared with the teacher: the copy does not own them
                return made, {}
        """,
    ),
    "toy_patch": (
        "steer",
        "Damp",
        """
        @dataclass(frozen=True, kw_only=True)
        class Damp(Patch):
            NEUTRAL: ClassVar = {"factor": 1.0}
            place: ClassVar = "prediction"
            factor: float = 0.5

            @contextmanager
            def acting(self, p):
                factor = self.factor

                class Damping(Interceptor):
                    def predict(self, forward, call, run):
                        return factor * forward(call)

                with p.intercept(Damping(), self.place):
                    yield {}
        """,
    ),
    "toy_recipe": (
        "train",
        "Plain",
        """
        @dataclass(frozen=True, kw_only=True)
        class Plain(PixelRecipe):
            def process(self):
                return GaussianProcess(Cosine())

            def network(self, classes):
                return UNet(self.size, 3, classes, channels=(8, 8), layers=1, attention=())
        """,
    ),
    "toy_attack": (
        "attack",
        "Ask",
        """
        @dataclass
        class Asked(Found):
            word: str = ""

            def draw(self, pipe, prompts, seeds, **settings):
                if missing := [p for p in prompts if self.concept not in p]:
                    raise BadInput(f"{missing[0]!r} does not name {self.concept!r}")
                said = [p.replace(self.concept, f"{self.word} {self.concept}") for p in prompts]
                return pipe.draw(said, list(seeds), **settings)

            def record(self):
                return {"word": self.word}


        @dataclass(frozen=True, kw_only=True)
        class Ask(Attack):
            box: ClassVar = "black"
            words: tuple[str, ...] = ("red", "blue", "square")

            def run(self, pipe, cases, *, judge=None, original=None, progress=True, folder=None):
                return Asked(cases.concept, self.budget(), self.words[self.seed % len(self.words)])
        """,
    ),
    "toy_family": (
        "",
        "Perturbed",
        """
        class Perturbed(StableDiffusion):
            family = "perturbed"
            title = "Stable Diffusion with perturbed attention"
        """,
    ),
}
HEAD = """
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from sfumato.attack.base import Attack, Found
from sfumato.erase.base import Eraser
from sfumato.errors import BadInput
from sfumato.nets import UNet
from sfumato.noise import Cosine, GaussianProcess
from sfumato.pipeline.sd import StableDiffusion
from sfumato.pipeline.steering import Interceptor
from sfumato.steer.base import Patch
from sfumato.train.pixels import PixelRecipe
"""


@pytest.fixture
def joined(tmp_path, monkeypatch, tiny_sd):
    """The toys, each in a file of its own, with an entry in the catalogue, and a family with a line in the list."""
    import diffusers

    entries = []
    for module, (verb, cls, code) in TOYS.items():
        (tmp_path / f"{module}.py").write_text(f"{HEAD}\n\n{dedent(code)}")
        name = module.replace("_", "-")
        words = {"summary": "A toy.", "cost": "none", "when": "never", "beware": "a toy", "no_ledger": "it is a toy"}
        entries += [Method(verb, name, f"{module}:{cls}", ("gandikota2024uce",), **words)] if verb else []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalog, "METHODS", (*catalog.METHODS, *entries))
    from toy_family import Perturbed

    monkeypatch.setitem(load.__globals__["_FAMILIES"], "StableDiffusionPAGPipeline", Perturbed)
    kept, families.FAMILIES[:] = list(families.FAMILIES), ["tiny_toy"]

    class Plugin:
        def __init__(self):
            self.outcomes: dict[str, str] = {}

        @pytest.fixture(scope="session")
        def tiny_toy(self):
            parts = tiny_sd.copy("all").pipe.components
            return wrap(diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False))

        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.failed:
                self.outcomes[report.nodeid.partition("::")[2]] = report.outcome

    yield Plugin()
    families.FAMILIES[:] = kept


def run(plugin, files: list[str], wanted: str) -> dict[str, str]:
    """What becomes of the tests of these matrices whose names fit ``wanted``: passed or failed, by name."""
    paths = [str(Path(__file__).parent / f"test_{name}.py") for name in files]
    off = ["-n0", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    pytest.main([*paths, "-k", wanted, "--capture=no", "--tb=short", *off], plugins=[plugin])
    return plugin.outcomes


# Slow, which means by itself: inside a process that has run the matrices before, the inner run finds no toys.
@pytest.mark.slow
def test_toys_join_their_matrices_and_keep_their_promises(joined):
    toys = {"toy-eraser": 15, "toy-patch": 10, "toy-recipe": 10, "toy-attack": 8}
    found = run(joined, ["erasers", "patches", "recipes", "attacks"], " or ".join((*toys, "uce-tiny_toy")))
    assert [name for name, outcome in found.items() if outcome == "failed"] == []
    for toy, least in toys.items():
        assert sum(toy in name for name in found) >= least, f"{toy} is run by its matrix"
    for method in ("toy-eraser", "toy-attack", "toy-patch", "uce"):
        assert any(f"{method}-tiny_toy" in name for name in found), f"{method} is run on the new family"


@pytest.mark.slow
def test_a_broken_toy_is_caught(joined):
    found = run(joined, ["erasers"], "test_the_teacher_is_left_as_it_was and toy-vandal")
    assert list(found.values()) == ["failed"]
