"""The public losses of one token each.

Each is three stages: statistics of the vocabulary per token, a small objective per token, the gradient of the logits
from both. Only the objective differs, so each function below only names its objective and that objective's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from . import checks, ops
from .autograd import LogprobsAndEntropy, OnePass, TwoPhase
from .outputs import Call, Outputs
from .terms import KL_TYPES, NO_KL, Column, Terms, pack

_COMMON = """logits: (..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the
            last one is not 1, or more than two others are needed, the logits are copied.
        target_tokens: (...) int64 or int32, in [0, V) or ``ignore_index``."""

_TRANSFORMS = """temperature: number > 0 or per-token tensor; the logits are divided by it. Default 1.
        softcap: number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
            temperature. Default None: no cap.
        logit_scale: number > 0; the logits are multiplied by it, before everything else. Default 1."""

_KEYWORDS = """weights: per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked
            token's loss and gradient are exactly 0, whatever its row holds. Default None: 1.
        reduction: "sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not
            ``ignore_index``, 0 if there are none; or "none", w * loss per token.
        denominator: number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient
            accumulation and data parallelism. Default None.
        {transforms}
        ignore_index: target of tokens to leave out. Default -100.
        inplace: write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.
        recompute: keep the logits and make the gradient in backward, which may then run more than once. One more read.
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
        RuntimeError: the named backend can't run here; or a second backward without ``recompute=True``.""".replace(
    "{transforms}", _TRANSFORMS
)

_CLIP = """clip_low_threshold, clip_high_threshold: absolute bounds on the ratio, 0 <= low <= high; numbers or per-token
            tensors. Default {low} and {high}."""

_POLICY = """old_logprobs: logprobs of the targets under the policy that sampled them, a number or broadcastable to
            (...).
        advantages: a number or broadcastable to (...). Advantage 0 makes a token's loss and gradient 0."""

_POLICY_TERMS = """log_ratio_clamp: ``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever
            it is used, with no gradient beyond; a number or a per-token tensor, at least 0. Default None: no clamp.
        importance_weights: per-token factor of the objective, not of KL and entropy, for samples whose true sampler is
            not the policy of ``old_logprobs``; see :func:`truncated_importance_weights`. Default None: 1.
        entropy_coef: number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the
            token's distribution, with its gradient. Default 0.
        ref_logprobs: logprobs of the targets under a reference policy, a number or broadcastable to (...).
        kl_coef: number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss. Default 0.
        kl_type: with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or
            "abs" |logp - f|. Default "k3". Not clamped.
        kl_weighted_by_ratio: multiply KL by the loss's ratio, with a gradient through both. The ratio is
            exp(logp - old_logprobs) if the loss does not name another."""

Function = TypeVar("Function", bound=Callable)


def documented(**blanks: str) -> Callable[[Function], Function]:
    """Fill in the parts of a docstring that the losses share."""
    shared = {"common": _COMMON, "keywords": _KEYWORDS, "policy": _POLICY, "terms": _POLICY_TERMS}

    def fill(function: Function) -> Function:
        if function.__doc__ is not None:  # python -OO
            function.__doc__ = function.__doc__.format(**shared, transforms=_TRANSFORMS, **blanks)
        return function

    return fill


@documented()
def cross_entropy(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Tensor | float | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    validate: bool = False,
    return_outputs: bool = False,
) -> Tensor | tuple[Tensor, Outputs]:
    """Cross entropy: ``-logp``, with ``logp = log_softmax(z)[target]`` and z the transformed logits.

    The same numbers as :func:`torch.nn.functional.cross_entropy` with class indices, in float32 for any dtype of the
    logits; ``weights`` are per token here, not per class, and the mean over no token is 0, not NaN.

    With several targets per token, ``-sum_k weights[..., k] * logp[..., k]``: distillation from a teacher's top K, and
    the backward of any loss of the logprobs. A reduction sees each of the K as an item with its weight.

    Args:
        {common} Or (..., K), K targets per token, any of them twice or ignored; then ``weights`` are broadcastable to
            (..., K), may have any sign, and 0 makes a target padding; ``outputs.logprobs`` has that shape, too, and
            "none" gives the sums over K.
        label_smoothing: number e in [0, 1]: the target's probability is 1 - e, and e / V is added for all. Default 0.
        z_loss: number >= 0; ``z_loss * lse^2`` is added to each token's loss, lse being the logsumexp of z. Default 0.
        {keywords}
    """
    return loss_of("cross_entropy", locals())


