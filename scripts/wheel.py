"""Does an installed wheel work like the checkout? Build it, install it into a fresh environment, and use it there.

    python scripts/wheel.py [PYTHON]

The environment gets the wheel alone and borrows all dependencies from PYTHON (by default the one that runs this), so
nothing is downloaded but what building takes. It is used from an empty folder: `sfumato methods`, `sfumato --help`,
`sf.load("sketch")` with a picture, the oracle, the report's templates, `py.typed`, and `sfumato doctor`, which compares
every packaged file with its checksum.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USE = """
import sfumato as sf
from importlib.resources import files
from pathlib import Path

package = Path(sf.__file__).parent
assert package.is_relative_to({environment!r}), package
pipe = sf.load("sketch")
picture = pipe.draw("a red star", 0, sampling_steps=2)
from sfumato.data import oracle
assert oracle.load()(picture)["object"].shape[0] == 1
from sfumato.report.page import environment
assert environment().get_template("audit.html.j2")
assert (package / "py.typed").is_file()
print("the wheel works:", sf.__version__, "in", package)
"""


def main(python: str = sys.executable) -> None:
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    borrowed = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        where, source = Path(scratch).resolve(), Path(scratch).resolve() / "source"
        # Built from a copy: the build leaves folders behind, and would take old ones for new.
        for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            source.mkdir(exist_ok=True)
            copy(ROOT / name, source / name)
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        build = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", where]
        subprocess.run([*map(str, build), str(source)], check=True, env=clean)
        (wheel,) = where.glob("sfumato-*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        subprocess.run([python, "-m", "venv", "--without-pip", str(where / "env")], check=True)
        inside = where / "env" / ("Scripts" if os.name == "nt" else "bin")
        install = [python, "-m", "pip", "--python", inside / "python", "install", "--quiet", "--no-deps", wheel]
        subprocess.run([*map(str, install)], check=True, env=clean)
        (own,) = (where / "env").rglob("site-packages")
        # Dependencies come after the wheel's own folder; an editable checkout among them stays out.
        (own / "borrowed.pth").write_text(f"import sys; sys.path.append({borrowed!r})\n")
        empty = where / "empty"
        empty.mkdir()
        for command in (
            [inside / "sfumato", "methods"],
            [inside / "sfumato", "--help"],
            [inside / "sfumato", "doctor"],
            [inside / "python", "-c", USE.format(environment=str(where))],
        ):
            subprocess.run([*map(str, command)], check=True, cwd=empty, env=clean)
        assert not list(empty.iterdir()), "nothing is written unasked"


if __name__ == "__main__":
    main(*sys.argv[1:])
