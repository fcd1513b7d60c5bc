"""What an attack is: a dataclass of hyper-parameters whose verb is `run`; and what it hands back."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from jaxtyping import Float
from torch import Tensor

from sfumato.data.cases import AttackCases
from sfumato.errors import BadInput
from sfumato.fields import Natural, NotNegative, Seed
from sfumato.files import atomic_folder, save_png, write_json
from sfumato.metrics.detectors import Detector
from sfumato.pipeline import Text2Image
from sfumato.pipeline.backward import Learning
from sfumato.pipeline.timing import seconds_per_row
from sfumato.plan import Plan, weights_of
from sfumato.settings import Tuned
from sfumato.text import counted
from sfumato.train.schedule import NEUTRAL

from .parts.outcome import shown_plainly
from .parts.spending import Spending

Box = Literal["white", "grey", "black"]


@dataclass
class Found(ABC):
    """What an attack found on one pipeline: a way to ask for the concept.

    Attributes:
        concept: what it asks for.
        budget: of the attack (`Attack.budget`).
        before: for each case of the search whether its plain prompt showed the concept already: such a success is not
            the attack's. None where nobody judged.
        spent: what the search took (`Spending.told`).
    """

    concept: str
    budget: dict[str, Any]
    before: list[bool] | None = field(default=None, kw_only=True)
    spent: dict[str, Any] | None = field(default=None, kw_only=True)

    @abstractmethod
    def draw(
        self, pipe: Text2Image, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
    ) -> Float[Tensor, "n 3 height width"]:
        """Pictures in [0, 1] of ``prompts``, which name the concept plainly, asked for in the attack's way.

        Same prompts, seeds and settings (those of `Text2Image.draw`) as without the attack: only the way in which the
        concept is asked for differs.

        Raises:
            BadInput: a prompt that does not name the concept, or for which the attack has found nothing.
        """

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What was found and on the way to it, for ``attack.json`` (JSON types)."""

    def write(self, folder: Path) -> None:  # noqa: B027 (most need no more than the record)
        """Put files of its own beside the record."""

    def save(
        self,
        folder: str | Path,
        pictures: Float[Tensor, "n 3 height width"] | None = None,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write ``attack.json``, what was found, and pictures that were drawn with it: all or nothing.

        Args:
            pictures: in [0, 1].
            about: what else the record should say, e.g. of the pictures (JSON types).
        """
        own = {"concept": self.concept, "budget": self.budget, "before": self.before, "spent": self.spent}
        record = {**own, **self.record(), **(about or {})}
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            write_json(temporary / "attack.json", record)
            self.write(temporary)
            about = {"concept": self.concept, "attack": self.budget["name"]}
            for i, picture in enumerate(() if pictures is None else pictures):
                save_png(temporary / f"{i:03d}.png", picture.permute(1, 2, 0).cpu().numpy(), about)
        return Path(folder)

    def asking_for(self, concept: str) -> Self:
        """The same find, asked in place of another concept's name."""
        return dataclasses.replace(self, concept=concept, before=None)


@dataclass(frozen=True)
class Means:
    """What a search has at hand, besides the pipeline and the cases.

    Attributes:
        judge, original, progress, folder: as for `Attack.run`.
        before: for each case whether its plain prompt shows the concept already; None where nobody judges.
        spending: counts, and ends the search: whatever calls the network, and its `check`, raise `Exhausted` when all
            is spent, so the loop of a search stands in a block of ``spending.allowed()``.
    """

    judge: Detector | None
    original: Text2Image | None
    before: list[bool] | None
    spending: Spending
    progress: bool = True
    folder: Path | None = None

    @property
    def open(self) -> list[bool]:
        """For each case whether it is still to be broken. Needs ``before``."""
        return [not seen for seen in self.before or ()]


@dataclass(frozen=True, kw_only=True)
class Attack(Tuned, ABC):
    """Fields that every attack has.

    A new attack is one file: a subclass that says in `search` how it searches, and a `Found` that says how one asks
    with what it found. What is the same for all is here: `run` counts what the search spends, ends it at the limits,
    and counts apart what the plain prompts show.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it takes about a second on a tiny pipeline, for the tests that all attacks share."""
    box: ClassVar[Box]
    """What the attacker sees of the erased model: its weights and gradients ("white"), those of its text encoder or
    those of other models only ("grey"), or nothing but the pictures that it draws ("black")."""

    needs_judge: ClassVar[bool] = False
    """It stops at success, or chooses by it."""
    retrains: ClassVar[bool] = False
    """It trains the weights on. Whoever can do so needs no way around the edit, and so it is told apart where erasers
    are ranked by what they withstand."""
    looks_first: ClassVar[bool] = True
    """The cases' plain prompts are drawn and judged before the search; not where it has no use for that."""

    seed: Seed = 0
    """Seed of all randomness in the attack."""
    max_rows: Natural = 0
    """Rows through the denoising network that a search may take, a backward pass counted as two; 0: as many as it
    needs."""
    max_seconds: NotNegative = 0.0
    """Seconds that a search may take; 0: as many as it needs. The best until then counts."""

    @property
    def learns_from(self) -> int:
        """How many pictures of the concept it learns from; 0: it needs none."""
        return 0

    def budget(self) -> dict[str, Any]:
        """What the attacker is given: everything that decides the attack's strength."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if k not in NEUTRAL | {"progress"}}
        return {"name": type(self).__name__, "box": self.box, **given}

    def check(self, pipe: Text2Image, cases: AttackCases) -> None:
        """Raise `BadInput` if the attack cannot run on ``pipe``, or not ask for these cases.

        Cheap: whoever has much to compute asks this first, before the pictures to learn from are drawn.
        """

    def learning(self, pipe: Text2Image) -> Learning | None:
        """What one step of the search differentiates of the denoising network; None: nothing of it."""
        return None

    def rows(self, cases: int, sampling_steps: int) -> float:
        """Rows that one run on so many cases takes through the network, a backward pass counted as two, for plans.

        The pictures that it learns from, and those that are drawn with what it found, are not counted.

        Args:
            sampling_steps: of a picture that is drawn on the way, to ask a judge.
        """
        return 0.0

    def plan(self, pipe: Text2Image, cases: AttackCases) -> Plan:
        """Memory and time of an attack by itself, its pictures included, from one timed pass of the network."""
        steps = cases.drawing.get("sampling_steps") or pipe.defaults.get("sampling_steps", 25)
        pictures = len(cases.cases) * (2 if self.looks_first else 1)
        pictures += self.learns_from if cases.pictures is None else 0
        rows = self.rows(len(cases.cases), steps)
        rows = min(rows, self.max_rows or rows)
        title = f"{type(self).__name__} against {cases.concept!r}: {rows:,.0f} rows through the network, "
        title += f"and {counted(pictures, 'picture')} with {counted(steps, 'step')}"
        a_row = seconds_per_row(pipe, 8)
        searching = min(rows * a_row, self.max_seconds or rows * a_row)
        seconds = searching + 2 * steps * pictures * a_row
        return Plan(title, memory=weights_of(pipe.parts()), seconds=seconds)

    def run(
        self,
        pipe: Text2Image,
        cases: AttackCases,
        *,
        judge: Detector | None = None,
        original: Text2Image | None = None,
        progress: bool = True,
        folder: str | Path | None = None,
    ) -> Found:
        """Search for a way to make ``pipe`` draw the concept again. ``pipe`` is left exactly as it was.

        Args:
            pipe: the pipeline under attack.
            cases: what is to come back, and pictures to learn from.
            judge: says whether the concept is in a picture, for attacks that stop at success or choose by it.
            original: the pipeline before erasure, for attacks that need it (or its pictures).
            progress: show a bar.
            folder: where an attack that learns keeps its state; killed, the same call goes on (with what it spent
                counted from there). None: in memory only.

        Raises:
            BadInput: what the attack needs was not given; a budget that pays for nothing.
        """
        self.check(pipe, cases)
        if self.needs_judge and judge is None:
            raise BadInput(
                f"{type(self).__name__} asks whether it has succeeded: say who sees the concept, with a detector"
            )
        spending = Spending(self.max_rows, self.max_seconds)
        with spending.counting(pipe, *(() if original is None else (original,))):
            look = judge is not None and cases.cases and self.looks_first
            before = shown_plainly(pipe, cases, judge) if look and judge else None
            where = None if folder is None else Path(folder)
            found = self.search(pipe, cases, Means(judge, original, before, spending, progress, where))
        found.before, found.spent = before, spending.told()
        return found

    @abstractmethod
    def search(self, pipe: Text2Image, cases: AttackCases, means: Means) -> Found:
        """The attack itself, for `run`, which has checked what it needs. ``pipe`` is left exactly as it was."""

    def control(
        self,
        pipe: Text2Image,
        cases: AttackCases,
        other: AttackCases | None,
        *,
        judge: Detector | None = None,
        original: Text2Image | None = None,
        progress: bool = True,
    ) -> Found | None:
        """What the same effort finds without knowledge of the concept: the floor under the attack's success.

        By default the attack runs on ``other``, the same cases of a concept that was not erased (None where there is
        none), and what it finds is asked in place of the erased one's name. Attacks whose find belongs to a prompt put
        random words in its place.
        """
        if other is None:
            return None
        found = self.run(pipe, other, judge=judge, original=original, progress=progress)
        return found.asking_for(cases.concept)
