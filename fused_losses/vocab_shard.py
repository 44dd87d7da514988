"""Logits of which each rank has some columns, as an origin: every stage on what is here, and one collective between.

A row's statistics are sums relative to a maximum, so those of its parts can be put together: each rank gathers all
ranks' few numbers per token, and forms the same row statistics from them, to the bit. The objective then works on each
rank alike, and each writes the gradient of its own columns: no collective in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .backends import Backend
from .logits import Logits
from .origin import Origin
from .problem import Coefficients, Column, Problem, Stats, Targets, Transform

if TYPE_CHECKING:
    from .objectives import Objective
    from .problem import How
    from .stages import Source

_NOWHERE = -2  # a target that another rank has
_IGNORED = -1
_LOWEST = -1000.0  # of an exponent that meets e to it, which is 0 there
# torch 2.13 renamed it, and warns of the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class VocabShard(Origin):
    """Logits whose vocabulary is sharded over a process group: what this rank has of them.

    Args:
        local_logits: (..., C) float32, bfloat16 or float16: columns ``vocab_start`` to ``vocab_start + C`` of the
            logits. Every rank has the same tokens. float64 with ``backend="eager"`` only.
        group: the process group that the vocabulary is sharded over; None is the default group.
        vocab_start: the first of the columns that are here.
        vocab_size: the number of classes. Columns from there on are padding: they take no part, and their gradient is
            0.

    All ranks of the group have to call a loss, with the same targets, inputs and options; each gets the same loss, and
    the gradient of its own columns. Backward communicates nothing: the upstream gradient is taken to be the same on all
    ranks. Forward gathers 12 bytes per token and rank, with terms at most 32.

    The first call with a group and a layout compares what the ranks say of it, on the host.

    Raises:
        ValueError: the parts overlap, leave out a class, or differ in what the number of classes is; one has no column.
        TypeError: not a tensor, or of a dtype that is not taken.
    """

    def __init__(self, local_logits: Tensor, group: dist.ProcessGroup | None, vocab_start: int, vocab_size: int):
        self.local_logits = local_logits
        self.group = group
        self.vocab_start = vocab_start
        self.vocab_size = vocab_size

    def checked(self) -> VocabShard:
        with telling(self.group, self.vocab_start, self.vocab_size):
            local = checks.dense("local_logits", self.local_logits, (*checks.LOGITS_DTYPES, torch.float64))
            if local.dim() == 0:
                raise ValueError("local_logits must have shape (..., C), got a 0-d tensor")
            start, vocab_size = part_of(self.vocab_start, local.shape[-1], self.vocab_size)
        return VocabShard(local, self.group, start, vocab_size)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size((*self.local_logits.shape[:-1], self.vocab_size))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.local_logits.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.local_logits,)

    def source(self, how: How) -> Source:
        local = self.local_logits
        wide = local.dtype is torch.float64
        if wide and how.backend != "eager":
            with telling(self.group, self.vocab_start, self.vocab_size):
                raise TypeError(f'local_logits in float64 need backend="eager", got backend={how.backend!r}')
        layout = layout_of(self.group, self.vocab_start, local.shape[-1], self.vocab_size, wide)
        return Logits(how.backend, how.inplace, how.validate, layout)

    def overwritten(self) -> Tensor:
        return self.local_logits

    def traced(self) -> bool:
        return False

    def logits(self) -> Tensor:
        raise TypeError("logits must be whole for fused_losses.reference, got a VocabShard")


def of_dtensor(logits: Any) -> Any:
    """A VocabShard of a DTensor whose vocabulary one dimension of its mesh shards; one whose rows are whole as it is.
    Other dimensions may shard the tokens: a loss is of those that are here."""
    from torch.distributed.tensor import Replicate, Shard

    placements = logits.placements
    tokens = [p for p in placements if type(p) is Replicate or (type(p) is Shard and p.dim != logits.dim() - 1)]
    over = [i for i, placement in enumerate(placements) if placement == Shard(logits.dim() - 1)]
    if len(tokens) == len(placements):
        return logits
    if len(over) != 1 or len(over) + len(tokens) != len(placements):
        raise ValueError(
            "logits must be a plain tensor, or a DTensor whose vocabulary one dimension of the mesh places by "
            f"Shard(-1), others being Shard or Replicate; got one with placements {placements}"
        )
    mesh, size = logits.device_mesh, logits.shape[-1]
    columns = -(-size // mesh.size(over[0]))  # as torch.chunk deals them
    start = min(columns * mesh.get_local_rank(over[0]), size)
    return VocabShard(logits.to_local(), mesh.get_group(over[0]), start, size)


# ---- Which rank has which columns ----


class Layout(NamedTuple):
    group: dist.ProcessGroup
    rank: int
    starts: tuple[int, ...]  # by rank; each part ends where the next one starts, or at the number of classes
    ends: tuple[int, ...]
    widest: int  # columns of the widest part, padding included

    @property
    def here(self) -> int:
        """How many classes this rank has."""
        return self.ends[self.rank] - self.starts[self.rank]

    def over(self, backend: Backend) -> Backend:
        whole = len(self.starts) == 1 and self.here == self.widest
        return backend if whole else Sharded(backend, self)


class _Said(NamedTuple):
    """What a rank says of its part."""

    start: int
    width: int
    vocab_size: int
    wide: bool  # in float64, as its statistics then are
    wrong: str | None = None


# What was asked, by (group, start, vocab_size, width, wide). Never forgotten: ranks have to forget alike.
_layouts: dict[tuple[Any, ...], Layout] = {}


def layout_of(group: dist.ProcessGroup | None, start: int, width: int, vocab_size: int, wide: bool = False) -> Layout:
    """Asked once: a collective, after which all ranks know the same and raise alike."""
    group = process_group(group)
    key = group, start, vocab_size, width, wide
    if key not in _layouts:
        said = _asked(group, _Said(start, width, vocab_size, wide))
        _agree(said)
        starts, ends = zip(*((part.start, min(part.start + part.width, vocab_size)) for part in said), strict=True)
        _layouts[key] = Layout(group, dist.get_rank(group), starts, ends, max(part.width for part in said))
    return _layouts[key]


@contextmanager
def telling(group: dist.ProcessGroup | None, start: object, vocab_size: object) -> Iterator[None]:
    """An error of this rank's arguments is told to the others, who wait for what it says of its part. They do not
    where they have asked before."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not torch.compiler.is_compiling():
            group = process_group(group)
            if not any(key[0] is group and _may_be(start, key[1]) and _may_be(vocab_size, key[2]) for key in _layouts):
                with suppress(RuntimeError):
                    _asked(group, _Said(0, 0, 0, False, str(error)))
        raise


