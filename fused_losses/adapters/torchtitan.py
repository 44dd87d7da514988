"""torchtitan 0.3: losses for its configs, in place on the logits.

    from fused_losses.adapters import torchtitan

    Trainer.Config(loss=ChunkedLossWrapper.Config(loss_fn=torchtitan.CrossEntropyLoss.Config()))

``CrossEntropyLoss`` has the numbers of ``torchtitan.components.loss.CrossEntropyLoss``; ``DAPOLoss`` and ``GRPOLoss``,
of ``torchtitan.experiments.rl.losses``, their numbers and metrics. They are subclasses of torchtitan's ``BaseLoss``, so
torchtitan is imported when the first of them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._torchtitan import CrossEntropyLoss, DAPOLoss, GRPOLoss

__all__ = ["CrossEntropyLoss", "DAPOLoss", "GRPOLoss"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _torchtitan

    return getattr(_torchtitan, name)
