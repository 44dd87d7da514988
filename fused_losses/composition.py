"""Losses whose objective is made of torch operations on the logprobs: of whole sequences, or the user's own.

Two phase: the logprobs, and the entropy if it is needed, come from one read of the logits; the objective works on N
numbers; its gradient by them goes back in one read and one write. What a token's loss holds beside the objective, and
the reduction, are those of the other losses. Nothing here knows where the logprobs come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .keywords import LOSSES, NEUTRAL, defaults
from .objectives import OBJECTIVES, Objective, constant, linear, log_ratio
from .once import once
from .outputs import Call, Outputs
from .problem import Column, PolicyTerms, Reduction, Sequences
from .sequences import segment_expand, segment_mean, segment_sum
from .terms import asked, kl, times

Columns = Mapping[str, Column | None]  # by name; None: a limit that is not in use


class Read(Protocol):
    def __call__(self, tokens: Tensor | None, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """(logprobs of the targets, entropy if asked for). tokens: those that are looked at; None: all."""


class Tokens(NamedTuple):
    """What an objective may look at beside the logprobs."""

    present: Tensor  # whose target is not ignored
    active: Tensor  # and whose weight is not 0
    columns: Columns
    sequences: Sequences

    def column(self, name: str, logp: Tensor) -> Tensor:
        """As a token's own loss has it. What an inactive one holds must not reach the others of its sequence: 0 * NaN
        is left in a mean's gradient."""
        return self.of_ratio(name, logp).masked_fill(~self.active, NEUTRAL.get(name, 0.0))

    def of_ratio(self, name: str, logp: Tensor) -> Tensor:
        """As the ratio has it, of which a token without a loss may be part."""
        value = self.columns.get(name)
        value = math.inf if value is None else value
        column = constant(value, logp).detach().to(logp.dtype).expand(logp.shape)
        return column.masked_fill(~self.seen(), NEUTRAL.get(name, 0.0))

    def of(self, objective: Objective, logp: Tensor) -> list[Tensor]:
        return [self.column(name, logp) for name in objective.columns]

    def in_ratio(self) -> Tensor:
        """The tokens that a sequence's ratio is made of."""
        mask = self.sequences.sequence_ratio_mask
        return self.active if mask is None else (mask != 0) & self.present

    def seen(self) -> Tensor:  # no property: Dynamo of torch 2.10 takes none of a tuple
        return self.active | self.in_ratio()


def tokens_of(present: Tensor, columns: Columns, sequences: Sequences, reduction: Reduction) -> Tokens:
    active = present if reduction.weights is None else present & (reduction.weights != 0)
    return Tokens(present, active, columns, sequences)


PerToken = Callable[[Tensor, Tokens], Tensor]  # logp -> the loss of each token, or one 0-d loss


# ---- The objectives ----


def gspo(logp: Tensor, tokens: Tokens) -> Tensor:
    return _of_sequence_ratio(OBJECTIVES["ppo"], logp, tokens)


def sapo(logp: Tensor, tokens: Tokens) -> Tensor:
    return _of_sequence_ratio(OBJECTIVES["sapo"], logp, tokens)


def _of_sequence_ratio(objective: Objective, logp: Tensor, tokens: Tokens) -> Tensor:
    """A token's objective, of its sequence's log ratio: as if that were logp, and old_logprobs 0."""
    _, *rest = tokens.of(objective, logp)
    return objective.formula(sequence_log_ratio(logp, tokens), torch.zeros_like(logp), *rest)[0]


def sequence_log_ratio(logp: Tensor, tokens: Tokens) -> Tensor:
    """log of the ratio of a token's sequence, with the gradient that ``ratio_gradient`` asks for.

    Not clamped: ``log_ratio_clamp`` clamps what the objective gets, the sequence's log ratio.
    """
    cu_seqlens, through_mean = tokens.sequences.cu_seqlens, tokens.sequences.ratio_gradient == "sequence"
    difference = (logp if through_mean else logp.detach()) - tokens.of_ratio("old_logprobs", logp)
    mean = segment_expand(segment_mean(difference, tokens.in_ratio(), cu_seqlens), logp, cu_seqlens)
    if through_mean:
        return mean
    here = logp.masked_fill(logp == -torch.inf, 0.0)  # inf - inf
    return mean + (here - here.detach())


