"""TIS and IcePop weights against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_losses.importance_weights import (
    GATE_LEVELS,
    GATES,
    LEVELS,
    gated_importance_weights,
    masked_importance_weights,
    off_policy_sequence_mask,
    truncated_importance_weights,
)

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
CU_SEQLENS = torch.tensor([0, 5, 10, 15, 20])
GENERATOR = torch.Generator().manual_seed(0)
X = -torch.rand(4, 5, generator=GENERATOR)
Q = X - 0.6 * torch.randn(4, 5, generator=GENERATOR)


def ratios(x: Tensor, q: Tensor, mask: Tensor, level: str) -> list[list[float]]:
    """Per token, None where it is masked."""
    out = []
    for row, other, active in zip(x.double().tolist(), q.double().tolist(), mask.tolist(), strict=True):
        logs = [a - b for a, b, m in zip(row, other, active, strict=True) if m]
        total = sum(logs) / (max(len(logs), 1) if level == "sequence_mean" else 1)
        own = [a - b if level == "token" else total for a, b in zip(row, other, strict=True)]
        out.append([math.exp(r) if m else None for r, m in zip(own, active, strict=True)])
    return out


def expected(level: str, weight, x: Tensor = X, q: Tensor = Q, mask: Tensor = MASK) -> Tensor:
    rows = ratios(x, q, mask, level)
    return torch.tensor([[0.0 if r is None else weight(r) for r in row] for row in rows])


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.float32))
@pytest.mark.parametrize("level", LEVELS)
def test_values(level, dtype):
    truncated = truncated_importance_weights(X, Q, cap=1.1, level=level, mask=MASK.to(dtype))
    masked = masked_importance_weights(X, Q, low=0.7, high=1.4, level=level, mask=MASK.to(dtype))
    for weights in (truncated, masked):
        assert weights.dtype == torch.float32 and weights.shape == X.shape
        assert weights[MASK == 0].count_nonzero() == 0
    torch.testing.assert_close(truncated, expected(level, lambda r: min(r, 1.1)))
    torch.testing.assert_close(masked, expected(level, lambda r: r if 0.7 <= r <= 1.4 else 0.0))


def test_the_cases_above_are_telling():
    for level in LEVELS:
        flat = [r for row in ratios(X, Q, MASK, level) for r in row if r is not None]
        assert any(r > 1.1 for r in flat) and any(r < 1.1 for r in flat)
        assert any(r < 0.7 or r > 1.4 for r in flat) and any(0.7 <= r <= 1.4 for r in flat)


@pytest.mark.parametrize("level", LEVELS)
def test_packed_is_padded(level):
    flat = X.view(-1), Q.view(-1)
    for shape in ((20,), (1, 20)):
        x, q, mask = (t.reshape(shape) for t in (X, Q, MASK))
        weights = truncated_importance_weights(x, q, cap=1.1, level=level, mask=mask, cu_seqlens=CU_SEQLENS.int())
        wanted = truncated_importance_weights(X, Q, cap=1.1, level=level, mask=MASK)
        torch.testing.assert_close(weights, wanted.view(shape))
        weights = masked_importance_weights(x, q, low=0.7, high=1.4, level=level, mask=mask, cu_seqlens=CU_SEQLENS)
        wanted = masked_importance_weights(X, Q, low=0.7, high=1.4, level=level, mask=MASK)
        torch.testing.assert_close(weights, wanted.view(shape))
    unequal = torch.tensor([0, 2, 2, 20])  # an empty sequence
    weights = truncated_importance_weights(*flat, cap=math.inf, level="sequence", cu_seqlens=unequal)
    log_ratio = flat[0].double() - flat[1].double()
    products = torch.stack([log_ratio[:2].sum(), log_ratio[2:].sum()]).exp().float()
    torch.testing.assert_close(weights, products.repeat_interleave(torch.tensor([2, 18])))


def test_no_mask_is_every_token():
    for level in LEVELS:
        ones = torch.ones_like(MASK)
        weights = truncated_importance_weights(X, Q, cap=1.1, level=level)
        assert torch.equal(weights, truncated_importance_weights(X, Q, cap=1.1, level=level, mask=ones))
    assert truncated_importance_weights(X[0, 0], Q[0, 0], cap=9.0).shape == ()


def test_bounds_are_kept():
    x, q = torch.zeros(3), torch.tensor([0.5, 0.0, -1.0])
    low, high = math.exp(-0.5), math.exp(1.0)
    kept = masked_importance_weights(x, q, low=torch.exp(-q[0]).item(), high=torch.exp(-q[2]).item())
    torch.testing.assert_close(kept, torch.tensor([low, 1.0, high]))
    assert masked_importance_weights(x, q, low=0.0, high=math.inf).count_nonzero() == 3
    assert masked_importance_weights(x, q, low=1.0, high=1.0).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_masked_tokens_may_hold_anything(bad, level):
    idle = MASK == 0
    for x, q in ((X.masked_fill(idle, bad), Q), (X, Q.masked_fill(idle, bad)), (X.masked_fill(idle, bad),) * 2):
        clean = [t.masked_fill(idle, 0.0) for t in (x, q)]
        for function, bounds in (
            (truncated_importance_weights, {"cap": 1.1}),
            (masked_importance_weights, {"low": 0.7, "high": 1.4}),
        ):
            weights = function(x, q, **bounds, level=level, mask=MASK)
            assert torch.equal(weights, function(*clean, **bounds, level=level, mask=MASK))


@pytest.mark.parametrize("level", LEVELS)
def test_extremes(level):
    """exp overflows and underflows: the cap, and 0; a NaN is not taken for a token left out, and stays in its row."""
    x = torch.tensor([[-1.0, -1.0], [-2000.0, -2000.0], [-1.0, math.nan]])
    q = torch.tensor([[-2000.0, -2000.0], [-1.0, -1.0], [-1.0, -1.0]])
    truncated = truncated_importance_weights(x, q, cap=3.0, level=level)
    masked = masked_importance_weights(x, q, low=0.0, high=3.0, level=level)
    assert truncated[:2].tolist() == [[3.0, 3.0], [0.0, 0.0]]
    assert masked[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    for weights in (truncated, masked):
        assert weights[2, 1].isnan() and weights[2, 0].isnan() == (level != "token")
    mask = torch.tensor([[0, 1]])
    for function, bounds in (
        (truncated_importance_weights, {"cap": 3.0}),
        (masked_importance_weights, {"low": 0.0, "high": 3.0}),
    ):
        weights = function(x, q, **bounds, level=level, mask=mask)
        assert weights[:, 0].tolist() == [0.0] * 3 and weights[2, 1].isnan()


def test_long_sequences_keep_their_sum():
    """The product of many ratios near 1: summed in float64."""
    x = torch.full((1, 65536), -1.0)
    q = x - 2.0**-20
    weights = truncated_importance_weights(x, q, cap=2.0, level="sequence")
    log_ratio = (x.double() - q.double()).sum()
    torch.testing.assert_close(weights[0, 0], log_ratio.exp().float(), rtol=2e-7, atol=0)


def test_constants():
    x, q = X.clone().requires_grad_(), Q.clone().requires_grad_()
    assert not truncated_importance_weights(x, q, cap=2.0, level="sequence").requires_grad
    assert not masked_importance_weights(x, q, low=0.5, high=2.0).requires_grad


def test_dtypes_and_broadcast():
    x, q = X.bfloat16(), Q.half()
    weights = truncated_importance_weights(x, q, cap=1.1)
    torch.testing.assert_close(weights, (x.double() - q.double()).exp().clamp(max=1.1).float())
    assert truncated_importance_weights(X, Q[:1], cap=1.1).shape == X.shape
    assert truncated_importance_weights(X.double(), Q.double(), cap=1.1).dtype == torch.float32


@pytest.mark.parametrize("level", LEVELS)
def test_empty(level):
    assert truncated_importance_weights(X[:0], Q[:0], cap=1.1, level=level).shape == (0, 5)
    assert truncated_importance_weights(X[:, :0], Q[:, :0], cap=1.1, level=level).shape == (4, 0)
    flat = torch.zeros(0)
    assert truncated_importance_weights(flat, flat, cap=1.1, level=level, cu_seqlens=torch.tensor([0, 0])).shape == (0,)


@pytest.mark.parametrize("level", LEVELS)
def test_compile(level):
    def step(x, q, mask, cu_seqlens):
        keywords = {"level": level, "mask": mask, "cu_seqlens": cu_seqlens}
        return truncated_importance_weights(x, q, cap=1.1, **keywords), masked_importance_weights(
            x, q, low=0.7, high=1.4, **keywords
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = X.view(-1), Q.view(-1), MASK.view(-1), CU_SEQLENS
    torch.testing.assert_close(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    (
        ({"cap": 0}, ValueError, "cap must be greater than 0, got 0.0"),
        ({"cap": math.nan}, ValueError, "cap must not be NaN"),
        ({"cap": None}, TypeError, "cap must be a number, got NoneType"),
        ({"cap": torch.tensor(2.0)}, TypeError, "cap must be a number, got a tensor"),
        ({"level": "batch"}, ValueError, r"level must be one of \('token', 'sequence', 'sequence_mean'\), got 'batch'"),
        ({"logprobs": [0.0]}, TypeError, "^logprobs must be a tensor, got list"),
        ({"logprobs": MASK}, TypeError, r"^logprobs must be a float tensor, got torch\.int64"),
        ({"sampler_logprobs": MASK}, TypeError, r"sampler_logprobs must be a float tensor, got torch\.int64"),
        ({"sampler_logprobs": Q[:, :2]}, ValueError, r"sampler_logprobs must broadcast .*\(4, 5\), got \(4, 2\)"),
        ({"sampler_logprobs": Q.to("meta")}, ValueError, "sampler_logprobs must be on the device of logprobs, cpu"),
        ({"mask": MASK[:, :2]}, ValueError, r"mask must broadcast to the tokens' shape \(4, 5\), got \(4, 2\)"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens must end at .* logprobs, 20, got 3"),
        (
            {"logprobs": X[0, 0], "sampler_logprobs": Q[0, 0], "level": "sequence"},
            ValueError,
            "^logprobs must have shape",
        ),
    ),
)
def test_errors(keywords, error, message):
    with pytest.raises(error, match=message):
        truncated_importance_weights(**{"logprobs": X, "sampler_logprobs": Q, "cap": 2.0} | keywords)
    if "cap" not in keywords:
        with pytest.raises(error, match=message):
            masked_importance_weights(**{"logprobs": X, "sampler_logprobs": Q, "low": 0.5, "high": 2.0} | keywords)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    (
        ({"low": -0.5, "high": 2.0}, ValueError, "low must be at least 0, got -0.5"),
        ({"low": 2.0, "high": 0.5}, ValueError, "low must not exceed high, got 2.0 > 0.5"),
        ({"low": math.nan, "high": 2.0}, ValueError, "low must not be NaN"),
        ({"low": 0.5, "high": "two"}, TypeError, "high must be a number, got str"),
        ({"low": 0.5, "high": torch.tensor(2.0)}, TypeError, "high must be a number, got a tensor"),
    ),
)
def test_errors_of_the_bounds(bounds, error, message):
    with pytest.raises(error, match=message):
        masked_importance_weights(X, Q, **bounds)


# ---- Gates ----

NOW, THEN = X - 0.3, Q.clamp(max=0.0) - 0.3
BANDS = {"ratio": (0.7, 1.5), "binary_kl": (0.02, 0.12), "tv": (0.05, 0.2)}


def measure(gate: str, x: float, q: float) -> float:
    """Of one token."""
    p, before = math.exp(x), math.exp(q)
    if gate == "ratio":
        return p / before
    if gate == "tv":
        return abs(p - before)
    return before * math.log(before / p) + (1 - before) * math.log((1 - before) / (1 - p))


def gated(gate: str, level: str) -> Tensor:
    low, high = BANDS[gate]
    out = torch.zeros(X.shape)
    for b, row in enumerate(MASK.bool()):
        x, q = (t[b, row].double().tolist() for t in (NOW, THEN))
        measured = [measure(gate, *pair) for pair in zip(x, q, strict=True)]
        if level == "sequence_mean" and measured:
            mean = math.prod(measured) ** (1 / len(measured)) if gate == "ratio" else sum(measured) / len(measured)
            measured = [mean] * len(measured)
        own = [math.exp(a - c) if low <= m <= high else 0.0 for a, c, m in zip(x, q, measured, strict=True)]
        out[b, row] = torch.tensor(own)
    return out


@pytest.mark.parametrize("level", GATE_LEVELS)
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, level):
    low, high = BANDS[gate]
    wanted = gated(gate, level)
    assert 0 < wanted.count_nonzero() < MASK.sum()
    weights = gated_importance_weights(NOW, THEN, gate=gate, low=low, high=high, level=level, mask=MASK)
    assert weights.dtype is torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights, wanted, rtol=1e-6, atol=1e-7)
    x, q, mask = (t.view(20) for t in (NOW, THEN, MASK))
    packed = gated_importance_weights(
        x, q, gate=gate, low=low, high=high, level=level, mask=mask, cu_seqlens=CU_SEQLENS
    )
    assert torch.equal(packed.view(4, 5), weights)


@pytest.mark.parametrize("level", GATE_LEVELS)
@pytest.mark.parametrize("gate", GATES)
def test_gates_at_hazards(gate, level):
    """A probability of 0 or 1 on either side is measured; a NaN is not taken for a token left out; a mask hides all."""
    x = torch.tensor([[0.0, -0.1], [-1.0, -1.0], [-2000.0, -1.0], [-1.0, math.nan], [-math.inf, -1.0]])
    q = torch.tensor([[-1.0, -0.1], [0.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]])
    weights = gated_importance_weights(x, q, gate=gate, low=0.0, high=0.05, level=level)
    for row in (0, 1, 2, 4):
        assert not weights[row, 0].isnan() and (gate == "ratio" or weights[row, 0] == 0)
    assert weights[3, 1].isnan() and weights[3, 0].isnan() == (level == "sequence_mean")
    everything = gated_importance_weights(x[:1], q[:1], gate=gate, high=math.inf, level=level)
    torch.testing.assert_close(everything, torch.tensor([[math.e, 1.0]]))
    assert not gated_importance_weights(x, q, gate=gate, high=math.inf, level=level, mask=torch.zeros(5, 2)).any()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    (
        ({"gate": "kl"}, ValueError, 'gate must be "ratio" or "binary_kl" or "tv", got \'kl\''),
        ({"level": "sequence"}, ValueError, r"level must be one of \('token', 'sequence_mean'\), got 'sequence'"),
        ({"low": 0.6}, ValueError, "low must not exceed high, got 0.6 > 0.5"),
        ({"high": math.nan}, ValueError, "high must not be NaN"),
        ({"sampler_logprobs": Q[:, :2]}, ValueError, r"sampler_logprobs must broadcast .*\(4, 5\), got \(4, 2\)"),
    ),
)
def test_errors_of_gates(keywords, error, message):
    with pytest.raises(error, match=message):
        gated_importance_weights(**{"logprobs": X, "sampler_logprobs": Q, "gate": "tv", "high": 0.5} | keywords)


# ---- Off-policy sequence masks ----


def test_off_policy_sequence_mask():
    """By a loop; the sign of a token's own advantage; packed as padded."""
    advantages = torch.tensor([[-1.0], [-1.0], [1.0], [-0.0]])
    drift = [
        sum(d[m].tolist()) / max(int(m.sum()), 1) for d, m in zip(Q.double() - X.double(), MASK.bool(), strict=True)
    ]
    for threshold in (drift[0] - 0.01, drift[0] + 0.01):
        keep = torch.tensor([[drift[0] <= threshold], [threshold >= 0.0], [True], [True]])
        got = off_policy_sequence_mask(X, Q, advantages, threshold=threshold, mask=MASK)
        assert got.dtype is torch.float32 and torch.equal(got, (keep & (MASK != 0)).float())
        flat = [t.expand(4, 5).reshape(20) for t in (X, Q, advantages)]
        packed = off_policy_sequence_mask(*flat, threshold=threshold, mask=MASK.view(20), cu_seqlens=CU_SEQLENS)
        assert torch.equal(packed.view(4, 5), got)
    mixed = torch.tensor([[1.0, -1.0, -1.0, 0.0, -1.0]])
    assert off_policy_sequence_mask(X[:1], X[:1] + 1, mixed, threshold=0.5).tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0]]
    assert not off_policy_sequence_mask(X, X + 1, -1.0, threshold=0.5).any()


