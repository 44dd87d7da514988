"""A step of a framework with its own loss and with ours: memory and time.

    python bench/adapters.py [trl verl ...] [--rounds 3] [--repeats 2] [--out bench/results]

Without a name: all that are installed. The steps are in adapter_steps.py. Each is measured in a process of its own,
theirs and ours in turn. Memory is the process's largest resident set during a step beyond the one before it: logits,
gradients and what else the step makes. Linux's /proc says both. Of the two times that of the processors, in all
threads, is the one that other processes of a busy machine lengthen least.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adapter_steps import CASES, STEPS, Case, Step
from conditions import conditions, file_name
from memory import forget_peak, resident
from timing import quantiles

from fused_losses.adapters import comparison

ROOT = Path(__file__).resolve().parent.parent
DEFINITIONS = ("prime_rl",)  # whose own code is on no package index: beside what the library defines it as
LONG = 1000  # ms
SMALL = (32, 16, 500)  # tokens, hidden, vocab


# ---- In a process of its own ----


def steps(case: Case, way: str, repeats: int) -> dict[str, Any]:
    """One in small, for what frameworks import and compile at the first; one to warm up; then ``repeats`` on the clock.

    A long one is on the clock at once, and runs once.
    """
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # frameworks say a lot
        stub(case.framework)
        watched(made(case.resized(*SMALL), way))
        step = made(case, way)
        seen: list[Seen] = []
        while len(seen) <= repeats and not (seen and seen[0].ms > LONG):
            seen.append(watched(step))
    timed = seen[1:] or seen
    return {
        "ms": [s.ms for s in timed],
        "cpu_ms": [s.cpu_ms for s in timed],
        "peak": max(s.peak for s in timed),
        "value": seen[0].value,  # before a trainer's first update
    }


def stub(framework: str) -> None:
    """What the framework depends on and a step does not call need not be installed."""
    sys.path.insert(0, str(ROOT / "tests" / "adapters"))
    import stubbed

    stubbed.stub(framework)


def made(case: Case, way: str) -> Step:
    torch.manual_seed(0)
    return STEPS[case.framework](case, way)


class Seen(NamedTuple):
    ms: float
    cpu_ms: float
    peak: int  # bytes
    value: float


def watched(step: Step) -> Seen:
    step.prepare()
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    start, spent = time.perf_counter(), time.process_time()
    value = float(step.run())
    ms, cpu_ms = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - spent)
    return Seen(ms, cpu_ms, resident("VmHWM") - before, value)


# ---- All of them ----


def measure(case: Case, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """In turns, so that what else the machine does meets all ways."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in case.ways}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for way in (way for way in case.ways if way not in failed):
            try:
                runs[way].append(in_a_process(steps, case, way, repeats))
            except Exception as error:  # whatever a framework raises; the others go on
                traceback.print_exception(error)
                failed[way] = f"failed: {type(error).__name__}"
    return [record(case, way, runs[way], failed.get(way, "ok")) for way in case.ways]


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """One that has imported torch and this library, which takes seconds, and has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fused_losses.adapters.comparison"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def record(case: Case, way: str, runs: list[dict[str, Any]], status: str) -> dict[str, Any]:
    ms = [value for run in runs for value in run["ms"]]
    fine = status == "ok"
    p20, median, p80 = quantiles(ms) if fine else (None, None, None)
    return {
        **conditions(torch.device("cpu")),
        "framework": case.framework,
        "framework_version": comparison.version(case.framework),
        "case": case.title,
        "loss": case.loss,
        "group": "adapters",
        "contender": way,
        "backend": None,
        "mode": "step",
        "same_loss": True,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "n": case.tokens,
        "vocab": case.vocab,
        "repeats": len(ms),
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "cpu_ms": statistics.median(value for run in runs for value in run["cpu_ms"]) if fine else None,
        "peak_bytes": statistics.median(run["peak"] for run in runs) if fine else None,
        "value": runs[0]["value"] if fine else None,
        "status": status,
    }


def line(record: dict[str, Any]) -> str:
    what = f"{record['case']} {record['dtype']}, {record['contender']}"
    if record["status"] != "ok":
        return f"{what:75} {record['status']}"
    times = f"{record['median_ms']:8.0f} ms {record['cpu_ms']:8.0f} ms of processors"
    return f"{what:75} {record['peak_bytes'] / 2**20:6.0f} MiB {times}   loss {record['value']:.6f}"


def cases_of(framework: str, sizes: tuple[int, int, int] | None) -> list[Case]:
    """sizes: tokens, hidden and vocab of all, in place of their own."""
    cases = [case for case in CASES if case.framework == framework]
    return cases if sizes is None else [case.resized(*sizes) for case in cases]


def absent(framework: str) -> bool:
    return framework not in DEFINITIONS and comparison.version(framework) is None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", nargs="*", help=f"some of {', '.join(STEPS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeats", type=int, default=2, help=f"timed steps of a process; one, if it takes over {LONG} ms"
    )
    parser.add_argument("--sizes", nargs=3, type=int, metavar=("TOKENS", "HIDDEN", "VOCAB"), help="of all steps")
    parser.add_argument("--out", type=Path, help="folder to put the records into")
    options = parser.parse_args()
    if unknown := [name for name in options.framework if name not in STEPS]:
        parser.error(f"framework must be some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    start, fine = time.perf_counter(), True
    for framework in options.framework or STEPS:
        if absent(framework):
            print(f"{framework}: not installed")
            continue
        for case in cases_of(framework, options.sizes):
            records = measure(case, options.rounds, options.repeats)
            print("\n".join(map(line, records)), flush=True)
            fine &= all(r["status"] == "ok" for r in records)
            if options.out:
                append(records, options.out)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return int(not fine)


def append(records: list[dict[str, Any]], folder: Path) -> None:
    """As soon as they are there: what was measured stays whatever comes after."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / file_name(records[0])).open("a") as out:
        out.writelines(json.dumps(r) + "\n" for r in records)


if __name__ == "__main__":
    sys.exit(main())
