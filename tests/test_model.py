"""The performance model: what must hold whatever it assumes, and what its page says of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ERROR = 0.08  # of published times, as model.py says

pytestmark = pytest.mark.xdist_group("model")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """bench/model.py and bench/fluid.py, imported as scripts import each other."""
    names = {path.stem for path in (ROOT / "bench").glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(model=import_module("model"), fluid=import_module("fluid"))
        for name in names:
            sys.modules.pop(name, None)


def times(bench: SimpleNamespace, kernels: list[Any], vocab: int, gpu: Any = None, **of_run: Any) -> list[float]:
    gpu = gpu or bench.model.H200
    return bench.fluid.times([bench.fluid.Run(gpu, kernel, vocab, 512, **of_run) for kernel in kernels])


@pytest.mark.parametrize("state", ["IN_STEP", "APART"])
@pytest.mark.parametrize("gpu", ["H100", "B200"])
def test_a_copy_takes_what_a_copy_takes(bench: SimpleNamespace, gpu: str, state: str) -> None:
    gpu, assume = bench.model.GPUS[gpu], getattr(bench.fluid, state)
    run = bench.fluid.Run(gpu, bench.model.copy(gpu), 128256, 2048, assume=assume)
    (time,) = bench.fluid.times([run])
    assert time / (run.floor + assume.launch) == pytest.approx(1, abs=0.015)


def test_nothing_is_faster_than_its_bytes(bench: SimpleNamespace) -> None:
    kernels = (bench.model.one_pass, bench.model.stats, bench.model.grad)
    runs = [
        bench.fluid.Run(gpu, kernel(gpu, 32000, 512), 32000, 512, assume=assume)
        for gpu in bench.model.GPUS.values()
        for kernel in kernels
        for assume in (bench.fluid.IN_STEP, bench.fluid.APART)
    ]
    for run, time in zip(runs, bench.fluid.times(runs), strict=True):
        assert time >= run.floor + run.assume.launch, run


@pytest.mark.parametrize("kernel", ["one_pass", "two_sweeps", "stats", "grad"])
def test_more_instructions_are_never_faster(bench: SimpleNamespace, kernel: str) -> None:
    plain = getattr(bench.model, kernel)(bench.model.H200, 50257, 512)

    def longer(factor: float) -> Any:
        both = (s and s._replace(instructions=factor * s.instructions) for s in (plain.sums, plain.maps))
        return replace(plain, **dict(zip(("sums", "maps"), both, strict=True)))

    found = times(bench, [longer(factor) for factor in (0.5, 1, 2, 8)], 50257)
    assert all(b >= 0.995 * a for a, b in pairwise(found)) and found[-1] > 1.5 * found[0]


@pytest.mark.parametrize("kernel", ["one_pass", "two_sweeps"])
def test_less_l2_is_never_faster(bench: SimpleNamespace, kernel: str) -> None:
    gpus = [replace(bench.model.H200, l2_bytes=size * 1_000_000) for size in (200, 100, 50, 25)]
    same = getattr(bench.model, kernel)(bench.model.H200, 262144, 512)  # the launch would choose another
    runs = [bench.fluid.Run(gpu, same, 262144, 512) for gpu in gpus]
    found = bench.fluid.times(runs)
    assert all(b >= 0.995 * a for a, b in pairwise(found)) and found[-1] > 1.05 * found[0]


@pytest.mark.parametrize("kernel", ["one_pass", "two_sweeps", "stats"])
def test_masked_rows_are_faster(bench: SimpleNamespace, kernel: str) -> None:
    gpu = bench.model.H200
    kernel = getattr(bench.model, kernel)(gpu, 32000, 2048)
    runs = [bench.fluid.Run(gpu, kernel, 32000, 2048, masked=masked) for masked in (0, 0.375, 0.75)]
    found = bench.fluid.times(runs)
    assert all(b < 0.97 * a for a, b in pairwise(found))


def test_runs_do_not_know_each_other(bench: SimpleNamespace) -> None:
    kernels = [bench.model.one_pass(bench.model.H200, 32000, 512), bench.model.copy(bench.model.H200)]
    apart = bench.fluid.APART
    alone = [times(bench, [kernel], 32000, assume=apart)[0] for kernel in kernels]
    assert times(bench, kernels, 32000, assume=apart) == pytest.approx(alone, rel=1e-9)


def test_published_times_are_met(bench: SimpleNamespace) -> None:
    """On an eighth of the rows."""
    for p in bench.model.PUBLISHED:
        states = (bench.fluid.IN_STEP, bench.fluid.APART)
        runs = [bench.fluid.Run(p.gpu, p.kernel, p.vocab, p.n // 8, p.element, assume=a) for a in states]
        launch = runs[0].assume.launch
        off = min(abs((8 * (time - launch) + launch) / 1e6 / p.ms - 1) for time in bench.fluid.times(runs))
        assert off < ERROR, p.what


def test_the_launch_is_that_of_the_kernels(bench: SimpleNamespace) -> None:
    model = bench.model
    shapes = [tuple(model.on_chip_shape(model.H100, vocab, 2)) for vocab in model.VOCABULARIES]
    assert shapes == [(256, 3, 4, 1), (256, 2, 7, 1), (512, 1, 7, 1), (512, 1, 7, 1), (512, 1, 7, 2)]
    assert model.on_chip_shape(model.A100, 262144, 2) == (512, 1, 5, 1)
    assert model.on_chip_shape(model.H100, 7000, 2) is None
    small = replace(model.A100, shared_bytes=99 * 1024, shared_bytes_of_multiprocessor=100 * 1024)
    assert model.on_chip_shape(small, 128256, 2) == (512, 1, 3, 1)
    assert tuple(model.two_sweep_shape(model.H100, 128256, 2)) == (1024, 1, 0, 1)
    assert tuple(model.stream_shape(32000)) == (256, 4, 0, 1)

    engine = ROOT / "csrc" / "cuda" / "on_chip.cuh"
    source = engine.read_text() + (engine.parent / "launch.cu").read_text()
    for name, value in {"kSlots": model.SLOTS, "kGroups": model.GROUPS, "kOfOne": 512, "kOfSeveral": 256}.items():
        assert re.search(rf"\b{name} = {value}\b", source), name


def test_the_page_says_what_the_model_says(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its first line; `python bench/model.py --write` puts all of them there."""
    monkeypatch.setattr(bench.model, "VOCABULARIES", (32000,))
    assert bench.model.main(["--gpu", "H100"]) == 0
    head, _, line = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs" / "kernels.md").read_text().splitlines()
    assert head in page
    written = next(text for text in page if text.startswith("| H100 | 32000 |"))
    ratios = [[float(x) for x in re.findall(r"\d+\.\d\d", text)] for text in (line, written)]
    assert len(ratios[0]) == 10 and ratios[1] == pytest.approx(ratios[0], abs=0.02)


