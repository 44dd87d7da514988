"""From what a caller says to what is asked of the rows: every argument checked and brought to a column, and the stages
run on the result. The functions of losses.py call these, one each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, composition, ops, stages
from .backends import resolve, unusable
from .composition import Columns, PerToken
from .head import Head
from .logits import Logits
from .objectives import OBJECTIVES, Objective
from .origin import Origin
from .outputs import Call, Outputs, Statistics
from .problem import (
    BackendName,
    Column,
    How,
    Logprobs,
    PolicyTerms,
    Problem,
    Reduction,
    Sequences,
    StatisticName,
    Targets,
    Terms,
    Transform,
)
from .sequences import active_tokens, check_sequences
from .terms import asked

Result = Tensor | tuple[Tensor, Outputs]


# ---- The public losses ----


def policy(
    name: str,
    logits: Tensor | Origin,
    target_tokens: Tensor,
    columns: Columns,
    terms: PolicyTerms,
    transform: Transform,
    reduction: Reduction,
    how: How,
) -> Result:
    columns = {**columns, "log_ratio_clamp": terms.log_ratio_clamp}
    return _of_objective(OBJECTIVES[name], logits, target_tokens, columns, terms, transform, reduction, how)


def of_logprob(
    name: str,
    logits: Tensor | Origin,
    target_tokens: Tensor,
    transform: Transform,
    reduction: Reduction,
    how: How,
) -> Result:
    """An objective without inputs, which no term goes with."""
    return policy(name, logits, target_tokens, {}, PolicyTerms(), transform, reduction, how)


def cross_entropy(
    logits: Tensor | Origin,
    target_tokens: Tensor,
    label_smoothing: float,
    z_loss: float,
    transform: Transform,
    reduction: Reduction,
    how: How,
) -> Result:
    if isinstance(logits, Origin):
        logits = logits.checked()  # whose shape may be none until then
    several = checks.several_targets(logits, target_tokens)
    logits, tokens = checks.logits_and_targets(logits, target_tokens, several)
    divisor = checks.denominator(reduction.denominator, reduction.reduction, logits)
    ignore_index = checks.index("ignore_index", reduction.ignore_index, target_tokens.dtype)
    weights: Column = 1.0
    shares = None
    if several:
        shares, weights = _shares(logits, target_tokens, reduction.weights, ignore_index)
        if divisor is None:
            divisor = shares.sum(dtype=torch.float64)
            if _made_of(logits)[0].dtype is not torch.float64:
                divisor = divisor.float()
    elif reduction.weights is not None:
        weights = checks.column("weights", reduction.weights, logits)
    problem = Problem(
        targets=Targets(tokens, ignore_index, shares),
        transform=_transform(transform, logits),
        weights=weights,
        objective=OBJECTIVES["cross_entropy"],
        inputs=(),
        terms=Terms(
            label_smoothing=checks.number("label_smoothing", label_smoothing), z_loss=checks.number("z_loss", z_loss)
        ),
        denominator=divisor,
        vocab=logits.shape[-1],
        all_logprobs=how.return_outputs,
    )
    return _run(logits, target_tokens, problem, {}, reduction, how)


def sequence_policy(
    name: str,
    logits: Tensor | Origin,
    target_tokens: Tensor,
    columns: Columns,
    sequences: Sequences,
    terms: PolicyTerms,
    transform: Transform,
    reduction: Reduction,
    how: How,
) -> Result:
    checks.one_of("ratio_gradient", sequences.ratio_gradient, ("token", "sequence"))
    loss = composition.OF_SEQUENCES[name]
    return _composed(
        loss.objective, logits, target_tokens, columns, sequences, terms, transform, reduction, how, loss.has_ratio
    )


def sapo(
    logits: Tensor | Origin,
    target_tokens: Tensor,
    columns: Columns,
    ratio_level: str,
    sequences: Sequences,
    terms: PolicyTerms,
    transform: Transform,
    reduction: Reduction,
    how: How,
) -> Result:
    if checks.of_sequence(ratio_level, sequences):
        return sequence_policy("sapo", logits, target_tokens, columns, sequences, terms, transform, reduction, how)
    return policy("sapo", logits, target_tokens, columns, terms, transform, reduction, how)


def policy_loss(
    logits: Tensor | Origin,
    target_tokens: Tensor,
    objective: str | Objective | Callable[..., Tensor],
    inputs: tuple[Any, ...],
    terms: PolicyTerms,
    transform: Transform,
    reduction: Reduction,
    how: How,
) -> Result:
    named, columns, terms = composition.named(objective, inputs, terms)
    if named is None:
        assert callable(objective)
        function = composition.of_function(objective, inputs)
        return _composed(function, logits, target_tokens, columns, Sequences(), terms, transform, reduction, how)
    logits, _ = checks.logits_and_targets(logits, target_tokens)
    backend = checks.backend(how.backend)
    if (
        backend == "auto"
        and named.triton is not None
        and logits.device.type == "cuda"
        and not unusable("triton", logits.device)
    ):
        how = how._replace(backend="triton")
    if OBJECTIVES.get(named.name) is not named:
        # Operators know objectives by name, and so only ours.
        given = (*columns.values(), *transform, *reduction, *terms, how.upstream)
        watched = checks.watched(
            *_made_of(logits), target_tokens, *(value for value in given if isinstance(value, Tensor))
        )
        if watched or not resolve(how.backend, logits.device).runs(named):
            _inputs(named, columns, logits)
            function = composition.of_objective(named)
            return _composed(function, logits, target_tokens, columns, Sequences(), terms, transform, reduction, how)
    return _of_objective(named, logits, target_tokens, columns, terms, transform, reduction, how)


def logprobs(
    logits: Tensor | Origin,
    target_tokens: Tensor,
    transform: Transform,
    ignore_index: int,
    inplace: bool,
    backend: BackendName,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    terms = Terms(entropy=checks.flag("return_entropy", return_entropy))
    logp, *entropy = _observed(logits, target_tokens, terms, transform, ignore_index, inplace, backend)
    return (logp, entropy[0]) if return_entropy else logp


def statistics(
    logits: Tensor | Origin,
    target_tokens: Tensor,
    outputs: Sequence[StatisticName],
    transform: Transform,
    ignore_index: int,
    inplace: bool,
    backend: BackendName,
) -> Statistics:
    asked = checks.outputs(outputs)
    beyond = not {"logprobs", "entropy"}.issuperset(asked)
    terms = Terms(entropy=beyond or "entropy" in asked, statistics=beyond)
    rows = _observed(logits, target_tokens, terms, transform, ignore_index, inplace, backend)
    logp, entropy, log_sum_squares, mean_logit, top1 = (*rows, None, None, None, None)[:5]
    return Statistics(
        logp if "logprobs" in asked else None,
        entropy if "entropy" in asked else None,
        log_sum_squares if "log_sum_squares" in asked else None,
        mean_logit if "mean_logit" in asked else None,
        top1 != 0 if top1 is not None and "top1" in asked else None,
    )


def _observed(
    logits: Tensor | Origin,
    target_tokens: Tensor,
    terms: Terms,
    transform: Transform,
    ignore_index: int,
    inplace: bool,
    backend: BackendName,
) -> tuple[Tensor, ...]:
    """The rows of Logprobs that the terms ask for, in the targets' shape."""
    logits, tokens = checks.logits_and_targets(logits, target_tokens)
    problem = Problem(
        targets=Targets(tokens, checks.index("ignore_index", ignore_index, target_tokens.dtype)),
        transform=_transform(transform, logits),
        weights=1.0,
        objective=OBJECTIVES["logprobs"],
        inputs=(),
        terms=terms,
        denominator=1.0,
        vocab=logits.shape[-1],
        all_logprobs=False,
    )
    how = How(inplace=checks.flag("inplace", inplace), backend=checks.backend(backend))
    if how.inplace and isinstance(logits, Origin):
        logits.overwritten()  # or it says why not
    if how.inplace and stages.wants_gradient(_made_of(logits)):
        checks.overwritable(logits)
    else:  # nothing is written
        how = how._replace(inplace=False)
    rows = _in_a_graph_or_not(logits, _rows_observed)(logits, problem, how)
    return tuple(row.view(target_tokens.shape) for row in rows)


