"""prime-rl: its custom losses, by import path, and the head that makes its logprobs.

    [trainer.loss]
    type = "custom"
    import_path = "fused_losses.adapters.prime_rl.ppo"

    [trainer.loss.kwargs]
    clip_high_threshold = 1.28

Made for prime-rl 0.8, whose records are known by their fields: the package is imported by :func:`install` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import fused_losses

from .. import on_logprobs
from ..head import LINE
from ..importance_weights import masked_importance_weights
from ..linear_head import LinearHead
from ._names import called, in_words
from .slots import Slot, Slots


class LossInputs(Protocol):
    """prime-rl's record of one sequence, each tensor (seq,)."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor  # bool
    loss_weights: Tensor | None


@dataclass
class LossOutputs:
    """As prime-rl reads what a loss returns."""

    loss: Tensor  # 0-d: the sum over tokens. prime-rl divides by the number of tokens of the whole batch
    metrics: dict[str, Tensor]  # 0-d each; prime-rl takes their mean over sequences


Loss = Callable[..., LossOutputs]

# what prime-rl's record says, or what a record of one sequence has no room for
_TAKEN = {
    **dict.fromkeys(("logprobs", "old_logprobs", "advantages", "weights", "ref_logprobs"), "prime-rl's record has it"),
    **dict.fromkeys(("reduction", "denominator"), "prime-rl sums, and divides by the tokens of the whole batch"),
    **dict.fromkeys(("entropy", "entropy_coef"), "prime-rl's record has no entropy with a gradient"),
    **dict.fromkeys(("cu_seqlens", "sequence_ratio_mask"), "prime-rl's record is one sequence, with its own mask"),
    "importance_weights": "it is a tensor, which a configuration file does not hold",
    "return_outputs": "the metrics are always returned",
}


_OF_INPUTS = {"logprobs": "trainer_logprobs", "old_logprobs": "inference_logprobs", "weights": "loss_weights"}


def _loss(name: str) -> Loss:
    function = getattr(on_logprobs, name)
    known = [key for key in inspect.signature(function).parameters if key not in _TAKEN]

    def loss(inputs: LossInputs, **options: Any) -> LossOutputs:
        for key in options:
            if key not in known:
                why = f": {_TAKEN[key]}" if key in _TAKEN else ""
                raise ValueError(f"trainer.loss.kwargs of {name} takes {', '.join(known)}, got {key}{why}")
        with called(_OF_INPUTS):
            value, outputs = function(
                inputs.trainer_logprobs,
                inputs.inference_logprobs,
                inputs.advantages,
                ref_logprobs=inputs.ref_logprobs,
                weights=_weights(inputs),
                reduction="sum",
                return_outputs=True,
                **options,
            )
        return LossOutputs(value, outputs.metrics)

    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = (
        f"``fused_losses.on_logprobs.{name}`` of one sequence, summed. Keywords: {', '.join(known)}.\n\n"
        "    Raises:\n        ValueError: a keyword that is not one of these, with the reason where there is one.\n    "
    )
    return loss


importance_sampling = _loss("importance_sampling")
ppo = _loss("ppo")
cispo = _loss("cispo")
dro = _loss("dro")
sapo = _loss("sapo")
gspo = _loss("gspo")
gmpo = _loss("gmpo")
dppo_tv = _loss("dppo_tv")
dppo_kl = _loss("dppo_kl")
vespo = _loss("vespo")


@in_words(_OF_INPUTS | {"ref_logprobs": "inference_logprobs", "importance_weights": "adv_tau", "kl_coef": "2 * kl_tau"})
def ipo(inputs: LossInputs, *, eps: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3) -> LossOutputs:
    """prime-rl's own default loss, with its numbers and metrics:

        -adv_tau A r where |p - q| <= eps, + kl_tau (log r)^2 everywhere

    with r = p / q of the trainer's and the sampler's probability. A masked token is 0 whatever it holds; prime-rl's own
    is NaN where a masked logprob is not finite.
    """
    probability, sampled = inputs.trainer_logprobs.detach().exp(), inputs.inference_logprobs.exp()
    moved = (probability - sampled).abs() > eps
    value = on_logprobs.importance_sampling(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        inputs.advantages,
        importance_weights=torch.where(moved, 0.0, adv_tau),
        ref_logprobs=inputs.inference_logprobs,
        kl_coef=2 * kl_tau,
        kl_type="k2",  # half the square
        weights=_weights(inputs),
        reduction="sum",
    )
    return LossOutputs(value, _mismatch(inputs, moved))


