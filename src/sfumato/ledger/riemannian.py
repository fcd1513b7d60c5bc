"""Riemannian: do curved ways end nearer to the data than straight ones, and who shares directions, and when?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.data import oracle, sketch
from sfumato.data.cases import balanced
from sfumato.data.world import WORDS
from sfumato.edit import Riemannian
from sfumato.edit.base import Given
from sfumato.edit.parts.shooting import by_basis, lerp, normalised, path_length, shared_directions, shoot, slerp
from sfumato.edit.parts.traversal import at_time
from sfumato.sample import predict

from .core import Claim, Experiment, Found
from .erasure import sketch as pipeline

PICTURES, STEPS, EARLY, LATE = 8, 25, 0.9, 0.2
LENGTH, MOVES, SEGMENTS, REAL = 6.0, 10, 6, 512
"""How far latents of length 16 are moved, in how many moves; segments of a way; renders that stand for the data."""
SETTINGS = {"sampling_steps": STEPS, "time": EARLY, "rank": 12, "length": LENGTH, "moves": MOVES, "chunk": 64}


def measure(seed: int) -> Found:
    """Pictures moved along geodesics and straight, with their contrast given back and without; ways between them."""
    pipe, rng = pipeline(), torch.Generator().manual_seed(seed)
    asked = {a: balanced(words, PICTURES, rng) for a, words in WORDS.items()}
    prompts = tuple(sketch.prompt(**{a: asked[a][i] for a in WORDS}) for i in range(PICTURES))
    given = Given(prompts, tuple(1000 * seed + i for i in range(PICTURES)))
    edit = Riemannian(**SETTINGS, seed=seed)
    start, seeds = edit.start(pipe, given), list(given.seeds)
    z, time = at_time(edit.states(pipe, start, seeds), EARLY)
    late, then = at_time(edit.states(pipe, start, seeds), LATE)
    draw = lambda moved: edit.drawn(pipe, (moved, time), start.cond, seeds)
    curved, straight, settled, shared = [], [], [], []
    for i, x in enumerate(z):
        cond = start.cond[i]
        f = edit.f(pipe, time, cond)
        carry = lambda at, u, f=f: by_basis(edit.basis(f, at), u)
        basis = edit.basis(f, x)
        end = shoot(x, basis.u[0], basis.v[0], LENGTH / MOVES, MOVES, carry)[-1]
        curved.append(end)
        straight.append(x + float((end - x).norm()) * basis.v[0])
        alpha, sigma = (float(a) for a in pipe.process.alpha_sigma(time))
        clean = lambda rows, cond=cond: predict(pipe.denoiser, rows, time, cond, "x0")
        settled.append(normalised(x, end, clean, alpha, sigma))
        shared.append((basis.u, edit.basis(edit.f(pipe, then, cond), late[i]).u))
    drawn = {name: draw(torch.stack(x)) for name, x in
             {"curved": curved, "straight": straight, "settled": settled, "plain": list(z)}.items()}  # fmt: skip
    read, real = oracle.load(), sketch.SketchDataset(REAL, size=pipe.size, seed=seed)
    known = read.features(torch.stack([real[i]["image"] for i in range(REAL)]) / 2 + 0.5)
    far = lambda name: torch.cdist(read.features(drawn[name]), known).amin(1).tolist()
    lost = lambda name: (_contrast(drawn[name]) / _contrast(drawn["plain"]) - 1).abs().tolist()
    ways: dict[str, list[float]] = {"lerp": [], "slerp": []}
    for i in range(0, PICTURES, 2):
        f = edit.f(pipe, time, start.cond[i])
        for name, way in (("lerp", lerp), ("slerp", slerp)):
            ways[name].append(sum(path_length([edit.basis(f, x).u for x in way(z[i], z[i + 1], SEGMENTS + 1)])))
    agreement = [shared_directions([pair[k] for pair in shared])[1][:3].tolist() for k in (0, 1)]
    return {
        "nearer": (far("curved"), far("straight")),
        "contrast": (lost("settled"), lost("curved")),
        "curved": (ways["lerp"], ways["slerp"]),
        "shared": (agreement[0], agreement[1]),
    }


def _contrast(x: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n"]:
    return x.flatten(1).std(1)


EXPERIMENT = Experiment(
    name="riemannian",
    paper="arXiv 2302.12469",
    claims={
        "nearer": Claim(
            "Moved as far along a geodesic, pictures end nearer to the data than moved straight.",
            f"{MOVES} moves, the direction carried by a new basis",
            "one straight move that ends as far from the start",
            "Distance to the nearest of 512 renders, in the oracle's features.",
            better="lower",
        ),
        "contrast": Claim(
            "Giving the contrast back keeps that of the picture before the edit.",
            "normalised, kappa = 0.99",
            "not normalised",
            "How far the standard deviation of all pixels is from that of the picture before, as a share of it.",
            better="lower",
        ),
        "curved": Claim(
            "The straight way between two latents is more curved than the one along the sphere.",
            "lerp",
            "slerp",
            "Sum over six segments of the distance of the tangent spaces at their ends, for each pair of pictures.",
        ),
        "shared": Claim(
            "Pictures share their leading directions while they are noise, and less so later.",
            f"at time {EARLY}",
            f"at time {LATE}",
            "Mean |cosine| of a direction's nearest partners in the features of other pictures, the first three.",
        ),
    },
    seeds=(1, 2, 3),
    tuning="nothing was tuned: the length is a third of the latent's",
    measure=measure,
    cost=200,
    notes="The embedded network has latents of 8 x 8 with four channels; the paper shows these on faces and dogs, with "
    "tangent spaces of rank 50, 30 segments and 50 pairs.",
)
