"""The checks of the suite against bugs that such kernels have had: each has to be found.

Bugs are seeded around the eager backend's functions, so that what is tested is how sharp ``cases.check`` is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_statistics
import torch
from cases import LOSSES, Case, assert_rounded_once, assert_sure_target, check, make, run
from torch import Tensor

from fused_losses.backends.eager import BACKEND, Eager
from fused_losses.problem import Coefficients, Problem, Stats

Function = Callable[..., object]


def upstream_ignored(scale: Function) -> Function:
    return lambda gradient, upstream: None


def tail_dropped(stats: Function) -> Function:
    def wrong(logits: Tensor, problem: Problem) -> Stats:
        return stats(torch.cat((logits[..., :-1], torch.full_like(logits[..., :1], -torch.inf)), -1), problem)

    return wrong


def target_not_left_out(stats: Function) -> Function:
    """As sums over the whole row were: 1 - p is then a difference."""

    def wrong(logits: Tensor, problem: Problem) -> Stats:
        table = stats(logits, problem).table.clone()
        maximum = torch.maximum(table[0], table[2])
        table[1] = table[1] * (table[0] - maximum).exp() + (table[2] - maximum).exp()
        table[1] -= (table[2] - maximum).exp()
        table[0] = maximum
        return Stats(table)

    return wrong


def upstream_of_the_first_token(grad: Function) -> Function:
    def wrong(logits, targets, transform, stats, coefficients, upstream, gradient):
        upstream = upstream[:1] if torch.is_tensor(upstream) else upstream
        return grad(logits, targets, transform, stats, coefficients, upstream, gradient)

    return wrong


def temperature_missing_in_the_gradient(grad: Function) -> Function:
    def wrong(logits, targets, transform, stats, coefficients, upstream, gradient):
        grad(logits, targets, transform, stats, coefficients, upstream, gradient)
        gradient.mul_(transform.temperature)

    return wrong


def one_minus_p_in_bf16(grad: Function) -> Function:
    def wrong(logits, targets, transform, stats, coefficients, upstream, gradient):
        p = torch.softmax(logits.float() / transform.temperature, -1).bfloat16()
        grad(logits, targets, transform, stats, coefficients, upstream, gradient)
        at = targets.tokens.clamp(min=0)[:, None]
        gradient.scatter_(1, at, (coefficients.table.T * (1 - p.gather(1, at))).to(gradient.dtype))

    return wrong


def true_class_forgotten(grad: Function) -> Function:
    def wrong(logits, targets, *args):
        grad(logits, targets, *args)
        args[-1].scatter_(1, targets.tokens.clamp(min=0)[:, None], 0.0)

    return wrong


def one_element_in_a_thousand_off(grad: Function) -> Function:
    def wrong(*args):
        grad(*args)
        args[-1][..., 77] *= 1.02

    return wrong


def truncated_to_bf16(grad: Function) -> Function:
    """What Triton's interpreter does unless it is patched."""

    def wrong(*args):
        gradient = args[-1]
        if gradient.dtype != torch.bfloat16:
            return grad(*args)
        exact = torch.empty_like(gradient, dtype=torch.float32)
        grad(*args[:-1], exact)
        gradient.copy_((exact.view(torch.int32) & -65536).view(torch.float32))

    return wrong


def masked_rows_multiplied(grad: Function) -> Function:
    def wrong(logits, *args):
        grad(logits, *args)
        args[-1].add_(0 * logits)

    return wrong


def sign_of_the_advantage_ignored(objective: Function) -> Function:
    def wrong(stats: Stats, problem: Problem, reduce: bool):
        names = problem.objective.columns
        pairs = zip(names, problem.inputs, strict=True)
        inputs = tuple(value.abs() if name == "advantages" else value for name, value in pairs)
        return objective(stats, problem._replace(inputs=inputs), reduce)

    return wrong


def masked_tokens_counted(normaliser: Function) -> Function:
    def wrong(problem: Problem) -> Tensor:
        return torch.tensor(float(problem.n))

    return wrong


def denominator_of_the_loss_alone(objective: Function) -> Function:
    def wrong(stats: Stats, problem: Problem, reduce: bool):
        loss, logprobs, coefficients = objective(stats, problem, reduce)
        divisor = BACKEND.normaliser(problem) if problem.denominator is None else problem.denominator
        return loss, logprobs, Coefficients(coefficients.table * divisor)

    return wrong


def rows_of_statistics(change: Callable[[Tensor, Problem, Tensor], None]) -> Callable[[Function], Function]:
    """A bug in squares or top1, the last two rows of the table."""

    def bug(stats: Function) -> Function:
        def wrong(logits: Tensor, problem: Problem) -> Stats:
            seen = stats(logits, problem)
            change(seen.table, problem, logits)
            return seen

        return wrong

    bug.__name__ = change.__name__
    return bug


