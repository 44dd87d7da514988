"""What the two C++ backends share: records and tensors go in as they are; ``csrc/bindings.h`` reads them by name."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..objectives import OBJECTIVES, Objective
from ..problem import (
    Coefficients,
    Column,
    Problem,
    Stats,
    Targets,
    Transform,
    coefficients_shape,
    logprobs_shape,
    stats_shape,
)
from .rows import as_matrix

# What python -m fused_losses looks for: the first is a failure, the second a choice, or a compiler that was not found.
BROKEN = "does not load"
NOT_BUILT = "the extension is not built"


def load(name: str, fix: str) -> tuple[ModuleType | None, str | None]:
    """The C++ module ``fused_losses.<name>``, or why there is none and what to do."""
    try:
        module = importlib.import_module(f"fused_losses.{name}")
    except ModuleNotFoundError:
        return None, f"{NOT_BUILT}; {fix} and reinstall the package from source"
    except ImportError as error:
        return None, f"the extension is built but {BROKEN} ({error}); reinstall the package"
    difference = inputs_differ(getattr(module, "objectives", {}))
    if difference is not None:
        return None, f"the extension is built but {BROKEN} ({difference}); reinstall the package"
    return module, None


def inputs_differ(theirs: dict[str, str]) -> str | None:
    """Where C++ takes other inputs than the table of objectives says, or in another order: built from other sources."""
    ours = {name: ", ".join(objective.columns) for name, objective in OBJECTIVES.items()}
    for name in {**ours, **theirs}:
        if name not in theirs or name not in ours:
            return f"{'it has no' if name in ours else 'it has an'} objective {name}"
        if ours[name] != theirs[name]:
            return f"its {name} takes {theirs[name]}, not {ours[name]}"
    return None


class Native(ABC):
    """A backend over one C++ module."""

    device_type: str
    looks_at_targets: bool

    def __init__(self, name: str, fix: str):
        self.module: Any
        self.module, self.cause = load(name, fix)

    def unusable(self, device: torch.device) -> str | None:
        if device.type != self.device_type:
            return f"it takes {self.device_type.upper()} tensors"
        return self.cause

    def runs(self, objective: Objective) -> bool:
        return OBJECTIVES.get(objective.name) is objective

    @abstractmethod
    def launch(self, function: Callable[..., None], device: torch.device, *args: Any) -> None:
        """Run ``function`` on ``device``, on torch's current stream there."""

    # Sizes one by one and new_empty: torch takes half a microsecond longer to read a tuple, or a dtype.

    def loss_and_grad(self, logits: Tensor, problem: Problem, gradient: Tensor) -> tuple[Tensor, Tensor]:
        n, device = problem.n, logits.device
        shape = logprobs_shape(n, problem.targets.num, problem.plain)
        logprobs = torch.empty(*shape, dtype=torch.float32, device=device)
        row_losses, loss = logprobs.new_empty(n), logprobs.new_empty(())
        matrices = as_matrix(logits), as_matrix(gradient)
        self.launch(self.module.loss_and_grad, device, *matrices, problem, logprobs, row_losses, loss)
        return loss, logprobs

    def stats(self, logits: Tensor, problem: Problem) -> Stats:
        statistics = problem.terms.statistics
        shape = stats_shape(problem.n, problem.targets.num, problem.plain, statistics)
        stats = Stats(torch.empty(*shape, dtype=torch.float32, device=logits.device), statistics)
        self.launch(self.module.stats, logits.device, as_matrix(logits), problem, stats)
        return stats

    def objective(self, stats: Stats, problem: Problem, reduce: bool) -> tuple[Tensor, Tensor, Coefficients]:
        n, plain, table = problem.n, problem.plain, stats.table
        logprobs = table.new_empty(*logprobs_shape(n, problem.targets.num, plain, problem.terms.statistics))
        coefficients = Coefficients(table.new_empty(*coefficients_shape(n, plain)))
        row_losses = table.new_empty(n)
        loss = table.new_empty(()) if reduce else None
        self.launch(self.module.objective, table.device, stats, problem, logprobs, row_losses, coefficients, loss)
        return row_losses if loss is None else loss, logprobs, coefficients

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
        matrices = as_matrix(logits), as_matrix(gradient)
        self.launch(self.module.grad, logits.device, *matrices, targets, transform, stats, coefficients, upstream)

    def scale(self, gradient: Tensor, upstream: Tensor) -> None:
        self.launch(self.module.scale, gradient.device, as_matrix(gradient), upstream)
