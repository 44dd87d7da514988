"""The records that kernels take: `Token`, one tuple of what varies from call to call, and two of what kernels are
compiled for, `RowKind` (what is asked of a row) and `Plan` (how it is walked). Kernels read them by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class TermColumns(NamedTuple):
    """What a token's loss has beside its objective: `Terms` of fused_losses/problem.py, without its flags."""

    importance_weights: Any
    ref_logprobs: Any
    kl_coef: Any
    entropy_coef: Any
    log_ratio_clamp: Any
    label_smoothing: float
    z_loss: float


class Token(NamedTuple):
    """What tokens hold. A column is a number, an array with a value for each token, or an array of one for all.

    Triton compiles anew for another integer in a tuple, and for a pointer that is no multiple of 16 bytes. So there is
    no integer in here, and arrays begin at such multiples; `vary`, a bit per column, goes beside it (rows.py).
    """

    targets: Any  # (N, K)
    shares: Any = None  # (N, K), 0 where a target does not count; None: one target, whose share is 1
    weights: Any = 1.0
    temperature: Any = 1.0
    softcap: float = 0.0
    upstream: Any = 1.0  # what stage 3 multiplies by
    denominator: Any = 1.0  # a number or an array of one
    inputs: tuple[Any, ...] = ()  # columns: the objective's
    terms: TermColumns | None = None


@dataclass(frozen=True)
class RowKind:
    """What is asked of a row. A plain one has a single target, and no softcap and no terms."""

    plain: bool = True
    targets: int = 1  # a power of 2, at least K
    capped: bool = False
    entropy: bool = False
    smoothed: bool = False
    statistics: bool = False  # in stages 1 and 2; then the entropy, too
    kl_type: str | None = None
    kl_weighted_by_ratio: bool = False
    all_logprobs: bool = False  # read tokens of weight 0, too

    @property
    def single(self) -> bool:
        return self.targets == 1

    @property
    def drifts(self) -> bool:
        """Whether the drift is summed."""
        return self.smoothed or self.statistics


@dataclass(frozen=True)
class Plan:
    """How a row is walked."""

    vector: int  # elements in 16 bytes
    ragged: bool  # rows are not whole vectors on 16-byte boundaries
    aligned: bool = True  # the gradient's rows lie on these boundaries where the logits' rows do
    depth: int = 1  # of a tile
    lanes: int = 1  # of a tile: consecutive elements
    one_shot: bool = False  # a tile holds the whole row


class Evaluated(NamedTuple):
    """What a row's softmax and its loss came to."""

    loss: Any  # weight * loss
    by: Any  # Coefficients
    logp: Any  # of each target
    entropy: Any
    whole: Any  # U
    softmax: Any
    target: Any
