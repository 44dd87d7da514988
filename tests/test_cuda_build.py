"""The built CUDA module on any machine: it imports without a driver, says why it is unusable, and its machine code is
what was meant. The latter is read from the file; no GPU is needed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location(
    "machine_code", Path(__file__).parent.parent / "bench" / "machine_code.py"
)
machine_code = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(machine_code)

# Loops over vectors that each kernel must have, by what they load and store.
LOOPS = {
    "loss_and_grad_kernel": {"sum", "map", "skewed map", "zero"},
    "on_chip_kernel": {"sum on chip", "map on chip", "sum", "map", "skewed map", "zero"},
    "stats_kernel": {"sum"},
    "statistics_kernel": {"sum"},
    "grad_kernel": {"map", "skewed map", "zero"},
    "scale_kernel": {"map"},
}
# Instructions per element. At its copy rate a B200 can issue 19.5 for sum and map together and 9.7 for a sum alone (an
# H200 27.6 and 13.8): with more, a kernel is not bound by memory. A softcap is not: its tanh is two thirds of all.
MOST = {
    "": {"sum": 8, "map": 8, "skewed map": 11, "zero": 1.5},
    "Identity": {"sum": 11.5, "map": 9, "skewed map": 12.5, "zero": 2},
    "Softcap": {"sum": 25.5, "map": 25.5, "skewed map": 28.5, "zero": 2},
}
# What statistics add to a sum: a multiplication per element, and what becomes of the drift.
STATISTICS = 1.5
# Of the kernel that has a row on chip: of both sweeps there, which is where its time goes, and of all other loops. Of a
# softcap from sm_100 on, which has instructions for two numbers, the second line.
ON_CHIP = {
    "": {"float": 12, "bfloat16": 11.5, "float16": 11.5},
    "Identity": {"float": 17, "bfloat16": 17, "float16": 17},
    "Softcap": {"float": 23.3, "bfloat16": 28.5, "float16": 28.5},
    "Softcap, pairs": {"float": 14.75, "bfloat16": 17.35, "float16": 17.35},
}
# How many fewer of these without moments: an addition and an fma.
MOMENTS = {"Softcap": 2, "Softcap, pairs": 1}
OTHERS = {
    "": {"sum": 7.5, "map": 8, "skewed map": 11, "zero": 1.5},
    "Identity": {"sum": 11.5, "map": 10, "skewed map": 13.5, "zero": 2},
    "Softcap": {"sum": 25.5, "map": 26.5, "skewed map": 29.5, "zero": 2},
}
# Of a multiprocessor's 64K, which threads that are resident together share.
REGISTERS = {"": 80, "Identity": 128, "Softcap": 128}
# ex2 per element, and per chunk of a sum: e_j and the rescale, the tanh of both and of the maximum before and after.
EX2 = {"": (1, 1), "Identity": (1, 1), "Softcap": (2, 3)}


pytestmark = pytest.mark.xdist_group("cuda_build")  # what the tests share is made once


@pytest.fixture(scope="module")
def module() -> Path:
    spec = importlib.util.find_spec("fused_losses._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("fused_losses._cuda is not built: there was no nvcc at install time")
    return Path(spec.origin)


def in_new_process(module: Path, code: str) -> str:
    """Imports the module alone, without fused_losses."""
    load = (
        "import importlib.util as u, pathlib\n"
        f"s = u.spec_from_file_location('_cuda', {str(module)!r}); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
    )
    done = subprocess.run([sys.executable, "-c", load + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_is_linked_with_no_driver_and_no_torch(module):
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    for library in ("libcudart", "libcuda.so", "libtorch", "libc10"):
        assert library not in needed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_why_without_a_device(module):
    reason = in_new_process(module, "print(m.unusable(0))")
    assert "no NVIDIA driver" in reason or "no CUDA device" in reason
    assert ";" in reason, "a cause, then what to do about it"


def test_takes_cuda_tensors_only(module):
    code = "import torch\ntry: m.scale(torch.zeros(1, 8), torch.ones(()), 0)\nexcept ValueError as e: print(e)"
    assert "gradient is on a device" in in_new_process(module, code)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_says_whether_a_device_is_usable(module):
    from fused_losses import _cuda

    assert _cuda.unusable(0) == ""
    assert "no CUDA device 999" in _cuda.unusable(999)


def test_the_skeleton_compiles(tmp_path):
    """bench/skeleton.py, which only a GPU can run."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    bench = Path(__file__).parent.parent / "bench"
    code = (
        f"import sys, ctypes, pathlib; sys.path.insert(0, {str(bench)!r}); import skeleton\n"
        f"library = skeleton.compiled(pathlib.Path({str(tmp_path)!r}))\n"
        "print(library.size_of_asked() - ctypes.sizeof(skeleton.Asked))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr[-2000:]


# ---- machine code ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    return machine_code.find_cuobjdump() or pytest.skip("there is no cuobjdump; the triton package has one")


@pytest.fixture(scope="module")
def kernels(module, cuobjdump) -> dict[machine_code.Kernel, machine_code.Code]:
    return machine_code.kernels_of(module, cuobjdump)


def test_architectures(module, cuobjdump, kernels):
    """Machine code for each architecture that the module names, and PTX for those to come."""
    named = in_new_process(module, "print(m.architectures)").split(";")
    assert {architecture for architecture, *_ in kernels} == set(named)
    assert f"sm_{named[-1]}" in machine_code.read(cuobjdump, "--list-ptx", module)
    per_architecture = Counter(architecture for architecture, *_ in kernels)
    assert len(set(per_architecture.values())) == 1
    transforms = dict.fromkeys(LOOPS, ("", *machine_code.TRANSFORMS))  # "": plain
    transforms |= {"scale_kernel": ("",), "statistics_kernel": machine_code.TRANSFORMS}
    expected = {(k, e, z) for k in LOOPS for e in machine_code.WIDTH for z in transforms[k]}
    assert {key[1:] for key in kernels} >= expected


def test_nothing_spills(kernels):
    """Local memory is DRAM traffic that no floor counts."""
    spills = {key: n for key, code in kernels.items() if (n := machine_code.local_accesses(code))}
    assert not spills


def test_hot_loops(kernels):
    """16-byte accesses, few instructions per element, of which ex2 are the rarest."""
    seen = {}
    for key, code in kernels.items():
        _, kernel, element, transform = key
        if kernel not in LOOPS:
            continue
        each, chunk = EX2[transform]

        def few_ex2(loop: list[str], kind: str, elements: int, key=key, each=each, chunk=chunk) -> None:
            # What is left of a row on chip is summed in a loop that may form a chunk's rescale on two paths.
            twice = key[1] == "on_chip_kernel" and kind == "sum"
            assert sum("MUFU.EX2" in text for text in loop) <= each * elements + chunk * (1 + twice), (*key, kind)

        found = machine_code.loops_of(code, element, few_ex2)
        without_moments = {"mass on chip"} if kernel == "on_chip_kernel" and transform == "Softcap" else set()
        assert set(found) == LOOPS[kernel] | without_moments, key
        seen[key] = found
    print(*seen.items(), sep="\n")
    costly = {}
    for key, kinds in seen.items():
        on_chip = key[1] == "on_chip_kernel"
        if on_chip:
            pairs = key[-1] == "Softcap" and int(key[0].rstrip("a")) >= 100
            limits = "Softcap, pairs" if pairs else key[-1]
            most, mapped = ON_CHIP[limits][key[2]], kinds.pop("map on chip")
            both = {"on chip": (kinds.pop("sum on chip") + mapped, most)}
            if limits in MOMENTS:
                both["on chip without moments"] = (kinds.pop("mass on chip") + mapped, most - MOMENTS[limits])
            costly |= {(*key, kind): n for kind, (n, most) in both.items() if n > most}
        most = (OTHERS if on_chip else MOST)[key[-1]]
        more = STATISTICS if key[1] == "statistics_kernel" else 0
        costly |= {(*key, kind): n for kind, n in kinds.items() if n > most[kind] + more}
    assert not costly


def test_registers_on_chip(module, cuobjdump):
    """As many threads as csrc/cuda/launch.cu counts on must find room."""
    registers = machine_code.registers_of(module, cuobjdump)
    many = {key: n for key, n in registers.items() if key[1] == "on_chip_kernel" and n > REGISTERS[key[-1]]}
    assert not many and any(key[1] == "on_chip_kernel" for key in registers)
