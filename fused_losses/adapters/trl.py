"""TRL: the fused head that SFT, GRPO, RLOO, DPO and KTO take their logprobs from, and TRL's functions on logits.

    from fused_losses.adapters import trl

    trl.install()  # and trl.remove()

What goes in has TRL's signatures. The trainers keep their losses: they get logprobs and statistics from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import fused_losses

from ..linear_head import LinearHead
from ._names import in_words
from .slots import Slot, Slots

OUTPUTS: dict[str, Literal["logprobs", "entropy", "log_sum_squares", "mean_logit", "top1"]] = {  # TRL's name: ours
    "log_probs": "logprobs",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_squares",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}
_BYTES_PER_COLUMN = 4096 * 4  # TRL's tiles are 4096 tokens by chunk_size classes; of float32
_SKIPPED = -(2**31)  # an index that nobody gives, as -100 would be an error of the caller's in TRL
_OF_HEAD = {
    "target_tokens": "targets",
    "softcap": "final_logit_softcapping",
    "chunk_bytes": f"{_BYTES_PER_COLUMN} * chunk_size",
}
_OF_LOGITS = {"target_tokens": "index"}
_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALVES)


class ChunkedLogProb:
    """What stands in for ``trl.kernels.ChunkedLogProbFunction``: its ``apply``."""

    def __init__(self, logits_dtype: torch.dtype | None = None):
        """logits_dtype: as of :class:`fused_losses.LinearHead`."""
        self.logits_dtype = logits_dtype

    @in_words(_OF_HEAD)
    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(OUTPUTS),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of the logits of a head, which are not kept.

        Args:
            hidden: (N, H) float32, bfloat16 or float16, on a CPU or a CUDA device. Products are of its dtype, under
                autocast of autocast's.
            weight, bias: (V, H) and (V,) or None, of any of these dtypes. Under ZeRO-3 gathered, as TRL calls it;
                backward gathers them again.
            targets: (N,) int64 or int32; -100 gives zeros.
            chunk_size: in TRL the width of its tiles of 4096 tokens. Here the same memory, of float32: whole rows of
                at most ``4096 * 4 * chunk_size`` bytes at a time.
            outputs: names of those to compute; log_probs always are. The others are None.

        Returns:
            (N,) each, float32 and bool; log_probs and entropy are differentiable.

        Raises:
            ValueError, TypeError: a device, dtype (a quantised weight is one), name or number that is not one of these;
                the message names the argument.
        """
        if unknown := [name for name in outputs if name not in OUTPUTS]:
            raise ValueError(f"outputs must be some of {', '.join(OUTPUTS)}, got {', '.join(map(repr, unknown))}")
        _check_device("hidden", hidden.device)
        products, (weight, bias) = _dtypes_joined(hidden, weight, bias)
        head = LinearHead(
            hidden,
            weight,
            bias,
            chunk_bytes=_BYTES_PER_COLUMN * chunk_size,
            logits_dtype=self.logits_dtype,
            skip_masked=hidden.is_cpu,  # where TRL has the masked tokens in, with no gradient; and where nobody waits
        )
        with products, _gathered_in_backward(weight, bias):
            seen = fused_losses.statistics(
                head,
                targets,
                outputs=("logprobs", *(OUTPUTS[name] for name in outputs if name != "log_probs")),
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
            )
        return cast(Tensor, seen.logprobs), seen.entropy, seen.log_sum_squares, seen.mean_logit, seen.top1


@in_words(_OF_LOGITS)
def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """``trl.trainer.utils.selective_log_softmax``: the logprobs at ``index`` of ``logits / temperature``.

    Args:
        logits: (..., V) float32, bfloat16 or float16, on a CPU or a CUDA device.
        index: (...) or (..., K), int64 or int32.
        row_mask: of index's shape; where it is 0 nothing is read, and the result is 0.

    Returns:
        of index's shape, float32, differentiable. TRL's own is of the logits' dtype where it is not of its kernel.

    Raises:
        ValueError, TypeError: a device, dtype, shape or number that is not one of these; on a CPU an index outside
            [0, V) is one, elsewhere it gives NaN.
    """
    _check_device("logits", logits.device)
    index = _masked(index, row_mask)
    if index.dim() == logits.dim():
        return _LogprobsOfSeveral.apply(logits, index, temperature)  # type: ignore[no-untyped-call, no-any-return]
    return fused_losses.logprobs(logits, index, temperature=temperature, ignore_index=_SKIPPED)


