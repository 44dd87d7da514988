"""The CUDA kernels, compiled for the CPU with one fiber per thread: right everywhere, and the tests can tell."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from cases import DTYPES, LOSSES, MODES, check, make
from test_terms import OPTIONS, drawn, with_targets

from fused_losses.backends import cpu
from fused_losses.backends.native import Native

sys.path.insert(0, str(Path(__file__).parent / "host_cuda"))
import build

pytestmark = pytest.mark.skipif(shutil.which(build.CXX) is None, reason=f"there is no {build.CXX} to compile with")


@pytest.fixture(scope="module")
def bindings(tmp_path_factory) -> Path:
    return build.bindings(tmp_path_factory.mktemp("bindings"))


def test_every_case(bindings, tmp_path):
    done = build.sweep(build.build(tmp_path, bindings), cases=120)
    assert done.returncode == 0 and "120 cases" in done.stdout, done.stderr[-3000:]


@pytest.fixture(scope="module")
def device_code(bindings, tmp_path_factory) -> Native:
    path = build.build(tmp_path_factory.mktemp("device_code"), bindings) / "_host_cuda.so"
    spec = importlib.util.spec_from_file_location("_host_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Native(module)


@pytest.fixture
def in_the_library(device_code, monkeypatch) -> None:
    """In the place of the CPU backend, against the error that the contract allows. ex2 errs as on a GPU."""
    monkeypatch.setattr(cpu, "unusable", lambda device: None)
    for function in ("loss_and_grad", "stats", "objective", "grad", "scale"):
        monkeypatch.setattr(cpu, function, getattr(device_code, function), raising=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_through_the_library(in_the_library, objective, mode, dtype):
    for vocab in (33, 3001):
        check(make(objective, (7,), vocab, dtype), "cpu", upstream=0.5, **MODES[mode])


@pytest.mark.parametrize("mode", ["in place", "recompute"])
@pytest.mark.parametrize("objective, name, option", OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_terms_through_the_library(in_the_library, objective, name, option, mode):
    for vocab, dtype in zip((33, 130, 1001), DTYPES, strict=True):
        check(make(objective, (7,), vocab, dtype, **drawn(option)), "cpu", upstream=0.5, **MODES[mode])


@pytest.mark.parametrize("mode", ["in place", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_targets_through_the_library(in_the_library, dtype, mode):
    for k in (2, 70):  # a row of 130 elements has 32 threads
        case = with_targets(make("cross_entropy", (7,), 130, dtype), k, reduction="sum", **MODES[mode])
        check(case.having(label_smoothing=0.1, z_loss=0.01, softcap=9.0), "cpu", upstream=0.5)


def test_every_case_under_sanitizers(bindings, tmp_path):
    """No access outside the rows, none to rows that must not be read, no undefined behaviour."""
    done = build.sweep(build.build(tmp_path, bindings, sanitize=True), sanitize=True, cases=36)
    assert done.returncode == 0, done.stderr[-3000:]


# name: file, text, replacement. Each is a bug somebody could write; the sweep must not pass with it.
BUGS = {
    "barrier dropped": ("cuda/block.cuh", "        __syncthreads();\n", ""),
    "barrier in a branch": (
        "cuda/block.cuh",
        "if (lane == 0) partials[warp] = x;\n        __syncthreads();",
        "if (lane == 0) {\n partials[warp] = x;\n __syncthreads();\n }",
    ),
    "partials used again too early": ("cuda/block.cuh", "turn_ = !turn_;", ""),
    "half a warp reduced": ("cuda/block.cuh", "lane > 0; lane /= 2) x +=", "lane > 1; lane /= 2) x +="),
    "tail short by one": (
        "cuda/sweep.cuh",
        "edges = vocab - vectors * kWidth<T>;",
        "edges = vocab - vectors * kWidth<T> - 1;",
    ),
    "one vector too many": (
        "cuda/sweep.cuh",
        "v + u * static_cast<int>(blockDim.x) < span.vectors",
        "v + u * static_cast<int>(blockDim.x) <= span.vectors",
    ),
    "first vector left out": ("cuda/sweep.cuh", "v >= 0; v -= step", "v > 0; v -= step"),
    "head peeled to 8 bytes": ("cuda/sweep.cuh", "% 16 / sizeof(T)", "% 8 / sizeof(T)"),
    "phases taken for equal": ("cuda/sweep.cuh", "skewed ? load_skewed(p, skew)", "false ? load_skewed(p, skew)"),
    "skewed loads beyond the row": ("cuda/sweep.cuh", "if (skew) span.shrink();", ""),
    "sum not rescaled": ("cuda/sweep.cuh", "sum *= exp2_approx(z.exponent(shift));", ""),
    "maximum starts at -inf": ("cuda/transform.cuh", "kFloor = -3.402823466e+38f", "kFloor = -INFINITY"),
    "int32 row offset": ("cuda/softmax.cuh", "+ rows.offset(row)", "+ static_cast<int>(rows.offset(row))"),
    "int32 target": ("cuda/softmax.cuh", "const int64_t target = targets", "const int32_t target = targets"),
    "target not checked": ("cuda/softmax.cuh", "0 <= target && target < vocab ?", "0 <= target ?"),
    "target by the wrong thread": ("cuda/sweep.cuh", "body / kWidth<T> %", "j / kWidth<T> %"),
    "target element left as the others": ("cuda/softmax.cuh", "if (target >= 0 && static", "if (false && static"),
    "target's logit after its gradient": (
        "cuda/softmax.cuh",
        "(stats.target - max) * c",
        "(to_float(logits[target]) - max) * c",
    ),
    "ignored row read": ("cuda/softmax.cuh", "return !targets.ignored(row) && (", "return ("),
    "multiplied by 0, not selected": ("cuda/softmax.cuh", "if (coefficient == 0.f) return zero_row(grad, vocab);", ""),
    "idle token times the upstream": ("cuda/grad.cuh", "if (coefficient == 0.f || upstream == 0.f) return 0.f;", ""),
    "temperature left out of the slope": ("cuda/softmax.cuh", "coefficient * inverse_temperature;", "coefficient;"),
    "rows beyond the grid": (
        "cuda/loss_and_grad.cuh",
        "row < p.logits.n; row += gridDim.x",
        "row < p.logits.n; row += p.logits.n",
    ),
    "masked tokens in the normaliser": ("cuda/objective.cuh", "p.tokens.active(row) ?", "true ?"),
    "g without its clip": ("objectives.h", "-ceiling * advantage, 0.f}", "-ceiling * advantage, -ratio * advantage}"),
    "ignore_index in the gradient": (
        "cuda/grad.cuh",
        "return target >= 0 ?",
        "if (p.targets.ignored(row)) return 0.f;\n    return target >= 0 ?",
    ),
    "moment not rescaled": (
        "cuda/sweep.cuh",
        "moment = e * (moment + fmaxf(exponent, kLowestExponent) * sum);",
        "moment *= e;",
    ),
    "moment rescaled after its sum": (
        "cuda/sweep.cuh",
        "moment = e * (moment + fmaxf(exponent, kLowestExponent) * sum);\n        sum *= e;",
        "sum *= e;\n        moment = e * (moment + fmaxf(exponent, kLowestExponent) * sum);",
    ),
    "p log p of 0 is NaN": (
        "cuda/sweep.cuh",
        "moment += e * fmaxf(exponent, kLowestExponent);",
        "moment += e * exponent;",
    ),
    "mean of levels to several maxima": ("cuda/sweep.cuh", "linear += count * fmaxf(shift, kFloor);", ""),
    "shift overflows": ("cuda/sweep.cuh", "count * fmaxf(shift, kFloor)", "count * shift"),
    "moment in log2": ("cuda/terms.cuh", "all.sums.moment * kLn2", "all.sums.moment"),
    "tanh by ex2 alone": ("cuda/transform.cuh", "size < 0.625f ?", "false ?"),
    "tanh's series too far": ("cuda/transform.cuh", "size < 0.625f ?", "size < 1.f ?"),
    "softcap left out of the scale": ("cuda/transform.cuh", "{softcap * inverse_temperature,", "{inverse_temperature,"),
    "softcap left out of the slope": ("cuda/terms.cuh", "+ uniform) * z.slope(level);", "+ uniform);"),
    "softcap left out of the target's slope": ("cuda/terms.cuh", "* z.slope(z.level(logit)) *", "*"),
    "0 * -inf in the gradient": (
        "cuda/terms.cuh",
        "exponent = fmaxf(z.exponent(level - top), kLowestExponent);",
        "exponent = z.exponent(level - top);",
    ),
    "mean of z left out of the gradient": ("cuda/terms.cuh", "+ uniform) *", ") *"),
    "U taken for 1": ("cuda/terms.cuh", "by.g * total", "by.g"),
    "targets left as the others": ("cuda/terms.cuh", "by.g * (share - total * p)", "by.g * (0.f - total * p)"),
    "targets that do not count": ("cuda/terms.cuh", "if (share == 0.f) return;", ""),
    "no target beyond the block": (
        "cuda/terms.cuh",
        "k += blockDim.x)\n        sums.add",
        "k += targets.num())\n        sums.add",
    ),
    "a target twice, with its own share": (
        "cuda/terms.cuh",
        "if (targets.index(i, vocab) == target) share +=",
        "if (i == k) share +=",
    ),
    "targets before the others are done": ("cuda/terms.cuh", "__syncthreads();", ""),
    "one target by thread 0": ("cuda/terms.cuh", "== span.owner(target)", "== 0"),
    "targets' logits after their gradient": (
        "cuda/terms.cuh",
        "element(targets.logit(k), share)",
        "element(target_logit(logits, vocab, targets, k), share)",
    ),
    "no coefficient, multiplied": ("cuda/terms.cuh", "if (by.none()) return zero_row(grad, vocab);", ""),
    "idle token with terms times the upstream": (
        "cuda/grad.cuh",
        "times(plain.coefficients.data[i * n + row], upstream)",
        "plain.coefficients.data[i * n + row] * upstream",
    ),
    "target outside, coefficients from elsewhere": ("cuda/grad.cuh", "if (sums.logp != sums.logp) by.g = NAN;", ""),
    "logprob of an ignored target": ("cuda/loss_and_grad.cuh", "reads && !targets.ignored(k) ?", "reads ?"),
    "logits left for logprobs": ("cuda/loss_and_grad.cuh", "k = threadIdx.x; k < num;", "k = threadIdx.x; k < 1;"),
    "entropy nobody asked for": ("cuda/stats.cuh", "p.terms.entropy ? stats.moment : 0.f", "stats.moment"),
    "zeros scaled": ("cuda/scale.cuh", "x == 0.f ? x : x * scale", "x * scale"),
}  # fmt: skip

UNSEEN = {"skewed loads beyond the row"}  # what is read is thrown away: only AddressSanitizer can tell


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, bindings, tmp_path):
    sanitize = bug in UNSEEN
    done = build.sweep(build.build(tmp_path, bindings, sanitize=sanitize, edit=BUGS[bug]), sanitize=sanitize)
    assert done.returncode != 0, "the sweep passes with this bug"
    assert not sanitize or "load_skewed" in done.stderr, done.stderr[-3000:]
