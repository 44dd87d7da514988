"""The adapter of SkyRL, with SkyRL in a process of its own, where its dependencies are stubs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fused_losses.adapters import comparison

HERE = Path(__file__).parent


@pytest.mark.skipif(comparison.version("skyrl") is None, reason="skyrl is not installed: tests/oracles.txt")
def test_with_skyrl():
    tests = [sys.executable, str(HERE / "stubbed.py"), "skyrl", str(HERE / "skyrl_stubbed.py")]
    done = subprocess.run(tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
