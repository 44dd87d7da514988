"""Logits that exist, as a source: the stages straight from a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends import Backend, resolve
from .backends.rows import empty_gradient, rows
from .problem import BackendName, Coefficients, Problem, Stats, Targets, Transform
from .stages import Forward, Ways

if TYPE_CHECKING:
    from .vocab_shard import Layout


class Logits(NamedTuple):
    """A :class:`stages.Source`; ``inputs`` are (logits,)."""

    backend: BackendName
    inplace: bool = False
    validate: bool = False
    layout: Layout | None = None  # of a vocabulary that is sharded
    aligned: bool = False  # whether gradients begin on a 16-byte boundary, wherever the logits do

    def ways(self) -> Ways:
        return Ways(inplace=self.inplace)

    def loss_and_grad(
        self, inputs: tuple[Tensor, ...], problem: Problem
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        (logits,) = inputs
        backend = self._ready(logits, problem)
        if self.inplace:
            gradient = logits.detach()
            loss, logprobs = backend.loss_and_grad(gradient, problem, gradient)
            # kernels leave the version as it was: whoever saved these logits must find out
            torch.autograd.graph.increment_version(gradient)
        else:
            gradient = empty_gradient(logits, self.aligned)
            loss, logprobs = backend.loss_and_grad(_walkable(logits), problem, gradient)
        return loss, logprobs, (gradient,)

    def forward(self, inputs: tuple[Tensor, ...], problem: Problem, reduce: bool) -> Forward:
        (logits,) = inputs
        backend = self._ready(logits, problem)
        stats = backend.stats(_walkable(logits), problem)
        return Forward(*backend.objective(stats, problem, reduce), stats)

    def grad(
        self,
        inputs: tuple[Tensor, ...],
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (logits,) = inputs
        if self.inplace:
            gradient = logits.detach()
            self._backend(logits).grad(gradient, targets, transform, stats, coefficients, upstream, gradient)
            torch.autograd.graph.increment_version(gradient)  # as above
        else:
            gradient = empty_gradient(logits, self.aligned)
            self._backend(logits).grad(_walkable(logits), targets, transform, stats, coefficients, upstream, gradient)
        return (gradient,)

    def scale(self, gradients: tuple[Tensor | None, ...], upstream: Tensor) -> None:
        (gradient,) = gradients
        assert gradient is not None
        self._backend(gradient).scale(gradient, upstream)

    def _backend(self, logits: Tensor) -> Backend:
        backend = resolve(self.backend, logits.device)
        return backend if self.layout is None else self.layout.over(backend)

    def _ready(self, logits: Tensor, problem: Problem) -> Backend:
        """The backend, once the values it must not meet have been looked for, where that is free or asked for."""
        backend = self._backend(logits)
        look = self.validate or (logits.is_cpu and not backend.looks_at_targets)
        checks.values(problem, self.validate, look_at_targets=look)
        return backend


def _walkable(logits: Tensor) -> Tensor:
    """The logits, copied if a kernel could not walk their rows (strided vocabulary, three or more strides)."""
    if rows(logits) is not None:
        return logits
    # an empty tensor is contiguous with any strides: only a clone has none of them
    return logits.contiguous() if logits.numel() else logits.clone(memory_format=torch.contiguous_format)
