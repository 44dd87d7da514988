"""Fused losses over vocabulary-sized logits: the loss layer of LLM fine-tuning and RL at the speed of a memory copy."""

import os as _os

from . import reference
from .losses import Outputs, cispo, cross_entropy, dro, importance_sampling, logprobs, ppo
from .version import __version__

# In a checkout triton_kernels/ lies beside this package, not in it as setup.py installs it.
if not _os.path.isdir(_os.path.join(__path__[0], "triton_kernels")):
    __path__.append(_os.path.dirname(__path__[0]))


__all__ = [
    "Outputs",
    "__version__",
    "cispo",
    "cross_entropy",
    "dro",
    "importance_sampling",
    "logprobs",
    "ppo",
    "reference",
]
