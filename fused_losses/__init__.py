"""Fused losses over vocabulary-sized logits: the loss layer of LLM fine-tuning and RL, on its way to
the speed of a memory copy."""

import os as _os

from . import aggregation, on_logprobs, reference
from .adapters.tinker import ComputeResult, compute, loss_fn
from .entropy_weights import entropy_weights
from .importance_weights import (
    gated_importance_weights,
    masked_importance_weights,
    off_policy_sequence_mask,
    truncated_importance_weights,
)
from .linear_head import LinearHead
from .losses import (
    cispo,
    cross_entropy,
    dft,
    dppo_kl,
    dppo_tv,
    dro,
    gmpo,
    gspo,
    importance_sampling,
    logprobs,
    policy_loss,
    ppo,
    reinforce,
    sapo,
    statistics,
    vespo,
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
    "dft",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "entropy_weights",
    "gated_importance_weights",
    "gmpo",
    "gspo",
    "importance_sampling",
    "logprobs",
    "loss_fn",
    "masked_importance_weights",
    "off_policy_sequence_mask",
    "on_logprobs",
    "policy_loss",
    "ppo",
    "reference",
    "reinforce",
    "sapo",
    "segment_expand",
    "segment_mean",
    "segment_sum",
    "statistics",
    "truncated_importance_weights",
    "vespo",
]
