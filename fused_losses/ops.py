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
from .head import Head
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
from .stages import Forward, Ways

_KL_TYPES: tuple[KlType | None, ...] = (None, *get_args(KlType))


def watched(made_of: tuple[Tensor, ...], problem: Problem) -> bool:
    """Whether a call has to come through here."""
    targets, terms = problem.targets, problem.terms
    columns = (problem.weights, problem.denominator, problem.transform.temperature, *problem.inputs, *terms[:5])
    return checks.watched(*made_of, targets.tokens, targets.shares, *columns)


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
    # ignore_index, vocab, all_logprobs, kl_type, kl_weighted_by_ratio, entropy, statistics, no denominator
    flags: list[int]
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
            int(terms.statistics),
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
    ignore_index, vocab, all_logprobs, kl_type, weighted, entropy, statistics, mean = encoded.flags
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
            bool(statistics),
        ),
        None if mean else denominator,
        vocab,
        bool(all_logprobs),
    )


_PRODUCTS = "Tensor hidden, Tensor weight, Tensor? bias, int[] head"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = tuple[Tensor, Tensor, Tensor | None]


def encode_head(head: Head) -> list[int]:
    products, logits, sums = (_DTYPES.index(dtype) for dtype in (head.products, head.logits_dtype, head.sum_dtype))
    return [head.rows, products, logits, sums, int(head.skip_masked), *map(int, head.needs)]


def decode_head(numbers: Sequence[int], backend: BackendName, validate: bool) -> Head:
    rows, products, logits, sums, skip_masked, *needs = numbers
    return Head(
        backend=backend,
        validate=validate,
        rows=rows,
        products=_DTYPES[products],
        logits_dtype=_DTYPES[logits],
        sum_dtype=_DTYPES[sums],
        weight_grad=None,
        skip_masked=bool(skip_masked),
        partial=False,
        layout=None,
        needs=tuple(map(bool, needs)),
    )


# ---- The operators ----

_library = torch.library.Library("fused_losses", "DEF")
_operators = torch.ops.fused_losses


def _opened(arguments: Sequence[Any]) -> tuple[Problem, BackendName, bool]:
    encoded = Encoded(*arguments)
    return decode(encoded), encoded.backend, encoded.validate  # type: ignore[return-value]


