"""Teach the text encoder of a pipeline to read captions of the sketch world, before it learns to draw them.

    python scripts/read_captions.py --model sketch --text-layers 4 --out read/
    sfumato train t2i --data sketch-scenes --start-from read/pipeline --text-layers 4 --out run/ ...
    python scripts/read_captions.py --model sketch-dit --text-layers 2 --out read-dit/

What stands where, and which colour belongs to which object, is a matter of words alone, and a text encoder learns it
from words hundreds of times more cheaply than from the noise of a U-Net: a small reader that is thrown away afterwards
asks, for each of 8 x 8 cells of the picture, which object and colour is there, and which background and style. The
encoder gains layers and words on the way (`sfumato.train.grow`); the other parts of the pipeline stay as they are.
Killed, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sfumato.data.sketch import BACKGROUNDS, COLOURS, OBJECTS, STYLES, Scene
from sfumato.data.toys import ScenePictures
from sfumato.pipeline import wrap
from sfumato.train import draw
from sfumato.train.grow import grown
from sfumato.train.loop import Run
from sfumato.train.parent import open_parent
from sfumato.train.recipe import Recipe
from sfumato.train.schedule import Schedule

GRID = 8
COVER = 0.42
"""Half of the side of an object's square of cells, as a share of its longer side."""
WORDS = {"object": len(OBJECTS) + 1, "colour": len(COLOURS) + 1, "background": len(BACKGROUNDS), "style": len(STYLES)}
"""What is asked, and between how many words; object and colour have "nothing" as well."""


def cells(scene: Scene) -> Int[np.ndarray, "2 cells"]:
    """Object and colour of each cell, row by row; what is drawn later covers what is below it."""
    at = (np.arange(GRID) + 0.5) / GRID
    x, y = np.meshgrid(at, at)
    found = np.stack([np.full_like(x, len(words), dtype=int) for words in (OBJECTS, COLOURS)])
    for item in scene.objects:
        covered = np.maximum(abs(x - item.x), abs(y - item.y)) < COVER * item.scale
        found[:, covered] = np.array([[OBJECTS.index(item.object)], [COLOURS.index(item.colour)]])
    return found.reshape(2, -1)


class Reader(nn.Module):
    """One layer of cross-attention: a learnt question for each cell, the text encoder's states to answer it from."""

    def __init__(self, width: int):
        super().__init__()
        self.questions = nn.Parameter(torch.randn(GRID**2, width) / 2)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answer = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, sum(WORDS.values()))
        )

    def forward(
        self, states: Float[Tensor, "n tokens width"], padding: Bool[Tensor, "n tokens"] | None = None
    ) -> Float[Tensor, "n cells words"]:
        questions = self.questions.expand(len(states), -1, -1)
        found, _ = self.attention(questions, states, states, key_padding_mask=padding, need_weights=False)
        return self.answer(questions + found)


class ReaderRecipe(Recipe):
    """Cross-entropy of object and colour in every cell, and of background and style."""

    name = "reader"

    def __init__(self, text: nn.Module, tokenizer: Any, pictures: ScenePictures, captions: list[str]):
        self.text, self.reader = text, Reader(text.config.hidden_size)
        length = tokenizer.model_max_length
        self.ids = tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(torch.int32)
        scenes = [pictures.scene(i) for i in range(len(pictures))]
        self.cells = torch.from_numpy(np.stack([cells(s) for s in scenes]))
        self.whole = torch.tensor([[BACKGROUNDS.index(s.background), STYLES.index(s.style)] for s in scenes])
        self.group = pictures.group

    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text, "reader": self.reader}

    def batch(self, step: int, rng: torch.Generator, size: int) -> dict[str, Tensor]:
        rows = draw.grouped(len(self.ids), size, self.group, rng)
        return {"ids": self.ids[rows].long(), "cells": self.cells[rows], "whole": self.whole[rows]}

    def loss(self, batch: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["ids"].to(self.text.device)
        # Padding is read by the networks behind CLIP, and hidden from those behind T5.
        padding = ids == self.text.config.pad_token_id if self.text.config.model_type == "t5" else None
        told = {} if padding is None else {"attention_mask": (~padding).long()}
        states = self.text(ids, **told).last_hidden_state
        objects, colours, backgrounds, styles = self.reader(states, padding).split(list(WORDS.values()), dim=2)
        ask = nn.functional.cross_entropy
        there, whole = batch["cells"].to(states.device), batch["whole"].to(states.device)
        losses = {
            "object": ask(objects.transpose(1, 2), there[:, 0]),
            "colour": ask(colours.transpose(1, 2), there[:, 1]),
            "background": 0.3 * ask(backgrounds.mean(dim=1), whole[:, 0]),
            "style": 0.3 * ask(styles.mean(dim=1), whole[:, 1]),
        }
        return torch.stack(list(losses.values())).sum(), {k: v.detach() for k, v in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=61_440, help="captions, of as many scenes")
    parser.add_argument("--text-layers", type=int, default=4)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()

    parent = open_parent(args.model)
    parts, tokenizer = parent.pipeline.parts(), parent.pipeline.tokenizers[0]
    pictures = ScenePictures(64, args.seed, args.pictures)
    captions = [pictures.caption(i) for i in range(len(pictures))]
    torch.manual_seed(args.seed)
    text, tokenizer = grown(parts["text_encoder"].requires_grad_(True), tokenizer, args.text_layers, captions)
    schedule = Schedule(
        updates=args.updates, batch=args.batch, lr=args.lr, warmup=30, ema=0.99, precision="no", seed=args.seed
    )
    recipe = ReaderRecipe(text, tokenizer, pictures, captions)
    Run(recipe, schedule, args.out / "reader", {"pictures": args.pictures, "text_layers": args.text_layers}).fit()
    pipe = parent.pipeline.pipe
    pipe.register_modules(text_encoder=text.eval(), tokenizer=tokenizer)
    config = {k: v for k, v in vars(args).items() if k not in ("out", "model")} | {"start_from": args.model}
    made = {"title": "A pipeline whose text encoder has learnt to read", "recipe": "read captions", "config": config}
    trained = wrap(pipe, parent.pipeline.defaults)
    trained.save(args.out / "pipeline", overwrite=True, provenance=made | {"parent": parent.record})


if __name__ == "__main__":
    main()
