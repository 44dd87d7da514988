"""The stages in plain torch, on any device: the definition that the other backends reproduce, and the last resort."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import Objective, constant
from ..problem import Coefficients, Column, Problem, Stats, Targets, Transform
from ..terms import Seen, row_loss, times

_FLOAT_MIN, _FLOAT_MAX = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
_LOWEST = -1000.0  # of z_j - z_max where it meets e_j, which is 0 there: 0 * -inf is NaN


class Softmax(NamedTuple):
    """A row's softmax, its single target kept apart from the rest: nothing cancels however sure the row is."""

    lead: Tensor  # z_max - the largest z of the others
    targets: Tensor  # (K, N): z_t - z_max
    total: Tensor  # sum_j e^d_j, d_j = z_j - z_max
    log_total: Tensor
    mean: Tensor  # sum_j p_j d_j, where the entropy is asked for
    p: Tensor  # (K, N), of the targets
    others: Tensor  # (K, N): 1 - p

    @property
    def logprobs(self) -> Tensor:
        return self.targets - self.log_total

    def log_sum_squares(self, squares: Tensor) -> Tensor:
        """log sum_j p_j^2 of a row with a single target. squares: of the others, relative to the largest of these."""
        # what underflows is nothing beside rest, of which it is the square or less
        others, own = torch.exp(-2 * self.lead) * squares, torch.exp(2 * self.targets[0])
        log = torch.where(own == 1, torch.log1p(others), torch.log(others + own))
        return log - 2 * self.log_total


