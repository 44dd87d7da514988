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


def launch(module, vocab, dtype, n=4096, plain=True, softcap=0.0, gap=0, stream=0, k=1, averages=False):
    """The launches of one pass over nothing: the kernels do not run."""
    matrix = structs.Rows(16, dtype, n, vocab, n, 0, vocab)
    grad = structs.Rows(16, dtype, n, vocab, n, 0, vocab + gap)
    asked = structs.problem(structs.targets(np.zeros((1, k), np.int64)), vocab, 1, plain=plain, softcap=softcap)
    module.loss_and_grad(
        stream=stream, logits=matrix, grad=grad, problem=asked, logprobs=structs.LogprobsTable(None, n, k),
        row_losses=None, loss=None, averages=averages,
    )  # fmt: skip
    return module.launches()


# (threads, blocks per multiprocessor, KB of the row that one has on chip, blocks of a row); None: two sweeps
TABLE = {
    ("H100", 4000, 2): None,
    ("H100", 16384, 2): (256, 3, 32, 1),
    ("H100", 32000, 2): (256, 3, 62, 1),
    ("H100", 50257, 2): (256, 2, 98, 1),
    ("H100", 100000, 2): (512, 1, 195, 1),
    ("H100", 115000, 2): (512, 1, 224, 1),
    ("H100", 115500, 2): (512, 1, 224, 1),  # with what the kernel needs beside, just too long
    ("H100", 128256, 2): (512, 1, 224, 1),
    ("H100", 151936, 2): (512, 1, 224, 1),
    ("H100", 172000, 2): (512, 1, 224, 1),
    ("H100", 174000, 2): (512, 1, 170, 2),
    ("H100", 200064, 2): (512, 1, 196, 2),
    ("H100", 262144, 2): (512, 1, 224, 2),
    ("H100", 32000, 4): (512, 1, 125, 1),
    ("H100", 128256, 4): (512, 1, 224, 2),
    ("H200", 262144, 2): (512, 1, 224, 2),
    ("H200", 128256, 4): (512, 1, 224, 2),
    ("B200", 32000, 2): (256, 3, 62, 1),
    ("B200", 262144, 2): (512, 1, 224, 2),
    ("B200", 128256, 4): (512, 1, 224, 2),
    ("A100", 32000, 2): (256, 2, 62, 1),
    ("A100", 50257, 2): (512, 1, 98, 1),
    ("A100", 151936, 2): (512, 1, 160, 1),
    ("A100", 262144, 2): (512, 1, 160, 1),
    ("L40S", 16384, 2): (256, 2, 32, 1),
    ("L40S", 32000, 2): (512, 1, 62, 1),
    ("L40S", 128256, 2): (512, 1, 96, 1),
    ("L40S", 262144, 2): (512, 1, 96, 1),
}


