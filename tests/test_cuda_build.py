"""The built CUDA module on any machine: it imports without a driver, says why it is unusable, and its machine code is
what was meant. The latter is read from the file; no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

WIDTH = {"float": 4, "bfloat16": 8, "float16": 8}  # elements in 16 bytes

# Loops over vectors that each kernel must have, by what they load and store.
LOOPS = {
    "loss_and_grad_kernel": {"sum", "map", "skewed map", "zero"},
    "stats_kernel": {"sum"},
    "grad_kernel": {"map", "skewed map", "zero"},
    "scale_kernel": {"map"},
    "terms_loss_and_grad_kernel": {"sum", "map", "skewed map", "zero"},
    "terms_stats_kernel": {"sum"},
    "terms_grad_kernel": {"map", "skewed map", "zero"},
}
TRANSFORMS = ("Identity", "Softcap")  # of kernels with terms
# Instructions per element. At its copy rate a B200 can issue 19.5 for sum and map together and 9.7 for a sum alone (an
# H200 27.6 and 13.8): with more, a kernel is not bound by memory. A softcap is not: its tanh is two thirds of all.
MOST = {
    "": {"sum": 8, "map": 8, "skewed map": 11, "zero": 1.5},
    "Identity": {"sum": 11.5, "map": 9, "skewed map": 12.5, "zero": 2},
    "Softcap": {"sum": 30.5, "map": 27.5, "skewed map": 31.5, "zero": 2},
}
# ex2 per element, and per chunk of a sum: e_j and the rescale, the tanh of both and of the maximum before and after.
EX2 = {"": (1, 1), "Identity": (1, 1), "Softcap": (2, 3)}


@pytest.fixture(scope="module")
def module() -> Path:
    spec = importlib.util.find_spec("fused_losses._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("fused_losses._cuda is not built: there was no nvcc at install time")
    return Path(spec.origin)


def in_new_process(module: Path, code: str) -> str:
    """Imports the module alone, neither torch nor fused_losses."""
    load = (
        "import importlib.util as u, pathlib\n"
        f"s = u.spec_from_file_location('_cuda', {str(module)!r}); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
    )
    done = subprocess.run([sys.executable, "-c", load + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_needs_no_driver_and_no_torch(module):
    mapped = in_new_process(module, "print(pathlib.Path('/proc/self/maps').read_text())")
    for library in ("libcudart", "libcuda.so", "libtorch", "libc10"):
        assert library not in mapped


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_why_without_a_device(module):
    reason = in_new_process(module, "print(m.unusable(0))")
    assert "no NVIDIA driver" in reason or "no CUDA device" in reason
    assert ";" in reason, "a cause, then what to do about it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_launch_without_a_device_raises(module):
    code = "try: m.scale((0, 1, 1, 8, 8), 0, 8, 0, 0)\nexcept RuntimeError as e: print(e)"
    assert "cudaError" in in_new_process(module, code)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_says_whether_a_device_is_usable(module):
    from fused_losses import _cuda

    assert _cuda.unusable(0) == ""
    assert "no CUDA device 999" in _cuda.unusable(999)


# ---- machine code ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")  # found, not imported: it reads its environment when it is
    packaged = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    if packaged and packaged.is_file():
        return str(packaged)
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("there is no cuobjdump; the triton package has one")
    return found


def read(cuobjdump: str, *arguments: object) -> str:
    return subprocess.run([cuobjdump, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


Code = list[tuple[int, str]]  # address, instruction
Kernel = tuple[str, str, str, str]  # architecture, name, element type or '', transform or ''

TYPE = r"(?:f|NS_\d+[a-zA-Z]\w*?E)"


@pytest.fixture(scope="module")
def kernels(module, cuobjdump) -> dict[Kernel, Code]:
    """Its instructions."""
    out: dict[Kernel, Code] = {}
    architecture, code = "", []
    for line in read(cuobjdump, "-sass", module).splitlines():
        if m := re.search(r"arch = sm_(\w+)", line):
            architecture = m[1]
        elif m := re.search(rf"Function : .*?\d([a-z_]+_kernel|probe)(?:I({TYPE}*)E)?", line):
            types = [t[1] or "float" for t in re.finditer(r"f|NS_\d+([a-zA-Z0-9]+?)E", m[2] or "")]
            transform = next((t for t in types if t in TRANSFORMS), "")
            element = next((t for t in types if t in WIDTH), "")
            code = out.setdefault((architecture, m[1], element, transform), [])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append((int(m[1], 16), m[2]))
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
    loads = sum("LDG" in text and ".128" in text for text in loop)
    stores = sum("STG" in text and ".128" in text for text in loop)
    kinds = {stores: "map", 2 * stores: "skewed map", 0: "zero"}
    if stores == 0:
        return ("sum" if loads else ""), loads
    return kinds.get(loads, "unknown"), stores


def test_architectures(module, cuobjdump, kernels):
    """Machine code for each architecture that the module names, and PTX for those to come."""
    named = in_new_process(module, "print(m.architectures)").split(";")
    assert {architecture for architecture, *_ in kernels} == set(named)
    assert f"sm_{named[-1]}" in read(cuobjdump, "--list-ptx", module)
    per_architecture = Counter(architecture for architecture, *_ in kernels)
    assert len(set(per_architecture.values())) == 1
    expected = {(k, e, z) for k in LOOPS for e in WIDTH for z in (TRANSFORMS if k.startswith("terms_") else ("",))}
    assert {key[1:] for key in kernels} >= expected


def test_nothing_spills(kernels):
    """Local memory is DRAM traffic that no floor counts."""
    spills = {
        key: n for key, code in kernels.items() if (n := sum(bool(re.search(r"\b(LDL|STL)\b", t)) for _, t in code))
    }
    assert not spills


def test_hot_loops(kernels):
    """16-byte accesses, few instructions per element, of which ex2 are the rarest."""
    seen: dict[Kernel, dict[str, float]] = {}
    for key, code in kernels.items():
        _, kernel, element, transform = key
        if kernel not in LOOPS:
            continue
        found = defaultdict(float)
        for loop in inner_loops(code):
            kind, vectors = kind_of(loop)
            if not kind:
                continue
            elements = vectors * WIDTH[element]
            found[kind] = max(found[kind], len(loop) / elements)
            each, chunk = EX2[transform]
            assert sum("MUFU.EX2" in text for text in loop) <= each * elements + chunk, (*key, kind)
        assert set(found) == LOOPS[kernel], key
        seen[key] = dict(found)
    print(*seen.items(), sep="\n")
    costly = {(*key, kind): n for key, kinds in seen.items() for kind, n in kinds.items() if n > MOST[key[-1]][kind]}
    assert not costly
