"""Train the demo's model over several processes: its vocabulary in parts, its data in parts, or both.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py            # gloo on CPUs, nccl where each rank has a GPU
    torchrun --nproc-per-node 4 examples/tensor_parallel.py --mode both
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --quick    # a smoke test

tensor  each rank holds some rows of the embedding and of the head, which share them; the rest is replicated
fsdp    FSDP2: each rank holds a part of every parameter, and trains on its own rows of the batch
both    a mesh of two dimensions: FSDP2 around the model of `tensor`

Every mode trains on the batches that one process trains on with plain logits, and has to find the same losses.
The calls to copy are in `ParallelDecoder`, `parallelise` and `train_parallel`.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from corpus import load_corpus
from measure import peak, seconds
from model import Decoder, ModelConfig
from report import Result, print_table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fused_losses
from fused_losses import LinearHead, aggregation

IGNORE = -100
CHUNK_BYTES = 1 << 23  # of logits; a LinearHead's own choice of 1 GiB would take this example's all at once
MODES = ("tensor", "fsdp", "both")
GIVEN = {"c10d::_allgather_base_": 1, "c10d::_reduce_scatter_base_": 1}  # which argument a rank gives, if not the first

Batch = tuple[Tensor, Tensor]  # tokens and targets, [rows, length]


# ---- The model ----


class SumOverRanks(torch.autograd.Function):
    """What follows is the same on all ranks, and so is its gradient: backward has nothing to add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        dist.all_reduce(x, group=group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class VocabParallelEmbedding(nn.Module):
    """Some rows of an embedding. Each rank looks up the tokens that it has, and the sum over ranks has them all."""

    def __init__(self, whole: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        rows = -(-whole.num_embeddings // dist.get_world_size(group))
        self.start = rows * dist.get_rank(group)
        self.weight = nn.Parameter(whole.weight[self.start : self.start + rows].detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return SumOverRanks.apply(rows.masked_fill(elsewhere[..., None], 0.0), self.group)


class ParallelDecoder(Decoder):
    """The demo's decoder, with its loss inside: FSDP2 has the head's weight whole only while forward runs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.shard: dict[str, Any] = {}  # of the vocabulary: what a LinearHead has to know of it

    def shard_vocabulary(self, group: dist.ProcessGroup) -> None:
        self.tokens = VocabParallelEmbedding(self.tokens, group)
        start, rows = self.tokens.start, self.tokens.weight.shape[0]
        self.head_bias = nn.Parameter(self.head_bias[start : start + rows].detach().clone())
        self.shard = {"group": group, "vocab_start": start, "vocab_size": self.config.vocab_size}

    def forward(self, tokens: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
        head = LinearHead(
            self.hidden(tokens), self.tokens.weight, self.head_bias, chunk_bytes=CHUNK_BYTES, **self.shard
        )
        return fused_losses.cross_entropy(head, targets, denominator=denominator)


def parallelise(model: ParallelDecoder, mesh: DeviceMesh) -> None:
    data, tensor = mesh["data"], mesh["tensor"]
    if tensor.size() > 1:
        model.shard_vocabulary(tensor.get_group())
    if data.size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=data)
        fully_shard(model, mesh=data)  # what is in no block: the embedding, which is the head, and the bias


# ---- Training ----


@dataclass
class Run:
    losses: Tensor  # of every step
    milliseconds: float  # of a step, the median
    peak_bytes: int  # in a step, beyond the parameters and their momentum
    parameters: int  # on this rank
    communicated: int  # bytes that a step hands to collectives

    def row(self, mode: str, rank: int) -> list[str]:
        held = 2 * 4 * self.parameters  # with their momentum
        megabytes = [f"{size / 1e6:.1f} MB" for size in (held, self.peak_bytes, self.communicated)]
        return [mode, str(rank), f"{self.milliseconds:.0f} ms", f"{self.parameters:,}", *megabytes]


class Communication(TorchDispatchMode):
    """Counts the bytes of the tensors that this rank gives to collectives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given = args[GIVEN.get(func._schema.name, 0)]
            self.bytes += sum(t.nbytes for t in ([given] if isinstance(given, Tensor) else given))
        return func(*args, **(kwargs or {}))


def train(model: Decoder, loss_of: Callable[[Batch], Tensor], batches: Sequence[Batch], progress: tqdm) -> Run:
    # Not Adam, which divides by the size of gradients: one that is as many times too large as there are ranks would
    # pass. Nor clipped, for the same reason.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    device = next(model.parameters()).device
    losses, times, peak_bytes, communication = [], [], 0, Communication()

    def step(batch: Batch) -> None:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    for number, batch in enumerate(batches):
        if number == 1:  # the momentum is there by now; recording takes time, so that this step is not timed
            with communication:
                peak_bytes = peak(lambda batch=batch: step(batch), device)
        else:
            times.append(seconds(lambda batch=batch: step(batch), device))
        progress.update()
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    milliseconds = 1e3 * statistics.median(times[1:])
    return Run(torch.stack(losses).double().cpu(), milliseconds, peak_bytes, held, communication.bytes)


def train_single(whole: Decoder, batches: Sequence[Batch], dtype: torch.dtype, progress: tqdm) -> Run:
    """As without this library, in one process: what the others are compared with."""
    model = copy.deepcopy(whole).to(dtype)

    def loss_of(batch: Batch) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    return train(model, loss_of, batches, progress)


def train_parallel(whole: Decoder, batches: Sequence[Batch], mesh: DeviceMesh, progress: tqdm) -> Run:
    model = ParallelDecoder(whole.config).to(whole.device)
    model.load_state_dict(whole.state_dict())
    parallelise(model, mesh)
    data, ranks = mesh["data"].get_group(), mesh["data"].size()

    def loss_of(batch: Batch) -> Tensor:
        tokens, targets = (part.chunk(ranks)[dist.get_rank(data)] for part in batch)
        # Ranks have rows of different lengths: a mean over all tokens is no mean of the ranks' means. FSDP2 averages
        # gradients over the ranks, which the denominator allows for.
        tokens_of_all = aggregation.global_tokens(targets, ignore_index=IGNORE, group=data, averaged=True)
        return model(tokens, targets, tokens_of_all)

    run = train(model, loss_of, batches, progress)
    losses = run.losses.to(whole.device)
    dist.all_reduce(losses, group=data)
    run.losses = losses.cpu() / ranks
    return run


# ---- What to train on ----


def make_batches(train_tokens: Tensor, rows: int, length: int, steps: int, device: torch.device) -> list[Batch]:
    """The same on every rank. Of each row a beginning is no target, as a prompt is none: of another length in each."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        starts = torch.randint(len(train_tokens) - length, (rows, 1), generator=generator)
        batch = train_tokens[starts + torch.arange(length + 1)]
        prompts = torch.randint(length // 2, (rows, 1), generator=generator)
        targets = batch[:, 1:].masked_fill(torch.arange(length) < prompts, IGNORE)
        batches.append((batch[:, :-1].to(device), targets.to(device)))
    return batches


def load_training_tokens(config: ModelConfig, files: int) -> Tensor:
    """Made by one rank."""
    box: list[Any] = [load_corpus(config.vocab_size, 24, files).train if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def shapes(world: int) -> dict[str, tuple[int, int]]:
    """(data, tensor) of every mode that so many ranks can run."""
    possible = {"tensor": (1, world), "fsdp": (world, 1)}
    return possible | ({"both": (world // 2, 2)} if world >= 4 and world % 2 == 0 else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, help="default: one after another, all that these ranks can run")
    parser.add_argument("--steps", type=int, default=40, help="at least 4")
    parser.add_argument("--quick", action="store_true", help="a few short steps on a few files")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    world, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    possible = shapes(world)
    modes = list(possible) if arguments.mode is None else [arguments.mode]
    if modes[0] not in possible:
        parser.error(f"--mode {modes[0]} needs an even number of ranks, at least 4, got {world}")
    steps = 5 if arguments.quick else arguments.steps
    if steps < 4:
        parser.error(f"--steps must be at least 4, of which two are not timed, got {steps}")

    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    rank = dist.get_rank()

    config = ModelConfig()
    tokens = load_training_tokens(config, files=60 if arguments.quick else 150)
    rows = -(-4 // world) * world  # for each rank as many
    batches = make_batches(tokens, rows, 64 if arguments.quick else config.context, steps, device)
    torch.manual_seed(0)
    whole = Decoder(config)
    whole.start_from_frequencies(tokens)
    whole.to(device)

    runs: dict[str, list[Run]] = {}
    with tqdm(total=(len(modes) + 2) * steps, dynamic_ncols=True, disable=rank != 0) as progress:
        for mode in modes:
            progress.set_description(mode)
            mesh = init_device_mesh(device.type, possible[mode], mesh_dim_names=("data", "tensor"))
            gathered: list[Any] = [None] * world
            dist.all_gather_object(gathered, train_parallel(whole, batches, mesh, progress))
            runs[mode] = gathered
        if rank == 0:
            progress.set_description("one process")
            single = train_single(whole, batches, torch.float32, progress)
            progress.set_description("one process, float64")
            exact = train_single(whole, batches, torch.float64, progress)
    verdict = [report(runs, single, exact, batches[0][0].numel(), device) if rank == 0 else None]
    dist.broadcast_object_list(verdict)
    dist.destroy_process_group()
    return 0 if verdict[0] else 1


def compared(run: Run, single: Run, exact: Run) -> Result:
    curves = {"fused": run, "reference": single, "float64": exact}
    return Result({name: of.losses.tolist() for name, of in curves.items()}, costs={})


def report(runs: dict[str, list[Run]], single: Run, exact: Run, tokens: int, device: torch.device) -> bool:
    """Print tables, and tell whether every mode's losses are those of one process: by Result.allowed a run may be ten
    times as far from float64 as one process in float32 is."""
    header = ["run", "rank", "step", "parameters", "held", "peak beyond", "communicated"]
    table = [single.row("one process", 0)]
    table += [run.row(mode, rank) for mode, ranks in runs.items() for rank, run in enumerate(ranks)]
    print_table(f"A training step of {tokens} tokens, {device.type}", header, table)
    print("  held: parameters and their momentum; peak beyond: gradients, activations, and what FSDP gathers")
    print("  communicated: bytes that a rank hands to collectives in a step")

    failed = []
    header = ["run", "first", "last", "run-one process", "run-float64", "one process-float64", "judged", "allowed"]
    table = []
    for mode, ranks in runs.items():
        results = [compared(run, single, exact) for run in ranks]
        agrees = all(result.curves_agree for result in results)
        row = [mode, f"{ranks[0].losses[0]:.4f}", f"{ranks[0].losses[-1]:.4f}"]
        for pair in (("fused", "reference"), ("fused", "float64"), ("reference", "float64")):
            row.append(f"{max(result.distances(*pair).max().item() for result in results):.1e}")
        judged, allowed = results[0].judged, results[0].allowed
        table.append([*row, str(judged), f"{allowed:.1e}", "agrees" if agrees else "DISAGREES"])
        if not agrees:
            failed.append(mode)
    print_table("Losses: the largest distance of two curves, on any rank", [*header, "verdict"], table)
    print("  one process: logits and F.cross_entropy, in float32; float64: the same, with the whole model in it")
    if failed:
        print(f"\nFAILED: {', '.join(failed)} differ from one process by more than rounding explains", file=sys.stderr)
    return not failed


if __name__ == "__main__":
    sys.exit(main())
