"""The public losses.

Each is three stages: statistics of the vocabulary per token, a small objective per token, the gradient of the logits
from both. Only the objective differs, so each function below only names its objective and that objective's inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import checks, ops
from .autograd import OnePass, TwoPhase

_COMMON = """logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the
            last one is not 1, or more than two others are needed, the logits are copied.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``."""

_KEYWORDS = """weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked
            token's loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``."""

_CLIP = """clip_low_threshold, clip_high_threshold: absolute bounds on the ratio, 0 <= low <= high; numbers or per-token
            tensors. Default {low} and {high}."""

_POLICY = """old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to
            (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's loss and gradient 0."""

Function = TypeVar("Function", bound=Callable)


class Outputs(NamedTuple):
    """What ``return_outputs=True`` adds to the loss. Detached from the graph."""

    logprobs: Tensor


def _documented(**blanks: str) -> Callable[[Function], Function]:
    """Fill in the parts of a docstring that the losses share."""

    def fill(function: Function) -> Function:
        if function.__doc__ is not None:  # python -OO
            function.__doc__ = function.__doc__.format(common=_COMMON, keywords=_KEYWORDS, policy=_POLICY, **blanks)
        return function

    return fill


@_documented()
def cross_entropy(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    weights: Tensor | float | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Cross entropy: ``-logp``, with ``logp = log_softmax(logits / temperature)[target]``.

    The same numbers as :func:`torch.nn.functional.cross_entropy` with class indices, in float32 for any dtype of the
    logits; ``weights`` are per token here, not per class, and the mean over no token is 0, not NaN.

    Args:
        {common}
        {keywords}
    """
    return _loss(
        "cross_entropy",
        logits,
        target_tokens,
        (),
        weights,
        reduction,
        denominator,
        temperature,
        ignore_index,
        inplace,
        recompute,
        backend,
        validate,
        return_outputs,
    )


@_documented()
def importance_sampling(
    logits: Tensor,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    weights: Tensor | float | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Importance-sampled policy gradient: ``-r A``, with ``r = exp(logp - old_logprobs)``.

    The policy gradient for samples of another policy, corrected by the ratio of the two. Degris, White and Sutton,
    "Off-Policy Actor-Critic", 2012, https://arxiv.org/abs/1205.4839.

    Args:
        {common}
        {policy}
        {keywords}
    """
    return _loss(
        "importance_sampling",
        logits,
        target_tokens,
        (old_logprobs, advantages),
        weights,
        reduction,
        denominator,
        temperature,
        ignore_index,
        inplace,
        recompute,
        backend,
        validate,
        return_outputs,
    )


@_documented(clip=_CLIP.format(low=0.8, high=1.2))
def ppo(
    logits: Tensor,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    weights: Tensor | float | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Clipped policy gradient: ``-min(r A, clamp(r, low, high) A)``, with ``r = exp(logp - old_logprobs)``.

    A clipped token (A > 0 and r > high, or A < 0 and r < low) has gradient exactly 0; at r equal to a bound the
    gradient flows. Schulman et al., "Proximal Policy Optimization Algorithms", 2017, https://arxiv.org/abs/1707.06347.

    Args:
        {common}
        {policy}
        {clip}
        {keywords}
    """
    return _loss(
        "ppo",
        logits,
        target_tokens,
        (old_logprobs, advantages, clip_low_threshold, clip_high_threshold),
        weights,
        reduction,
        denominator,
        temperature,
        ignore_index,
        inplace,
        recompute,
        backend,
        validate,
        return_outputs,
    )


@_documented(clip=_CLIP.format(low=0.8, high=1.2))
def cispo(
    logits: Tensor,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    weights: Tensor | float | None = None,
    reduction: str = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Clipped importance weights: ``-sg(clamp(r, low, high)) logp A``, with ``r = exp(logp - old_logprobs)``.

    sg stops the gradient: the clipped ratio is a weight, and every token keeps a gradient. MiniMax, "MiniMax-M1:
    Scaling Test-Time Compute Efficiently with Lightning Attention", 2025, https://arxiv.org/abs/2506.13585.

    Args:
        {common}
        {policy}
        {clip}
        {keywords}
    """
    return _loss(
        "cispo",
        logits,
        target_tokens,
        (old_logprobs, advantages, clip_low_threshold, clip_high_threshold),
        weights,
        reduction,
        denominator,
        temperature,
        ignore_index,
        inplace,
        recompute,
        backend,
        validate,
        return_outputs,
    )


@_documented()
def dro(
    logits: Tensor,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    weights: Tensor | float | None = None,
    reduction: str = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Direct reward optimisation: ``-(logp A - beta / 2 (logp - old_logprobs)^2)``.

    The quadratic term acts on tokens of advantage 0, too: mask padding with ``weights`` or ``ignore_index``. Richemond
    et al., "Offline Regularised Reinforcement Learning for Large Language Models Alignment", 2024,
    https://arxiv.org/abs/2405.19107.

    Args:
        {common}
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...).
        beta: strength of the pull towards ``old_logprobs``, at least 0; a number or a per-token tensor. Default 0.1.
        {keywords}
    """
    return _loss(
        "dro",
        logits,
        target_tokens,
        (old_logprobs, advantages, beta),
        weights,
        reduction,
        denominator,
        temperature,
        ignore_index,
        inplace,
        recompute,
        backend,
        validate,
        return_outputs,
    )


@_documented()
def logprobs(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Logprob of each target, ``log_softmax(logits / temperature)[target]``, from one read of the logits.

    Args:
        {common}
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        ignore_index: target of tokens to leave out: logprob 0, gradient 0. Default -100.
        backend: "auto", "cuda", "triton", "cpu" or "eager", as for the losses.

    Returns:
        (...) float32, differentiable. Backward reads the logits again and takes any upstream gradient, more than once
        if asked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here.
    """
    result = _loss(
        "logprobs", logits, target_tokens, (), None, "none", None, temperature, ignore_index, False, False, backend
    )
    assert isinstance(result, Tensor)
    return result


def _loss(
    objective: str,
    logits: Tensor,
    target_tokens: Tensor,
    inputs: tuple[Tensor | float, ...],
    weights: Tensor | float | None,
    reduction: str,
    denominator: Tensor | float | None,
    temperature: Tensor | float,
    ignore_index: int,
    inplace: bool,
    recompute: bool,
    backend: str,
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Check, bring every per-token input to a column, and choose between one pass, two phase and forward only."""
    targets = checks.logits_and_targets(logits, target_tokens)
    columns = (
        1.0 if weights is None else checks.column("weights", weights, logits),
        checks.column("temperature", temperature, logits),
        checks.denominator(denominator, reduction, logits),
        *checks.objective_inputs(objective, inputs, logits),
    )
    checks.backend(backend)
    mean = reduction == "mean" and denominator is None
    reduce = reduction != "none"
    row = (targets, objective, *ops.split(columns), mean, ignore_index, return_outputs, validate, backend)

    if not (logits.requires_grad and torch.is_grad_enabled()):
        loss, logp, _, _ = ops.forward(logits, *row, reduce)
    else:
        if inplace:
            checks.inplace(logits, reduction, recompute)
        if recompute or not reduce:
            loss, logp = TwoPhase.apply(logits, row, reduce)
        else:
            loss, logp = OnePass.apply(logits, row, inplace)

    if not reduce:
        loss = loss.view(target_tokens.shape)
    if return_outputs:
        return loss, Outputs(logprobs=logp.view(target_tokens.shape))
    return loss
