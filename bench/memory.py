"""Peak memory of a call beyond what was allocated before it: the logits don't count, a gradient of its own does.

CUDA: the caching allocator's peak. CPU: torch's allocator, as the profiler reports each allocation and release, so that
memory inside operators and inside compiled code counts, too. What a C++ kernel takes from malloc itself (a scratch row
per thread) is not seen.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own chatter on stderr


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def resident(field: str) -> int:
    """Bytes of this process, as Linux says: "VmRSS" now, "VmHWM" the largest since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(value)


def forget_peak() -> None:
    """The largest resident set is that of now again."""
    Path("/proc/self/clear_refs").write_text("5")


def touch(gigabytes: float) -> None:
    """Write that much memory once, on Linux, and give it back.

    A virtual machine may get its memory from the host at first touch. That makes a fresh buffer up to ten times as dear
    as it is on a machine that has run for a while, and huge pages dearest of all, so that a median says which page
    happened to be handed out.
    """
    if gigabytes <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    with mmap.mmap(-1, int(gigabytes * 2**30), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        region.madvise(mmap.MADV_HUGEPAGE)
        for page in range(0, len(region), mmap.PAGESIZE):
            region[page] = 1
