"""EAFT's weights: the entropy of a row's largest logits, against a loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_losses import LinearHead, entropy_weights

SHAPE, VOCAB = (3, 5), 29


def by_hand(logits: Tensor, alpha: float, top_k: int) -> Tensor:
    weights = []
    for row in logits.double().view(-1, logits.shape[-1]).tolist():
        largest = sorted(row, reverse=True)[:top_k]
        total = math.fsum(math.exp(z - largest[0]) for z in largest)
        p = [math.exp(z - largest[0]) / total for z in largest]
        weights.append((-math.fsum(x * math.log(x) for x in p if x > 0)) ** alpha)
    return torch.tensor(weights).view(logits.shape[:-1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("alpha", "top_k"), ((1.0, 20), (2.0, 3), (0.5, 29), (1.0, 1000), (0.0, 5), (1.0, 1)))
def test_values(dtype, alpha, top_k):
    torch.manual_seed(0)
    logits = (3 * torch.randn(*SHAPE, VOCAB)).to(dtype).requires_grad_()
    weights = entropy_weights(logits, alpha=alpha, top_k=top_k)
    assert weights.dtype is torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights, by_hand(logits.detach(), alpha, top_k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip_masked", (False, True))
@pytest.mark.parametrize("chunk_bytes", (None, 1, 1000))
@pytest.mark.parametrize("bias", (False, True))
def test_of_a_head(bias, chunk_bytes, skip_masked):
    """Chunk by chunk what the whole logits give."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(*SHAPE, 8), torch.randn(VOCAB, 8, requires_grad=True)
    offset = torch.randn(VOCAB) if bias else None
    head = LinearHead(hidden, weight, offset, chunk_bytes=chunk_bytes, skip_masked=skip_masked)
    whole = entropy_weights(torch.nn.functional.linear(hidden, weight, offset))
    torch.testing.assert_close(entropy_weights(head), whole, rtol=1e-5, atol=1e-6)
    nothing = LinearHead(hidden[:0], weight, offset, chunk_bytes=chunk_bytes)
    assert entropy_weights(nothing).shape == (0, 5)


def test_a_chunk_is_all_that_a_head_makes():
    """128 chunks of 16 tokens: never logits of them all."""
    hidden, weight = torch.randn(2048, 8), torch.randn(4096, 8)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            made.extend(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor))
            return out

    with Watch():
        entropy_weights(LinearHead(hidden, weight, chunk_bytes=16 * 4096 * 4 + 16 * 128))
    assert max(made) <= 16 * (4096 + 32)


def test_hazards():
    """A logit of -inf has probability 0; NaN and +inf stay in their row, and so does a row of nothing."""
    logits = torch.zeros(5, 4)
    logits[0, 1:] = -math.inf
    logits[1, 2:] = -math.inf
    logits[2, 0], logits[3, 0] = math.nan, math.inf
    logits[4] = -math.inf
    weights = entropy_weights(logits)
    torch.testing.assert_close(weights[:2], torch.tensor([0.0, math.log(2.0)]))
    assert weights[2:].isnan().all()
    assert entropy_weights(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    (
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite, got -1"),
        ({"alpha": float("inf")}, ValueError, "alpha must be at least 0 and finite, got inf"),
        ({"alpha": None}, TypeError, "alpha must be a number, got NoneType"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer, got float"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must have shape \(..., V\) with V > 0, got \(\)"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"logits must have shape \(..., V\) with V > 0, got \(3, 0\)"),
        ({"logits": torch.zeros(3, 4).long()}, TypeError, "logits must be float32, bfloat16 or float16"),
    ),
)
def test_errors(keywords, error, message):
    with pytest.raises(error, match=message):
        entropy_weights(**{"logits": torch.zeros(3, 4)} | keywords)


@pytest.mark.parametrize("lead", [1.0, 18.0, 40.0])
def test_sure_tokens_keep_their_digits(lead):
    logits = torch.tensor([lead, 0.0, 0.0])
    rest = 2 * math.exp(-lead) / (1 + 2 * math.exp(-lead))  # 1 - p
    entropy = -(1 - rest) * math.log1p(-rest) - rest * math.log(rest / 2)
    assert entropy_weights(logits).item() == pytest.approx(entropy, rel=1e-6)
