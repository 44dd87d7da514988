"""What the CUDA kernels should take beside a copy of the logits, without a GPU: fluid.py with their launches.

    python bench/model.py                # ratios to a copy (forward only: to a read)
    python bench/model.py --gpu H100     # of one GPU
    python bench/model.py --calibrate    # the model beside published times
    python bench/model.py --beside DIR   # measurements, of the newest record there, beside what it has for them
    python bench/model.py --write        # these tables, into docs/kernels.md; about a minute

Which kernel runs, with how many threads, blocks and bytes on chip, is chosen as in csrc/cuda/launch.cu. Instructions
per element are those of the newest record of bench/machine_code.py.

Two figures, as nobody knows beforehand which is right. In step: all blocks want memory at the same time, and leave it
idle at the same time. Apart: they start within a microsecond, and memory serves some rows a little faster than others.
Published times of kernels with one block per multiprocessor are nearer to the first, with several to the second.

How wrong it may be: published times are met within 8 %, in the state that is nearer. Figures near 1 are good to 0.03
where a multiprocessor keeps 64 KB of loads in flight, else 0.1 to 0.2 too low; those of rows that are read again from
L2 are good to 0.1. Not in it: what DRAM loses between reads and writes beyond what a copy loses, TLBs, bank conflicts,
the two halves of L2, clocks that fall under load, the host. A prefetch counts as the next bytes of a row, whichever
they are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cases import GPU_CASES
from cells import markdown
from fluid import APART, IN_STEP, KB, WARP, Gpu, Kernel, Run, Sweep, times
from records import RESULTS, last, read
from report import spliced

ROOT = Path(__file__).resolve().parent.parent
MACHINE_CODE = ROOT / "bench" / "results" / "machine_code"
PAGE = ROOT / "docs" / "kernels.md"
N = 4096
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = {2: "bfloat16", 4: "float"}  # by bytes of an element

# Multiprocessors, clocks, L2: NVIDIA's data sheets; shared memory: compute capabilities in its programming guide.
# copy, read: about 90 % of the data sheets' 3350, 4800, 2039 and 8000 GB/s, which quack measured on an H100 (3.01 TB/s,
# sysml.cs.princeton.edu/blogs/memory-bound-kernels.html); of the others no measurement is at hand. l2: assumed; what
# chipsandcheese.com measured on an H100 PCIe is about as much.
H100 = Gpu("H100", "sm_90a", 132, 1.755, 3000, 3150, 50_000_000, 5500, 227 * KB, 228 * KB)
H200 = Gpu("H200", "sm_90a", 132, 1.755, 4300, 4500, 60_000_000, 5500, 227 * KB, 228 * KB)
A100 = Gpu("A100", "sm_80", 108, 1.41, 1750, 1800, 40_000_000, 3500, 163 * KB, 164 * KB)
B200 = Gpu("B200", "sm_100", 148, 1.85, 7200, 7600, 126_000_000, 10000, 227 * KB, 228 * KB)
GPUS = {gpu.name: gpu for gpu in (H100, H200, A100, B200)}


# ---- Which kernel runs: csrc/cuda/launch.cu --------------------------------------------------------------------------

VECTOR = 16
SLOTS = 4  # kSlots: vectors of a thread in a chunk
GROUPS = 14  # kGroups: chunks at most
SCRATCH = 1536  # sizeof(OnChipShared<bfloat16, PlainRow>)
AHEAD = 64 * KB  # kAnnounced


class Shape(NamedTuple):
    threads: int
    blocks: int  # per multiprocessor
    chunks: int = 0  # on chip
    team: int = 1  # blocks of a row


def chunk_bytes(threads: int) -> int:
    return VECTOR * SLOTS * threads


def swept_shape(vocab: int, max_threads: int, most: int, resident: int = 1024) -> Shape:
    threads = min((vocab // (32 * WARP) + 1) * WARP, max_threads)
    return Shape(threads, min(resident // threads, most))


def stream_shape(vocab: int) -> Shape:
    return swept_shape(vocab, 256, 1024)


def even_grid(gpu: Gpu, n: int, blocks: int) -> int:
    return math.ceil(n / math.ceil(n / (blocks * gpu.multiprocessors)))


def two_sweep_shape(gpu: Gpu, vocab: int, element: int) -> Shape:
    row = vocab * element * gpu.multiprocessors
    most = max((gpu.l2_bytes // 2 + row // 2) // row, 1)
    return swept_shape(vocab, 1024 // (1 if most == 1 else 2 if most < 4 else 4), most)


def on_chip_shape(gpu: Gpu, vocab: int, element: int, resident: int = 768) -> Shape | None:
    """None: two sweeps."""
    row = slot_bytes(vocab, element)
    if row < 16 * KB or gpu.shared_bytes < 96 * KB:
        return None
    several = min(gpu.shared_bytes_of_multiprocessor // (row + SCRATCH + KB), resident // 256)
    chunks = math.ceil(row / chunk_bytes(256))
    if several > 1 and chunks <= GROUPS:
        return Shape(256, several, chunks)
    room = gpu.shared_bytes - SCRATCH
    team = 2 if gpu.clusters and 2 * row > 3 * room else 1
    own = slot_bytes(part_of(vocab, element, team), element)
    chunks = math.ceil(own / chunk_bytes(512)) if own <= room else room // chunk_bytes(512)
    return Shape(512, 1, min(chunks, GROUPS), team)


def slot_bytes(elements: int, element: int) -> int:
    piece = WARP * VECTOR
    return math.ceil(elements * element // VECTOR * VECTOR / piece) * piece


def part_of(vocab: int, element: int, team: int) -> int:
    """The elements of a block, the larger of a team's."""
    line = 128 // element
    return vocab if team == 1 else math.ceil(vocab // 2 / line) * line


# ---- The kernels, with what was counted in their machine code --------------------------------------------------------

# Of the engine on chip, as counted in a build of it, until a record has it.
ON_CHIP = {
    "sm_80": {"sum on chip": 5.25, "map on chip": 5.59, "zero": 0.66},
    "sm_90a": {"sum on chip": 5.12, "map on chip": 5.59, "zero": 0.62},
    "sm_100": {"sum on chip": 5.03, "map on chip": 5.41, "zero": 0.44},
}
RESCALES = 1 / 32  # exponentials per element, beside its own, of a sweep that sums


@cache
def newest_record() -> list[dict[str, Any]]:
    files = [[json.loads(line) for line in p.read_text().splitlines()] for p in sorted(MACHINE_CODE.glob("*.jsonl"))]
    return max(files, key=lambda records: str(records[0]["date"]))


def counted(gpu: Gpu, kernel: str, element: int) -> dict[str, Sweep]:
    """The loops of a kernel of plain rows, by kind."""
    wanted = {"architecture": gpu.architecture, "kernel": kernel, "dtype": DTYPES[element], "transform": ""}
    found = [r["instructions_per_element"] for r in newest_record() if wanted.items() <= r.items()]
    if kernel == "on_chip_kernel" and not found:
        found = [ON_CHIP[gpu.architecture]]
    exponentials = {"sum": 1 + RESCALES, "map": 1.0}
    return {kind: Sweep(count, exponentials.get(kind.split()[0], 0.0)) for kind, count in found[0].items()}


def stats(gpu: Gpu, vocab: int, n: int = N, element: int = 2) -> Kernel:
    threads, blocks, *_ = stream_shape(vocab)
    loops = counted(gpu, "stats_kernel", element)
    return Kernel(threads, blocks, even_grid(gpu, n, blocks), sums=loops["sum"])


def grad(gpu: Gpu, vocab: int, n: int = N, element: int = 2) -> Kernel:
    threads, blocks, *_ = stream_shape(vocab)
    loops = counted(gpu, "grad_kernel", element)
    return Kernel(threads, blocks, even_grid(gpu, n, blocks), maps=loops["map"], zeros=loops["zero"])


def two_sweeps(gpu: Gpu, vocab: int, n: int = N, element: int = 2) -> Kernel:
    threads, blocks, *_ = two_sweep_shape(gpu, vocab, element)
    loops = counted(gpu, "loss_and_grad_kernel", element)
    grid = even_grid(gpu, n, blocks)
    return Kernel(threads, blocks, grid, sums=loops["sum"], maps=loops["map"], zeros=loops["zero"])


def one_pass(gpu: Gpu, vocab: int, n: int = N, element: int = 2) -> Kernel:
    shape = on_chip_shape(gpu, vocab, element)
    if shape is None:
        return two_sweeps(gpu, vocab, n, element)
    loops = counted(gpu, "on_chip_kernel", element)
    row = part_of(vocab, element, shape.team) * element
    on_chip = min(row, shape.chunks * chunk_bytes(shape.threads))
    at_a_time = shape.blocks * gpu.multiprocessors
    few = (row - on_chip) * gpu.multiprocessors <= gpu.l2_bytes // 8
    return Kernel(
        shape.threads,
        shape.blocks,
        grid=min(shape.team * n, at_a_time) if few else even_grid(gpu, shape.team * n, shape.blocks),
        sums=loops["sum on chip"],
        maps=loops["map on chip"],
        zeros=loops["zero"],
        latency=250,  # a token's numbers are on chip
        row_instructions=450,
        on_chip=on_chip,
        announced=AHEAD // shape.blocks,
        announced_from=0.0,
    )


def copy(gpu: Gpu) -> Kernel:
    """As many small blocks as there may be, which wait for nothing but memory."""
    return Kernel(256, 8, 8 * gpu.multiprocessors, maps=Sweep(0.5), latency=0, row_instructions=0)


# ---- What is shown ---------------------------------------------------------------------------------------------------


class Mode(NamedTuple):
    name: str
    kernels: tuple[Callable[[Gpu, int, int, int], Kernel], ...]
    small: int  # launches beside these
    masked: float = 0.0


MODES = (
    Mode("one pass", (one_pass,), 1),
    Mode("75 % masked", (one_pass,), 1, masked=0.75),
    Mode("one pass, two sweeps", (two_sweeps,), 2),
    Mode("two phase", (stats, grad), 1),
    Mode("forward only", (stats,), 1),
)


def run_of(
    kernel: Callable[[Gpu, int, int, int], Kernel], gpu: Gpu, vocab: int, n: int, element: int, **given: Any
) -> Run:
    """A team's rows are as many shorter ones."""
    shape = on_chip_shape(gpu, vocab, element) if kernel is one_pass else None
    team = shape.team if shape else 1
    return Run(gpu, kernel(gpu, vocab, n, element), part_of(vocab, element, team), team * n, element, **given)


def ratios(gpu: Gpu, vocab: int, modes: Iterable[Mode] = MODES, n: int = N, element: int = 2) -> list[str]:
    """To a copy or, of a mode that writes nothing, a read: in step and apart."""
    asked = [(mode, assume) for mode in modes for assume in (IN_STEP, APART)]
    runs = [[run_of(k, gpu, vocab, n, element, masked=m.masked, assume=a) for k in m.kernels] for m, a in asked]
    left = iter(times([run for of_mode in runs for run in of_mode]))
    out: list[str] = []
    for (mode, assume), of_mode in zip(asked, runs, strict=True):
        time = sum(next(left) for _ in of_mode) + mode.small * assume.small_launch
        out.append(f"{time / (of_mode[-1].floor + assume.launch):.2f}")
    return [f"{a} / {b}" for a, b in zip(out[::2], out[1::2], strict=True)]


# A mode of bench/cases.py by the name that it has here.
MEASURED = {"separate": "one pass", "inplace": "one pass", "two_phase": "two phase", "forward": "forward only"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def beside(records: Iterable[dict[str, Any]]) -> str | None:
    """What was measured of the CUDA kernels beside what is predicted; None where the records have no GPU known here."""
    rows = []
    cases, modes = {case.name: case for case in GPU_CASES}, {mode.name: mode for mode in MODES}
    for r in last(records):
        gpu = next((gpu for name, gpu in GPUS.items() if name in r["device"]), None)
        ratio = r.get("ratio_to_read" if r["mode"] == "forward" else "ratio_to_copy")
        ours = (r["contender"], r["backend"]) == ("fused", "cuda") and r["mode"] in MEASURED and r["case"] in cases
        if gpu is None or not ours or ratio is None:
            continue
        mode = modes[MEASURED[r["mode"]]]._replace(masked=cases[r["case"]].masked)
        (predicted,) = ratios(gpu, r["vocab"], [mode], r["n"], BYTES[r["dtype"]])
        rows.append([f"{r['case']} {r['dtype']}, {r['loss']}", r["mode"], f"{ratio:.2f}", predicted])
    return markdown(["", "mode", "measured", "predicted, in step / apart"], rows) if rows else None


NOTHING = "no measurement of a GPU that this model knows"


def newest_beside(folder: Path) -> str | None:
    """Of the newest record there of a GPU."""
    found = [r for path in sorted(folder.glob("*.jsonl")) if (r := read(path)) and r[0]["device_type"] == "cuda"]
    return beside(max(found, key=lambda records: str(records[0]["date"]))) if found else None


def shape_of(gpu: Gpu, vocab: int, element: int = 2) -> str:
    kernel, shape = one_pass(gpu, vocab, element=element), on_chip_shape(gpu, vocab, element)
    team = shape.team if shape else 1
    share = kernel.on_chip / (part_of(vocab, element, team) * element)
    on_chip = f"{share:.0%} on chip" if kernel.on_chip else "two sweeps"
    return f"{'pairs of ' if team == 2 else ''}{kernel.blocks} x {kernel.threads}, {on_chip}"


def predictions(gpus: Iterable[Gpu]) -> str:
    rows = [[gpu.name, str(vocab), shape_of(gpu, vocab), *ratios(gpu, vocab)] for gpu in gpus for vocab in VOCABULARIES]
    return markdown([f"bf16, N = {N}", "V", "blocks x threads", *(mode.name for mode in MODES)], rows)


def count_of(kernel: Kernel) -> float:
    return sum(sweep.instructions for sweep in (kernel.sums, kernel.maps) if sweep)


def budgets(gpus: Iterable[Gpu]) -> str:
    """Instructions per bf16 element: what is issued while memory moves one, and what kernels have."""
    rows: list[list[str]] = []
    for gpu in gpus:
        issued = 128 * gpu.multiprocessors * gpu.ghz  # per ns
        on_chip, swept, read = (k(gpu, VOCABULARIES[0]) for k in (one_pass, two_sweeps, stats))
        counts = (4 * issued / gpu.copy, count_of(on_chip), count_of(swept), 2 * issued / gpu.read, count_of(read))
        rows.append([gpu.name, *(f"{count:.1f}" for count in counts)])
    return markdown(["", "while it is copied", "on chip", "two sweeps", "while it is read", "forward only"], rows)


class Published(NamedTuple):
    what: str
    ms: float
    gpu: Gpu
    kernel: Kernel
    n: int
    vocab: int
    element: int = 2


# Threads, blocks and loops: as read in their sources; instructions: as counted in what these compile to. Of the first
# two times of an H100 below the copy, notes name no source.
LIGER = Kernel(1024, 1, 132, sums=Sweep(9.3, 1.1), maps=Sweep(14.8, 1), latency=1500, row_instructions=400)
PUBLISHED = (
    Published("copy, 8192x32000", 2 * 8192 * 32000 * 2 / 3000 / 1e6, H100, copy(H100), 8192, 32000),
    Published(
        "softmax, one block, nothing ahead: 84 % of a clone",
        2 * 8192 * 32768 * 2 / (0.84 * 3000) / 1e6,
        H100,
        Kernel(512, 1, 132, Sweep(3), Sweep(3), on_chip=65536, ahead=False, latency=300, row_instructions=100),
        8192,
        32768,
    ),
    # 0.80 ms with its three synchronisations, which take about 0.08
    Published("Liger cross entropy (Triton), 8192x32000", 0.7975 - 0.08, H100, LIGER, 8192, 32000),
    Published(  # linkedin/Liger-Kernel#1279
        "Liger cross entropy (Triton), 8192x128256 fp32",
        1.788,
        B200,
        replace(LIGER, grid=148, window=128),
        8192,
        128256,
        4,
    ),
    Published(  # its page, see Gpu
        "quack softmax, 8192x16384: 3.01 TB/s",
        2 * 8192 * 16384 * 2 / 3010 / 1e6,
        H100,
        Kernel(128, 6, 792, Sweep(4, 1), Sweep(3), on_chip=32768, ahead=False, latency=400, row_instructions=150),
        8192,
        16384,
    ),
    Published(  # a row on a cluster of eight: rows of an eighth
        "quack forward, 8192x131072: 3.16 TB/s",
        8192 * 131072 * 2 / 3160 / 1e6,
        H100,
        Kernel(256, 2, 256, Sweep(5, 1), on_chip=32768, latency=500, row_instructions=150, multiprocessors=128),
        8 * 8192,
        131072 // 8,
    ),
)


def calibration() -> str:
    runs = [Run(p.gpu, p.kernel, p.vocab, p.n, p.element, assume=a) for p in PUBLISHED for a in (IN_STEP, APART)]
    ms = [time / 1e6 for time in times(runs)]
    rows: list[list[str]] = []
    for p, in_step, apart in zip(PUBLISHED, ms[::2], ms[1::2], strict=True):
        nearest = min((in_step, apart), key=lambda t: abs(t - p.ms))
        cells = (f"{t:.3f} ms" for t in (p.ms, in_step, apart))
        rows.append([f"{p.what}, {p.gpu.name}", *cells, f"{nearest / p.ms - 1:+.0%}"])
    return markdown(["", "published", "in step", "apart", "the nearer is off by"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, help="default: all")
    parser.add_argument("--calibrate", action="store_true", help="beside published times")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="beside what its newest record has of this GPU")
    parser.add_argument("--write", action="store_true", help=f"all tables into {PAGE.name}")
    options = parser.parse_args(argv)
    gpus = [GPUS[options.gpu]] if options.gpu else list(GPUS.values())
    if options.write:
        texts = {"model": predictions(gpus), "model-budgets": budgets(gpus), "model-calibration": calibration()}
        texts["model-measured"] = newest_beside(RESULTS) or NOTHING
        PAGE.write_text(spliced(PAGE.read_text(), texts)[0])
    elif options.beside:
        print(newest_beside(options.beside) or NOTHING)
    elif options.calibrate:
        print(calibration())
    else:
        print(predictions(gpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
