"""What is measured, as data: shapes, dtypes, modes and opponents; and the inputs, made from the table of objectives."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.objectives import OBJECTIVES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = tuple(name for name, objective in OBJECTIVES.items() if objective.is_loss)

# What is timed together, so that its ratios come from one run. A mode is one way of doing it:
#   inplace    forward and backward, the gradient over the logits
#   separate   forward and backward, the gradient in a buffer of its own that the loss allocates
#   reused     the kernels that "separate" runs, alone, into a gradient that has been written before: no page faults
#   forward    no gradient wanted
#   two_phase  reduction "none" and a random upstream gradient per token
GROUPS = {
    "fwd+bwd": ("inplace", "separate", "reused"),
    "forward": ("forward",),
    "two_phase": ("two_phase",),
}
ALL_MODES = tuple(mode for modes in GROUPS.values() for mode in modes)

STATISTICS = "statistics"  # in the place of a loss: what is read of rows, without a gradient

TORCH = ("eager", "torch.compile", "F.cross_entropy")
PEERS = ("Liger CE", "Liger GRPO", "quack", "quack fused")

# What a loss may hold beside its objective, by the name that the tables have for it.
TERMS: dict[str, dict[str, Any]] = {
    "entropy": {"entropy_coef": 0.01},
    "KL": {"kl_coef": 0.1, "ref_logprobs": -3.0},
    "entropy and KL": {"entropy_coef": 0.01, "kl_coef": 0.1, "ref_logprobs": -3.0},
    "softcap": {"softcap": 30.0},
}


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # of the tokens; logits have one dimension more
    vocab: int
    dtypes: tuple[str, ...] = ("bf16",)
    losses: tuple[str, ...] = LOSSES
    modes: tuple[str, ...] = ("inplace", "separate")
    opponents: tuple[str, ...] = TORCH
    fallback: bool = False  # measure the eager backend, too, where a better one is usable
    masked: float = 0.0  # fraction of tokens with target -100, in contiguous spans
    drift: float = 0.2  # standard deviation of logp - old_logprobs
    # Sequences as in GRPO: lengths vary, an advantage belongs to a sequence, and the last position predicts nothing.
    sequences: bool = False
    idle: float = 0.0  # fraction of sequences with advantage 0
    graph: bool = False  # time a replayed CUDA graph as well
    terms: tuple[str, ...] = ()  # of TERMS: our own loss with these, beside the plain one

    @property
    def n(self) -> int:
        return math.prod(self.shape)


CPU_CASES = (
    Case("2048x32000", (2048,), 32000, ("fp32", "bf16"), ("ppo",), ALL_MODES),
    Case("512x128256", (512,), 128256, ("fp32", "bf16"), ("ppo",), GROUPS["fwd+bwd"]),
    Case("256x32000", (256,), 32000, ("fp32", "bf16"), LOSSES, ALL_MODES, ("eager", "F.cross_entropy")),
    # No token is clipped: a clipped one has no gradient to write, unless a term gives it one.
    *(
        Case(
            f"{n}x{vocab}, terms",
            (n,),
            vocab,
            ("fp32", "bf16"),
            ("ppo",),
            ("inplace", "separate"),
            ("eager",),
            drift=0.01,
            terms=tuple(TERMS),
        )
        for n, vocab in ((2048, 32000), (512, 128256))
    ),
    Case("2048x32000, statistics", (2048,), 32000, ("fp32", "bf16"), (STATISTICS,)),
    Case("512x128256, statistics", (512,), 128256, ("fp32", "bf16"), (STATISTICS,)),
    Case("256x32000, fallback", (256,), 32000, ("fp32",), ("ppo",), opponents=("eager",), fallback=True),
)

# The numbers are those that issues and pull requests use.
GPU_CASES = (
    Case("1: 8192x128256", (8192,), 128256, opponents=TORCH + PEERS),
    Case("2: 8192x32000", (8192,), 32000, opponents=TORCH + PEERS),
    Case("3: 8192x151936", (8192,), 151936, opponents=TORCH + PEERS),
    Case("4: 4096x262144", (4096,), 262144, losses=("cross_entropy", "ppo"), opponents=TORCH + PEERS),
    Case("4: 16384x262144", (16384,), 262144, losses=("cross_entropy", "ppo"), opponents=TORCH + PEERS),
    Case("5: 8192x50257", (8192,), 50257, losses=("cross_entropy", "ppo"), opponents=TORCH + PEERS),
    Case("5: 4096x151643", (4096,), 151643, losses=("cross_entropy", "ppo"), opponents=TORCH + PEERS),
    Case(
        "6: 16384x128256",
        (16384,),
        128256,
        losses=("cross_entropy", "ppo"),
        modes=("forward",),
        opponents=TORCH + PEERS,
    ),
    Case(
        "7: 8192x128256",
        (8192,),
        128256,
        losses=("cross_entropy", "ppo"),
        modes=("two_phase",),
        opponents=TORCH + PEERS,
    ),
    Case(
        "8: 8192x128256, 75% masked",
        (8192,),
        128256,
        losses=("cross_entropy", "ppo"),
        opponents=TORCH + PEERS,
        masked=0.75,
    ),
    Case(
        "9: 8x1024x151936, GRPO",
        (8, 1024),
        151936,
        losses=("ppo", "cispo"),
        opponents=("eager", "torch.compile", "Liger GRPO"),
        drift=0.8,  # clips about 30 % of all tokens
        sequences=True,
        idle=0.25,
    ),
    Case("10: 4096x128256", (4096,), 128256, ("fp32",), ("cross_entropy",), opponents=TORCH + PEERS),
    Case(
        "12: 8192x128256, terms", (8192,), 128256, losses=("ppo",), opponents=("eager",), drift=0.01, terms=tuple(TERMS)
    ),
    Case("13: 8192x128256, statistics", (8192,), 128256, ("fp32", "bf16"), (STATISTICS,)),
    *(
        Case(
            f"11: {n}x{vocab}",
            (n,),
            vocab,
            losses=("ppo",),
            opponents=("eager", "torch.compile", "torch.compile, CUDA graphs"),
            graph=True,
        )
        for n, vocab in ((256, 151936), (64, 128256))
    ),
)

QUICK_CASES = (
    Case("quick statistics 64x1000", (64,), 1000, ("fp32",), (STATISTICS,)),
    Case("quick 64x1000", (64,), 1000, ("fp32",), LOSSES, ALL_MODES, ("eager", "F.cross_entropy")),
    Case("quick terms 64x1000", (64,), 1000, ("bf16",), ("ppo",), opponents=("eager",), drift=0.01, terms=("entropy",)),
    Case(
        "quick sequences 4x16x1000", (4, 16), 1000, ("bf16",), ("ppo",), opponents=("eager",), sequences=True, idle=0.25
    ),
)


@dataclass
class Problem:
    """One case with its tensors. ``source`` stays as it is; everything timed works on ``buffer``."""

    case: Case
    loss: str
    dtype: str
    source: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]
    upstream: Tensor  # per token, for two phase
    buffer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.buffer = self.source.clone()

    @property
    def reduction(self) -> str:
        return inspect.signature(getattr(fused_losses, self.loss)).parameters["reduction"].default

    @property
    def bounds(self) -> dict[str, float]:
        """The defaults of the objective's numbers, such as the clip thresholds."""
        parameters = inspect.signature(getattr(fused_losses, self.loss)).parameters
        return {name: parameters[name].default for name in OBJECTIVES[self.loss].bounds}

    @property
    def masked(self) -> bool:
        return self.case.sequences or self.case.masked > 0

    @property
    def denominator(self) -> float:
        return float((self.targets != -100).sum()) if self.reduction == "mean" else 1.0

    def restore(self) -> None:
        self.buffer.copy_(self.source)


