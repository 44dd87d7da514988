"""Megatron-core: the cross entropy of logits whose vocabulary is sharded, and an output processor that makes no logits.

from fused_losses.adapters import megatron

megatron.install()                                                       # and megatron.remove(): on logits
model(..., labels=labels, output_processor=megatron.output_processor)    # without them
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

import fused_losses

from ..linear_head import LinearHead
from ..vocab_shard import VocabShard
from ._names import called
from .slots import Slot, Slots

_IGNORED = -100
_OPTIONS = ("chunk_bytes", "logits_dtype", "loss", "skip_masked", "weight_grad_dtype")


# ---- On logits ----

_OF_SHARD = dict(
    **dict.fromkeys(("logits", "local_logits"), "vocab_parallel_logits"),
    target_tokens="target",
    group="tp_group",
    label_smoothing="label_smoothing * V / (V - 1)",  # as _per_token has it
)


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup, *, inplace: bool = False
) -> Tensor:
    """``megatron.core.fusions.fused_cross_entropy``: ``-log softmax(logits)[target]`` of each token.

    Args:
        vocab_parallel_logits: (s, b, V / tp) float32, bfloat16 or float16: the columns of this rank, all ranks having
            as many. They are left as they are; Megatron's own writes over logits that are float32.
        target: (s, b) int64 or int32. A negative one is left out: loss and gradient 0. One from V on is an error, as
            of every loss here; Megatron's loss of either is a number that means nothing.
        tp_group: the ranks that have the other columns.
        inplace: write the gradient over the logits in backward, see :func:`install`.

    Returns:
        (s, b) float32, differentiable; the gradient is of the dtype of the logits. That of Megatron's own is rounded to
        bfloat16, whatever that is.
    """
    with called(_OF_SHARD):
        return _per_token(vocab_parallel_logits, target, 0.0, tp_group, inplace)


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    *,
    inplace: bool = False,
) -> Tensor:
    """``megatron.core.tensor_parallel.vocab_parallel_cross_entropy``: as the fused one, with label smoothing.

    Args:
        label_smoothing: probability that goes from the target to the V - 1 others, in [0, 1). V counts the columns of
            all ranks; Megatron's own counts those of the rank, so that with tp > 1 each rank has a loss of its own.
        tp_group: None is ``get_tensor_model_parallel_group()``.
        inplace: as of the fused one; not with label smoothing.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
    if tp_group is None:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        tp_group = get_tensor_model_parallel_group()
    with called(_OF_SHARD):
        return _per_token(vocab_parallel_logits, target, label_smoothing, tp_group, inplace)


def te_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    tp_group: dist.ProcessGroup,
    is_cg_capturable: bool = False,
    *,
    inplace: bool = False,
) -> Tensor:
    """What ``cross_entropy_fusion_impl="te"`` calls of Transformer Engine. is_cg_capturable: it always is, on one rank;
    on several as far as the group's collectives are."""
    with called({"local_logits": "logits", "target_tokens": "labels", "group": "tp_group"}):
        return _per_token(logits, labels, 0.0, tp_group, inplace)


def _per_token(
    local_logits: Tensor, target: Tensor, label_smoothing: float, group: dist.ProcessGroup, inplace: bool
) -> Tensor:
    ranks, columns = group.size(), local_logits.shape[-1]
    classes = ranks * columns
    whole = ranks == 1
    logits = local_logits if whole else VocabShard(local_logits, group, group.rank() * columns, classes)
    target = target.masked_fill(target < 0, _IGNORED)
    if label_smoothing == 0:
        return -fused_losses.logprobs(logits, target, ignore_index=_IGNORED, inplace=inplace)
    if inplace:
        raise ValueError("inplace=True has no label smoothing: it is logprobs that write over the logits")
    return fused_losses.cross_entropy(
        logits,
        target,
        label_smoothing=label_smoothing * classes / (classes - 1),  # here the target has a share in it, too
        ignore_index=_IGNORED,
        reduction="none",
    )


_MADE_FOR = "0.19.2"
_FUSED, _UNFUSED = "fused_vocab_parallel_cross_entropy", "vocab_parallel_cross_entropy"
_LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module"
_FUSED_PARAMETERS = ("vocab_parallel_logits", "target", "tp_group")
_PARAMETERS = ("vocab_parallel_logits", "target", "label_smoothing", "tp_group")

_installed: list[tuple[bool, Slots]] = []  # inplace and what is installed; one, or none


