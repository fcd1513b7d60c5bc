"""What an attack spends: rows through the denoising network and seconds, counted alike for all, with limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.pipeline import Text2Image


class Exhausted(BadInput):
    """The attacker's rows or seconds are spent: what was found until now counts."""


class Spending:
    """Rows and seconds that an attack has spent, and how many it may spend.

    A row is one latent that goes once through the denoising network, of the erased pipeline or of the original; a
    backward pass counts as two, so that a row with a gradient counts three. Text encoders and autoencoders cost
    seconds, but no rows.

    Args:
        max_rows: the call that would go beyond is refused, so that ``rows`` never exceeds it; 0: no limit.
        max_seconds: of wall time, looked at before each row and wherever a search calls `check`; 0: no limit. A limit
            in seconds makes the result depend on the machine; one in rows does not.
    """

    def __init__(self, max_rows: int = 0, max_seconds: float = 0.0):
        self.max_rows, self.max_seconds = max_rows, max_seconds
        self.rows, self.exhausted = 0, False
        self._before, self._began, self._free = 0.0, 0.0, False

    @property
    def seconds(self) -> float:
        """Wall time inside `counting`."""
        return self._before + (time.perf_counter() - self._began if self._began else 0.0)

    @contextmanager
    def counting(self, *pipes: Text2Image) -> Iterator[Spending]:
        """Count in the block, which may be entered again; pipelines of one network are counted once."""
        self._began = time.perf_counter()
        with ExitStack() as stack:
            for layer in {id(p.last): p.last for p in pipes}.values():
                handle = layer.register_forward_hook(self._count)
                stack.callback(handle.remove)
            try:
                yield self
            finally:
                self._before, self._began = self.seconds, 0.0

    def check(self) -> None:
        """Raise `Exhausted` where no more may be spent."""
        if self.max_seconds and not self._free and self.seconds >= self.max_seconds:
            self._refuse()

    def allowed(self) -> AbstractContextManager[None]:
        """A block that is left without an error when all is spent."""
        return suppress(Exhausted)

    @contextmanager
    def free(self) -> Iterator[None]:
        """A block in which nothing is counted or refused: it measures what was found, and searches no more."""
        self._free = True
        try:
            yield
        finally:
            self._free = False

    def told(self) -> dict[str, Any]:
        """For a record: rows, seconds, and whether a limit ended the search."""
        return {"rows": self.rows, "seconds": self.seconds, "exhausted": self.exhausted}

    def _count(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._free:
            return
        rows = len(output) * (3 if output.requires_grad else 1)
        if self.max_rows and self.rows + rows > self.max_rows:
            self._refuse()
        self.check()
        self.rows += rows

    def _refuse(self) -> None:
        self.exhausted = True
        raise Exhausted(
            f"the attack's budget was spent before it found anything ({self.rows} rows through the network, "
            f"{self.seconds:.1f} seconds): raise max_rows or max_seconds"
        )
