"""What the Triton kernels compile to, without a GPU: registers, spills, vector width and instructions per element.

    python tests/triton_backend/compiled.py            a table, of the Triton that this Python has
    python tests/triton_backend/compiled.py --json     what test_triton_compiled.py looks at

A process of its own, as Triton can't both interpret and compile in one. The backend's launches are compiled for a given
architecture and not run, so that what is examined is exactly what the backend would launch. The same process counts the
variants that a series of calls compiles.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).parent.parent))

from triton_objectives import NUM_INPUTS, WEIGHTED_SUM

from fused_losses.backends import triton as backend
from fused_losses.backends.triton import BACKEND
from fused_losses.objectives import OBJECTIVES, Objective
from fused_losses.problem import (
    Coefficients,
    Problem,
    Stats,
    Targets,
    Terms,
    Transform,
    coefficients_shape,
    stats_shape,
)
from fused_losses.terms import KL_TYPES

MACHINES = {80: (108, 40), 90: (132, 50), 100: (148, 126)}  # processors, MiB of L2
PLAIN = Terms()
ALL_STAGES = "one pass, stats, objective, grad, scale"


class Driver:
    """As much of a driver as compiling asks for. The device's number is its architecture."""

    arch = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


DRIVER = Driver()
LAUNCHES: list[tuple[str, tuple[int, ...], Any]] = []


def compile_only() -> None:
    run = JITFunction.run

    def compiled(self: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **options: object) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        LAUNCHES.append((self.__name__, grid, kernel))
        return kernel

    JITFunction.run = compiled
    driver.set_active(DRIVER)
    backend._machine = lambda device: backend._Machine(MACHINES[DRIVER.arch][0], MACHINES[DRIVER.arch][1] << 20)


def launch(
    logits: torch.Tensor,
    stages: str = ALL_STAGES,
    objective: Objective = OBJECTIVES["ppo"],
    bounds: tuple = (0.8, 1.2),
    limits: tuple = (float("inf"),) * 3,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    column: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    terms: Terms = PLAIN,
    inputs: tuple | None = None,
) -> Problem:
    backend._walk.cache_clear()
    n = logits[..., 0].numel()
    column = torch.zeros(n) if column is None else column
    targets = torch.zeros(n, dtype=torch.int64) if targets is None else targets
    if inputs is None:
        columns = objective.columns
        inputs = (column, column)[: len(objective.inputs)] + bounds[: len(objective.bounds)]
        inputs += limits[: len(columns) - len(inputs)]
    problem = Problem(
        Targets(targets, ignore_index, shares),
        Transform(temperature, softcap),
        column,
        objective,
        inputs,
        terms,
        torch.ones(()),
        logits.shape[-1],
        False,
    )
    stats = Stats(torch.empty(stats_shape(n, problem.targets.num, problem.plain)))
    coefficients = Coefficients(torch.empty(coefficients_shape(n, problem.plain)))
    gradient = torch.empty(logits.shape, dtype=logits.dtype)
    if "one pass" in stages:
        BACKEND.normaliser(problem)
        BACKEND.loss_and_grad(logits, problem, gradient)
    if "stats" in stages:
        BACKEND.stats(logits, problem)
    if "objective" in stages:
        BACKEND.objective(stats, problem, True)
    if "grad" in stages:
        BACKEND.grad(logits, problem.targets, problem.transform, stats, coefficients, column, gradient)
    if "scale" in stages:
        BACKEND.scale(gradient, torch.ones(1))
    return problem


# ---- What each kernel compiles to ----


