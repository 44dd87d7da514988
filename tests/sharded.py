"""What ranks run of test_vocab_shard.py: imported there, and so without what a test session needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from cases import MODES, Case, Numbers, hold, make, run
from ranks import Rank
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_losses
from fused_losses import LinearHead, Objective, VocabShard, aggregation, reference

VOCAB = 130
# ends of the ranks' columns, by how many ranks
EVEN = {1: (130,), 2: (65, 130), 3: (44, 88, 130), 4: (33, 66, 99, 130)}
UNEVEN = {1: (130,), 2: (129, 130), 3: (3, 90, 130), 4: (1, 6, 7, 130)}
TOLERANCE = 1e-12  # in float64


def columns_of(here: Rank, ends: tuple[int, ...]) -> slice:
    return slice((0, *ends)[here.rank], ends[here.rank])


def shard(here: Rank, logits: Tensor, ends: tuple[int, ...] | None = None, vocab: int | None = None) -> VocabShard:
    """This rank's columns of whole logits."""
    columns = columns_of(here, ends or UNEVEN[here.world])
    return VocabShard(logits[..., columns], here.group, columns.start, vocab or logits.shape[-1])


def whole(here: Rank, gradient: Tensor) -> Tensor:
    """The ranks' gradients of whole logits, each of which is 0 outside of the rank's columns."""
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=here.group)
    return gradient


