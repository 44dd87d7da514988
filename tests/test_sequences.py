"""The segment primitive against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_losses.sequences import segment_expand, segment_mean, segment_sum

LENGTHS = {
    "plain": (3, 1, 4),
    "empty first, middle and last": (0, 0, 3, 0, 5, 0, 0),
    "one": (7,),
    "no token": (0, 0),
    "no sequence": (),
    "long": (1, 4097, 2),
}


def cut(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)


def spans(cu_seqlens: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_sum_is_that_of_a_loop_rounded_once(dtype, lengths, index):
    cu_seqlens = cut(lengths, index)
    values = random(sum(lengths), dtype=dtype)
    expected = torch.tensor([math.fsum(values[s].tolist()) for s in spans(cu_seqlens)], dtype=torch.float64)
    total = segment_sum(values, cu_seqlens)
    assert total.dtype == dtype and total.shape == (len(lengths),)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(total, expected.to(dtype), **tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_expand_is_that_of_a_loop(lengths):
    cu_seqlens = cut(lengths)
    per_sequence = random(len(lengths))
    expected = torch.cat([per_sequence[:0], *(per_sequence[b].expand(n) for b, n in enumerate(lengths))])
    like = torch.empty(sum(lengths))
    assert torch.equal(segment_expand(per_sequence, like, cu_seqlens), expected)
    assert torch.equal(segment_expand(per_sequence, like, cu_seqlens.int()), expected)


@pytest.mark.parametrize("shape", ((3, 5), (2, 3, 5), (5,), (0, 5), (3, 0)))
def test_without_offsets_the_last_dimension_is_the_sequence(shape):
    values = random(*shape, dtype=torch.float32)
    assert torch.equal(segment_sum(values), values.double().sum(-1).float())
    per_sequence = random(*shape[:-1])
    assert torch.equal(segment_expand(per_sequence, values), per_sequence[..., None].expand(shape))
    mask = random(*shape) > 0
    expected = torch.where(mask, values, 0).double().sum(-1) / mask.sum(-1).clamp(min=1)
    assert torch.equal(segment_mean(values, mask), expected.float())


def test_both_layouts_agree_on_sequences_of_equal_length():
    values, mask = random(3, 5), random(3, 5) > 0
    cu_seqlens = cut((5, 5, 5))
    for tokens in (values, values.view(1, 15), values.view(15)):  # counted in row-major order whatever the shape
        flat_mask = mask.view(tokens.shape)
        torch.testing.assert_close(segment_sum(tokens, cu_seqlens), segment_sum(values))
        torch.testing.assert_close(segment_mean(tokens, flat_mask, cu_seqlens), segment_mean(values, mask))
        expanded = segment_expand(values[:, 0], tokens, cu_seqlens)
        assert torch.equal(expanded.view(3, 5), segment_expand(values[:, 0], values))


def test_strided_values():
    values = random(16)[::2]
    torch.testing.assert_close(segment_sum(values, cut((3, 5))), segment_sum(values.contiguous(), cut((3, 5))))


def test_counts_are_exact_integers():
    mask = torch.tensor([True, False, True, True])
    count = segment_sum(mask, cut((1, 0, 3)))
    assert count.dtype == torch.int64 and count.tolist() == [1, 0, 2]
    assert segment_sum(mask.view(2, 2)).tolist() == [1, 2]
    assert segment_sum(mask.int(), cut((4,))).dtype == torch.int64


def test_sum_keeps_what_float32_loses():
    values = torch.tensor([1e8, 1.0, -1e8, 1e8, 1.0, -1e8])
    assert segment_sum(values, cut((3, 3))).tolist() == [1.0, 1.0]
    assert segment_sum(values.view(2, 3)).tolist() == [1.0, 1.0]


def test_mean_does_not_overflow_on_the_way():
    values = torch.full((8,), 60000.0, dtype=torch.float16)
    assert segment_mean(values, None, cut((8,))).item() == 60000.0


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_bad_token_stays_in_its_sequence(bad):
    values = random(9)
    cu_seqlens = cut((3, 0, 4, 2))
    expected = segment_sum(values, cu_seqlens)
    values[4] = bad
    total = segment_sum(values, cu_seqlens)
    assert torch.equal(total[[0, 1, 3]], expected[[0, 1, 3]])
    torch.testing.assert_close(total[2], torch.tensor(bad, dtype=torch.float64), equal_nan=True)
    assert not segment_expand(total, values, cu_seqlens)[[0, 1, 2, 7, 8]].isnan().any()


@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_mean_selects(bad, packed):
    mask = torch.tensor([[True, False, True], [False, False, False]])
    clean = random(2, 3)
    values = torch.where(mask, clean, bad).requires_grad_()
    mean = segment_mean(values.view(-1), mask.view(-1), cut((3, 3))) if packed else segment_mean(values, mask)
    torch.testing.assert_close(
        mean, torch.stack([(clean[0, 0] + clean[0, 2]) / 2, torch.zeros((), dtype=torch.float64)])
    )
    (gradient,) = torch.autograd.grad(mean.sum(), values)
    assert gradient.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad(segment_mean(values, mask), values, torch.full((2,), bad).double())
    assert gradient[~mask].tolist() == [0.0] * 4  # whatever comes from above


def test_mean_of_every_kind_of_mask():
    values = random(2, 3)
    expected = segment_mean(values, torch.tensor([[True, False, True]]))
    for dtype in (torch.int64, torch.uint8, torch.float32):
        mask = torch.tensor([[1, 0, 1]], dtype=dtype)  # broadcasts
        assert torch.equal(segment_mean(values, mask), expected)
    torch.testing.assert_close(segment_mean(values), values.mean(-1))


@pytest.mark.parametrize("lengths", ((3, 0, 4), (0, 7, 0)))
def test_gradients(lengths):
    cu_seqlens = cut(lengths)
    values = random(7).requires_grad_()
    per_sequence = random(len(lengths)).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, True, True])
    functions = {
        lambda v: segment_sum(v, cu_seqlens): values,
        lambda v: segment_mean(v, mask, cu_seqlens): values,
        lambda s: segment_expand(s, mask, cu_seqlens): per_sequence,
        lambda v: segment_expand(segment_mean(v, mask, cu_seqlens), v, cu_seqlens).exp(): values,
    }
    for function, argument in functions.items():
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument)


def test_gradients_are_in_the_dtype_of_their_tensor():
    values = random(7, dtype=torch.bfloat16).requires_grad_()
    segment_sum(values, cut((3, 4))).sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.bfloat16 and (values.grad == 1).all()
    per_sequence = random(2, dtype=torch.float32).requires_grad_()
    segment_expand(per_sequence, values, cut((3, 4))).backward(torch.tensor([1e8, 1, -1e8, 0, 0, 0, 1]))
    assert per_sequence.grad is not None and per_sequence.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("packed", (True, False))
def test_compile(packed, dynamic):
    def step(values, mask, cu_seqlens):
        mean = segment_mean(values, mask, cu_seqlens)
        return segment_expand(mean, values, cu_seqlens) * segment_expand(
            segment_sum(values, cu_seqlens), values, cu_seqlens
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ((3, 0, 4), (2, 5, 2)):
        tokens = sum(lengths)
        values = random(tokens) if packed else random(2, tokens)
        arguments = (values.requires_grad_(), values > 0, cut(lengths) if packed else None)
        upstream = torch.linspace(0, 1, values.numel(), dtype=torch.float64).view(values.shape)
        results = []
        for function in (step, compiled):
            out = function(*arguments)
            results.append((out, *torch.autograd.grad(out, values, upstream)))
        torch.testing.assert_close(*results, rtol=1e-14, atol=0)


def test_inference_mode():
    with torch.inference_mode():
        values, cu_seqlens = random(7), cut((3, 4))
        total = segment_sum(values, cu_seqlens)
        segment_mean(values, values > 0, cu_seqlens)
        assert torch.equal(segment_expand(total, values, cu_seqlens)[:3], total[0].expand(3))


def test_unread_offsets_reach_nothing_out_of_bounds(monkeypatch):
    """CUDA and compiled code do not check values. Here they run on CPU, where torch or a sanitizer would notice."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    values = random(7).requires_grad_()
    for bad in ([-5, 3, 7], [0, 3, 2**31], [0, 6, 2, 7], [7, 0, 7], [2, 3, 4], [9, 9]):
        cu_seqlens = torch.tensor(bad)
        total = segment_sum(values, cu_seqlens)
        segment_expand(total, values, cu_seqlens).sum().backward()
        assert total.isfinite().all() and total.abs().max() <= values.detach().abs().sum()


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    (
        ([0, 3, 7], TypeError, "cu_seqlens must be a tensor, got list"),
        (torch.tensor([0.0, 7.0]), TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
        (torch.tensor([[0, 7]]), ValueError, r"cu_seqlens must have shape \(B \+ 1,\), got \(1, 2\)"),
        (torch.tensor(7), ValueError, r"cu_seqlens must have shape \(B \+ 1,\), got \(\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"cu_seqlens must have shape \(B \+ 1,\), got \(0,\)"),
        (torch.tensor([0, 7], device="meta"), ValueError, "cu_seqlens must be on the device of .*, cpu, got meta"),
        (torch.tensor([0]), ValueError, "cu_seqlens must end at the number of tokens of .*, 7, got no sequence"),
        (torch.tensor([1, 7]), ValueError, "cu_seqlens must start at 0, got 1"),
        (torch.tensor([0, 3, 8]), ValueError, "cu_seqlens must end at the number of tokens of .*, 7, got 8"),
        (torch.tensor([0, 5, 4, 7]), ValueError, "cu_seqlens must not decrease, got 4 after 5 at 2"),
    ),
)
def test_errors_of_cu_seqlens(cu_seqlens, error, message):
    values = random(7)
    with pytest.raises(error, match=message):
        segment_sum(values, cu_seqlens)
    with pytest.raises(error, match=message):
        segment_expand(random(1), values, cu_seqlens)
    with pytest.raises(error, match=message):
        segment_mean(values, values > 0, cu_seqlens)


def test_errors_of_the_rest():
    values = random(7)
    with pytest.raises(ValueError, match=r"values must have shape .*, got a 0-d tensor"):
        segment_sum(values[0])
    with pytest.raises(ValueError, match=r"like must have shape .*, got a 0-d tensor"):
        segment_expand(values, values[0])
    with pytest.raises(ValueError, match=r"per_sequence must hold one value per sequence, shape \(2,\), got \(3,\)"):
        segment_expand(values[:3], values, cut((3, 4)))
    with pytest.raises(ValueError, match=r"per_sequence must hold one value per sequence, shape \(\), got \(3,\)"):
        segment_expand(values[:3], values)
    with pytest.raises(ValueError, match="per_sequence must be on the device of like"):
        segment_expand(torch.empty(2, device="meta"), values, cut((3, 4)))
    with pytest.raises(TypeError, match=r"values must be a float tensor, got torch\.int64"):
        segment_mean(torch.arange(7))
    with pytest.raises(ValueError, match=r"mask must broadcast to the tokens' shape \(7,\), got \(3,\)"):
        segment_mean(values, values[:3])
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        segment_mean(values, [True] * 7)
    with pytest.raises(ValueError, match="mask must be on the device of the tokens, cpu, got meta"):
        segment_mean(values, torch.ones(7, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_cuda_is_cpu_without_waiting(lengths):
    values, per_sequence, cu_seqlens = random(sum(lengths)), random(len(lengths)), cut(lengths)
    arguments = [t.cuda() for t in (values, per_sequence, cu_seqlens)]

    def step(values, per_sequence, cu_seqlens):
        values, per_sequence = values.clone().requires_grad_(), per_sequence.clone().requires_grad_()
        mean = segment_mean(values, values > 0, cu_seqlens)
        tokens = segment_expand(per_sequence * mean, values, cu_seqlens)
        return mean, tokens, *torch.autograd.grad(tokens.square().sum(), (values, per_sequence))

    expected = step(values, per_sequence, cu_seqlens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = step(*arguments), step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, again, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got.cpu(), wanted)
