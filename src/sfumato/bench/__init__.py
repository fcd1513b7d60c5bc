"""Many methods side by side: cells that are measured one by one, kept, and made into one table and one page."""

from .compose import Fates
from .erase import Bench
from .tune import Tune

__all__ = ["Bench", "Fates", "Tune"]
