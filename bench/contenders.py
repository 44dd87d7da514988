"""What is timed: this library in each mode, its opponents, and the floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from cases import TERMS, Problem
from opponents import OPPONENTS, LossOfLogits, Opponent
from torch import Tensor

import fused_losses
from fused_losses import backends
from fused_losses.speed import Produced

FUSED = "fused"  # the contender that is this library; its records name the backend

Result = tuple[Tensor | None, Tensor | None]  # loss, gradient


@dataclass
class Contender:
    """Something to be timed. ``call`` works on the problem's buffer, ``result`` reads what it returned, untimed."""

    name: str
    mode: str  # of cases.GROUPS, or "floor"
    call: Callable[[], Any]
    backend: str | None = None
    result: Callable[[Any], Result] = lambda returned: returned
    capturable: bool = True
    same_loss: bool = True  # False for a yardstick, whose errors mean nothing

    @property
    def key(self) -> str:
        return f"{self.name} {self.backend or ''} {self.mode}"


def runner(loss: LossOfLogits, problem: Problem, mode: str) -> Callable[[], Result]:
    """A call of ``loss`` on the buffer in one of the modes.

    Gradients are taken with autograd.grad, not backward: what accumulates them in a leaf would copy some of them.
    """
    buffer, upstream = problem.buffer, problem.upstream if mode == "two_phase" else None
    parameter = torch.zeros((), device=buffer.device, requires_grad=True)

    def forward() -> Result:
        with torch.no_grad():
            return loss(buffer), None

    def forward_backward() -> Result:
        logits = Produced.apply(parameter, buffer) if mode == "inplace" else buffer.detach().requires_grad_()
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value, logits, upstream)
        return value.detach(), gradient

    return forward if mode == "forward" else forward_backward


def fused(problem: Problem, mode: str, backend: str, terms: str | None = None) -> Contender:
    function = getattr(fused_losses, problem.loss)
    keywords: dict[str, Any] = {**problem.inputs, "backend": backend, **(TERMS[terms] if terms else {})}
    if mode == "inplace":
        keywords["inplace"] = True
    if mode == "two_phase":
        keywords["reduction"] = "none"
    call: Callable[[], Any] = runner(lambda logits: function(logits, problem.targets, **keywords), problem, mode)
    if mode == "reused":
        call = kernels_of(call, backend, problem.source.device)
    if terms:
        return Contender(f"{FUSED}, {terms}", mode, call, backend, same_loss=False)
    return Contender(FUSED, mode, call, backend)


def kernels_of(call: Callable[[], Result], backend: str, device: torch.device) -> Callable[[], Result]:
    """What ``call`` hands to the backend's one-pass kernels, to be run again without the interface around them."""
    seen: dict[str, Callable[[], Any]] = {}

    def recorder(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            seen[stage] = partial(function, *args, **kwargs)
            return function(*args, **kwargs)

        return record

    resolved = backends.resolve(backend, device)
    stages = ("loss_and_grad", "scale")
    recorders: dict[str, Any] = {stage: recorder(stage, getattr(resolved, stage)) for stage in stages}
    with mock.patch.multiple(resolved, **recorders):
        gradient = call()[1]  # the buffer that the recorded arguments name

    def again() -> Result:
        results = {stage: kernel() for stage, kernel in seen.items()}
        return results["loss_and_grad"][0], gradient

    return again


def against(opponent: Opponent, problem: Problem, mode: str) -> Contender | None:
    loss = opponent.build(problem, mode)
    if loss is None:
        return None
    same_loss = opponent.name != "F.cross_entropy" or problem.loss == "cross_entropy"
    if not opponent.raw:
        call = runner(loss, problem, mode)
        return Contender(opponent.name, mode, call, capturable=opponent.capturable, same_loss=same_loss)

    def mean(returned: tuple[Tensor, Tensor]) -> Result:
        losses, gradient = returned
        return losses.sum() / problem.denominator, gradient / problem.denominator

    return Contender(opponent.name, mode, lambda: loss(problem.buffer), result=mean, capturable=opponent.capturable)


def floors(problem: Problem) -> list[Contender]:
    """What memory allows: every loss is compared with these, measured in the same run."""
    buffer = problem.buffer
    gradient = torch.empty_like(buffer)
    gradient.copy_(buffer)  # no page of it is fresh
    flat = buffer.view(-1)
    words = flat.view(torch.float32) if flat.numel() % 2 == 0 or problem.dtype == "fp32" else flat
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: gradient.copy_(buffer), "read": words.sum}
    if buffer.device.type == "cpu":  # where fresh memory is dear, and in place is another floor than a copy
        calls |= {"mul_": lambda: buffer.mul_(0.999), "clone": buffer.clone}
    return [Contender(name, "floor", call, result=lambda _: (None, None)) for name, call in calls.items()]


def contenders(
    problem: Problem, modes: tuple[str, ...], names: tuple[str, ...], opponents: tuple[str, ...]
) -> list[Contender]:
    found: list[Contender | None] = [*floors(problem)]
    for mode in modes:
        for name in names:
            found.append(built(FUSED, mode, name, partial(fused, problem, mode, name)))
            for terms in problem.case.terms:
                found.append(built(f"{FUSED}, {terms}", mode, name, partial(fused, problem, mode, name, terms)))
        for name in opponents:
            if OPPONENTS[name].installed:
                found.append(built(name, mode, None, partial(against, OPPONENTS[name], problem, mode)))
    return [contender for contender in found if contender is not None]


def built(name: str, mode: str, backend: str | None, build: Callable[[], Contender | None]) -> Contender | None:
    """What ``build`` makes; where it fails (a peer that is installed but broken), a contender that fails when run."""
    try:
        return build()
    except Exception as error:
        cause = error

    def call() -> Result:
        raise cause

    return Contender(name, mode, call, backend)
