"""Losses of hidden states and a head: what is measured, beside the head's matrix products, the loss of logits that
exist, and what others have for it. Part of `bench/run.py`: `python bench/run.py --cases 'head*'`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, row_chunks
from memory import peak_bytes
from opponents import PLAIN
from timing import interleaved, quantiles
from torch import Tensor

import fused_losses
from fused_losses import LinearHead, reference
from fused_losses.head import Head, Products
from fused_losses.problem import How
from fused_losses.speed import Produced

FUSED_HEAD = "fused head"
PRODUCTS, LOGITS_LOSS = "products", "loss of logits"  # the two parts of the floor
_SEQUENCE = 256  # tokens that share an advantage, as one peer has no other


@dataclass(frozen=True)
class HeadCase:
    name: str
    n: int
    hidden: int
    vocab: int
    dtypes: tuple[str, ...] = ("bf16",)
    losses: tuple[str, ...] = ("cross_entropy", "ppo")
    masked: float = 0.0
    repeats: int = 11


HEAD_CPU_CASES = (HeadCase("head 4096x512x128256", 4096, 512, 128256, ("fp32", "bf16"), repeats=3),)
HEAD_GPU_CASES = tuple(
    HeadCase(f"head {n}x4096x{vocab}{', 75% masked' if masked else ''}", n, 4096, vocab, masked=masked)
    for n, vocab in ((4096, 128256), (4096, 151936), (8192, 128256), (8192, 151936))
    for masked in (0.0, 0.75)
)
HEAD_QUICK_CASES = (HeadCase("head quick 512x32x1000", 512, 32, 1000, ("fp32",), repeats=3),)

Gradients = tuple[Tensor, ...]  # of hidden and of weight
Result = tuple[Tensor, Gradients]


class HeadProblem:
    def __init__(self, case: HeadCase, loss: str, dtype: str, device: torch.device):
        torch.manual_seed(0)
        self.case, self.loss, self.dtype, self.device = case, loss, dtype, device
        self.hidden = torch.randn(case.n, case.hidden, device=device).to(DTYPES[dtype]).requires_grad_()
        weight = torch.randn(case.vocab, case.hidden, device=device).mul_(2 / case.hidden**0.5)
        self.weight = weight.to(DTYPES[dtype]).requires_grad_()
        self.targets = torch.randint(case.vocab, (case.n,), device=device)
        self.targets[: round(case.n * case.masked)] = -100
        self.count = int((self.targets != -100).sum())
        self.inputs: dict[str, Tensor] = {}
        if loss == "ppo":
            with torch.no_grad():
                logprobs = fused_losses.logprobs(LinearHead(self.hidden, self.weight), self.targets)
            advantages = torch.randn(case.n // _SEQUENCE, 1, device=device).expand(-1, _SEQUENCE).reshape(-1)
            self.inputs = {
                "old_logprobs": logprobs - 0.2 * torch.randn(case.n, device=device),
                "advantages": advantages,
            }

    def of_logprobs(self, logprobs: Tensor) -> Tensor:
        """The mean loss, by the plain formula, of who has the logprobs."""
        bounds = (0.8, 1.2) if self.loss == "ppo" else ()
        losses = PLAIN[self.loss](logprobs, *self.inputs.values(), *bounds)
        return losses.where(self.targets != -100, 0.0).sum() / self.count

    def of_logits(self, logits: Tensor) -> Tensor:
        index = self.targets.clamp(min=0)[:, None]
        return self.of_logprobs(torch.log_softmax(logits.float(), -1).gather(-1, index)[:, 0])

    def with_gradients(self, loss: Callable[[], Tensor]) -> Callable[[], Result]:
        def call() -> Result:
            value = loss()
            return value.detach(), torch.autograd.grad(value, (self.hidden, self.weight))

        return call

    def truth(self) -> Result:
        """In float64, some tokens at a time."""
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        d_hidden, d_weight, total = torch.zeros_like(hidden), torch.zeros_like(weight), hidden.new_zeros(())
        for rows in row_chunks(self.case.vocab, self.case.n, 2**25):
            logits = (hidden[rows] @ weight.t()).requires_grad_()
            inputs = {name: value[rows] for name, value in self.inputs.items()}
            part = getattr(reference, self.loss)(logits, self.targets[rows], **inputs, denominator=self.count)
            (gradient,) = torch.autograd.grad(part, logits)
            total += part.detach()
            d_hidden[rows] = gradient @ weight
            d_weight.addmm_(gradient.t(), hidden[rows])
        return total, (d_hidden, d_weight)


# ---- What is timed ----


def fused_head(problem: HeadProblem, **options: Any) -> Callable[[], Result]:
    loss = getattr(fused_losses, problem.loss)

    def call() -> Tensor:
        head = LinearHead(problem.hidden, problem.weight, **options)
        return loss(head, problem.targets, **problem.inputs)

    return problem.with_gradients(call)


def products(problem: HeadProblem) -> Callable[[], None]:
    """The three products of the fused head, in its chunks, and nothing between them."""
    head = LinearHead(problem.hidden, problem.weight).source(How())
    assert isinstance(head, Head)
    chunks = head.spans(problem.targets != -100)

    def call() -> None:
        with torch.no_grad():
            work = Products(head, (problem.hidden, problem.weight), len(chunks))
            for tokens in chunks:
                work.send(tokens, work.logits(tokens))
            work.gradients()

    return call


def loss_of_logits(problem: HeadProblem) -> Callable[[], None]:
    """In place. After the first time on what the last one left, which takes the same time."""
    with torch.no_grad():
        logits = problem.hidden @ problem.weight.t()
    leaf = torch.zeros((), device=problem.device, requires_grad=True)
    loss = getattr(fused_losses, problem.loss)

    def call() -> None:
        produced = Produced.apply(leaf, logits)
        loss(produced, problem.targets, **problem.inputs, inplace=True).backward()

    return call


def eager(problem: HeadProblem) -> Callable[[], Result]:
    return problem.with_gradients(lambda: problem.of_logits(F.linear(problem.hidden, problem.weight)))


def compiled(problem: HeadProblem) -> Callable[[], Result]:
    step = torch.compile(lambda hidden, weight: problem.of_logits(F.linear(hidden, weight)), dynamic=False)
    return problem.with_gradients(lambda: step(problem.hidden, problem.weight))


def torch_chunked(problem: HeadProblem) -> Callable[[], Result] | None:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # torch 2.13
    if problem.loss != "cross_entropy" or options is None:
        return None
    return problem.with_gradients(
        lambda: F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, options=options())
    )


def trl(problem: HeadProblem) -> Callable[[], Result]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def call() -> Tensor:
        seen = ChunkedLogProbFunction.apply(
            problem.hidden, problem.weight, None, problem.targets.clamp(min=0), 1.0, 32768, None, 1.0, ()
        )
        return problem.of_logprobs(seen[0])

    return problem.with_gradients(call)


def cce(problem: HeadProblem) -> Callable[[], Result] | None:
    if problem.loss != "cross_entropy":
        return None
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.device.type == "cuda" else "torch_compile"
    return problem.with_gradients(
        lambda: linear_cross_entropy(problem.hidden, problem.weight, problem.targets, impl=impl)
    )


def liger(problem: HeadProblem) -> Callable[[], Result] | None:
    """Cross entropy in Triton, on GPUs only; PPO's, as GRPO's, in chunks of torch operations."""
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    if problem.loss == "cross_entropy":
        if problem.device.type != "cuda":
            return None
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

        return problem.with_gradients(lambda: loss(hidden, weight, targets))
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=4, loss_type="bnpo")
    ids, mask = targets.clamp(min=0).view(-1, _SEQUENCE), (targets != -100).float().view(-1, _SEQUENCE)
    old_logprobs = problem.inputs["old_logprobs"].view(-1, _SEQUENCE)
    advantages = problem.inputs["advantages"].view(-1, _SEQUENCE)[:, 0].contiguous()

    def call() -> Tensor:
        sequences = hidden.view(-1, _SEQUENCE, hidden.shape[-1])
        return grpo(sequences, weight, ids, mask, advantages, old_per_token_logps=old_logprobs)[0]

    return problem.with_gradients(call)


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[[HeadProblem], Callable[[], Result | None] | None]
    requires: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return all(find_spec(module) is not None for module in self.requires)


CONTENDERS = (
    Contender(PRODUCTS, products),
    Contender(LOGITS_LOSS, loss_of_logits),
    Contender(FUSED_HEAD, fused_head),
    Contender(f"{FUSED_HEAD}, 256 MiB", lambda problem: fused_head(problem, chunk_bytes=1 << 28)),
    Contender(f"{FUSED_HEAD}, masked left out", lambda problem: fused_head(problem, skip_masked=True)),
    Contender("eager head", eager),
    Contender("torch.compile head", compiled),
    Contender("F.linear_cross_entropy, chunked", torch_chunked),
    Contender("TRL", trl, ("trl", "transformers")),
    Contender("CCE", cce, ("cut_cross_entropy",)),
    Contender("Liger", liger, ("liger_kernel",)),
)


# ---- How ----


def measure_head(
    case: HeadCase, loss: str, dtype: str, device: torch.device, opponents: tuple[str, ...] | None, repeats: int
) -> Iterator[dict[str, Any]]:
    """The records of one case, loss and dtype: everything in one interleaved loop."""
    torch._dynamo.reset()
    problem = HeadProblem(case, loss, dtype, device)
    truth = problem.truth()
    ready: dict[str, Callable[[], Any]] = {}
    checked: dict[str, dict[str, Any]] = {}
    for contender in CONTENDERS:
        name = contender.name
        ours = name.startswith(FUSED_HEAD) or name in (PRODUCTS, LOGITS_LOSS)
        if not contender.installed or (opponents is not None and not ours and name not in opponents):
            continue
        if "masked left out" in name and not case.masked:
            continue
        try:
            call = contender.build(problem)
            if call is None:
                continue
            checked[name] = {**_errors(call(), truth), "peak_bytes": peak_bytes(call, device), "status": "ok"}
            ready[name] = call
        except Exception as error:  # a peer may not take a shape, or memory: that is a result, too
            print(f"  {name}: {type(error).__name__}: {error}", file=sys.stderr)
            checked[name] = {"status": f"failed: {type(error).__name__}"}
            yield _record(problem, name, repeats, checked[name])
    del truth
    times = interleaved(ready, lambda: None, repeats, device)
    medians = {name: quantiles(times[name].ms) for name in ready}
    floor = sum(medians[name][1] for name in (PRODUCTS, LOGITS_LOSS))
    for name, (p20, median, p80) in medians.items():
        fields = {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "ratio_to_floor": median / floor}
        fields["tflops"] = 6e-9 * problem.count * case.vocab * case.hidden / median
        yield _record(problem, name, repeats, {**fields, **checked[name]})


def _errors(result: Result | None, truth: Result) -> dict[str, float | None]:
    if result is None:
        return {"loss_error": None, "hidden_grad_error": None, "weight_grad_error": None}
    (loss, gradients), (true_loss, true_gradients) = result, truth
    errors = [float((g.double() - t).norm() / t.norm()) for g, t in zip(gradients, true_gradients, strict=True)]
    return {
        "loss_error": float((loss.double() - true_loss).abs() / true_loss.abs()),
        "hidden_grad_error": errors[0],
        "weight_grad_error": errors[1],
    }


def _record(problem: HeadProblem, name: str, repeats: int, fields: dict[str, Any]) -> dict[str, Any]:
    case = problem.case
    return {
        "case": case.name,
        "loss": problem.loss,
        "group": "head",
        "contender": name,
        "backend": None,
        "mode": "head",
        "same_loss": True,
        "dtype": problem.dtype,
        "shape": [case.n, case.hidden, case.vocab],
        "n": case.n,
        "vocab": case.vocab,
        "repeats": repeats,
        **fields,
    }