def _may_be(given: object, known: int) -> bool:
    return not isinstance(given, int) or given == known


def part_of(start: int, width: int, vocab_size: int) -> tuple[int, int]:
    """vocab_start and vocab_size."""
    start, vocab_size = checks.index("vocab_start", start), checks.index("vocab_size", vocab_size)
    if start < 0 or vocab_size <= 0:
        raise ValueError(f"vocab_start must be at least 0 and vocab_size greater than 0, got {start} and {vocab_size}")
    if width == 0 or start >= vocab_size:
        raise ValueError(
            f"vocab_start: a part without any class, columns {start} to {start + width} of vocab_size {vocab_size}. "
            "Every rank of the group needs one"
        )
    return start, vocab_size


def process_group(group: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialised; call init_process_group first")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: this rank is not one of it")
    return group


def _asked(group: dist.ProcessGroup, here: _Said) -> list[_Said]:
    said: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(said, here, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of a vocabulary's group asked which columns the others have, and one did not "
            f"take part: {error}"
        ) from error
    return said


def _agree(said: Sequence[_Said]) -> None:
    for rank, part in enumerate(said):
        if part.wrong is not None:
            raise ValueError(f"rank {rank} of the group: {part.wrong}")
    if len({part.wide for part in said}) > 1:
        raise ValueError(
            f"local_logits must be float64 on all ranks of the group or on none, got {[part.wide for part in said]}"
        )
    sizes = [part.vocab_size for part in said]
    if len(set(sizes)) > 1:
        raise ValueError(f"vocab_size must be the same on all ranks of the group, got {sizes}")
    listed = ", ".join(f"rank {r}: [{part.start}, {part.start + part.width})" for r, part in enumerate(said))
    reached = 0
    for part in sorted(said):
        if part.start != reached:
            what = "overlap" if part.start < reached else "leave a gap"
            raise ValueError(f"vocab_start: the parts of the vocabulary {what} at column {part.start}: {listed}")
        reached = part.start + part.width
    if reached < sizes[0]:
        raise ValueError(f"vocab_size is {sizes[0]}, but the parts of the group's ranks end at {reached}: {listed}")


