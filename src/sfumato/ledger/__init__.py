"""Each method's central claim as an experiment with a baseline and an interval."""

from .core import DAGGER, FEW, RECORDS, Claim, Experiment, effect, load, names, said, verdict
from .page import table
from .runner import run

__all__ = [
    "DAGGER", "FEW", "RECORDS", "Claim", "Experiment", "effect", "load", "names", "run", "said", "table", "verdict",
]  # fmt: skip