class Eager:
    looks_at_targets = False

    def unusable(self, device: torch.device) -> str | None:
        return None

    def runs(self, objective: Objective) -> bool:
        return True

    def normaliser(self, problem: Problem) -> Tensor:
        """0-d float64: what a mean divides by."""
        active = active_rows(problem)
        weights = constant(problem.weights, problem.targets.tokens.new_empty(0, dtype=torch.float32))
        return weights.expand_as(active).where(active, 0.0).double().sum()

    def loss_and_grad(self, logits: Tensor, problem: Problem, gradient: Tensor) -> tuple[Tensor, Tensor]:
        stats = self.stats(logits, problem)
        loss, logprobs, coefficients = self.objective(stats, problem, True)
        self.grad(logits, problem.targets, problem.transform, stats, coefficients, 1.0, gradient)
        return loss, logprobs

    def stats(self, logits: Tensor, problem: Problem) -> Stats:
        x = _wide(logits.reshape(-1, logits.shape[-1]))
        targets, terms = _matrix(problem.targets), problem.terms
        outside = (targets < 0) | (targets >= x.shape[1])
        inside = targets.masked_fill(outside, 0).long()
        target = x.gather(1, inside).masked_fill(outside, torch.nan)
        single = targets.shape[1] == 1
        # a target that is elsewhere leaves nothing out
        at = targets.long().masked_fill(outside, x.shape[1])
        nothing = torch.full_like(target, -torch.inf)
        others = _with_targets(x, at, nothing) if single else x
        maximum = others.amax(-1).clamp(min=_FLOAT_MIN)
        if single:  # where the target has all the mass: (finite - -FLT_MAX) / T would overflow
            maximum = maximum.where((others > -torch.inf).any(-1) | outside[:, 0], target[:, 0])
        unit = _inverse_temperature(problem.transform, maximum)[:, None]
        top = _capped(maximum, problem.transform)[:, None]
        z = _capped(x, problem.transform)
        distance = (z - top) * unit
        # the target again, as a softcap makes -inf finite
        shown = _with_targets(distance, at, nothing) if single else distance
        e = torch.exp(shown)
        rows = [maximum, _row_sums(e), *target.unbind(1)]
        if not problem.plain:
            zero = torch.zeros_like(maximum)
            rows.append(_row_sums(e * shown.clamp(min=_LOWEST)) if terms.entropy else zero)
            if terms.statistics:  # finite over others that are masked by -FLT_MAX
                distance = distance.clamp(max=_FLOAT_MAX)
            rows.append(_row_sums(distance) if terms.label_smoothing != 0 or terms.statistics else zero)
        if terms.statistics:
            first = x.argmax(-1) == targets[:, 0]  # of equal ones, the first
            rows += [_row_sums(e * e), (first & (target[:, 0] > -torch.inf)).to(x.dtype)]
        read = rows_to_read(problem)
        return Stats(torch.stack([row.where(read, 0.0) for row in rows]), terms.statistics)

    def objective(self, stats: Stats, problem: Problem, reduce: bool) -> tuple[Tensor, Tensor, Coefficients]:
        terms, transform, objective = problem.terms, problem.transform, problem.objective
        like = stats.maximum
        entropy_asked = not problem.plain and terms.entropy
        softmax = _softmax(stats, problem.targets, transform, entropy_asked)
        read, active = rows_to_read(problem), active_rows(problem)
        tokens = _matrix(problem.targets).T
        given = tokens != problem.targets.ignore_index
        logp = softmax.logprobs.where(given & read, 0.0)
        inputs = [_column(c, like) for c in problem.inputs]
        weights = _column(problem.weights, like)
        denominator = _column(self.normaliser(problem) if problem.denominator is None else problem.denominator, like)
        if problem.plain:
            logprobs = logp[0]
            losses, g = objective.formula(logprobs, *inputs)
            derivatives = _column(g, like).expand_as(like)[None]
        else:
            zero = torch.zeros_like(like)
            entropy = (softmax.log_total - softmax.mean).where(read, 0.0) if entropy_asked else zero
            rows = [*logp, entropy]
            # not maximum + lead, which loses the target over others that are masked by -FLT_MAX
            largest = stats.targets[0].where(softmax.lead > 0, stats.maximum)
            unit = _inverse_temperature(transform, like)
            lse = _capped(largest, transform) * unit
            spread = softmax.log_total + softmax.lead - stats.drift / problem.vocab
            if terms.statistics:
                mean_logit = _capped(stats.maximum, transform) * unit + stats.drift / problem.vocab
                failed = torch.isnan(logp[0])
                log_sum_squares = softmax.log_sum_squares(stats.squares)
                rows += [log_sum_squares, mean_logit.masked_fill(failed, torch.nan), stats.top1.where(~failed, 0.0)]
            logprobs = torch.stack([row.where(read, 0.0) for row in rows])
            whole: Tensor | float = 1.0
            x = logp[0]
            if problem.targets.shares is not None:
                shares = problem.targets.shares.T.to(like.dtype)
                x = (shares * logp).where(shares != 0, 0.0).sum(0)
                whole = shares.sum(0)
            seen = Seen(x, lse + softmax.log_total, entropy, spread, whole)
            terms = terms._replace(
                importance_weights=_column(terms.importance_weights, like),
                ref_logprobs=_column(terms.ref_logprobs, like),
                kl_coef=_column(terms.kl_coef, like),
                entropy_coef=_column(terms.entropy_coef, like),
                log_ratio_clamp=_column(terms.log_ratio_clamp, like),
            )
            losses, *by, s = row_loss(objective.formula, seen, inputs, terms)
            derivatives = torch.stack([d.expand_as(like) for d in (*by, s / problem.vocab)])
            derivatives = torch.where(torch.isnan(x), torch.nan, derivatives)
        losses = (weights * losses).where(active, 0.0)
        # a derivative of 0 (a clipped token) must survive an infinite weight / denominator
        coefficients = (derivatives * (weights / denominator)).where(active & (derivatives != 0), 0.0)
        if not reduce:
            return losses, logprobs, Coefficients(coefficients)
        total = losses.double().sum()
        nothing = (total == 0) & (denominator == 0)  # no active token: 0, not 0 / 0
        return (total / denominator).masked_fill(nothing, 0.0).to(like.dtype), logprobs, Coefficients(coefficients)

    def grad(
        self,
        logits: Tensor,
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Column,
        gradient: Tensor,
    ) -> None:
        x = _wide(logits.reshape(-1, logits.shape[-1]))
        vocab = x.shape[1]
        tokens = _matrix(targets)
        outside = (tokens < 0) | (tokens >= vocab)
        shares = torch.ones_like(tokens, dtype=x.dtype) if targets.shares is None else targets.shares.to(x.dtype)
        counts = shares != 0
        # what has no element of its own goes to a column beside the vocabulary
        at = tokens.where(counts & ~outside, vocab).long()
        whole = shares.sum(1, keepdim=True)
        by = times(upstream, coefficients.table)
        softmax = _softmax(stats, targets, transform, not coefficients.plain)
        unit = _inverse_temperature(transform, stats.maximum)[:, None]
        top = _capped(stats.maximum, transform)[:, None]
        distance = (_capped(x, transform) - top) * unit - softmax.lead[:, None]
        distance = _with_targets(distance, at, softmax.targets.T)
        p = _with_targets(torch.exp(distance) / softmax.total[:, None], at, softmax.p.T)
        # share - whole p; where p is near 1 and the target has the whole, made of 1 - p
        share = x.new_zeros(x.shape[0], vocab + 1).scatter_add(1, at, shares).gather(1, at)
        drawn = ((share - whole) + whole * softmax.others.T).where(softmax.p.T >= 0.5, share - whole * softmax.p.T)
        drawn = _with_targets(-whole * p, at, drawn)
        if coefficients.plain:
            rows = by[0][:, None] * drawn
        else:
            g, h, zeta, s = (row[:, None] for row in by)
            rows = g * drawn + p * (zeta - h * (distance.clamp(min=_LOWEST) - softmax.mean[:, None])) + s
        slope = unit
        if transform.softcap is not None:
            e = torch.exp(-2 * (x / transform.softcap).abs())
            slope = slope * (4 * e / (1 + e) ** 2)  # not 1 - tanh^2, of which nothing is left far out
        # a target that is nowhere, whose logit is NaN; one that another part of the vocabulary has is none
        nowhere = (stats.targets.T.isnan() & counts).any(1, keepdim=True)
        rows = (rows * slope).masked_fill(nowhere, torch.nan)
        gradient.copy_(rows.where((by != 0).any(0)[:, None], 0.0).view(gradient.shape))

    def scale(self, gradient: Tensor, upstream: Tensor) -> None:
        zero = gradient == 0  # a masked token's gradient stays 0 for an infinite scale, too
        gradient.mul_(upstream).masked_fill_(zero, 0.0)