def test_what_was_measured_stands_beside_what_is_predicted(bench: SimpleNamespace) -> None:
    """Of our own kernels, on a GPU that the model knows, in the modes that it has."""
    fields = {
        "contender": "fused", "backend": "cuda", "device": "NVIDIA H200", "case": "2: 8192x32000", "loss": "ppo",
        "group": "fwd+bwd", "dtype": "bf16", "n": 512, "vocab": 32000, "ratio_to_copy": 1.07, "ratio_to_read": None,
    }  # fmt: skip
    records = [
        {**fields, "mode": "separate"},
        {**fields, "mode": "inplace", "ratio_to_copy": 1.01},
        {**fields, "mode": "forward", "group": "forward", "ratio_to_read": 1.23},
        {**fields, "mode": "separate", "contender": "eager", "backend": None},
        {**fields, "mode": "reused"},
    ]
    table = bench.model.beside(records)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["2: 8192x32000 bf16, ppo", "separate", "1.07"],
        ["2: 8192x32000 bf16, ppo", "inplace", "1.01"],
        ["2: 8192x32000 bf16, ppo", "forward", "1.23"],
    ]
    assert rows[0][3] == rows[1][3] and re.fullmatch(r"\d\.\d\d / \d\.\d\d", rows[2][3])
    assert bench.model.beside([{**r, "device": "AMD EPYC"} for r in records]) is None
