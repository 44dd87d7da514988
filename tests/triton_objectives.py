"""Objectives as a user of the library may write them: a formula for eager, a function for Triton."""

from __future__ import annotations

import torch
import triton

from fused_losses.objectives import Objective

NUM_INPUTS = 9


def weighted_sum(logp: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-logp * sum_i (i + 1) input_i"""
    weight = sum((i + 1) * value for i, value in enumerate(inputs))
    return -logp * weight, -weight.expand_as(logp)


@triton.jit
def weighted_sum_triton(logp, a, b, c, d, e, f, g, h, i):
    weight = a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i
    return -logp * weight, -weight


WEIGHTED_SUM = Objective(
    "weighted_sum", weighted_sum, tuple(f"input_{i}" for i in range(NUM_INPUTS)), triton=weighted_sum_triton
)
