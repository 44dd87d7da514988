"""What the Triton kernels compile to, without a GPU: registers, spills, vector width and instructions per element.

This file runs itself in a process of its own (`main`), as Triton can't both interpret and compile in one. There the
backend's launches are compiled for a given architecture and not run, so that what is examined is exactly what the
backend would launch. The same process counts the variants that a series of calls compiles.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Instructions per element of the first and of the second sweep, without terms and with.
BOUNDS = {
    "": (8.0, 7.5),
    "entropy": (10.5, 9.5),
    "smoothed": (9.0, 7.5),
    "capped": (29.0, 29.5),
    "capped entropy": (33.0, 31.5),
    "targets": (31.5, 29.5),
}
MACHINES = {80: (108, 40), 90: (132, 50), 100: (148, 126)}  # processors, MiB of L2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = Path(__file__).parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def kernels(report: dict[str, Any], name: str, **wanted: object) -> list[dict[str, Any]]:
    found = [k for k in report["kernels"] if k["kernel"] == name and all(k[key] == v for key, v in wanted.items())]
    assert found
    return found


def describe(k: dict[str, Any]) -> str:
    return f"{k['kernel']} {k['terms']} sm_{k['arch']} V={k['vocab']} {k['dtype']}: {k['registers']} registers"


def test_nothing_spills(report: dict[str, Any]) -> None:
    for k in report["kernels"]:
        if k["vocab"] % 8 or k["terms"]:  # per row or tile, not per element: a few addresses
            sweeps = k["loops"] if k["kernel"] in ("loss_and_grad", "stats") else []
            assert k["local"] <= 32 and not any(loop["local"] for loop in sweeps), describe(k)
        else:
            assert k["local"] == 0, f"{describe(k)}, {k['local']} local accesses"


def test_two_programs_of_eight_warps_share_a_processor(report: dict[str, Any]) -> None:
    """The plan counts on it where two rows per processor fit in L2."""
    for k in kernels(report, "loss_and_grad", warps=8, one_shot=False):
        assert 2 * 256 * k["registers"] <= 65536, describe(k)


@pytest.mark.parametrize("name", ["loss_and_grad", "stats", "grad", "scale"])
def test_sweeps_use_128_bit_accesses(report: dict[str, Any], name: str) -> None:
    """For any vocabulary, an odd one included: outside the ragged ends nothing narrower touches logits."""
    for k in kernels(report, name):
        assert k["ldg128"] >= 4, describe(k)
        assert name == "stats" or k["stg128"] >= 4, describe(k)
        for loop in k["loops"]:
            if loop["ldg128"] and name in (
                "loss_and_grad",
                "stats",
            ):  # the sweeps; the others loop over rows only
                assert loop["ldg"] == loop["ldg128"] and loop["stg"] == loop["stg128"], describe(k)
        others = (24, 12) if k["terms"] else (12, 5)  # per-token numbers, ragged ends
        assert k["ldg"] - k["ldg128"] <= others[0] and k["stg"] - k["stg128"] <= others[1], describe(k)


def test_instructions_per_element(report: dict[str, Any]) -> None:
    """At copy speed an H200 has time for 13.8 a bfloat16 element forward, 27.6 with backward; a B200 for 9.7, 19.5."""
    for k in kernels(report, "loss_and_grad", one_shot=False) + kernels(report, "stats"):
        for loop in k["loops"]:
            elements = loop["ldg128"] * (8 if k["dtype"] == "bfloat16" else 4)
            if not elements:
                continue
            bound = BOUNDS[k["terms"]][loop["stg"] > 0]
            assert loop["length"] / elements <= bound, f"{describe(k)}: {loop}"
            capped = k["terms"] in ("capped", "capped entropy", "targets")  # smaller tiles, and an ex2 for tanh
            assert loop["ex2"] / elements <= (2.5 if capped else 1.25), f"{describe(k)}: {loop}"
    for k in kernels(report, "loss_and_grad", one_shot=True, terms=""):
        assert k["instructions"] / 64 <= 28, describe(k)  # of the whole kernel, code for masked rows included


@pytest.mark.parametrize("series", ["odd", "slices", "terms", "custom"])
@pytest.mark.parametrize("kernel", ["loss_and_grad", "stats", "objective", "grad", "scale", "normaliser", "reduce"])
def test_no_recompilation(report: dict[str, Any], kernel: str, series: str) -> None:
    """N, V, K, lengths, strides, thresholds, coefficients, temperature, ignore_index and the alignment of columns are
    runtime values, for any number of inputs: those of tuples, too."""
    assert report["variants"][series][kernel] == 1


def test_rows_go_to_grid_axis_0(report: dict[str, Any]) -> None:
    """Axis 0 takes 2^31 - 1 programs; the others 65535."""
    assert report["grids"]["loss_and_grad"] == [70_000]
    assert report["grids"]["stats"] == [70_000]
    assert report["grids"]["grad"] == [70_000, 1]


# The compiling process.


def main() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    from triton_objectives import NUM_INPUTS, WEIGHTED_SUM

    from fused_losses.backends import triton as backend
    from fused_losses.objectives import OBJECTIVES
    from fused_losses.terms import KL_TYPES, Terms

    OBJECTIVES[WEIGHTED_SUM.name] = WEIGHTED_SUM

    class Driver:
        """As much of a driver as compiling asks for. The device's number is its architecture."""

        arch = 90

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.arch, 32)

        def get_current_device(self) -> int:
            return self.arch

        def get_current_stream(self, device: int) -> int:
            return 0

    launches: list[tuple[str, tuple[int, ...], Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **options: object) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, grid, kernel))
        return kernel

    JITFunction.run = compile_only
    active = Driver()
    driver.set_active(active)
    backend._machine = lambda device: backend._Machine(MACHINES[active.arch][0], MACHINES[active.arch][1] << 20)

    def launch(
        logits: torch.Tensor,
        stages: str = "one pass, stats, objective, grad, scale",
        objective: str = "ppo",
        thresholds: tuple = (0.8, 1.2),
        temperature: float = 1.0,
        ignore_index: int = -100,
        column: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        terms: Terms | None = None,
        limits: tuple = (),
        inputs: tuple | None = None,
    ) -> None:
        backend._plan.cache_clear()
        n = logits[..., 0].numel()
        column = torch.zeros(n) if column is None else column
        targets = torch.zeros(n, dtype=torch.int64) if targets is None else targets
        given = OBJECTIVES[objective]
        if inputs is None:
            inputs = (column, column, *thresholds)[: len(given.inputs + given.bounds)] + limits
        num_targets = 1 if terms is None else terms.targets
        row_stats = torch.empty(3 if terms is None else num_targets + 4, n)
        coefficients = column if terms is None else torch.empty(4, n)
        shares, softcap = (None, 0.0) if terms is None else (terms.shares, terms.softcap)
        gradient = torch.empty(logits.shape, dtype=logits.dtype)
        common = (targets, objective, inputs, column, temperature, 1.0, True, ignore_index)
        if "one pass" in stages:
            backend.loss_and_grad(logits, *common, False, terms, gradient)
        if "stats" in stages:
            backend.stats(logits, targets, column, temperature, ignore_index, False, terms)
        if "objective" in stages:
            backend.objective(row_stats, *common, True, terms)
        if "grad" in stages:
            backend.grad(logits, targets, row_stats, coefficients, column, temperature, shares, softcap, gradient)
        if "scale" in stages:
            backend.scale(gradient, torch.ones(1))

    found = []

    def record(arch: int, vocab: int, dtype: torch.dtype, stages: str, case: str = "", **given: Any) -> None:
        active.arch = arch
        launches.clear()
        launch(torch.empty(4, vocab, dtype=dtype), stages, **given)
        for name, _, kernel in launches:
            if name in ("normaliser", "reduce"):
                continue
            facts = {"kernel": name, "terms": case, "arch": arch, "vocab": vocab}
            facts |= {"dtype": str(dtype).removeprefix("torch."), "warps": kernel.metadata.num_warps}
            per_element = backend._terms(given.get("terms")).per_element
            facts["one_shot"] = backend._plan(vocab, dtype.itemsize, torch.device("cpu"), per_element).one_shot
            found.append(facts | examine(kernel.asm["cubin"], Path(triton.__file__).parent))

    for arch in MACHINES:
        for dtype in (torch.bfloat16, torch.float32):
            for vocab in (32000, 50304, 128256, 151936, 50257, 151643):
                if dtype == torch.bfloat16 or vocab not in (50304, 50257):
                    record(arch, vocab, dtype, "one pass, stats, grad, scale" if arch == 90 else "one pass")
    several = {"targets": torch.zeros(4, 5, dtype=torch.int64), "objective": "cross_entropy"}
    for name, given in {
        "entropy": {"terms": Terms(entropy=True, entropy_coef=0.1, kl_type=2, kl_coef=0.1)},
        "smoothed": {"terms": Terms(label_smoothing=0.1, z_loss=0.1), "objective": "cross_entropy"},
        "capped": {"terms": Terms(softcap=30.0)},
        "capped entropy": {"terms": Terms(softcap=30.0, entropy=True, entropy_coef=0.1)},
        "targets": several | {"terms": Terms(shares=torch.zeros(4, 5), softcap=30.0, label_smoothing=0.1)},
    }.items():
        for dtype, vocab in (
            (torch.bfloat16, 8192),
            (torch.bfloat16, 128256),
            (torch.bfloat16, 50257),
            (torch.float32, 128256),
        ):
            record(90, vocab, dtype, "one pass, stats, grad", name, **given)
    for arch in (80, 100):
        record(arch, 151643, torch.bfloat16, "one pass", name, **given)

    active.arch = 90
    for objective in OBJECTIVES:  # that each compiles, with bounds as numbers and as columns
        if objective == WEIGHTED_SUM.name:
            continue
        launch(torch.empty(4, 64), "one pass, objective", objective)
        launch(torch.empty(4, 64), "objective", objective, thresholds=(torch.zeros(4), torch.zeros(4)))
    for kl_type in range(len(KL_TYPES)):
        launch(torch.empty(4, 64), "one pass, objective", terms=Terms(kl_type=kl_type, kl_weighted_by_ratio=True))
    launch(torch.empty(4, 63, dtype=torch.float16), targets=torch.zeros(4, dtype=torch.int32))

    launches.clear()
    launch(torch.empty(70_000, 3), "one pass, stats, grad")
    grids = {name: list(grid) for name, grid, _ in launches}

    jitted = {name: k for name, k in vars(backend._kernels()).items() if isinstance(k, JITFunction)}

    def variants(series: Callable[[], None]) -> dict[str, int]:
        for kernel in jitted.values():
            kernel.device_caches.clear()
        series()
        return {name: len(kernel.device_caches[90][0]) for name, kernel in jitted.items()}

    def odd() -> None:
        column, targets = torch.zeros(400), torch.zeros(400, dtype=torch.int64)
        logits = torch.empty(33, 33001, dtype=torch.bfloat16)
        for n in (1, 2, 15, 16, 33):
            launch(logits[:n])
        launch(torch.empty(2, 40007, dtype=torch.bfloat16), temperature=0.7, thresholds=(1.0, 16.0))
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
                given = Terms(number, values, number, values, number, 0.1 + number, number, 1.0 + number, None, 2, True)
                given = given._replace(entropy=True, shares=torch.empty(n * num_targets + 1)[1:].view(n, num_targets))
                targets = torch.zeros(n * num_targets + 1, dtype=torch.int64)[1:].view(n, num_targets)
                launch(logits[:n], column=values, targets=targets, terms=given, limits=(number, number, number))

    def custom() -> None:
        """The objective's inputs are a number and columns, alternately."""
        column = torch.zeros(400)
        for n, number in ((1, 1.0), (4, 16.0), (33, 0.0)):
            for values in (column[:n], column[1 : n + 1], column[: 3 * n : 3], column[0]):
                inputs = tuple(values if i % 2 else number for i in range(NUM_INPUTS))
                launch(torch.empty(n, 40), objective=WEIGHTED_SUM.name, inputs=inputs)

    series = (odd, slices, terms, custom)
    counts = {f.__name__: variants(f) for f in series}
    print(json.dumps({"kernels": found, "variants": counts, "grids": grids}))


@functools.cache  # vocabularies share kernels
def examine(cubin: bytes, triton_directory: Path) -> dict[str, Any]:
    """Registers, and counts of instructions in the kernel and in each of its innermost loops."""
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    tools = triton_directory / "backends" / "nvidia" / "bin"

    def output(*command: object) -> str:
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", output(tools / "cuobjdump", "-res-usage", path)).groups()
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in output(tools / "nvdisasm", "-c", path).splitlines():
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


if __name__ == "__main__":
    main()
