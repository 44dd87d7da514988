"""All that a machine can tell of this library in one command and, on a GPU, under ten minutes: what `make bench` runs.

    python bench/session.py            # self-test, tests and sanitizers of the GPU, measurements, tables and plots
    python bench/session.py --quick    # the same steps on tiny cases, a smoke test that keeps nothing

A step that fails, is absent or runs out of its time ends neither the others nor the session: it is recorded as what it
was, in bench/results/session, and the exit code is 1. Without a GPU the steps of the GPU are absent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conditions import conditions
from records import RESULTS

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# What only a GPU can show, and the numbers. The whole suite takes longer than this session may.
ESSENTIALS = (
    "tests/test_cuda.py",
    "tests/test_exact_tail.py",
    "tests/test_batch_invariance.py",
    "tests/test_values.py",
    "tests/test_statistics.py",
    "tests/test_upstream.py",
    "tests/test_linear_head.py",
)
GPU_LOSSES = "cross_entropy,ppo"


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    seconds: int  # that it may take
    absent: str | None = None  # why it can't run here


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def steps(gpu: bool, quick: bool, out: Path) -> list[Step]:
    """In order: what is wrong shows before what is slow."""
    no_gpu = None if gpu else "torch sees no GPU"
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = no_gpu or (None if sanitizer else "compute-sanitizer is not on PATH")
    small = ("-k", "[cuda and ppo") if quick else ("-k", "[cuda and not more_than_2_31_elements")
    measured = ("bench/run.py", "--out", str(out), *(("--quick",) if quick else ()))
    if gpu:
        measured = (*measured, "--losses", GPU_LOSSES, "--repeats", "15", "--seconds", "110")
    else:
        measured = (*measured, "--touch", "0" if quick else "8")
    # on a CPU they are among the measurements
    of_heads = ("bench/run.py", "--out", str(out), "--cases", "head*", "--repeats", "5", "--seconds", "30")
    heads = [Step("heads", python(*of_heads), 45)] if gpu and not quick else []
    report = ("bench/report.py", "--results", str(out)) if quick else ("bench/report.py",)
    elsewhere = ("--pages", str(out / "README.md"), "--plots", str(out / "plots")) if quick else ()
    return [
        Step("self-test", python("-m", "fused_losses"), 60),
        Step("tests", python("-m", "pytest", "-q", "-x", "-W", "ignore", *small, *ESSENTIALS), 110, no_gpu),
        *(
            Step(
                tool,
                (str(sanitizer), "--tool", tool, "--error-exitcode", "9", *python("bench/sanitized.py")),
                45,
                no_sanitizer,
            )
            for tool in SANITIZERS
        ),
        Step("measurements", python(*measured), 130 if gpu else 3600),  # heads take seconds a call on a CPU
        *heads,
        Step("predictions", python("bench/model.py", "--beside", str(out)), 40, no_gpu),
        Step("tables and plots", python(*report, *elsewhere), 20),
    ]


def run(step: Step) -> dict[str, Any]:
    """Its outcome: "ok", "failed", "absent" or "out of time", with the last line it printed."""
    if step.absent is not None:
        return {"step": step.name, "outcome": "absent", "seconds": 0.0, "last": step.absent}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    start, last, late = time.perf_counter(), "", threading.Event()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, to end all that it starts
    )

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(step.seconds, end)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        last = line.strip() or last
    code = process.wait()
    timer.cancel()
    outcome = "out of time" if late.is_set() else "ok" if code == 0 else "failed"
    return {
        "step": step.name,
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "last": last[-300:],
    }


def summary(outcomes: list[dict[str, Any]]) -> str:
    rows = (f"  {o['step']:18}{o['outcome']:12}{o['seconds']:7.1f} s  {o['last'][:90]}" for o in outcomes)
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny cases; nothing is kept")
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    where = conditions(torch.device("cuda" if gpu else "cpu"))
    out = Path(tempfile.mkdtemp(prefix="bench-quick-")) if options.quick else RESULTS
    outcomes = []
    for step in steps(gpu, options.quick, out):
        print(f"== {step.name}", flush=True)
        outcomes.append(run(step))
    print(summary(outcomes))
    folder = out / "session"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{where['date'][:10]}-{where['commit']}.jsonl"
    with path.open("a") as file:
        for outcome in outcomes:
            file.write(json.dumps({**outcome, **where}) + "\n")
    print(path)
    return int(any(o["outcome"] not in ("ok", "absent") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
