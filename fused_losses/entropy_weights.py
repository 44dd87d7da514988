"""Weights that a token gets by how unsure the model is of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .head import Head
from .linear_head import LinearHead
from .problem import How


@torch.no_grad()
def entropy_weights(logits: Tensor | LinearHead, *, alpha: float = 1.0, top_k: int = 20) -> Tensor:
    """Entropy-adaptive fine-tuning (EAFT): ``H^alpha``, H being the entropy of the ``top_k`` likeliest tokens alone.

    With l the ``top_k`` largest logits of a row and s = softmax(l), ``H = -sum_i s_i log s_i``: 0 for a token that the
    model is sure of, log(top_k) at most. As ``weights`` of :func:`cross_entropy`, with the number of tokens as its
    ``denominator``, they give Axolotl's ``use_eaft``. Divide by ``log(top_k)^alpha`` for weights of at most 1. Diao et
    al., "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting", 2026,
    https://arxiv.org/abs/2601.02151.

    The entropy of all tokens is what ``logprobs(..., return_entropy=True)`` returns, from one read that also serves the
    logprobs; this reads the logits once more, and keeps ``top_k`` numbers of a row.

    Args:
        logits: (..., V) float32, bfloat16 or float16; or a :class:`LinearHead` that is not sharded, whose logits are
            made a chunk at a time.
        alpha: number >= 0 and finite. 0 makes every weight 1, also of a row that holds NaN.
        top_k: int >= 1; all V tokens where there are no more.

    Returns:
        (...) float32, a constant. NaN for a row that holds NaN or +inf or whose ``top_k`` logits are all -inf; others
        at -inf have probability 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value; the message names it.
    """
    alpha = checks.number("alpha", alpha)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    if checks.index("top_k", top_k) < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not isinstance(logits, LinearHead):
        logits = checks.dense("logits", logits, checks.LOGITS_DTYPES)
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"logits must have shape (..., V) with V > 0, got {tuple(logits.shape)}")
        return _entropy(logits, top_k) ** alpha
    head = logits.checked()
    if head.vocab_size is not None:
        raise TypeError("logits must be whole, got a LinearHead that is sharded: its top_k are those of no rank")
    source = head.source(How())
    assert isinstance(source, Head)
    source = source._replace(skip_masked=False)
    parts = [_entropy(chunk, top_k) for chunk in source.each_chunk(head.inputs)]
    entropy = torch.cat(parts) if parts else torch.zeros(0, device=head.device)
    return entropy.view(head.shape[:-1]) ** alpha


def _entropy(logits: Tensor, top_k: int) -> Tensor:
    # of a sure token most of it is in 1 - p, which float32 loses
    largest = logits.topk(min(top_k, logits.shape[-1]), -1).values.double()
    entropy: Tensor = torch.special.entr(largest.softmax(-1)).sum(-1).float()
    return entropy