def make_problem(case: Case, loss: str, dtype: str, device: torch.device, seed: int = 0) -> Problem:
    """Random logits whose targets have probabilities from about 0 to 0.999, as a model in training has."""
    torch.manual_seed(seed)
    n, vocab = case.n, case.vocab
    logits = torch.randn(n, vocab, dtype=DTYPES[dtype], device=device).mul_(2)
    targets = torch.randint(vocab, (n,), device=device)
    # log(sum exp) of such a row is about log(V) + 2; 7 above it, the other classes together have 0.001
    top = torch.linspace(0, math.log(vocab) + 9, n, device=device)[torch.randperm(n, device=device)]
    logits[torch.arange(n, device=device), targets] = top.to(logits.dtype)
    masked = _masked(case, device)
    source, targets = logits.view(*case.shape, vocab), targets.masked_fill(masked, -100).view(case.shape)
    return Problem(
        case,
        loss,
        dtype,
        source,
        targets,
        {name: _input(name, case, source, targets) for name in _inputs_of(loss)},
        torch.randn(case.shape, device=device),
    )


def _inputs_of(loss: str) -> tuple[str, ...]:
    return () if loss == STATISTICS else OBJECTIVES[loss].inputs


def row_chunks(vocab: int, n: int, elements: int = 2**23) -> list[slice]:
    """Rows a few at a time, as a float64 copy of all logits would not fit."""
    step = max(1, elements // vocab)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _masked(case: Case, device: torch.device) -> Tensor:
    masked = torch.zeros(case.shape, dtype=torch.bool, device=device)
    if case.sequences:
        length = case.shape[-1]
        lengths = torch.randint(
            length // 2, length, (case.shape[0], 1), device=device
        )  # the last position never counts
        masked = torch.arange(length, device=device) >= lengths
    elif case.masked:
        spans = masked.view(-1)[: case.n // 8 * 8].view(-1, max(case.n // 8, 1))  # prompt, answer, prompt, answer ...
        spans[:, : int(spans.shape[1] * case.masked)] = True
    return masked.view(-1)


def _input(name: str, case: Case, logits: Tensor, targets: Tensor) -> Tensor:
    """A per-token input by its name: logprobs lie near those of the policy, anything else is normal."""
    noise = torch.randn(case.shape, device=logits.device)
    if name.endswith("logprobs"):
        rows, flat = logits.view(-1, case.vocab), targets.view(-1)
        chunks = row_chunks(case.vocab, case.n)
        logp = torch.cat([reference.logprobs(rows[c], flat[c]) for c in chunks]).view(case.shape)
        return logp - case.drift * noise
    if name == "advantages" and case.sequences:
        noise = noise[:, :1].clone()
        noise[: round(case.idle * case.shape[0])] = 0.0
        return noise.expand(case.shape).contiguous()
    return noise