def _clamped(logp: Tensor, old_logprobs: Tensor, clamp: Tensor) -> Tensor:
    """A token's log ratio. Of a clamp that makes no sense NaN: it is part of a sequence's."""
    return log_ratio(logp, old_logprobs, clamp)[0].masked_fill(~(clamp >= 0), torch.nan)


def gmpo(logp: Tensor, tokens: Tokens) -> Tensor:
    cu_seqlens = tokens.sequences.cu_seqlens
    of_cispo = OBJECTIVES["cispo"]  # it has the same columns
    old_logprobs, sign, low, high, clamp = (tokens.of_ratio(name, logp) for name in of_cispo.columns)
    clamped = _clamped(logp, old_logprobs, clamp)
    too_high = (sign > 0) & (clamped > high.log())
    too_low = (sign < 0) & (clamped < low.log())
    clamped = torch.where(too_high, high.log(), torch.where(too_low, low.log(), clamped))
    mean = segment_mean(clamped, tokens.in_ratio(), cu_seqlens)
    _, advantages, low, high, clamp = tokens.of(of_cispo, logp)
    # advantage 0: whatever the ratio is
    ratio = torch.exp(segment_expand(mean, logp, cu_seqlens).masked_fill(advantages == 0, 0.0))
    return torch.where((low >= 0) & (low <= high) & (clamp >= 0), -advantages * ratio, torch.nan)


def vespo(logp: Tensor, tokens: Tokens) -> Tensor:
    names = ("advantages", "k_positive", "k_negative", "lambda_positive", "lambda_negative", "log_ratio_clamp")
    advantages, *of_sign, clamp = (tokens.column(name, logp) for name in names)
    of_ratio = (tokens.of_ratio(name, logp) for name in ("old_logprobs", "log_ratio_clamp"))
    cu_seqlens = tokens.sequences.cu_seqlens
    k = torch.where(advantages < 0, of_sign[1], of_sign[0])
    rate = torch.where(advantages < 0, of_sign[3], of_sign[2])
    clamped = _clamped(logp.detach(), *of_ratio)
    log_w = segment_expand(segment_sum(clamped.where(tokens.in_ratio(), 0.0), cu_seqlens), logp, cu_seqlens)
    log_phi = times(k, log_w) - rate * torch.expm1(log_w)
    phi = torch.exp(log_phi.masked_fill(log_w == torch.inf, -torch.inf))  # inf - inf
    valid = (k >= 0) & (rate > 0) & (clamp >= 0) & ~torch.isnan(log_w)
    g = -torch.where(advantages == 0, 0.0, phi * advantages)
    return linear(g.masked_fill(~valid, torch.nan), logp)


class OfSequences(NamedTuple):
    objective: PerToken
    has_ratio: bool  # the loss's ratio is that of a token's sequence: KL is weighted by it, metrics are made of it


OF_SEQUENCES = {
    "gspo": OfSequences(gspo, has_ratio=True),
    "gmpo": OfSequences(gmpo, has_ratio=False),
    "sapo": OfSequences(sapo, has_ratio=True),
    "vespo": OfSequences(vespo, has_ratio=False),
}


def of_function(function: Callable[..., Any], inputs: tuple[Any, ...]) -> PerToken:
    """A user's function of the logprobs and of ``inputs`` as they are."""

    def objective(logp: Tensor, tokens: Tokens) -> Tensor:
        loss = function(logp, *inputs)
        if not isinstance(loss, Tensor) or loss.shape not in (logp.shape, ()):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"objective must return a tensor of shape {tuple(logp.shape)} or (), got {got}")
        return loss

    return objective


def of_objective(objective: Objective) -> PerToken:
    return lambda logp, tokens: objective.formula(logp, *tokens.of(objective, logp))[0]


class Named(NamedTuple):
    """What a call of policy_loss asks for."""

    objective: Objective | None  # None for a function
    columns: dict[str, Any]  # the objective's, by name
    terms: PolicyTerms  # with the clamp that a column of that name has


