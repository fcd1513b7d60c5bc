"""CPDM: forgetting against plain replay, prototypes against none, projection against none, on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfumato.classify.plain import Plain
from sfumato.data.base import Pictures, to_tensor
from sfumato.foreign import read_json
from sfumato.pipeline import load
from sfumato.train.cpdm import CPDM

from .core import Claim, Experiment, Figures, Found

TASKS = ("0+1", "2+3", "4+5")
SIZE = 8
UPDATES = 250
EPOCHS = 10
REPLAY = 40
STEPS = 15
DRAWN = 40
"""Pictures drawn of each old class after the last task."""

PLAIN: dict[str, Any] = {"prototype": "none", "protect": (), "tau": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "replay": PLAIN,
    "no prototypes": {"prototype": "none"},
    "no projection": {"protect": ()},
}


def recipe(seed: int, updates: int, epochs: int, **arm: Any) -> CPDM:
    """One network, one classifier and one split for all arms."""
    settings = {"replay": REPLAY, **arm}
    return CPDM(
        data="digits", size=SIZE, tasks=TASKS, seed=seed, updates=updates, batch=80, lr=5e-3, warmup=40, flip=False,
        sampling_steps=STEPS, cfg_scale=2.0, text_width=32, channels=(16, 32), layers=1, crossing=(4,), heads=4,
        held_out=0.3, validation=0.1, widths=(16, 32), classifier_batch=32, classifier_epochs=epochs,
        classifier_lr=(2e-2,), checkpoint_every=100_000, grid_every=0, track="none", **settings,
    )  # fmt: skip


def tensors(pictures: Pictures, names: tuple[str, ...]) -> tuple[Float[Tensor, "n 3 h w"], Int[Tensor, "n"]]:
    """The pictures of these classes in [-1, 1], and their places in ``names``."""
    labels = [pictures.label_names[pictures.label(i)] for i in range(len(pictures))]
    rows = [i for i, label in enumerate(labels) if label in names]
    return to_tensor([pictures.picture(i) for i in rows]), torch.tensor([names.index(labels[i]) for i in rows])


def right(net: torch.nn.Module, x: Tensor, y: Tensor, seen: list[int]) -> Bool[Tensor, "n"]:
    """Whether each picture's class is the likeliest of those in ``seen``."""
    with torch.no_grad():
        return torch.tensor(seen)[net(x)[:, seen].argmax(1)] == y


def nearest(x: Float[Tensor, "n 3 h w"], known: Float[Tensor, "m 3 h w"], labels: Int[Tensor, "m"]) -> Int[Tensor, "n"]:
    """The class of the nearest real picture: a judge of drawn digits that learned none of them from a model."""
    return labels[torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)]


def measure(seed: int, arm: str, updates: int = UPDATES, n: int = DRAWN, epochs: int = EPOCHS) -> Figures:
    """Learn all tasks one after the other; what the classifier forgot, and what the last model draws of old classes."""
    method = recipe(seed, updates, epochs, **ARMS[arm])
    with TemporaryDirectory() as folder:
        method.run(folder, progress=False)
        model: Any = load(folder, "cpu")
        found = read_json(Path(folder) / "accuracy.json")
        nets = [Plain.read(Path(folder) / "classifiers" / str(i + 1)) for i in range(len(TASKS))]
    real, unseen, _ = method.judge().parts()
    (known, of), (x, y) = (tensors(part, model.labels) for part in (real, unseen))
    tasks = [[model.labels.index(name) for name in task.split("+")] for task in TASKS]
    lost: list[float] = []
    everything = list(range(len(model.labels)))
    for i, task in enumerate(tasks[:-1]):
        mine = torch.isin(y, torch.tensor(task))
        then = right(nets[i], x[mine], y[mine], [k for some in tasks[: i + 1] for k in some])
        now = right(nets[-1], x[mine], y[mine], everything)
        lost += (then.double() - now.double()).tolist()
    old = [k for task in tasks[:-1] for k in task]
    drawn = model.sample(old, n, seed=1000 * seed, batch=128) * 2 - 1
    read = nearest(drawn, known, of) == torch.tensor(old).repeat_interleave(n)
    return {
        "lost": lost,
        "read": read.double().tolist(),
        "figures": {
            "average accuracy": found["average_accuracy"][-1], "forgetting": found["forgetting"][-1],
            "old classes drawn right": float(read.double().mean()),
            "first task's drawn right": float(read[: n * len(tasks[0])].double().mean()),
        },
    }  # fmt: skip


def compare(arms: dict[str, Figures]) -> Found:
    """The whole method against plain replay and against itself without a part."""
    return {
        "forgetting": (arms["whole"]["lost"], arms["replay"]["lost"]),
        "prototypes": (arms["whole"]["read"], arms["no prototypes"]["read"]),
        "projection": (arms["whole"]["read"], arms["no projection"]["read"]),
        "after the last task": {arm: figures["figures"] for arm, figures in arms.items()},
    }


_READ = (
    "Whether a picture drawn of an old class after the last task is nearest, of all real training pictures, to one of "
    "its class; for each class and seed."
)
EXPERIMENT = Experiment(
    name="cpdm",
    paper="arXiv 2312.06710",
    claims={
        "forgetting": Claim(
            "The classifier forgets less with prototypes, projection and the neighbours' term than with plain replay.",
            "the whole method",
            "replay of a class-conditional model without prototypes, projection and the neighbours' term",
            "Whether each test picture of a task but the last was right when its task had been learned (0 or 1), less "
            "whether it is after the last task.",
            "lower",
        ),
        "prototypes": Claim(
            "With prototypes the last model's pictures of old classes are of their class more often.",
            "the whole method",
            "the same without prototypes",
            _READ,
        ),
        "projection": Claim(
            "With projection the last model's pictures of old classes are of their class more often.",
            "the whole method",
            "the same without projection",
            _READ,
        ),
    },
    seeds=(1, 2, 3),
    tuning="width, batch, learning rate and updates at seed 1000, so that all arms fit in ten minutes and their "
    "pictures of digits can be read; with 300 updates of 32 pictures (three seeds) they could not, and nothing was "
    "told apart.",
    measure=measure,
    arms=tuple(ARMS),
    compare=compare,
    cost={"whole": 100, "replay": 65, "no prototypes": 95, "no projection": 90},
    notes=f"Six digits of 8 pixels in three tasks ({', '.join(TASKS)}), {UPDATES} updates of 80 pictures a task, "
    f"{REPLAY} pictures of replay a class, one small U-Net told random text vectors. The data's split, the "
    "classifier's start and the seeds drawn are the same for all arms of a seed.",
)
