"""The launch code of csrc/cuda against a runtime that stands in for CUDA's: which kernel runs, in which shape, on which
device, and what becomes of errors. So the first GPU it meets is not the first that it runs for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "host_cuda"))
import compiler
import structs
import sweep

pytestmark = pytest.mark.skipif(
    shutil.which(compiler.CXX) is None, reason=f"there is no {compiler.CXX} to compile with"
)

KB, MB = 1 << 10, 1 << 20
# multiprocessors, L2 bytes, (shared bytes of a block, of a multiprocessor), capability
DEVICES = {
    "A100": (108, 40 * MB, (163 * KB, 164 * KB), (8, 0)),
    "H100": (132, 50 * MB, (227 * KB, 228 * KB), (9, 0)),
    "H200": (132, 60 * MB, (227 * KB, 228 * KB), (9, 0)),
    "B200": (148, 126 * MB, (227 * KB, 228 * KB), (10, 0)),
    "L40S": (142, 96 * MB, (99 * KB, 100 * KB), (8, 9)),
}
SYSTEM = 1 * KB  # of each block's shared memory
# What a kernel's registers leave room for: plain, with terms.
RESIDENT = {True: 768, False: 512}
KERNELS = 9  # of the engine on chip: three types, three kinds of row


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    return compiler.build(folder, compiler.entry(folder))


@pytest.fixture
def module(library, tmp_path) -> structs.Module:
    """A copy, which has met no device: limits are kept for the first 64."""
    return structs.Module(Path(shutil.copy(library, tmp_path / "_of_this_test.so")))


def device(module, name, runs=False):
    multiprocessors, l2_bytes, shared, capability = DEVICES[name]
    module.configure(multiprocessors, l2_bytes, shared=shared, capability=capability)
    module.set(runs=runs)
    module.launches()


def launch(module, vocab, dtype, n=4096, plain=True, softcap=0.0, gap=0, stream=0):
    """The launches of one pass over nothing: the kernels do not run."""
    matrix = structs.Rows(16, dtype, n, vocab, n, 0, vocab)
    grad = structs.Rows(16, dtype, n, vocab, n, 0, vocab + gap)
    asked = structs.problem(structs.targets(np.zeros((1, 1), np.int64)), vocab, 1, plain=plain, softcap=softcap)
    module.loss_and_grad(
        stream=stream, logits=matrix, grad=grad, problem=asked, logprobs=structs.LogprobsTable(None, n, 1),
        row_losses=None, loss=None, averages=False,
    )  # fmt: skip
    return module.launches()


# (threads, rows per multiprocessor, KB of the row on chip); None: two sweeps
TABLE = {
    ("H100", 4000, 2): None,
    ("H100", 16384, 2): (256, 3, 32),
    ("H100", 32000, 2): (256, 3, 62),
    ("H100", 50257, 2): (256, 2, 98),
    ("H100", 100000, 2): (512, 1, 195),
    ("H100", 115000, 2): (512, 1, 224),
    ("H100", 115500, 2): (512, 1, 224),  # with what the kernel needs beside, just too long
    ("H100", 128256, 2): (512, 1, 224),
    ("H100", 151936, 2): (512, 1, 224),
    ("H100", 32000, 4): (512, 1, 125),
    ("H100", 128256, 4): (512, 1, 224),
    ("B200", 32000, 2): (256, 3, 62),
    ("A100", 32000, 2): (256, 2, 62),
    ("A100", 50257, 2): (512, 1, 98),
    ("A100", 151936, 2): (512, 1, 160),
    ("L40S", 16384, 2): (256, 2, 32),
    ("L40S", 32000, 2): (512, 1, 62),
    ("L40S", 128256, 2): (512, 1, 96),
}


@pytest.mark.parametrize("name, vocab, width", TABLE, ids=str)
def test_table(module, name, vocab, width):
    device(module, name)
    loss, total = launch(module, vocab, structs.FLOAT32 if width == 4 else structs.BFLOAT16)
    expected = TABLE[name, vocab, width]
    assert not total.on_chip and total.blocks == 1
    if expected is None:
        assert not loss.on_chip
        return
    threads, rows, slots = expected
    assert (loss.on_chip, loss.threads) == (1, threads)
    assert slots * KB < loss.shared_bytes < (slots + 3) * KB, loss
    most = rows * DEVICES[name][0]
    turns = -(-4096 // most)
    assert loss.blocks == -(-4096 // turns), "as many turns for every block, or one less"


@pytest.mark.parametrize("vocab, threads, together", [(300, 32, 32), (4000, 128, 8), (32000, 256, 4), (262144, 256, 4)])
def test_streams(module, vocab, threads, together):
    """Forward only and two phase: several rows per multiprocessor, of which one may end while others go on."""
    device(module, "H200")
    matrix = structs.Rows(16, structs.BFLOAT16, 8192, vocab, 8192, 0, vocab)
    asked = structs.problem(structs.targets(np.zeros((1, 1), np.int64)), vocab, 1, plain=True, softcap=0.0)
    column = structs.Column(None, 0, 1.0)
    module.stats(logits=matrix, problem=asked, stats=structs.StatsTable(None, 8192, 1))
    module.grad(
        logits=matrix, grad=matrix, targets=asked.targets, transform=asked.transform,
        stats=structs.StatsTable(None, 8192, 1), coefficients=structs.CoefficientsTable(None, 8192), upstream=column,
        plain=True,
    )  # fmt: skip
    module.scale(grad=matrix, scale=None)
    turns = -(-8192 // (together * 132))
    assert [(it.threads, it.blocks) for it in module.launches()] == 3 * [(threads, -(-8192 // turns))]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("plain, softcap", [(True, 0.0), (False, 0.0), (False, 30.0)])
def test_fits_the_device_and_no_choice_depends_on_rows(module, name, plain, softcap):
    device(module, name)
    multiprocessors, _, (of_block, of_multiprocessor), _ = DEVICES[name]
    rng = np.random.default_rng(0)
    for vocab in (1, 4095, 8192, 8193, 50257, 57400, 262144, 2**31 - 1, *rng.integers(8000, 300000, 30)):
        for dtype in (structs.FLOAT32, structs.BFLOAT16, structs.FLOAT16):
            chosen = set()
            for n in (1, 7, multiprocessors, 4096, 10**6):
                for gap in (0, 1):  # the phase is no reason, either
                    it = launch(module, int(vocab), dtype, n, plain, softcap, gap)[0]
                    assert 1 <= it.blocks <= n and it.shared_bytes <= of_block
                    chosen.add((it.threads, it.shared_bytes, it.on_chip))
            assert len(chosen) == 1, (vocab, chosen)
            if it.on_chip:
                together = -(-it.blocks // multiprocessors)
                assert together * (it.shared_bytes + SYSTEM) <= of_multiprocessor, (vocab, it)
                assert together * it.threads <= RESIDENT[plain] and it.threads in (256, 512)


def test_devices_without_room(module):
    """Little shared memory, as before sm_80 or in a part of a GPU."""
    module.configure(16, 4 * MB, shared=(64 * KB, 64 * KB))
    module.set(runs=False)
    assert not launch(module, 128256, structs.BFLOAT16)[0].on_chip


def test_limits_are_raised_once(module):
    """When a device is first asked about: not at a launch, which may be captured."""
    device(module, "H100")
    before = module.calls("cudaFuncSetAttribute"), module.calls("cudaDeviceGetAttribute")
    assert module.unusable(module.current()) == ""
    assert module.calls("cudaFuncSetAttribute") == before[0] + KERNELS
    asked = module.calls("cudaDeviceGetAttribute")
    for dtype in (structs.FLOAT32, structs.BFLOAT16, structs.FLOAT16):
        for plain, softcap in ((True, 0.0), (False, 0.0), (False, 30.0)):
            assert launch(module, 50257, dtype, plain=plain, softcap=softcap)[0].on_chip
    assert module.calls("cudaFuncSetAttribute") == before[0] + KERNELS
    assert module.calls("cudaDeviceGetAttribute") == asked > before[1]


def test_another_device_than_the_current_one(module):
    device(module, "A100")
    first = module.current()
    device(module, "H100")
    second = module.current()
    before = module.calls("cudaFuncSetAttribute")
    assert module.unusable(first) == "" and module.current() == second
    assert module.calls("cudaFuncSetAttribute") == before + KERNELS
    module.set(current=first)
    assert launch(module, 32000, structs.BFLOAT16)[0].device == first
    assert module.calls("cudaFuncSetAttribute") == before + KERNELS


def test_two_sweeps_where_limits_can_not_be_raised(module):
    device(module, "H100")
    module.fail("cudaFuncSetAttribute", 2)
    try:
        assert module.unusable(module.current()) == ""
    finally:
        module.fail("cudaFuncSetAttribute", 0)
    assert module.last_error() == 0, "the next one who asks takes it for his own"
    assert not launch(module, 32000, structs.BFLOAT16)[0].on_chip, "kept, as the order of sums depends on it"


@pytest.mark.parametrize("vocab", [100, 32000], ids=["two sweeps", "on chip"])
def test_a_launch_that_fails(module, vocab):
    device(module, "H100")
    module.unusable(module.current())
    module.fail("cudaLaunchKernelEx", 2)
    try:
        with pytest.raises(RuntimeError, match="could not be launched: cudaErrorMemoryAllocation"):
            launch(module, vocab, structs.BFLOAT16)
    finally:
        module.fail("cudaLaunchKernelEx", 0)
    assert module.last_error() == 0
    assert launch(module, vocab, structs.BFLOAT16)


def test_a_device_that_can_not_be_asked(module):
    device(module, "H100")
    module.fail("cudaDeviceGetAttribute", 101)
    try:
        with pytest.raises(RuntimeError, match="no usable CUDA device"):
            launch(module, 32000, structs.BFLOAT16)
        assert "can't be asked" in module.unusable(module.current())
    finally:
        module.fail("cudaDeviceGetAttribute", 0)
    assert launch(module, 32000, structs.BFLOAT16)[0].on_chip, "an error is not kept"


def test_says_what_is_missing(module):
    device(module, "H100")
    here = module.current()
    for versions, words in (((0, 13000), "no NVIDIA driver"), ((12080, 13000), "supports CUDA 12.8")):
        module.set(versions=versions)
        assert words in module.unusable(here)
    module.set(versions=(13000, 13000))
    assert "no CUDA device 9999" in module.unusable(9999)
    module.fail("cudaFuncGetAttributes", 209)
    assert "80;90a;100" in module.unusable(here) and module.last_error() == 0
    module.fail("cudaFuncGetAttributes", 0)
    module.configure(40, MB, shared=(64 * KB, 64 * KB), capability=(7, 5))
    assert "is sm_75" in module.unusable(module.current())


def test_stream(module):
    device(module, "H100")
    assert {it.stream for it in launch(module, 32000, structs.BFLOAT16, stream=1234)} == {1234}


@pytest.mark.parametrize("dtype", [structs.FLOAT32, structs.BFLOAT16])
@pytest.mark.parametrize("name", ["H100", "L40S"])
def test_runs_in_the_shape_of_the_table(module, name, dtype):
    """The kernels, in blocks as on a GPU: rows that fit several times, once, and not as a whole."""
    _, l2_bytes, shared, capability = DEVICES[name]
    for vocab in (9001, 40001, 61000):
        module.configure(1, l2_bytes, shared=shared, capability=capability)
        module.set(runs=True)
        module.launches()
        rng, n = np.random.default_rng(vocab), 5
        bits = np.float32(rng.normal(0, 2, (n, vocab))).view(np.uint32)
        bits = bits if dtype == structs.FLOAT32 else (bits >> 16).astype(np.uint16)
        logits, grad = (sweep.Matrix(n, vocab, dtype, (0, 1 << 20, 0, 3), b) for b in (bits, None))
        token = rng.integers(0, vocab, n)
        asked = sweep.asked_for(module, token, vocab)
        _, _, logprobs = sweep.one_pass(module, logits.arg, grad.arg, asked)
        ran = [it for it in module.launches() if it.on_chip]
        assert vocab * 4 < 16 * KB or len(ran) == 1
        x = logits.matrix()
        p = sweep.softmax(x - x.max(1, keepdims=True))
        at = np.arange(n), token
        sweep.close("logprobs", logprobs, np.log(p[at]), 3e-6)
        p[at] -= 1
        rounding = 3e-6 if dtype == structs.FLOAT32 else 2.0**-8
        sweep.close("gradient", grad.matrix(), p, rounding, 1e-9)
        assert grad.gaps_intact()


# name: file, text, replacement, and the check above that must fail with it.
BUGS = {
    "rows together by their number": (
        "cuda/launch.cu",
        "resident / kOfSeveral);",
        "rows.n == 1 ? 1 : resident / kOfSeveral);",
        lambda m: test_fits_the_device_and_no_choice_depends_on_rows(m, "H100", True, 0.0),
    ),
    "no room for what the system takes": (
        "cuda/launch.cu",
        "(bytes + scratch + kReserved)",
        "(bytes + scratch)",
        lambda m: test_fits_the_device_and_no_choice_depends_on_rows(m, "H100", True, 0.0),
    ),
    "more than a block may have": (
        "cuda/launch.cu",
        "limits.shared_bytes - scratch;",
        "limits.shared_bytes;",
        lambda m: test_table(m, "H100", 115500, 2),
    ),
    "a last turn for a few": (
        "cuda/launch.cu",
        "even_grid(p.logits.n, s.rows), s.threads",
        "std::min<int64_t>(p.logits.n, int64_t{s.rows} * device_limits().multiprocessors), s.threads",
        lambda m: test_table(m, "H100", 128256, 2),
    ),
    "limits raised at the first launch": (
        "cuda/device.cu",
        "    if (error == cudaSuccess) device_limits();\n",
        "",
        test_limits_are_raised_once,
    ),
    "the current device changed": (
        "cuda/device.cu",
        "if (index != previous) cudaSetDevice(previous);",
        "",
        test_another_device_than_the_current_one,
    ),
    "an error left behind": (
        "cuda/runtime.h",
        "    cudaGetLastError();\n",
        "",
        test_two_sweeps_where_limits_can_not_be_raised,
    ),
    "a limit that is not there": (
        "cuda/device.cu",
        "if (!allow_shared(of_block).empty()) of_block = 0;",
        "allow_shared(of_block);",
        test_two_sweeps_where_limits_can_not_be_raised,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_still_one(bug):
    compiler.edited(*BUGS[bug][:3])


@pytest.mark.seeded_bugs
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, module, tmp_path):
    *edit, check = BUGS[bug]
    mutant = structs.Module(compiler.build(tmp_path, compiler.entry(tmp_path), edit=tuple(edit)))
    check(module)
    with pytest.raises((AssertionError, RuntimeError)):
        check(mutant)
