"""Every reduction against its framework's formula, written in loops here; test_oracles.py has the published code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses import aggregation
from fused_losses.aggregation import Aggregation

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
LOSSES = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = [[x for x, m in zip(r, k, strict=True) if m] for r, k in zip(LOSSES.tolist(), MASK.tolist(), strict=True)]
TOKENS, SEQUENCES, NONEMPTY = 9, 4, 3
TOTAL = sum(map(sum, ROWS))
MEANS = sum(sum(r) / max(len(r), 1) for r in ROWS)

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "trl grpo": ("trl", {"loss_type": "grpo"}, MEANS / SEQUENCES),
    "trl sapo": ("trl", {"loss_type": "sapo"}, MEANS / SEQUENCES),
    "trl luspo": ("trl", {"loss_type": "luspo"}, TOTAL / SEQUENCES),
    "trl bnpo": ("trl", {"loss_type": "bnpo"}, TOTAL / TOKENS),
    "trl dr_grpo": ("trl", {"loss_type": "dr_grpo", "max_completion_length": 7}, TOTAL / (SEQUENCES * 7)),
    "trl dapo": ("trl", {"loss_type": "dapo", "num_items_in_batch": 50, "num_processes": 2}, TOTAL / 25),
    "trl cispo": ("trl", {"loss_type": "cispo", "num_items_in_batch": torch.tensor(50)}, TOTAL / 50),
    "trl vespo": (
        "trl",
        {
            "loss_type": "vespo",
            "num_items_in_batch": 50,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
        },
        TOTAL / 25,
    ),
    "trl grpo accumulated": ("trl", {"loss_type": "grpo", "gradient_accumulation_steps": 8}, MEANS / SEQUENCES / 8),
    "trl bnpo accumulated": ("trl", {"loss_type": "bnpo", "gradient_accumulation_steps": 8}, TOTAL / TOKENS / 8),
    "trl dr_grpo accumulated": (
        "trl",
        {"loss_type": "dr_grpo", "max_completion_length": 7, "gradient_accumulation_steps": 8},
        TOTAL / (SEQUENCES * 7) / 8,
    ),
    "verl token-mean": ("verl", {"loss_agg_mode": "token-mean"}, TOTAL / TOKENS),
    "verl token-mean of ranks": (
        "verl",
        {"loss_agg_mode": "token-mean", "dp_size": 4, "batch_num_tokens": torch.tensor(30)},
        TOTAL / 30 * 4,
    ),
    "verl token-sum": ("verl", {"loss_agg_mode": "token-sum", "dp_size": 4}, TOTAL * 4),
    "verl seq-mean-token-sum": ("verl", {"loss_agg_mode": "seq-mean-token-sum"}, TOTAL / NONEMPTY),
    "verl seq-mean-token-mean": ("verl", {"loss_agg_mode": "seq-mean-token-mean"}, MEANS / NONEMPTY),
    "verl seq-mean-token-mean of ranks": (
        "verl",
        {"loss_agg_mode": "seq-mean-token-mean", "dp_size": 4, "global_batch_size": 16},
        MEANS / 16 * 4,
    ),
    "verl seq-mean-token-sum-norm": (
        "verl",
        {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 100},
        TOTAL / NONEMPTY / 100,
    ),
    "skyrl token_mean": ("skyrl", {"loss_reduction": "token_mean"}, TOTAL / TOKENS),
    "skyrl sequence_mean": ("skyrl", {"loss_reduction": "sequence_mean"}, MEANS / SEQUENCES),
    "skyrl seq_mean_token_sum_norm": (
        "skyrl",
        {"loss_reduction": "seq_mean_token_sum_norm", "max_seq_len": 9},
        TOTAL / (SEQUENCES * 9),
    ),
    "dr_grpo": ("dr_grpo", {"max_completion_length": 7}, TOTAL / (SEQUENCES * 7)),
}


def reduced(a: Aggregation, losses: Tensor) -> float:
    return float((a.weights.double() * losses).sum() / a.denominator)


def packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same sequences one after the other, without what follows their last active token."""
    lengths = [max((i + 1 for i, m in enumerate(row) if m), default=0) for row in mask.tolist()]
    return torch.cat([r[:n] for r, n in zip(mask, lengths, strict=True)]), torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.float32))
