"""What a GPU's memory does with the engine's data path, without the loss, and with copies written by hand: skeleton.cu.

    python bench/skeleton.py                     # every variant, as ratios to `out.copy_(logits)`; needs nvcc and sm_90
    python bench/skeleton.py --vocab 32000       # of one vocabulary

Each variant changes one thing of the engine as it is: streaming stores, copies past L1, exponentials, what is left of a
row kept in L2, 32 KB announced, a microsecond at the end of a row. The record goes to bench/results/skeleton.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conditions import conditions
from records import RESULTS

HERE = Path(__file__).resolve().parent
WARP, SLOTS, VECTOR, WIDTH = 32, 4, 16, 8  # WIDTH: bfloat16 elements in a vector
TOKENS = 4096
MICROSECOND = 1900  # clocks


class Asked(ctypes.Structure):
    """skeleton.cu"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("in", "out", "sums")),
        *((name, ctypes.c_int) for name in ("n", "vectors", "threads", "grid", "chunks", "shared_bytes")),
        *((name, ctypes.c_int) for name in ("delay", "announced", "rest_announced", "shift")),
    ]


class Shape(NamedTuple):
    """Of the engine, csrc/cuda/launch.cu."""

    threads: int
    blocks: int  # per multiprocessor
    chunks: int
    pair: bool = False


SHAPES = {
    32000: Shape(256, 3, 4),
    50176: Shape(256, 2, 7),
    128256: Shape(512, 1, 7),
    151936: Shape(512, 1, 7),
    262144: Shape(512, 1, 7, pair=True),
}
ENGINE: dict[str, int] = {"loads": 0, "stores": 1, "math": 1, "kept": 1, "delay": MICROSECOND, "announced_kb": 32}
VARIANTS: dict[str, dict[str, int]] = {
    "the engine's": {},
    "no exponentials": {"math": 0, "kept": 0},
    "nothing at a row's end": {"delay": 0},
    "2 us at a row's end": {"delay": 2 * MICROSECOND},
    "slots in another phase": {"shift": 3},
    "copies through L1": {"loads": 1},
    "bulk loads": {"loads": 2},
    "bulk stores": {"stores": 2},
    "stores as usual": {"stores": 0},
    "rest not kept": {"kept": 0},
    "rest brought to L2": {"rest_kb": 64},
    "nothing announced": {"announced_kb": 0},
    "64 KB announced": {"announced_kb": 64},
    "one block a row": {"pair": 0},
    "even grid": {"even": 1},
}
COPIES = {
    "2 KB": (1, 128, 0),
    "16 KB": (8, 128, 0),
    "16 KB, 1024 threads": (1, 1024, 0),
    "blocks that stay": (8, 512, 264),
}


def compiled(folder: Path) -> ctypes.CDLL:
    library = folder / "skeleton.so"
    flags = ("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC", "-cudart", "static")
    subprocess.run(["nvcc", *flags, "-shared", HERE / "skeleton.cu", "-o", library], check=True)
    return ctypes.CDLL(str(library))


class Bench:
    def __init__(self, library: ctypes.CDLL, vocab: int, repeats: int):
        device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(device)
        self.library, self.vocab, self.repeats = library, vocab, repeats
        self.multiprocessors = properties.multi_processor_count
        self.flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device=device)
        self.logits = torch.randn(TOKENS, vocab, device=device).bfloat16()
        self.out, self.sums = torch.empty_like(self.logits), torch.empty(TOKENS, device=device)
        self.copy = self.milliseconds(lambda: self.out.copy_(self.logits))

    def milliseconds(self, call: Callable[[], Any]) -> float:
        times = []
        for turn in range(self.repeats + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            torch.cuda._sleep(1_000_000)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:
                times.append(start.elapsed_time(end))
        return statistics.median(times)

    def skeleton(self, **variant: int) -> float:
        """Its time over a copy's."""
        asked, shape = ENGINE | variant, SHAPES[self.vocab]
        pair = bool(asked.get("pair", shape.pair))
        vectors = self.vocab // WIDTH
        own = vectors // (2 if pair else 1)
        slots = min(math.ceil(own / WARP) * WARP, SLOTS * shape.threads * shape.chunks)
        at_a_time = self.multiprocessors * shape.blocks // (2 if pair else 1)
        teams = math.ceil(TOKENS / math.ceil(TOKENS / at_a_time)) if asked.get("even") else min(TOKENS, at_a_time)
        shift = asked.get("shift", 0)
        given = Asked(
            self.logits.data_ptr(), self.out.data_ptr(), self.sums.data_ptr(), TOKENS, vectors, shape.threads,
            teams * (2 if pair else 1), shape.chunks, (slots + shift) * VECTOR, asked["delay"],
            (asked["announced_kb"] << 10) // VECTOR // shape.blocks, (asked.get("rest_kb", 0) << 10) // VECTOR, shift,
        )  # fmt: skip
        ways = (asked["loads"], asked["stores"], asked["math"], asked["kept"], int(pair))

        def call() -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            if error := self.library.run_skeleton(ctypes.byref(given), *ways, stream):
                raise RuntimeError(f"CUDA error {error}")

        return self.milliseconds(call) / self.copy

    def by_hand(self, unroll: int, threads: int, grid: int, zeros: bool = False) -> float:
        def call() -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            source = ctypes.c_void_p(None if zeros else self.logits.data_ptr())
            vectors = ctypes.c_int64(TOKENS * self.vocab // WIDTH)
            self.library.run_copy(source, ctypes.c_void_p(self.out.data_ptr()), vectors, unroll, threads, grid, stream)

        return self.milliseconds(call) / self.copy

    def all(self) -> Iterator[tuple[str, float]]:
        for name, way in COPIES.items():
            yield f"copy by hand, {name}", self.by_hand(*way)
        yield "zeros", self.by_hand(1, 128, 0, zeros=True)
        pairs = SHAPES[self.vocab].pair
        for name, variant in VARIANTS.items():
            if pairs and (variant.get("loads") or variant.get("stores") == 2):
                continue  # pairs have the engine's copies only
            if pairs or "pair" not in variant:
                yield name, self.skeleton(**variant)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, choices=SHAPES, help="default: all")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--commit", help="to put in the records where git can't tell")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        print("needs a GPU of sm_90 or newer", file=sys.stderr)
        return 1
    where = conditions(torch.device("cuda"), options.commit)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        for vocab in [options.vocab] if options.vocab else SHAPES:
            bench = Bench(library, vocab, options.repeats)
            for name, ratio in bench.all():
                print(f"{vocab:7} {name:32} {ratio:.3f}", flush=True)
                records.append({"vocab": vocab, "n": TOKENS, "what": name, "ratio_to_copy": round(ratio, 4), **where})
    out = RESULTS / "skeleton"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{where['date'][:10]}-{where['commit']}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
