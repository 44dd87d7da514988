"""How it is timed: everything of a case in one interleaved loop, after a check that it computes what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accuracy import Errors, Truth
from cases import STATISTICS, Case, Problem, make_problem
from contenders import FUSED, Contender, Result, contenders, floors, kernels_of
from memory import peak_bytes
from opponents import OPPONENTS, LossOfLogits
from timing import Times, captured, interleaved, quantiles

import fused_losses
from fused_losses import reference

OVERHEAD_CASE = Case("overhead 1x1024", (1,), 1024, ("fp32",), ("ppo",), ("separate",), ("eager",))


def measure(
    problem: Problem,
    group: str,
    modes: tuple[str, ...],
    names: tuple[str, ...],
    opponents: tuple[str, ...],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """The records of one case, loss and dtype: everything in one interleaved loop."""
    device = problem.source.device
    torch._dynamo.reset()  # else the shapes of earlier problems count towards its limit of recompilations
    truth = Truth(problem, two_phase=group == "two_phase")
    ready: list[Contender] = []
    checked: dict[str, dict[str, Any]] = {}
    for contender in contenders(problem, modes, names, opponents):
        try:
            checked[contender.key] = check(contender, problem, truth)
            ready.append(contender)
        except Exception as error:  # an opponent may not take a shape, or memory: that is a result, too
            print(f"  {contender.key}: {type(error).__name__}: {error}", file=sys.stderr)
            checked[contender.key] = {"status": status_of(error)}
            yield record(problem, group, contender, repeats, checked[contender.key])
    graphs = {}
    if problem.case.graph and device.type == "cuda":
        found = {c.key: captured(c.call) for c in ready if c.capturable}
        graphs = {key: graph for key, graph in found.items() if graph is not None}
    times = interleaved({c.key: c.call for c in ready}, problem.restore, repeats, device, graphs)

    medians = {c.key: quantiles(times[c.key].ms)[1] for c in ready}
    by_name = {c.name: medians[c.key] for c in ready if c.mode == "floor" or c.name == "eager"}
    for contender in ready:
        yield record(
            problem,
            group,
            contender,
            repeats,
            {
                **timing_fields(times[contender.key]),
                **ratios(medians[contender.key], by_name, floor=contender.mode == "floor"),
                **checked[contender.key],
            },
        )


def check(contender: Contender, problem: Problem, truth: Truth) -> dict[str, Any]:
    """Warm up (twice: compilers and autotuners run on the way), and take errors and peak memory."""
    problem.restore()
    contender.call()
    problem.restore()
    poison(problem)
    loss, gradient = contender.result(contender.call())
    errors = truth.errors(loss, gradient) if contender.same_loss else Errors()
    del loss, gradient
    problem.restore()
    return {
        "peak_bytes": peak_bytes(contender.call, problem.source.device),
        "loss_error": errors.loss,
        "grad_error": errors.grad,
        "true_class_error": errors.true_class,
        "status": errors.verdict,
    }


def poison(problem: Problem) -> None:
    """Leave NaN where the allocator will put the next gradient, so that an element that nobody writes shows."""
    if problem.source.device.type == "cuda":
        torch.full_like(problem.source, torch.nan)


def status_of(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {type(error).__name__}"


def timing_fields(times: Times) -> dict[str, Any]:
    p20, median, p80 = quantiles(times.ms)
    fields: dict[str, Any] = {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
    for name, values in (("wall_ms", times.wall_ms), ("graph_ms", times.graph_ms), ("page_faults", times.page_faults)):
        fields[name] = quantiles(values)[1] if values else None
    return fields


def ratios(median: float, by_name: dict[str, float], floor: bool) -> dict[str, Any]:
    fields = {}
    for name in ("copy", "mul_", "clone", "read"):
        fields[f"ratio_to_{name.strip('_')}"] = median / by_name[name] if name in by_name else None
    fields["speedup"] = by_name["eager"] / median if "eager" in by_name and not floor else None
    return fields


def record(problem: Problem, group: str, contender: Contender, repeats: int, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": problem.case.name,
        "loss": problem.loss,
        "group": group,
        "contender": contender.name,
        "backend": contender.backend,
        "mode": contender.mode,
        "same_loss": contender.same_loss,
        "dtype": problem.dtype,
        "shape": [*problem.case.shape, problem.case.vocab],
        "n": problem.case.n,
        "vocab": problem.case.vocab,
        "repeats": repeats,
        **fields,
    }


# What is read of each row, by the mode that its records have; all from one read.
OBSERVED: dict[str, Callable[..., Any]] = {
    "logprobs": fused_losses.logprobs,
    "logprobs and entropy": partial(fused_losses.logprobs, return_entropy=True),
    "statistics": fused_losses.statistics,
}


def statistics(problem: Problem, names: tuple[str, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """What a row says beside its target's logprob, in one interleaved loop, after a look at its first rows."""
    ready = floors(problem)
    few = problem.buffer[:4], problem.targets[:4]
    expected = reference.statistics(few[0].double(), few[1])
    for name in names:
        seen = fused_losses.statistics(*few, backend=name)
        # atol: a mean near 0 of logits of about 10 is as exact as these are
        torch.testing.assert_close(tuple(seen), tuple(expected), rtol=1e-5, atol=1e-5, check_dtype=False)
        for mode, function in OBSERVED.items():
            call = partial(function, problem.buffer, problem.targets, backend=name)
            ready.append(Contender(FUSED, mode, call, name))
    device = problem.source.device
    times = interleaved({c.key: c.call for c in ready}, problem.restore, repeats, device)
    medians = {c.key: quantiles(times[c.key].ms)[1] for c in ready}
    by_name = {c.name: medians[c.key] for c in ready if c.mode == "floor"}
    for contender in ready:
        fields = {
            **timing_fields(times[contender.key]),
            **ratios(medians[contender.key], by_name, floor=True),
            "peak_bytes": peak_bytes(contender.call, device),
            "status": "ok",
        }
        if contender.name == FUSED:
            beside = medians[f"{FUSED} {contender.backend} logprobs and entropy"]
            fields["ratio_to_entropy"] = medians[contender.key] / beside
        yield record(problem, STATISTICS, contender, repeats, fields)


