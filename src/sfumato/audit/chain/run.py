"""The composition audit: does erasure survive what happens to a model afterwards?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.audit.drawing import Original, Setup
from sfumato.audit.plan import plan as plan_of
from sfumato.audit.run import Audit
from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image
from sfumato.plan import Plan
from sfumato.report.audit import AuditReport
from sfumato.report.composition import Composition, Stage

from .base import Chained, Given, titles
from .links import link_of


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What happens to an erased model, one link after the other, with an audit after each.

    All audits ask for the same prompts and seeds; what the original draws, and what attacks do to it, is drawn once.
    Erasure alone is the first stage: a link breaks it where less is erased than there, beyond the intervals of both.
    Retention says what the link itself did to the model: one that draws nothing any more has erased everything.

    Cost: an audit without the original's pictures for each link, and what the links take.
    """

    audit: Audit
    """The erased model against the original; its settings hold for every stage."""
    links: Sequence[Any]
    """Links, methods of erase, distill, steer and customize, and functions from pipeline to pipeline."""
    apart: bool = False
    """Each link happens to the erased model itself, not to what the links before it left; one that does not fit is then
    left out, and the report says why."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "links", tuple(link_of(one) for one in self.links))
        if not self.links:
            raise BadInput("a chain needs links: what happens to the erased model afterwards?")

    @property
    def titles(self) -> list[str]:
        """What the links are called, no two alike."""
        return titles(self.links)

    def run(
        self,
        folder: Path | None = None,
        announce: Callable[[Plan], None] | None = None,
        done: Callable[[Stage], None] = lambda stage: None,
        original: Original | None = None,
        last: Callable[[Text2Image], None] | None = None,
    ) -> Composition:
        """Measure the whole chain.

        Args:
            folder: where links that take long keep their state; killed, the same call goes on with it.
            announce: called with the plan before the first picture is drawn.
            done: called with each stage as it is measured.
            original: what the original draws (`Audit.original`), where that is known.
            last: called with what the last link leaves, its adapters added to the weights; not where a link was
                refused, nor where each happens by itself.

        Returns:
            What was measured: a chain ends before a link that turned out not to be possible, which is `refused`.

        Raises:
            BadInput: as `Audit.run`; a link that can be seen beforehand not to be possible, with its number and name.
        """
        audit, setup = self.audit, self.audit.prepare()
        prompts = [case.prompt for case in setup.cases.retained]
        if not self.apart:
            given = Given(setup.old, audit.concepts, prompts)
            for k, (link, title) in enumerate(zip(self.links, self.titles, strict=True), 1):
                with _naming(k, title):
                    link.check(given, self.links[: k - 1])
        if announce:
            announce(self.plan(setup))
        original = original or audit.original(setup)
        drawn, attacked = audit.draw(setup, original), audit.attack(setup, original)
        first = audit.report(setup, drawn, attacked, audit.judge(setup, drawn, attacked))
        stages = [Stage("erased", first, 0.0)]
        done(stages[0])
        chained, refused = Chained(setup.new), {}
        for k, (link, title) in enumerate(zip(self.links, self.titles, strict=True), 1):
            where = None if folder is None else folder / f"{k:02d}"
            given = Given(setup.old, audit.concepts, prompts, where, audit.progress)
            began = time.perf_counter()
            try:
                with _naming(k, title):
                    after = link.act(chained, given)
                    seconds = time.perf_counter() - began
                    report = self._audited(setup, after, original)
            except BadInput as error:
                refused[title] = str(error.__cause__)
                if self.apart:
                    continue
                break
            chained = chained if self.apart else replace(after, said="")
            stages.append(Stage(title, report, seconds, after.said))
            done(stages[-1])
        if last is not None and not refused and not self.apart:
            last(chained.whole)
        return Composition(stages, refused=refused, apart=self.apart)

    def _audited(self, setup: Setup, after: Chained, original: Original) -> AuditReport:
        if after.pipe.size != setup.old.size or after.pipe.family != setup.old.family:
            raise BadInput("it made a model of another family or size, which can no longer be compared")
        with after.drawing() as pipe:
            now = replace(setup, new=pipe, sampling={**setup.sampling, **after.sampling})
            pictures, found = self.audit.draw(now, original), self.audit.attack(now, original)
            figures = self.audit.judge(now, pictures, found)
            report = self.audit.report(replace(now, sampling=setup.sampling), pictures, found, figures)
            # The original was drawn as the audit says; and no command line of an audit repeats a stage.
            own = {f"after_{name}": value for name, value in after.sampling.items()}
            return replace(report, protocol={**report.protocol, **own}, reproduce="")

    def plan(self, setup: Setup) -> Plan:
        """That of the audit, and of another without the original's part for each link; what links take is not known."""
        one, other = plan_of(setup), plan_of(setup, original=False)
        known = one.seconds is not None and other.seconds is not None
        seconds = one.seconds + other.seconds * len(self.links) if known else None
        title = f"{one.title}; then {', '.join(self.titles)}"
        return replace(one, title=title, seconds=seconds)


@contextmanager
def _naming(k: int, title: str) -> Iterator[None]:
    """Says in a refusal which link it was."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"link {k} ({title}): {error}") from error
