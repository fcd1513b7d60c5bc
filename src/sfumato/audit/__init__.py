"""Audits: what an edit erased, what it kept, and what an attacker gets back."""

from sfumato.metrics.detectors import ClassifierDetector, Detection, Detector, OracleDetector, ZeroShotDetector

from .run import Audit, audit

__all__ = ["Audit", "ClassifierDetector", "Detection", "Detector", "OracleDetector", "ZeroShotDetector", "audit"]