BACKEND = Eager()


def _softmax(stats: Stats, targets: Targets, transform: Transform, with_mean: bool) -> Softmax:
    unit, top = _inverse_temperature(transform, stats.maximum), _capped(stats.maximum, transform)
    distance = (_capped(stats.targets, transform) - top) * unit
    moment = stats.moment if with_mean else torch.zeros_like(top)
    if targets.num > 1:
        logp = distance - stats.sum.log()
        mean = moment / stats.sum
        return Softmax(torch.zeros_like(top), distance, stats.sum, stats.sum.log(), mean, logp.exp(), -logp.expm1())
    # over others that are masked by -FLT_MAX the distance of a finite target may overflow
    finite = distance[0].clamp(max=_FLOAT_MAX).where(stats.targets[0] < torch.inf, distance[0])
    lead = finite.clamp(min=0)
    behind = finite - lead
    half = torch.exp(-0.5 * lead)  # twice: only the product may underflow
    rest, own = half * (half * stats.sum), torch.exp(behind)
    moment = times(half, half * (moment - times(lead, stats.sum))) + own * behind.clamp(min=_LOWEST)
    total = rest + own
    log_total = torch.where(own == 1, torch.log1p(rest), torch.log(total))
    return Softmax(lead, behind[None], total, log_total, moment / total, (own / total)[None], (rest / total)[None])


def _wide(logits: Tensor) -> Tensor:
    """In the precision of all that follows: float32, or float64 where the logits are."""
    return logits if logits.dtype is torch.float64 else logits.float()


def _column(column: Column, like: Tensor) -> Tensor:
    return constant(column, like).to(like.dtype)


def _with_targets(rows: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """``rows`` with the elements ``at`` replaced; those beside the vocabulary are dropped."""
    return torch.nn.functional.pad(rows, (0, 1)).scatter(1, at, values)[:, :-1]


def _matrix(targets: Targets) -> Tensor:
    """(N, K)"""
    return targets.tokens if targets.shares is not None else targets.tokens[:, None]


def active_rows(problem: Problem) -> Tensor:
    given = (_matrix(problem.targets) != problem.targets.ignore_index).any(1)
    return given & _is_nonzero(problem.weights, given)


def rows_to_read(problem: Problem) -> Tensor:
    """Tokens of weight 0 are read only for their logprob, ignored ones never."""
    if not problem.all_logprobs:
        return active_rows(problem)
    return (_matrix(problem.targets) != problem.targets.ignore_index).any(1)


def _capped(x: Tensor, transform: Transform) -> Tensor:
    return x if transform.softcap is None else transform.softcap * torch.tanh(x / transform.softcap)


def _inverse_temperature(transform: Transform, like: Tensor) -> Tensor:
    t = _column(transform.temperature, like)
    return torch.where(t > 0, 1 / t, torch.nan).expand_as(like)


def _is_nonzero(column: Column, like: Tensor) -> Tensor:
    if not isinstance(column, Tensor):
        column = torch.full((), column, dtype=torch.float32, device=like.device)
    return (column != 0).expand_as(like)


def _row_sums(x: Tensor) -> Tensor:
    """A row alone as one of two: torch would share its sum among threads, in another order than in a batch."""
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)
