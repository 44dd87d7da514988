"""A framework's own function beside what this library puts into its slot: the same inputs, the numbers of both."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .slots import installed

FRAMEWORKS = {  # the module of comparisons, and the name of the package as installed
    "transformers": "transformers",
    "trl": "trl",
    "verl": "verl",
    "skyrl": "skyrl",
    "torchtitan": "torchtitan",
    "ms_swift": "ms-swift",
    "openrlhf": "openrlhf",
    "megatron": "megatron-core",
    "axolotl": "axolotl",
    "prime_rl": "prime-rl",
    "nemo_rl": "nemo-rl",
    "tinker": "tinker",
}


class Comparison(NamedTuple):
    """Both make their own inputs anew, from the same seed, and return numbers by name: the loss, gradients, metrics."""

    slot: str  # as the framework names it
    case: str  # what of it: an option, a loss, a dtype
    theirs: Callable[[], Mapping[str, Tensor | float]]  # runs the framework's
    ours: Callable[[], Mapping[str, Tensor | float]]  # runs the library's
    tolerance: float = 1e-5  # of the largest of a name's numbers
    why: str = ""  # a tolerance that is not of float32's rounding has a reason


class Compared(NamedTuple):
    differences: dict[str, float]  # by name, of the largest of their numbers
    seconds: tuple[float, float]  # theirs, ours

    @property
    def worst(self) -> float:
        return max(self.differences.values(), default=0.0)


def comparisons(framework: str) -> Iterator[Comparison]:
    """Those of ``fused_losses.adapters.comparisons.<framework>``, which imports the framework."""
    yield from importlib.import_module(f"{__package__}.comparisons.{framework}").comparisons()


def version(framework: str) -> str | None:
    return installed(FRAMEWORKS[framework])


def run(comparison: Comparison) -> Compared:
    """Each once to warm up and once on the clock, theirs first."""
    comparison.theirs(), comparison.ours()
    start = time.perf_counter()
    theirs = comparison.theirs()
    between = time.perf_counter()
    ours = comparison.ours()
    seconds = between - start, time.perf_counter() - between
    if theirs.keys() != ours.keys():
        raise RuntimeError(f"{comparison.slot}: they give {sorted(theirs)}, we {sorted(ours)}")
    return Compared({name: difference(theirs[name], ours[name]) for name in theirs}, seconds)


def difference(theirs: Tensor | float, ours: Tensor | float) -> float:
    """The largest, of the largest of their numbers; inf where shapes differ or one is NaN where the other is not."""
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (theirs, ours))
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    largest = a[a.isfinite()].abs().amax().item() if a.isfinite().any() else 0.0
    worst = torch.where(same, 0.0, (a - b).abs())
    if worst.numel() == 0:
        return 0.0
    found = worst.amax().item() if not worst.isnan().any() else float("inf")
    return found / largest if largest else found