def named(objective: str | Objective | Callable[..., Tensor], inputs: tuple[Any, ...], terms: PolicyTerms) -> Named:
    given: dict[str, Any] = {}
    positional: tuple[str, ...] = ()
    if isinstance(objective, str):
        names = tuple(name for name, ours in OBJECTIVES.items() if ours.columns)
        if objective not in names:
            raise ValueError(f"objective must be a function, an Objective or one of {names}, got {objective!r}")
        given = {key: value for key, value in defaults(objective).items() if key in OBJECTIVES[objective].columns}
        objective = OBJECTIVES[objective]
        positional = tuple(key for key in objective.columns if key != "log_ratio_clamp")  # as the loss itself has them
    elif isinstance(objective, Objective):
        if OBJECTIVES.get(objective.name, objective) != objective:
            raise ValueError(f"objective: {objective.name!r} is one of ours; choose another name")
        taken = sorted((set(LOSSES["policy_loss"].keywords) - {"log_ratio_clamp"}).intersection(objective.columns))
        if taken:
            raise ValueError(f"objective: its inputs can't be called {taken}, which are arguments of policy_loss")
    elif callable(objective):
        # a function's first input is what KL is weighted by
        return Named(None, {"old_logprobs": inputs[0]} if inputs and terms.kl_weighted_by_ratio else {}, terms)
    else:
        raise TypeError(f"objective must be a function, an Objective or a name, got {type(objective).__name__}")

    name, columns = objective.name, positional or objective.columns
    if len(inputs) > len(columns):
        raise ValueError(f"{name} takes the inputs {columns}, got {len(inputs)} inputs")
    given = dict.fromkeys(objective.limits) | given | dict(zip(columns, inputs, strict=False))
    missing = [key for key in columns if key not in given]
    if missing:
        raise ValueError(f"{name} takes the inputs {columns}, got none for {missing}")
    if terms.kl_weighted_by_ratio and columns[:1] != ("old_logprobs",):
        raise ValueError(f"kl_weighted_by_ratio needs old_logprobs as the first input, {name} has {columns}")
    if terms.log_ratio_clamp is None:
        terms = terms._replace(log_ratio_clamp=given.get("log_ratio_clamp"))
    elif "log_ratio_clamp" in given:
        given["log_ratio_clamp"] = terms.log_ratio_clamp
    return Named(objective, given, terms)


# ---- The composition ----


def of_tokens(columns: Columns, terms: PolicyTerms, reduction: Reduction) -> dict[str, Column | None]:
    """All that a call gives per token, by name."""
    return {
        **columns,
        "weights": reduction.weights,
        "log_ratio_clamp": terms.log_ratio_clamp,
        "importance_weights": terms.importance_weights,
        "entropy_coef": terms.entropy_coef,
        "ref_logprobs": terms.ref_logprobs,
        "kl_coef": terms.kl_coef,
    }


def composed(
    read: Read,
    objective: PerToken,
    present: Tensor,
    columns: Columns,
    sequences: Sequences,
    terms: PolicyTerms,
    reduction: Reduction,
    *,
    sequence_ratio: bool,
    return_outputs: bool,
    derivatives_by_hand: bool,
) -> Tensor | tuple[Tensor, Outputs]:
    """The loss, from the logprobs and the entropy that ``read`` gives.

    present: bool, the tokens whose target is not ignored. columns: the objective's.
    sequence_ratio: whether the loss's ratio is that of a token's sequence.
    derivatives_by_hand: of the KL, as the kernels have them; else those of autograd, for the reference.
    """
    wanted = asked(terms)
    if wanted.kl and terms.kl_weighted_by_ratio and columns.get("old_logprobs") is None:
        raise ValueError("kl_weighted_by_ratio needs old_logprobs, the first input of the objective; got no input")
    tokens = tokens_of(present, columns, sequences, reduction)
    active, seen = tokens.active, tokens.seen()
    logp, entropy = read(None if return_outputs else seen, wanted.entropy)

    def masked(name: str, value: Column) -> Tensor:
        column = constant(value, logp).detach().to(logp.dtype).expand(logp.shape)
        return column.masked_fill(~active, NEUTRAL.get(name, 0.0))

    # Not one function with overloads: Dynamo traces this, and torch 2.11's on Python 3.12 stops at typing.overload.
    def masked_if_given(name: str, value: Column | None) -> Tensor | None:
        return None if value is None else masked(name, value)

    terms = terms._replace(
        log_ratio_clamp=masked_if_given("log_ratio_clamp", terms.log_ratio_clamp),
        importance_weights=masked_if_given("importance_weights", terms.importance_weights),
        entropy_coef=masked("entropy_coef", terms.entropy_coef) if wanted.entropy else 0.0,
        ref_logprobs=masked_if_given("ref_logprobs", terms.ref_logprobs),
        kl_coef=masked("kl_coef", terms.kl_coef) if wanted.kl else 0.0,
    )
    value = objective(torch.where(seen, logp, 0.0), tokens)
    whole_batch = value.dim() == 0 and logp.dim() > 0
    if whole_batch and reduction.reduction == "none":
        raise ValueError('reduction="none" needs an objective per token, got one that returns a 0-d loss')
    if whole_batch and terms.importance_weights is not None:
        raise ValueError("importance_weights need an objective per token, got one that returns a 0-d loss")
    x = torch.where(active, logp, 0.0)
    per_token = torch.zeros_like(logp)
    if not whole_batch:
        per_token = times(1.0 if terms.importance_weights is None else terms.importance_weights, value)
        per_token = per_token + torch.where(torch.isnan(x), x, 0.0)  # a bad row's loss, whatever took it out
    if wanted.entropy and entropy is not None:
        per_token = per_token - times(terms.entropy_coef, torch.where(active, entropy, 0.0))
    if wanted.kl:
        log_r = None
        if terms.kl_weighted_by_ratio:
            if sequence_ratio:
                log_r = sequence_log_ratio(torch.where(seen, logp, 0.0), tokens)
            else:
                log_r = x - tokens.column("old_logprobs", x)
        through_mean = sequence_ratio and sequences.ratio_gradient == "sequence"
        per_token = per_token + _penalty(x, log_r, through_mean, terms, derivatives_by_hand)
    weights = masked("weights", 1.0 if reduction.weights is None else reduction.weights)
    loss = reduced(torch.where(active, weights * per_token, 0.0), weights, reduction)
    if whole_batch:
        loss = loss + value
    if not return_outputs:
        return loss
    of_sequence = sequence_log_ratio(torch.where(seen, logp.detach(), 0.0), tokens) if sequence_ratio else None
    call = Call(present, reduction.weights, columns, of_sequence)
    return loss, Outputs(logp.detach(), None if entropy is None else entropy.detach(), call)