def _loss_and_grad(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, backend, validate = _opened(arguments)
    loss, logprobs, (gradient,) = Logits(backend, False, validate, aligned=True).loss_and_grad((logits,), problem)
    assert gradient is not None
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
    assert gradient is not None
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
    n, plain = problem.n, problem.plain
    asked = n, problem.targets.num, plain, problem.terms.statistics
    shapes = (() if reduce else (n,), logprobs_shape(*asked), coefficients_shape(n, plain), stats_shape(*asked))
    loss, logprobs, coefficients, stats = (logits.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, logprobs, coefficients, stats


def _fake_grad(logits: Tensor, *arguments: Any) -> Tensor:
    return empty_gradient(logits, True)


def _fake_scale(gradient: Tensor, upstream: Tensor, backend: str) -> None:
    return None


# Of a head. An input that wants no gradient has an empty one: operators have no optional results.


def _given(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor is not None)


def _filled(gradients: Sequence[Tensor | None], inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    # one for each: no two results may be one tensor
    hidden, weight, *bias = (inputs[0].new_empty(0) if gradient is None else gradient for gradient in gradients)
    return hidden, weight, bias[0] if bias else inputs[0].new_empty(0)


def _head_loss_and_grad(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int], *arguments: Any
) -> tuple[Tensor, ...]:
    problem, backend, validate = _opened(arguments)
    inputs = hidden, weight, bias
    loss, logprobs, gradients = decode_head(numbers, backend, validate).loss_and_grad(_given(inputs), problem)
    return loss, logprobs, *_filled(gradients, inputs)


def _head_losses_and_grad(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem, backend, validate = _opened(arguments)
    return decode_head(numbers, backend, validate).losses_and_grad(_given((hidden, weight, bias)), problem)


def _head_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, reduce = arguments
    problem, backend, validate = _opened(rest)
    seen = decode_head(numbers, backend, validate).forward(_given((hidden, weight, bias)), problem, reduce)
    return seen.loss, seen.logprobs, seen.coefficients.table, seen.stats.table


def _head_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numbers: Sequence[int],
    target_tokens: Tensor,
    shares: Tensor | None,
    temperature: Tensor | None,
    transform: Sequence[float],  # as _grad's
    stats: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    backend: BackendName,
) -> tuple[Tensor, Tensor, Tensor]:
    number, softcap = transform
    inputs = hidden, weight, bias
    gradients = decode_head(numbers, backend, False).grad(
        _given(inputs),
        Targets(target_tokens, 0, shares),
        Transform(number if temperature is None else temperature, softcap or None),
        Stats(stats),
        Coefficients(coefficients),
        upstream,
    )
    return _filled(gradients, inputs)


def _fake_gradients(inputs: Inputs, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    needs = decode_head(numbers, "auto", False).needs
    given = [t.new_empty(t.shape) if needed else None for t, needed in zip(_given(inputs), needs, strict=True)]
    return _filled(given, inputs)


def _fake_head_loss_and_grad(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int], *arguments: Any
) -> tuple[Tensor, ...]:
    seen = _fake_loss_and_grad_inplace(hidden, *arguments)
    return *seen, *_fake_gradients((hidden, weight, bias), numbers)


def _fake_head_losses_and_grad(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    losses, logprobs, _, _ = _fake_forward(hidden, *arguments, False)
    return losses, logprobs, hidden.new_empty(hidden.shape)


def _fake_head_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_forward(hidden, *arguments)


def _fake_head_grad(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients((hidden, weight, bias), numbers)


_GRAD = (
    "Tensor target_tokens, Tensor? shares, Tensor? temperature, float[] numbers, Tensor stats, Tensor coefficients, "
    "Tensor upstream, str backend"
)

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
    (f"grad(Tensor logits, {_GRAD}) -> Tensor", _grad, _fake_grad),
    (
        f"head_loss_and_grad({_PRODUCTS}, {_PROBLEM}) "
        "-> (Tensor loss, Tensor logprobs, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)",
        _head_loss_and_grad,
        _fake_head_loss_and_grad,
    ),
    (
        f"head_losses_and_grad({_PRODUCTS}, {_PROBLEM}) -> (Tensor losses, Tensor logprobs, Tensor hidden_grad)",
        _head_losses_and_grad,
        _fake_head_losses_and_grad,
    ),
    (
        f"head_forward({_PRODUCTS}, {_PROBLEM}, bool reduce) "
        "-> (Tensor loss, Tensor logprobs, Tensor coefficients, Tensor stats)",
        _head_forward,
        _fake_head_forward,
    ),
    (
        f"head_grad({_PRODUCTS}, {_GRAD}) -> (Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)",
        _head_grad,
        _fake_head_grad,
    ),
    ("scale(Tensor(a!) gradient, Tensor upstream, str backend) -> ()", _scale, _fake_scale),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_losses::{_name}", _fake, lib=_library)


# ---- The sources that call them ----


def _encoded_transform(transform: Transform) -> tuple[Tensor | None, list[float]]:
    temperature, softcap = transform.temperature, transform.softcap or 0.0
    return (temperature, [1.0, softcap]) if isinstance(temperature, Tensor) else (None, [temperature, softcap])


class Watched(NamedTuple):
    """A :class:`stages.Source` of logits, as :class:`Logits` is, by way of the operators."""

    backend: BackendName
    inplace: bool = False
    validate: bool = False

    def ways(self) -> Ways:
        return Ways()

    def loss_and_grad(
        self, inputs: tuple[Tensor, ...], problem: Problem
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
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
        return Forward(loss, logprobs, Coefficients(coefficients), Stats(stats, problem.terms.statistics))

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
        gradient = _operators.grad(
            logits,
            targets.tokens,
            targets.shares,
            *_encoded_transform(transform),
            stats.table,
            coefficients.table,
            upstream,
            self.backend,
        )
        return (gradient,)

    def scale(self, gradients: tuple[Tensor | None, ...], upstream: Tensor) -> None:
        (gradient,) = gradients
        assert gradient is not None
        _operators.scale(gradient, upstream, self.backend)


class WatchedHead(NamedTuple):
    """A :class:`stages.Source`, as the head is that it holds, by way of the operators."""

    head: Head

    def ways(self) -> Ways:
        return self.head.ways()

    def loss_and_grad(
        self, inputs: tuple[Tensor, ...], problem: Problem
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        loss, logprobs, *gradients = _operators.head_loss_and_grad(*self._arguments(inputs), *self._problem(problem))
        return loss, logprobs, self._wanted(gradients)

    def losses_and_grad(self, inputs: tuple[Tensor, ...], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        losses, logprobs, gradient = _operators.head_losses_and_grad(*self._arguments(inputs), *self._problem(problem))
        return losses, logprobs, gradient

    def forward(self, inputs: tuple[Tensor, ...], problem: Problem, reduce: bool) -> Forward:
        loss, logprobs, coefficients, stats = _operators.head_forward(
            *self._arguments(inputs), *self._problem(problem), reduce
        )
        return Forward(loss, logprobs, Coefficients(coefficients), Stats(stats, problem.terms.statistics))

    def grad(
        self,
        inputs: tuple[Tensor, ...],
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Tensor,
    ) -> tuple[Tensor | None, ...]:
        gradients = _operators.head_grad(
            *self._arguments(inputs),
            targets.tokens,
            targets.shares,
            *_encoded_transform(transform),
            stats.table,
            coefficients.table,
            upstream,
            self.head.backend,
        )
        return self._wanted(gradients)

    def scale(self, gradients: tuple[Tensor | None, ...], upstream: Tensor) -> None:
        for gradient in gradients:
            if gradient is not None:
                _operators.scale(gradient, upstream, self.head.backend)

    def _arguments(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        hidden, weight, *bias = inputs
        return hidden, weight, bias[0] if bias else None, encode_head(self.head)

    def _problem(self, problem: Problem) -> Encoded:
        return encode(problem, self.head.backend, self.head.validate)

    def _wanted(self, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return tuple(g if needed else None for g, needed in zip(gradients, self.head.needs, strict=False))