# ---- The stages over what is here ----


class Sharded:
    """A :class:`backends.Backend` over another: its stages on the columns that are here, for rows that all ranks
    share."""

    looks_at_targets = False

    def __init__(self, backend: Backend, layout: Layout):
        self.backend = backend
        self.layout = layout

    def unusable(self, device: torch.device) -> str | None:
        return self.backend.unusable(device)

    def runs(self, objective: Objective) -> bool:
        return self.backend.runs(objective)

    def loss_and_grad(self, logits: Tensor, problem: Problem, gradient: Tensor) -> tuple[Tensor, Tensor]:
        stats = self.stats(logits, problem)
        loss, logprobs, coefficients = self.objective(stats, problem, True)
        self.grad(logits, problem.targets, problem.transform, stats, coefficients, 1.0, gradient)
        return loss, logprobs

    def stats(self, logits: Tensor, problem: Problem) -> Stats:
        here = problem._replace(targets=self._targets(problem.targets))
        table = self.backend.stats(logits[..., : self.layout.here], here).table  # gathered as one tensor
        return joined(gathered(table, self.layout), problem, self.layout)

    def objective(self, stats: Stats, problem: Problem, reduce: bool) -> tuple[Tensor, Tensor, Coefficients]:
        return self.backend.objective(stats, problem, reduce)

    def grad(
        self,
        logits: Tensor,
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Column,
        gradient: Tensor,
    ) -> None:
        here = self.layout.here
        local, padding = gradient[..., :here], gradient[..., here:]
        targets = self._targets(targets)
        self.backend.grad(logits[..., :here], targets, transform, stats, coefficients, upstream, local)
        padding.zero_()

    def scale(self, gradient: Tensor, upstream: Tensor) -> None:
        self.backend.scale(gradient, upstream)

    def _targets(self, targets: Targets) -> Targets:
        """As columns of what is here."""
        tokens, first = targets.tokens, self.layout.starts[self.layout.rank]
        outside = (tokens < first) | (tokens >= first + self.layout.here)
        local = (tokens - first).masked_fill(outside, _NOWHERE)
        local = local.masked_fill(tokens == targets.ignore_index, _IGNORED)
        return Targets(local, _IGNORED, targets.shares)


def gathered(table: Tensor, layout: Layout) -> Tensor:
    """(R, ., N): the tables of all ranks."""
    ranks, (numbers, n) = len(layout.starts), table.shape
    parts = table.new_empty(ranks * numbers, n)
    try:
        _all_gather(parts, table, layout.group)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {layout.rank} of a vocabulary's group gathered statistics of {n} tokens, and another rank did not "
            f"take part, or with another number of tokens: {error}"
        ) from error
    return parts.view(ranks, numbers, n)


