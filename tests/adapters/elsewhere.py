"""A function of a test module, run in a process of its own where a framework's missing dependencies are stubs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fused_losses.adapters import comparison

HERE = Path(__file__).parent


def run(framework: str, *functions: Callable[[], None]) -> None:
    """One after the other; whatever one raises fails the test."""
    if comparison.version(framework) is None:
        pytest.skip(f"{comparison.FRAMEWORKS[framework]} is not installed: tests/oracles.txt")
    module = functions[0].__module__
    calls = "; ".join(f"{module}.{function.__name__}()" for function in functions)
    code = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]; import stubbed; "
    code += f"stubbed.stub({framework!r}); import {module}; {calls}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
