"""A GPU as a fluid: how long a kernel takes that walks over rows of logits. Which kernels there are, model.py says.

Bytes and instructions flow, 50 ns at a time. A block goes through its rows: it sums a row as its bytes arrive, ends it
(reduction, objective), and maps it to the gradient. In a step it gets as far as its multiprocessor issues, as bytes
have arrived, and as memory takes its stores. Memory is one server with the rate of a measured copy, which the blocks
that read share alike; L2 is a latency and a rate, for what a second sweep finds there. Chance has fixed seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KB = 1024
WARP = 32

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: str
    multiprocessors: int
    ghz: float
    copy: float  # bytes per ns, read and written
    read: float  # bytes per ns
    l2_bytes: int
    l2: float  # bytes per ns, to the multiprocessors
    shared_bytes: int  # that a block may have
    shared_bytes_of_multiprocessor: int

    @property
    def clusters(self) -> bool:
        return self.architecture != "sm_80"


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    spread: float = 0.0  # of how fast memory serves a row, as a part of it
    start: float = 0.0  # ns within which blocks start
    flight: float = 96 * KB  # bytes of loads that a multiprocessor has on their way, at most
    posted: float = 192 * KB  # bytes of its stores that wait for memory before it waits for them
    warp_instructions: float = 3.2  # per clock of a multiprocessor with any number of warps ...
    half: float = 4.6  # ... and half of that with so many
    exponentials: float = 0.9 * 16  # per clock and multiprocessor
    port: float = 0.8 * 64  # bytes per clock and multiprocessor, in one direction
    l2_share: float = 0.5  # of L2, that holds rows between their two sweeps
    launch: float = 3000.0  # ns of a kernel over the logits, and of the copy beside it
    small_launch: float = 2500.0  # ns of a kernel over N numbers


IN_STEP = Assumptions()
APART = Assumptions(spread=0.1, start=1000.0)


class Sweep(NamedTuple):
    """Per element."""

    instructions: float
    exponentials: float = 0.0


ZEROS = Sweep(0.62)


@dataclass(frozen=True)
class Kernel:
    """What a launch does with rows. `sums` and `maps` are one sweep each: a kernel that has both makes two."""

    threads: int
    blocks: int  # per multiprocessor
    grid: int
    sums: Sweep | None = None
    maps: Sweep | None = None
    zeros: Sweep = ZEROS  # of a masked row's gradient
    latency: float = 500.0  # ns at the end of a row in which its block does nothing ...
    row_instructions: float = 350.0  # ... beside so many per thread
    on_chip: int = 0  # bytes of a row that stay there
    ahead: bool = True  # a sweep that maps them loads as many of the next row
    announced: int = 0  # bytes of the next row that are brought to L2 ...
    announced_from: float = 1.0  # ... from this part of the first sweep on
    window: float = 64.0  # bytes per thread that are loaded at a time where they do not stay
    multiprocessors: int = 0  # that it runs on; 0: all


@dataclass(frozen=True)
class Run:
    gpu: Gpu
    kernel: Kernel
    vocab: int
    n: int
    element: int = 2
    masked: float = 0.0  # of the rows
    assume: Assumptions = IN_STEP

    @property
    def floor(self) -> float:
        """ns of a copy of the logits; of a kernel that writes nothing, of a read."""
        size = self.n * self.vocab * self.element
        return 2 * size / self.gpu.copy if self.kernel.maps else size / self.gpu.read


STEP = 50.0  # ns
MEMORY_LATENCY = 450.0  # ns, from when memory has served a load until it is there
L2_LATENCY = 270.0  # ns
SAMPLE = 8  # one multiprocessor of so many is looked at, with its share of memory
SPANS = 8  # of rows, the first of each masked, as prompts are: case 8 of bench/cases.py
START, SUM, END, MAP, ZERO, DONE = range(6)  # what a block is at


class Block(NamedTuple):
    """What does not change. Here and below an array has a number for each block, or, if its name says so, each run."""

    row: Floats  # bytes
    on_chip: Floats
    ahead: Floats
    announced: Floats
    announced_from: Floats
    window: Floats
    warps: Floats
    half: Floats
    lanes: Floats  # instructions that a multiprocessor full of warps issues per ns, a thread's each
    exponentials: Floats  # per ns and multiprocessor
    port: Floats  # bytes per ns and multiprocessor
    flight: Floats
    posted: Floats
    spread: Floats
    start: Floats
    end: Floats  # ns at the end of a row
    found: Floats  # of what is swept again: the part that L2 still has
    sums: Floats  # 1 or 0
    maps: Floats


def block_of(run: Run) -> dict[str, float]:
    kernel, gpu, assume = run.kernel, run.gpu, run.assume
    row, warps = run.vocab * run.element, kernel.threads / WARP
    lanes = assume.warp_instructions * WARP * gpu.ghz
    full = lanes * kernel.blocks * warps / (kernel.blocks * warps + assume.half)
    # From a byte's first sweep to its second, which goes backwards, all blocks bring in and write as much as this one.
    reach = gpu.l2_bytes * assume.l2_share / (2 * kernel.grid)
    return {
        "row": row,
        "on_chip": kernel.on_chip,
        "ahead": kernel.ahead and kernel.on_chip > 0,
        "announced": kernel.announced,
        "announced_from": kernel.announced_from,
        "window": kernel.threads * kernel.window,
        "warps": warps,
        "half": assume.half,
        "lanes": lanes,
        "exponentials": assume.exponentials * gpu.ghz,
        "port": assume.port * gpu.ghz,
        "flight": assume.flight / kernel.blocks,
        "posted": assume.posted / kernel.blocks,
        "spread": assume.spread,
        "start": assume.start,
        "end": kernel.latency + kernel.row_instructions * kernel.threads / full,
        "found": min(1.0, reach / max(row - kernel.on_chip, 1)),
        "sums": kernel.sums is not None,
        "maps": kernel.maps is not None,
    }


def rows_of_blocks(run: Run) -> list[list[range]]:
    """The rows of each block, of each multiprocessor that is looked at."""
    kernel = run.kernel
    everywhere = min(kernel.multiprocessors or run.gpu.multiprocessors, kernel.grid)
    return [
        [range(block, run.n, kernel.grid) for block in range(first, kernel.grid, everywhere)]
        for first in range(0, everywhere, SAMPLE)
    ]


def rows_read(run: Run) -> Flags:
    span = max(run.n // SPANS, 1)
    return np.arange(run.n) % span >= int(span * run.masked)


def per_byte(runs: Sequence[Run], field: str) -> Floats:
    """Of a sweep's instructions or exponentials, by what a block is at; where nothing moves, infinite."""
    table = np.full((DONE + 1, len(runs)), 1e9)
    for i, run in enumerate(runs):
        for stage, sweep in ((SUM, run.kernel.sums), (MAP, run.kernel.maps), (ZERO, run.kernel.zeros)):
            if sweep:
                table[stage, i] = getattr(sweep, field) / run.element
    return table