def install(*, inplace: bool = False) -> None:
    """Put the cross entropy where every ``LanguageModule`` looks it up, whatever ``cross_entropy_loss_fusion`` and
    ``cross_entropy_fusion_impl`` say. A second call changes nothing.

    Args:
        inplace: backward writes the gradient over the logits, which until then are as they were, and allocates
            nothing of their size. Nobody else may need the logits in backward, and backward runs once.

    Raises:
        ImportError: megatron-core is not installed.
        RuntimeError: a slot is not where it was, or takes other arguments; the message names it and the version. Or it
            is installed already with another ``inplace``.
    """
    if _installed:
        if _installed[0][0] != inplace:
            raise RuntimeError(f"megatron.install: installed already with inplace={not inplace}; call remove() first")
        return
    slots = Slots("megatron-core", _MADE_FOR, replacements(inplace=inplace))
    slots.install()
    _installed.append((inplace, slots))


def remove() -> None:
    """Put Megatron's own back. Without an installation it changes nothing."""
    if _installed:
        _installed[0][1].remove()
        _installed.clear()


def replacements(*, inplace: bool = False) -> dict[Slot, Any]:
    """What goes into which slot."""
    fused, unfused, engine = (
        partial(function, inplace=True) if inplace else function
        for function in (fused_vocab_parallel_cross_entropy, vocab_parallel_cross_entropy, te_parallel_cross_entropy)
    )
    return {
        Slot("megatron.core.fusions.fused_cross_entropy", _FUSED, _FUSED_PARAMETERS): fused,
        Slot(_LANGUAGE_MODULE, _FUSED, _FUSED_PARAMETERS): fused,
        Slot(_LANGUAGE_MODULE, "te_parallel_cross_entropy"): engine,  # None where Transformer Engine is not installed
        Slot("megatron.core.tensor_parallel.cross_entropy", _UNFUSED, _PARAMETERS): unfused,
        Slot("megatron.core.tensor_parallel", _UNFUSED, _PARAMETERS): unfused,
    }


# ---- Without logits ----

_OF_LAYER = {
    "hidden": "hidden_states",
    "weight": "output_layer.weight",
    "bias": "output_layer.bias",
    "target_tokens": "labels",
    "logit_scale": "mup_output_mult",
}


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None = None,
    inference_context: Any = None,
    runtime_gather_output: bool | None = None,
    context: Mapping[str, Any] | None = None,
    config: Any = None,
    **_: Any,
) -> Tensor:
    """For ``GPTModel.forward(..., labels=, output_processor=output_processor, output_processor_context=)``: the loss of
    the output layer's logits, which are made a chunk of tokens at a time and never exist as a whole.

    It stands for the output layer, ``_scale_logits`` and ``compute_language_model_loss``, with tensor and sequence
    parallelism as the layer has them: the gradient of the hidden states is reduced over the ranks, or reduced and
    scattered along the sequence. dW goes the way of ordinary gradients: DistributedDataParallel adds it to
    ``main_grad``, also where ``gradient_accumulation_fusion`` is on. What is not listed below is what ``GPTModel``
    calls an output processor with.

    Args:
        hidden_states: (s, b, h), or (s / tp, b, h) under sequence parallelism.
        output_layer: the model's ``ColumnParallelLinear``. Its forward pre-hooks run, as DistributedDataParallel's do
            that wait for gathered parameters.
        output_weight: that of the embedding, where they are shared.
        labels: (b, s). A negative one is left out.
        loss_mask: (b, s); read by ``skip_masked`` and handed to ``loss``.
        context: options by name, or None:

            * ``loss``: a function ``(head, labels, loss_mask) -> Tensor`` of a :class:`fused_losses.LinearHead` with
              hidden states (b, s, h), whose result is the model's output. One that reduces takes one pass:
              ``lambda head, labels, mask: fused_losses.ppo(head, labels, old_logprobs, advantages, weights=mask)``.
              With MuP it is called with ``logit_scale=``, which every loss here takes.
            * ``skip_masked``: tokens of ``loss_mask`` 0 are left out before the first product, loss 0. Waits for the
              device, to know how many there are.
            * ``chunk_bytes``, ``logits_dtype``, ``weight_grad_dtype``: as of :class:`fused_losses.LinearHead`.

    Returns:
        (b, s) float32, the loss of each token, as ``GPTModel.forward`` returns it; or what ``loss`` returns.

    Raises:
        TypeError, ValueError: an option that is not known, or one of Megatron's that is not supported; the message
            names it.
    """
    options = dict(context or {})
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ValueError(f"output_processor_context takes {', '.join(_OPTIONS)}, got {', '.join(map(str, unknown))}")
    if labels is None or inference_context is not None:
        what = "no labels" if labels is None else "an inference_context"
        raise ValueError(f"output_processor is for training, with labels: it makes no logits to return; got {what}")
    _check_layer(output_layer, runtime_gather_output, config)
    _run_pre_hooks(output_layer, hidden_states)
    loss, skip_masked = options.pop("loss", None), options.pop("skip_masked", False)
    if skip_masked:
        if loss_mask is None:
            raise ValueError("skip_masked of output_processor_context needs loss_mask, which GPTModel.forward takes")
        labels = labels.masked_fill(loss_mask == 0, _IGNORED)
    labels = labels.masked_fill(labels < 0, _IGNORED)
    weight = output_layer.weight if output_weight is None else output_weight
    bias = None if output_layer.skip_bias_add else output_layer.bias
    hidden = _whole_sequence(hidden_states, output_layer)
    # the layout of a loss that is the caller's: that of labels
    hidden = hidden if loss is None else hidden.transpose(0, 1)
    head = LinearHead(hidden, weight, bias, skip_masked=skip_masked, **_sharding(output_layer, weight), **options)
    scale = _logit_scale(config)
    if loss is not None:
        returned: Tensor = loss(head, labels, loss_mask, **({} if scale == 1.0 else {"logit_scale": scale}))
        return returned
    with called(_OF_LAYER):
        losses = -fused_losses.logprobs(head, labels.t(), ignore_index=_IGNORED, logit_scale=scale)
    return losses.t().contiguous()