@in_words(_OF_LOGITS)
def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``trl.trainer.utils.selective_log_softmax_and_entropy``: the logprobs at index (...), and each row's entropy.

    Both are float32, and 0 where ``row_mask`` is. The entropy has a gradient where ``entropy_requires_grad``. Raises as
    :func:`selective_log_softmax` does, and for an index (..., K).
    """
    _check_device("logits", logits.device)
    if index.shape != logits.shape[:-1]:
        raise ValueError(
            f"index must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}, got "
            f"{tuple(index.shape)}"
        )
    logprobs, entropy = fused_losses.logprobs(
        logits, _masked(index, row_mask), return_entropy=True, temperature=temperature, ignore_index=_SKIPPED
    )
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


_FORWARD = Slot(  # by what TRL calls apply with
    "trl.kernels.chunked_logprob",
    "ChunkedLogProbFunction.forward",
    (
        "ctx",
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
)
_installed: Slots | None = None


def _slots(head: ChunkedLogProb) -> Slots:
    return Slots(
        "trl",
        "1.16.0",
        {
            Slot("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"): head,
            Slot("trl.kernels", "ChunkedLogProbFunction"): head,
            Slot("trl.trainer.utils", "_ChunkedLogProbFunction"): head,
            Slot(
                "trl.trainer.utils",
                "selective_log_softmax",
                ("logits", "index", "temperature", "row_mask"),
            ): selective_log_softmax,
            Slot(
                "trl.trainer.utils",
                "selective_log_softmax_and_entropy",
                ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
            ): selective_log_softmax_and_entropy,
        },
    )


def install(*, logits_dtype: torch.dtype | None = None) -> None:
    """Put all of it into TRL: into the modules that have it, and into those that imported it by name.

    A second call installs anew, with its own ``logits_dtype``.

    Args:
        logits_dtype: float32: the head's logits of 16-bit products are not rounded to 16 bits. None: as TRL has them.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a slot moved; the message names it and TRL's version.
    """
    global _installed
    if logits_dtype not in (None, torch.float32):
        raise TypeError(f"logits_dtype must be None or float32, got {logits_dtype}")
    remove()
    slots = _slots(ChunkedLogProb(logits_dtype))
    slots.found(_FORWARD)
    slots.install()
    _installed = slots


def remove() -> None:
    """Put TRL's own back, also in modules that were imported meanwhile. Without an installation nothing happens.

    Raises:
        RuntimeError: somebody else has replaced a slot since; nothing is put back.
    """
    global _installed
    if _installed is None:
        return
    _installed.remove()
    _installed = None


class _LogprobsOfSeveral(torch.autograd.Function):
    """apply(logits, index (..., K), temperature) -> (..., K): what flows back are weights of a cross entropy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, index)
        ctx.temperature = temperature
        _, outputs = fused_losses.cross_entropy(
            logits, index, temperature=temperature, ignore_index=_SKIPPED, reduction="sum", return_outputs=True
        )
        return outputs.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, index = ctx.saved_tensors
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            fused_losses.cross_entropy(
                leaf, index, weights=-upstream, temperature=ctx.temperature, ignore_index=_SKIPPED, reduction="sum"
            ).backward()
        return leaf.grad, None, None


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    if row_mask is None:
        return index
    if row_mask.shape != index.shape:
        raise ValueError(f"row_mask must have the shape of index, {tuple(index.shape)}, got {tuple(row_mask.shape)}")
    return index.masked_fill(row_mask == 0, _SKIPPED)


def _check_device(name: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{name} must be on a CPU or a CUDA device, got {device}: for others TRL's own code is the faster one; "
            "fused_losses.adapters.trl.remove() puts it back"
        )


def _dtypes_joined(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[AbstractContextManager[Any], tuple[Tensor, Tensor | None]]:
    """The context to call in, and weight and bias, so that products are of hidden's dtype whatever theirs is."""
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if autocast or weight.dtype is hidden.dtype or weight.dtype not in _DTYPES:  # a quantised one the head refuses
        return nullcontext(), (weight, bias)
    if hidden.dtype in _HALVES:  # the gradient of a float32 weight is then not rounded to 16 bits
        return torch.autocast(hidden.device.type, dtype=hidden.dtype), (weight, bias)
    return nullcontext(), (weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _gathered_in_backward(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """What is kept for backward of parameters that ZeRO-3 shards again after forward: themselves, gathered anew."""
    if not any(hasattr(parameter, "ds_status") for parameter in parameters):
        return nullcontext()

    def gathered(kept: Tensor) -> Tensor:
        if not hasattr(kept, "ds_status"):
            return kept
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        with maybe_gather_lm_head_ctx(cast(Any, kept)):
            return kept.detach().clone()

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, gathered)
