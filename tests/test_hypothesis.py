"""Shapes and hazards that nobody thought of, against the float32 reference. The same examples on every run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import EPS, LOSSES, MODES, OBJECTIVES, Case, inputs_of, run
from conftest import device_of, require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan

LOGIT = st.one_of(st.floats(-20, 20, width=32), st.sampled_from([-INF, -INF, INF, NAN, 0.0, 1e4, -1e30]))
VALUES = {
    "old_logprobs": st.one_of(st.floats(-20, 0, width=32), st.sampled_from([-INF, INF, NAN, -1e4, 90.0, 0.0])),
    "advantages": st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, -0.0, 1e30, -1e30, NAN])),
    "beta": st.floats(0, 2, width=32),
}
UNSURE = 64 * torch.finfo(torch.float64).eps  # 1 - p of a sure target by the reference, which takes a difference
WEIGHT = st.sampled_from([0.0, 0.0, 1.0, 0.5, -2.0, 1e-3])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, vocab = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    objective = OBJECTIVES[draw(st.sampled_from(LOSSES))]

    def column(values: st.SearchStrategy[float], size: int = n) -> torch.Tensor:
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float32)

    logits = column(LOGIT, n * vocab).view(n, vocab)
    if draw(st.booleans()):
        logits = logits.nan_to_num(0.0, 0.0, -9.0)  # hazards in the inputs alone
    target = draw(st.lists(st.sampled_from([*range(vocab), -100]), min_size=n, max_size=n))
    keywords: dict[str, Any] = {name: column(VALUES.get(name, st.floats(0, 2, width=32))) for name in objective.inputs}
    for name in objective.bounds:
        if draw(st.booleans()):
            low_high = {"clip_low_threshold": 0.7, "clip_high_threshold": 0.81}
            keywords[name] = torch.full((n,), low_high.get(name, 0.3))
    if draw(st.booleans()):
        keywords["weights"] = column(WEIGHT)
    if draw(st.booleans()):
        keywords["temperature"] = draw(st.sampled_from([0.25, 1.0, 2.0]))
    keywords |= MODES[draw(st.sampled_from(sorted(MODES)))]
    if keywords.get("reduction") != "none":
        keywords["reduction"] = draw(st.sampled_from(["mean", "sum"]))
    return Case(objective.name, logits, torch.tensor(target, dtype=torch.int64), keywords)


def on_a_kink(case: Case) -> bool:
    """Some ratio is within rounding of a clip bound, of overflow or of underflow: either side of it is right."""
    o = OBJECTIVES[case.objective]
    if "old_logprobs" not in o.inputs:
        return False
    inputs = dict(zip(o.columns, inputs_of(case), strict=True))
    x = run(case.reference, case, torch.float64).logprobs
    log_ratio = x - inputs["old_logprobs"]
    kinks = [inputs[name].log() for name in o.bounds if name.startswith("clip")]
    kinks += [torch.full_like(x, k) for k in (88.72, -87.33, -103.3)]
    return any(((log_ratio - kink).abs() < 1e-4 * (1 + x.abs())).any().item() for kink in kinks)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor | float) -> None:
    same = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= tolerance)
    assert same.all(), (got, want)


def finite(value: torch.Tensor) -> torch.Tensor:
    return value.abs().nan_to_num(0.0, 0.0, 0.0)


@pytest.mark.parametrize("name, examples", [("eager", 150), ("cpu", 300), ("triton", 25), ("cuda", 300)])
def test_any(name, examples):
    require(name)
    device = device_of(name)

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases())
    def check(case: Case) -> None:
        if on_a_kink(case):
            return
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.keywords.items()}
        case = Case(case.objective, case.storage.to(device), case.target_tokens.to(device), moved)
        got, want = run(case.public(name), case), run(case.reference, case)
        # float32 eager has no digit left where a target is sure; float64 overflows elsewhere
        exact = run(case.reference, case, torch.float64)
        x = finite(want.logprobs)
        assert_close(got.logprobs, want.logprobs, 8 * EPS * (1 + x))

        zero = torch.zeros_like(x)
        # what rounds a log ratio and, as docs/contracts.md has it, the exponent of e^-d, which is 0 from a d of 100 on
        logits = finite(case.storage) * torch.isfinite(case.storage)
        d = (2 * logits.amax(-1) / case.keywords.get("temperature", 1.0)).clamp(max=100.0) if len(x) else zero
        spread = 2 + x + finite(case.keywords.get("old_logprobs", zero)) + d / 12
        each = case.having(reduction="none", inplace=False)
        tokens = run(case.reference, each).loss
        overflown = ~torch.isfinite(tokens)  # ratio * advantage, which eager may divide before it multiplies
        tokens = torch.where(torch.isfinite(tokens), run(case.reference, each, torch.float64).loss.float(), tokens)
        size = finite(tokens) + finite(case.keywords.get("advantages", zero))
        unsure = UNSURE * (1 + size)
        scale = spread * (size + 1e-30)
        if case.keywords["reduction"] != "none":
            weights = case.keywords.get("weights", 1 + zero)[case.target_tokens != -100]
            scale = scale.sum() / (finite(weights.sum()) or 1.0 if case.keywords["reduction"] == "mean" else 1.0)
        finite_loss = torch.isfinite(want.loss) & torch.isfinite(exact.loss)
        exact_loss = torch.where(finite_loss, exact.loss.float(), want.loss)
        assert_close(got.loss, exact_loss, 32 * EPS * scale + (unsure if got.loss.dim() else unsure.sum()))

        # inf * 0 is NaN or 0 by the order of operations: of such a row only that it is bad
        bad = ~torch.isfinite(want.gradient).all(-1)
        same = overflown | (bad == ~torch.isfinite(got.gradient).all(-1))
        assert same.all(), (got.gradient, want.gradient)
        bad = bad | overflown
        expected = exact.gradient[~bad]
        size = expected.abs().sum(-1, keepdim=True)
        # below it a backend may flush to 0: a gradient, or a ratio that an advantage then multiplies
        tiny = torch.finfo(torch.float32).smallest_normal * (1 + finite(case.keywords.get("advantages", zero)))
        assert_close(got.gradient[~bad], expected, 32 * EPS * spread[~bad, None] * size + (tiny + unsure)[~bad, None])

    check()
