"""The classes of :mod:`fused_losses.adapters.torchtitan`, which import torchtitan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import spmd_types as spmd
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.components.loss import BaseLoss
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.tools.logging import logger

from .. import losses
from ..vocab_shard import VocabShard
from ._names import called, in_words
from .slots import Slot, Slots

Result = tuple[Tensor, dict[str, Tensor]]

LOG_RATIO_CLAMP = 10.0  # of torchtitan's RL losses
_SAME = 1e-6  # log ratios and ratios closer than this count as equal in their metrics

_CALL = ("self", "pred", "labels", "global_valid_tokens")

# nothing is replaced: by what a loss is called is looked at
SLOTS = Slots(
    "torchtitan",
    "0.3.0",
    {
        Slot("torchtitan.components.loss", "BaseLoss.__call__", (*_CALL, "kwargs")): None,
        Slot("torchtitan.components.loss", "ChunkedLossWrapper.__call__", (*_CALL, "loss_inputs")): None,
    },
)
SLOTS.check()


class CrossEntropyLoss(BaseLoss):  # type: ignore[misc]  # torchtitan has no types
    """``torchtitan.components.loss.CrossEntropyLoss``: the sum over tokens, divided by ``global_valid_tokens``.

    The logits are read once, and their gradient is written over them. A batch without a valid token has loss 0 and
    gradient 0. torch.compile is not asked for the loss: there is nothing left to fuse.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        global_vocab_size: int | None = None
        """Of all shards of the vocabulary, under tensor parallelism by spmd_types. None: shards are equally wide."""

        inplace: bool = True
        """Write the gradient over the logits, which nothing else may read after the loss."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        _tell(self, compile_config)
        self.global_vocab_size = config.global_vocab_size
        self.inplace = config.inplace

    @in_words(
        {"logits": "pred", "local_logits": "pred", "target_tokens": "labels", "denominator": "global_valid_tokens"}
    )
    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> Result:
        """pred: (B, L, V). labels: (B, L), shifted. kwargs: RL inputs, which a cross entropy has no use for."""
        del kwargs
        if isinstance(pred, DTensor) and isinstance(labels, DTensor):
            return self._of_dtensors(pred, labels, global_valid_tokens), {}
        with spmd.no_typecheck():
            loss = self._sum(_logits(pred, self.global_vocab_size), labels, global_valid_tokens)
        if spmd.is_type_checking():
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, {}

    def _sum(self, logits: Tensor | VocabShard, labels: Tensor, tokens: Tensor | float | None) -> Tensor:
        if isinstance(tokens, Tensor):
            tokens = tokens.to(logits.device)
        return losses.cross_entropy(logits, labels, reduction="sum", denominator=tokens, inplace=self.inplace)

    def _of_dtensors(self, pred: DTensor, labels: DTensor, tokens: Tensor | float | None) -> DTensor:
        """The loss of the tokens that are here, of which the whole is the sum."""
        vocabulary = [isinstance(p, Shard) and p.dim == pred.ndim - 1 for p in pred.placements]
        expected = tuple(Replicate() if v else p for v, p in zip(vocabulary, pred.placements, strict=True))
        if labels.placements != expected:
            raise ValueError(f"labels must be placed as the rows of pred, by {expected}, got {labels.placements}")
        if isinstance(tokens, DTensor):
            tokens = tokens.full_tensor()
        loss = self._sum(_logits(pred, self.global_vocab_size), labels.to_local(), tokens)
        placed = [Partial() if isinstance(p, Shard) else Replicate() for p in expected]
        return DTensor.from_local(loss, pred.device_mesh, placed, run_check=False)


class DAPOLoss(BaseLoss):  # type: ignore[misc]
    """``torchtitan.experiments.rl.losses.DAPOLoss``: a clipped ratio with two bounds, and its metrics.

    Tokens outside ``loss_mask``, and those whose generator logprob is not finite, have loss 0 and gradient 0 whatever
    else they hold.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        ratio_clip_low: float = 0.2
        """The ratio is at least 1 less this."""

        ratio_clip_high: float = 0.2
        """The ratio is at most 1 and this."""

        global_vocab_size: int | None = None
        """As of :class:`CrossEntropyLoss`."""

        inplace: bool = True
        """As of :class:`CrossEntropyLoss`."""

    _names: ClassVar[dict[str, str]] = {
        "local_logits": "logits",
        "target_tokens": "labels",
        "old_logprobs": "generator_logprobs",
        "weights": "loss_mask",
        "clip_low_threshold": "1 - ratio_clip_low",
        "clip_high_threshold": "1 + ratio_clip_high",
    }

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        _tell(self, compile_config)
        self.low, self.high = max(1 - config.ratio_clip_low, 0.0), 1 + config.ratio_clip_high
        self.global_vocab_size = config.global_vocab_size
        self.inplace = config.inplace

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> Result:
        """logits: (B, L, V); all others (B, L). global_valid_tokens: 1 is the least, None is 1.

        Returns the loss and metrics that add up over chunks and ranks, but for "bit_wise/logprob_diff/max".
        """
        active = loss_mask & generator_logprobs.isfinite()
        if isinstance(global_valid_tokens, Tensor):
            denominator: Tensor | float = global_valid_tokens.to(logits.device).clamp(min=1)
        else:
            denominator = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
        with spmd.no_typecheck(), called(self._names):
            loss, outputs = losses.ppo(
                _logits(logits, self.global_vocab_size),
                labels,
                generator_logprobs,
                advantages,
                clip_low_threshold=self.low,
                clip_high_threshold=self.high,
                log_ratio_clamp=LOG_RATIO_CLAMP,
                entropy_coef=torch.zeros((), device=logits.device),  # for its value alone
                weights=active,
                reduction="sum",
                denominator=denominator,
                inplace=self.inplace,
                return_outputs=True,
            )
            assert outputs.entropy is not None
            difference = (outputs.logprobs - generator_logprobs).where(active, 0.0)
            ratio = difference.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
            clipped = (ratio - ratio.clamp(self.low, self.high)).abs() > _SAME

            def mean(values: Tensor) -> Tensor:
                return values.where(active, 0.0).sum() / denominator

            metrics = {
                "loss/mean": loss.detach(),
                "loss/ratio_mean": mean(ratio),
                "loss/ratio_clipped_frac": mean(clipped.float()),
                "bit_wise/logprob_diff/mean": mean(difference),
                "bit_wise/ratio_tokens_different/mean": mean((difference.abs() > _SAME).float()),
                "bit_wise/logprob_diff/max": difference.abs().max(),
                "trainer/entropy/mean": mean(outputs.entropy),
            }
        return loss, metrics


