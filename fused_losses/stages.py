"""The ways of joining the stages under autograd, for any source of logits.

One pass: forward makes the gradient for the upstream gradient that is expected, and backward scales it. Two phase:
forward keeps the source's tensors and a few numbers per token, backward makes the gradient for whatever comes from
upstream.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import checks
from .backends.eager import BACKEND as EAGER
from .once import once
from .problem import Coefficients, Column, Problem, Stats, Targets, Transform
from .terms import times


class Forward(NamedTuple):
    """What a forward without gradient gives."""

    loss: Tensor
    logprobs: Tensor
    coefficients: Coefficients
    stats: Stats


class Ways(NamedTuple):
    """What a source can do other than in two phases."""

    one_pass: bool = True  # make the gradient in forward, for a loss that is reduced
    row_by_row: bool = False  # and for one that is not: what a token's upstream gradient multiplies is one row
    inplace: bool = False  # write a gradient over its input, which it then is until somebody changes it


class Source(Protocol):
    """Where logits come from. A source holds no tensor: ``inputs`` are those that it makes the logits of, and that get
    a gradient; autograd has to see them on their own."""

    def ways(self) -> Ways: ...

    def loss_and_grad(
        self, inputs: tuple[Tensor, ...], problem: Problem
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """(loss, logprobs, a gradient for each input, or None for one that wants none)"""

    def forward(self, inputs: tuple[Tensor, ...], problem: Problem, reduce: bool) -> Forward: ...

    def grad(
        self,
        inputs: tuple[Tensor, ...],
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """A gradient for each input, or None. upstream: (N,) float32."""

    def scale(self, gradients: tuple[Tensor | None, ...], upstream: Tensor) -> None:
        """Multiply finished gradients by a 0-d float32."""


class RowByRowSource(Source, Protocol):
    """One whose first input has a row per token, and whose others want no gradient."""

    def losses_and_grad(self, inputs: tuple[Tensor, ...], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """(a loss per token, logprobs, the gradient of the first input for upstream gradients of 1)"""


def run(
    source: Source,
    inputs: tuple[Tensor, ...],
    problem: Problem,
    *,
    reduce: bool,
    recompute: bool = False,
    expected: Column = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss, logprobs): in one pass, in two phases, or forward only where nobody wants a gradient.

    expected: the upstream gradient of a reduced loss, as far as the caller knows.
    """
    if not wants_gradient(inputs):
        seen = source.forward(inputs, problem, reduce)
        return seen.loss, seen.logprobs
    ways = source.ways()
    if reduce and ways.one_pass and not recompute:
        return OnePass.apply(source, problem, expected, *inputs)
    if not reduce and ways.row_by_row and not recompute:
        return RowByRow.apply(source, problem, *inputs)
    return TwoPhase.apply(source, problem, reduce, *inputs)


def wants_gradient(inputs: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in inputs]


class OnePass(torch.autograd.Function):
    """apply(source, problem, expected, *inputs) -> (loss, logprobs)"""

    @staticmethod
    def forward(ctx: Any, source: Source, problem: Problem, expected: Column, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.expected = None if isinstance(expected, float) and expected == 1.0 else expected
        if ctx.expected is None:
            loss, logprobs, gradients = source.loss_and_grad(inputs, problem)
        else:  # loss and gradient have one divisor
            divisor = EAGER.normaliser(problem) if problem.denominator is None else problem.denominator
            divisor = divisor / expected
            if isinstance(divisor, Tensor) and inputs[0].dtype is not torch.float64:
                divisor = divisor.float()
            problem = problem._replace(denominator=divisor)
            loss, logprobs, gradients = source.loss_and_grad(inputs, problem)
            loss = loss / expected
        # Attributes, not save_for_backward: they have to be gone after the first backward, retain_graph or not, as
        # scaling them a second time would be silently wrong.
        ctx.gradients, ctx.source = gradients, source
        ctx.versions = _versions(gradients)
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return loss, logprobs

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "a second backward through a one-pass fused loss: the first one consumed its gradient. "
                "Before each backward call the loss anew, or the model or trainer that computes it; or pass "
                "recompute=True, without inplace=True, where you call the loss yourself."
            )
        versions = _versions(gradients)  # asked once: what is traced is said of each frame anew
        if None not in (ctx.versions, versions) and ctx.versions != versions:
            raise RuntimeError(
                "the logits of a fused loss with inplace=True hold its gradient until backward, and have been modified "
                "by an inplace operation (another loss with inplace=True is one). Pass inplace=False, or a copy."
            )
        if upstream is None:
            return None, None, None, *(None for _ in gradients)
        ctx.gradients = None
        made = next(gradient for gradient in gradients if gradient is not None)
        upstream = _upstream(upstream, made)
        ctx.source.scale(gradients, upstream if ctx.expected is None else upstream / ctx.expected)
        return None, None, None, *gradients


