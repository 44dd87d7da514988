"""Fixtures of the suite: every test that takes ``backend`` runs once on each backend that works here."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


def patch_language_once() -> None:
    """The interpreter replaces triton.language's functions for a launch, and looks for them all again at each call of
    a device function in it, though none is left to replace: two thirds of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_once(fn):
        seen = [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
        if any(tl.core.is_builtin(module.load) for module in seen):
            return patch_lang(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: its kernels then run on CPU tensors
    try:
        from triton_interpreter import round_to_nearest

        round_to_nearest()
        patch_language_once()
    except ImportError:  # no triton here, then
        pass

from fused_losses import backends  # noqa: E402

NEEDS_GPU = "needs a GPU"

# More threads than cores, as two workers of two threads on two cores, spend their time waiting for each other. What
# depends on the number of threads sets it.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def device_of(backend: str) -> torch.device:
    """Where the tests run a backend: the GPU if that is what it is for and there is one."""
    return torch.device("cuda" if HAS_GPU and backend in ("triton", "cuda") else "cpu")


def require(backend: str) -> None:
    reason = backends.unusable(backend, device_of(backend))
    if reason is not None:
        needs_gpu = not HAS_GPU and backend == "cuda"
        pytest.skip(f"{NEEDS_GPU}: backend {backend}" if needs_gpu else f"backend {backend}: {reason}")


@pytest.fixture(params=("eager", "cpu", "triton", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return request.param


@pytest.fixture(params=("cpu", "triton", "cuda"))
def kernels(request: pytest.FixtureRequest) -> str:
    """The backends with code of their own, for what plain torch can't promise (memory, repeatability)."""
    require(request.param)
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the test's backend."""
    name = "backend" if "backend" in request.fixturenames else "kernels"
    return device_of(request.getfixturevalue(name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NEEDS_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests skipped: {NEEDS_GPU}", yellow=True)
