"""What several processes have seen, put together; without `torch.distributed`, what this one has seen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist


def several() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, in each of them."""
    if not several():
        return x
    total = x.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(x.device)


def largest_of_processes(n: int) -> int:
    """The largest ``n`` of all processes, in each of them."""
    if not several():
        return n
    largest = torch.tensor([n], device=_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "total d"]:
    """The rows of all processes, in the order of their ranks; a process may have none, (0, 0)."""
    if not several():
        return x
    device = _device()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=device))
    counts = [int(s) for s in sizes]
    # all_gather wants equal shapes: the shorter ones are filled up, and cut again below
    padded = torch.zeros(max(counts), largest_of_processes(x.shape[1]), dtype=x.dtype, device=device)
    padded[: len(x), : x.shape[1]] = x.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(x.device)


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
