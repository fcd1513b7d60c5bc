"""Put a trained pipeline into the package as the embedded model, in half precision, and refresh the checksums.

    sfumato train t2i --data sketch --out run/ && python scripts/embed.py run/pipeline
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 25e6


def main(source: Path, name: str = "sketch") -> None:
    target = ROOT / "src" / "sfumato" / "assets" / name
    pipe = StableDiffusionPipeline.from_pretrained(source, use_safetensors=True).to(torch.float16)
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target, safe_serialization=True)
    shutil.copy(source / "sfumato.json", target)
    size = sum(f.stat().st_size for f in target.rglob("*.safetensors"))
    subprocess.run(["bash", ROOT / "scripts" / "checksums"], check=True)
    print(f"{target.relative_to(ROOT)}: {size / 1e6:.1f} MB in safetensors")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT / 1e6:.0f} MB: train a smaller one")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
