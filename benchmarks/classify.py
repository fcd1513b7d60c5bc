"""Forward passes and training steps of classifiers: ours against timm's ports, and TrAct against the plain layer.

    python benchmarks/classify.py                                     # all nets at 224 pixels
    python benchmarks/classify.py --nets tract --size 32 --batch 8    # TrAct's overhead alone

All are timed in one process, on one thread or the GPU, in turns, and the fastest turn counts; a training step is a
forward and a backward pass and an update of SGD. timm's nets are timed where it is installed; it has no iFormer, so
that CAFormer-S18, the nearest of its kind, stands beside iFormer-S. torch_tract is timed where it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sfumato.classify.parts.preactivations import first_layer, wrap
from sfumato.nets.cifar_resnet import CifarResNet
from sfumato.nets.iformer import IFormer
from sfumato.nets.inception import Inception
from timing import timed

Make = Callable[[], nn.Module]
TIMM = {
    "inception-v4": "inception_v4",
    "inception-resnet-v2": "inception_resnet_v2",
    "iformer-small": "caformer_s18",
}
NETS: dict[str, Make] = {
    "inception-v4": partial(Inception, "inception-v4"),
    "inception-resnet-v1": partial(Inception, "inception-resnet-v1"),
    "inception-resnet-v2": partial(Inception, "inception-resnet-v2"),
    "iformer-small": partial(IFormer, "small"),
    "iformer-base": partial(IFormer, "base"),
    "iformer-large": partial(IFormer, "large"),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def with_tract(size: int) -> nn.Module:
    """A ResNet-20 whose first layer is wrapped."""
    net = CifarResNet(20).eval()
    wrap(first_layer(net, torch.zeros(1, 3, size, size))[1])
    return net


def with_theirs() -> nn.Module:
    """The same by the authors' package."""
    net = CifarResNet(20)
    net.conv = import_module("torch_tract").TrAct(net.conv)
    return net


def with_patches(tract: bool, size: int) -> nn.Module:
    """The first layer of a vision transformer, patches of 16 pixels, and a last one."""
    net = nn.Sequential(nn.Conv2d(3, 384, 16, 16), nn.Flatten(), nn.Linear(384 * (size // 16) ** 2, 10))
    if tract:
        wrap(net[0])
    return net


def rivals(name: str, size: int) -> Iterator[tuple[str, Make]]:
    """The nets that are compared, the first the one that the others are shares of."""
    if name == "tract":
        yield "ResNet-20", partial(CifarResNet, 20)
        yield "ResNet-20 with TrAct", partial(with_tract, size)
        if find_spec("torch_tract"):
            yield "ResNet-20 with torch_tract", with_theirs
        return
    if name == "tract-patches":
        yield "one layer of patches", partial(with_patches, False, size)
        yield "one layer of patches, TrAct", partial(with_patches, True, size)
        return
    yield name, NETS[name]
    if name in TIMM and find_spec("timm"):
        yield f"timm's {TIMM[name]}", partial(import_module("timm").create_model, TIMM[name])


def works(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward pass as for judging, and a training step."""
    update = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def forward() -> None:
        net.eval()
        with torch.no_grad():
            net(x)

    def step() -> None:
        net.train()
        cross_entropy(net(x), y).backward()
        update.step()
        update.zero_grad()

    return forward, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*NETS, "tract", "tract-patches"]
    parser.add_argument("--nets", nargs="+", default=every, choices=every, metavar="NET", help=", ".join(every))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not find_spec("timm"):
        print("timm is not timed: it is not installed")
    x = torch.randn(args.batch, 3, args.size, args.size, device=DEVICE)
    y = torch.zeros(args.batch, dtype=torch.long, device=DEVICE)
    print(f"batches of {args.batch} pictures of {args.size} x {args.size} on {DEVICE}")
    print(f"{'':32}{'parameters':>12}{'forward, s':>12}{'step, s':>10}{'of the first':>14}")
    for name in args.nets:
        made = {title: make().to(DEVICE) for title, make in rivals(name, args.size)}
        pairs = {title: works(net, x, y) for title, net in made.items()}
        ways = {(title, i): pair[i] for title, pair in pairs.items() for i in (0, 1)}
        best = timed({f"{title} {i}": work for (title, i), work in ways.items()}, args.repeats)
        first = next(iter(made))
        for title, net in made.items():
            forward, step = best[f"{title} 0"], best[f"{title} 1"]
            count = sum(p.numel() for p in net.parameters())
            share = step / best[f"{first} 1"]
            print(f"{title:32}{count:12,}{forward:12.3f}{step:10.3f}{share:14.2f}")


if __name__ == "__main__":
    main()