def kernels(everything: bool) -> list[dict[str, Any]]:
    """Of every stage, on every architecture; else a sample of them."""
    found: list[dict[str, Any]] = []

    def record(arch: int, vocab: int, dtype: torch.dtype, case: str = "", stages: str = ALL_STAGES) -> None:
        DRIVER.arch = arch
        LAUNCHES.clear()
        stages = ALL_STAGES if everything else stages
        problem = launch(torch.empty(4, vocab, dtype=dtype), stages, **cases[case])
        for name, _, kernel in LAUNCHES:
            facts = {"kernel": name, "case": case, "arch": arch, "vocab": vocab}
            facts |= {"dtype": str(dtype).removeprefix("torch."), "warps": kernel.metadata.num_warps}
            walk = backend._walk(vocab, dtype.itemsize, torch.device("cpu"), backend._kind(problem))
            facts["one_shot"] = walk.one_shot
            found.append(facts | examine(kernel.asm["cubin"]))

    several = {"targets": torch.zeros(4, 5, dtype=torch.int64), "shares": torch.zeros(4, 5)}
    cross_entropy = {"objective": OBJECTIVES["cross_entropy"]}
    kl = {"kl_type": "k3", "kl_coef": 0.1, "ref_logprobs": torch.zeros(4)}
    cases: dict[str, dict[str, Any]] = {
        "": {},
        "entropy": {"terms": Terms(entropy=True, entropy_coef=0.1, **kl)},
        "smoothed": {"terms": Terms(label_smoothing=0.1, z_loss=0.1)} | cross_entropy,
        "capped": {"softcap": 30.0},
        "capped entropy": {"softcap": 30.0, "terms": Terms(entropy=True, entropy_coef=0.1)},
        "targets": several | {"softcap": 30.0, "terms": Terms(label_smoothing=0.1)} | cross_entropy,
    }
    half, single = torch.bfloat16, torch.float32
    for arch in MACHINES:
        for vocab in (32000, 50304, 128256, 151936, 50257, 151643):
            record(arch, vocab, half, "", ALL_STAGES if arch == 90 else "one pass")
        for vocab in (32000, 128256, 151936, 151643):
            record(arch, vocab, single, "", ALL_STAGES if arch == 90 else "one pass")
    for case in list(cases)[1:]:
        for vocab in (8192, 128256, 50257):
            record(90, vocab, half, case, "one pass, stats, grad")
        record(90, 128256, single, case, "one pass, stats, grad")
    for arch in (80, 100):
        record(arch, 151643, half, "entropy", "one pass")
        record(arch, 151643, half, "targets", "one pass")
    if everything:
        for arch in MACHINES:
            for case in cases:
                for vocab in (8192, 50257, 128256):
                    record(arch, vocab, half, case)
                    record(arch, vocab, single, case)
    return found


def every_variant_compiles() -> None:
    """Each objective, with bounds as numbers and as columns; each KL; other dtypes of logits and targets."""
    DRIVER.arch = 90
    for objective in OBJECTIVES.values():
        launch(torch.empty(4, 64), "one pass, objective", objective)
        launch(torch.empty(4, 64), "objective", objective, bounds=(torch.zeros(4), torch.zeros(4)))
    for kl_type in KL_TYPES:
        launch(torch.empty(4, 64), "one pass, objective", terms=Terms(kl_type=kl_type, kl_weighted_by_ratio=True))
    launch(torch.empty(4, 63, dtype=torch.float16), targets=torch.zeros(4, dtype=torch.int32))


def grids() -> dict[str, list[int]]:
    LAUNCHES.clear()
    launch(torch.empty(70_000, 3), "one pass, stats, grad")
    return {name: list(grid) for name, grid, _ in LAUNCHES}


# ---- How many variants a series of calls compiles ----


def odd() -> None:
    column, targets = torch.zeros(400), torch.zeros(400, dtype=torch.int64)
    logits = torch.empty(33, 33001, dtype=torch.bfloat16)
    for n in (1, 2, 15, 16, 33):
        launch(logits[:n])
    launch(torch.empty(2, 40007, dtype=torch.bfloat16), temperature=0.7, bounds=(1.0, 16.0))
    for ignore_index in (0, 1, 16, 2**40):
        launch(logits[:2], ignore_index=ignore_index)
    for values in (column[1:5], column[::3][:4], column[::16][:4], column[:1].expand(4), column[::100]):
        launch(logits[:4], column=values, targets=targets[1:5])


def slices() -> None:
    for length in (1, 2, 3, 17, 33):
        for vocab in (33008, 40000):
            launch(torch.empty(2, length + 1, vocab, dtype=torch.bfloat16)[:, :-1])