@in_words(_OF_INPUTS | {"sampler_logprobs": "inference_logprobs", "low": "ratio_low", "high": "ratio_high"})
def icepop(inputs: LossInputs, *, ratio_low: float, ratio_high: float, adv_tau: float = 1.0) -> LossOutputs:
    """``-adv_tau A r`` where the ratio r of trainer and sampler is within [ratio_low, ratio_high], else 0."""
    trainer_logprobs = inputs.trainer_logprobs.detach()
    kept = masked_importance_weights(trainer_logprobs, inputs.inference_logprobs, low=ratio_low, high=ratio_high)
    outside = kept == 0
    value = on_logprobs.importance_sampling(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        inputs.advantages,
        importance_weights=torch.where(outside, 0.0, adv_tau),
        weights=_weights(inputs),
        reduction="sum",
    )
    return LossOutputs(value, _mismatch(inputs, outside))


def _weights(inputs: LossInputs) -> Tensor:
    """0 where the mask is, whatever the weight is there."""
    weights = 1.0 if inputs.loss_weights is None else inputs.loss_weights
    return torch.where(inputs.loss_mask, weights, 0.0)


def _mismatch(inputs: LossInputs, rejected: Tensor) -> dict[str, Tensor]:
    """prime-rl's metrics of a trust region."""
    log_ratio = inputs.trainer_logprobs.detach() - inputs.inference_logprobs
    mismatch = log_ratio.exp() - log_ratio - 1

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

    mask = inputs.loss_mask
    return {
        "masked_mismatch_kl": mean(mismatch, mask & rejected),
        "unmasked_mismatch_kl": mean(mismatch, mask & ~rejected),
        "is_masked": mean(rejected.float(), mask),
    }


# ---- The head ----

_MANY = 2048  # tokens of a chunk, at which LinearHead's own choice is no smaller


@in_words({"hidden": "hidden_states", "target_tokens": "labels", "chunk_bytes": "the bytes of chunk_size tokens"})
def fused_output_linear(
    self: Any,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | None = None,
    **others: Any,
) -> dict[str, Tensor]:
    """``FusedOutputLinear.forward``: the logprobs of labels and the entropies, of logits that never exist as a whole.

    Args:
        self: a Linear without a bias, with ``chunk_size`` tokens to a tile, and ``softcap`` where it is Gemma's. Here
            so many tokens are a chunk, of all classes; from 2048 on as many as :class:`LinearHead` takes by itself.
            Fewer, to take a tile's memory, would read the weight and its gradient more often than prime-rl does.
        hidden_states: (b, s, H).
        labels: (b, s). None: the logits are returned, as of a Linear.
        temperature: (b, s), by which logits are divided; needed with labels.

    Returns:
        ``{"logprobs": (b, s), "entropy": (b, s)}``, float32, or ``{"logits": (b, s, V)}``. Both have a gradient; in
        prime-rl that of the entropy is an error.

    Raises:
        ValueError: another argument is given, as ``sampling_mask``: a softmax over the kept tokens is not supported.
    """
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} of FusedOutputLinear.forward is not supported by fused_losses")
    softcap = getattr(self, "softcap", None)
    if labels is None:
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        return {"logits": logits if softcap is None else softcap * torch.tanh(logits / softcap)}
    if temperature is None:
        raise ValueError("temperature of FusedOutputLinear.forward must be given with labels, one per token")
    of_tokens = self.chunk_size * (self.weight.shape[0] * hidden_states.element_size() + LINE)
    head = LinearHead(hidden_states, self.weight, chunk_bytes=of_tokens if self.chunk_size < _MANY else None)
    logprobs, entropy = fused_losses.logprobs(
        head, labels, return_entropy=True, temperature=temperature, softcap=softcap
    )
    return {"logprobs": logprobs, "entropy": entropy}


_slots = Slots(
    "prime-rl",
    "0.8.0",
    {
        Slot("prime_rl.trainer.models.layers.lm_head", "FusedOutputLinear.forward"): fused_output_linear,
        Slot("prime_rl.trainer.models.layers.lm_head_gemma", "GemmaFusedOutputLinear.forward"): fused_output_linear,
    },
)


def install() -> None:
    """Let prime-rl's chunked heads be this one, Gemma's too (``trainer.model.fused_lm_head_token_chunk_size``).

    Raises:
        ImportError: prime-rl is not installed.
        RuntimeError: a slot is not where it was; the message names it and the version.
    """
    _slots.install()


def remove() -> None:
    """Put prime-rl's own back. Without an installation it changes nothing."""
    _slots.remove()
