"""The strip on README's front page: a concept drawn by the original, by the erased model, and under attack.

    python scripts/front.py            # writes docs/front.png: the first seeds, not selected
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sfumato.attack import ConceptInversion
from sfumato.audit import Audit
from sfumato.audit.under_attack import assail
from sfumato.erase import RECE
from sfumato.files import contact_sheet, save_png
from sfumato.pipeline import load_text2image

TARGET = Path(__file__).resolve().parents[1] / "docs" / "front.png"
COLUMNS = 8


def main() -> None:
    pipe = load_text2image("sketch")
    erased = RECE(concepts=("star",), **RECE.settings_for(pipe)).apply(pipe)
    attack = ConceptInversion(**ConceptInversion.settings_for(pipe))
    n = COLUMNS
    audit = Audit(before=pipe, after=erased, concepts=["star"], attacks=[attack], n=n, n_retain=1, n_attack=n)
    setup = audit.prepare()
    drawn, (name,) = audit.draw(setup), setup.attacks
    recovered = assail(setup, name, "star").recovered
    rows = torch.cat([drawn.asked.before[:COLUMNS], drawn.asked.after[:COLUMNS], recovered[:COLUMNS]])
    pictures = rows.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    about = {"model": "sketch", "rows": "original, after erase rece --concept star, under concept-inversion"}
    save_png(TARGET, contact_sheet(pictures, COLUMNS), about, overwrite=True)
    print(f"written: {TARGET}")


if __name__ == "__main__":
    main()
