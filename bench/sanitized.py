"""Every kernel once or twice on small problems, for compute-sanitizer to watch:

    compute-sanitizer --tool racecheck --error-exitcode 9 python bench/sanitized.py

Ragged, strided and masked rows, terms, several targets, statistics, every loss; short rows, rows that fit on a
multiprocessor and one that does not; more rows than blocks, as what a block does with its next one is what may go wrong
on chip. Numbers are the tests' business.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fused_losses
from fused_losses import backends
from fused_losses.objectives import OBJECTIVES

VOCABULARIES = (1000, 9001, 32000, 131075)
DTYPES = (torch.bfloat16, torch.float32)
TERMS: tuple[dict[str, Any], ...] = (
    {},
    {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs": -3.0},
    {"softcap": 20.0},
)
# V, element type, and as many blocks of a multiprocessor at most, or pairs of them
TURNS = ((9001, torch.bfloat16, 3), (33001, torch.float32, 1), (131075, torch.float32, 1))


def problems(device: torch.device, vocabularies: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, targets): three rows of a sequence's four, one of them ignored."""
    for vocab, dtype in product(vocabularies, DTYPES):
        logits = torch.randn(2, 4, vocab, device=device).to(dtype)[:, :-1]
        targets = torch.randint(vocab, (2, 3), device=device)
        targets[0, 1] = -100
        yield logits, targets


def one_pass(logits: Tensor, targets: Tensor, advantages: Tensor, backend: str, **asked: Any) -> None:
    leaf = logits.clone().requires_grad_()
    mine = leaf * 1 if asked.get("inplace") else leaf
    old_logprobs = torch.full_like(advantages, -5.0)
    (fused_losses.ppo(mine, targets, old_logprobs, advantages, backend=backend, **asked) * 2).backward()


def turn_after_turn(device: torch.device, backend: str, turns: Iterable[tuple[int, torch.dtype, int]] = TURNS) -> int:
    """Rows that are read, masked, without a gradient, and too far out for a fold, in every order. Calls made."""
    many = device.type == "cuda"
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if many else 3
    calls = 0
    for vocab, dtype, blocks in turns:
        n = 2 * blocks * multiprocessors + 5
        logits = torch.randn(n, vocab, device=device).to(dtype)
        logits[2::11] *= 1e5
        targets = torch.randint(vocab, (n,), device=device)
        targets[1::3] = -100
        advantages = torch.linspace(-1, 1, n, device=device)
        advantages[::5] = 0.0
        for asked in ({}, {"inplace": True}, {"entropy_coef": 0.1}):
            one_pass(logits, targets, advantages, backend, **asked)
            calls += 1
    return calls


def every_loss(device: torch.device, backend: str, vocab: int = 1000) -> int:
    """Calls made."""
    targets = torch.randint(vocab, (6,), device=device)
    given = {"old_logprobs": torch.full((6,), -5.0, device=device), "advantages": torch.linspace(-1, 1, 6).to(device)}
    calls = 0
    for name, objective in OBJECTIVES.items():
        logits = torch.randn(6, vocab, device=device, requires_grad=True)
        inputs = {key: value for key, value in given.items() if key in objective.inputs}
        getattr(fused_losses, name)(logits, targets, backend=backend, **inputs).sum().backward()
        calls += 1
    return calls


def seen(logits: Tensor, targets: Tensor, backend: str) -> int:
    """Without a loss: logprobs, entropy and statistics, of a target, too, that shares the first place with another
    class. Calls made."""
    tied = logits.clone()
    tied[..., -1] = tied.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    fused_losses.logprobs(logits, targets, backend=backend)
    fused_losses.logprobs(logits.clone(), targets, backend=backend, return_entropy=True)
    for softcap in (None, 20.0):
        fused_losses.statistics(tied, targets, backend=backend, softcap=softcap)
    return 4


def everything(device: torch.device, backend: str, vocabularies: tuple[int, ...] = VOCABULARIES) -> int:
    """Calls made."""
    calls = 0
    for logits, targets in problems(device, vocabularies):
        advantages = torch.linspace(-1, 1, targets.numel(), device=device).view(targets.shape)
        for terms, way in product(TERMS, ({}, {"recompute": True}, {"inplace": True})):
            one_pass(logits, targets, advantages, backend, **terms, **way)
            calls += 1
        leaf = logits.clone().requires_grad_()
        several = targets[..., None].expand(*targets.shape, 3)
        fused_losses.cross_entropy(leaf, several, label_smoothing=0.1, z_loss=0.1, backend=backend).backward()
        calls += 1 + seen(logits, targets, backend)
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
    calls = sum(run(device, options.backend) for run in (everything, turn_after_turn, every_loss))
    print(f"{calls} calls on {options.backend}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