def joined(parts: Tensor, problem: Problem, layout: Layout) -> Stats:
    """The statistics of whole rows, from those (R, ., N) of their parts.

    Relative to M, the largest of the parts' maxima M_r, a part's sums grow by delta_r = z(M_r) - z(M):

        sum_j e^d_j         e^delta_r S_r
        sum_j e^d_j d_j     e^delta_r (moment_r + delta_r S_r)
        sum_j d_j           drift_r + C_r delta_r
        sum_j e^(2 d_j)     e^(2 delta_r) squares_r
    """
    terms = problem.terms
    stats = Stats(parts.transpose(0, 1), terms.statistics)  # a number: (R, N)
    # (K, N): who does not have a target has NaN for its logit, and where all have, so has the row
    target = reduce(torch.fmax, parts[:, 2 : 2 + problem.targets.num].unbind())
    empty = stats.sum == 0
    maximum = stats.maximum.masked_fill(empty, torch.finfo(torch.float32).min).amax(0)
    if problem.targets.num == 1:  # no mass but its own
        maximum = torch.where(empty.all(0), target[0], maximum)
    delta = _distance(stats.maximum, maximum, problem.transform)
    grown = torch.exp(delta).masked_fill_(empty, 0.0)
    rows = [maximum, (grown * stats.sum).sum(0), *target.unbind(0)]
    if not problem.plain:
        nothing = torch.zeros_like(maximum)
        # where grown is 0 delta may be -inf
        moment = grown * (stats.moment + stats.sum * delta.masked_fill(empty, 0.0).clamp(min=_LOWEST))
        columns = _of_layout(layout, parts.device).columns[:, None]
        rows.append(moment.sum(0) if terms.entropy else nothing)
        # a part of -inf alone has no maximum to be relative to
        drift = (stats.drift + columns * delta).masked_fill(empty & ~stats.maximum.isfinite(), -torch.inf)
        rows.append(drift.sum(0) if terms.statistics or terms.label_smoothing != 0 else nothing)
    if terms.statistics:
        rows += [(grown * grown * stats.squares).sum(0), _top1(stats, problem.targets, target[0], layout)]
    return Stats(torch.stack(rows), terms.statistics)


def _top1(stats: Stats, targets: Targets, target: Tensor, layout: Layout) -> Tensor:
    """Whether the target is its own part's first of the largest, no part before it has as large a logit, and none after
    it a larger one."""
    owner, first = _owner(targets.tokens, layout), _of_layout(layout, target.device).first
    theirs = first[owner]
    before, mine = first[:, None] < theirs, first[:, None] == theirs
    beaten = torch.where(before, stats.maximum >= target, stats.maximum > target) & ~mine & (stats.sum != 0)
    return stats.top1.gather(0, owner[None])[0].masked_fill(beaten.any(0), 0.0)


def _owner(tokens: Tensor, layout: Layout) -> Tensor:
    """The rank that has each; of one that nobody has, any."""
    known = _of_layout(layout, tokens.device)
    return known.ranks[torch.bucketize(tokens.long(), known.starts, right=True)]


class _OnDevice(NamedTuple):
    starts: Tensor  # of the parts, in their order
    ranks: Tensor  # who has what begins there; the first is for what is before all
    first: Tensor  # column of each rank
    columns: Tensor  # how many of each rank


@lru_cache(maxsize=256)
def _of_layout(layout: Layout, device: torch.device) -> _OnDevice:
    order = sorted(range(len(layout.starts)), key=layout.starts.__getitem__)
    columns = [end - start for start, end in zip(layout.starts, layout.ends, strict=True)]
    return _OnDevice(
        torch.tensor([layout.starts[rank] for rank in order], device=device),
        torch.tensor([0, *order], device=device),
        torch.tensor(layout.starts, device=device),
        torch.tensor(columns, dtype=torch.float32, device=device),
    )


def _distance(logits: Tensor, maximum: Tensor, transform: Transform) -> Tensor:
    """z(logits) - z(maximum)"""
    if transform.softcap is None:
        distance = logits - maximum
        unit = isinstance(transform.temperature, float) and transform.temperature == 1.0
        return distance if unit else distance / transform.temperature
    levels = torch.tanh(logits / transform.softcap) - torch.tanh(maximum / transform.softcap)
    return levels * transform.softcap / transform.temperature  # in the dtype of logits, whatever temperature's
