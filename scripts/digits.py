"""scikit-learn's handwritten digits as Parquet: train.parquet, and every fifth picture in test.parquet.

    python scripts/digits.py --out digits/
    sfumato train semantica --preset small-digits --data digits/train.parquet --out runs/pairs
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

from PIL import Image

from sfumato.data.pictures import open_pictures

SIZE = 8
"""Their own side in pixels."""
EVERY = 5
"""Which of them are for measuring."""


def write(rows: list[int], file: Path) -> None:
    """A table of these pictures with their labels, as `datasets` lays it out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digits = open_pictures("digits", SIZE)
    encoded = []
    for i in rows:
        data = BytesIO()
        Image.fromarray(digits.picture(i)).save(data, "PNG")
        encoded.append({"bytes": data.getvalue(), "path": f"{i:04d}.png"})
    labels = [digits.label_names[digits.label(i)] for i in rows]
    pq.write_table(pa.table({"image": encoded, "label": labels}), file)
    print(f"written: {file} ({len(rows)} pictures)")


def split(out: Path) -> None:
    """Both files, where they are not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    count = len(open_pictures("digits", SIZE))
    for name, rows in {
        "train": [i for i in range(count) if i % EVERY],
        "test": list(range(0, count, EVERY)),
    }.items():
        if not (file := out / f"{name}.parquet").exists():
            write(rows, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("digits"))
    args = parser.parse_args()
    split(args.out)


if __name__ == "__main__":
    main()