class Fluid:
    """Runs side by side, which know nothing of each other."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        machines = [(i, blocks) for i, run in enumerate(runs) for blocks in rows_of_blocks(run)]
        blocks = [(i, rows) for i, of_machine in machines for rows in of_machine]
        self.run = np.array([i for i, _ in blocks])
        self.first_of_run = np.searchsorted(self.run, np.arange(len(runs)))
        counts = [len(of_machine) for _, of_machine in machines]
        self.machine = np.repeat(np.arange(len(machines)), counts)
        self.first_of_machine = np.cumsum([0, *counts[:-1]])

        table = [block_of(run) for run in runs]
        self.block = Block(**{k: np.array([float(b[k]) for b in table])[self.run] for k in Block._fields})
        self.instructions = per_byte(runs, "instructions")[:, self.run]
        self.exponentials = per_byte(runs, "exponentials")[:, self.run]
        self.turns = np.array([len(rows) for _, rows in blocks])
        self.reads = np.zeros((self.turns.max() + 2, len(blocks)), bool)
        read = [rows_read(run) for run in runs]
        for b, (i, rows) in enumerate(blocks):
            self.reads[: len(rows), b] = read[i][rows.start :: rows.step]
        dice = [np.random.default_rng(0) for _ in runs]  # the same for each, whatever runs beside it
        self.late = np.concatenate([d.random(np.count_nonzero(self.run == i)) for i, d in enumerate(dice)])
        noise = [d.standard_normal((len(self.reads), np.count_nonzero(self.run == i))) for i, d in enumerate(dice)]
        self.favour = np.exp(self.block.spread * np.hstack(noise))

        share_of_run = self.of_run(self.turns) / [run.n for run in runs]
        self.rate_of_run = share_of_run * [run.gpu.copy if run.kernel.maps else run.gpu.read for run in runs]
        self.l2_of_run = share_of_run * [run.gpu.l2 for run in runs]
        self.start()

    def of_run(self, values: NDArray[Any]) -> Floats:
        sums: Floats = np.add.reduceat(values, self.first_of_run, dtype=float)
        return sums

    def this_turn(self, table: NDArray[Any], ahead: int = 0) -> NDArray[Any]:
        """Of a table with a line for each turn."""
        line: NDArray[Any] = table[self.turn + ahead, np.arange(len(self.run))]
        return line

    def start(self) -> None:
        blocks, runs = len(self.run), len(self.runs)
        self.stage = np.full(blocks, START)
        self.turn = np.zeros(blocks, int)
        self.timer = self.block.start * self.late  # ns
        self.done = np.zeros(blocks)  # bytes of the row in this sweep
        self.base = np.zeros(blocks)  # bytes of the rows before it, of those that are read
        self.asked = np.zeros(blocks)  # bytes of all rows
        self.served = np.zeros(blocks)
        self.stores = np.zeros(blocks)  # bytes that memory has not taken yet
        self.past = np.zeros((round(MEMORY_LATENCY / STEP), blocks))  # of what was served
        self.missed_of_run = np.zeros(runs)  # bytes that L2 had no longer
        self.queue_of_run = np.zeros(runs)  # ns that memory is behind
        self.spare_of_run = self.l2_of_run.copy()  # what L2 has left for what is swept again

    def times(self) -> Floats:
        """ns of each run, without its launch."""
        times = np.zeros(len(self.runs))
        step = 0
        while (times == 0).any():
            step += 1
            self.arrived = self.past[step % len(self.past)].copy()
            self.timer -= STEP
            self.move()
            self.ask()
            self.serve()
            self.past[step % len(self.past)] = self.served
            self.go_on()
            still = self.of_run((self.stage != DONE) | (self.stores > KB))
            times[(still == 0) & (times == 0)] = step * STEP
        return times

    def move(self) -> None:
        """How far each block gets."""
        block, stage = self.block, self.stage
        maps, both = stage == MAP, block.sums > 0
        self.writes = maps | (stage == ZERO)
        self.streams = (stage == SUM) | (maps & ~both)  # from memory
        rest = np.where(maps & both, block.row - block.on_chip, 0)  # swept again first
        again = self.done < rest
        self.freed = np.where(maps & (block.ahead > 0), np.maximum(self.done - rest, 0), -1)  # for the next row

        part = np.minimum(self.issued(), np.where(again, rest, block.row) - self.done)
        part = np.where(again, np.minimum(part, self.swept_again(again)), part)
        part = np.where(self.streams, np.minimum(part, self.arrived - self.base - self.done), part)
        part = np.where(self.writes, np.minimum(part, block.posted - self.stores), part)
        # A copy that can't be issued holds up what comes behind it.
        room = self.arrived + block.flight - (self.base + block.row + self.freed)
        copies = (self.freed >= 0) & ~again & self.this_turn(self.reads, 1)
        part = np.maximum(np.where(copies, np.minimum(part, room), part), 0)

        self.done += part
        self.stores += np.where(self.writes, part, 0)
        self.missed_of_run += self.of_run(np.where(again, (1 - block.found) * part, 0))

    def issued(self) -> Floats:
        """Bytes of a step, for which a multiprocessor's blocks share its instructions, exponentials and port."""
        block, at = self.block, (self.stage, np.arange(len(self.stage)))
        active = np.add.reduceat(self.writes | self.streams, self.first_of_machine, dtype=float)[self.machine]
        instructions = self.instructions[at] * (active * block.warps + block.half) / (block.lanes * block.warps)
        exponentials = active * self.exponentials[at] / block.exponentials
        bytes_: Floats = STEP / np.maximum(np.maximum(instructions, exponentials), active / block.port)
        return bytes_

    def swept_again(self, again: Flags) -> Floats:
        """Bytes of a step, from L2 or, where that has them no longer, from memory."""
        missed = MEMORY_LATENCY + self.queue_of_run[self.run]
        wait = self.block.found * L2_LATENCY + (1 - self.block.found) * missed
        of_l2 = (self.spare_of_run / np.maximum(self.of_run(again), 1))[self.run]
        bytes_: Floats = STEP * np.minimum(self.block.window / wait, of_l2)
        return bytes_

    def ask(self) -> None:
        """What each block wants of memory by now."""
        block, stage = self.block, self.stage
        reads, next_reads = self.this_turn(self.reads), self.this_turn(self.reads, 1)
        wanted = np.where(self.streams, np.minimum(block.row, np.maximum(block.on_chip, self.done + block.window)), 0)
        wanted = np.where((stage == START) & reads, block.on_chip, wanted)
        wanted = np.where((self.freed >= 0) & next_reads, block.row + self.freed, wanted)
        wanted = np.minimum(self.base + wanted, self.arrived + block.flight)
        announces = (
            (stage == END) | (stage == ZERO) | ((stage == SUM) & (self.done >= block.announced_from * block.row))
        )
        announced = self.base + block.row * reads + block.announced
        wanted = np.where(announces & next_reads & (block.announced > 0), announced, wanted)
        self.asked = np.maximum(self.asked, wanted)

    def serve(self) -> None:
        """What memory does: loads, stores and misses get of its time as much as there is of them."""
        backlog = self.asked - self.served
        demand_of_run = self.of_run(backlog + self.stores) + self.missed_of_run
        part_of_run = np.minimum(1, self.rate_of_run * STEP / np.maximum(demand_of_run, 1))
        given = self.shared(backlog, part_of_run * self.of_run(backlog))
        self.served += given
        self.stores *= 1 - part_of_run[self.run]
        self.missed_of_run *= 1 - part_of_run
        self.queue_of_run = demand_of_run * (1 - part_of_run) / self.rate_of_run
        self.spare_of_run = np.maximum(self.l2_of_run - self.of_run(given) / STEP, 0.2 * self.l2_of_run)

    def shared(self, wanted: Floats, left_of_run: Floats) -> Floats:
        """All that want get the same, but for favours; what one does not need goes to the others."""
        given = np.zeros_like(wanted)
        favour = self.this_turn(self.favour)
        for _ in range(4):
            weight = np.where(wanted - given > 1e-6, favour, 0)
            each_of_run = left_of_run / np.maximum(self.of_run(weight), 1e-6)
            more = np.minimum(wanted - given, each_of_run[self.run] * weight)
            given += more
            left_of_run = left_of_run - self.of_run(more)
        return given

    def go_on(self) -> None:
        """From one thing to the next, and from row to row."""
        block, whole, timed = self.block, self.done >= self.block.row - 1, self.timer <= 0
        summed, ended = (self.stage == SUM) & whole, (self.stage == END) & timed
        through = (self.writes & whole) | (ended & (block.maps == 0))
        begins = through | ((self.stage == START) & timed)
        reads = self.this_turn(self.reads)
        self.base[through] += (block.row * reads)[through]
        self.turn[through] += 1
        self.stage[summed] = END
        self.stage[ended] = MAP
        reads = self.this_turn(self.reads)
        first = np.where(reads, np.where(block.sums > 0, SUM, END), np.where(block.maps > 0, ZERO, END))
        self.stage[begins] = np.where(self.turn == self.turns, DONE, first)[begins]
        ends = summed | (begins & (self.stage == END))
        self.timer[ends] = block.end[ends]
        self.done[summed | ended | begins] = 0


def times(runs: Sequence[Run], at_once: int = 24) -> list[float]:
    """ns of each run with its launch. Those of like length go side by side."""
    out = [0.0] * len(runs)
    order = sorted(range(len(runs)), key=lambda i: runs[i].floor)
    for first in range(0, len(order), at_once):
        some = order[first : first + at_once]
        for i, time in zip(some, Fluid([runs[i] for i in some]).times(), strict=True):
            out[i] = float(time) + runs[i].assume.launch
    return out
