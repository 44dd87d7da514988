"""Each framework's own code beside ours, as ``python -m fused_losses.adapters`` runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_losses.adapters
from fused_losses.adapters import comparison
from fused_losses.adapters.__main__ import main

FRAMEWORKS = sorted(path.stem for path in Path(comparison.__file__).parent.glob("comparisons/[!_]*.py"))
STUBBED = Path(__file__).parent / "stubbed.py"


def test_every_adapter_is_compared():
    adapters = Path(fused_losses.adapters.__file__).parent
    assert sorted({path.stem for path in adapters.glob("[!_]*.py")} - {"slots", "comparison"}) == FRAMEWORKS
    assert set(FRAMEWORKS) <= set(comparison.FRAMEWORKS)


def test_a_framework_that_is_asked_for_and_missing(monkeypatch, capsys):
    def missing(framework):
        raise ImportError(name="of_the_framework")
        yield

    monkeypatch.setattr(comparison, "comparisons", missing)
    monkeypatch.setattr(comparison, "version", lambda framework: None)
    for arguments, code in (["trl"], 1), ([], 0):
        monkeypatch.setattr(sys, "argv", ["adapters", *arguments])
        assert main() == code
        assert "\ntrl: not compared, it is not installed\n" in capsys.readouterr().out


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_their_numbers(framework):
    if comparison.version(framework) is None and framework not in ("prime_rl", "nemo_rl"):
        pytest.skip(f"{comparison.FRAMEWORKS[framework]} is not installed: tests/oracles.txt")
    done = subprocess.run([sys.executable, str(STUBBED), framework], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"\d ms +\d", done.stdout), done.stdout + done.stderr[-3000:]
