"""How far a result is from the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import Problem, row_chunks
from torch import Tensor

from fused_losses import reference

# Beyond these a contender computes something else, and its time means nothing. By the dtype of what is compared: some
# opponents return the loss in that of the logits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Beyond this it is the right loss with an inexact gradient. At a target with p = 0.999 the p - 1 of eager float32 code
# is off by a percent; bf16(p) - 1, as in F.cross_entropy of bf16 logits on CPU, is off by all of it.
TRUE_CLASS_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Errors:
    """What was not compared is None."""

    loss: float | None = None  # relative to the mean (of a vector: the largest) absolute loss of a token
    grad: float | None = None  # largest, relative to the largest gradient
    true_class: float | None = None  # largest relative error at a target
    verdict: str = "ok"  # or "inexact" (only true_class is beyond its tolerance), or "wrong"


class Truth:
    """Loss of all tokens and gradient of some rows, the last included (offsets beyond 32 bits show there)."""

    def __init__(self, problem: Problem, two_phase: bool):
        self.vocab = problem.case.vocab
        n = problem.case.n
        loss = getattr(reference, problem.loss)
        logits = problem.source.view(-1, self.vocab)
        targets = problem.targets.view(-1)
        inputs = {name: value.reshape(-1) for name, value in problem.inputs.items()}

        def losses(rows: Tensor | slice, chunk: Tensor) -> Tensor:
            return loss(chunk, targets[rows], **{k: v[rows] for k, v in inputs.items()}, reduction="none")

        with torch.no_grad():
            chunks = row_chunks(self.vocab, n)
            each = torch.cat([losses(rows, logits[rows].double()) for rows in chunks])
        self.two_phase = two_phase
        self.loss = each if two_phase else each.sum() / problem.denominator
        self.loss_scale = float(each.abs().max() if two_phase else each.abs().sum() / problem.denominator)

        self.rows = (
            torch.linspace(0, n - 1, min(n, max(16, 2**21 // self.vocab)), device=targets.device).long().unique()
        )
        chunk = logits[self.rows].double().requires_grad_()
        upstream = problem.upstream.view(-1)[self.rows].double() if two_phase else 1 / problem.denominator
        (self.grad,) = torch.autograd.grad((losses(self.rows, chunk) * upstream).sum(), chunk)
        self.targets = targets[self.rows].clamp(min=0)[:, None]

    def errors(self, loss: Tensor | None, grad: Tensor | None) -> Errors:
        loss_error = grad_error = true_class_error = None
        right = exact = True  # by <=, which is False for NaN
        if loss is not None:
            difference = loss.double().reshape(self.loss.shape) - self.loss
            loss_error = float(difference.abs().max() / self.loss_scale)
            right &= loss_error <= TOLERANCE[loss.dtype]
        if grad is not None:
            got = grad.reshape(-1, self.vocab)[self.rows].double()
            grad_error = float((got - self.grad).abs().max() / self.grad.abs().max())
            true_class, target = self.grad.gather(1, self.targets), got.gather(1, self.targets)
            relative = ((target - true_class) / true_class)[true_class != 0].abs()
            true_class_error = float(relative.max()) if relative.numel() else 0.0
            right &= grad_error <= TOLERANCE[grad.dtype]
            # float16 gradients divided by N lose bits to underflow: not a fault of who writes them
            exact = true_class_error <= TRUE_CLASS_TOLERANCE or grad.dtype == torch.float16
        return Errors(loss_error, grad_error, true_class_error, "wrong" if not right else "ok" if exact else "inexact")