# ---- One problem for all tokens ----


def _of_objective(
    objective: Objective,
    logits: Tensor | Origin,
    target_tokens: Tensor,
    columns: Columns,
    terms: PolicyTerms,
    transform: Transform,
    reduction: Reduction,
    how: How,
) -> Result:
    logits, tokens = checks.logits_and_targets(logits, target_tokens)
    problem = Problem(
        targets=Targets(tokens, checks.index("ignore_index", reduction.ignore_index, target_tokens.dtype)),
        transform=_transform(transform, logits),
        weights=1.0 if reduction.weights is None else checks.column("weights", reduction.weights, logits),
        objective=objective,
        inputs=_inputs(objective, columns, logits),
        terms=_terms(terms, logits),
        denominator=checks.denominator(reduction.denominator, reduction.reduction, logits),
        vocab=logits.shape[-1],
        all_logprobs=how.return_outputs,
    )
    return _run(logits, target_tokens, problem, columns, reduction, how)


def _run(
    logits: Tensor | Origin,
    target_tokens: Tensor,
    problem: Problem,
    columns: Columns,
    reduction: Reduction,
    how: How,
) -> Result:
    checks.backend(how.backend)
    checks.flags(how)
    how = _expecting(how, reduction, logits)
    reduce = reduction.reduction != "none"
    if how.inplace:
        if isinstance(logits, Origin):
            logits.overwritten()
        if stages.wants_gradient(_made_of(logits)):
            checks.inplace(logits, reduction.reduction, how.recompute)
        else:  # forward only, which writes nothing
            how = how._replace(inplace=False)
    loss, table = _in_a_graph_or_not(logits, _stages)(logits, problem, how, reduce)
    if not reduce:
        loss = loss.view(logits.shape[:-1])
    if not how.return_outputs:
        return loss
    seen = Logprobs(table)
    entropy = seen.entropy().view(logits.shape[:-1]) if problem.terms.entropy else None
    call = Call(target_tokens != reduction.ignore_index, reduction.weights, columns)
    return loss, Outputs(seen.targets().reshape(target_tokens.shape), entropy, call)