@pytest.mark.parametrize("name, vocab, width", TABLE, ids=str)
def test_table(module, name, vocab, width):
    device(module, name)
    dtype, expected = structs.FLOAT32 if width == 4 else structs.BFLOAT16, TABLE[name, vocab, width]
    loss, total = launch(module, vocab, dtype)
    assert not total.on_chip and total.blocks == total.team == 1
    if expected is None:
        assert not loss.on_chip
        return
    threads, blocks, slots, team = expected
    assert (loss.on_chip, loss.threads, loss.team) == (1, threads, team)
    assert slots * KB < loss.shared_bytes < (slots + 3) * KB, loss
    multiprocessors, l2_bytes, *_ = DEVICES[name]
    most = blocks * multiprocessors // team
    even = multiprocessors * max(vocab * width // team - slots * KB, 0) > l2_bytes // 8
    for n in (3, most + 4, 4096):
        loss, _ = launch(module, vocab, dtype, n)
        assert loss.blocks % team == 0
        if even:
            assert loss.blocks // team == -(-n // -(-n // most)), "as many turns for every team, or one less"
        else:
            assert loss.blocks // team == min(n, most), "all that fit"


@pytest.mark.parametrize("name", DEVICES)
def test_several_targets_have_no_pairs(module, name):
    """What a token's targets tell each other goes through one block's shared memory."""
    device(module, name)
    for vocab in (262144, 10**6):
        for dtype in (structs.FLOAT32, structs.BFLOAT16):
            one, several = (launch(module, vocab, dtype, plain=False, k=k)[0] for k in (1, 2))
            assert one.team == (2 if DEVICES[name][3] >= (9, 0) else 1)
            assert several.on_chip and several.team == 1


def test_an_odd_number_of_multiprocessors(module):
    """As in a part of a GPU: one of them is left over."""
    for multiprocessors, blocks in ((2, 2), (5, 4), (131, 130)):
        module.configure(multiprocessors, 50 * MB, shared=(227 * KB, 228 * KB))
        module.set(runs=False)
        module.launches()
        loss, _ = launch(module, 262144, structs.BFLOAT16, n=multiprocessors * 100)
        assert (loss.team, loss.blocks) == (2, blocks)


def mean_of_objective(module, n, plain=True, averages=True):
    """The launches of stage 2 over nothing."""
    asked = structs.problem(structs.targets(np.zeros((1, 1), np.int64)), 100, 1, plain=plain)
    module.objective(
        n=n, problem=asked, stats=structs.StatsTable(None, n, 1), logprobs=structs.LogprobsTable(None, n, 1),
        row_losses=None, coefficients=structs.CoefficientsTable(None, n), loss=16, averages=averages,
    )  # fmt: skip
    return module.launches()


@pytest.mark.parametrize("name, vocab", [("H100", 32000), ("H100", 262144), ("A100", 128256)])
@pytest.mark.parametrize("plain", [True, False])
def test_a_mean_of_few_tokens_has_no_launch_of_its_own(module, name, vocab, plain):
    """Up to 8192 tokens each block goes through for itself."""
    device(module, name)
    for n in (1, 4096, 8192, 8193, 10**6):
        few = n <= 8192
        one_pass = launch(module, vocab, structs.BFLOAT16, n, plain, averages=True)
        assert [it.on_chip for it in one_pass] == ([1, 0] if few else [0, 1, 0])
        assert len(mean_of_objective(module, n, plain)) == 3  # its own kernel is no place to wait for so many loads
        # what is no mean has no normaliser
        assert len(launch(module, vocab, structs.BFLOAT16, n, plain)) == 2
        assert len(mean_of_objective(module, n, plain, averages=False)) == 2
        # rows swept twice, of which a block has few
        assert len(launch(module, 100, structs.BFLOAT16, n, plain, averages=True)) == 3


@pytest.mark.parametrize("vocab", [100, 9001], ids=["two sweeps", "on chip"])
@pytest.mark.parametrize("n", [0, 5])
def test_a_mean_over_no_active_token_is_0(module, n, vocab):
    """Of no token at all, or of ignored ones, in one pass and in two phases."""
    device(module, "H100", runs=True)
    logits, grad = (sweep.Matrix(n, vocab) for _ in range(2))
    asked = sweep.asked_for(module, np.full(n, structs.IGNORE), vocab)
    asked.denominator = structs.Column(structs.pointer(sweep.nan(1)), 0, np.nan)
    loss, row_losses, _ = sweep.one_pass(module, logits.arg, grad.arg, asked, averages=True)
    assert loss == 0 and not row_losses.any() and not any(row.any() for row in grad.rows)
    assert any(it.on_chip for it in module.launches()) == (n > 0 and vocab == 9001)
    loss, *_, coefficients = sweep.objective(module, sweep.nan(3, n), asked, averages=True)
    assert loss == 0 and not coefficients.any()


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
    multiprocessors, _, (of_block, of_multiprocessor), (major, _) = DEVICES[name]
    rng = np.random.default_rng(0)
    nearly_two = range(56500, 58000, 250)  # that fit H100's shared memory, or do but for what the system takes
    for vocab in (1, 4095, 8192, 8193, 50257, *nearly_two, 262144, 2**31 - 1, *rng.integers(8000, 300000, 30)):
        for dtype in (structs.FLOAT32, structs.BFLOAT16, structs.FLOAT16):
            chosen = set()
            for n in (1, 7, multiprocessors, 4096, 10**6):
                for gap in (0, 1):  # the phase is no reason, either
                    it = launch(module, int(vocab), dtype, n, plain, softcap, gap)[0]
                    assert 1 <= it.blocks <= n * it.team and it.shared_bytes <= of_block
                    assert it.team == 1 or (it.team == 2 and it.blocks % 2 == 0 and major >= 9), "there are no clusters"
                    chosen.add((it.threads, it.shared_bytes, it.on_chip, it.team))
            assert len(chosen) == 1, (vocab, chosen)
            if it.on_chip:
                together = -(-it.blocks // multiprocessors)
                assert together * (it.shared_bytes + SYSTEM) <= of_multiprocessor, (vocab, it)
                assert together * it.threads <= RESIDENT[plain] and it.threads in (256, 512)


def test_no_pair_on_one_multiprocessor(module):
    """As a small part of a GPU may be: two blocks that each fill one would not be resident together."""
    _, l2_bytes, shared, capability = DEVICES["H100"]
    for multiprocessors, team in ((1, 1), (2, 2)):
        module.configure(multiprocessors, l2_bytes, shared=shared, capability=capability)
        module.set(runs=False)
        module.launches()
        assert launch(module, 262144, structs.BFLOAT16)[0].team == team


def test_no_pairs_by_code_without_clusters(module):
    """An nvcc that knows no sm_90 leaves PTX of an older architecture, in which a pair's barrier is a trap."""
    _, l2_bytes, shared, capability = DEVICES["H100"]
    for code, team in ((80, 1), (90, 2)):
        module.set(code=code, runs=False)
        module.configure(132, l2_bytes, shared=shared, capability=capability)
        module.launches()
        try:
            assert launch(module, 262144, structs.BFLOAT16)[0].team == team
        finally:
            module.set(code=0)


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
    """The kernels, in blocks as on a GPU: rows that fit several times, once, not as a whole, and two blocks at most."""
    _, l2_bytes, shared, capability = DEVICES[name]
    width = 4 if dtype == structs.FLOAT32 else 2
    for vocab in (9001, 40001, 61000, 7 * shared[0] // (4 * width) + 1):
        module.configure(2, l2_bytes, shared=shared, capability=capability)
        module.set(runs=True)
        module.launches()
        rng, n = np.random.default_rng(vocab), 5
        bits = np.float32(rng.normal(0, 2, (n, vocab))).view(np.uint32)
        bits = bits if dtype == structs.FLOAT32 else (bits >> 16).astype(np.uint16)
        logits, grad = (sweep.Matrix(n, vocab, dtype, (0, 1 << 20, 0, 3), b) for b in (bits, None))
        token = rng.integers(0, vocab, n)
        asked = sweep.asked_for(module, token, vocab)
        _, _, logprobs = sweep.one_pass(module, logits.arg, grad.arg, asked)
        (ran,) = (it for it in module.launches() if it.on_chip)
        assert ran.team == (2 if vocab * width > 1.5 * shared[0] and capability >= (9, 0) else 1)
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
        "rest <= limits.l2_bytes / 8 ?",
        "true ?",
        lambda m: test_table(m, "H100", 151936, 2),
    ),
    "fewer blocks than fit": (
        "cuda/launch.cu",
        "rest <= limits.l2_bytes / 8 ?",
        "false ?",
        lambda m: test_table(m, "H100", 32000, 2),
    ),
    "more blocks than rows": (
        "cuda/launch.cu",
        "? std::min(p.logits.n, at_a_time) :",
        "? at_a_time :",
        lambda m: test_table(m, "H100", 32000, 2),
    ),
    "what a whole row has beside a half's slots": (
        "cuda/launch.cu",
        "rest = (elements * static_cast",
        "rest = (p.logits.vocab * static_cast",
        lambda m: test_table(m, "H100", 200064, 2),
    ),
    "pairs where there are no clusters": (
        "cuda/launch.cu",
        "limits.clusters && limits.multiprocessors > 1 && single",
        "single",
        lambda m: test_table(m, "A100", 262144, 2),
    ),
    "clusters from sm_80 on": (
        "cuda/device.cu",
        "major >= 9 &&",
        "major >= 8 ||",
        lambda m: test_fits_the_device_and_no_choice_depends_on_rows(m, "L40S", True, 0.0),
    ),
    "pairs for several targets": (
        "cuda/launch.cu",
        "limits.clusters && limits.multiprocessors > 1 && single",
        "limits.clusters && limits.multiprocessors > 1",
        lambda m: test_several_targets_have_no_pairs(m, "H100"),
    ),
    "pairs as soon as a row is too long": (
        "cuda/launch.cu",
        "2 * bytes > 3 * room",
        "bytes > room",
        lambda m: test_table(m, "H100", 151936, 2),
    ),
    "a pair counted as a block": (
        "cuda/launch.cu",
        "start(on_chip_kernel<T, Row>, teams * s.team,",
        "start(on_chip_kernel<T, Row>, teams,",
        lambda m: test_table(m, "H100", 262144, 2),
    ),
    "a pair on each multiprocessor": (
        "cuda/launch.cu",
        "limits.multiprocessors / s.team, 1)",
        "limits.multiprocessors, 1)",
        lambda m: test_table(m, "H100", 262144, 2),
    ),
    "a pair for half a pair of multiprocessors": (
        "cuda/launch.cu",
        "std::max(s.blocks * limits.multiprocessors / s.team, 1)",
        "over(s.blocks * limits.multiprocessors, s.team)",
        test_an_odd_number_of_multiprocessors,
    ),
    "a pair not launched as one": (
        "cuda/launch.cu",
        "stream, params, s.team);",
        "stream, params);",
        lambda m: test_table(m, "H100", 262144, 2),
    ),
    "slots for a whole row in each of a pair": (
        "cuda/launch.cu",
        "s.team == 1 ? p.logits.vocab : half_of(p.logits.vocab, sizeof(T));",
        "p.logits.vocab;",
        lambda m: test_table(m, "H100", 174000, 2),
    ),
    "a mean's normaliser by every block": (
        "cuda/launch.cu",
        "p.averages && p.logits.n <= kFewTokens}",
        "p.averages}",
        lambda m: test_a_mean_of_few_tokens_has_no_launch_of_its_own(m, "H100", 32000, True),
    ),
    "a mean's normaliser by nobody": (
        "cuda/launch.cu",
        "    else if (p.averages)\n",
        "    else if (false)\n",
        lambda m: test_a_mean_of_few_tokens_has_no_launch_of_its_own(m, "H100", 32000, True),
    ),
    "a mean's normaliser twice": (
        "cuda/launch.cu",
        "    else if (p.averages)\n",
        "    if (p.averages)\n",
        lambda m: test_a_mean_of_few_tokens_has_no_launch_of_its_own(m, "H100", 32000, True),
    ),
    "a mean over nothing": (
        "cuda/launch.cu",
        "if (p.logits.n == 0 && p.averages) launch(",
        "if (false) launch(",
        lambda m: test_a_mean_over_no_active_token_is_0(m, 0, 9001),
    ),
    "clusters in code that has none": (
        "cuda/device.cu",
        "major >= 9 && code.ptxVersion >= 90;",
        "major >= 9;",
        test_no_pairs_by_code_without_clusters,
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
