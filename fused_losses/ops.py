"""A side room, entered only where somebody watches or traces operators: the stages as ``torch.library`` operators, so
that torch.compile and CUDA graphs see opaque, well-described nodes.

The dispatcher takes tensors, numbers and strings: here, and nowhere else, a problem is taken apart and put together
again. The backend is resolved inside the operator. The way through the dispatcher and back costs 10 us a call, a third
of all that a loss adds to its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from . import checks
from .backends.rows import empty_gradient
from .logits import Logits
from .objectives import OBJECTIVES
from .problem import (
    BackendName,
    Coefficients,
    Column,
    KlType,
    Problem,
    Stats,
    Targets,
    Terms,
    Transform,
    coefficients_shape,
    logprobs_shape,
    stats_shape,
)
from .stages import Forward

_KL_TYPES: tuple[KlType | None, ...] = (None, *get_args(KlType))


def watched(logits: Tensor, problem: Problem) -> bool:
    """Whether a call has to come through here."""
    targets, terms = problem.targets, problem.terms
    columns = (problem.weights, problem.denominator, problem.transform.temperature, *problem.inputs, *terms[:5])
    return checks.watched(logits, targets.tokens, targets.shares, *columns)


# ---- The codec: a problem as what the dispatcher takes ----

_PROBLEM = (
    "Tensor target_tokens, Tensor? shares, Tensor?[] columns, float[] values, float[] numbers, SymInt[] flags, "
    "str objective, str backend, bool validate"
)


class Encoded(NamedTuple):
    """The arguments that _PROBLEM names."""

    target_tokens: Tensor
    shares: Tensor | None
    columns: list[Tensor | None]  # temperature, weights, denominator, the terms' columns, the objective's
    values: list[float]  # what stands in where a column is None
    numbers: list[float]  # softcap or 0, label_smoothing, z_loss
    flags: list[int]  # ignore_index, vocab, all_logprobs, kl_type, kl_weighted_by_ratio, entropy, no denominator
    objective: str
    backend: str
    validate: bool


def encode(problem: Problem, backend: str, validate: bool) -> Encoded:
    targets, transform, weights, objective, inputs, terms, denominator, vocab, all_logprobs = problem
    columns = (transform.temperature, weights, 1.0 if denominator is None else denominator, *terms[:5], *inputs)
    return Encoded(
        targets.tokens,
        targets.shares,
        [c if isinstance(c, Tensor) else None for c in columns],
        [0.0 if isinstance(c, Tensor) else c for c in columns],
        [transform.softcap or 0.0, terms.label_smoothing, terms.z_loss],
        [
            targets.ignore_index,
            vocab,
            int(all_logprobs),
            _KL_TYPES.index(terms.kl_type),
            int(terms.kl_weighted_by_ratio),
            int(terms.entropy),
            int(denominator is None),
        ],
        objective.name,
        backend,
        validate,
    )


def decode(encoded: Encoded) -> Problem:
    columns: list[Column] = [
        value if tensor is None else tensor for tensor, value in zip(encoded.columns, encoded.values, strict=True)
    ]
    temperature, weights, denominator, importance_weights, ref_logprobs, kl_coef, entropy_coef, clamp = columns[:8]
    softcap, label_smoothing, z_loss = encoded.numbers
    ignore_index, vocab, all_logprobs, kl_type, weighted, entropy, mean = encoded.flags
    return Problem(
        Targets(encoded.target_tokens, ignore_index, encoded.shares),
        Transform(temperature, softcap or None),
        weights,
        OBJECTIVES[encoded.objective],
        tuple(columns[8:]),
        Terms(
            importance_weights,
            ref_logprobs,
            kl_coef,
            entropy_coef,
            clamp,
            label_smoothing,
            z_loss,
            _KL_TYPES[kl_type],
            bool(weighted),
            bool(entropy),
        ),
        None if mean else denominator,
        vocab,
        bool(all_logprobs),
    )


# ---- The operators ----

_library = torch.library.Library("fused_losses", "DEF")
_operators = torch.ops.fused_losses


def _opened(arguments: Sequence[Any]) -> tuple[Problem, BackendName, bool]:
    encoded = Encoded(*arguments)
    return decode(encoded), encoded.backend, encoded.validate  # type: ignore[return-value]


def _loss_and_grad(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, backend, validate = _opened(arguments)
    loss, logprobs, (gradient,) = Logits(backend, False, validate, True).loss_and_grad((logits,), problem)
    return loss, logprobs, gradient


def _loss_and_grad_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem, backend, validate = _opened(arguments)
    loss, logprobs, _ = Logits(backend, True, validate).loss_and_grad((logits,), problem)
    return loss, logprobs


def _forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, reduce = arguments
    problem, backend, validate = _opened(rest)
    seen = Logits(backend, False, validate).forward((logits,), problem, reduce)
    return seen.loss, seen.logprobs, seen.coefficients.table, seen.stats.table


def _grad(
    logits: Tensor,
    target_tokens: Tensor,
    shares: Tensor | None,
    temperature: Tensor | None,
    numbers: Sequence[float],  # temperature where there is no tensor, softcap or 0
    stats: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    backend: BackendName,
) -> Tensor:
    number, softcap = numbers
    (gradient,) = Logits(backend, aligned=True).grad(
        (logits,),
        Targets(target_tokens, 0, shares),
        Transform(number if temperature is None else temperature, softcap or None),
        Stats(stats),
        Coefficients(coefficients),
        upstream,
    )
    return gradient


def _scale(gradient: Tensor, upstream: Tensor, backend: BackendName) -> None:
    Logits(backend).scale((gradient,), upstream)


def _fake_loss_and_grad(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_loss_and_grad_inplace(logits, *arguments), empty_gradient(logits, True)


def _fake_loss_and_grad_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem, _, _ = _opened(arguments)
    logprobs = logprobs_shape(problem.n, problem.targets.num, problem.plain)
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logprobs, dtype=torch.float32)


def _fake_forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, reduce = arguments
    problem, _, _ = _opened(rest)
    n, num, plain = problem.n, problem.targets.num, problem.plain
    shapes = (() if reduce else (n,), logprobs_shape(n, num, plain), coefficients_shape(n, plain))
    loss, logprobs, coefficients, stats = (
        logits.new_empty(shape, dtype=torch.float32) for shape in (*shapes, stats_shape(n, num, plain))
    )
    return loss, logprobs, coefficients, stats


def _fake_grad(logits: Tensor, *arguments: Any) -> Tensor:
    return empty_gradient(logits, True)


def _fake_scale(gradient: Tensor, upstream: Tensor, backend: str) -> None:
    return None


for _schema, _function, _fake in (
    (
        f"loss_and_grad(Tensor logits, {_PROBLEM}) -> (Tensor loss, Tensor logprobs, Tensor grad)",
        _loss_and_grad,
        _fake_loss_and_grad,
    ),
    (
        f"loss_and_grad_inplace(Tensor(a!) logits, {_PROBLEM}) -> (Tensor loss, Tensor logprobs)",
        _loss_and_grad_inplace,
        _fake_loss_and_grad_inplace,
    ),
    (
        f"forward(Tensor logits, {_PROBLEM}, bool reduce) "
        "-> (Tensor loss, Tensor logprobs, Tensor coefficients, Tensor stats)",
        _forward,
        _fake_forward,
    ),
    (
        "grad(Tensor logits, Tensor target_tokens, Tensor? shares, Tensor? temperature, float[] numbers, Tensor stats, "
        "Tensor coefficients, Tensor upstream, str backend) -> Tensor",
        _grad,
        _fake_grad,
    ),
    ("scale(Tensor(a!) gradient, Tensor upstream, str backend) -> ()", _scale, _fake_scale),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_losses::{_name}", _fake, lib=_library)


# ---- The source that calls them ----


class Watched(NamedTuple):
    """A :class:`stages.Source` of logits, as :class:`Logits` is, by way of the operators."""

    backend: BackendName
    inplace: bool = False
    validate: bool = False

    def loss_and_grad(self, inputs: tuple[Tensor, ...], problem: Problem) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        (logits,) = inputs
        arguments = encode(problem, self.backend, self.validate)
        if self.inplace:
            gradient = logits.detach()
            loss, logprobs = _operators.loss_and_grad_inplace(gradient, *arguments)
            torch.autograd.graph.increment_version(gradient)
        else:
            loss, logprobs, gradient = _operators.loss_and_grad(logits, *arguments)
        return loss, logprobs, (gradient,)

    def forward(self, inputs: tuple[Tensor, ...], problem: Problem, reduce: bool) -> Forward:
        (logits,) = inputs
        loss, logprobs, coefficients, stats = _operators.forward(
            logits, *encode(problem, self.backend, self.validate), reduce
        )
        return Forward(loss, logprobs, Coefficients(coefficients), Stats(stats))

    def grad(
        self,
        inputs: tuple[Tensor, ...],
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Tensor,
    ) -> tuple[Tensor, ...]:
        (logits,) = inputs
        temperature = transform.temperature
        given = isinstance(temperature, Tensor)
        gradient = _operators.grad(
            logits,
            targets.tokens,
            targets.shares,
            temperature if given else None,
            [1.0 if given else temperature, transform.softcap or 0.0],
            stats.table,
            coefficients.table,
            upstream,
            self.backend,
        )
        return (gradient,)

    def scale(self, gradients: tuple[Tensor, ...], upstream: Tensor) -> None:
        (gradient,) = gradients
        _operators.scale(gradient, upstream, self.backend)
