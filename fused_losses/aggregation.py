"""Other frameworks' reductions, as the ``weights`` and ``denominator`` that every loss of this library takes.

    a = aggregation.trl(mask, "grpo")
    loss = fused_losses.ppo(logits, targets, old_logprobs, advantages, weights=a.weights, denominator=a.denominator)

is ``sum_t a.weights[t] * loss[t] / a.denominator``, which is what the framework computes from its per-token losses and
its mask. With m = 1 at active tokens and 0 elsewhere, n_b the active tokens of sequence b, and B sequences:

| framework | name | weight | denominator |
|---|---|---|---|
| TRL | grpo, sapo | m / n_b | B, empty sequences included |
| TRL | luspo | m | B |
| TRL | bnpo | m | sum m |
| TRL | dr_grpo | m | B * max_completion_length |
| TRL | dapo, cispo, vespo | m | num_items_in_batch / num_processes |
| verl | token-mean | m | batch_num_tokens or sum m |
| verl | token-sum | m | 1 |
| verl | seq-mean-token-sum | m | global_batch_size or the number of sequences that are not empty |
| verl | seq-mean-token-mean | m / n_b | the same |
| verl | seq-mean-token-sum-norm | m | the same, times loss_scale_factor or T |
| SkyRL | token_mean | m / sum m | 1 |
| SkyRL | sequence_mean | m / (B n_b) | 1 |
| SkyRL | seq_mean_token_sum_norm | m / (B max_seq_len) | 1 |

verl's are then divided by dp_size. Tinker sums: ``weights=mask, reduction="sum"`` needs no helper.

Masks are (..., T), each row a sequence, or of any shape with ``cu_seqlens`` as in :mod:`fused_losses.sequences`. A mask
selects: any value but 0 is 1. Counts divided by are at least 1, so that a batch with no active token has loss 0, not
NaN. Nothing waits for the device.

The plain mean over a batch that is spread over ranks needs but its tokens' number: :func:`global_tokens`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .sequences import active_tokens, check_sequences, segment_expand, segment_sum
from .vocab_shard import process_group

TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
VERL_LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
SKYRL_LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")


class Aggregation(NamedTuple):
    """A reduction: the loss is ``sum(weights * per-token loss) / denominator``."""

    weights: Tensor  # float32 in the shape of the mask
    denominator: Tensor | float  # a number or a 0-d float32 tensor on the device of the mask


def trl(
    mask: Tensor,
    loss_type: str,
    *,
    max_completion_length: float | None = None,
    num_items_in_batch: Tensor | float | None = None,
    num_processes: int = 1,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Aggregation:
    """TRL's ``GRPOConfig.loss_type``, as in ``GRPOTrainer._compute_loss`` of TRL 1.16.

    It covers the loss type's policy and KL terms. TRL's entropy bonus is a mean over active tokens for every type.

    Args:
        mask: ``completion_mask`` (times ``tool_mask``) of the micro-batch.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: of the config; "dr_grpo" needs it.
        num_items_in_batch: active tokens of the generation batch over all processes, a number or 0-d tensor; "dapo",
            "cispo" and "vespo" need it.
        num_processes: data-parallel processes, over which gradients are averaged; for the same three.
        gradient_accumulation_steps: micro-batches per optimizer step, over which the loss is averaged; 1 in evaluation.
        steps_per_generation: micro-batches that the generation batch is split into; for the same three. Usually equal
            to ``gradient_accumulation_steps``. 1 in evaluation.
        cu_seqlens: as in :mod:`fused_losses.sequences`. Default None.

    Returns:
        The :class:`Aggregation`.

    Raises:
        TypeError, ValueError: an argument is missing or has the wrong type, shape, device or value; the message names
            it.
    """
    _check(mask, cu_seqlens)
    accumulation = _positive("gradient_accumulation_steps", gradient_accumulation_steps)
    if loss_type in ("grpo", "sapo"):
        weights = _per_sequence_mean(mask, cu_seqlens)
        denominator: Tensor | float = _sequences(mask, cu_seqlens)
    elif loss_type == "luspo":
        weights, denominator = _weights(mask), _sequences(mask, cu_seqlens)
    elif loss_type == "bnpo":
        weights = _weights(mask)
        denominator = _tokens(weights)
    elif loss_type == "dr_grpo":
        length = _given("max_completion_length", max_completion_length, loss_type)
        return _divided(dr_grpo(mask, length, cu_seqlens=cu_seqlens), 1 / accumulation)
    elif loss_type in ("dapo", "cispo", "vespo"):
        weights = _weights(mask)
        items = _count("num_items_in_batch", _given("num_items_in_batch", num_items_in_batch, loss_type), mask)
        split = _positive("num_processes", num_processes)
        denominator = items / (split * _positive("steps_per_generation", steps_per_generation))
    else:
        _unknown("loss_type", loss_type, TRL_LOSS_TYPES)
    return _divided(Aggregation(weights, denominator), 1 / accumulation)


def verl(
    mask: Tensor,
    loss_agg_mode: str,
    *,
    dp_size: int = 1,
    batch_num_tokens: Tensor | float | None = None,
    global_batch_size: Tensor | float | None = None,
    loss_scale_factor: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Aggregation:
    """verl's ``loss_agg_mode``, as in ``verl.trainer.ppo.core_algos.agg_loss`` of verl 0.9.

    Args:
        mask: ``response_mask`` of the micro-batch.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean" or
            "seq-mean-token-sum-norm".
        dp_size: data-parallel size, over which gradients are averaged.
        batch_num_tokens: active tokens of the global batch; for "token-mean". Default None: those of ``mask``, for
            ``dp_size`` 1 only.
        global_batch_size: sequences of the global batch; for the "seq-mean" modes. Default None: those of ``mask`` that
            are not empty, for ``dp_size`` 1 only. With 1,
            seq-mean-token-sum-norm is that of older releases of verl, which do not divide by the sequences.
        loss_scale_factor: of "seq-mean-token-sum-norm". Default None: T, the last dimension of the mask; needed with
            ``cu_seqlens``, where there is none.
        cu_seqlens: as in :mod:`fused_losses.sequences`. Default None.

    Returns:
        The :class:`Aggregation`.

    Raises:
        TypeError, ValueError: an argument is missing or has the wrong type, shape, device or value; the message names
            it.
    """
    _check(mask, cu_seqlens)
    ranks = _positive("dp_size", dp_size)
    if loss_agg_mode == "token-mean":
        weights = _weights(mask)
        if batch_num_tokens is None:
            _one_rank("batch_num_tokens", ranks)
            denominator: Tensor | float = _tokens(weights)
        else:
            denominator = _count("batch_num_tokens", batch_num_tokens, mask)
    elif loss_agg_mode == "token-sum":
        weights, denominator = _weights(mask), 1.0
    elif loss_agg_mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        weights = _per_sequence_mean(mask, cu_seqlens) if loss_agg_mode == "seq-mean-token-mean" else _weights(mask)
        if global_batch_size is None:
            _one_rank("global_batch_size", ranks)
            tokens = segment_sum(active_tokens(mask, mask), cu_seqlens)
            denominator = (tokens > 0).sum().clamp(min=1).float()
        else:
            denominator = _count("global_batch_size", global_batch_size, mask)
        if loss_agg_mode == "seq-mean-token-sum-norm":
            if loss_scale_factor is None and cu_seqlens is None:
                loss_scale_factor = max(mask.shape[-1], 1)
            scale = _given("loss_scale_factor", loss_scale_factor, f"{loss_agg_mode} with cu_seqlens")
            denominator = denominator * _positive("loss_scale_factor", scale)
    else:
        _unknown("loss_agg_mode", loss_agg_mode, VERL_LOSS_AGG_MODES)
    return _divided(Aggregation(weights, denominator), ranks)


def skyrl(
    mask: Tensor,
    loss_reduction: str,
    *,
    max_seq_len: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Aggregation:
    """SkyRL's ``trainer.algorithm.loss_reduction``, as in ``apply_loss_reduction_to_advantages_minibatch``.

    SkyRL scales the advantages of a mini-batch and sums, so here too the weights carry everything and the denominator
    is 1: make them from the mask of the mini-batch, and cut them into micro-batches with the tokens. Its KL and entropy
    terms have reductions of their own, which these weights are not.

    Args:
        mask: ``loss_mask`` of the mini-batch.
        loss_reduction: "token_mean", "sequence_mean" or "seq_mean_token_sum_norm".
        max_seq_len: of the config; "seq_mean_token_sum_norm" needs it.
        cu_seqlens: as in :mod:`fused_losses.sequences`. Default None.

    Returns:
        The :class:`Aggregation`.

    Raises:
        TypeError, ValueError: an argument is missing or has the wrong type, shape, device or value; the message names
            it.
    """
    _check(mask, cu_seqlens)
    if loss_reduction == "token_mean":
        weights = _weights(mask)
        scale: Tensor | float = _tokens(weights)
    elif loss_reduction == "sequence_mean":
        weights, scale = _per_sequence_mean(mask, cu_seqlens), _sequences(mask, cu_seqlens)
    elif loss_reduction == "seq_mean_token_sum_norm":
        length = _given("max_seq_len", max_seq_len, loss_reduction)
        weights, scale = _weights(mask), _sequences(mask, cu_seqlens) * _positive("max_seq_len", length)
    else:
        _unknown("loss_reduction", loss_reduction, SKYRL_LOSS_REDUCTIONS)
    return Aggregation(weights / scale, 1.0)


def dr_grpo(mask: Tensor, max_completion_length: float, *, cu_seqlens: Tensor | None = None) -> Aggregation:
    """Dr. GRPO: the sum over active tokens, divided by a constant length and the number of sequences.

    Weights m, denominator ``B * max_completion_length``. Liu et al., "Understanding R1-Zero-Like Training: A Critical
    Perspective", 2025, https://arxiv.org/abs/2503.20783.

    Args:
        mask: 0 at tokens that are not part of a completion.
        max_completion_length: the longest completion that sampling allows, a number > 0.
        cu_seqlens: as in :mod:`fused_losses.sequences`. Default None.

    Returns:
        The :class:`Aggregation`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
    """
    _check(mask, cu_seqlens)
    length = _positive("max_completion_length", max_completion_length)
    return Aggregation(_weights(mask), _sequences(mask, cu_seqlens) * length)


def global_tokens(
    target_tokens: Tensor,
    *,
    weights: Tensor | float | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    averaged: bool = False,
) -> Tensor:
    """The ``denominator`` of a mean over tokens of all ranks: ``sum over ranks and active tokens of weights``, for data
    parallelism (each rank has some sequences) and context parallelism (some tokens of each).

        denominator = aggregation.global_tokens(targets, averaged=True)
        loss = ppo(logits, targets, old_logprobs, advantages, denominator=denominator)
        loss.backward()  # DDP and FSDP average gradients over ranks

    A mean of the ranks' own means would weight a token by how few others its rank has. The loss of the batch, to be
    reported, is the sum of the ranks' losses; their mean, with ``averaged=True``.

    Args:
        target_tokens: those of this rank, as the loss gets them. Of ranks that share their tokens, as those of a
            :class:`VocabShard` do, one has to count: give the group of data and context alone.
        weights: as the loss gets them. Default None: 1.
        ignore_index: as the loss gets it. Default -100.
        group: the ranks that the batch is spread over; None is the default group. Every one has to call, one without
            an active token too.
        averaged: divide by the number of ranks, where gradients are averaged over them and not summed.

    Returns:
        0-d float32 on the device of the tokens, the same on all ranks; 0 where no rank has an active token, and the
        loss then is 0, too. One all_reduce of a float64, and nothing waits for the device.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; the message names it.
    """
    if not isinstance(target_tokens, Tensor):
        raise TypeError(f"target_tokens must be a tensor, got {type(target_tokens).__name__}")
    if target_tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_tokens must be int64 or int32, got {target_tokens.dtype}")
    active = target_tokens != checks.index("ignore_index", ignore_index, target_tokens.dtype)
    if weights is None:
        total = active.sum(dtype=torch.float64)
    else:
        column = checks.column("weights", weights, target_tokens.unsqueeze(-1))
        column = column.view(active.shape) if isinstance(column, Tensor) else column
        total = torch.where(active, column, 0.0).sum(dtype=torch.float64)
    group = process_group(group)
    dist.all_reduce(total, group=group)
    return (total / dist.get_world_size(group) if averaged else total).float()


def _check(mask: Tensor, cu_seqlens: Tensor | None) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    check_sequences(cu_seqlens, mask, "mask")


def _weights(mask: Tensor) -> Tensor:
    return active_tokens(mask, mask).float()


def _tokens(weights: Tensor) -> Tensor:
    return weights.sum(dtype=torch.float64).clamp(min=1.0).float()


def _per_sequence_mean(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    active = active_tokens(mask, mask)
    share = 1.0 / segment_sum(active, cu_seqlens).clamp(min=1).float()
    return torch.where(active, segment_expand(share, mask, cu_seqlens), 0.0)


def _sequences(mask: Tensor, cu_seqlens: Tensor | None) -> float:
    """B, empty sequences included, at least 1."""
    return float(max(math.prod(mask.shape[:-1]) if cu_seqlens is None else cu_seqlens.shape[0] - 1, 1))


def _divided(aggregation: Aggregation, by: float) -> Aggregation:
    return Aggregation(aggregation.weights, aggregation.denominator / by)


def _count(name: str, value: Tensor | float, mask: Tensor) -> Tensor | float:
    """A number of tokens or sequences, at least 1."""
    if isinstance(value, Tensor):
        return _scalar(name, value, mask).clamp(min=1.0)
    return max(_number(name, value), 1.0)


def _positive(name: str, value: float) -> float:
    number = _number(name, value)
    if number == 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")
    return number


def _number(name: str, value: float) -> float:
    number = checks.number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return number


def _scalar(name: str, value: Tensor, mask: Tensor) -> Tensor:
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if value.device != mask.device:
        raise ValueError(f"{name} must be on the device of mask, {mask.device}, got {value.device}")
    return value.detach().float()


def _given(name: str, value: Any, mode: str) -> Any:
    """``value``, which ``mode`` needs."""
    if value is None:
        raise ValueError(f"{mode} needs {name}, got None")
    return value


def _one_rank(name: str, dp_size: float) -> None:
    if dp_size > 1:
        raise ValueError(f"{name} is needed with dp_size > 1, where the mask is a part of the batch; got None")


def _unknown(name: str, value: object, known: tuple[str, ...]) -> NoReturn:
    raise ValueError(f"{name} must be one of {known}, got {value!r}")