def terms() -> None:
    column = torch.zeros(400)
    logits = torch.empty(33, 33008, dtype=torch.bfloat16)
    for n, num_targets, number in ((1, 5, 1.0), (2, 6, 16.0), (16, 7, 0.5), (33, 8, 0.0)):
        for values in (column[:n], column[1 : n + 1], column[: 3 * n : 3], column[:1].expand(n)):
            given = Terms(number, values, number, values, number, 0.1 + number, number, "k3", True, True)
            shares = torch.empty(n * num_targets + 1)[1:].view(n, num_targets)
            targets = torch.zeros(n * num_targets + 1, dtype=torch.int64)[1:].view(n, num_targets)
            limits = (number, number, number)
            softcap = 1.0 + number
            launch(
                logits[:n], column=values, targets=targets, shares=shares, softcap=softcap, terms=given, limits=limits
            )


def custom() -> None:
    """The objective's inputs are a number and columns, alternately."""
    column = torch.zeros(400)
    for n, number in ((1, 1.0), (4, 16.0), (33, 0.0)):
        for values in (column[:n], column[1 : n + 1], column[: 3 * n : 3], column[0]):
            inputs = tuple(values if i % 2 else number for i in range(NUM_INPUTS))
            launch(torch.empty(n, 40), objective=WEIGHTED_SUM, inputs=inputs)


def variants(series: Callable[[], None]) -> dict[str, int]:
    DRIVER.arch = 90
    jitted = {name: k for name, k in vars(backend._kernels()).items() if isinstance(k, JITFunction)}
    for kernel in jitted.values():
        kernel.device_caches.clear()
    series()
    return {name: len(kernel.device_caches[90][0]) for name, kernel in jitted.items()}


# ---- Machine code ----


@functools.cache  # vocabularies share kernels
def examine(cubin: bytes) -> dict[str, Any]:
    """Registers, and counts of instructions in the kernel and in each of its innermost loops."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(*command: object) -> str:
            return subprocess.run([*map(str, command), file.name], capture_output=True, text=True, check=True).stdout

        usage = output(tools / "cuobjdump", "-res-usage")
        listing = output(tools / "nvdisasm", "-c")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if target and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end + 1))
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return {
        "registers": int(registers),
        "stack": int(stack),
        **count(code),
        "loops": [count(code[begin:end]) for begin, end in innermost],
    }


def count(code: list[str]) -> dict[str, int]:
    opcodes = Counter(re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0] for instruction in code)

    def total(*parts: str) -> int:
        return sum(
            n for opcode, n in opcodes.items() if opcode.startswith(parts[0]) and all(p in opcode for p in parts)
        )

    return {
        "length": len(code),
        "instructions": len(code),
        "ex2": total("MUFU", "EX2"),
        "ldg": total("LDG"),
        "ldg128": total("LDG", ".128"),
        "stg": total("STG"),
        "stg128": total("STG", ".128"),
        "local": total("LDL") + total("STL"),
    }


def per_element(kernel: dict[str, Any], loop: dict[str, int]) -> float | None:
    """Instructions; None of a loop that does not go over a row in whole vectors."""
    elements = loop["ldg128"] * (4 if kernel["dtype"] == "float32" else 8)
    return loop["length"] / elements if elements else None


def main() -> None:
    compile_only()
    found = kernels("--json" not in sys.argv)
    if "--json" not in sys.argv:
        print(f"Triton {triton.__version__}: instructions per element of each loop over a row (w: that writes)")
        for k in found:
            loops = [f"{each:.2f}{'w' if loop['stg'] else ''}" for loop in k["loops"] if (each := per_element(k, loop))]
            shape = f"V={k['vocab']} {k['dtype']}{' one shot' if k['one_shot'] else ''}"
            print(f"{k['kernel']:14}{k['case']:16}sm_{k['arch']:<4}{shape:30}", end="")
            print(f"{k['registers']:4} registers {k['local']:3} local {k['length']:5} instructions ", *loops)
        return
    every_variant_compiles()
    series = (odd, slices, terms, custom)
    counts = {f.__name__: variants(f) for f in series}
    print(json.dumps({"kernels": found, "variants": counts, "grids": grids()}))


if __name__ == "__main__":
    main()
