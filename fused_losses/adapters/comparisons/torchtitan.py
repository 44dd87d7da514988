"""torchtitan's losses beside ours, in its own ChunkedLossWrapper and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.experiments.rl.losses import DAPOLoss, GRPOLoss

from .. import torchtitan as ours
from ..comparison import Comparison

B, L, H, V = 2, 16, 32, 1000
BF16 = 2**-8  # a logit's gradient may be rounded to the other of two neighbours
WHY = "gradients of bf16 logits are rounded to bf16, of numbers that differ by float32's rounding"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES: dict[str, tuple[Any, Any, Callable[[], dict[str, Tensor]]]] = {
    "torchtitan.components.loss.CrossEntropyLoss": (
        CrossEntropyLoss.Config(),
        ours.CrossEntropyLoss.Config(),
        lambda: {"labels": labels()},
    ),
    "torchtitan.experiments.rl.losses.DAPOLoss": (
        DAPOLoss.Config(ratio_clip_high=0.28),
        ours.DAPOLoss.Config(ratio_clip_high=0.28),
        lambda: rollout(),
    ),
    "torchtitan.experiments.rl.losses.GRPOLoss": (
        GRPOLoss.Config(clip_eps=0.1),
        ours.GRPOLoss.Config(clip_eps=0.1),
        lambda: rollout(),
    ),
}


def comparisons() -> Iterator[Comparison]:
    for slot, (theirs, own, inputs) in CASES.items():
        for dtype in DTYPES:
            for chunks in (0, 1, 8):
                yield Comparison(
                    slot,
                    f"{dtype}, {chunks} chunks",
                    partial(step, theirs, chunks, DTYPES[dtype], inputs),
                    partial(step, own, chunks, DTYPES[dtype], inputs),
                    BF16 if dtype == "bf16" else 1e-5,
                    WHY if dtype == "bf16" else "",
                )


def step(config: Any, chunks: int, dtype: torch.dtype, inputs: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The loss of a head, its gradients, and the metrics. chunks: 0 is without a wrapper."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    hidden = torch.randn(B, L, H, dtype=dtype, requires_grad=True)
    tokens = torch.tensor(20)
    decoded = hidden * 1.0
    if chunks:
        wrapper = ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=config).build()
        wrapper.set_lm_head(head)
        loss, metrics = wrapper(decoded, global_valid_tokens=tokens, **inputs())
    else:
        loss, metrics = config.build()(head(decoded), global_valid_tokens=tokens, **inputs())
    loss.backward()
    assert hidden.grad is not None and head.weight.grad is not None
    return {"loss": loss.detach(), "hidden.grad": hidden.grad, "weight.grad": head.weight.grad, **metrics}


def labels() -> Tensor:
    """A prompt of five tokens, two of eight chunks and a half."""
    found = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(1))
    found[:, :5] = -100
    return found


def rollout() -> dict[str, Tensor]:
    """A prompt of five tokens; two logprobs that the generator did not give."""
    generator = torch.Generator().manual_seed(2)
    logprobs = -6.9 + 0.7 * torch.randn(B, L, generator=generator)
    logprobs[0, 7], logprobs[1, 9] = torch.nan, -torch.inf
    mask = (torch.arange(L) >= 5).expand(B, L)
    advantages = torch.randn(B, 1, generator=generator) * mask
    return {
        "labels": torch.randint(V, (B, L), generator=generator),
        "generator_logprobs": logprobs,
        "advantages": advantages,
        "loss_mask": mask,
    }
