"""What is asked of the rows, as typed records: what a caller says, what kernels take, what stages hand on.

They are read by name everywhere; only the codec of ``ops.py`` takes them apart. N is the number of tokens, V the
vocabulary, K the number of targets per token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .objectives import Objective

Column = Tensor | float  # a number, or one per token: float32 of shape (N,) and any stride, 0 included
Selection = slice | Tensor  # some of the tokens: a span, or their int64 indices

KlType = Literal["k1", "k2", "k3", "abs"]
ReductionName = Literal["mean", "sum", "none"]
BackendName = Literal["auto", "cuda", "triton", "cpu", "eager"]
RatioGradient = Literal["token", "sequence"]
StatisticName = Literal["logprobs", "entropy", "log_sum_squares", "mean_logit", "top1"]  # in the order of Statistics


def of_rows(column: Column, tokens: Selection) -> Column:
    return column[tokens] if isinstance(column, Tensor) else column


# ---- What a caller says ----


class Transform(NamedTuple):
    """z = softcap * tanh(logit_scale * logits / softcap) / temperature. Kernels get one whose ``logit_scale`` is 1."""

    temperature: Column = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, tokens: Selection) -> Transform:
        return self._replace(temperature=of_rows(self.temperature, tokens))


class Reduction(NamedTuple):
    weights: Column | None = None
    reduction: ReductionName = "mean"
    denominator: Tensor | float | None = None
    ignore_index: int = -100


class How(NamedTuple):
    """How a loss is computed, which changes no number of it."""

    inplace: bool = False
    recompute: bool = False
    upstream: Tensor | float = 1.0
    backend: BackendName = "auto"
    validate: bool = False
    return_outputs: bool = False


class PolicyTerms(NamedTuple):
    """What a policy loss may have beside its objective."""

    log_ratio_clamp: Column | None = None
    importance_weights: Column | None = None
    entropy_coef: Column = 0.0
    ref_logprobs: Column | None = None
    kl_coef: Column = 0.0
    kl_type: KlType = "k3"
    kl_weighted_by_ratio: bool = False


class Sequences(NamedTuple):
    """Which tokens a sequence's ratio is made of, and what its gradient goes through."""

    cu_seqlens: Tensor | None = None
    sequence_ratio_mask: Tensor | None = None
    ratio_gradient: RatioGradient = "token"


# ---- What kernels take ----


class Targets(NamedTuple):
    tokens: Tensor  # (N,), with shares (N, K); contiguous int64 or int32
    ignore_index: int
    shares: Tensor | None = None  # (N, K) float32, 0 where a target does not count; None: one target, whose share is 1

    @property
    def num(self) -> int:
        """K"""
        return 1 if self.shares is None else self.tokens.shape[1]

    def rows(self, tokens: Selection) -> Targets:
        shares = None if self.shares is None else self.shares[tokens]
        return Targets(self.tokens[tokens], self.ignore_index, shares)


class Terms(NamedTuple):
    """What a token's loss has beside its objective: see terms.py."""

    importance_weights: Column = 1.0  # of the objective only
    ref_logprobs: Column = 0.0
    kl_coef: Column = 0.0
    entropy_coef: Column = 0.0
    log_ratio_clamp: Column = math.inf  # of the ratio that weights the KL
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    kl_type: KlType | None = None
    kl_weighted_by_ratio: bool = False
    entropy: bool = False  # H is asked for: as an output, or because it has a coefficient
    statistics: bool = False  # all that `statistics` gives is asked for, of one target; then H is, too

    @property
    def plain(self) -> bool:
        importance = self.importance_weights
        return (
            self.kl_type is None
            and not self.entropy
            and self.label_smoothing == 0.0
            and self.z_loss == 0.0
            and not isinstance(importance, Tensor)
            and importance == 1.0
        )

    def rows(self, tokens: Selection) -> Terms:
        return self._replace(
            importance_weights=of_rows(self.importance_weights, tokens),
            ref_logprobs=of_rows(self.ref_logprobs, tokens),
            kl_coef=of_rows(self.kl_coef, tokens),
            entropy_coef=of_rows(self.entropy_coef, tokens),
            log_ratio_clamp=of_rows(self.log_ratio_clamp, tokens),
        )


