"""Measure the losses and their opponents, and write the records that bench/report.py turns into tables and plots.

python bench/run.py                               # all cases of this machine's device
python bench/run.py --quick                       # seconds: does it all work
python bench/run.py --cases '1:*,3:*' --losses ppo --backends cuda,triton
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CPU_CASES, DTYPES, GPU_CASES, GROUPS, LOSSES, QUICK_CASES, STATISTICS, Case, make_problem
from conditions import conditions, file_name
from contenders import FUSED
from heads import CONTENDERS, HEAD_CPU_CASES, HEAD_GPU_CASES, HEAD_QUICK_CASES, HeadCase, measure_head
from measure import OVERHEAD_CASE, measure, overhead, statistics
from memory import touch
from opponents import OPPONENTS, check_plain_formulas
from records import RESULTS
from shards import SHARD_CPU_CASES, SHARD_QUICK_CASES, ShardCase, measure_shards

from fused_losses import backends


def usable_backends(device: torch.device, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The usable backends, best first. Triton's interpreter, the only Triton on a CPU, is for tests, not for times."""
    if wanted is not None:
        for name in wanted:
            backends.resolve(name, device)  # raises with the cause
        return wanted
    names = [name for name in backends.NAMES if not (name == "triton" and device.type == "cpu")]
    return tuple(name for name in names if backends.unusable(name, device) is None)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny cases, a smoke test; the times mean nothing")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--cases", type=names, help="patterns of case names, comma-separated: '1:*,overhead*'")
    parser.add_argument("--losses", type=names, help=f"of {', '.join((*LOSSES, STATISTICS))}")
    parser.add_argument("--backends", type=names, help=f"of {', '.join(backends.NAMES)}; default: every usable one")
    parser.add_argument("--opponents", type=names, help=f"of {', '.join(OPPONENTS)}")
    parser.add_argument("--modes", type=names, help="of inplace, separate, reused, forward, two_phase")
    parser.add_argument("--dtype", type=names, help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, help="default: 11 on CPU, 30 on CUDA")
    parser.add_argument("--seconds", type=float, help="begin with no further measurement after so long")
    parser.add_argument("--threads", type=int, help="of torch, on CPU")
    parser.add_argument(
        "--touch", type=float, default=0.0, metavar="GB", help="write so much memory first: for a young virtual machine"
    )
    parser.add_argument("--commit", help="to put in the records where git can't tell")
    parser.add_argument(
        "--out", type=Path, help="folder of the records; default bench/results, --quick: a temporary one"
    )
    return parser.parse_args(argv)


AnyCase = Case | HeadCase | ShardCase


def selected(options: argparse.Namespace, device: torch.device) -> list[AnyCase]:
    if options.quick:
        cases: list[AnyCase] = [*QUICK_CASES, *HEAD_QUICK_CASES, *SHARD_QUICK_CASES, OVERHEAD_CASE]
    elif device.type == "cuda":
        cases = [*GPU_CASES, *HEAD_GPU_CASES, OVERHEAD_CASE]
    else:
        cases = [*CPU_CASES, *HEAD_CPU_CASES, *SHARD_CPU_CASES, OVERHEAD_CASE]
    if options.cases is None:
        return cases
    return [case for case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.cases)]


def keep(available: tuple[str, ...], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    return available if wanted is None else tuple(name for name in available if name in wanted)


def records(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    names = usable_backends(device, options.backends)
    repeats = options.repeats or (3 if options.quick else 30 if device.type == "cuda" else 11)
    deadline = time.perf_counter() + (options.seconds or math.inf)
    for case in selected(options, device):
        if case is OVERHEAD_CASE:
            if not options.losses or "ppo" in options.losses:
                yield from overhead(device, names, 100 if options.quick else 3000)
            continue
        # Where a better backend is there, eager is only the fallback, and takes longer than all others together.
        better = tuple(name for name in names if name != "eager")
        chosen = names if not isinstance(case, Case) or case.fallback or options.backends or not better else better
        for dtype in keep(case.dtypes, options.dtype):
            for loss in keep(case.losses, options.losses):
                if time.perf_counter() > deadline:
                    print(f"left out for time: {case.name} {dtype} {loss}", file=sys.stderr)
                    continue
                if not isinstance(case, Case):
                    few = options.repeats or (3 if options.quick else case.repeats)
                    if isinstance(case, HeadCase):
                        yield from measure_head(case, loss, dtype, device, options.opponents, few)
                    else:
                        yield from measure_shards(case, device, few)
                    continue
                problem = make_problem(case, loss, dtype, device)
                if loss == STATISTICS:
                    yield from statistics(problem, chosen, repeats)
                    continue
                for group, modes in GROUPS.items():
                    modes = keep(keep(modes, case.modes), options.modes)
                    if modes:
                        yield from measure(
                            problem, group, modes, chosen, keep(case.opponents, options.opponents), repeats
                        )
                del problem
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def line(record: dict[str, Any]) -> str:
    name = " ".join(filter(None, (record["contender"], record["backend"])))
    parts = [f"{record['case']:24} {record['dtype']} {record['loss']:20} {record['mode']:10} {name:28}"]
    if (median := record.get("median_ms")) is not None:
        parts.append(f"{median:10.4f} ms")
        if record.get("ratio_to_copy") is not None:
            parts.append(f"{record['ratio_to_copy']:6.2f} x copy")
        if record.get("ratio_to_floor") is not None:
            parts.append(f"{record['ratio_to_floor']:6.2f} x products and loss, {record['peak_bytes'] / 1e6:.0f} MB")
        if record.get("speedup_over_torch") is not None:
            parts.append(f"{record['speedup_over_torch']:6.2f} x torch's speed")
        if record.get("ratio_to_entropy") is not None:
            parts.append(f"{record['ratio_to_entropy']:6.2f} x logprobs and entropy")
        if record.get("speedup") is not None:
            parts.append(f"{record['speedup']:6.2f} x eager's speed")
        if record.get("overhead_us") is not None:
            parts.append(f"{record['overhead_us']:6.1f} us of interface")
    if record["status"] != "ok":
        parts.append(record["status"].upper())
    return " ".join(parts)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.list:
        print("\n".join(case.name for case in selected(options, device)))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    check_plain_formulas(keep(LOSSES, options.losses))
    where = conditions(device, options.commit)
    missing = [o.name for o in (*OPPONENTS.values(), *CONTENDERS) if not o.installed]
    where["absent"] = missing
    where["touched_gb"] = options.touch
    touch(options.touch)
    # Times of a smoke test must not become the newest record.
    out = options.out or (Path(tempfile.mkdtemp(prefix="bench-quick-")) if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / file_name(where)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}")
    if missing:
        print(f"not installed, not measured: {', '.join(missing)}")
    start, wrong = time.perf_counter(), 0
    with path.open("a") as file:  # several runs with filters make one record; the report takes the last of each line
        for found in records(options, device):
            file.write(json.dumps({**found, **where}) + "\n")
            file.flush()
            print(line(found), flush=True)
            wrong += found["contender"].startswith(FUSED) and found["status"] != "ok"
    print(f"{time.perf_counter() - start:.0f} s, {path}")
    if wrong:
        print(f"{wrong} measurements of this library are wrong, inexact or failed", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
