"""Fixtures of the suite: every test that takes ``backend`` runs once on each backend that works here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from ranks import Ranks

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
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
else:
    torch.set_num_threads(2)


def device_of(backend: str) -> torch.device:
    """Where the tests run a backend: the GPU if that is what it is for and there is one."""
    return torch.device("cuda" if HAS_GPU and backend in ("triton", "cuda") else "cpu")


def require(backend: str) -> None:
    reason = backends.unusable(backend, device_of(backend))
    if reason is not None:
        needs_gpu = not HAS_GPU and backend == "cuda"
        pytest.skip(f"{NEEDS_GPU}: backend {backend}" if needs_gpu else f"backend {backend}: {reason}")


BACKENDS = ("eager", "cpu", "triton", "cuda")


def instruction_sets() -> list[str]:
    """Those that the CPU backend has here, the best first."""
    try:
        return import_module("fused_losses._cpu").instruction_sets()
    except ImportError:
        return []


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    cpu = import_module("fused_losses._cpu")
    before = cpu.instruction_set_in_use()
    cpu.use_instruction_set(instruction_set)
    try:
        yield
    finally:
        cpu.use_instruction_set(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--instruction-set", help="what the CPU backend runs on throughout: avx512, avx2 or baseline")
    parser.addoption("--all-bugs", action="store_true", help="every seeded bug of the kernels, not a twentieth of them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "each_instruction_set: the CPU backend runs with every one of the machine, as each sums in an order of its own",
    )
    config.addinivalue_line(
        "markers",
        "seeded_bugs: each of its cases compiles or interprets kernels of its own; a twentieth runs unless asked",
    )
    forced = config.getoption("--instruction-set")
    if forced is None:
        return
    if forced not in instruction_sets():
        raise pytest.UsageError(f"--instruction-set {forced}: here are {', '.join(instruction_sets()) or 'none'}")
    import_module("fused_losses._cpu").use_instruction_set(forced)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All seeded bugs take as long as all other tests together. That their texts are still there is tested of each."""
    if config.getoption("--all-bugs"):
        return
    left_out, of_test = [], Counter[str]()
    for item in items:
        if item.get_closest_marker("seeded_bugs"):
            name = item.nodeid.partition("[")[0]
            of_test[name] += 1
            if of_test[name] % 20 != 1:
                left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


def pytest_report_header(config: pytest.Config) -> str:
    return f"CPU instruction sets: {config.getoption('--instruction-set') or ', '.join(instruction_sets()) or 'none'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    marked = metafunc.definition.get_closest_marker("each_instruction_set") is not None
    each = marked and not metafunc.config.getoption("--instruction-set")
    cpu = [f"cpu-{name}" for name in instruction_sets()] if each else []
    params = [p for name in BACKENDS for p in (cpu if cpu and name == "cpu" else [name])]
    metafunc.parametrize("backend", params, indirect=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws depends on no test before it."""
    torch.manual_seed(0)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, instruction_set = request.param.partition("-")
    require(name)
    if not instruction_set:
        yield name
        return
    with using(instruction_set):
        yield name


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


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes of a gloo group, which any test may hand a function to."""
    yield Ranks()
    Ranks.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NEEDS_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests skipped: {NEEDS_GPU}", yellow=True)
