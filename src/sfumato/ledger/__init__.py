"""Each method's central claim as an experiment with a baseline and an interval."""

from .core import RECORDS, Claim, Experiment, effect, load, names, verdict
from .page import table
from .runner import run

__all__ = ["RECORDS", "Claim", "Experiment", "effect", "load", "names", "run", "table", "verdict"]
