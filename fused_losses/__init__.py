"""Fused losses over vocabulary-sized logits: the loss layer of LLM fine-tuning and RL at the speed of a memory copy."""

import os as _os

from . import aggregation, on_logprobs, reference
from .compute import ComputeResult, compute, loss_fn
from .importance_weights import masked_importance_weights, truncated_importance_weights
from .linear_head import LinearHead
from .losses import (
    cispo,
    cross_entropy,
    dro,
    gmpo,
    gspo,
    importance_sampling,
    logprobs,
    policy_loss,
    ppo,
    sapo,
    statistics,
)
from .objectives import Objective
from .outputs import Outputs, Statistics
from .sequences import segment_expand, segment_mean, segment_sum
from .version import __version__
from .vocab_shard import VocabShard

# In a checkout triton_kernels/ lies beside this package, not in it as setup.py installs it.
if not _os.path.isdir(_os.path.join(__path__[0], "triton_kernels")):
    __path__.append(_os.path.dirname(__path__[0]))


__all__ = [
    "ComputeResult",
    "LinearHead",
    "Objective",
    "Outputs",
    "Statistics",
    "VocabShard",
    "__version__",
    "aggregation",
    "cispo",
    "compute",
    "cross_entropy",
    "dro",
    "gmpo",
    "gspo",
    "importance_sampling",
    "logprobs",
    "loss_fn",
    "masked_importance_weights",
    "on_logprobs",
    "policy_loss",
    "ppo",
    "reference",
    "sapo",
    "segment_expand",
    "segment_mean",
    "segment_sum",
    "statistics",
    "truncated_importance_weights",
]