@documented()
def importance_sampling(
    logits: Tensor,
    target_tokens: Tensor,
    old_logprobs: Tensor | float,
    advantages: Tensor | float,
    *,
    log_ratio_clamp: Tensor | float | None = None,
    importance_weights: Tensor | float | None = None,
    entropy_coef: Tensor | float = 0.0,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: str = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
        {terms}
        {keywords}
    """
    return loss_of("importance_sampling", locals())


@documented(clip=_CLIP.format(low=0.8, high=1.2))
def ppo(
    logits: Tensor,
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
    kl_type: str = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
        dual_clip: at A < 0 the loss is at most ``-dual_clip * A``; a number or a per-token tensor, at least 1. Ye et
            al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2019,
            https://arxiv.org/abs/1912.09729. Default None: no such bound.
        delta: the unclipped r is replaced by min(r, delta), for either sign of A; a number or a per-token tensor, at
            least 0. Prime Intellect, "INTELLECT-2", 2025, https://arxiv.org/abs/2505.07291. Default None.
        {terms}
        {keywords}
    """
    return loss_of("ppo", locals())


@documented(clip=_CLIP.format(low=0.8, high=1.2))
def cispo(
    logits: Tensor,
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
    kl_type: str = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: str = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
        {terms}
        {keywords}
    """
    return loss_of("cispo", locals())


@documented()
def dro(
    logits: Tensor,
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
    kl_type: str = "k3",
    kl_weighted_by_ratio: bool = False,
    weights: Tensor | float | None = None,
    reduction: str = "sum",
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
        {terms}
        {keywords}
    """
    return loss_of("dro", locals())


@overload
def logprobs(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    return_entropy: Literal[False] = ...,
    temperature: Tensor | float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def logprobs(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    return_entropy: bool,
    temperature: Tensor | float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    backend: str = ...,
) -> Any: ...
@documented()
def logprobs(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    return_entropy: bool = False,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Logprob of each target, ``log_softmax(z)[target]`` with z the transformed logits, from one read of the logits.

    Args:
        {common}
        return_entropy: return ``(logprobs, entropy)``; entropy is -sum_j p_j log p_j with p = softmax(z), of the same
            read and with a gradient, too.
        {transforms}
        ignore_index: target of tokens to leave out: logprob 0, entropy 0, gradient 0. Default -100.
        backend: "auto", "cuda", "triton", "cpu" or "eager", as for the losses.

    Returns:
        (...) float32, differentiable. Backward reads the logits again and takes any upstream gradient, more than once
        if asked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the named backend can't run here.
    """
    if not return_entropy:
        return loss_of("logprobs", locals() | _OF_LOGPROBS)  # type: ignore[return-value]
    targets = checks.logits_and_targets(logits, target_tokens)
    checks.backend(backend)
    scale, cap = _transforms(locals())
    columns, flags = pack(Terms(softcap=cap, entropy=True))
    row = (
        targets,
        "logprobs",
        (1.0, scale, 1.0, *columns),
        flags,
        False,
        ignore_index,
        True,
        False,
        backend,
    )
    if logits.requires_grad and torch.is_grad_enabled():
        logp, entropy = LogprobsAndEntropy.apply(logits, row)
    else:
        logp, entropy = ops.forward(logits, *row, False)[1]
    return logp.view(target_tokens.shape), entropy.view(target_tokens.shape)


_OF_LOGPROBS = {
    "weights": None,
    "reduction": "none",
    "denominator": None,
    "inplace": False,
    "recompute": False,
    "validate": False,
    "return_outputs": False,
}


def loss_of(name: str, given: Mapping[str, Any]) -> Tensor | tuple[Tensor, Outputs]:
    """Check, bring every per-token input to a column, and choose between one pass, two phase and forward only.

    given: the arguments of the public function, by name.
    """
    logits, target_tokens, weights = given["logits"], given["target_tokens"], given["weights"]
    reduction, denominator, ignore_index = given["reduction"], given["denominator"], given["ignore_index"]
    backend, return_outputs = given["backend"], given["return_outputs"]
    several = name == "cross_entropy" and checks.several_targets(logits, target_tokens)
    targets = checks.logits_and_targets(logits, target_tokens, several)
    divisor = checks.denominator(denominator, reduction, logits)
    mean = reduction == "mean" and denominator is None
    weight: Column = 1.0
    shares = None
    if several:
        shares, weight = _shares(logits, target_tokens, weights, ignore_index)
        if mean:
            divisor, mean = shares.sum(dtype=torch.float64).float(), False
    elif weights is not None:
        weight = checks.column("weights", weights, logits)
    temperature, softcap = _transforms(given)
    inputs = checks.objective_inputs(name, given, logits)
    checks.backend(backend)
    terms, flags = pack(_terms(name, given, softcap, shares))
    reduce = reduction != "none"
    row = (
        targets,
        name,
        (weight, temperature, divisor, *inputs, *terms),
        flags,
        mean,
        ignore_index,
        return_outputs,
        given["validate"],
        backend,
    )

    if not (logits.requires_grad and torch.is_grad_enabled()):
        loss, seen, _, _ = ops.forward(logits, *row, reduce)
    else:
        if given["inplace"]:
            checks.inplace(logits, reduction, given["recompute"])
        if given["recompute"] or not reduce:
            loss, seen = TwoPhase.apply(logits, row, reduce)
        else:
            loss, seen = OnePass.apply(logits, row, given["inplace"])

    if not reduce:
        loss = loss.view(logits.shape[:-1])
    if not return_outputs:
        return loss
    entropy = None
    if flags:
        entropy = seen[-1].view(logits.shape[:-1]) if flags[-1] else None
        seen = seen[:-1].t()
    return loss, Outputs(seen.reshape(target_tokens.shape), entropy, Call.of(given))


def asked_terms(given: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether a KL penalty is asked for, whether the entropy is), of the arguments of a policy loss."""
    entropy_coef, kl_coef = given["entropy_coef"], given["kl_coef"]
    if given["kl_type"] not in KL_TYPES:
        raise ValueError(f"kl_type must be one of {KL_TYPES}, got {given['kl_type']!r}")
    penalised = isinstance(kl_coef, Tensor) or kl_coef != 0.0
    if given["ref_logprobs"] is None:
        if penalised:
            raise ValueError("kl_coef needs ref_logprobs, the logprobs under the reference policy; got None")
    elif not penalised:  # not used, and still not to be wrong
        checks.column("ref_logprobs", given["ref_logprobs"], given["logits"])
    return penalised, isinstance(entropy_coef, Tensor) or entropy_coef != 0.0


def _transforms(given: Mapping[str, Any]) -> tuple[Column, float]:
    """(temperature, softcap) that leave no scale to apply: s cap tanh(x / cap) / T, with cap and T divided by s."""
    temperature = checks.column("temperature", given["temperature"], given["logits"])
    softcap, logit_scale = given["softcap"], given["logit_scale"]
    if softcap is None and logit_scale == 1.0:
        return temperature, 0.0
    scale = checks.number("logit_scale", logit_scale)
    cap = 0.0 if softcap is None else checks.number("softcap", softcap)
    return temperature / scale, cap / scale


def _shares(
    logits: Tensor, target_tokens: Tensor, weights: Tensor | float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """((N, K) weights with ignored targets at 0, (N,) 1 for a token that has any other)"""
    given = checks.column("weights", 1.0 if weights is None else weights, target_tokens.unsqueeze(-1))
    if isinstance(given, float):
        shares = torch.full((), given, dtype=torch.float32, device=logits.device).expand(target_tokens.numel())
    else:
        shares = given
    shares = shares.masked_fill(target_tokens.reshape(-1) == ignore_index, 0.0)
    shares = shares.view(-1, target_tokens.shape[-1])
    return shares, (shares != 0).any(1).float()


def _terms(name: str, given: Mapping[str, Any], softcap: float, shares: Tensor | None) -> Terms | None:
    """None for a plain loss."""
    if name == "cross_entropy":
        label_smoothing = given["label_smoothing"]
        z_loss = given["z_loss"]
        if softcap == 0.0 and shares is None and label_smoothing == 0.0 and z_loss == 0.0:
            return None
        return Terms(
            label_smoothing=checks.number("label_smoothing", label_smoothing),
            z_loss=checks.number("z_loss", z_loss),
            softcap=softcap,
            shares=shares,
        )
    if name == "logprobs":
        return Terms(softcap=softcap) if softcap else None
    entropy_coef, kl_coef, ref_logprobs = given["entropy_coef"], given["kl_coef"], given["ref_logprobs"]
    importance_weights = given["importance_weights"]
    penalised, entropy = asked_terms(given)
    if not penalised and not entropy and importance_weights is None and softcap == 0.0:
        return None
    logits, clamp = given["logits"], given["log_ratio_clamp"]
    return Terms(
        1.0 if importance_weights is None else checks.column("importance_weights", importance_weights, logits),
        checks.column("ref_logprobs", ref_logprobs, logits) if penalised else 0.0,
        checks.column("kl_coef", kl_coef, logits),
        checks.column("entropy_coef", entropy_coef, logits),
        math.inf if clamp is None else checks.column("log_ratio_clamp", clamp, logits),
        softcap=softcap,
        kl_type=KL_TYPES.index(given["kl_type"]) if penalised else NO_KL,
        kl_weighted_by_ratio=bool(given["kl_weighted_by_ratio"]),
        entropy=entropy,
    )
