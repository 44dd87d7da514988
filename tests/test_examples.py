"""The examples run, as somebody would start them, and judge themselves: they exit with 1 where losses disagree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # at a port that is free


def run_example(*arguments: str) -> str:
    for package in ("tokenizers", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    # the checkout before an installed package
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("head", ["logits", "linear"])
def test_demo(head, tmp_path):
    out = run_example("examples/demo.py", "--quick", "--head", head, "--output", str(tmp_path))
    assert out.count(" agrees\n") == 5 and "DISAGREES" not in out
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_tensor_parallel():
    out = run_example(*TORCHRUN, "examples/tensor_parallel.py", "--quick")
    assert out.count(" agrees\n") == 2 and "DISAGREES" not in out  # tensor and fsdp
