"""Every kernel once or twice on small problems, for compute-sanitizer to watch:

    compute-sanitizer --tool racecheck --error-exitcode 9 python bench/sanitized.py

Ragged, strided and masked rows, terms, several targets; short rows, rows that fit on a multiprocessor and one that does
not. Numbers are the tests' business.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fused_losses
from fused_losses import backends

VOCABULARIES = (1000, 9001, 32000, 131075)
DTYPES = (torch.bfloat16, torch.float32)
TERMS: tuple[dict[str, Any], ...] = (
    {},
    {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs": -3.0},
    {"softcap": 20.0},
)


def problems(device: torch.device, vocabularies: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, targets): three rows of a sequence's four, one of them ignored."""
    for vocab, dtype in product(vocabularies, DTYPES):
        logits = torch.randn(2, 4, vocab, device=device).to(dtype)[:, :-1]
        targets = torch.randint(vocab, (2, 3), device=device)
        targets[0, 1] = -100
        yield logits, targets


def everything(device: torch.device, backend: str, vocabularies: tuple[int, ...] = VOCABULARIES) -> int:
    """Calls made."""
    calls = 0
    for logits, targets in problems(device, vocabularies):
        old_logprobs = torch.full(targets.shape, -5.0, device=device)
        advantages = torch.linspace(-1, 1, targets.numel(), device=device).view(targets.shape)
        for terms, way in product(TERMS, ({}, {"recompute": True}, {"inplace": True})):
            leaf = logits.clone().requires_grad_()
            mine = leaf * 1 if way.get("inplace") else leaf
            loss = fused_losses.ppo(mine, targets, old_logprobs, advantages, backend=backend, **terms, **way)
            (loss * 2).backward()
            calls += 1
        leaf = logits.clone().requires_grad_()
        several = targets[..., None].expand(*targets.shape, 3)
        fused_losses.cross_entropy(leaf, several, label_smoothing=0.1, z_loss=0.1, backend=backend).backward()
        fused_losses.logprobs(logits, targets, backend=backend)
        calls += 2
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    backends.resolve(options.backend, device)  # raises with the cause
    print(f"{everything(device, options.backend)} calls on {options.backend}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
