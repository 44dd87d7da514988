"""Backends: objects with the same functions, working on problems whose tensors are already checked.

``eager.py`` is the readable definition of each; ``csrc/problem.h`` states the same for C++.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..problem import BackendName, Coefficients, Column, Problem, Stats, Targets, Transform

if TYPE_CHECKING:
    from ..objectives import Objective

NAMES = ("cuda", "triton", "cpu", "eager")
_CHOICES: dict[str, tuple[BackendName, ...]] = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # "auto", best first


class Backend(Protocol):
    looks_at_targets: bool  # raises ValueError for a target outside [0, V), so that nobody has to look before

    def unusable(self, device: torch.device) -> str | None:
        """Why it can't run there and what would fix it, or None."""

    def runs(self, objective: Objective) -> bool:
        """Whether it has the objective, which need not be one of ours."""

    def loss_and_grad(self, logits: Tensor, problem: Problem, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: write dloss/dlogits into ``gradient``, which may be ``logits``. Returns the 0-d loss and the
        logprobs, of the shape of :func:`problem.logprobs_shape`, 0 where the token was not read."""

    def stats(self, logits: Tensor, problem: Problem) -> Stats:
        """Stage 1: what the objective needs to know of the vocabulary."""

    def objective(self, stats: Stats, problem: Problem, reduce: bool) -> tuple[Tensor, Tensor, Coefficients]:
        """Stage 2, N-sized: the loss, 0-d, or per token and divided by nothing without ``reduce``; the logprobs as in
        loss_and_grad; what goes back. Without ``reduce`` the problem's denominator is 1."""

    def grad(
        self,
        logits: Tensor,
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Column,
        gradient: Tensor,
    ) -> None:
        """Stage 3: write the gradient that stats and coefficients, times ``upstream``, give. A row where either of
        these is 0 is 0, and its logits are not read."""

    def scale(self, gradient: Tensor, upstream: Tensor) -> None:
        """gradient *= upstream, one element on the device, without touching memory where it is 1. Zeros stay."""


def named(name: str) -> Backend:
    """The backend of that name, whether it can run or not."""
    backend: Backend = importlib.import_module(f".{name}", __name__).BACKEND
    return backend


@cache
def resolve(name: BackendName, device: torch.device) -> Backend:
    """The backend that runs on ``device``. "auto" chooses; an explicit name raises where it can't run."""
    if name == "auto":
        name = choose(device)
        if name == "eager" and device.type != "meta":
            _warn_of_eager(device)
    backend = named(name)
    reason = backend.unusable(device)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} can't run on {device}: {reason}")
    return backend


def choose(device: torch.device) -> BackendName:
    """What "auto" means: cuda, else triton, for CUDA tensors; cpu for CPU tensors; else eager."""
    for name in _CHOICES.get(device.type, ()):
        if unusable(name, device) is None:
            return name
    return "eager"


def _warn_of_eager(device: torch.device) -> None:
    """Nobody who measures would choose it."""
    causes = [f"backend={name!r} can't run: {unusable(name, device)}" for name in _CHOICES.get(device.type, ())]
    warnings.warn(
        f"fused_losses takes backend='eager' on {device}, which is slower than eager code of one's own: "
        + ("; ".join(causes) or f"no other runs on {device.type}"),
        stacklevel=3,
    )


def unusable(name: str, device: torch.device) -> str | None:
    return named(name).unusable(device)
