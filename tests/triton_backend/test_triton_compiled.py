"""What the Triton kernels compile to, by compiled.py in a process of its own: no GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Instructions per element of the sweep that reads and of the one that writes, without terms and with. The tiles of the
# reading sweep that are masked, one or two a row, may take MASKED more.
BOUNDS = {
    "": (7.6, 7.1),
    "entropy": (10.4, 9.3),
    "smoothed": (9.2, 7.2),
    "capped": (29.0, 29.0),
    "capped entropy": (32.5, 31.0),
    "targets": (31.5, 29.0),
}
MASKED = 3.3


@pytest.fixture(autouse=True)
def small_tiles() -> None:
    """Those that ship: nothing runs here."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


pytestmark = pytest.mark.xdist_group("compiled")  # one worker compiles


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(folder.parent.parent), environment.get("PYTHONPATH")))
    )
    command = [sys.executable, str(folder / "compiled.py"), "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def kernels(report: dict[str, Any], name: str, **wanted: object) -> list[dict[str, Any]]:
    found = [k for k in report["kernels"] if k["kernel"] == name and all(k[key] == v for key, v in wanted.items())]
    assert found
    return found


def describe(k: dict[str, Any]) -> str:
    return f"{k['kernel']} {k['case']} sm_{k['arch']} V={k['vocab']} {k['dtype']}: {k['registers']} registers"


def test_no_loop_spills(report: dict[str, Any]) -> None:
    """What a row keeps for later may, a few registers once per row: none of a plain row in whole vectors, but for two
    on sm_100; most of a row with entropy and KL there, which has twelve columns waiting."""
    for k in report["kernels"]:
        sweeps = k["loops"] if k["kernel"] in ("loss_and_grad", "stats") else []
        assert not any(loop["local"] for loop in sweeps), describe(k)
        newest = k["arch"] == 100
        if k["case"] == "" and k["vocab"] % 8 == 0:
            allowed = 4 if newest else 0
        else:
            allowed = 50 if newest and k["case"] == "entropy" else 32
        assert k["local"] <= allowed, f"{describe(k)}, {k['local']} local accesses"


def test_two_programs_of_eight_warps_share_a_processor(report: dict[str, Any]) -> None:
    """The walk counts on it where two rows per processor fit in L2."""
    for k in kernels(report, "loss_and_grad", warps=8, one_shot=False):
        assert 2 * 256 * k["registers"] <= 65536, describe(k)


@pytest.mark.parametrize("name", ["loss_and_grad", "stats", "grad", "scale"])
def test_sweeps_use_128_bit_accesses(report: dict[str, Any], name: str) -> None:
    """For any vocabulary, an odd one included, and beside the hole of the target: outside the ragged ends nothing
    narrower touches logits."""
    for k in kernels(report, name):
        assert k["ldg128"] >= 4, describe(k)
        assert name == "stats" or k["stg128"] >= 4, describe(k)
        for loop in k["loops"]:
            if loop["ldg128"] and name in (
                "loss_and_grad",
                "stats",
            ):  # the sweeps; the others loop over rows only
                assert loop["ldg"] == loop["ldg128"] and loop["stg"] == loop["stg128"], describe(k)
        others = (24, 12) if k["case"] else (12, 5)  # per-token numbers, ragged ends
        assert k["ldg"] - k["ldg128"] <= others[0] and k["stg"] - k["stg128"] <= others[1], describe(k)


def test_instructions_per_element(report: dict[str, Any]) -> None:
    """At copy speed an H200 has time for 13.8 a bfloat16 element forward, 27.6 with backward; a B200 for 9.7, 19.5."""
    for k in kernels(report, "loss_and_grad", one_shot=False) + kernels(report, "stats"):
        reading, writing = [], []
        for loop in k["loops"]:
            elements = loop["ldg128"] * (8 if k["dtype"] == "bfloat16" else 4)
            if elements:
                (writing if loop["stg"] else reading).append(loop["length"] / elements)
                capped = "capped" in k["case"] or k["case"] == "targets"  # smaller tiles, and an ex2 for tanh
                assert loop["ex2"] / elements <= (2.5 if capped else 1.25), f"{describe(k)}: {loop}"
        read, written = BOUNDS[k["case"]]
        assert 1 <= len(reading) <= 2 and min(reading) <= read, f"{describe(k)}: {reading}"
        assert max(reading) <= read + MASKED, f"{describe(k)}: {reading}"
        assert all(each <= written for each in writing), f"{describe(k)}: {writing}"
    for k in kernels(report, "loss_and_grad", one_shot=True, case=""):
        assert k["instructions"] / 64 <= 28, describe(k)  # of the whole kernel, code for masked rows included


@pytest.mark.parametrize("series", ["odd", "slices", "terms", "custom"])
@pytest.mark.parametrize("kernel", ["loss_and_grad", "stats", "objective", "grad", "scale", "normaliser", "reduce"])
def test_no_recompilation(report: dict[str, Any], kernel: str, series: str) -> None:
    """N, V, K, lengths, strides, thresholds, coefficients, temperature, ignore_index and the alignment of columns are
    runtime values, for any number of inputs: those of tuples, too."""
    assert report["variants"][series][kernel] == 1


def test_rows_go_to_grid_axis_0(report: dict[str, Any]) -> None:
    """Axis 0 takes 2^31 - 1 programs; the others 65535."""
    assert report["grids"]["loss_and_grad"] == [70_000]
    assert report["grids"]["stats"] == [70_000]
    assert report["grids"]["grad"] == [70_000, 1]


def test_kernels_have_few_parameters() -> None:
    from fused_losses.backends import triton as backend

    for name, kernel in vars(backend._kernels()).items():
        if name not in ("objectives", "records"):
            assert len(kernel.arg_names) <= 18, name