def _expecting(how: How, reduction: Reduction, logits: Tensor | Origin) -> How:
    """With ``upstream`` as a column."""
    upstream = checks.upstream(how.upstream, reduction.reduction, logits)
    here = isinstance(upstream, Tensor) and upstream.is_cpu and not checks.watched(upstream)
    if how.validate or here:
        checks.values_in_range({"upstream": upstream})
    return how._replace(upstream=upstream)


def _made_of(logits: Tensor | Origin) -> tuple[Tensor, ...]:
    """What gets a gradient."""
    return logits.inputs if isinstance(logits, Origin) else (logits,)


def _stages(logits: Tensor | Origin, problem: Problem, how: How, reduce: bool) -> tuple[Tensor, Tensor]:
    source = _source(logits, problem, how)
    return stages.run(source, _made_of(logits), problem, reduce=reduce, recompute=how.recompute, expected=how.upstream)


def _rows_observed(logits: Tensor | Origin, problem: Problem, how: How) -> tuple[Tensor, ...]:
    """The rows of Logprobs, each a tensor of its own."""
    source, inputs = _source(logits, problem, how), _made_of(logits)
    if how.inplace and isinstance(source, ops.Watched):  # a graph has the logits as they were before its backward
        raise ValueError(
            "inplace=True of logprobs and statistics writes over the logits in backward, which torch.compile, other "
            "tracers and tensor subclasses do not allow: pass inplace=False there"
        )
    if not problem.terms.entropy:
        logp, _ = stages.run(source, inputs, problem, reduce=False)
        return (logp,)
    if stages.wants_gradient(inputs):
        return stages.Observed.apply(source, problem, *inputs)
    return source.forward(inputs, problem, False).logprobs.unbind()


_APART = "a fused loss of a vocabulary that is sharded, or with weight_grad, is in no graph"
_APART_OF: dict[Callable[..., Any], Callable[..., Any]] = {
    function: torch.compiler.disable(function, reason=_APART) for function in (_stages, _rows_observed)
}