class RowByRow(torch.autograd.Function):
    """apply(source, problem, *inputs) -> (losses, logprobs): the gradient is made in forward, and each of its rows
    multiplied in backward, which may run again."""

    @staticmethod
    def forward(ctx: Any, source: RowByRowSource, problem: Problem, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        losses, logprobs, gradient = source.losses_and_grad(inputs, problem)
        ctx.save_for_backward(gradient)
        ctx.others = len(inputs) - 1
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return losses, logprobs

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        others = (None for _ in range(ctx.others))
        if upstream is None:
            return None, None, None, *others
        (gradient,) = ctx.saved_tensors
        rows = _upstream(upstream, gradient).reshape(*gradient.shape[:-1], 1)
        return None, None, times(rows, gradient).to(gradient.dtype), *others


class TwoPhase(torch.autograd.Function):
    """apply(source, problem, reduce, *inputs) -> (loss, logprobs)"""

    @staticmethod
    def forward(ctx: Any, source: Source, problem: Problem, reduce: bool, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        seen = source.forward(inputs, problem, reduce)
        _keep(ctx, source, problem, inputs, seen)
        ctx.mark_non_differentiable(seen.logprobs)
        ctx.set_materialize_grads(False)
        return seen.loss, seen.logprobs

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, *(None for _ in range(ctx.inputs))
        kept = _kept(ctx)
        n = kept.targets.tokens.shape[0]
        upstream = _upstream(upstream, kept.inputs[0])
        return None, None, None, *kept.gradient(kept.coefficients, upstream.expand(n))


class Observed(torch.autograd.Function):
    """apply(source, problem, *inputs) -> the rows of Logprobs, two phase: logprob and entropy with a gradient each, and
    where statistics are asked for what these add, without."""

    @staticmethod
    def forward(ctx: Any, source: Source, problem: Problem, *inputs: Tensor) -> tuple[Tensor, ...]:
        seen = source.forward(inputs, problem, False)
        _keep(ctx, source, problem, inputs, seen)
        ctx.set_materialize_grads(False)
        rows = tuple(row.clone() for row in seen.logprobs.unbind())  # not views of one tensor: each may be modified
        ctx.mark_non_differentiable(*rows[2:])
        return rows

    @staticmethod
    @once
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = upstream[:2]
        if all(one is None for one in upstream):
            return None, None, *(None for _ in range(ctx.inputs))
        kept = _kept(ctx)
        own = kept.coefficients.by_logprob()
        zero = torch.zeros_like(own)
        # the coefficient by logprob is 1, NaN for a NaN row, and 0 for an ignored token, which keeps that; what nothing
        # comes from upstream for is 0, whatever its row holds
        by_logprob, by_entropy = (zero if u is None else times(_upstream(u, kept.inputs[0]), own) for u in upstream)
        coefficients = Coefficients.of(by_logprob, by_entropy, zero, zero)
        return None, None, *kept.gradient(coefficients, torch.ones_like(zero))


class _Kept(NamedTuple):
    """What backward in two phases works on."""

    source: Source
    inputs: tuple[Tensor, ...]
    targets: Targets
    transform: Transform
    stats: Stats
    coefficients: Coefficients

    def gradient(self, coefficients: Coefficients, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return self.source.grad(self.inputs, self.targets, self.transform, self.stats, coefficients, upstream)


def _keep(ctx: Any, source: Source, problem: Problem, inputs: tuple[Tensor, ...], seen: Forward) -> None:
    targets, transform = problem.targets, problem.transform
    temperature = transform.temperature if isinstance(transform.temperature, Tensor) else None
    stats = seen.stats.of_gradient()
    tensors = (targets.tokens, targets.shares, temperature, stats.table, seen.coefficients.table)
    ctx.save_for_backward(*tensors, *inputs)
    ctx.source, ctx.inputs, ctx.written_over = source, len(inputs), False
    ctx.ignore_index = targets.ignore_index
    ctx.transform = transform if temperature is None else transform._replace(temperature=1.0)


def _kept(ctx: Any) -> _Kept:
    if ctx.written_over:
        raise RuntimeError(
            "a second backward through logprobs or statistics with inplace=True: the first one wrote its gradient over "
            "the logits. Pass inplace=False to run backward more than once."
        )
    # once: under activation checkpointing and offloading each access makes the tensors again
    tokens, shares, temperature, stats, coefficients, *inputs = ctx.saved_tensors
    ctx.written_over = ctx.source.ways().inplace
    transform = ctx.transform if temperature is None else ctx.transform._replace(temperature=temperature)
    targets = Targets(tokens, ctx.ignore_index, shares)
    return _Kept(ctx.source, tuple(inputs), targets, transform, Stats(stats), Coefficients(coefficients))


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int] | None:
    # a graph that is being traced has its own order of what modifies a tensor
    return None if torch.compiler.is_compiling() else [t._version for t in tensors if t is not None]


def _upstream(upstream: Tensor, beside: Tensor) -> Tensor:
    """As float32; as float64 where logits are."""
    upstream = checks.plain("the upstream gradient", upstream, beside)
    dtype = torch.float64 if beside.dtype is torch.float64 else torch.float32
    return upstream if upstream.dtype is dtype else upstream.to(dtype)