def overhead(device: torch.device, names: tuple[str, ...], repeats: int) -> Iterator[dict[str, Any]]:
    """Host time of one tiny ppo: the public function with its backward, and the kernels that it runs."""
    problem = make_problem(OVERHEAD_CASE, "ppo", "fp32", device)
    logits = problem.source.clone().requires_grad_()
    plain = OPPONENTS["eager"].build(problem, "separate")
    assert plain is not None

    def step(loss: LossOfLogits) -> Callable[[], Result]:
        def call() -> Result:
            value = loss(logits)
            value.backward()
            return value.detach(), logits.grad

        return call

    def prepare() -> None:
        logits.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()

    ready = [Contender("eager", "public", step(plain))]
    for name in names:
        public = step(partial(fused_losses.ppo, target_tokens=problem.targets, **problem.inputs, backend=name))  # type: ignore[arg-type]
        prepare()
        ready.append(Contender(FUSED, "public", public, name))
        ready.append(Contender(FUSED, "kernels", kernels_of(public, name, device), name))
    calls = {c.key: c.call for c in ready}
    host = torch.device("cpu")  # host time on any device: launched, not finished
    # In rows of a hundred: call by call, each would find the caches full of the others' code, and every Python in it
    # takes twice as long.
    times = {key: Times() for key in calls}
    for _ in range(max(repeats // 100, 3)):
        for key, call in calls.items():
            times[key].ms += interleaved({key: call}, prepare, min(repeats, 100), host)[key].ms
    for contender in ready:
        fields = timing_fields(times[contender.key])
        if contender.name == FUSED and contender.mode == "public":
            kernels = quantiles(times[f"{FUSED} {contender.backend} kernels"].ms)[1]
            fields["overhead_us"] = (fields["median_ms"] - kernels) * 1e3
        yield record(problem, "overhead", contender, repeats, {**fields, "status": "ok"})
