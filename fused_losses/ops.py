"""The stages as ``torch.library`` operators, so that torch.compile and CUDA graphs see opaque, well-described nodes.

Columns are weights, temperature, denominator, the objective's inputs, then those of the terms, which have flags, too.
They cross the dispatcher as two lists: a tensor or None, and the number that stands in for None. The backend is
resolved inside the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends import resolve
from .backends.rows import rows
from .objectives import OBJECTIVES
from .terms import unpack

Column = Tensor | float

_library = torch.library.Library("fused_losses", "DEF")
_ROW_ARGUMENTS = (
    "Tensor target_tokens, str objective, Tensor?[] columns, float[] values, int[] flags, bool mean, int ignore_index, "
    "bool all_logprobs, bool validate, str backend"
)


def _loss_and_grad_into(
    gradient: Tensor,
    logits: Tensor,
    target_tokens: Tensor,
    objective: str,
    columns: tuple[Column, ...],
    flags: list[int],
    mean: bool,
    ignore_index: int,
    all_logprobs: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    (weights, temperature, denominator, *inputs), terms = unpack(columns, flags)
    module = _ready(logits, target_tokens, ignore_index, objective, inputs, temperature, validate, backend)
    return module.loss_and_grad(
        logits,
        target_tokens,
        objective,
        tuple(inputs),
        weights,
        temperature,
        denominator,
        mean,
        ignore_index,
        all_logprobs,
        terms,
        gradient,
    )


def _loss_and_grad(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return *_loss_and_grad_into(gradient, _walkable(logits), *args), gradient


def _loss_and_grad_inplace(logits: Tensor, *args) -> tuple[Tensor, Tensor]:
    return _loss_and_grad_into(logits, logits, *args)


def _forward(
    logits: Tensor,
    target_tokens: Tensor,
    objective: str,
    columns: tuple[Column, ...],
    flags: list[int],
    mean: bool,
    ignore_index: int,
    all_logprobs: bool,
    validate: bool,
    backend: str,
    reduce: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (weights, temperature, denominator, *inputs), terms = unpack(columns, flags)
    module = _ready(logits, target_tokens, ignore_index, objective, inputs, temperature, validate, backend)
    stats = module.stats(_walkable(logits), target_tokens, weights, temperature, ignore_index, all_logprobs, terms)
    loss, logprobs, coefficients = module.objective(
        stats,
        target_tokens,
        objective,
        tuple(inputs),
        weights,
        temperature,
        denominator,
        mean,
        ignore_index,
        reduce,
        terms,
    )
    return loss, logprobs, coefficients, stats


def _grad(
    logits: Tensor,
    target_tokens: Tensor,
    stats: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    columns: tuple[Column],
    shares: Tensor | None,
    softcap: float,
    backend: str,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    resolve(backend, logits.device).grad(
        _walkable(logits),
        target_tokens,
        stats,
        coefficients,
        upstream,
        columns[0],
        shares,
        softcap,
        gradient,
    )
    return gradient


def _scale(gradient: Tensor, upstream: Tensor, backend: str) -> None:
    resolve(backend, gradient.device).scale(gradient, upstream)


def _fake_loss_and_grad(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_loss_and_grad_inplace(logits, *args), logits.new_empty(logits.shape)


def _fake_loss_and_grad_inplace(logits: Tensor, target_tokens: Tensor, *args) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), _fake_logprobs(logits, target_tokens, args[3])


def _fake_logprobs(logits: Tensor, target_tokens: Tensor, flags: list[int]) -> Tensor:
    n = target_tokens.shape[0]
    shape = (target_tokens.shape[1] + 1 if target_tokens.dim() == 2 else 2, n) if flags else (n,)
    return logits.new_empty(shape, dtype=torch.float32)


def _fake_forward(logits: Tensor, target_tokens: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flags, reduce = args[3], args[-1]
    n = target_tokens.shape[0]
    logprobs = _fake_logprobs(logits, target_tokens, flags)
    return (
        logits.new_empty(() if reduce else (n,), dtype=torch.float32),
        logprobs,
        logits.new_empty((4, n) if flags else (n,), dtype=torch.float32),
        logits.new_empty((logprobs.shape[0] + 3 if flags else 3, n), dtype=torch.float32),
    )


def _define(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any], columns_at: int | None = None
) -> Callable[..., Any]:
    """Register an operator; what is returned calls it where somebody watches or traces operators, else its function.

    The way through the dispatcher and back costs 10 us a call, a third of all that a loss adds to its kernels.
    columns_at: the argument of the function, the first not counted, that is a tuple of columns.
    """
    name = schema.partition("(")[0]

    def merged(tensor: Tensor, *args: Any) -> Any:
        if columns_at is None:
            return function(tensor, *args)
        tensors, values = args[columns_at : columns_at + 2]
        columns = tuple(v if t is None else t for t, v in zip(tensors, values, strict=True))
        return function(tensor, *args[:columns_at], columns, *args[columns_at + 2 :])

    _library.define(schema)
    _library.impl(name, merged, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_losses::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fused_losses, name).default

    def call(tensor: Tensor, *args: Any) -> Any:
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain or torch._C._len_torch_dispatch_stack() > 0:
            if columns_at is not None:
                args = (*args[:columns_at], *split(args[columns_at]), *args[columns_at + 1 :])
            return operator(tensor, *args)
        return function(tensor, *args)

    return call


loss_and_grad = _define(
    f"loss_and_grad(Tensor logits, {_ROW_ARGUMENTS}) -> (Tensor loss, Tensor logprobs, Tensor grad)",
    _loss_and_grad,
    _fake_loss_and_grad,
    columns_at=2,
)
loss_and_grad_inplace = _define(
    f"loss_and_grad_inplace(Tensor(a!) logits, {_ROW_ARGUMENTS}) -> (Tensor loss, Tensor logprobs)",
    _loss_and_grad_inplace,
    _fake_loss_and_grad_inplace,
    columns_at=2,
)
forward = _define(
    f"forward(Tensor logits, {_ROW_ARGUMENTS}, bool reduce) "
    "-> (Tensor loss, Tensor logprobs, Tensor coefficients, Tensor stats)",
    _forward,
    _fake_forward,
    columns_at=2,
)
grad = _define(
    "grad(Tensor logits, Tensor target_tokens, Tensor stats, Tensor coefficients, Tensor upstream, "
    "Tensor?[] columns, float[] values, Tensor? shares, float softcap, str backend) -> Tensor",
    _grad,
    lambda logits, *args: logits.new_empty(logits.shape),
    columns_at=4,
)
scale = _define(
    "scale(Tensor(a!) gradient, Tensor upstream, str backend) -> ()",
    _scale,
    lambda gradient, upstream, backend: None,
)


def split(columns: tuple[Column | None, ...]) -> tuple[list[Tensor | None], list[float]]:
    """Columns as the two lists that cross the dispatcher."""
    tensors = [None if isinstance(c, float) else c for c in columns]
    return tensors, [c if isinstance(c, float) else 0.0 for c in columns]


def _ready(
    logits: Tensor,
    target_tokens: Tensor,
    ignore_index: int,
    objective: str,
    inputs: Sequence[Column],
    temperature: Column,
    validate: bool,
    backend: str,
) -> ModuleType:
    """The backend to run on, once the values it must not meet have been looked for, where that is free or asked for."""
    module = resolve(backend, logits.device)
    if validate or logits.is_cpu:
        checks.targets_in_range(target_tokens, logits.shape[-1], ignore_index)
    if validate:
        names = OBJECTIVES[objective].columns
        checks.values_in_range({"temperature": temperature, **dict(zip(names, inputs, strict=False))})
    return module


def _walkable(logits: Tensor) -> Tensor:
    """The logits, copied if a kernel could not walk their rows (strided vocabulary, three or more strides)."""
    return logits if rows(logits) is not None else logits.contiguous()
