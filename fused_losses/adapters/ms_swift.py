"""ms-swift 4.6: a loss for ``--loss_type fused_cross_entropy``, and the functions that its trainers look up by name.

    from fused_losses.adapters import ms_swift

    ms_swift.install()  # in a file that is given as --external_plugins; rlhf=True for its GRPO, DPO and KTO trainers

The loss has the numbers of ``swift.loss.causal_lm.CustomCrossEntropyLoss``, and of the trainer's own loss where
``enable_dft_loss`` asks for DFT.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..problem import ReductionName
from ._names import in_words
from .slots import Slot, Slots

NAME = "fused_cross_entropy"


class CrossEntropyLoss:
    """What ``swift.loss.loss_map`` makes with ``(args, trainer)``, and the trainer calls as its compute_loss_func.

    ``sum(loss_scale * -logp) / num_items_in_batch``, and with ``args.enable_dft_loss`` p times that, p without a
    gradient: Wu et al., "On the Generalization of SFT", 2025, https://arxiv.org/abs/2508.05629.

    Raises:
        ValueError: the training asks for what is not in this loss; the message names the option.
    """

    def __init__(self, args: Any, trainer: Any):
        self.args, self.trainer = args, trainer
        self.dft = bool(getattr(args, "enable_dft_loss", False))
        if smoothing := getattr(args, "label_smoothing_factor", 0.0):
            raise ValueError(f"label_smoothing_factor has no effect beside --loss_type {NAME}, got {smoothing}")
        if "BaseMegatronTrainer" in [kind.__name__ for kind in type(trainer).__mro__]:
            raise ValueError(f"--loss_type {NAME} is not for Megatron's trainers, got {type(trainer).__name__}")
        template = getattr(trainer, "template", None)
        if (task := getattr(template, "task_type", "causal_lm")) not in ("causal_lm", None):
            raise ValueError(f'--loss_type {NAME} needs task_type "causal_lm", got {task!r}')
        if (ranks := getattr(template, "sequence_parallel_size", 1)) > 1:
            raise ValueError(
                f"--loss_type {NAME} needs sequence_parallel_size 1, got {ranks}: there the trainer makes the loss "
                "per token itself, so leave --loss_type out"
            )

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: Tensor | float | None = None,
        loss_scale: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """labels: (B, L), each token's own, not its successor. loss_scale: of the successors, as the trainer gives it,
        with B * L numbers. num_items_in_batch: default None, the successors that are labelled here.
        """
        if unknown := kwargs.keys() - {"trainer"}:
            raise TypeError(f"{NAME} takes no {', '.join(sorted(unknown))}")
        upstream = self._upstream() if num_items_in_batch is not None else 1
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != -100).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(_logits(outputs).device)
        if isinstance(loss_scale, Tensor) and loss_scale.dim() > 0:
            loss_scale = loss_scale.view(labels.shape)
        return _loss(outputs, labels, self.dft, "sum", loss_scale, num_items_in_batch, upstream)

    def _upstream(self) -> int:
        """What the trainer multiplies a loss by that is divided by the tokens of all processes."""
        averaged = getattr(self.args, "average_tokens_across_devices", False)
        if averaged and getattr(self.trainer, "model_accepts_loss_kwargs", False):
            return int(self.trainer.accelerator.num_processes)
        return 1


def per_token_loss_func(outputs: Any, labels: Tensor, enable_dft_loss: bool = False, **kwargs: Any) -> Tensor:
    """``swift.trainers.per_token_loss_func``: (B * L,) float32, 0 where the successor is not labelled."""
    if kwargs:
        raise TypeError(f"per_token_loss_func takes no {', '.join(sorted(kwargs))}")
    return _loss(outputs, labels, enable_dft_loss, "none").view(-1)


@in_words({"target_tokens": "index"})
def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """TRL's, as ms-swift calls it: logits (..., V), index (...); float32 whatever the logits are."""
    return losses.logprobs(logits, index)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """TRL's, as ms-swift calls it: logits (..., V); float32 (...)."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)  # whichever: not read
    entropy = losses.statistics(logits, targets, outputs=("entropy",)).entropy
    assert entropy is not None
    return entropy


@in_words({"target_tokens": "labels", "weights": "loss_scale", "denominator": "num_items_in_batch"})
def _loss(
    outputs: Any,
    labels: Tensor,
    dft: bool,
    reduction: ReductionName,
    weights: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    upstream: int = 1,
) -> Tensor:
    logits = _logits(outputs)
    successors = labels.roll(-1, -1).to(logits.device)
    return (losses.dft if dft else losses.cross_entropy)(
        logits, successors, weights=weights, reduction=reduction, denominator=denominator, upstream=upstream
    )


def _logits(outputs: Any) -> Tensor:
    if not isinstance(logits := getattr(outputs, "logits", None), Tensor):
        raise ValueError(f"{NAME} needs outputs.logits, got {type(logits).__name__}: a head that makes none has a loss")
    return logits


# ---- Into ms-swift and out of it ----

_PER_TOKEN = ("outputs", "labels", "enable_dft_loss", "kwargs")
SFT = Slots(
    "ms-swift",
    "4.6.0",
    {
        Slot("swift.trainers.utils", "per_token_loss_func", _PER_TOKEN): per_token_loss_func,
        Slot("swift.trainers.seq2seq_trainer", "per_token_loss_func", _PER_TOKEN): per_token_loss_func,
        Slot("swift.trainers", "per_token_loss_func", _PER_TOKEN): per_token_loss_func,
    },
)
RLHF = Slots(
    "ms-swift",
    "4.6.0",
    {  # TRL's own functions, by names of these modules; what else they take depends on the TRL
        Slot("swift.rlhf_trainers.grpo_trainer", "selective_log_softmax"): selective_log_softmax,
        Slot("swift.rlhf_trainers.grpo_trainer", "entropy_from_logits"): entropy_from_logits,
        Slot("swift.rlhf_trainers.rlhf_mixin", "selective_log_softmax"): selective_log_softmax,
    },
)


def install(*, rlhf: bool = False) -> None:
    """``--loss_type fused_cross_entropy``, and per_token_loss_func of the SFT trainer. A second call changes nothing.

    Args:
        rlhf: also the logprobs and entropies of the GRPO, DPO and KTO trainers, whose modules are imported for it.

    Raises:
        ImportError: ms-swift is not installed.
        RuntimeError: a slot is not where it was, or the name is taken.
    """
    loss_map = _loss_map()
    if loss_map.get(NAME, CrossEntropyLoss) is not CrossEntropyLoss:
        raise RuntimeError(f"swift.loss.loss_map has another {NAME!r}: {loss_map[NAME]!r}")
    if rlhf:
        RLHF.check()
    SFT.install()
    if rlhf:
        RLHF.install()
    loss_map[NAME] = CrossEntropyLoss


def remove() -> None:
    """Put back what was there. Without an installation it changes nothing.

    Raises:
        RuntimeError: somebody else has replaced a slot since.
    """
    RLHF.remove()
    SFT.remove()
    _loss_map().pop(NAME, None)


def _loss_map() -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module("swift.loss").loss_map
    return found