def _in_a_graph_or_not(logits: Tensor | Origin, function: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(logits, Origin) and torch.compiler.is_compiling() and not logits.traced():
        return _APART_OF[function]
    return function


def _source(logits: Tensor | Origin, problem: Problem, how: How) -> stages.Source:
    watched = ops.watched(_made_of(logits), problem)
    if isinstance(logits, Origin):
        source = logits.source(how)
        # operators take no group, and no tensor that they would add to
        return ops.WatchedHead(source) if watched and isinstance(source, Head) and logits.traced() else source
    kind = ops.Watched if watched else Logits
    return kind(how.backend, how.inplace, how.validate)


def _inputs(objective: Objective, columns: Columns, logits: Tensor | Origin) -> tuple[Column, ...]:
    """The objective's columns in its order, its bounds checked as far as the host knows them."""
    inputs: list[Column] = []
    for name in objective.columns:
        value = columns[name]
        if value is None and name in objective.limits:
            inputs.append(math.inf)
            continue
        column = checks.column(name, value, logits)  # type: ignore[arg-type]
        if name in objective.bounds:
            checks.bound(name, column)
        inputs.append(column)
    checks.clip(columns.get("clip_low_threshold"), columns.get("clip_high_threshold"))
    return tuple(inputs)


def _terms(terms: PolicyTerms, logits: Tensor | Origin) -> Terms:
    kl_coef = checks.column("kl_coef", terms.kl_coef, logits)
    entropy_coef = checks.column("entropy_coef", terms.entropy_coef, logits)
    weighted = checks.flag("kl_weighted_by_ratio", terms.kl_weighted_by_ratio)
    wanted = asked(terms)
    ref_logprobs: Column = 0.0
    if terms.ref_logprobs is not None:  # not to be wrong where it is not used, either
        ref_logprobs = checks.column("ref_logprobs", terms.ref_logprobs, logits)
    importance, clamp = terms.importance_weights, terms.log_ratio_clamp
    if not wanted.kl and not wanted.entropy:
        if importance is None:
            return _NO_TERMS
        return Terms(importance_weights=checks.column("importance_weights", importance, logits))
    return Terms(
        importance_weights=1.0 if importance is None else checks.column("importance_weights", importance, logits),
        ref_logprobs=ref_logprobs if wanted.kl else 0.0,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        log_ratio_clamp=math.inf if clamp is None else checks.column("log_ratio_clamp", clamp, logits),
        kl_type=terms.kl_type if wanted.kl else None,
        kl_weighted_by_ratio=weighted,
        entropy=wanted.entropy,
    )


_NO_TERMS = Terms()


def _transform(transform: Transform, logits: Tensor | Origin) -> Transform:
    """One that leaves no scale to apply: s cap tanh(x / cap) / T, with cap and T divided by s."""
    temperature = checks.column("temperature", transform.temperature, logits)
    softcap = None if transform.softcap is None else checks.number("softcap", transform.softcap)
    scale = checks.number("logit_scale", transform.logit_scale)
    if scale != 1.0:
        if softcap is not None:
            softcap = checks.number("softcap / logit_scale", softcap / scale)
        temperature = temperature / scale
        if isinstance(temperature, float):
            temperature = checks.number("temperature / logit_scale", temperature)
    # kernels multiply a tanh by softcap / temperature and by log2(e)
    if softcap is not None and isinstance(temperature, float) and softcap > 1e38 * temperature:
        raise ValueError(f"softcap / temperature must be at most 1e38, got {softcap} / {temperature}")
    return Transform(temperature, softcap)


def _shares(
    logits: Tensor | Origin, target_tokens: Tensor, weights: Tensor | float | None, ignore_index: int
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


# ---- Composed of torch operations ----


def _composed(
    objective: PerToken,
    logits: Tensor | Origin,
    target_tokens: Tensor,
    columns: Columns,
    sequences: Sequences,
    terms: PolicyTerms,
    transform: Transform,
    reduction: Reduction,
    how: How,
    sequence_ratio: bool | None = None,
) -> Result:
    """sequence_ratio: of a loss of sequences, whether its ratio is theirs; None: a loss of tokens."""
    logits, tokens = checks.logits_and_targets(logits, target_tokens)
    checks.backend(how.backend)
    checks.flags(how)
    checks.flag("kl_weighted_by_ratio", terms.kl_weighted_by_ratio)
    ignore_index = checks.index("ignore_index", reduction.ignore_index, target_tokens.dtype)
    if how.inplace and isinstance(logits, Origin):
        logits.overwritten()
    if how.inplace and stages.wants_gradient(_made_of(logits)):
        raise ValueError("inplace=True makes the gradient in forward; a loss in two phases makes it in backward")
    given = {**composition.of_tokens(columns, terms, reduction), "temperature": transform.temperature}
    brought = checks.columns(given, logits)
    _expecting(how, reduction, logits)  # which any upstream gradient is fine for
    checks.denominator(reduction.denominator, reduction.reduction, logits)
    if sequence_ratio is not None:
        check_sequences(sequences.cu_seqlens, target_tokens, "target_tokens")
    if sequences.sequence_ratio_mask is not None:
        mask = active_tokens(sequences.sequence_ratio_mask, target_tokens, "sequence_ratio_mask")
        sequences = sequences._replace(sequence_ratio_mask=mask)
    present = target_tokens != ignore_index
    columns = {"log_ratio_clamp": terms.log_ratio_clamp, **columns}
    if how.validate:
        checks.targets_in_range(tokens, logits.shape[-1], ignore_index)
        seen = composition.tokens_of(present, columns, sequences, reduction).seen()
        checks.values_in_range(brought, seen.reshape(-1))

    def read(tokens: Tensor | None, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        shown = target_tokens if tokens is None else target_tokens.masked_fill(~tokens, ignore_index)
        seen = logprobs(logits, shown, transform, ignore_index, False, how.backend, with_entropy)
        return seen if isinstance(seen, tuple) else (seen, None)

    return composition.composed(
        read,
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
