"""The checks of the suite against bugs that such kernels have had: each has to be found.

Bugs are seeded around the eager backend's functions, so that what is tested is how sharp ``cases.check`` is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import LOSSES, Case, assert_rounded_once, check, make, run
from torch import Tensor

from fused_losses.backends import eager

Function = Callable[..., object]


def upstream_ignored(scale: Function) -> Function:
    return lambda gradient, upstream: None


def tail_dropped(stats: Function) -> Function:
    def wrong(logits: Tensor, *args):
        return stats(torch.cat((logits[..., :-1], torch.full_like(logits[..., :1], -torch.inf)), -1), *args)

    return wrong


def upstream_of_the_first_token(grad: Function) -> Function:
    def wrong(logits, target, stats, coefficients, upstream, *args):
        return grad(logits, target, stats, coefficients, upstream[:1] if torch.is_tensor(upstream) else upstream, *args)

    return wrong


def temperature_missing_in_the_gradient(grad: Function) -> Function:
    def wrong(*args):
        grad(*args)
        temperature, gradient = args[5], args[-1]
        gradient.mul_(temperature)

    return wrong


def one_minus_p_in_bf16(grad: Function) -> Function:
    def wrong(logits, target, stats, coefficients, upstream, temperature, shares, softcap, gradient):
        p = torch.softmax(logits.float() / temperature, -1).bfloat16()
        grad(logits, target, stats, coefficients, upstream, temperature, shares, softcap, gradient)
        at = target.clamp(min=0)[:, None]
        gradient.scatter_(1, at, (coefficients[:, None] * (1 - p.gather(1, at))).to(gradient.dtype))

    return wrong


def true_class_forgotten(grad: Function) -> Function:
    def wrong(logits, target, *args):
        grad(logits, target, *args)
        args[-1].scatter_(1, target.clamp(min=0)[:, None], 0.0)

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
    def wrong(stats, target, name, inputs, *args):
        return objective(stats, target, name, (inputs[0], inputs[1].abs(), *inputs[2:]) if inputs else (), *args)

    return wrong


def masked_tokens_counted(objective: Function) -> Function:
    def wrong(stats, target, *args):
        loss, logp, coefficients = objective(stats, target, *args)
        share = (target != -100).sum() / target.numel()
        return (loss * share, logp, coefficients * share) if args[-4] else (loss, logp, coefficients)

    return wrong


def denominator_of_the_loss_alone(objective: Function) -> Function:
    def wrong(stats, target, name, inputs, weights, temperature, denominator, *args):
        loss, logp, coefficients = objective(stats, target, name, inputs, weights, temperature, denominator, *args)
        return loss, logp, coefficients * denominator

    return wrong


BUGS = {
    upstream_ignored: "scale",
    tail_dropped: "stats",
    upstream_of_the_first_token: "grad",
    temperature_missing_in_the_gradient: "grad",
    one_minus_p_in_bf16: "grad",
    true_class_forgotten: "grad",
    one_element_in_a_thousand_off: "grad",
    truncated_to_bf16: "grad",
    masked_rows_multiplied: "grad",
    sign_of_the_advantage_ignored: "objective",
    masked_tokens_counted: "objective",
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
    case.storage[2] = torch.nan  # the ignored token
    assert not run(case.public("eager"), case).gradient[2].any()


@pytest.mark.parametrize("bug", [None, *BUGS], ids=lambda bug: bug.__name__ if bug else "none")
def test_found(bug, monkeypatch):
    if bug is None:
        return suite()
    monkeypatch.setattr(eager, BUGS[bug], bug(getattr(eager, BUGS[bug])))
    with pytest.raises(AssertionError):
        suite()


def test_every_loss_is_told_apart():
    """Another loss's numbers do not pass for those of a loss."""
    for objective in LOSSES[1:]:
        case = make(objective, (7,), 31, reduction="sum")
        other = Case("cross_entropy", case.storage, case.target_tokens, {"reduction": "sum"})
        wrong, right = run(other.public("eager"), other), run(case.public("eager"), case)
        assert not torch.allclose(wrong.loss, right.loss) and not torch.allclose(wrong.gradient, right.gradient)