class Problem(NamedTuple):
    """All that is asked of N rows of logits, wherever these come from."""

    targets: Targets
    transform: Transform
    weights: Column
    objective: Objective
    inputs: tuple[Column, ...]  # the objective's columns, in its order
    terms: Terms
    denominator: Column | None  # what the sum is divided by; None, of a mean: the sum of the active tokens' weights
    vocab: int  # the number of classes
    all_logprobs: bool  # read tokens of weight 0, too, for their logprob

    @property
    def n(self) -> int:
        return self.targets.tokens.shape[0]

    def rows(self, tokens: Selection) -> Problem:
        """What is asked of some of the rows. The denominator stays, and has to be known: it is that of all."""
        return self._replace(
            targets=self.targets.rows(tokens),
            transform=self.transform.rows(tokens),
            weights=of_rows(self.weights, tokens),
            inputs=tuple(of_rows(column, tokens) for column in self.inputs),
            terms=self.terms.rows(tokens),
        )

    @property
    def plain(self) -> bool:
        """Whether g, the derivative by logp, is all that the rows get back: kernels of their own."""
        return self.targets.shares is None and self.transform.softcap is None and self.terms.plain


# ---- What stages hand on ----


def stats_shape(n: int, targets: int, plain: bool, statistics: bool = False) -> tuple[int, int]:
    return 3 if plain else targets + (6 if statistics else 4), n


def coefficients_shape(n: int, plain: bool) -> tuple[int, int]:
    return 1 if plain else 4, n


def logprobs_shape(n: int, targets: int, plain: bool, statistics: bool = False) -> tuple[int, ...]:
    """A logprob per token; where the problem is not plain one per target, then the entropy, then the statistics."""
    return (n,) if plain else (targets + (4 if statistics else 1), n)


class Stats(NamedTuple):
    """What stage 1 saw of the vocabulary: float32 (3, N), (K + 4, N) where the problem is not plain, and with
    statistics (K + 6, N).

    With one target per token, its element is left out of maximum, sum, moment and squares, so that 1 - p of a sure
    target is made of what is small, and not of a difference: see docs/mathematics.md. d_j = z_j - z(maximum). Zeros
    where the token was not read.
    """

    table: Tensor
    statistics: bool = False  # whether squares and top1 are there

    def of_gradient(self) -> Stats:
        """What stage 3 takes: (3, N) or (K + 4, N)."""
        return Stats(self.table[:-2]) if self.statistics else self

    @property
    def maximum(self) -> Tensor:
        """Of the raw logits, at least -FLT_MAX; of a single target whose row has no other mass, its own logit."""
        return self.table[0]

    @property
    def sum(self) -> Tensor:
        """sum_j e^d_j"""
        return self.table[1]

    @property
    def targets(self) -> Tensor:
        """(K, N): the targets' raw logits; NaN for a target outside [0, V)."""
        return self.table[2:3] if self.table.shape[0] == 3 else self.of_gradient().table[2:-2]

    @property
    def moment(self) -> Tensor:
        """sum_j e^d_j d_j, 0 unless the entropy is asked for. Only where the problem is not plain."""
        return self.of_gradient().table[-2]

    @property
    def drift(self) -> Tensor:
        """sum_j d_j over all elements, 0 unless labels are smoothed or statistics asked for. Only where the problem is
        not plain."""
        return self.of_gradient().table[-1]

    @property
    def squares(self) -> Tensor:
        """sum_j e^(2 d_j). Only with statistics."""
        return self.table[-2]

    @property
    def top1(self) -> Tensor:
        """1 where the target's raw logit is the first of the row's largest, else 0. Only with statistics."""
        return self.table[-1]


class Logprobs(NamedTuple):
    """What a token's row gave, in the shape of :func:`logprobs_shape`; 0 where it was not read. With statistics the
    last three rows are log sum_j p_j^2, mean_j z_j, and 1 where the target is the first of the most likely, else 0.

    Functions, where the records above have properties: torch.compile of torch 2.10 traces no property of a record.
    """

    table: Tensor

    def targets(self) -> Tensor:
        """(N,) or (N, K)"""
        return self.table if self.table.dim() == 1 else self.table[:-1].t()

    def entropy(self) -> Tensor:
        """(N,), where it is asked for."""
        return self.table[-1]


class Coefficients(NamedTuple):
    """float32 (4, N): the derivatives of the loss by logp, H and lse, and that by every z_j alike, which is its
    derivative by zbar over the number of classes; each times weight / denominator. Plain (1, N): that by logp alone."""

    table: Tensor

    @staticmethod
    def of(g: Tensor, h: Tensor, zeta: Tensor, s: Tensor) -> Coefficients:
        return Coefficients(torch.stack((g, h, zeta, s)))

    def by_logprob(self) -> Tensor:
        return self.table[0]

    @property
    def plain(self) -> bool:
        return self.table.shape[0] == 1


def empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)