@pytest.mark.parametrize("name", CASES)
def test_padded(name, dtype):
    function, keywords, expected = CASES[name]
    mask = MASK.to(dtype)
    a = getattr(aggregation, function)(mask, **keywords)
    assert a.weights.dtype == torch.float32 and a.weights.shape == MASK.shape
    assert a.weights[MASK == 0].count_nonzero() == 0
    assert reduced(a, LOSSES) == pytest.approx(expected, rel=1e-6)
    if isinstance(a.denominator, Tensor):  # a form that the losses take
        assert a.denominator.dim() == 0 and a.denominator.dtype == torch.float32


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("name", CASES)
def test_packed(name, index):
    function, keywords, expected = CASES[name]
    mask, cu_seqlens = packed(MASK)
    losses = torch.cat([r[:n] for r, n in zip(LOSSES, cu_seqlens.diff().tolist(), strict=True)])
    for shape in (mask.shape, (1, *mask.shape)):
        a = getattr(aggregation, function)(mask.view(shape), **keywords, cu_seqlens=cu_seqlens.to(index))
        assert a.weights.shape == shape
        assert reduced(a, losses.view(shape)) == pytest.approx(expected, rel=1e-6)


def test_verl_norm_scales_by_the_last_dimension():
    a = aggregation.verl(MASK, "seq-mean-token-sum-norm")
    assert reduced(a, LOSSES) == pytest.approx(TOTAL / NONEMPTY / 5, rel=1e-6)


def test_a_mask_selects():
    """It is not a weight: what is not 0 is 1."""
    for other in (MASK * 3, -MASK, MASK * 0.5, MASK.to(torch.uint8)):
        for function, keywords, _ in CASES.values():
            expected = getattr(aggregation, function)(MASK, **keywords)
            got = getattr(aggregation, function)(other, **keywords)
            assert torch.equal(got.weights, expected.weights) and got.denominator == expected.denominator


@pytest.mark.parametrize("shape", ((2, 3), (0, 3), (2, 0)))
@pytest.mark.parametrize("name", CASES)
def test_no_active_token_is_zero_not_nan(name, shape):
    function, keywords, _ = CASES[name]
    empty = {"num_items_in_batch": 0, "batch_num_tokens": torch.tensor(0), "global_batch_size": 0}
    keywords = keywords | {k: v for k, v in empty.items() if k in keywords}
    a = getattr(aggregation, function)(torch.zeros(shape), **keywords)
    assert reduced(a, torch.ones(shape)) == 0.0
    flat = torch.zeros(0), torch.tensor([0, 0, 0])
    a = getattr(aggregation, function)(flat[0], **keywords, cu_seqlens=flat[1])
    assert reduced(a, flat[0]) == 0.0


def test_micro_batches_add_up():
    """The weights of a mini-batch, cut with its tokens; and counts of the whole batch, given to each part."""
    whole = aggregation.skyrl(MASK, "sequence_mean")
    parts = [Aggregation(whole.weights[i : i + 2], whole.denominator) for i in (0, 2)]
    assert sum(reduced(a, LOSSES[i : i + 2]) for a, i in zip(parts, (0, 2), strict=True)) == pytest.approx(MEANS / 4)
    for mode, given, expected in (
        ("token-mean", {"batch_num_tokens": TOKENS}, TOTAL / TOKENS),
        ("seq-mean-token-mean", {"global_batch_size": NONEMPTY}, MEANS / NONEMPTY),
    ):
        ranks = [
            reduced(aggregation.verl(MASK[i : i + 2], mode, dp_size=2, **given), LOSSES[i : i + 2]) for i in (0, 2)
        ]
        assert sum(ranks) / 2 == pytest.approx(expected)  # data parallelism averages gradients


def test_a_loss_takes_them():
    fused_losses = pytest.importorskip("fused_losses")
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.zeros(4, 5, dtype=torch.int64)
    for function, keywords, _ in CASES.values():
        a = getattr(aggregation, function)(MASK, **keywords)
        loss = fused_losses.cross_entropy(
            logits, targets, weights=a.weights, denominator=a.denominator, backend="eager"
        )
        losses = -logits.detach().double().log_softmax(-1)[..., 0]
        assert loss.item() == pytest.approx(reduced(a, losses), rel=1e-5)


