"""What an update of every customisation costs against one of plain DreamBooth with a LoRA, on the same batch.

    python benchmarks/customising.py                         # the embedded pipeline, batches of 4
    python benchmarks/customising.py --model FOLDER --device cuda

An update is a whole one of the training loop; what comes before the first (masks, parts, pictures of the class) and
what is saved after the last does not count. The fastest of ``--updates`` counts, in one process.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from sfumato import catalog
from sfumato.pipeline import load_text2image
from timing import of_updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sketch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--updates", type=int, default=6)
    args = parser.parse_args()
    pipe = load_text2image(args.model, args.device)
    prompts = ["a red star and a blue circle"] * args.batch
    pictures = pipe.draw(prompts, range(args.batch))
    same = {"batch": args.batch, "updates": args.updates, "checkpoint_every": args.updates}
    found: dict[str, float] = {}
    for entry in catalog.methods("customize"):
        method = entry.load()
        made = method(**{**method.EXAMPLE, **same})
        loops = of_updates(partial(made.run, pipe, pictures, prompts))
        found |= {f"{entry.name}: {title}" if len(loops) > 1 else entry.name: took for title, took in loops.items()}
    print(f"{args.model} on {pipe.device}, {torch.get_num_threads()} threads, batch {args.batch}\n")
    print("| | ms an update | of dreambooth-lora |\n| --- | ---: | ---: |")
    for name, seconds in found.items():
        print(f"| {name} | {1000 * seconds:.0f} | {seconds / found['dreambooth-lora']:.2f} |")


if __name__ == "__main__":
    main()
