"""What a loss step costs, from logits to loss and dlogits without the model, and how exact its dlogits are.

With a LinearHead the step begins at what that is given: hidden states, weight and bias, and ends at their gradients.
"""

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

LossFn = Callable[..., Tensor]  # logits, or hidden, weight and bias, to loss


@dataclass
class Cost:
    milliseconds: float  # median
    peak_bytes: int  # the most that is allocated at one time, the inputs not counted
    error: float  # of the first input's gradient, as a share of its largest: at most this for 99 % of the tokens


def fresh(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies that are no leaves, as a model's logits are, so that a loss may overwrite them."""
    return tuple(tensor.detach().requires_grad_() + 0.0 for tensor in inputs)


def step(loss_fn: LossFn, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    edges = [torch.autograd.graph.get_gradient_edge(x) for x in inputs]  # taken before the loss may write to them
    return torch.autograd.grad(loss_fn(*inputs), edges)


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


def cpu_peak(run: Callable[[], object]) -> int:
    """Peak of the bytes that PyTorch's allocator holds for `run`: the profiler records every allocation."""
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()  # kept to the end: gradients are part of the step
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


def cuda_peak(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def peak(run: Callable[[], object], device: torch.device) -> int:
    return cuda_peak(run, device) if device.type == "cuda" else cpu_peak(run)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(loss_fns: dict[str, LossFn], exact: LossFn, inputs: tuple[Tensor, ...], repeats: int) -> dict[str, Cost]:
    """The cost of each loss on the same inputs. They take turns, so that a busy machine is unfair to none."""
    first, *weights = inputs
    device = first.device
    truth = step(exact, fresh(inputs))[0]
    # With all advantages near 0 there is next to no gradient to compare with: a mean's natural size is 1 / tokens,
    # times a weight where the gradient is that of hidden states.
    natural = first.shape[-1] / first.numel() * (weights[0].abs().max().item() if weights else 1.0)
    scale = max(truth.abs().max().item(), natural)

    def error(gradient: Tensor) -> float:
        per_token = (gradient - truth).abs().amax(-1).flatten()
        # Not the largest: PPO's gradient jumps at its bounds, and rounding may carry a token across one.
        return per_token.quantile(0.99).item() / scale

    costs = {}
    for name, loss_fn in loss_fns.items():
        x = fresh(inputs)
        peak_bytes = peak(lambda loss_fn=loss_fn, x=x: step(loss_fn, x), device)
        costs[name] = Cost(0.0, peak_bytes, error(step(loss_fn, fresh(inputs))[0]))

    times: dict[str, list[float]] = {name: [] for name in loss_fns}
    for _ in range(repeats):
        for name, loss_fn in loss_fns.items():
            x = fresh(inputs)
            times[name].append(seconds(lambda loss_fn=loss_fn, x=x: step(loss_fn, x), device))
    for name in loss_fns:
        costs[name].milliseconds = 1e3 * statistics.median(times[name])
    return costs
