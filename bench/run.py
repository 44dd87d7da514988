"""Measure the losses and their opponents, and write the records that bench/report.py turns into tables and plots.

python bench/run.py                               # all cases of this machine's device
python bench/run.py --quick                       # seconds: does it all work
python bench/run.py --cases '1:*,3:*' --losses ppo --backends cuda,triton
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accuracy import Errors, Truth
from cases import CPU_CASES, DTYPES, GPU_CASES, GROUPS, LOSSES, QUICK_CASES, TERMS, Case, Problem, make_problem
from conditions import conditions, file_name
from memory import peak_bytes, touch
from opponents import OPPONENTS, LossOfLogits, Opponent, check_plain_formulas
from timing import Times, captured, interleaved, quantiles
from torch import Tensor

import fused_losses
from fused_losses import backends

RESULTS = Path(__file__).resolve().parent / "results"
FUSED = "fused"  # the contender that is this library; its records name the backend
OVERHEAD_CASE = Case("overhead 1x1024", (1,), 1024, ("fp32",), ("ppo",), ("separate",), ("eager",))

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


# ---- what is timed ---------------------------------------------------------------------------------------------------


class Produced(torch.autograd.Function):
    """Logits as an operation's output, which is what may be overwritten, without an operation's time."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


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
    module = backends.resolve(backend, device)
    seen: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            seen.append((function, args, kwargs))
            return function(*args, **kwargs)

        return record

    with (
        mock.patch.object(module, "loss_and_grad", recorder(module.loss_and_grad)),
        mock.patch.object(module, "scale", recorder(module.scale)),
    ):
        gradient = call()[1]  # the buffer that the recorded arguments name

    def again() -> Result:
        results = [function(*args, **kwargs) for function, args, kwargs in seen]
        return results[0][0], gradient

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


# ---- measuring -------------------------------------------------------------------------------------------------------


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


# ---- command line ----------------------------------------------------------------------------------------------------


def usable_backends(device: torch.device, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The usable backends, best first. Triton's interpreter, the only Triton on a CPU, is for tests, not for times."""
    if wanted is not None:
        for name in wanted:
            backends.resolve(name, device)  # raises with the cause
        return wanted
    names = [name for name in backends.NAMES if not (name == "triton" and device.type == "cpu")]
    return tuple(name for name in names if backends.unusable(name, device) is None)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny cases, a smoke test; the times mean nothing")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--cases", type=names, help="patterns of case names, comma-separated: '1:*,overhead*'")
    parser.add_argument("--losses", type=names, help=f"of {', '.join(LOSSES)}")
    parser.add_argument("--backends", type=names, help=f"of {', '.join(backends.NAMES)}; default: every usable one")
    parser.add_argument("--opponents", type=names, help=f"of {', '.join(OPPONENTS)}")
    parser.add_argument("--modes", type=names, help="of inplace, separate, reused, forward, two_phase")
    parser.add_argument("--dtype", type=names, help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, help="default: 11 on CPU, 30 on CUDA")
    parser.add_argument("--threads", type=int, help="of torch, on CPU")
    parser.add_argument(
        "--touch", type=float, default=0.0, metavar="GB", help="write so much memory first: for a young virtual machine"
    )
    parser.add_argument("--commit", help="to put in the records where git can't tell")
    parser.add_argument(
        "--out", type=Path, help="folder of the records; default bench/results, --quick: a temporary one"
    )
    return parser.parse_args(argv)


def selected(options: argparse.Namespace, device: torch.device) -> list[Case]:
    cases = [*(QUICK_CASES if options.quick else GPU_CASES if device.type == "cuda" else CPU_CASES), OVERHEAD_CASE]
    if options.cases is None:
        return cases
    return [case for case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.cases)]


def keep(available: tuple[str, ...], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    return available if wanted is None else tuple(name for name in available if name in wanted)


def records(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    names = usable_backends(device, options.backends)
    repeats = options.repeats or (3 if options.quick else 30 if device.type == "cuda" else 11)
    for case in selected(options, device):
        if case is OVERHEAD_CASE:
            if not options.losses or "ppo" in options.losses:
                yield from overhead(device, names, 100 if options.quick else 3000)
            continue
        # Where a better backend is there, eager is only the fallback, and takes longer than all others together.
        better = tuple(name for name in names if name != "eager")
        chosen = names if case.fallback or options.backends or not better else better
        for dtype in keep(case.dtypes, options.dtype):
            for loss in keep(case.losses, options.losses):
                problem = make_problem(case, loss, dtype, device)
                for group, modes in GROUPS.items():
                    modes = keep(keep(modes, case.modes), options.modes)
                    if modes:
                        yield from measure(
                            problem, group, modes, chosen, keep(case.opponents, options.opponents), repeats
                        )
                del problem
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def line(record: dict[str, Any]) -> str:
    name = " ".join(filter(None, (record["contender"], record["backend"])))
    parts = [f"{record['case']:24} {record['dtype']} {record['loss']:20} {record['mode']:10} {name:28}"]
    if (median := record.get("median_ms")) is not None:
        parts.append(f"{median:10.4f} ms")
        if record.get("ratio_to_copy") is not None:
            parts.append(f"{record['ratio_to_copy']:6.2f} x copy")
        if record.get("speedup") is not None:
            parts.append(f"{record['speedup']:6.2f} x eager's speed")
        if record.get("overhead_us") is not None:
            parts.append(f"{record['overhead_us']:6.1f} us of interface")
    if record["status"] != "ok":
        parts.append(record["status"].upper())
    return " ".join(parts)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.list:
        print("\n".join(case.name for case in selected(options, device)))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    check_plain_formulas(keep(LOSSES, options.losses))
    where = conditions(device, options.commit)
    missing = [o.name for o in OPPONENTS.values() if not o.installed]
    where["absent"] = missing
    where["touched_gb"] = options.touch
    touch(options.touch)
    # Times of a smoke test must not become the newest record.
    out = options.out or (Path(tempfile.mkdtemp(prefix="bench-quick-")) if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / file_name(where)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}")
    if missing:
        print(f"not installed, not measured: {', '.join(missing)}")
    start, wrong = time.perf_counter(), 0
    with path.open("a") as file:  # several runs with filters make one record; the report takes the last of each line
        for found in records(options, device):
            file.write(json.dumps({**found, **where}) + "\n")
            file.flush()
            print(line(found), flush=True)
            wrong += found["contender"] == FUSED and found["status"] != "ok"
    print(f"{time.perf_counter() - start:.0f} s, {path}")
    if wrong:
        print(f"{wrong} measurements of this library are wrong, inexact or failed", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
