"""An installed wheel works like the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "wheel.py"


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder():
    pytest.importorskip("setuptools", "77", reason="building a wheel without a download needs setuptools here")
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the wheel works" in run.stdout
