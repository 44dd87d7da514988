"""From what a caller says who has logprobs to the losses composed of torch operations. The functions of on_logprobs.py
call these, one each; those of call.py do the same for who has logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, composition
from .composition import Columns, PerToken
from .objectives import OBJECTIVES, Objective
from .outputs import Outputs
from .problem import How, PolicyTerms, Reduction, Sequences
from .sequences import active_tokens, check_sequences
from .terms import asked

Result = Tensor | tuple[Tensor, Outputs]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cross_entropy(logprobs: Tensor, reduction: Reduction, how: How) -> Result:
    return of_logprob("cross_entropy", logprobs, reduction, how)


def of_logprob(name: str, logprobs: Tensor, reduction: Reduction, how: How) -> Result:
    """An objective without inputs, which no term goes with."""
    return policy(name, logprobs, {}, None, PolicyTerms(), reduction, how)


def policy(
    name: str,
    logprobs: Tensor,
    columns: Columns,
    entropy: Tensor | None,
    terms: PolicyTerms,
    reduction: Reduction,
    how: How,
) -> Result:
    objective = composition.of_objective(OBJECTIVES[name])
    return _composed(objective, logprobs, columns, entropy, Sequences(), terms, reduction, how)


def sequence_policy(
    name: str,
    logprobs: Tensor,
    columns: Columns,
    entropy: Tensor | None,
    sequences: Sequences,
    terms: PolicyTerms,
    reduction: Reduction,
    how: How,
) -> Result:
    checks.one_of("ratio_gradient", sequences.ratio_gradient, ("token", "sequence"))
    loss = composition.OF_SEQUENCES[name]
    return _composed(loss.objective, logprobs, columns, entropy, sequences, terms, reduction, how, loss.has_ratio)


def sapo(
    logprobs: Tensor,
    columns: Columns,
    ratio_level: str,
    entropy: Tensor | None,
    sequences: Sequences,
    terms: PolicyTerms,
    reduction: Reduction,
    how: How,
) -> Result:
    if checks.of_sequence(ratio_level, sequences):
        return sequence_policy("sapo", logprobs, columns, entropy, sequences, terms, reduction, how)
    return policy("sapo", logprobs, columns, entropy, terms, reduction, how)


def policy_loss(
    logprobs: Tensor,
    objective: str | Objective | Callable[..., Tensor],
    inputs: tuple[Any, ...],
    entropy: Tensor | None,
    terms: PolicyTerms,
    reduction: Reduction,
    how: How,
) -> Result:
    named, columns, terms = composition.named(objective, inputs, terms)
    if named is None:
        assert callable(objective)
        function = composition.of_function(objective, inputs)
    else:
        for bound in named.bounds:
            checks.bound(bound, columns[bound])
        function = composition.of_objective(named)
    return _composed(function, logprobs, columns, entropy, Sequences(), terms, reduction, how)


def _composed(
    objective: PerToken,
    logprobs: Tensor,
    columns: Columns,
    entropy: Tensor | None,
    sequences: Sequences,
    terms: PolicyTerms,
    reduction: Reduction,
    how: How,
    sequence_ratio: bool | None = None,
) -> Result:
    """sequence_ratio: of a loss of sequences, whether its ratio is theirs; None: a loss of tokens."""
    logp = _as_float("logprobs", logprobs)
    if sequence_ratio is not None:
        check_sequences(sequences.cu_seqlens, logp, "logprobs")
    if entropy is not None:
        entropy = _entropy(entropy, logp)
    elif asked(terms).entropy:
        raise ValueError("entropy_coef needs entropy, that of each token's distribution; got None")
    rows = logp.unsqueeze(-1)
    checks.flags(how)
    checks.flag("kl_weighted_by_ratio", terms.kl_weighted_by_ratio)
    brought = checks.columns(composition.of_tokens(columns, terms, reduction), rows, "logprobs")
    checks.denominator(reduction.denominator, reduction.reduction, rows)
    if sequences.sequence_ratio_mask is not None:
        mask = active_tokens(sequences.sequence_ratio_mask, logp, "sequence_ratio_mask")
        sequences = sequences._replace(sequence_ratio_mask=mask)
    present = torch.ones_like(logp, dtype=torch.bool)
    columns = {"log_ratio_clamp": terms.log_ratio_clamp, **columns}
    if how.validate:
        checks.values_in_range(
            brought, composition.tokens_of(present, columns, sequences, reduction).seen().reshape(-1)
        )
    return composition.composed(
        lambda tokens, with_entropy: (logp, entropy),
        objective,
        present,
        columns,
        sequences,
        terms,
        reduction,
        sequence_ratio=bool(sequence_ratio),
        return_outputs=how.return_outputs,
        derivatives_by_hand=True,
    )


def _as_float(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    checks.strided(name, tensor)
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _entropy(entropy: Tensor, logp: Tensor) -> Tensor:
    entropy = _as_float("entropy", entropy)
    if entropy.shape != logp.shape:
        raise ValueError(f"entropy must have the shape of logprobs, {tuple(logp.shape)}, got {tuple(entropy.shape)}")
    if entropy.device != logp.device:
        raise ValueError(f"entropy must be on the device of logprobs, {logp.device}, got {entropy.device}")
    return entropy.to(logp.dtype)
