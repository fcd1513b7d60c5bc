"""Put a trained pipeline into the package as an embedded model, in half precision, and refresh the checksums.

    sfumato train t2i --data sketch --out run/ && python scripts/embed.py run/pipeline sketch
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from sfumato.pipeline import load
from sfumato.train.parent import chain

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"sketch": 20e6, "sketch-dit": 12e6}
"""Bytes of weights."""


def main(source: Path, name: str) -> None:
    target = ROOT / "src" / "sfumato" / "assets" / name
    record = json.loads((source / "sfumato.json").read_text())
    made = record.get("provenance") or {"recipe": record["recipe"], "config": record["config"]}
    for step in chain(made):  # where anything lay when it was trained is nobody's business
        if start := step["config"].get("start_from"):
            step["config"]["start_from"] = Path(start).name
    pipe = load(source, "cpu")
    pipe.pipe.to(torch.float16)
    pipe.save(target, overwrite=True, provenance=made)
    for config in target.rglob("*.json"):
        told = json.loads(config.read_text())
        if isinstance(told, dict) and "_name_or_path" in told:
            del told["_name_or_path"]
            config.write_text(json.dumps(told, indent=2) + "\n")
    size = sum(f.stat().st_size for f in target.rglob("*.safetensors"))
    subprocess.run(["bash", ROOT / "scripts" / "checksums"], check=True)
    print(f"{target.relative_to(ROOT)}: {size / 1e6:.1f} MB in safetensors")
    if size > LIMITS[name]:
        sys.exit(f"more than {LIMITS[name] / 1e6:.0f} MB: train a smaller one")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