def test_off_policy_sequence_mask_at_hazards():
    nan = torch.full((1, 2), math.nan)
    x = torch.full((1, 2), -1.0)
    assert off_policy_sequence_mask(nan, x, 1.0, threshold=0.5).tolist() == [[1.0, 1.0]]
    assert off_policy_sequence_mask(nan, x, -1.0, threshold=0.5).isnan().all()
    assert off_policy_sequence_mask(x, x, nan, threshold=0.5).isnan().all()
    assert not off_policy_sequence_mask(nan, nan, -1.0, threshold=0.5, mask=torch.zeros(2)).any()
    assert not off_policy_sequence_mask(-math.inf * -x, x, -1.0, threshold=0.5).any()
    for keywords, message in (
        ({"threshold": math.nan}, "threshold must not be NaN"),
        ({"advantages": torch.ones(3)}, r"advantages must broadcast to the tokens' shape \(1, 2\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            off_policy_sequence_mask(
                **{"logprobs": x, "sampler_logprobs": x, "advantages": 1.0, "threshold": 0.5} | keywords
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("level", LEVELS)
def test_cuda_without_waiting(level):
    arguments = [t.view(-1).cuda() for t in (X, Q, MASK, CU_SEQLENS)]
    x, q, mask, cu_seqlens = arguments
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = truncated_importance_weights(x, q, cap=1.1, level=level, mask=mask, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(weights.cpu().view(4, 5), expected(level, lambda r: min(r, 1.1)))
