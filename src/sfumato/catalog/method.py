"""What the catalogue says of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from .papers import Paper


@dataclass(frozen=True)
class Method:
    """One method: ``sfumato VERB NAME`` on the command line (`command`), ``sf.VERB.CLASS`` in Python.

    ``cites`` is what runs, as BibTeX keys of ``papers.bib``, the method's own paper first. ``when`` and ``beware`` help
    to choose. ``ledger`` is its entry in the ledger; where that is empty, ``no_ledger`` says why.
    """

    verb: str
    name: str
    cls: str
    cites: tuple[str, ...]
    summary: str
    cost: str
    when: str
    beware: str
    ledger: str = ""
    no_ledger: str = ""

    @property
    def papers(self) -> tuple[Paper, ...]:
        """What it cites, read from ``papers.bib``."""
        from .papers import papers

        return tuple(papers()[key] for key in self.cites)

    @property
    def paper(self) -> Paper:
        return self.papers[0]

    @property
    def bibtex(self) -> str:
        return "\n\n".join(paper.bibtex for paper in self.papers)

    @property
    def command(self) -> str:
        """The words after ``sfumato`` that run it."""
        # `sfumato sample` takes prompts where other verbs take a method.
        return f"sample --scheduler {self.name}" if self.verb == "sample" else f"{self.verb} {self.name}"

    @property
    def class_name(self) -> str:
        return self.cls.partition(":")[2]

    def load(self) -> type[Any]:
        """Import the class."""
        from importlib import import_module

        module, _, name = self.cls.partition(":")
        return getattr(import_module(module), name)

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """The class's named settings, where it has any; imports it."""
        return getattr(self.load(), "presets", {})

    def as_dict(self) -> dict[str, str]:
        """What ``sfumato methods --json`` prints."""
        return {
            "verb": self.verb,
            "name": self.name,
            "class": self.cls.replace(":", "."),
            "paper": str(self.paper),
            "summary": self.summary,
            "cost": self.cost,
        }
