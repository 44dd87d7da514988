"""The adapter of verl: with verl itself in a process of its own, where its dependencies are stubs; and without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verl_sharded
from ranks import Ranks

from fused_losses.adapters import comparison

HERE = Path(__file__).parent
needs_verl = pytest.mark.skipif(comparison.version("verl") is None, reason="verl is not installed: tests/oracles.txt")
needs_megatron = pytest.mark.skipif(
    comparison.version("megatron") is None, reason="megatron-core is not installed: tests/oracles.txt"
)

PLUGIN = """
import sys
sys.path.insert(0, {here!r})
import stubbed
stubbed.stub("verl")
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import torch_functional
assert get_policy_loss_fn("fused_vanilla").__module__ == "fused_losses.adapters.verl"
assert torch_functional.logprobs_from_logits.__module__ == "fused_losses.adapters.verl"
"""


@needs_verl
def test_with_verl():
    tests = [sys.executable, str(HERE / "stubbed.py"), "verl", str(HERE / "verl_stubbed.py")]
    done = subprocess.run(tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@needs_verl
def test_named_in_the_environment_it_is_there_as_verl_starts():
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "fused_losses.adapters.plugins.verl"}
    started = [sys.executable, "-c", PLUGIN.format(here=str(HERE))]
    done = subprocess.run(started, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_verl
@needs_megatron
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabulary_over_two_ranks(ranks: Ranks, dtype):
    ranks(2, verl_sharded.pair, dtype)
