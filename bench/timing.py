"""Times of several calls, interleaved: A B C ... A B C, so that a slow second of the machine hits all of them alike."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass
class Times:
    """Milliseconds per repeat. ``ms``: on the device's own clock, host time hidden as far as it can be."""

    ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)  # CUDA: from an idle device to an idle device
    graph_ms: list[float] = field(default_factory=list)  # CUDA: a replayed graph
    page_faults: list[float] = field(default_factory=list)  # CPU: pages that the kernel had to hand out


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    median = statistics.median(values)
    return min(p20, median), median, max(p80, median)  # between equal times interpolation may round past them


def interleaved(
    calls: dict[str, Call],
    prepare: Call,
    repeats: int,
    device: torch.device,
    graphs: dict[str, torch.cuda.CUDAGraph] | None = None,
) -> dict[str, Times]:
    """Time every call ``repeats`` times; ``prepare`` runs before each, untimed."""
    times = {name: Times() for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            _cuda(calls, prepare, repeats, device, graphs or {}, times)
        else:
            _cpu(calls, prepare, repeats, times)
    finally:
        if collecting:
            gc.enable()
    return times


def _cpu(calls: dict[str, Call], prepare: Call, repeats: int, times: dict[str, Times]) -> None:
    for _ in range(repeats):
        for name, call in calls.items():
            prepare()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter_ns()
            result = call()
            end = time.perf_counter_ns()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            del result  # giving the memory back is the consumer's business
            times[name].ms.append((end - start) / 1e6)
            times[name].page_faults.append(faults)


def _cuda(
    calls: dict[str, Call],
    prepare: Call,
    repeats: int,
    device: torch.device,
    graphs: dict[str, torch.cuda.CUDAGraph],
    times: dict[str, Times],
) -> None:
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def ready() -> None:
        prepare()
        flush.zero_()

    def on_device(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ready()
        torch.cuda._sleep(2_000_000)  # about a millisecond in which the host gets ahead of the device
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end)

    def on_wall(call: Call) -> float:
        ready()
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        result = call()
        torch.cuda.synchronize()
        end = time.perf_counter_ns()
        del result
        return (end - start) / 1e6

    for _ in range(repeats):
        for name, call in calls.items():
            times[name].ms.append(on_device(call))
            times[name].wall_ms.append(on_wall(call))
            if name in graphs:
                times[name].graph_ms.append(on_device(graphs[name].replay))


def captured(call: Call) -> torch.cuda.CUDAGraph | None:
    """The call as a CUDA graph, or None where it can't be one."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        torch.cuda.synchronize()
        return graph
    except Exception:  # whatever an opponent does in capture; the plain time stands
        torch.cuda.synchronize()
        return None
