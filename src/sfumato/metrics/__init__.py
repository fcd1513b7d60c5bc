"""Numbers about images: metric objects with ``update``, ``compute`` and ``reset``, and the records they return."""

from .extractors import CallableFeatures, make_extractor
from .features import Features, extract
from .pairs import PairMetric
from .record import Score, compare
from .sets import CMMD, FID, KID, Fidelity, FIDInfinity, InceptionScore

__all__ = [
    "CMMD",
    "FID",
    "KID",
    "CallableFeatures",
    "FIDInfinity",
    "Features",
    "Fidelity",
    "InceptionScore",
    "PairMetric",
    "Score",
    "compare",
    "extract",
    "make_extractor",
]
