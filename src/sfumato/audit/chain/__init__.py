"""Chains: what happens to an erased model afterwards, and an audit after every link."""

from .base import Chained, Given, Link, titles
from .links import Attach, By, Call, Cast, Export, FineTune, Merge, Scheduler
from .run import Chain

__all__ = [
    "Attach", "By", "Call", "Cast", "Chain", "Chained", "Export", "FineTune", "Given", "Link", "Merge", "Scheduler",
    "titles",
]  # fmt: skip
