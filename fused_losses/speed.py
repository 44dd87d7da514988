"""``python -m fused_losses --gpu``: what a loss costs on this GPU beside a copy of its logits.

Forward with backward is measured beside ``grad.copy_(logits)``, forward alone beside a sum of the logits, which is a
read. All of a vocabulary is timed in turns, on the device's own clock, with a cold L2; medians. ``bench/run.py``
measures more cases, peers and errors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_losses


class Promise(NamedTuple):
    """What forward with backward may take, in copies; forward alone in reads. Of bfloat16 logits and N = 4096."""

    vocab: int
    one_pass: float
    forward: float = 1.10


# Llama 2, GPT-2 (odd), Llama 3, Qwen 2.5, Gemma
PROMISES = (
    Promise(32000, 1.10),
    Promise(50257, 1.15),
    Promise(128256, 1.10),
    Promise(151936, 1.10),
    Promise(262144, 1.20),
)
LOSSES = ("cross_entropy", "ppo")
TOKENS = 4096
BUFFERS = 3  # as large as the logits: these, a gradient, and what the copy writes


class Row(NamedTuple):
    """A line of the table: medians in milliseconds."""

    loss: str
    tokens: int
    promise: Promise
    copy: float
    read: float
    own: float  # forward and backward, a gradient of its own
    inplace: float
    forward: float

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Own gradient and in place over a copy, forward only over a read."""
        return self.own / self.copy, self.inplace / self.copy, self.forward / self.read

    @property
    def kept(self) -> bool:
        own, inplace, forward = self.ratios
        return max(own, inplace) <= self.promise.one_pass and forward <= self.promise.forward


def rows(
    device: torch.device, promises: tuple[Promise, ...] = PROMISES, tokens: int = TOKENS, repeats: int = 20
) -> Iterator[Row]:
    """Fewer tokens than ``tokens`` where memory is short."""
    for promise in promises:
        n = min(tokens, _free_bytes(device) * 3 // 4 // (BUFFERS * promise.vocab * 2))
        if n < 1:
            raise RuntimeError(f"{device} has no memory free for a token of {promise.vocab} logits")
        logits = torch.randn(n, promise.vocab, device=device, dtype=torch.bfloat16)
        target_tokens = torch.randint(promise.vocab, (n,), device=device)
        old_logprobs = fused_losses.logprobs(logits, target_tokens)
        inputs: dict[str, dict[str, Any]] = {
            "cross_entropy": {},
            "ppo": {"old_logprobs": old_logprobs, "advantages": torch.randn(n, device=device)},
        }
        copy = torch.empty_like(logits)
        for loss in LOSSES:
            calls = _calls(loss, logits, target_tokens, inputs[loss], copy)
            yield Row(loss, n, promise, **_medians(calls, device, repeats))
        del logits, copy


def _calls(
    name: str, logits: Tensor, target_tokens: Tensor, inputs: dict[str, Any], copy: Tensor
) -> dict[str, Callable[[], Any]]:
    """By the fields of Row. In place the gradient goes over what the copy wrote just before."""
    loss = getattr(fused_losses, name)

    def forward() -> None:
        with torch.no_grad():
            loss(logits, target_tokens, **inputs)

    def own() -> None:
        leaf = logits.detach().requires_grad_()
        torch.autograd.grad(loss(leaf, target_tokens, **inputs), leaf)  # nothing accumulates, which may copy

    def inplace() -> None:
        leaf = torch.zeros((), device=copy.device, requires_grad=True)
        produced = Produced.apply(leaf, copy)  # type: ignore[no-untyped-call]
        torch.autograd.grad(loss(produced, target_tokens, **inputs, inplace=True), produced)

    return {
        "own": own,
        "forward": forward,
        "read": logits.view(-1).view(torch.float32).sum if logits.numel() % 2 == 0 else logits.sum,
        "copy": lambda: copy.copy_(logits),
        "inplace": inplace,  # after the copy
    }


class Produced(torch.autograd.Function):
    """Logits as an operation's output, which is what may be overwritten, without an operation's time."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _medians(calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    clock = _on_gpu(device) if device.type == "cuda" else _on_host
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 3):
        for name, call in calls.items():
            elapsed = clock(call)
            if turn >= 3:  # what compiles and allocates is through
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _on_host(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _on_gpu(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def timed(call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host gets ahead
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return timed


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**30


HEAD = f"{'':14}{'V':>7}{'N':>6} {'copy':>9} {'GB/s':>6}  {'own gradient':>12} {'in place':>9} {'forward only':>13}"


def line(row: Row) -> str:
    own, inplace, forward = row.ratios
    promise = row.promise
    rate = 2 * row.tokens * promise.vocab * 2 / row.copy / 1e6
    verdict = "" if row.kept else f"  more than {promise.one_pass:.2f}, {promise.forward:.2f}"
    return (
        f"{row.loss:14}{promise.vocab:7}{row.tokens:6} {row.copy:6.3f} ms {rate:6.0f}  "
        f"{own:12.2f} {inplace:9.2f} {forward:13.2f}{verdict}"
    )
