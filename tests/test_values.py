"""Masked, extreme and bad values, and what holds for every softmax loss: invariants and bitwise repeatability."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    CLIPPED_LOSSES,
    DTYPES,
    EPS,
    GRADIENT_FACTOR,
    LOSSES,
    MODES,
    OBJECTIVES,
    check,
    half_ulp,
    make,
    per_token_bounds,
    run,
)
from torch import Tensor

import fused_losses

pytestmark = pytest.mark.each_instruction_set

INF, NAN = math.inf, math.nan

MASKED_BY = ("ignore_index", "weight 0", "False")
GARBAGE = {"NaN": NAN, "inf": INF, "-inf": -INF, "both infinities": (INF, -INF)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("masked_by", MASKED_BY)
def test_masked_token(backend, device, masked_by, garbage, mode):
    """A masked token is exactly 0 in everything, whatever its row and inputs hold, and changes nothing elsewhere."""
    for objective in LOSSES:
        case = make(objective, (4,), 31, device=device, ignored=False)
        clean = case.target_tokens.clone()
        weights = torch.tensor([1.0, 0.0, 2.0, 0.0], device=device)
        if masked_by == "ignore_index":
            case.target_tokens[1::2] = -100
            weights[1::2] = 1.0
        elif masked_by == "False":
            weights = weights.bool()
        case = case.having(weights=weights, **MODES[mode])
        expected = run(case.public(backend), case)
        values = torch.as_tensor(GARBAGE[garbage], device=device)
        case.storage[1::2] = values.repeat(31)[:31]
        poisoned = {k: v.clone() for k, v in case.keywords.items() if k in OBJECTIVES[objective].inputs}
        for v in poisoned.values():
            v[1::2] = values.flatten()[0]
        got = run(case.public(backend), case, **poisoned)
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.gradient, expected.gradient)
        assert not got.gradient[1::2].any() and got.gradient[::2].any()
        if mode == "none":
            assert not got.loss[1::2].any()
        if masked_by == "ignore_index":
            assert torch.equal(got.logprobs, expected.logprobs) and not got.logprobs[1::2].any()
        else:  # asked for, so read
            case.target_tokens.copy_(clean)
            assert torch.equal(got.logprobs[::2], expected.logprobs[::2])
            assert garbage == "inf" or not torch.isfinite(got.logprobs[1::2]).any()


def test_masked_token_of_logprobs(backend, device):
    logits = torch.full((3, 31), NAN, device=device)
    logits[1] = torch.randn(31)
    logits.requires_grad_()
    logp = fused_losses.logprobs(logits, torch.tensor([-100, 4, -100], device=device), backend=backend)
    assert logp[0] == 0 and logp[2] == 0 and torch.isfinite(logp[1])
    logp.backward(torch.tensor([NAN, 1.0, INF], device=device))
    assert not logits.grad[::2].any() and torch.isfinite(logits.grad).all() and logits.grad[1].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad_number", [NAN, INF])
def test_masked_token_under_a_bad_upstream(backend, device, mode, bad_number):
    """The step that a gradient scaler skips has inf upstream; masked tokens stay 0 in it as in any other."""
    case = make("cross_entropy", (4,), 31, device=device)
    gradient = run(case.public(backend), case, upstream=bad_number, **MODES[mode]).gradient
    assert not gradient[2].any() and not torch.isfinite(gradient[[0, 1, 3], 7]).any()


@pytest.mark.parametrize("masked_by", MASKED_BY)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_all_masked(backend, device, objective, mode, masked_by):
    """Loss 0 and a zero gradient, connected to the graph."""
    case = make(objective, (4,), 31, device=device)
    if masked_by == "ignore_index":
        case.target_tokens.fill_(-100)
    else:
        case = case.having(weights=0.0 if masked_by == "weight 0" else torch.zeros(4, dtype=torch.bool, device=device))
    case.storage[0] = NAN
    for reduction in ("none",) if mode == "none" else ("mean", "sum"):
        got = run(case.public(backend), case, **MODES[mode] | {"reduction": reduction})
        assert not got.loss.any() and not got.gradient.any()


def test_all_masked_with_a_zero_denominator(backend, device):
    """A rank without tokens divides nothing by the nothing it counted."""
    case = make("ppo", (4,), 31, device=device, weights=0.0)
    for mode in ("one pass", "in place", "recompute"):
        got = run(case.public(backend), case, denominator=torch.tensor(0.0, device=device), **MODES[mode])
        assert got.loss == 0 and not got.gradient.any()


@pytest.mark.parametrize("denominator", [NAN, INF, 0.0])
def test_bad_denominator_on_the_device(backend, device, denominator):
    """It shows in the loss and in the active tokens' gradient, not in the masked one's."""
    case = make("cross_entropy", (4,), 31, device=device, denominator=torch.tensor(denominator, device=device))
    for mode in ("one pass", "recompute"):
        got = run(case.public(backend), case, **MODES[mode])
        expected = {NAN: math.isnan, INF: lambda x: x == 0, 0.0: math.isinf}[denominator]
        assert expected(got.loss.item()) and not got.gradient[2].any()
        if math.isnan(denominator):
            assert got.gradient[[0, 1, 3]].isnan().all()
        assert torch.isfinite(got.gradient).all() == (denominator == INF)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", CLIPPED_LOSSES[:1])  # ppo; cispo keeps its gradient when clipped
@pytest.mark.parametrize(
    "old_logprob, advantage", [(-100.0, 1.0), (-INF, 1.0), (-50.0, 1e30), (100.0, -1.0), (INF, -1.0)]
)
def test_clipped_token(backend, device, objective, mode, old_logprob, advantage):
    """Exactly 0, also where exp overflows; also if it is all that the batch holds."""
    case = make(objective, (2,), 31, device=device, old_logprobs=old_logprob, advantages=advantage, **MODES[mode])
    got = run(case.public(backend), case)
    bound = 1.2 if advantage > 0 else 0.8
    assert not got.gradient.any()
    torch.testing.assert_close(got.loss, torch.full_like(got.loss, -bound * advantage))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_minus_infinity(backend, device, mode, dtype):
    """-inf logits are legal: most of a row, the first and the last, all but the target."""
    for vocab in (31, 1000):
        case = make("cross_entropy", (5,), vocab, dtype, device, ignored=False)
        keep = case.storage.gather(1, case.target_tokens[:, None])
        case.storage[0, : vocab - 4] = -INF
        case.storage[1, 0] = case.storage[1, -1] = -INF
        case.storage[2] = -INF
        case.storage[3, 4:] = -INF
        case.storage.scatter_(1, case.target_tokens[:, None], keep)
        got = check(case, backend, **MODES[mode])
        assert not got.gradient[2].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", [-INF, NAN, INF])
def test_bad_row(backend, device, fill, mode):
    """A row of nothing but -inf, or with a NaN or +inf, is NaN: that row and no other."""
    for objective in LOSSES:
        case = make(objective, (4,), 129, device=device, ignored=False, **MODES[mode])
        expected = run(case.public(backend), case.having(weights=torch.tensor([1.0, 1, 0, 1], device=device)))
        case.storage[2] = fill
        if fill != -INF:
            case.storage[2] = 0.0
            case.storage[2, 100] = fill
        got = run(case.public(backend), case, reduction=case.keywords.get("reduction", "sum"))
        rest = [0, 1, 3]
        assert got.gradient[2].isnan().all() and got.logprobs[2].isnan()
        assert torch.isfinite(got.gradient[rest]).all() and torch.equal(got.logprobs[rest], expected.logprobs[rest])
        if mode == "none":
            assert got.loss[2].isnan() and torch.equal(got.loss[rest], expected.loss[rest])
            assert torch.equal(got.gradient[rest], expected.gradient[rest])
        else:
            assert got.loss.isnan()


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_bad_row_whatever_its_advantage(backend, device, advantage):
    """The reference agrees that a NaN row is NaN, advantage 0 or not."""
    for objective in LOSSES:
        case = make(objective, (2,), 5, device=device, ignored=False, reduction="none")
        if "advantages" in OBJECTIVES[objective].inputs:
            case = case.having(advantages=advantage)
        case.storage[1, 0] = NAN
        for function in (case.public(backend), case.reference):
            got = run(function, case)
            assert got.loss.isnan().tolist() == [False, True]
            assert got.gradient.isnan().tolist() == [[False] * 5, [True] * 5]


@pytest.mark.parametrize("mode", MODES)
def test_bad_bounds_per_token(backend, device, mode):
    """Unchecked, a bound or temperature that makes no sense makes its own token NaN and no other: loss and gradient."""
    for objective in LOSSES:
        clean = make(objective, (4,), 31, device=device, ignored=False, **MODES[mode])
        bad = [{"temperature": torch.tensor([1.0, t, 1.0, 1.0], device=device)} for t in (0.0, -1.0, NAN)]
        for name, value in per_token_bounds(clean).items():
            for wrong in (NAN, -0.5) + ((0.1,) if name == "clip_high_threshold" else ()):
                bad.append({name: value.index_fill(0, torch.tensor([1], device=device), wrong)})
                if name != "clip_low_threshold":
                    bad[-1] |= {n: 0.2 for n in OBJECTIVES[objective].bounds if n == "clip_low_threshold"}
        for keywords in bad:
            got = run(clean.public(backend), clean, **keywords)
            assert got.gradient.isnan().all(-1).tolist() == [False, True, False, False], (objective, keywords)
            assert not got.gradient[[0, 2, 3]].isnan().any()
            assert got.loss.isnan().tolist() == ([False, True, False, False] if mode == "none" else True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.9, 0.999, 1 - 1e-5])
def test_true_class_gradient(backend, device, p, mode, dtype):
    """g (1 - p_t), right where p_t rounds to 1 in bf16 and bf16(p) - 1 would be 0."""
    vocab = 129
    logits = torch.zeros(1, vocab, dtype=dtype)
    logits[0, 7] = math.log(p / (1 - p) * (vocab - 1))
    target = torch.tensor([7])
    confidence = torch.softmax(logits.double(), -1)[0, 7].item()
    case = type(make("cross_entropy"))("cross_entropy", logits.to(device), target.to(device), MODES[mode])
    expected = torch.tensor(confidence - 1).double()
    error, eager = (
        abs(run(function, case).gradient[0, 7].double().cpu() - expected)
        for function in (case.public(backend), case.reference)
    )
    one_rounding = half_ulp(expected.abs(), dtype)
    # 1 - p_t in float32: a few EPS however small it is
    assert error <= GRADIENT_FACTOR * torch.maximum(eager, one_rounding) + 4 * EPS


@pytest.mark.parametrize("mode", MODES)
def test_common_offset(backend, device, mode):
    """Quarters plus a power of two are exact in float32: adding one to a row must not change a bit."""
    for objective in LOSSES:
        case = make(objective, (6,), 31, device=device, **MODES[mode])
        case.storage.copy_(torch.randint(-40, 40, (6, 31)) / 4)
        expected = run(case.public(backend), case)
        for offset in (2.0**10, -(2.0**14), 2.0**20):
            shifted = type(case)(objective, case.storage + offset, case.target_tokens, case.keywords)
            got = run(case.public(backend), shifted)
            torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got.gradient, expected.gradient, rtol=2e-6, atol=1e-9)
            torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 3e4])
def test_large_logits(backend, device, scale, dtype):
    """Logits of 1e4 and differences of that size: no overflow, and the truth."""
    case = make("cross_entropy", (5,), 129, dtype, device, ignored=False)
    case.storage.copy_(torch.randn(5, 129) + scale)
    check(case, backend)
    case.storage.copy_(torch.randn(5, 129) * (scale / 4))
    check(case, backend)
    check(case, backend, recompute=True, temperature=0.01)


@pytest.mark.parametrize("offset", [1e38, -1e38])
def test_huge_logits(backend, device, offset):
    case = make("cross_entropy", (3,), 31, device=device, ignored=False)
    case.storage.fill_(offset)
    got = run(case.public(backend), case, reduction="none")
    torch.testing.assert_close(got.loss.cpu(), torch.full((3,), math.log(31)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [31, -1, -101, 2**31 - 1, -(2**31), 2**40])
def test_target_out_of_range(backend, device, bad, mode):
    """CPU: ValueError with the first position, the logits untouched. GPU: NaN in that row."""
    for objective in ("cross_entropy", "ppo"):
        case = make(objective, (2, 3), 31, device=device, ignored=False, **MODES[mode])
        case.target_tokens[1, 1] = case.target_tokens[1, 2] = bad
        leaf = case.storage.clone().requires_grad_()
        logits = leaf.clone()

        def call(logits=logits, case=case, **keywords):
            return case.public(backend)(logits, case.target_tokens, **case.keywords, **keywords)

        checked = [{}, {"validate": True}] if device.type == "cpu" else [{"validate": True}]
        for keywords in checked:
            with pytest.raises(ValueError, match=rf"target_tokens.* got {bad} at token 4 of 6"):
                call(**keywords)
            with pytest.raises(ValueError, match="target_tokens"), torch.no_grad():
                call(**keywords)
        assert torch.equal(logits.detach(), case.storage)
        if device.type == "cuda":
            loss = call()
            loss.sum().backward()
            assert leaf.grad[1, 1:].isnan().all() and torch.isfinite(leaf.grad[0]).all()
            assert loss.isnan().sum() == (2 if mode == "none" else 1)


def test_target_out_of_range_of_logprobs(backend, device):
    with pytest.raises(ValueError, match="at token 1 of 3"):
        target = torch.tensor([0, 9, 99], device=device)
        if device.type == "cuda":
            pytest.skip("logprobs has no validate=True")
        fused_losses.logprobs(torch.randn(3, 5, device=device), target, backend=backend)


def test_target_out_of_range_reference():
    case = make("cross_entropy", (3,), 5, ignored=False)
    case.target_tokens[1] = 5
    got = run(case.reference, case, reduction="none")
    assert got.loss.isnan().tolist() == [False, True, False]
    assert got.gradient.isnan().any(-1).tolist() == [False, True, False]


# Invariants


@pytest.mark.parametrize("objective", LOSSES)
def test_gradient_sums_to_zero(backend, device, objective):
    case = make(objective, (8,), 1000, device=device)
    gradient = run(case.public(backend), case).gradient.double()
    # The target's 1 - p is as good as a sum of probabilities near 1 in float32, where p is near 1.
    p = torch.softmax(case.storage.double(), -1).gather(-1, case.target_tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    coefficient = gradient.abs().sum(-1) / (2 * (1 - p.clamp(max=0.9999)))
    rounding = 2 * torch.finfo(torch.float32).eps * coefficient * p
    assert (gradient.sum(-1).abs() <= 4e-6 * gradient.abs().sum(-1) + rounding).all()


@pytest.mark.parametrize("objective", LOSSES)
def test_vocabulary_permuted(backend, device, objective):
    """Permuting the vocabulary permutes the gradient."""
    case = make(objective, (5,), 131, device=device)
    order = torch.randperm(131).to(device)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(131, device=device))
    target = torch.where(case.target_tokens < 0, -100, place[case.target_tokens.clamp(min=0)])
    permuted = type(case)(objective, case.storage[:, order].contiguous(), target, case.keywords)
    got, expected = run(case.public(backend), permuted), run(case.public(backend), case)
    torch.testing.assert_close(got.gradient, expected.gradient[:, order], rtol=5e-6, atol=1e-9)
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_weight_scales(backend, device, objective, mode):
    """A power of two scales loss and gradient to the bit, per token or for all; under mean it cancels."""
    reduction = "none" if mode == "none" else "sum"
    case = make(objective, (4,), 31, device=device, **MODES[mode] | {"reduction": reduction})
    plain = run(case.public(backend), case)
    for weight in (4.0, torch.full((4,), -0.5, device=device)):
        factor = weight if isinstance(weight, float) else -0.5
        got = run(case.public(backend), case, weights=weight)
        assert torch.equal(got.loss, factor * plain.loss) and torch.equal(got.gradient, factor * plain.gradient)
        if mode != "none":
            mean, weighted = (run(case.public(backend), case, reduction="mean", weights=w) for w in (None, weight))
            torch.testing.assert_close(
                (weighted.loss, weighted.gradient), (mean.loss, mean.gradient), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("mode", ["one pass", "recompute"])
@pytest.mark.parametrize("objective", LOSSES)
def test_mean_is_sum_over_denominator(backend, device, objective, mode):
    weights = torch.tensor([0.5, 0.0, 2.0, 1.5, 1.0], device=device)
    case = make(objective, (5,), 31, device=device, weights=weights, **MODES[mode])
    count = weights[case.target_tokens != -100].sum()
    mean = run(case.public(backend), case, reduction="mean")
    for reduction in ("sum", "mean"):
        got = run(case.public(backend), case, reduction=reduction, denominator=count)
        torch.testing.assert_close((got.loss, got.gradient), (mean.loss, mean.gradient), rtol=1e-6, atol=0)
    total = run(case.public(backend), case, reduction="sum")
    torch.testing.assert_close(mean.loss, total.loss / count, rtol=1e-6, atol=0)
    tokens = run(case.public(backend), case, reduction="none", recompute=False).loss
    torch.testing.assert_close(total.loss, tokens.sum(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_number_or_tensor(backend, device, mode):
    """A number and the same number per token give the same bits: temperature, weight, bounds, inputs."""
    for objective in LOSSES:
        o = OBJECTIVES[objective]
        numbers = dict.fromkeys(o.inputs + o.bounds, 0.75) | {"temperature": 0.5, "weights": 0.25}
        case = make(objective, (2, 3), 31, device=device, **numbers | MODES[mode]).having(**numbers)
        expected = run(case.public(backend), case)
        for shape in ((), (3,), (2, 1), (2, 3)):
            got = run(
                case.public(backend), case, **{k: torch.full(shape, v, device=device) for k, v in numbers.items()}
            )
            assert torch.equal(got.loss, expected.loss) and torch.equal(got.gradient, expected.gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_every_time(kernels, device, mode, dtype):
    case = make("ppo", (300,) if device.type == "cuda" or kernels == "cpu" else (40,), 257, dtype, device)
    threads = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    try:
        for count in (threads, threads, 1, 2, 3, 5):
            torch.set_num_threads(count if kernels == "cpu" else threads)
            got = run(case.public(kernels), case, weights=0.3, upstream=1.5, **MODES[mode])
            results.append((got.loss, got.gradient, got.logprobs))
            if kernels != "cpu" and len(results) == 3:
                break
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("objective", LOSSES)
def test_modes_agree(backend, device, objective):
    case = make(objective, (6,), 129, device=device, reduction="sum")
    one_pass, *others = (
        run(case.public(backend), case, **MODES[m] | {"reduction": "sum"}) for m in MODES if m != "none"
    )
    assert torch.equal(others[0].loss, one_pass.loss) and torch.equal(others[0].gradient, one_pass.gradient)
    torch.testing.assert_close(others[1].loss, one_pass.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(others[1].gradient, one_pass.gradient, rtol=2e-6, atol=1e-9)
