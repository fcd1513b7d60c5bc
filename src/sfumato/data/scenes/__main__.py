"""Make the scene oracle anew, and write its page: ``python -m sfumato.data.scenes --train --report docs``."""

from __future__ import annotations

import argparse

from . import ASSETS, load, recipe
from .report import report


def main() -> None:
    summary = "The scene oracle of the sketch world: train it, or write its page."
    parser = argparse.ArgumentParser(prog="python -m sfumato.data.scenes", description=summary)
    parser.add_argument("--train", action="store_true", help="train the scene oracle and write weights and card")
    parser.add_argument("--report", metavar="DIR", help="write scenes.md there, from the card")
    parser.add_argument("--out", default=str(ASSETS), help="where weights and card go (default: the package)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=recipe.UPDATES)
    args = parser.parse_args()
    if not args.train and not args.report:
        parser.error("say --train, or --report DIR")
    if args.train:
        recipe.train(args.out, seed=args.seed, updates=args.updates, log=print)
    if args.report:
        report(load(args.out), args.report)


if __name__ == "__main__":
    main()