class WithDerivative(torch.autograd.Function):
    """apply(x, value, derivative) -> value, whose derivative by x is given and not that of how it was made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return torch.where(upstream == 0, 0.0, upstream * derivative), None, None


def _penalty(x: Tensor, log_r: Tensor | None, through_mean: bool, terms: PolicyTerms, by_hand: bool) -> Tensor:
    """kl_coef * KL per token, times the ratio if ``log_r`` is given. by_hand: with derivatives formed by hand, as the
    kernels have them; else with those of autograd, for the reference."""
    coefficient = terms.kl_coef
    assert terms.ref_logprobs is not None
    value, slope, both = kl(x, terms.ref_logprobs, terms.kl_type)
    flows = None
    if log_r is not None:
        clamp = constant(math.inf if terms.log_ratio_clamp is None else terms.log_ratio_clamp, x)
        clamped, flows = log_ratio(log_r, torch.zeros_like(x), clamp)
        # where the coefficient is 0 the term is out, and an infinite ratio's derivative with it
        ratio = torch.exp(clamped.masked_fill(constant(coefficient, x) == 0, 0.0))
        value = times(ratio, value)
        slope = times(ratio, slope if through_mean else torch.where(flows, both, slope))
    value = times(coefficient, value)
    if not by_hand:
        return value
    value, slope = value.detach(), times(coefficient, slope).detach()
    penalty = WithDerivative.apply(x, value, slope)
    if log_r is not None and flows is not None and through_mean:
        penalty = penalty + WithDerivative.apply(log_r, torch.zeros_like(value), value.where(flows, 0.0))
    return penalty


def in_order(x: Tensor) -> Tensor:
    """The sum, in float64 and in an order that no number of threads changes: torch shares one sum among them, but not
    one of many."""
    together, dtype = 1024, x.dtype
    x = x.flatten()
    if x.shape[0] > together:
        x = torch.nn.functional.pad(x, (0, -x.shape[0] % together)).view(-1, together).sum(1, dtype=torch.float64)
    return x.sum(dtype=torch.float64).to(dtype)


def reduced(losses: Tensor, weights: Tensor, reduction: Reduction) -> Tensor:
    """``weights`` are 0 for inactive tokens; the losses are multiplied by them."""
    if reduction.reduction == "none":
        return losses
    total = in_order(losses)
    denominator = reduction.denominator
    if denominator is None:
        denominator = in_order(weights) if reduction.reduction == "mean" else 1.0
    divisor = constant(denominator, total).detach().to(total.dtype)
    nothing = (total == 0) & (divisor == 0)  # no active token: 0 and connected to the graph, not 0 / 0
    return total / divisor.masked_fill(nothing, 1.0)
