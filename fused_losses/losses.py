# Written by tools/write_losses.py from fused_losses/keywords.py. Change that, then run: python tools/write_losses.py
"""The public losses.

Each is three stages: statistics of the vocabulary per token, a small objective per token, the gradient of the logits
from both. Only the objective differs, so each function below only names it, and groups its arguments into the records
of problem.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from . import call
from .linear_head import LinearHead
from .objectives import Objective
from .outputs import Outputs, Statistics
from .problem import (
    BackendName,
    How,
    KlType,
    PolicyTerms,
    RatioGradient,
    Reduction,
    ReductionName,
    Sequences,
    StatisticName,
    Transform,
)
from .vocab_shard import VocabShard


@overload
def cross_entropy(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def cross_entropy(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def cross_entropy(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Cross entropy: ``-logp``, with ``logp = log_softmax(z)[target]`` and z the transformed logits.

    The same numbers as :func:`torch.nn.functional.cross_entropy` with class indices, in float32 for any dtype of the
    logits; ``weights`` are per token here, not per class, and the mean over no token is 0, not NaN.

    With several targets per token, ``-sum_k weights[..., k] * logp[..., k]``: distillation from a teacher's top K, and
    the backward of any loss of the logprobs. A reduction sees each of the K as an item with its weight.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``. Or (..., K), K targets per token, any of
            them twice or ignored; then ``weights`` are broadcastable to (..., K), may have any sign, and 0 makes a
            target padding; ``outputs.logprobs`` has that shape, too, and "none" gives the sums over K.
        label_smoothing: number e in [0, 1]: the target's probability is 1 - e, and e / V is added for all. Default 0.
        z_loss: number >= 0; ``z_loss * lse^2`` is added to each token's loss, lse being the logsumexp of z. Default 0.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.cross_entropy(
        logits,
        target_tokens,
        label_smoothing,
        z_loss,
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def dft(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def dft(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def dft(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def dft(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Dynamic fine-tuning: cross entropy weighted by the target's own probability, ``-sg(p) logp`` with p = exp(logp).

    sg stops the gradient, which is that of ``-p``: what the policy finds unlikely moves it little. Wu et al., "On the
    Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", 2025,
    https://arxiv.org/abs/2508.05629.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.of_logprob(
        "dft",
        logits,
        target_tokens,
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def reinforce(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    advantages: Tensor | float,
    *,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def reinforce(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    advantages: Tensor | float,
    *,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def reinforce(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    advantages: Tensor | float,
    *,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def reinforce(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    advantages: Tensor | float,
    *,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Policy gradient: ``-logp A``.

    For samples of the policy itself; for those of another, ``importance_weights`` are the correction. Williams, "Simple
    Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992,
    https://doi.org/10.1007/BF00992696. With a group's advantages it is GPG's loss, Chu et al., "GPG: A Simple and
    Strong Reinforcement Learning Baseline for Model Reasoning", 2025, https://arxiv.org/abs/2504.02546.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples of another policy; see
            :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy(
        "reinforce",
        logits,
        target_tokens,
        {"advantages": advantages},
        PolicyTerms(
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def importance_sampling(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def importance_sampling(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def importance_sampling(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def importance_sampling(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Importance-sampled policy gradient: ``-r A``, with ``r = exp(logp - old_logprobs)``.

    The policy gradient for samples of another policy, corrected by the ratio of the two. Degris, White and Sutton,
    "Off-Policy Actor-Critic", 2012, https://arxiv.org/abs/1205.4839.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy(
        "importance_sampling",
        logits,
        target_tokens,
        {"old_logprobs": old_logprobs, "advantages": advantages},
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def ppo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def ppo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def ppo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def ppo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Clipped policy gradient: ``-min(r A, clamp(r, low, high) A)``, with ``r = exp(logp - old_logprobs)``.

    A clipped token (A > 0 and r > high, or A < 0 and r < low) has gradient exactly 0; at r equal to a bound the
    gradient flows. Schulman et al., "Proximal Policy Optimization Algorithms", 2017, https://arxiv.org/abs/1707.06347.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        clip_low_threshold, clip_high_threshold: absolute bounds on the ratio, 0 <= low <= high; numbers or per-token
            tensors. Default 0.8 and 1.2.
        dual_clip: at A < 0 the loss is at most ``-dual_clip * A``; a number or a per-token tensor, at least 1. Ye et
            al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2019,
            https://arxiv.org/abs/1912.09729. Default None: no such bound.
        delta: the unclipped r is replaced by min(r, delta), for either sign of A; a number or a per-token tensor, at
            least 0. Prime Intellect, "INTELLECT-2", 2025, https://arxiv.org/abs/2505.07291. Default None.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy(
        "ppo",
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "clip_low_threshold": clip_low_threshold,
            "clip_high_threshold": clip_high_threshold,
            "dual_clip": dual_clip,
            "delta": delta,
        },
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def cispo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def cispo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def cispo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def cispo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Clipped importance weights: ``-sg(clamp(r, low, high)) logp A``, with ``r = exp(logp - old_logprobs)``.

    sg stops the gradient: the clipped ratio is a weight, and every token keeps a gradient. MiniMax, "MiniMax-M1:
    Scaling Test-Time Compute Efficiently with Lightning Attention", 2025, https://arxiv.org/abs/2506.13585.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        clip_low_threshold, clip_high_threshold: absolute bounds on the ratio, 0 <= low <= high; numbers or per-token
            tensors. Default 0.8 and 1.2.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy(
        "cispo",
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "clip_low_threshold": clip_low_threshold,
            "clip_high_threshold": clip_high_threshold,
        },
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def dro(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def dro(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def dro(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def dro(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Direct reward optimisation: ``-(logp A - beta / 2 (logp - old_logprobs)^2)``.

    The quadratic term acts on tokens of advantage 0, too: mask padding with ``weights`` or ``ignore_index``. Richemond
    et al., "Offline Regularised Reinforcement Learning for Large Language Models Alignment", 2024,
    https://arxiv.org/abs/2405.19107.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...).
        beta: strength of the pull towards ``old_logprobs``, at least 0; a number or a per-token tensor. Default 0.1.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy(
        "dro",
        logits,
        target_tokens,
        {"old_logprobs": old_logprobs, "advantages": advantages, "beta": beta},
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def sapo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    tau_positive: Tensor | float = 1.0,
    tau_negative: Tensor | float = 1.05,
    ratio_level: Literal["token", "sequence"] = "token",
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def sapo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    tau_positive: Tensor | float = 1.0,
    tau_negative: Tensor | float = 1.05,
    ratio_level: Literal["token", "sequence"] = "token",
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def sapo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    tau_positive: Tensor | float = 1.0,
    tau_negative: Tensor | float = 1.05,
    ratio_level: Literal["token", "sequence"] = "token",
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def sapo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    tau_positive: Tensor | float = 1.0,
    tau_negative: Tensor | float = 1.05,
    ratio_level: Literal["token", "sequence"] = "token",
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Soft gate instead of a clip: ``-(4 / tau) sigmoid(tau (r - 1)) A``, with ``r = exp(logp - old_logprobs)``.

    tau is tau_positive for A > 0, else tau_negative. At r = 1 the gradient is that of the plain policy gradient. Gao et
    al., "Soft Adaptive Policy Optimization", 2025, https://arxiv.org/abs/2511.20347.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        tau_positive, tau_negative: steepness of the gate, greater than 0; numbers or per-token tensors. Default 1 and
            1.05.
        ratio_level: "token", one pass; or "sequence", two phase, r being the ratio of :func:`gspo`, also where it
            weights the KL. Default "token".
        cu_seqlens: (B + 1,) int32 or int64, 0 and the end of each sequence, the tokens of all shapes counted in
            row-major order. Default None: the last dimension of the tokens is the sequence.
        sequence_ratio_mask: broadcastable to (...); the tokens, any value but 0, that a sequence's ratio is made of.
            Default None: those of a weight other than 0 whose target is not ``ignore_index``. For "sequence" only.
        ratio_gradient: "token" or "sequence", as for :func:`gspo`. Default "token".
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.sapo(
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "tau_positive": tau_positive,
            "tau_negative": tau_negative,
        },
        ratio_level,
        Sequences(cu_seqlens=cu_seqlens, sequence_ratio_mask=sequence_ratio_mask, ratio_gradient=ratio_gradient),
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def dppo_tv(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def dppo_tv(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def dppo_tv(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def dppo_tv(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Divergence PPO, total variation: ``-sg(min(r, ratio_cap)) M logp A``, with ``r = exp(logp - old_logprobs)``.

    M is 0 for A > 0 where the token is more probable than it was, p > q, and D exceeds ``divergence_high``; for A < 0
    where p < q and D exceeds ``divergence_low``; else 1. ``D = |p - q|``, p = exp(logp), q = exp(old_logprobs): an
    improbable token's ratio may be any in this trust region. sg stops the gradient. Qi et al., "Rethinking the Trust
    Region in LLM Reinforcement Learning", 2026, https://arxiv.org/abs/2602.04879.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        divergence_low, divergence_high: how far the token's probability may have moved, at least 0: down, for A < 0,
            and up, for A > 0. Numbers or per-token tensors. Default 0.2 and 0.2.
        ratio_cap: the weight is at most this; a number or a per-token tensor, at least 0. Default None: no such bound.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy(
        "dppo_tv",
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "divergence_low": divergence_low,
            "divergence_high": divergence_high,
            "ratio_cap": ratio_cap,
        },
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def dppo_kl(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def dppo_kl(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def dppo_kl(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def dppo_kl(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Divergence PPO, KL divergence: ``-sg(min(r, ratio_cap)) M logp A``, with ``r = exp(logp - old_logprobs)``.

    As :func:`dppo_tv`, with ``D = q log(q / p) + (1 - q) log((1 - q + e) / (1 - p + e))`` and e = 1e-8: the KL
    divergence of "this token or any other", finite where p is 1. Qi et al., "Rethinking the Trust Region in LLM
    Reinforcement Learning", 2026, https://arxiv.org/abs/2602.04879.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        divergence_low, divergence_high: how far the token's probability may have moved, at least 0: down, for A < 0,
            and up, for A > 0. Numbers or per-token tensors. Default 0.2 and 0.2.
        ratio_cap: the weight is at most this; a number or a per-token tensor, at least 0. Default None: no such bound.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy(
        "dppo_kl",
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "divergence_low": divergence_low,
            "divergence_high": divergence_high,
            "ratio_cap": ratio_cap,
        },
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def gspo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def gspo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def gspo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def gspo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    ratio_gradient: RatioGradient = "token",
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """PPO's objective of the sequence's ratio: the geometric mean of its tokens' ratios.

    With x = logp, q = old_logprobs, sg = stop-gradient and m = mean over the sequence of x - q, the ratio of a token is
    ``exp(sg(m) + x - sg(x))`` for ``ratio_gradient="token"``, as in the paper's GSPO-token, verl, SkyRL and Tinker; and
    ``exp(m)``, with a gradient through the mean, for "sequence", as in TRL, Liger and NeMo-RL. The values are the same.
    Zheng et al., "Group Sequence Policy Optimization", 2025, https://arxiv.org/abs/2507.18071, whose bounds are as
    close to 1 as 0.9997 and 1.0004. ``kl_weighted_by_ratio`` weights by this ratio, too, as TRL does.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.
        cu_seqlens: (B + 1,) int32 or int64, 0 and the end of each sequence, the tokens of all shapes counted in
            row-major order. Default None: the last dimension of the tokens is the sequence.
        sequence_ratio_mask: broadcastable to (...); the tokens, any value but 0, that a sequence's ratio is made of.
            Default None: those of a weight other than 0 whose target is not ``ignore_index``.
        clip_low_threshold, clip_high_threshold, dual_clip, delta: as for :func:`ppo`, on this ratio. Default 0.8, 1.2,
            None and None.
        ratio_gradient: "token" or "sequence". Default "token".
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.sequence_policy(
        "gspo",
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "clip_low_threshold": clip_low_threshold,
            "clip_high_threshold": clip_high_threshold,
            "dual_clip": dual_clip,
            "delta": delta,
        },
        Sequences(cu_seqlens=cu_seqlens, sequence_ratio_mask=sequence_ratio_mask, ratio_gradient=ratio_gradient),
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def gmpo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.6703200460356393,
    clip_high_threshold: Tensor | float = 1.4918246976412703,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def gmpo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.6703200460356393,
    clip_high_threshold: Tensor | float = 1.4918246976412703,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def gmpo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.6703200460356393,
    clip_high_threshold: Tensor | float = 1.4918246976412703,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def gmpo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    clip_low_threshold: Tensor | float = 0.6703200460356393,
    clip_high_threshold: Tensor | float = 1.4918246976412703,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Geometric mean of clipped ratios: ``-A exp(mean_t c_t)`` at every token of the sequence.

    c_t is x - q, clipped token by token where that lowers ``A c_t``: at most log(high) for A > 0, at least log(low) for
    A < 0. The gradient flows through the mean. Weights m / n_b and the number of sequences as the denominator, n_b
    being a sequence's tokens, give the paper's mean over sequences. Zhao et al., "Geometric-Mean Policy Optimization",
    2025, https://arxiv.org/abs/2507.20673.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0. The
            same for all tokens of a sequence.
        cu_seqlens: (B + 1,) int32 or int64, 0 and the end of each sequence, the tokens of all shapes counted in
            row-major order. Default None: the last dimension of the tokens is the sequence.
        sequence_ratio_mask: broadcastable to (...); the tokens, any value but 0, that a sequence's ratio is made of.
            Default None: those of a weight other than 0 whose target is not ``ignore_index``.
        clip_low_threshold, clip_high_threshold: absolute bounds on a token's ratio, 0 <= low <= high; numbers or
            per-token tensors. Default e^-0.4 and e^0.4.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.sequence_policy(
        "gmpo",
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "clip_low_threshold": clip_low_threshold,
            "clip_high_threshold": clip_high_threshold,
        },
        Sequences(cu_seqlens=cu_seqlens, sequence_ratio_mask=sequence_ratio_mask),
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def vespo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    k_positive: Tensor | float = 2.0,
    lambda_positive: Tensor | float = 3.0,
    k_negative: Tensor | float = 3.0,
    lambda_negative: Tensor | float = 2.0,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def vespo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    k_positive: Tensor | float = 2.0,
    lambda_positive: Tensor | float = 3.0,
    k_negative: Tensor | float = 3.0,
    lambda_negative: Tensor | float = 2.0,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def vespo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    k_positive: Tensor | float = 2.0,
    lambda_positive: Tensor | float = 3.0,
    k_negative: Tensor | float = 3.0,
    lambda_negative: Tensor | float = 2.0,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def vespo(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ratio_mask: Tensor | None = None,
    k_positive: Tensor | float = 2.0,
    lambda_positive: Tensor | float = 3.0,
    k_negative: Tensor | float = 3.0,
    lambda_negative: Tensor | float = 2.0,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Soft weights of whole sequences: ``-sg(phi(w)) logp A``, with ``phi(w) = w^k e^(lambda (1 - w))``.

    w is the ratio of the whole sequence, the product of its tokens' ``exp(logp - old_logprobs)``, and phi(1) = 1; far
    from 1 phi goes to 0, where no ratio overflows. Shen et al., "VESPO: Variational Sequence-Level Soft Policy
    Optimization for Stable Off-Policy LLM Training", 2026, https://arxiv.org/abs/2602.10693. ``log_ratio_clamp`` bounds
    each token's log ratio, and ``kl_weighted_by_ratio`` weights by a token's ratio.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0. The
            same for all tokens of a sequence.
        cu_seqlens: (B + 1,) int32 or int64, 0 and the end of each sequence, the tokens of all shapes counted in
            row-major order. Default None: the last dimension of the tokens is the sequence.
        sequence_ratio_mask: broadcastable to (...); the tokens, any value but 0, that a sequence's ratio is made of.
            Default None: those of a weight other than 0 whose target is not ``ignore_index``.
        k_positive, lambda_positive: exponents of w and of e^(1 - w) for A >= 0; numbers or per-token tensors, k at
            least 0, lambda greater than 0. Default 2 and 3.
        k_negative, lambda_negative: the same for A < 0. Default 3 and 2.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.sequence_policy(
        "vespo",
        logits,
        target_tokens,
        {
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "k_positive": k_positive,
            "lambda_positive": lambda_positive,
            "k_negative": k_negative,
            "lambda_negative": lambda_negative,
        },
        Sequences(cu_seqlens=cu_seqlens, sequence_ratio_mask=sequence_ratio_mask),
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def policy_loss(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    objective: str | Objective | Callable[..., Tensor],
    *inputs: Any,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[False] = False,
) -> Tensor: ...
@overload
def policy_loss(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    objective: str | Objective | Callable[..., Tensor],
    *inputs: Any,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: Literal[True],
) -> tuple[Tensor, Outputs]: ...
@overload
def policy_loss(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    objective: str | Objective | Callable[..., Tensor],
    *inputs: Any,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool,
) -> Tensor | tuple[Tensor, Outputs]: ...
def policy_loss(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    objective: str | Objective | Callable[..., Tensor],
    *inputs: Any,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: KlType = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: ReductionName = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    upstream: Tensor | float = 1.0,
    backend: BackendName = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """A loss with an objective of your own, or any of ours, through the one door.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        objective: what maps the (...) float32 logprobs of the targets, and ``inputs``, to the loss:

            * a function ``f(logp, *inputs)`` of torch operations, which returns the loss of each token, (...), or one
              0-d loss of the whole batch, which weights, reduction and denominator then leave as it is. Two phase.
              ``inputs`` are handed over as they are. At tokens that are ignored or have weight 0, logp is 0 and nothing
              flows back.
            * an :class:`Objective`, whose formula also returns the derivative and which may have the same formula as a
              Triton function: one pass on the backends "triton", which "auto" then takes for CUDA tensors, and "eager",
              two phase on the others. ``inputs`` are its columns, in order: numbers, or tensors broadcastable to (...).
            * the name of one of ours: "reinforce", "importance_sampling", "ppo", "cispo", "dro", "sapo", "dppo_tv" or
              "dppo_kl". ``inputs`` are its columns in the order of the loss's own arguments; bounds that are left out
              have the loss's defaults.
        log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used,
            with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp -
            old_logprobs) if the loss does not name another. A function has old_logprobs as the first of its inputs
            where ``kl_weighted_by_ratio`` asks for them.
        weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
            loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
        upstream: number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where
            that is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass
            then makes the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by
            what comes over what was expected, touches no memory where the two agree. The loss is the same. Default 1.
        backend: "auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else
            eager, for CPU tensors. A named backend never falls back.
        validate: check the values of targets, per-token bounds and temperatures too; synchronises with the device. On
            CPU, targets are always checked. Unchecked, a bad value makes its own token NaN and no other.
        return_outputs: return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target,
            detached, 0 where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in
            use; ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.

    Returns:
        The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its gradient
        reaches ``logits`` only: all other inputs are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.
    """
    return call.policy_loss(
        logits,
        target_tokens,
        objective,
        inputs,
        PolicyTerms(
            log_ratio_clamp=log_ratio_clamp,
            importance_weights=importance_weights,
            entropy_coef=entropy_coef,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            kl_type=kl_type,
            kl_weighted_by_ratio=kl_weighted_by_ratio,
        ),
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        Reduction(weights=weights, reduction=reduction, denominator=denominator, ignore_index=ignore_index),
        How(
            inplace=inplace,
            recompute=recompute,
            upstream=upstream,
            backend=backend,
            validate=validate,
            return_outputs=return_outputs,
        ),
    )


@overload
def logprobs(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    return_entropy: Literal[False] = False,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: BackendName = "auto",
) -> Tensor: ...
@overload
def logprobs(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    return_entropy: Literal[True],
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def logprobs(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    return_entropy: bool,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
def logprobs(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    return_entropy: bool = False,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Logprob of each target, ``log_softmax(z)[target]`` with z the transformed logits, from one read of the logits.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        return_entropy: return ``(logprobs, entropy)``; entropy is -sum_j p_j log p_j with p = softmax(z), of the same
            read and with a gradient, too.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out: logprob 0, entropy 0, gradient 0. Default -100.
        inplace: in backward, write the gradient over ``logits``, which must not be a leaf, instead of into a new
            buffer; backward then runs once. Not under torch.compile.
        backend: "auto", "cuda", "triton", "cpu" or "eager", as for the losses.

    Returns:
        (...) float32, differentiable. Backward reads the logits again and takes any upstream gradient, more than once
        if asked, unless ``inplace=True``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward with ``inplace=True``.
    """
    return call.logprobs(
        logits,
        target_tokens,
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        ignore_index,
        inplace,
        backend,
        return_entropy,
    )


def statistics(
    logits: Tensor | LinearHead | VocabShard,
    target_tokens: Tensor,
    *,
    outputs: Sequence[StatisticName] = ("logprobs", "entropy", "log_sum_squares", "mean_logit", "top1"),
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: BackendName = "auto",
) -> Statistics:
    """What a row says of its target and of itself, from one read of the logits: with z the transformed logits and p =
    softmax(z) the logprob of the target, the entropy, ``log sum_j p_j^2``, ``mean_j z_j`` and whether the target is the
    most likely class.

    ``sum_j p_j^2`` is what the squared norm of the logits' gradient is made of, ``|grad logp|^2 = 1 - 2 p_t + sum_j
    p_j^2`` (at temperature 1): for the optimal token baseline, Li et al., "The Optimal Token Baseline", 2026,
    https://arxiv.org/abs/2602.07078, and for the weights of WPO, Zhou et al., "WPO: Enhancing RLHF with Weighted
    Preference Optimization", 2024, https://arxiv.org/abs/2406.11827.

    Args:
        logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last
            one is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which
            makes them a chunk at a time, or a :class:`VocabShard` of them.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``.
        outputs: a tuple or a list of what is asked for, each once. Default: all five.

            * "logprobs": log p_t, the logprob of the target t
            * "entropy": -sum_j p_j log p_j
            * "log_sum_squares": log sum_j p_j^2
            * "mean_logit": mean_j z_j, -inf where a logit is
            * "top1": whether the target is the most likely class; of several with the same logit, the first is.
        temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1.
        ignore_index: target of tokens to leave out, of which all numbers are 0, and top1 False. Default -100.
        inplace: in backward, write the gradient over ``logits``, which must not be a leaf, instead of into a new
            buffer; backward then runs once. Not under torch.compile.
        backend: "auto", "cuda", "triton", "cpu" or "eager", as for the losses.

    Returns:
        A :class:`Statistics` with a (...) tensor for each of ``outputs``, bool for top1, else float32, and None for the
        rest. logprobs and entropy are differentiable, by one backward together, as those of :func:`logprobs` are; the
        others are detached. Where the logprob is NaN all are, and top1 is False.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here; or a second backward with ``inplace=True``.
    """
    return call.statistics(
        logits,
        target_tokens,
        outputs,
        Transform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        ignore_index,
        inplace,
        backend,
    )
