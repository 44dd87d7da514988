"""What the CUDA kernels compile to, which no GPU is needed for: instructions per element of their loops, as records.

    python bench/machine_code.py                              # of the installed fused_losses._cuda
    python bench/machine_code.py --module PATH --commit ID    # of another build, to compare with

Memory feeds a kernel so many elements per clock. With more instructions per element than the processors issue in that
time a kernel is not bound by memory; with fewer it may be. Times are for bench/run.py to tell.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "machine_code"

WIDTH = {"float": 4, "bfloat16": 8, "float16": 8}  # elements in 16 bytes
TRANSFORMS = ("Identity", "Softcap")  # of kernels with terms

Code = list[tuple[int, str]]  # address, instruction
Kernel = tuple[str, str, str, str]  # architecture, name, element type or '', transform or ''


def find_cuobjdump() -> str | None:
    """That of the triton package, else of the path."""
    spec = importlib.util.find_spec("triton")  # found, not imported: it reads its environment when it is
    packaged = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(packaged) if packaged and packaged.is_file() else shutil.which("cuobjdump")


def read(cuobjdump: str, *arguments: object) -> str:
    return subprocess.run([cuobjdump, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def named(line: str) -> tuple[str, str, str] | None:
    """(kernel, element type, transform) of a line that names a function."""
    m = re.search(r"Function :? ?.*?\d([a-z_]+_kernel|probe)(I\S*)?", line)
    if not m:
        return None
    arguments = m[2] or ""
    # stages 1 and 2 with statistics are kernels of their own, the latter by its row alone
    kernel = "statistics_objective_kernel" if m[1] == "objective_kernel" and "Squares" in arguments else m[1]
    element = "float" if arguments.startswith("If") else next((t for t in WIDTH if f"{len(t)}{t}E" in arguments), "")
    return kernel, element, next((t for t in TRANSFORMS if t in arguments), "")


def kernels_of(module: Path, cuobjdump: str) -> dict[Kernel, Code]:
    """The instructions of each kernel."""
    out: dict[Kernel, Code] = {}
    architecture, code = "", []
    for line in read(cuobjdump, "-sass", module).splitlines():
        if m := re.search(r"arch = sm_(\w+)", line):
            architecture = m[1]
        elif function := named(line):
            code = out.setdefault((architecture, *function), [])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append((int(m[1], 16), m[2]))
    return out


def registers_of(module: Path, cuobjdump: str) -> dict[Kernel, int]:
    out: dict[Kernel, int] = {}
    architecture, function = "", None
    for line in read(cuobjdump, "-res-usage", module).splitlines():
        if m := re.search(r"arch = sm_(\w+)", line):
            architecture = m[1]
        elif found := named(line):
            function = found
        elif function and (m := re.search(r"REG:(\d+)", line)):
            out[(architecture, *function)] = int(m[1])
    return out


def inner_loops(code: Code) -> list[list[str]]:
    index = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (address, text) in enumerate(code):
        m = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if m and int(m[1], 16) < address:
            spans.append((index[int(m[1], 16)], i))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for _, text in code[first : last + 1]] for first, last in inner]


def kind_of(loop: list[str]) -> tuple[str, int]:
    """What a loop over vectors does, '' for another loop, and the number of vectors."""
    loads = sum("LDG." in text and ".128" in text for text in loop)
    stores = sum("STG" in text and ".128" in text for text in loop)
    slots = sum("LDS.128" in text for text in loop)
    if slots and any("MUFU.EX2" in text for text in loop):  # else it reads the numbers of tokens
        kinds = {0: "sum on chip", slots: "map on chip"}
        return kinds.get(stores, "unknown"), slots
    kinds = {stores: "map", 2 * stores: "skewed map", 0: "zero"}
    if stores == 0:
        return ("sum" if loads else ""), loads
    return kinds.get(loads, "unknown"), stores


def additions(loop: list[str]) -> int:
    """Of numbers, of which a sum has one per element, and with moments two."""
    return sum(2 if "FADD2" in text else "FADD" in text for text in loop)


def loops_of(code: Code, element: str, check: Callable[[list[str], str, int], None] | None = None) -> dict[str, float]:
    """Instructions per element of each kind of loop over vectors: the longest where there are several, but on chip the
    shortest of those with most vectors, as the others are for the ends of rows, and a warp takes them once. Where a
    kernel has such a sum with moments and one without, the former is the sum, and the latter the mass."""
    found: dict[str, tuple[int, float]] = {}
    for loop in inner_loops(code):
        kind, vectors = kind_of(loop)
        if kind:
            elements = vectors * WIDTH[element]
            cost, on_chip = len(loop) / elements, kind.endswith("on chip")
            if kind == "sum on chip" and additions(loop) < 1.5 * elements:
                kind = "mass on chip"
            seen = (-vectors, cost) if on_chip else (0, cost)
            found[kind] = (min if on_chip else max)(found.get(kind, seen), seen)
            if check:
                check(loop, kind, elements)
    if "mass on chip" in found and "sum on chip" not in found:
        found["sum on chip"] = found.pop("mass on chip")
    return {kind: cost for kind, (_, cost) in found.items()}


def local_accesses(code: Code) -> int:
    return sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code)


def main() -> None:
    import torch
    from conditions import conditions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", type=Path, help="default: the installed fused_losses._cuda")
    parser.add_argument("--commit", help="that the module was built from; default: the checkout's")
    options = parser.parse_args()
    module, cuobjdump = options.module, find_cuobjdump()
    if module is None:
        spec = importlib.util.find_spec("fused_losses._cuda")
        if spec is None or spec.origin is None:
            parser.error("fused_losses._cuda is not built; give --module")
        module = Path(spec.origin)
    if cuobjdump is None:
        parser.error("there is no cuobjdump; the triton package has one")

    seen = conditions(torch.device("cpu"), options.commit)
    built = {"commit": seen["commit"], "dirty": seen["dirty"] and not options.commit, "date": seen["date"]}
    registers = registers_of(module, cuobjdump)
    records = []
    for key, code in sorted(kernels_of(module, cuobjdump).items()):
        architecture, kernel, element, transform = key
        facts = {"registers": registers[key], "local_accesses": local_accesses(code), "length": len(code)}
        per_element = {k: round(v, 2) for k, v in loops_of(code, element).items()} if element else {}
        records.append(
            {"architecture": f"sm_{architecture}", "kernel": kernel, "dtype": element, "transform": transform}
            | {"instructions_per_element": per_element}
            | facts
            | built
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{built['date'][:10]}-{built['commit']}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for record in records:
        if record["instructions_per_element"]:
            names = (record[k] for k in ("architecture", "kernel", "dtype", "transform"))
            print(*names, record["instructions_per_element"], record["registers"], "registers")
    print(path)


if __name__ == "__main__":
    main()