def test_compile():
    def step(mask, cu_seqlens, items):
        parts = (
            aggregation.trl(mask, "grpo", cu_seqlens=cu_seqlens),
            aggregation.trl(mask, "dapo", num_items_in_batch=items),
            aggregation.verl(mask, "seq-mean-token-mean", cu_seqlens=cu_seqlens),
            aggregation.skyrl(mask, "token_mean"),
        )
        return sum(a.weights / a.denominator for a in parts)

    mask, cu_seqlens = packed(MASK)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mask, cu_seqlens, torch.tensor(50)), step(mask, cu_seqlens, torch.tensor(50)))


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "error", "message"),
    (
        ("trl", ["ppo"], {}, ValueError, r"loss_type must be one of \('grpo', 'bnpo', .*\), got 'ppo'"),
        ("verl", ["mean"], {}, ValueError, r"loss_agg_mode must be one of \('token-mean', .*\), got 'mean'"),
        ("skyrl", [None], {}, ValueError, r"loss_reduction must be one of \('token_mean', .*\), got None"),
        ("trl", ["dr_grpo"], {}, ValueError, "dr_grpo needs max_completion_length, got None"),
        ("trl", ["dapo"], {}, ValueError, "dapo needs num_items_in_batch, got None"),
        ("skyrl", ["seq_mean_token_sum_norm"], {}, ValueError, "seq_mean_token_sum_norm needs max_seq_len, got None"),
        ("verl", ["token-mean"], {"dp_size": 2}, ValueError, "batch_num_tokens is needed with dp_size > 1"),
        ("verl", ["seq-mean-token-sum"], {"dp_size": 2}, ValueError, "global_batch_size is needed with dp_size > 1"),
        ("dr_grpo", [0], {}, ValueError, "max_completion_length must be greater than 0, got 0"),
        ("dr_grpo", [torch.tensor(5)], {}, TypeError, "max_completion_length must be a number, got a tensor"),
        ("dr_grpo", ["long"], {}, TypeError, "max_completion_length must be a number, got str"),
        ("verl", ["token-sum"], {"dp_size": 0}, ValueError, "dp_size must be greater than 0, got 0"),
        ("verl", ["token-sum"], {"dp_size": math.nan}, ValueError, "dp_size must not be NaN"),
        (
            "trl",
            ["dapo"],
            {"num_items_in_batch": -1},
            ValueError,
            "num_items_in_batch must be at least 0 and finite, got -1",
        ),
        (
            "trl",
            ["dapo"],
            {"num_items_in_batch": torch.ones(2)},
            ValueError,
            r"num_items_in_batch must be a number or a 0-d tensor, got shape \(2,\)",
        ),
        (
            "trl",
            ["dapo"],
            {"num_items_in_batch": torch.tensor(1, device="meta")},
            ValueError,
            "num_items_in_batch must be on the device of mask, cpu, got meta",
        ),
        (
            "trl",
            ["grpo"],
            {"cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            "cu_seqlens must end at .* of mask, 20, got 3",
        ),
    ),
)
def test_errors(function, arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        getattr(aggregation, function)(MASK, *arguments, **keywords)


def test_errors_of_the_mask():
    flat, cu_seqlens = packed(MASK)
    with pytest.raises(ValueError, match=r"seq-mean-token-sum-norm with cu_seqlens needs loss_scale_factor"):
        aggregation.verl(flat, "seq-mean-token-sum-norm", cu_seqlens=cu_seqlens)
    for function, name in (
        ("trl", "luspo"),
        ("trl", "grpo"),
        ("skyrl", "sequence_mean"),
        ("verl", "seq-mean-token-sum"),
    ):
        with pytest.raises(ValueError, match=r"mask must have shape \(\.\.\., T\)"):
            getattr(aggregation, function)(torch.tensor(1), name)
        with pytest.raises(TypeError, match="mask must be a tensor, got list"):
            getattr(aggregation, function)([1, 0], name)
        with pytest.raises(TypeError, match="cu_seqlens must be a tensor, got list"):
            getattr(aggregation, function)(flat, name, cu_seqlens=[0, 3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", CASES)
def test_cuda_without_waiting(name):
    function, keywords, expected = CASES[name]
    mask, losses = MASK.cuda(), LOSSES.cuda()
    keywords = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        a = getattr(aggregation, function)(mask, **keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reduced(a, losses) == pytest.approx(expected, rel=1e-6)
