"""The studio's start, its first picture and its second, against the command line, which starts anew for every one.

    python benchmarks/studio.py                            # the embedded pipeline, 1 picture, 4 steps

The start is from an interpreter without anything imported to an answered page. Jobs are forked from a process that has
imported the libraries, which begins at the start: the first picture may have to wait for it, the second does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


def drawn(jobs: object, steps: int) -> float:
    """Seconds from a click to a picture."""
    from sfumato.studio import actions

    began = time.perf_counter()
    drawing = actions.Drawing("a red star", ("--sampling-steps", str(steps)))
    job = jobs.submit("draw", actions.draw("sketch", drawing))  # type: ignore[attr-defined]
    while not job.over:
        time.sleep(0.01)
    if job.state != "done":
        raise SystemExit(job.sentence())
    return time.perf_counter() - began


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampling-steps", "--steps", type=int, default=4)
    options = parser.parse_args()

    from sfumato.studio.serve import serving

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with serving(root / "studio", port=0) as (url, _, studio):
            with urllib.request.urlopen(url) as page:
                page.read()
            print(f"start, to an answered page: {time.perf_counter() - began:.1f} s")
            for which in ("first", "second"):
                print(f"{which} picture, from click to file: {drawn(studio.jobs, options.sampling_steps):.1f} s")
        steps = ["--sampling-steps", str(options.sampling_steps)]
        command = [sys.executable, "-m", "sfumato", "sample", "a red star", *steps]
        began = time.perf_counter()
        subprocess.run([*command, "--out", str(root / "alone")], check=True, capture_output=True)
        print(f"the same picture by `sfumato sample`: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
