"""OpenRLHF 0.11: its logprobs, its entropy and its PolicyLoss.

    from fused_losses.adapters import openrlhf

    openrlhf.install()  # in the process of each actor, before models are made; and openrlhf.remove()

``PolicyLoss.forward`` is replaced in the class, whose options are read and checked by its own ``__init__``.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import aggregation, losses, on_logprobs
from ._names import called, in_words
from .slots import Slot, Slots

LOG_RATIO_CLAMP = 20.0  # of PolicyLoss, where its ratio is that of a token
SURE = 1e-6  # probabilities of a divergence are at least this, and at most 1 less this

Five = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@in_words({"target_tokens": "labels"})
def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0, *, inplace: bool = False) -> Tensor:
    """``openrlhf.models.utils.log_probs_from_logits``: (...) float32, of logits (..., V), which stay as they are.

    OpenRLHF's divides the logits by the temperature in place, and its logprobs of 16-bit logits have 16 bits.

    inplace: backward writes the gradient over the logits, which nothing else may need then.
    """
    return losses.logprobs(logits, labels, temperature=temperature, inplace=inplace)


def compute_entropy(logits: Tensor) -> Tensor:
    """``openrlhf.models.utils.compute_entropy``: (...) float32, of logits (..., V)."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)  # whichever: not read
    entropy = losses.statistics(logits, targets, outputs=("entropy",)).entropy
    assert entropy is not None
    return entropy


@in_words(
    dict(
        logprobs="log_probs",
        old_logprobs="old_log_probs",
        **dict.fromkeys(("weights", "mask"), "action_mask"),
        importance_weights="rollout_log_probs",
        clip_low_threshold="1 - clip_eps_low",
        clip_high_threshold="1 + clip_eps_high",
        denominator="batch_num_tokens or global_batch_size",
    )
)
def policy_loss(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Five:
    """``openrlhf.models.loss.PolicyLoss.forward``: the loss, clip_ratio, ppo_kl, vllm_kl and is_filter_ratio.

    All of (B, T). Masked tokens have no part in anything, whatever they hold; of nothing else, loss and means are 0.

    Raises:
        ValueError: a policy_loss_type that is neither "ppo" nor "gspo", or no rollout_log_probs where they are needed.
    """
    mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
    corrected = self.is_correction_level != "off"
    if corrected and rollout_log_probs is None:
        raise ValueError(f"is_correction_level {self.is_correction_level!r} needs rollout_log_probs, got None")
    if self.token_level_loss:
        ranks = 1 if batch_num_tokens is None else dp_size  # a mean of what is here is not divided among ranks
        shares = aggregation.verl(mask, "token-mean", dp_size=ranks, batch_num_tokens=batch_num_tokens)
    else:
        ranks = 1 if global_batch_size is None else dp_size
        shares = aggregation.verl(mask, "seq-mean-token-mean", dp_size=ranks, global_batch_size=global_batch_size)
    loss = partial(
        on_logprobs.ppo if self.policy_loss_type == "ppo" else on_logprobs.gspo,
        log_probs,
        advantages=advantages,
        clip_low_threshold=max(1 - self.clip_eps_low, 0.0),
        clip_high_threshold=1 + self.clip_eps_high,
        dual_clip=self.dual_clip,
        weights=shares.weights,
        denominator=shares.denominator,
        return_outputs=True,
    )
    mismatch = filtered = None
    if self.policy_loss_type == "gspo":
        sampled = rollout_log_probs if corrected else old_log_probs
        with called({"old_logprobs": "rollout_log_probs"}) if corrected else nullcontext():
            value, outputs = loss(sampled, ratio_gradient="sequence")
    elif self.policy_loss_type == "ppo":
        importance = None
        if corrected:
            assert rollout_log_probs is not None
            importance, filtered = _correction(self, old_log_probs, rollout_log_probs, mask)
            mismatch = _mean(rollout_log_probs - old_log_probs, mask)
        value, outputs = loss(old_log_probs, log_ratio_clamp=LOG_RATIO_CLAMP, importance_weights=importance)
    else:
        raise ValueError(f'policy_loss_type must be "ppo" or "gspo", got {self.policy_loss_type!r}')
    metrics = outputs.metrics
    clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    return value, clipped, _mean(old_log_probs - log_probs.detach(), mask), mismatch, filtered


def _correction(loss: Any, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights per token for what the engine that sampled computes otherwise, and the share that is out of bounds: of
    tokens, or of sequences, of which those without a token are out."""
    low, high = loss.is_correction_threshold
    of_sequence = loss.is_correction_level == "seq"
    dtype = torch.promote_types(old_log_probs.dtype, torch.float32)
    old, rollout = (x.detach().to(dtype).where(mask, 0.0) for x in (old_log_probs, rollout_log_probs))
    log_ratio = old - rollout
    if loss.is_correction_gating == "ratio":
        seen = log_ratio
    else:
        p, q = (x.exp().clamp(SURE, 1 - SURE) for x in (rollout, old))
        if loss.is_correction_gating == "binary_kl":
            seen = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        else:
            seen = (p - q).abs()
    if of_sequence:
        seen = seen.where(mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    if loss.is_correction_gating == "ratio":
        seen = seen.exp()
    within = (seen >= low) & (seen <= high)
    ratio = log_ratio.exp()
    weights = seen.clamp(low, high) if loss.is_correction_mode == "clip" else ratio.where(within, 0.0)
    outside = (~within).float()
    return weights, outside.mean() if of_sequence else _mean(outside, mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over active tokens; 0 if there are none."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


# ---- Into OpenRLHF and out of it ----

_LOGPROBS = ("logits", "labels", "temperature")
_FORWARD = (
    *("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", "dp_size"),
    *("batch_num_tokens", "global_batch_size"),
)


def _slots(logprobs: Any) -> Slots:
    return Slots(
        "openrlhf",
        "0.11.2",
        {
            Slot("openrlhf.models.utils", "log_probs_from_logits", _LOGPROBS): logprobs,
            Slot("openrlhf.models.actor", "log_probs_from_logits", _LOGPROBS): logprobs,
            Slot("openrlhf.models.utils", "compute_entropy", ("logits",)): compute_entropy,
            Slot("openrlhf.models.actor", "compute_entropy", ("logits",)): compute_entropy,
            Slot("openrlhf.models.loss", "PolicyLoss.forward", _FORWARD): policy_loss,
        },
    )


SLOTS = {inplace: _slots(partial(log_probs_from_logits, inplace=inplace)) for inplace in (False, True)}


def install(*, inplace: bool = False) -> None:
    """Put all of it into OpenRLHF. A second call changes nothing.

    Args:
        inplace: the gradient of logprobs overwrites the logits, for actors without an entropy coefficient. With one,
            the entropy needs the logits in backward, too, and that raises.

    Raises:
        ImportError: OpenRLHF is not installed.
        RuntimeError: a slot is not where it was, or it is installed with the other ``inplace``.
    """
    if SLOTS[not inplace].originals:
        raise RuntimeError(f"openrlhf is installed with inplace={not inplace}: remove() that first")
    SLOTS[inplace].install()


def remove() -> None:
    """Put back what was there. Without an installation it changes nothing.

    Raises:
        RuntimeError: somebody else has replaced a slot since.
    """
    for slots in SLOTS.values():
        slots.remove()