@rows_of_statistics
def target_in_the_squares(table: Tensor, problem: Problem, logits: Tensor) -> None:
    table[-2] += torch.exp(2 * (table[2] - table[0]).clamp(max=0) / problem.transform.temperature)


@rows_of_statistics
def squares_of_another_maximum(table: Tensor, problem: Problem, logits: Tensor) -> None:
    table[-2] *= torch.exp(table[0] - logits.float().amax(-1))


@rows_of_statistics
def a_tie_is_enough(table: Tensor, problem: Problem, logits: Tensor) -> None:
    table[-1] = (table[2] >= table[0]).float()


@rows_of_statistics
def every_tie_lost(table: Tensor, problem: Problem, logits: Tensor) -> None:
    table[-1] = (table[2] > table[0]).float()


@rows_of_statistics
def target_left_out_of_the_drift(table: Tensor, problem: Problem, logits: Tensor) -> None:
    table[-3] -= (table[2] - table[0]) / problem.transform.temperature


@rows_of_statistics
def drift_of_the_logits(table: Tensor, problem: Problem, logits: Tensor) -> None:
    table[-3] *= problem.transform.temperature


BUGS_OF_STATISTICS = (
    target_in_the_squares,
    squares_of_another_maximum,
    a_tie_is_enough,
    every_tie_lost,
    target_left_out_of_the_drift,
    drift_of_the_logits,
)
BUGS = {
    upstream_ignored: "scale",
    tail_dropped: "stats",
    target_not_left_out: "stats",
    upstream_of_the_first_token: "grad",
    temperature_missing_in_the_gradient: "grad",
    one_minus_p_in_bf16: "grad",
    true_class_forgotten: "grad",
    one_element_in_a_thousand_off: "grad",
    truncated_to_bf16: "grad",
    masked_rows_multiplied: "grad",
    sign_of_the_advantage_ignored: "objective",
    masked_tokens_counted: "normaliser",
    denominator_of_the_loss_alone: "objective",
}


def suite() -> None:
    """A few cases of the suite."""
    for objective in ("cross_entropy", "ppo"):
        for dtype in (torch.float32, torch.bfloat16):
            case = make(objective, (7,), 129, dtype)
            check(case, "eager")
            check(case, "eager", temperature=0.5, denominator=3.0, reduction="sum", recompute=True)
            if dtype == torch.bfloat16:
                assert_rounded_once(case, "eager")
            check(case, "eager", upstream=torch.linspace(-1, 2, 7), reduction="none")
    case = make("cross_entropy", (5,), 31)
    check(case, "eager", upstream=2.0)
    assert_sure_target(case, "eager")
    case.storage[2] = torch.nan  # the ignored token
    assert not run(case.public("eager"), case).gradient[2].any()


@pytest.mark.parametrize("bug", [None, *BUGS], ids=lambda bug: bug.__name__ if bug else "none")
def test_found(bug, monkeypatch):
    if bug is None:
        return suite()
    monkeypatch.setattr(Eager, BUGS[bug], staticmethod(bug(getattr(BACKEND, BUGS[bug]))))
    with pytest.raises(AssertionError):
        suite()


def suite_of_statistics() -> None:
    case = make("logprobs", (7,), 31, ignored=False)
    case.target_tokens[0] = case.logits[0].argmax()
    test_statistics.assert_statistics(case.logits, case.target_tokens, "eager", temperature=0.7)
    test_statistics.test_of_equal_logits_the_first_is_the_largest("eager", torch.device("cpu"), torch.float32, 33)


@pytest.mark.parametrize("bug", [None, *BUGS_OF_STATISTICS], ids=lambda bug: bug.__name__ if bug else "none")
def test_found_in_statistics(bug, monkeypatch):
    if bug is None:
        return suite_of_statistics()
    monkeypatch.setattr(Eager, "stats", staticmethod(bug(BACKEND.stats)))
    with pytest.raises(AssertionError):
        suite_of_statistics()


def test_every_loss_is_told_apart():
    """Another loss's numbers do not pass for those of a loss."""
    for objective in LOSSES[1:]:
        case = make(objective, (7,), 31, reduction="sum")
        other = Case("cross_entropy", case.storage, case.target_tokens, {"reduction": "sum"})
        wrong, right = run(other.public("eager"), other), run(case.public("eager"), case)
        assert not torch.allclose(wrong.loss, right.loss) and not torch.allclose(wrong.gradient, right.gradient)