def run_sharded(here: Rank, case: Case, backend: str, dtype: torch.dtype | None = None, **keywords: Any) -> Numbers:
    function = case.public(backend)

    def call(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(shard(here, logits), *args, **kwargs)

    numbers = run(call, case, dtype, **keywords)
    return replace(numbers, gradient=whole(here, numbers.gradient))


def assert_exact(actual: Tensor, truth: Tensor, what: str = "") -> None:
    """Of float64."""
    assert actual.dtype is torch.float64, actual.dtype
    torch.testing.assert_close(actual, truth, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True, msg=lambda m: what + m)


def assert_exact_numbers(actual: Numbers, truth: Numbers, what: str = "") -> None:
    assert_exact(actual.loss, truth.loss, f"{what} loss: ")
    assert_exact(actual.gradient, truth.gradient, f"{what} gradient: ")
    if actual.logprobs is not None:
        assert truth.logprobs is not None
        assert_exact(actual.logprobs, truth.logprobs, f"{what} logprobs: ")


def assert_same_everywhere(here: Rank, *tensors: Tensor | None) -> None:
    """To the bit."""
    for tensor in tensors:
        if tensor is None:
            continue
        others = [torch.empty_like(tensor) for _ in range(here.world)]
        dist.all_gather(others, tensor.contiguous(), group=here.group)
        for other in others:
            torch.testing.assert_close(other, tensor, rtol=0, atol=0, equal_nan=True)


# ---- Every loss and option ----


UPSTREAM = -1 / 3  # no float32


def exact_modes(here: Rank, objective: str, keywords: dict[str, Any], modes: tuple[str, ...]) -> None:
    case = make(objective, (7,), VOCAB, **keywords)
    for mode in modes:
        given = case.having(**MODES[mode])
        actual = run_sharded(here, given, "eager", torch.float64, upstream=UPSTREAM)
        truth = run(case.reference, case.having(**mode_of_reference(mode)), torch.float64, upstream=UPSTREAM)
        assert_exact_numbers(actual, truth, mode)
        assert_same_everywhere(here, actual.loss, actual.logprobs)


def mode_of_reference(mode: str) -> dict[str, Any]:
    return MODES[mode] if mode == "none" else {}


def held_modes(
    here: Rank, objective: str, keywords: dict[str, Any], dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    case = make(objective, (7,), VOCAB, dtype, **keywords)
    for mode in modes:
        given = case.having(**MODES[mode])
        actual = run_sharded(here, given, "cpu")
        hold(given, actual)
        assert_same_everywhere(here, actual.loss, actual.logprobs)


# ---- Losses in two phases, logprobs, several targets ----

N = 12


def drawn_tokens(seed: int = 0, n: int = N, vocab: int = VOCAB) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    targets = torch.randint(vocab, (n,))
    targets[2] = -100
    return {
        "logits": torch.randn(n, vocab).double() * 3,
        "targets": targets,
        "old": torch.randn(n) * 0.3 - 5,
        "advantages": torch.randn(n),
        "several": torch.randint(vocab, (n, 3)),
        "weights": torch.rand(n, 3),
    }


def square(logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return advantages * torch.tanh(logp - old.to(logp.dtype)) ** 2


def formula(logp: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    tanh = torch.tanh(logp - old)
    return advantages * tanh**2, advantages * 2 * tanh * (1 - tanh**2)


def seen_statistics(here: Rank, on: str) -> None:
    """Of targets that are, or are not, the first of equal maxima, in one part or in several; and of a head in parts."""
    torch.manual_seed(0)
    logits = torch.randint(-3, 4, (N, VOCAB)).float()
    highest = logits == logits.amax(-1, keepdim=True)
    first, last = highest.int().argmax(-1), VOCAB - 1 - highest.flip(-1).int().argmax(-1)
    keywords: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0}
    for targets in (first, last, torch.randint(VOCAB, (N,)).masked_fill_(torch.arange(N) == 3, -100)):
        whole_logits = logits.double().requires_grad_()
        local = logits.clone().requires_grad_()
        truth = reference.statistics(whole_logits, targets, **keywords)
        seen = fused_losses.statistics(shard(here, local), targets, backend=on, **keywords)
        _same_statistics(seen, truth)
        assert_same_everywhere(here, *seen)
        by_logprobs, by_entropy = torch.randn(2, N)
        for given in (truth, seen):
            ((given.logprobs * by_logprobs).sum() + (given.entropy * by_entropy).sum()).backward()
        torch.testing.assert_close(whole(here, local.grad).double(), whole_logits.grad, rtol=1e-4, atol=1e-5)

        hidden, weight = torch.randn(N, 8), torch.randn(VOCAB, 8)
        part = columns_of(here, UNEVEN[here.world])
        parts = {"group": here.group, "vocab_start": part.start, "vocab_size": VOCAB}
        truth = reference.statistics(hidden.double() @ weight.double().t(), targets, **keywords)
        for skip_masked in (False, True):
            head = LinearHead(hidden, weight[part], chunk_bytes=3000, skip_masked=skip_masked, **parts)
            _same_statistics(fused_losses.statistics(head, targets, backend=on, **keywords), truth)


def _same_statistics(seen: fused_losses.Statistics, truth: fused_losses.Statistics) -> None:
    assert torch.equal(seen.top1, truth.top1)
    for name in ("logprobs", "entropy", "log_sum_squares", "mean_logit"):
        torch.testing.assert_close(getattr(seen, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-5)


CUT = torch.tensor([0, 5, 5, N])
COMPOSED: dict[str, Callable[[Any, Any, dict[str, Tensor]], Any]] = {
    "gspo": lambda m, x, d: m.gspo(x, d["targets"], d["old"], d["advantages"], cu_seqlens=CUT),
    "gspo, entropy": lambda m, x, d: m.gspo(
        x, d["targets"], d["old"], d["advantages"], cu_seqlens=CUT, ratio_gradient="sequence", entropy_coef=0.1
    ),
    "gmpo": lambda m, x, d: m.gmpo(x, d["targets"], d["old"], d["advantages"], cu_seqlens=CUT, softcap=9.0),
    "vespo": lambda m, x, d: m.vespo(x, d["targets"], d["old"], d["advantages"], cu_seqlens=CUT),
    "sapo": lambda m, x, d: m.sapo(
        x, d["targets"], d["old"], d["advantages"], ratio_level="sequence", cu_seqlens=CUT, temperature=0.7
    ),
    "policy_loss of a function": lambda m, x, d: m.policy_loss(
        x, d["targets"], square, d["old"], d["advantages"], entropy_coef=0.1
    ),
    "policy_loss of an Objective": lambda m, x, d: m.policy_loss(
        x, d["targets"], Objective("tanh", formula, ("old_logprobs", "advantages")), d["old"], d["advantages"]
    ),
    "policy_loss of a name": lambda m, x, d: m.policy_loss(x, d["targets"], "ppo", d["old"], d["advantages"]),
    "logprobs": lambda m, x, d: (m.logprobs(x, d["targets"], temperature=0.9) * d["advantages"]).sum(),
    "logprobs and entropy": lambda m, x, d: sum(
        (y * d["advantages"]).sum() for y in m.logprobs(x, d["targets"], softcap=8.0, return_entropy=True)
    ),
    "entropy alone": lambda m, x, d: (m.logprobs(x, d["targets"], return_entropy=True)[1] * d["advantages"]).sum(),
    "several targets": lambda m, x, d: m.cross_entropy(x, d["several"], label_smoothing=0.1, z_loss=0.01),
    "several weighted targets": lambda m, x, d: m.cross_entropy(x, d["several"], weights=d["weights"], softcap=5.0),
}


class OfBackend:
    """The package, each loss with a backend."""

    def __init__(self, backend: str):
        self.backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(fused_losses, name)(*args, backend=self.backend, **kwargs)


def several_over_parts(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """Duplicates, targets of different parts, some ignored, all ignored."""
    several = tokens["several"].clone()
    several[0] = 4
    several[1] = torch.tensor([0, VOCAB - 1, 0])
    several[3] = torch.tensor([-100, VOCAB - 1, -100])
    several[4] = -100
    return tokens | {"several": several}


def both(
    here: Rank,
    loss: Callable[[Any, Any, dict[str, Tensor]], Any],
    tokens: dict[str, Tensor],
    dtype: torch.dtype,
    backend: str,
) -> tuple[Numbers, Numbers]:
    """(sharded, one process' truth)"""
    found = []
    for module, x in (
        (OfBackend(backend), tokens["logits"].to(dtype)),
        (reference, tokens["logits"].to(dtype).double()),
    ):
        x = x.clone().requires_grad_()
        seen = loss(module, x if module is reference else shard(here, x), tokens)
        seen.backward(torch.tensor(UPSTREAM, dtype=seen.dtype))
        assert x.grad is not None
        found.append(Numbers(seen.detach(), x.grad if module is reference else whole(here, x.grad)))
    return found[0], found[1]


def exact_composed(here: Rank, name: str) -> None:
    actual, truth = both(here, COMPOSED[name], several_over_parts(drawn_tokens()), torch.float64, "eager")
    assert_same_everywhere(here, actual.loss)
    assert_exact_numbers(actual, truth, name)


def close_composed(here: Rank, name: str, dtype: torch.dtype) -> None:
    actual, truth = both(here, COMPOSED[name], several_over_parts(drawn_tokens()), dtype, "cpu")
    assert_same_everywhere(here, actual.loss)
    assert actual.loss.dtype is torch.float32 and actual.gradient.dtype is dtype
    torch.testing.assert_close(actual.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
    rtol = 4e-6 if dtype is torch.float32 else 0.008  # rounded, scaled and rounded again
    torch.testing.assert_close(actual.gradient.double(), truth.gradient, rtol=rtol, atol=4e-7)


# ---- Where columns are, and what they hold ----


def exact_layout(here: Rank, parts: list[tuple[int, int]], vocab: int, leading: tuple[int, ...]) -> None:
    """parts: (first, width) by rank, the last ones padded beyond ``vocab``; what lies there is NaN and inf."""
    case = make("cross_entropy", leading, vocab, label_smoothing=0.1, z_loss=0.01, ignored=False)
    edges = torch.tensor([edge for first, width in parts for edge in (first, min(first + width, vocab) - 1)])
    n = min(len(edges), case.target_tokens.numel())
    case.target_tokens.view(-1)[:n] = edges[:n]
    case.storage.view(-1, vocab)[torch.arange(n), edges[:n]] = 0.5
    truth = run(case.reference, case, torch.float64)
    first, width = parts[here.rank]
    end = min(first + width, vocab)
    for dtype, backend in ((torch.float64, "eager"), (torch.float32, "cpu")):
        for given in ({}, {"recompute": True}, {"inplace": True}):
            leaf = torch.full((*leading, width), torch.nan, dtype=dtype)
            leaf[..., (end - first) :: 2] = torch.inf
            leaf[..., : end - first] = case.storage[..., first:end]
            leaf.requires_grad_()
            local = leaf.clone() if given.get("inplace") else leaf
            part = VocabShard(local, here.group, first, vocab)
            loss = fused_losses.cross_entropy(
                part, case.target_tokens, label_smoothing=0.1, z_loss=0.01, backend=backend, **given
            )
            loss.backward()
            assert leaf.grad is not None and leaf.grad.shape == leaf.shape
            padding = leaf.grad[..., end - first :]
            assert torch.equal(padding, torch.zeros_like(padding)), "padding"
            tolerance = TOLERANCE if dtype is torch.float64 else 3e-6
            close(loss, truth.loss, tolerance)
            close(leaf.grad[..., : end - first], truth.gradient[..., first:end], tolerance)


def close(actual: Tensor, truth: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), truth.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 6.0},
    "entropy": {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs": -2.0},
    "all": {"entropy_coef": 0.1, "softcap": 6.0, "temperature": 0.8},
}


def masked_part(here: Rank, backend: str, dtype: torch.dtype) -> None:
    """Each rank's columns in turn are all -inf, of some rows but for the target."""
    for masked in range(here.world):
        for name, terms in TERMS.items():
            columns = columns_of(here._replace(rank=masked), UNEVEN[here.world])
            case = make("ppo", (9,), VOCAB, **terms)
            storage = case.storage.clone()
            storage[:, columns] = -torch.inf
            inside = (case.target_tokens >= columns.start) & (case.target_tokens < columns.stop)
            case.target_tokens[3] = columns.start
            inside[3] = True
            storage[inside] = storage[inside].scatter(1, case.target_tokens[inside, None], 1.5)
            case = replace(case, storage=storage)
            truth = run(case.reference, case, torch.float64)
            for mode in ({}, {"recompute": True}):
                actual = run_sharded(here, case.having(**mode), backend, dtype if backend == "eager" else None)
                if dtype is torch.float64:
                    assert_exact_numbers(actual, truth, f"{masked} {name}")
                else:
                    close(actual.loss, truth.loss, 1e-5)
                    close(actual.gradient, truth.gradient, 1e-5)


def masked_part_of_smoothed_labels(here: Rank, on: str) -> None:
    """Which are shared out over -inf, too: a loss of inf, as in one process."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:2, 129] = logits[2, :129] = -torch.inf
    targets = torch.tensor([0, 129, 129, 64])
    found = []
    for call, given in ((reference.cross_entropy, logits.double()), (fused_losses.cross_entropy, shard(here, logits))):
        keywords = {} if call is reference.cross_entropy else {"backend": on}
        found.append(call(given, targets, reduction="none", label_smoothing=0.1, **keywords))
    close(found[1], found[0], 2e-6)


def special_rows(here: Rank, backend: str) -> None:
    """NaN, inf and rows of nothing: what they do to their row on all ranks, and that they do it to no other."""
    dtype = torch.float64 if backend == "eager" else torch.float32
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.tensor([0, 1, 129, 7, 5, 128, -100, 60])
    logits[0, 100] = torch.nan
    logits[1, 0] = torch.inf
    logits[2, 129] = -torch.inf  # the target
    logits[3] = -torch.inf
    logits[4, 5] = torch.nan  # the target
    logits[5] = -torch.inf
    logits[5, 128] = 0.0  # all that there is
    logits[6] = torch.nan
    for keywords in ({}, {"label_smoothing": 0.0, "z_loss": 0.01}, {"recompute": True}, {"temperature": 0.25}):
        for several in (False, True):
            found = []
            tokens = torch.stack((targets, targets), 1) if several else targets
            for call in (reference.cross_entropy, fused_losses.cross_entropy):
                x = logits.clone().requires_grad_()
                ours = call is fused_losses.cross_entropy
                loss, outputs = call(
                    shard(here, x) if ours else x,
                    tokens,
                    reduction="none",
                    return_outputs=True,
                    **keywords | ({"backend": backend, "recompute": False} if ours else {}),
                )
                loss.sum().backward()
                found.append((loss.detach(), outputs.logprobs, whole(here, x.grad) if ours else x.grad))
            for actual, truth in zip(found[1], found[0], strict=True):
                close(actual, truth, TOLERANCE if backend == "eager" else 2e-6)
            losses, logprobs, gradient = found[1]
            assert_same_everywhere(here, losses, logprobs)
            assert [row for row in range(8) if gradient[row].isnan().any()] == [0, 1, 3, 4]
            assert all(gradient[row].isnan().all() for row in (0, 1, 3, 4))
            assert torch.equal(gradient[6], torch.zeros_like(gradient[6])) and losses[6] == 0


def sure_targets(here: Rank, backend: str) -> None:
    """A target that leads by 40, wherever it is: no digit is lost to 1 - p."""
    vocab = 24
    ends = tuple(vocab * (rank + 1) // here.world for rank in range(here.world))
    targets = torch.arange(vocab)
    logits = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0))
    logits.scatter_(1, targets[:, None], 40.0)
    others = logits.double().scatter(1, targets[:, None], -torch.inf)
    rest = torch.exp(others - 40.0)
    expected = rest / (1 + rest.sum(1, keepdim=True))
    expected = expected.scatter(1, targets[:, None], -expected.sum(1, keepdim=True))
    for keywords in ({}, {"recompute": True}, {"z_loss": 1e-30}, {"inplace": True}):
        x = logits.clone().requires_grad_()
        loss = fused_losses.cross_entropy(
            shard(here, x.clone() if "inplace" in keywords else x, ends),
            targets,
            reduction="sum",
            backend=backend,
            **keywords,
        )
        loss.backward()
        assert x.grad is not None
        torch.testing.assert_close(whole(here, x.grad).double(), expected, rtol=2e-5, atol=0)
        error = (whole(here, x.grad).double() / expected - 1).abs()
        own = error.gather(1, targets[:, None])
        assert own.max() < 2e-5, own.max()
        torch.testing.assert_close(loss.double(), torch.log1p(rest.sum(1)).sum(), rtol=2e-5, atol=0)


def ignored(here: Rank) -> None:
    """An ignore_index that a shifted target might be taken for, of both kinds of index."""
    logits = drawn_tokens()["logits"]
    ends = UNEVEN[here.world]
    starts = (0, *ends[:-1])
    tempting = {
        -100,
        -1,
        -2,
        0,
        1,
        *starts,
        *(-start for start in starts),
        *(-start - 1 for start in starts),
        5,
        125,
        VOCAB,
        1000,
    }
    targets = torch.tensor([0, 1, 2, 3, 5, 6, 7, 89, 90, 128, 129, 125])
    for ignore_index in sorted(tempting):
        for dtype in (torch.int64, torch.int32):
            for several in (False, True):
                given = targets.clone().to(dtype)
                given[4] = ignore_index
                if several:
                    given = torch.stack((given, given.flip(0)), 1)
                x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
                loss = fused_losses.cross_entropy(shard(here, x), given, ignore_index=ignore_index, backend="eager")
                truth = reference.cross_entropy(y, given.long(), ignore_index=ignore_index)
                loss.backward()
                truth.backward()
                assert x.grad is not None and y.grad is not None
                assert_exact(loss.detach(), truth.detach(), f"{ignore_index}")
                assert_exact(whole(here, x.grad), y.grad, f"{ignore_index}")


def no_tokens(here: Rank) -> None:
    for backend, dtype in (("eager", torch.float64), ("cpu", torch.bfloat16)):
        for leading in ((0,), (3, 0), (0, 4)):
            leaf = torch.zeros(*leading, VOCAB, dtype=dtype, requires_grad=True)
            targets = torch.zeros(leading, dtype=torch.int64)
            for recompute in (False, True):
                loss = fused_losses.ppo(shard(here, leaf), targets, -1.0, 1.0, recompute=recompute, backend=backend)
                assert loss.item() == 0
                (gradient,) = torch.autograd.grad(loss, leaf)
                assert gradient.shape == leaf.shape
            logp, entropy = fused_losses.logprobs(shard(here, leaf), targets, return_entropy=True, backend=backend)
            assert logp.shape == entropy.shape == leading


def all_ignored(here: Rank) -> None:
    """A zero that is connected to the graph, whatever the rows hold."""
    for backend, dtype in (("eager", torch.float64), ("cpu", torch.bfloat16)):
        for keywords in ({}, {"recompute": True}, {"entropy_coef": 0.1}, {"reduction": "none"}):
            leaf = torch.full((5, VOCAB), torch.nan, dtype=dtype, requires_grad=True)
            loss = fused_losses.ppo(shard(here, leaf), torch.full((5,), -100), 0.0, 1.0, backend=backend, **keywords)
            assert loss.requires_grad and (loss == 0).all()
            loss.sum().backward()
            assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


def repeated(here: Rank) -> None:
    """The same step twice is bitwise the same; over one rank it is the plain call."""
    for backend, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("eager", torch.float32)):
        for name, loss in COMPOSED.items():
            if here.world > 1 and name not in ("gspo", "several targets", "logprobs and entropy"):
                continue
            tokens = several_over_parts(drawn_tokens())
            found = []
            for kind in ("first", "again", "plain"):
                x = tokens["logits"].to(dtype).requires_grad_()
                if kind == "plain" and here.world > 1:
                    continue
                value = loss(OfBackend(backend), x if kind == "plain" else shard(here, x), tokens)
                value.backward()
                found.append((value.detach(), x.grad))
            for other in found[1:]:
                for a, b in zip(found[0], other, strict=True):
                    assert torch.equal(a, b), (name, backend, dtype)
        for objective in ("ppo", "cross_entropy"):
            for keywords in (
                {},
                {"recompute": True},
                {"reduction": "none"},
                {"label_smoothing": 0.1} if objective != "ppo" else {"entropy_coef": 0.1},
            ):
                case = make(objective, (7,), VOCAB, dtype, **keywords)
                first, again = (run_sharded(here, case, backend) for _ in range(2))
                others = [again]
                # in one pass the CPU's kernel reads a row once for both: its sum may round otherwise
                if here.world == 1 and (backend == "eager" or "recompute" in keywords or "reduction" in keywords):
                    others.append(run(case.public(backend), case))
                for other in others:
                    assert torch.equal(first.loss, other.loss), (objective, backend, keywords)
                    assert torch.equal(first.gradient, other.gradient), (objective, backend, keywords)


def shapes(here: Rank) -> None:
    """Three dimensions, and logits that kernels walk with strides or have to copy."""
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "three dimensions": lambda t: t,
        "all but the last token": lambda t: t[:, :-1],
        "transposed": lambda t: t.transpose(0, 1),
        "every other column": lambda t: t[..., ::2],
        "expanded": lambda t: t[:, :1].expand(-1, 3, -1),
    }
    for view in views.values():
        for backend, dtype in (("eager", torch.float64), ("cpu", torch.float32)):
            case = make(
                "ppo", (3, 4), 2 * VOCAB if view is views["every other column"] else VOCAB, view=view, entropy_coef=0.1
            )
            truth = run(case.reference, case, torch.float64)
            for keywords in ({}, {"recompute": True}, {"reduction": "none"}):
                if "reduction" in keywords:
                    truth = run(case.reference, case, torch.float64, reduction="none")
                actual = run_sharded(here, case, backend, dtype, **keywords)
                close(actual.loss, truth.loss, TOLERANCE if backend == "eager" else 3e-6)
                close(actual.gradient, truth.gradient, TOLERANCE if backend == "eager" else 3e-6)


def metrics(here: Rank) -> dict[str, float]:
    tokens = drawn_tokens()
    targets, old, advantages = tokens["targets"], tokens["old"], tokens["advantages"]
    for name in ("ppo", "gspo", "policy_loss"):
        more: tuple[Any, ...] = (square,) if name == "policy_loss" else ()
        x, y = tokens["logits"].float(), tokens["logits"].float()
        _, outputs = getattr(fused_losses, name)(
            shard(here, x), targets, *more, old, advantages, entropy_coef=0.1, return_outputs=True, backend="cpu"
        )
        _, expected = getattr(reference, name)(
            y.double(), targets, *more, old, advantages, entropy_coef=0.1, return_outputs=True
        )
        assert_same_everywhere(here, outputs.logprobs, outputs.entropy)
        close(outputs.logprobs, expected.logprobs, 2e-6)
        close(outputs.entropy, expected.entropy, 2e-6)
        found, truth = outputs.metrics, expected.metrics
        assert found.keys() == truth.keys()
        for key, value in found.items():
            assert_same_everywhere(here, value)
            close(value, truth[key], 1e-5)
    return {}


# ---- Collectives ----

_COLLECTIVES = (
    "allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce",
    "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "alltoall", "alltoall_base", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "barrier", "monitored_barrier", "send", "recv",
    "recv_anysource", "all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "all_to_all_single",
)  # fmt: skip


class Seen(NamedTuple):
    name: str
    size: int  # bytes that this rank puts in


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


@contextmanager
def watching() -> Iterator[list[Seen]]:
    """The collectives of this rank, whichever function of torch.distributed they came by."""
    seen: list[Seen] = []
    kept = {name: method for name, method in vars(dist.ProcessGroup).items() if name in _COLLECTIVES}

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(dist.ProcessGroup, name)

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [arg for arg in args if _bytes(arg)]
            seen.append(Seen(name, _bytes(tensors[-1]) if tensors else 0))  # the input comes after the output
            return method(group, *args, **kwargs)

        return call

    try:
        for name in kept:
            setattr(dist.ProcessGroup, name, counted(name))
        yield seen
    finally:
        for name, method in kept.items():
            setattr(dist.ProcessGroup, name, method)


def collectives(here: Rank, backend: str, dtype: torch.dtype) -> None:
    """One in forward, of a few bytes per token, and none in backward."""
    tokens = several_over_parts(drawn_tokens())
    targets, old, advantages = tokens["targets"], tokens["old"], tokens["advantages"]
    ours = OfBackend(backend)
    calls: dict[str, Callable[[Any], Any]] = {
        **{name: lambda x, loss=loss: loss(ours, x, tokens) for name, loss in COMPOSED.items()},
        "one pass": lambda x: ours.ppo(x, targets, old, advantages),
        "recompute": lambda x: ours.ppo(x, targets, old, advantages, recompute=True),
        "none": lambda x: ours.ppo(x, targets, old, advantages, reduction="none").sum(),
        "all ignored": lambda x: ours.ppo(x, torch.full_like(targets, -100), old, advantages),
        "terms": lambda x: ours.ppo(
            x, targets, old, advantages, entropy_coef=0.1, kl_coef=0.1, ref_logprobs=old, return_outputs=True
        )[0],
        "validate": lambda x: ours.ppo(x, targets, old, advantages, validate=True),
        "smoothing": lambda x: ours.cross_entropy(x, targets, label_smoothing=0.1, z_loss=0.1, softcap=8.0),
    }
    for name, call in calls.items():
        local = tokens["logits"][:, columns_of(here, UNEVEN[here.world])].to(dtype).requires_grad_()
        part = VocabShard(local, here.group, columns_of(here, UNEVEN[here.world]).start, VOCAB)
        call(part)  # asks which columns the others have
        with watching() as forward:
            loss = call(part)
        assert len(forward) == (here.world > 1), (name, forward)
        for seen in forward:
            per_token = 32 * (2 if dtype is torch.float64 else 1)
            plain = 12 * (2 if dtype is torch.float64 else 1)
            bound = plain if name in ("one pass", "recompute", "none", "all ignored", "validate") else per_token
            assert "allgather" in seen.name.replace("_", "") and 0 < seen.size <= bound * N, (name, seen)
        with watching() as backward:
            loss.backward()
        assert backward == [], (name, backward)
        with watching() as without_gradient, torch.no_grad():
            call(part)
        assert len(without_gradient) == (here.world > 1), (name, without_gradient)


# ---- What is wrong ----


def misuse(here: Rank, kind: str, culprit: int | None) -> None:
    """The first call of a group of its own. culprit: the rank that is wrong, or None for all of them."""
    group = dist.new_group(list(range(here.world)), timeout=timedelta(seconds=6))
    wrong = culprit is None or culprit == here.rank
    columns = columns_of(here, EVEN[here.world])
    given: dict[str, Any] = {
        "local_logits": torch.zeros(4, columns.stop - columns.start, requires_grad=True),
        "group": group,
        "vocab_start": columns.start,
        "vocab_size": VOCAB,
    }
    if wrong:
        given |= MISUSE[kind](given)
    loss = fused_losses.cross_entropy(VocabShard(**given), torch.zeros(4, dtype=torch.int64))
    loss.backward()


def _fewer(given: dict[str, Any], by: int) -> Tensor:
    return given["local_logits"].detach()[:, by:].requires_grad_()


MISUSE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "overlap": lambda given: {"vocab_start": max(given["vocab_start"] - 3, 0), "vocab_size": VOCAB},
    "gap": lambda given: {"local_logits": _fewer(given, 2)},
    "a dtype that is not taken": lambda given: {"local_logits": given["local_logits"].detach().int()},
    "float64": lambda given: {"local_logits": given["local_logits"].detach().double().requires_grad_()},
    "no tensor": lambda given: {"local_logits": [[1.0]]},
    "no dimension": lambda given: {"local_logits": torch.zeros(())},
    "no column": lambda given: {"local_logits": torch.zeros(4, 0)},
    "a start that is a float": lambda given: {"vocab_start": float(given["vocab_start"])},
    "a start that is a tensor": lambda given: {"vocab_start": torch.tensor(given["vocab_start"])},
    "a start that is a list": lambda given: {"vocab_start": [given["vocab_start"]]},
    "a start below 0": lambda given: {"vocab_start": -1},
    "a start beyond the end": lambda given: {"vocab_start": VOCAB},
    "a size that is a float": lambda given: {"vocab_size": float(VOCAB)},
    "a size of 0": lambda given: {"vocab_size": 0},
    "another size": lambda given: {"vocab_size": VOCAB - 1},
    "a size that the parts do not reach": lambda given: {"vocab_size": VOCAB + 1},
}


def misuse_of_head(here: Rank, kind: str) -> None:
    """Rank 1 is wrong."""
    group = dist.new_group(list(range(here.world)), timeout=timedelta(seconds=6))
    columns = columns_of(here, EVEN[here.world])
    given: dict[str, Any] = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(columns.stop - columns.start, 8),
        "vocab_start": columns.start,
        "vocab_size": VOCAB,
    }
    if here.rank == 1:
        given |= MISUSE_OF_HEAD[kind](given)
    fused_losses.cross_entropy(LinearHead(**given, group=group), torch.zeros(4, dtype=torch.int64))


MISUSE_OF_HEAD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "weight": lambda given: {"weight": given["weight"].double()},
    "hidden": lambda given: {"hidden": given["hidden"][:, :7]},
    "bias": lambda given: {"bias": torch.zeros(3)},
    "hidden_grad": lambda given: {"hidden_grad": "none"},
    "vocab_start": lambda given: {"vocab_start": 1.5},
    "vocab_size": lambda given: {"vocab_size": VOCAB + 1},
}


def wrong_group(here: Rank, kind: str) -> None:
    group: Any = {"a list": [0, 1], "an int": 3, "a size": here.group.size(), "a smaller group": here.group}[kind]
    columns = columns_of(here, EVEN[here.world])
    if kind == "a smaller group":  # the parts of four ranks, over two
        columns = slice(33 * here.rank, 33 * here.rank + 33)
    local = torch.zeros(4, columns.stop - columns.start)
    fused_losses.cross_entropy(VocabShard(local, group, columns.start, VOCAB), torch.zeros(4, dtype=torch.int64))


def target_out_of_range(here: Rank, backend: str, target: int, several: bool, validate: bool) -> None:
    targets = torch.tensor([0, VOCAB - 1, target, -100])
    targets = targets[:, None].expand(-1, 2) if several else targets
    x = torch.zeros(4, VOCAB, requires_grad=True)
    good = torch.zeros_like(targets)
    fused_losses.cross_entropy(shard(here, x), good, backend=backend)  # what follows asks nothing
    for keywords in ({}, {"recompute": True}, {"reduction": "none"}):
        with watching() as seen:
            try:
                fused_losses.cross_entropy(shard(here, x), targets, backend=backend, validate=validate, **keywords)
            except ValueError as error:
                assert f"got {target} at token 2 of 4" in str(error) and f"[0, {VOCAB})" in str(error), error
            else:
                raise AssertionError("nothing was raised")
        assert seen == []


def arguments(here: Rank) -> None:
    """What is checked of plain logits is of these, too, and on every rank before any collective."""
    x = torch.zeros(4, VOCAB, requires_grad=True)
    good = torch.zeros(4, dtype=torch.int64)
    fused_losses.cross_entropy(shard(here, x), good)
    for name, targets, keywords in (
        ("target_tokens", good[:3], {}),
        ("target_tokens", good.float(), {}),
        ("weights", good, {"weights": torch.zeros(3)}),
        ("label_smoothing", good, {"label_smoothing": 2.0}),
        ("temperature", good, {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0]), "validate": True}),
        ("inplace", good, {"inplace": True}),  # a leaf
        ("inplace", good, {"inplace": True, "reduction": "none"}),
        ("backend", good, {"backend": "tpu"}),
    ):
        with watching() as seen:
            try:
                fused_losses.cross_entropy(shard(here, x), targets, **keywords)
            except (TypeError, ValueError) as error:
                assert name in str(error), error
            else:
                raise AssertionError(f"{name}: nothing was raised")
        assert seen == []


def numbers_of_numpy(here: Rank) -> None:
    import numpy as np

    columns = columns_of(here, EVEN[here.world])
    local = torch.zeros(4, columns.stop - columns.start, requires_grad=True)
    part = VocabShard(local, here.group, np.int64(columns.start), np.int32(VOCAB))  # type: ignore[arg-type]
    loss = fused_losses.cross_entropy(part, torch.zeros(4, dtype=torch.int64))
    close(loss.detach(), torch.tensor(VOCAB).log(), 1e-6)


def a_rank_that_raises(here: Rank, asked: bool) -> str:
    """Rank 1 raises before it takes part: the others' wait ends with the group's patience, here of 2 s."""
    group = dist.new_group(list(range(here.world)), timeout=timedelta(seconds=2))
    columns = columns_of(here, UNEVEN[here.world])
    part = VocabShard(torch.zeros(4, columns.stop - columns.start), group, columns.start, VOCAB)
    targets = torch.zeros(4, dtype=torch.int64)
    if asked:
        fused_losses.cross_entropy(part, targets)
    before = time.monotonic()
    try:
        if here.rank != 1:
            fused_losses.cross_entropy(part, targets)
        elif asked:
            fused_losses.cross_entropy(part, targets + VOCAB)
        else:
            fused_losses.cross_entropy(part, targets, weights=torch.zeros(3))
    except (RuntimeError, ValueError) as error:
        waited = time.monotonic() - before
        assert waited < 12, waited
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


# ---- A mesh, compiled, under a mode ----


def of_a_mesh(here: Rank) -> None:
    """(2 of data, 2 of the vocabulary), over all four ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row, column = mesh.get_coordinate() or (0, 0)
    tokens = drawn_tokens()
    rows, vocab = slice(row * 6, row * 6 + 6), 101  # 51 and 50 columns
    logits, targets = tokens["logits"][:, :vocab].float(), tokens["targets"].remainder(vocab)
    columns = slice(0, 51) if column == 0 else slice(51, vocab)
    local = logits[rows, columns].clone().requires_grad_()
    for placements in ((Shard(0), Shard(1)), (Shard(0), Shard(-1))):
        whole_logits = DTensor.from_local(local, mesh, placements, shape=(N, vocab), stride=(vocab, 1), run_check=False)
        local.grad = None
        loss = fused_losses.cross_entropy(whole_logits, targets[rows], label_smoothing=0.1)
        loss.backward()
        y = logits[rows].double().requires_grad_()
        truth = reference.cross_entropy(y, targets[rows], label_smoothing=0.1)
        truth.backward()
        assert local.grad is not None and y.grad is not None
        close(loss.detach(), truth.detach(), 2e-6)
        close(local.grad, y.grad[:, columns], 2e-6)
    for placements in ((Shard(1), Shard(1)), (Replicate(), Partial()), (Partial(), Shard(1))):
        shape = {"shape": (6, vocab), "stride": (vocab, 1)}
        wrong = DTensor.from_local(local.detach(), mesh, placements, run_check=False, **shape)
        try:
            fused_losses.cross_entropy(wrong, targets[rows])
        except ValueError as error:
            assert str(placements) in str(error), error
        else:
            raise AssertionError(f"{placements} was taken")


def compiled(here: Rank) -> None:
    """A graph break, and the numbers of a plain call; of a head, too."""
    torch._dynamo.reset()
    tokens = drawn_tokens()
    columns = columns_of(here, UNEVEN[here.world])

    def step(local: Tensor, targets: Tensor) -> Tensor:
        return 2 * fused_losses.cross_entropy(VocabShard(local * 1.5, here.group, columns.start, VOCAB), targets)

    def of_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = LinearHead(hidden, weight, group=here.group, vocab_start=columns.start, vocab_size=VOCAB)
        return 2 * fused_losses.cross_entropy(head, targets)

    hidden, weight = torch.randn(N, 16), torch.randn(VOCAB, 16)
    given: dict[Callable[..., Tensor], tuple[Tensor, ...]] = {
        step: (tokens["logits"][:, columns].float(),),
        of_head: (hidden, weight[columns]),
    }
    for function, tensors in given.items():
        found = []
        for call in (function, torch.compile(function, backend="eager")):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            loss = call(*leaves, tokens["targets"])
            loss.backward()
            found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        for plain, ours in zip(*found, strict=True):
            assert torch.equal(plain, ours), function.__name__


# ---- A head ----


def _head_data() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    tokens = drawn_tokens(n=40)
    return torch.randn(40, 16) * 0.7, torch.randn(VOCAB, 16), torch.randn(VOCAB), tokens


HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the head, of the loss
    "one pass": ({}, {}),
    "partial": ({"hidden_grad": "partial"}, {}),
    "recompute": ({}, {"recompute": True}),
    "recompute, partial": ({"hidden_grad": "partial"}, {"recompute": True}),
    "none": ({}, {"reduction": "none"}),
    "skip_masked": ({"skip_masked": True}, {}),
    "skip_masked, recompute": ({"skip_masked": True}, {"recompute": True}),
    "weight_grad": ({"weight_grad": True}, {}),
    "weight_grad, skip_masked": ({"weight_grad": True, "skip_masked": True}, {}),
    "terms": ({}, {"entropy_coef": 0.1, "softcap": 9.0}),
    "frozen": ({"frozen": True}, {"reduction": "none"}),
    "in a dispatch mode": ({"mode": True}, {}),
    "weight_grad in a dispatch mode": ({"mode": True, "weight_grad": True}, {}),
}


def head(here: Rank, name: str, dtype: torch.dtype, chunk_bytes: int | None) -> None:
    options, given = ({**part} for part in HEADS[name])
    hidden, weight, bias, tokens = _head_data()
    targets = tokens["targets"].clone()
    targets[5:30:2] = -100
    ends = UNEVEN[here.world]
    columns = columns_of(here, ends)
    inputs = [t.to(dtype) for t in (hidden, weight, bias)]
    wide = [t.double().requires_grad_() for t in inputs]
    old = torch.full((40,), -5.0)
    truth = reference.ppo(
        wide[0] @ wide[1].t() + wide[2], targets, old, torch.linspace(-1, 1, 40),
        **{key: value for key, value in given.items() if key != "recompute"},
    )  # fmt: skip
    truth.sum().backward()
    leaves = [inputs[0].clone(), inputs[1][columns].clone(), inputs[2][columns].clone()]
    frozen, mode = options.pop("frozen", False), options.pop("mode", False)
    for leaf in leaves[: 1 if frozen else 3]:
        leaf.requires_grad_()
    buffer = torch.ones(leaves[1].shape) if options.pop("weight_grad", False) else None
    made = LinearHead(
        *leaves, group=here.group, vocab_start=columns.start, vocab_size=VOCAB, chunk_bytes=chunk_bytes,
        weight_grad=buffer, **options,
    )  # fmt: skip
    call = lambda: fused_losses.ppo(  # noqa: E731
        made, targets, old, torch.linspace(-1, 1, 40), backend="cpu", **given
    )
    with FlopCounterMode(display=False) if mode else nullcontext():
        if mode:
            loss = call()
        else:
            with torch.no_grad():
                call()
            with watching() as forward:
                loss = call()
    if mode:
        loss.backward()
    else:
        with watching() as backward:
            loss.sum().backward()
        gathers = [seen for seen in forward if "gather" in seen.name]
        reductions = [seen for seen in forward + backward if "reduce" in seen.name]
        assert all("reduce" in seen.name for seen in backward)
        if here.world > 1:
            assert len(gathers) >= (1 if chunk_bytes is None else 2), forward
            expected = 0 if options.get("hidden_grad") == "partial" else len(gathers)
            if options.get("skip_masked"):  # nothing flows through a token that is clipped, either
                assert 0 < len(reductions) <= expected, (forward, backward)
            else:
                assert len(reductions) == expected, (forward, backward)
    rtol = 3e-6 if dtype is torch.float32 else 2e-2
    tolerance = {"rtol": rtol, "atol": rtol * float(wide[0].grad.abs().max())}
    torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=rtol, atol=rtol)
    d_hidden = leaves[0].grad
    if options.get("hidden_grad") == "partial":
        d_hidden = whole(here, d_hidden.float())
    else:
        assert_same_everywhere(here, d_hidden)
    torch.testing.assert_close(d_hidden.double(), wide[0].grad, **tolerance)
    if frozen:
        return
    tolerance["atol"] = rtol * float(wide[1].grad.abs().max())
    if buffer is None:
        torch.testing.assert_close(leaves[1].grad.double(), wide[1].grad[columns], **tolerance)
    else:
        assert leaves[1].grad is None
        torch.testing.assert_close(buffer.double() - 1, wide[1].grad[columns], **tolerance)
    torch.testing.assert_close(leaves[2].grad.double(), wide[2].grad[columns], rtol=rtol, atol=rtol)


def head_without_tokens(here: Rank) -> None:
    columns = columns_of(here, UNEVEN[here.world])
    for options in ({}, {"skip_masked": True}):
        for n in (0, 5):
            hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(VOCAB, 4)[columns].requires_grad_()
            made = LinearHead(hidden, weight, group=here.group, vocab_start=columns.start, vocab_size=VOCAB, **options)
            loss = fused_losses.cross_entropy(made, torch.full((n,), -100))
            loss.backward()
            assert loss.item() == 0 and hidden.grad is not None and weight.grad is not None
            assert not hidden.grad.any() and not weight.grad.any()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(8, 16)
        self.lm_head = torch.nn.Linear(16, 37, bias=False)

    def forward(self, x: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        made = LinearHead(hidden, self.lm_head.weight, chunk_bytes=1024)
        return fused_losses.cross_entropy(made, targets, denominator=denominator)


def of_fsdp(here: Rank) -> None:
    """Ranks of different tokens, one of them without any: the gradient is that of the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    x, targets = torch.randn(here.world, 6, 8), torch.randint(37, (here.world, 6))
    targets[1] = -100
    targets[0, 2:] = -100
    mesh = init_device_mesh("cpu", (here.world,))
    fully_shard(model, mesh=mesh)
    mine = targets[here.rank]
    for _ in range(2):
        loss = model(x[here.rank], mine, aggregation.global_tokens(mine, averaged=True))
        assert loss.requires_grad
        loss.backward()
        plain(x, targets, (targets != -100).sum().float()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        close(ours.grad.full_tensor(), theirs.grad, 2e-6)


# ---- What a mean divides by ----


def global_tokens(here: Rank) -> None:
    group = here.group
    torch.manual_seed(0)
    weights, targets = torch.rand(4, 7), torch.randint(9, (4, 7))
    targets[1] = -100
    targets[0, 1:4] = -100
    targets[3, 0] = 7
    mine, own = targets[here.rank], weights[here.rank]
    every, all_weights = targets[: here.world], weights[: here.world]
    count = aggregation.global_tokens
    with watching() as seen:
        got = count(mine, group=group)
    assert len(seen) == 1 and "allreduce" in seen[0].name and seen[0].size == 8
    assert got.dim() == 0 and got.dtype is torch.float32 and not got.requires_grad
    assert got.item() == (every != -100).sum().item()
    assert count(mine, group=group, averaged=True).item() == got.double().div(here.world).float().item()
    assert count(mine, group=group, ignore_index=7).item() == (every != 7).sum().item()
    expected = all_weights.double()[every != -100].sum()
    assert abs(count(mine, weights=own, group=group).double() - expected) <= 6e-8 * expected
    assert_same_everywhere(here, count(mine, weights=own, group=group))
    many = torch.ones(9, 7).index_fill(0, torch.tensor([0]), 2.0**24)  # that a float32 adds 1 to in vain
    exact = torch.tensor((7 * 2.0**24 + 56) * here.world, dtype=torch.float64).float()
    assert torch.equal(count(torch.zeros(9, 7, dtype=torch.int32), weights=many, group=group), exact)
    assert count(mine, weights=2.0, group=group).item() == 2 * got.item()
    assert count(mine, weights=torch.where(mine == -100, torch.nan, 1.0), group=group).item() == got.item()
    assert count(mine[:0], group=group).item() == 0
    assert count(torch.full_like(mine, -100), group=group).item() == 0
    pair = torch.stack((mine, mine), -1)
    assert count(pair, group=group).item() == 2 * got.item()
    for name, arguments in {
        "target_tokens": (mine.float(), {}),
        "weights": (mine, {"weights": torch.ones(3)}),
        "ignore_index": (mine, {"ignore_index": 1.5}),
        "group": (mine, {"group": [0]}),
    }.items():
        try:
            count(arguments[0], **{"group": group} | arguments[1])
        except (TypeError, ValueError) as error:
            assert name in str(error)
        else:
            raise AssertionError(f"{name}: nothing was raised")


def data_parallel(here: Rank, kind: str) -> None:
    """The gradient of shared parameters, averaged or summed over ranks, against one process."""
    torch.manual_seed(0)
    weight = torch.randn(23, 8)
    hidden, targets, weights = torch.randn(4, 8, 8), torch.randint(23, (4, 8)), torch.rand(4, 8)
    advantages, old = torch.randn(4, 8), torch.full((4, 8), -3.0)
    targets[1] = -100  # a rank without any
    targets[0, 1:] = -100
    if kind == "data":  # rows of the batch; a context's are parts of each sequence
        targets, hidden, weights, advantages, old = (
            t[: here.world] for t in (targets, hidden, weights, advantages, old)
        )
        mine: tuple[Any, ...] = (slice(here.rank, here.rank + 1),)
    else:
        ends = {1: (8,), 2: (3, 8), 3: (1, 6, 8), 4: (1, 2, 4, 8)}[here.world]
        mine = (slice(None), columns_of(here, ends))
    for weighted in (False, True):
        for averaged in (False, True):
            w, whole_w = (t.clone().double().requires_grad_() for t in (weight, weight))
            given = {"weights": weights[mine]} if weighted else {}
            denominator = aggregation.global_tokens(targets[mine], group=here.group, averaged=averaged, **given)
            logits = (hidden[mine].double() @ w.t()).float()
            loss = fused_losses.ppo(
                logits, targets[mine], old[mine], advantages[mine], denominator=denominator, **given
            )
            assert loss.requires_grad
            loss.backward()
            truth = reference.ppo(
                hidden.double() @ whole_w.t(), targets, old, advantages, **({"weights": weights} if weighted else {})
            )
            truth.backward()
            gradient, total = w.grad.clone(), loss.detach().double()
            for tensor in (gradient, total):
                dist.all_reduce(tensor, group=here.group)
            by = here.world if averaged else 1
            close(gradient / by, whole_w.grad, 1e-6)
            close(total / by, truth.detach(), 1e-6)