class GRPOLoss(DAPOLoss):
    """``torchtitan.experiments.rl.losses.GRPOLoss``: :class:`DAPOLoss` with one bound for both sides."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        clip_eps: float = 0.2
        """The ratio is within 1 and plus or minus this."""

        global_vocab_size: int | None = None
        """As of :class:`CrossEntropyLoss`."""

        inplace: bool = True
        """As of :class:`CrossEntropyLoss`."""

    _names: ClassVar[dict[str, str]] = DAPOLoss._names | {
        "clip_low_threshold": "1 - clip_eps",
        "clip_high_threshold": "1 + clip_eps",
    }

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        both = DAPOLoss.Config(
            ratio_clip_low=config.clip_eps,
            ratio_clip_high=config.clip_eps,
            global_vocab_size=config.global_vocab_size,
            inplace=config.inplace,
        )
        super().__init__(both, compile_config=compile_config)


def _tell(loss: BaseLoss, compile_config: CompileConfig | None) -> None:
    if compile_config is not None and compile_config.enable and "loss" in compile_config.components:
        logger.info(f"{type(loss).__name__} of fused_losses is fused as it is: torch.compile leaves it alone")


def _logits(pred: Tensor, vocab_size: int | None) -> Tensor | VocabShard:
    """What is here of the logits, under whichever of torchtitan's three ways of tensor parallelism."""
    if isinstance(pred, DTensor):
        sharded = any(isinstance(p, Shard) and p.dim in (-1, pred.ndim - 1) for p in pred.placements)
        return pred if sharded else pred.to_local()  # a loss takes a sharded vocabulary as it is
    if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        group = current_spmd_mesh().get_group("tp")
        ranks, rank = group.size(), group.rank()
        size = pred.shape[-1] * ranks if vocab_size is None else vocab_size
        columns = -(-size // ranks)  # as torch.chunk deals them
        return VocabShard(pred, group, min(columns * rank, size), size)
    return pred
