"""The CUDA kernels, compiled for the CPU with one fiber per thread: right everywhere, and the tests can tell."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from cases import DTYPES, LOSSES, MODES, check, make

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_through_the_library(device_code, objective, mode, dtype, monkeypatch):
    """In the place of the CPU backend, against the error that the contract allows. ex2 errs as on a GPU."""
    monkeypatch.setattr(cpu, "unusable", lambda device: None)
    for function in ("loss_and_grad", "stats", "objective", "grad", "scale"):
        monkeypatch.setattr(cpu, function, getattr(device_code, function), raising=False)
    for vocab in (33, 3001):
        check(make(objective, (7,), vocab, dtype), "cpu", upstream=0.5, **MODES[mode])


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
    "sum not rescaled": ("cuda/sweep.cuh", "sum *= exp2_approx((max - new_max) * c);", ""),
    "maximum starts at -inf": ("cuda/sweep.cuh", "max = -3.402823466e+38f", "max = -INFINITY"),
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
    "rows beyond the grid": ("cuda/loss_and_grad.cuh", "row += gridDim.x", "row += p.logits.n"),
    "masked tokens in the normaliser": ("cuda/objective.cuh", "p.tokens.active(row) ?", "true ?"),
    "g without its clip": ("objectives.h", "-high * advantage, 0.f}", "-high * advantage, -ratio * advantage}"),
    "ignore_index in the gradient": (
        "cuda/grad.cuh",
        "return target >= 0 ?",
        "if (p.targets.ignored(row)) return 0.f;\n    return target >= 0 ?",
    ),
    "zeros scaled": ("cuda/scale.cuh", "x == 0.f ? x : x * scale", "x * scale"),
}  # fmt: skip

UNSEEN = {"skewed loads beyond the row"}  # what is read is thrown away: only AddressSanitizer can tell


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, bindings, tmp_path):
    sanitize = bug in UNSEEN
    done = build.sweep(build.build(tmp_path, bindings, sanitize=sanitize, edit=BUGS[bug]), sanitize=sanitize)
    assert done.returncode != 0, "the sweep passes with this bug"
    assert not sanitize or "load_skewed" in done.stderr, done.stderr[-3000:]
