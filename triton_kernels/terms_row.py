"""A row with anything beside its objective: several targets, a softcap, entropy, KL, smoothed labels, z-loss."""

import triton
import triton.language as tl

from .records import Evaluated
from .rows import LN2
from .softmax import softmax_of_row
from .targets import over_targets
from .terms import Seen, terms_loss


@triton.jit
def row_seen(softmax, logp, whole, z_max, drift, vocab, ROW: tl.constexpr):
    """z_max; drift: sum_j z_j - M over all elements; vocab: the number of classes."""
    entropy = tl.zeros_like(logp)
    if ROW.entropy:
        entropy = softmax.log_total - softmax.mean
    spread = softmax.lead + softmax.log_total - drift / vocab
    return Seen(logp, whole, z_max + softmax.log_total, entropy, spread)


@triton.jit
def evaluate_terms(
    distance,  # z_t - M of each target
    given,
    share,
    sums,
    z_max,
    active,
    weight,
    denominator,
    inputs,
    terms,
    vocab,
    OBJECTIVE: tl.constexpr,
    ROW: tl.constexpr,
):
    softmax, target = softmax_of_row(distance, sums.sum, sums.moment * LN2, ROW)
    logp = tl.where(given, target.logp, 0.0)
    x = over_targets(tl.where(share != 0, share * logp, 0.0), ROW)
    whole = over_targets(share, ROW)
    seen = row_seen(softmax, x, whole, z_max, sums.drift * LN2, vocab, ROW)
    loss, by = terms_loss(seen, active, weight, denominator, inputs, terms, vocab, OBJECTIVE, ROW)
    return Evaluated(loss, by, logp, seen.entropy, whole, softmax, target)
