"""What a loss step costs, from logits to loss and dlogits without the model, and how exact its dlogits are."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LossFn = Callable[[Tensor], Tensor]  # logits to loss


@dataclass
class Cost:
    milliseconds: float  # median
    peak_bytes: int  # the most that is allocated at one time, the logits not counted
    error: float  # of dlogits, as a share of the largest of them: at most this for 99 % of the tokens


def fresh(logits: Tensor) -> Tensor:
    """A copy that is no leaf, as a model's logits are, so that a loss may overwrite it."""
    return logits.detach().requires_grad_() + 0.0


def step(loss_fn: LossFn, logits: Tensor) -> Tensor:
    edge = torch.autograd.graph.get_gradient_edge(logits)  # taken before the loss may write to the logits
    (dlogits,) = torch.autograd.grad(loss_fn(logits), edge)
    return dlogits


@contextmanager
def silent() -> Iterator[None]:
    """No standard error, native code's included: some builds of the profiler log to it."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cpu_peak(run: Callable[[], Tensor]) -> int:
    """Peak of the bytes that PyTorch's allocator holds for `run`: the profiler records every allocation."""
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()  # kept to the end: dlogits are part of the step
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del result
    live = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak


def cuda_peak(run: Callable[[], Tensor], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(loss_fns: dict[str, LossFn], exact: LossFn, logits: Tensor, repeats: int) -> dict[str, Cost]:
    """The cost of each loss on the same logits. They take turns, so that a busy machine is unfair to none."""
    device = logits.device
    truth = step(exact, fresh(logits))
    # With all advantages near 0 there is next to no gradient to compare with: a mean's natural size is 1 / tokens.
    scale = max(truth.abs().max().item(), logits.shape[-1] / logits.numel())

    def error(dlogits: Tensor) -> float:
        per_token = (dlogits - truth).abs().amax(-1).flatten()
        # Not the largest: PPO's gradient jumps at its bounds, and rounding may carry a token across one.
        return per_token.quantile(0.99).item() / scale

    costs = {}
    for name, loss_fn in loss_fns.items():
        z = fresh(logits)

        def run(loss_fn: LossFn = loss_fn, z: Tensor = z) -> Tensor:
            return step(loss_fn, z)

        peak = cuda_peak(run, device) if device.type == "cuda" else cpu_peak(run)
        costs[name] = Cost(0.0, peak, error(step(loss_fn, fresh(logits))))

    times: dict[str, list[float]] = {name: [] for name in loss_fns}
    for _ in range(repeats):
        for name, loss_fn in loss_fns.items():
            z = fresh(logits)
            times[name].append(seconds(lambda loss_fn=loss_fn, z=z: step(loss_fn, z), device))
    for name in loss_fns:
        costs[name].milliseconds = 1e3 * statistics.median(times[name])
    return costs