def _check_layer(layer: Any, runtime_gather_output: bool | None, config: Any) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    if type(layer) is not ColumnParallelLinear:
        wrapped = ", wrapped: merge it first" if hasattr(layer, "to_wrap") or hasattr(layer, "base_layer") else ""
        raise TypeError(
            f"output_layer must be a ColumnParallelLinear, whose weight is all that it is, got {type(layer).__name__}"
            f"{wrapped}"
        )
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks or "forward" in vars(layer):
        raise ValueError("output_layer has hooks, or a forward of its own, which an output processor would bypass")
    gather = layer.gather_output if runtime_gather_output is None else runtime_gather_output
    refused = {
        "runtime_gather_output, or parallel_output=False": gather and layer.tp_group.size() > 1,
        "defer_embedding_wgrad_compute": layer.config.defer_embedding_wgrad_compute,
        "an output_layer of experts": layer.explicit_expert_comm,
        "an output_layer sharded by gtp_remat": layer.gtp_remat_size > 1,
        # those layers' gradients are in main_grad already, and the one that comes here would be dropped
        "gradient_accumulation_fusion with mtp_num_layers": layer.gradient_accumulation_fusion
        and getattr(config, "mtp_num_layers", None),
    }
    for what, is_on in refused.items():
        if is_on:
            raise ValueError(f"{what} is not supported by this output_processor")


def _run_pre_hooks(layer: Any, hidden_states: Tensor) -> None:
    for key, hook in layer._forward_pre_hooks.items():
        keywords: tuple[Any, ...] = ({},) if key in layer._forward_pre_hooks_with_kwargs else ()
        if hook(layer, (hidden_states,), *keywords) is not None:
            raise ValueError("output_layer has a forward pre-hook that changes its input, which is not supported here")


def _whole_sequence(hidden_states: Tensor, layer: Any) -> Tensor:
    if not layer.sequence_parallel:
        return hidden_states
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    # its backward reduces the ranks' partial gradients, and scatters them
    gathered: Tensor = gather_from_sequence_parallel_region(hidden_states, group=layer.tp_group)
    return gathered


def _sharding(layer: Any, weight: Tensor) -> dict[str, Any]:
    """The keywords of a :class:`LinearHead`."""
    ranks, rows = layer.tp_group.size(), weight.shape[0]
    if ranks == 1:
        return {}
    return {
        "group": layer.tp_group,
        "vocab_start": layer.tp_group.rank() * rows,
        "vocab_size": ranks * rows,
        "hidden_grad": "all_reduce" if layer.allreduce_dgrad else "partial",
    }


def _logit_scale(config: Any) -> float:
    return float(config.mup_output_mult) if getattr(config, "use_mup", False) else 1.0
