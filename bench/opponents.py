"""What the library is compared with: the code a user would write, what torch has, and its peers where installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Case, Problem, make_problem
from torch import Tensor

from fused_losses import reference
from fused_losses.objectives import OBJECTIVES

LossOfLogits = Callable[[Tensor], Tensor]

# The plain formulas. The library's own (fused_losses.objectives) guard against overflow and masked rows, which costs
# time that is not the opponent's to lose. A loss that is missing here is compared with the library's formula.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda x: -x,
    "importance_sampling": lambda x, q, a: -torch.exp(x - q) * a,
    "ppo": lambda x, q, a, low, high: -torch.min((r := torch.exp(x - q)) * a, r.clamp(low, high) * a),
    "cispo": lambda x, q, a, low, high: -torch.exp(x - q).clamp(low, high).detach() * x * a,
    "dro": lambda x, q, a, beta: -(x * a - 0.5 * beta * (x - q) ** 2),
    "dft": lambda x: -x.exp().detach() * x,
    "reinforce": lambda x, a: -x * a,
    "sapo": lambda x, q, a, positive, negative: (
        -torch.sigmoid((tau := torch.where(a > 0, positive, negative)) * (torch.exp(x - q) - 1)) * 4 / tau * a
    ),
}


@dataclass(frozen=True)
class Opponent:
    name: str
    build: Callable[[Problem, str], LossOfLogits | None]  # the loss for a mode; None: it has no such mode or loss
    requires: str | None = None  # a module that may be missing
    raw: bool = False  # returns (losses, gradient of their sum), without autograd
    capturable: bool = True  # can be recorded in a CUDA graph

    @property
    def installed(self) -> bool:
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


def _guarded(loss: str) -> Callable[..., Tensor]:
    objective = OBJECTIVES[loss]
    limits = [math.inf] * len(objective.limits)
    return lambda x, *inputs: objective.formula(x, *(torch.as_tensor(i) for i in (*inputs, *limits)))[0]


def eager(problem: Problem, mode: str) -> LossOfLogits | None:
    if mode not in ("separate", "forward", "two_phase"):
        return None
    token_loss = PLAIN.get(problem.loss, _guarded(problem.loss))
    inputs = (*problem.inputs.values(), *problem.bounds.values())
    reduction = "none" if mode == "two_phase" else problem.reduction
    targets, masked = problem.targets, problem.masked
    index = targets.clamp(min=0)[..., None]
    mask = (targets != -100).float()

    def loss(logits: Tensor) -> Tensor:
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, index)[..., 0]
        losses = token_loss(logprobs, *inputs)
        if masked:
            losses = losses * mask
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / mask.sum() if masked else losses.mean()

    return loss


def compiled(problem: Problem, mode: str) -> LossOfLogits | None:
    loss = eager(problem, mode)
    return None if loss is None else torch.compile(loss, dynamic=False)


def compiled_graphs(problem: Problem, mode: str) -> LossOfLogits | None:
    loss = eager(problem, mode)
    if loss is None or problem.source.device.type != "cuda":
        return None
    fast = torch.compile(loss, dynamic=False, mode="reduce-overhead")

    def step(logits: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(logits)

    return step


def torch_cross_entropy(problem: Problem, mode: str) -> LossOfLogits | None:
    """Also beside other losses, as a yardstick: what torch has for turning logits into a loss."""
    if problem.source.dim() != 2 or mode not in ("separate", "forward", "two_phase"):
        return None
    targets, reduction = problem.targets, "none" if mode == "two_phase" else problem.reduction
    return lambda logits: F.cross_entropy(logits, targets, reduction=reduction)


def liger_cross_entropy(problem: Problem, mode: str) -> LossOfLogits | None:
    if problem.loss != "cross_entropy" or problem.source.dim() != 2 or mode not in ("inplace", "forward"):
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy as loss

    targets, reduction = problem.targets, problem.reduction
    return lambda logits: loss(logits, targets, reduction=reduction)


def liger_grpo(problem: Problem, mode: str) -> LossOfLogits | None:
    """It takes one position more than it scores, and one advantage per sequence."""
    if problem.loss != "ppo" or not problem.case.sequences or mode not in ("inplace", "separate"):
        return None
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    scored = (slice(None), slice(None, -1))
    ids = problem.targets[scored].clamp(min=0).contiguous()
    mask = (problem.targets[scored] != -100).int().contiguous()
    old_logprobs = problem.inputs["old_logprobs"][scored].contiguous()
    advantages = problem.inputs["advantages"][:, 0].contiguous()
    low, high = problem.bounds.values()

    def loss(logits: Tensor) -> Tensor:
        return triton_grpo_loss(
            logits,
            old_logprobs,
            None,
            ids,
            advantages,
            mask,
            temperature=1.0,
            beta=0.0,
            eps_low=1 - low,
            eps_high=high - 1,
            inplace=mode == "inplace",
            loss_type="dapo",
            reduce=True,
        )[0]

    return loss


def quack(problem: Problem, mode: str) -> LossOfLogits | None:
    if problem.loss != "cross_entropy" or problem.source.dim() != 2 or mode == "reused":
        return None
    from quack.cross_entropy import cross_entropy

    targets, reduction = problem.targets, "none" if mode == "two_phase" else problem.reduction
    return lambda logits: cross_entropy(logits, targets, reduction=reduction, inplace_backward=mode == "inplace")


def quack_fused(problem: Problem, mode: str) -> LossOfLogits | None:
    """The forward kernel that makes the gradient, too: not behind autograd, and for an upstream gradient of 1 only."""
    if problem.loss != "cross_entropy" or problem.source.dim() != 2 or mode not in ("inplace", "separate"):
        return None
    from quack.cross_entropy import cross_entropy_fwd

    targets = problem.targets
    return lambda logits: cross_entropy_fwd(logits, targets, return_dx=True, inplace_backward=mode == "inplace")


OPPONENTS = {
    o.name: o
    for o in (
        Opponent("eager", eager),
        Opponent("torch.compile", compiled),
        Opponent("torch.compile, CUDA graphs", compiled_graphs, capturable=False),
        Opponent("F.cross_entropy", torch_cross_entropy),
        Opponent("Liger CE", liger_cross_entropy, "liger_kernel", capturable=False),
        Opponent("Liger GRPO", liger_grpo, "liger_kernel"),
        Opponent("quack", quack, "quack"),
        Opponent("quack fused", quack_fused, "quack", raw=True),
    )
}


def check_plain_formulas(losses: tuple[str, ...]) -> None:
    """Raise AssertionError where a plain formula isn't the loss that it stands for."""
    case = Case("check", (3, 8), 50, sequences=True, idle=0.25)
    for loss in losses:
        problem = make_problem(case, loss, "fp32", torch.device("cpu"))
        for mode in ("separate", "two_phase"):
            plain = eager(problem, mode)
            assert plain is not None
            reduction = "none" if mode == "two_phase" else problem.reduction
            logits = problem.source.clone().requires_grad_()
            truth = getattr(reference, loss)(logits.double(), problem.targets, **problem.inputs, reduction=reduction)
            upstream = problem.upstream if mode == "two_phase" else torch.ones(())
            got = plain(logits)
            gradients = (torch.autograd.grad(value, logits, upstream.to(value.dtype))[0] for value in (got, truth))
            for what, (a, b) in {"loss": (got.detach(), truth.detach()), "gradient": tuple(gradients)}.items():
                error = float((a - b).abs().max() / b.abs().max())
                assert error < 1e-5, f"the plain formula of {loss} is not its reference: {what} off by {error:.1e}"
