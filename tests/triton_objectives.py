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


def doubled(logp: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return -2 * scale * logp, (-2 * scale).expand_as(logp)


def tripled(logp: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return -3 * scale * logp, (-3 * scale).expand_as(logp)


@triton.jit
def doubled_triton(logp, scale):
    return -2 * scale * logp, -2 * scale


@triton.jit
def tripled_triton(logp, scale):
    return -3 * scale * logp, -3 * scale


# of one name: each must still be itself
DOUBLED = Objective("mine", doubled, ("scale",), triton=doubled_triton)
TRIPLED = Objective("mine", tripled, ("scale",), triton=tripled_triton)
