"""Losses of a vocabulary that is sharded over processes, beside torch's own `loss_parallel`: the reduction between the
parts alone, and forward and backward. Part of `bench/run.py`: `python bench/run.py --cases 'shard*'`.

gloo on a CPU, a thread per process; nccl where there are as many GPUs.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timing import interleaved, quantiles
from torch import Tensor

import fused_losses
from fused_losses import VocabShard
from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Problem, Targets, Terms, Transform
from fused_losses.vocab_shard import gathered, joined, layout_of

FUSED_SHARD = "fused shard"


@dataclass(frozen=True)
class ShardCase:
    name: str
    n: int
    vocab: int
    ranks: int
    dtypes: tuple[str, ...] = ("fp32",)
    losses: tuple[str, ...] = ("cross_entropy",)
    repeats: int = 31


SHARD_CPU_CASES = tuple(ShardCase(f"shard 4096x32000 over {ranks}", 4096, 32000, ranks) for ranks in (2, 4))
SHARD_QUICK_CASES = (ShardCase("shard quick 64x1000 over 2", 64, 1000, 2),)


def measure_shards(case: ShardCase, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """The records of one case, as the first rank times them; all ranks do the same at the same time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "times")
        torch.multiprocessing.spawn(_rank, (case, device.type, repeats, port, path), case.ranks)
        times: dict[str, list[float]] = torch.load(path)
    medians = {name: quantiles(values) for name, values in times.items()}
    for name, (p20, median, p80) in medians.items():
        beside = "three all_reduces" if "reduc" in name or "statistics" in name else "torch loss_parallel"
        yield {
            "case": case.name,
            "loss": "cross_entropy",
            "group": "shard",
            "contender": name,
            "backend": None,
            "mode": "shard",
            "same_loss": True,
            "dtype": "fp32",
            "shape": [case.n, case.vocab],
            "n": case.n,
            "vocab": case.vocab,
            "repeats": repeats,
            "median_ms": median,
            "p20_ms": p20,
            "p80_ms": p80,
            "peak_bytes": None,
            "speedup_over_torch": medians[beside][1] / median,
            "status": "ok",
        }


def _rank(rank: int, case: ShardCase, device_type: str, repeats: int, port: int, path: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=rank, world_size=case.ranks)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    times = interleaved(_calls(case, rank, device), dist.barrier, repeats, device)
    if rank == 0:
        torch.save({name: found.ms for name, found in times.items()}, path)
    dist.barrier()
    dist.destroy_process_group()


def _calls(case: ShardCase, rank: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    torch.manual_seed(0)
    columns = case.vocab // case.ranks
    targets = torch.randint(case.vocab, (case.n,), device=device)
    local = torch.randn(case.n, columns, device=device, requires_grad=True)
    layout = layout_of(None, rank * columns, columns, case.vocab)
    problem = Problem(
        targets=Targets(targets, -100),
        transform=Transform(),
        weights=1.0,
        objective=OBJECTIVES["cross_entropy"],
        inputs=(),
        terms=Terms(),
        denominator=None,
        vocab=case.vocab,
        all_logprobs=False,
    )
    table = torch.rand(3, case.n, device=device)
    numbers = [torch.rand(case.n, 1, device=device) for _ in range(3)]
    mesh = init_device_mesh(device.type, (case.ranks,))
    sharded = DTensor.from_local(local, mesh, [Shard(-1)])
    replicated = DTensor.from_local(targets, mesh, [Replicate()])

    def three() -> None:
        """What loss_parallel reduces: the maximum, the sum of exponentials, the loss of who has the target."""
        for tensor, operation in zip(numbers, (dist.ReduceOp.MAX, dist.ReduceOp.SUM, dist.ReduceOp.SUM), strict=True):
            dist.all_reduce(tensor, operation)
            tensor.fill_(0.5)

    def step(loss: Callable[[], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(), local)[0]

    def torch_step() -> Tensor:
        with loss_parallel():
            loss = F.cross_entropy(sharded, replicated)
            return torch.autograd.grad(loss, local)[0]

    return {
        "statistics, gathered": lambda: gathered(table, layout),
        "statistics, gathered and joined": lambda: joined(gathered(table, layout), problem, layout),
        "three all_reduces": three,
        FUSED_SHARD: lambda: step(
            lambda: fused_losses.cross_entropy(VocabShard(local, None, rank * columns, case.vocab), targets)
        ),
        "torch loss_parallel": torch_step,
    }
