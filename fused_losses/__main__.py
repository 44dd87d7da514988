"""``python -m fused_losses``: which build this is, what of it runs here, what not and why, and whether it is right.

Exit code 1 if a backend that should work does not: its extension is there but does not load, or its numbers are wrong.
``--gpu`` goes on to what the losses cost on each GPU beside a copy of the logits, which is what they promise; exit code
1 as well if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import torch

import fused_losses

from . import backends, build, keywords, reference, speed
from .backends.native import BROKEN, NOT_BUILT
from .checks import LOGITS_DTYPES
from .objectives import OBJECTIVES
from .version import __version__

TERMS = {  # of which a loss gets those that it takes
    "softcap": 20.0,
    "label_smoothing": 0.1,
    "z_loss": 0.001,
    "entropy_coef": 0.01,
    "ref_logprobs": -8.0,
    "kl_coef": 0.1,
    "kl_type": "k2",
    "kl_weighted_by_ratio": True,
}


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def self_test(backend: str, device: torch.device) -> dict[str, Any]:
    """Losses against float64, plain and with terms, one pass and two phase, on a ragged vocabulary.

    An error counts in units of what eager torch errs by at the same dtype; design: at most 2 for the loss, 3 for the
    gradient, plus a term for results so near 0 that eager happens to be exact.
    """
    worst = {"loss": 0.0, "gradient": 0.0}
    for name, dtype, recompute, with_terms in combinations(backend, device):
        logits, target_tokens, inputs = sample(OBJECTIVES[name].inputs, dtype, device)
        if with_terms:
            inputs |= {term: value for term, value in TERMS.items() if term in keywords.defaults(name)}
        truth = run(reference, name, logits.double(), target_tokens, inputs)
        eager = run(reference, name, logits, target_tokens, inputs)
        ours = run(fused_losses, name, logits, target_tokens, inputs, backend=backend, recompute=recompute)
        for key, factor, small, t, e, o in zip(worst, (2, 3), (1e-5, 1e-6), truth, eager, ours, strict=True):
            allowed = factor * (e - t).abs().max() + small * t.abs().max()
            error = (o - t).abs().max() / allowed
            worst[key] = max(worst[key], float("inf") if error.isnan() else error.item())
    return {"ok": max(worst.values()) <= 1, "error_over_allowed": worst}


def combinations(backend: str, device: torch.device) -> list[tuple[str, torch.dtype, bool, bool]]:
    """(loss, dtype, recompute, with terms): all of them, but on a GPU Triton compiles each of its kernels at its first
    use, half a second or more. So there each loss once plain and once with terms, with dtypes and ways in turn."""
    losses = [name for name, objective in OBJECTIVES.items() if objective.is_loss]
    dtypes = list(LOGITS_DTYPES)
    if backend == "triton" and device.type == "cuda":
        pairs = enumerate(product(losses, (False, True)))
        return [(name, dtypes[i % len(dtypes)], i // 2 % 2 == 1, terms) for i, (name, terms) in pairs]
    if backend == "triton":
        dtypes.remove(torch.bfloat16)  # Triton's interpreter truncates where the hardware rounds
    return list(product(losses, dtypes, (False, True), (False, True)))


def sample(inputs: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    n, vocab = 16, 1003
    logits = (3 * torch.randn(n, vocab, generator=generator)).to(dtype)
    target_tokens = torch.randint(vocab, (n,), generator=generator)
    target_tokens[3] = -100
    values = {
        "old_logprobs": reference.logprobs(logits, target_tokens) + 0.3 * torch.randn(n, generator=generator),
        "advantages": torch.randn(n, generator=generator),
    }
    return logits.to(device), target_tokens.to(device), {key: values[key].to(device) for key in inputs}


def run(module: Any, name: str, logits: Any, target_tokens: Any, inputs: dict[str, Any], **options: Any) -> list[Any]:
    """[loss, gradient] in float64."""
    logits = logits.clone().requires_grad_()
    loss = getattr(module, name)(logits, target_tokens, **inputs, **options)
    loss.backward()
    return [loss.detach().double(), logits.grad.double()]


def report() -> dict[str, Any]:
    result: dict[str, Any] = {
        "fused_losses": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "installation": build.installation(),
        "modules": build.modules(),
        "devices": [],
    }
    for device in devices():
        entry: dict[str, Any] = {"device": str(device), "description": describe(device)}
        entry["auto"] = backends.choose(device)
        entry["backends"] = {}
        for name in backends.NAMES:
            reason = backends.unusable(name, device)
            if reason is None:
                entry["backends"][name] = {"usable": True, "self_test": self_test(name, device)}
            else:
                entry["backends"][name] = {"usable": False, "reason": reason}
        result["devices"].append(entry)
    if torch.cuda.device_count() == 0:
        torch_is = (
            "torch is a CPU build" if torch.version.cuda is None else f"torch is built for CUDA {torch.version.cuda}"
        )
        reason = backends.unusable("cuda", torch.device("cuda", 0))
        result["devices"].append(
            {
                "device": "cuda",
                "description": f"no device; {torch_is}",
                "auto": None,
                "backends": {"cuda": {"usable": False, "reason": reason or "torch sees no CUDA device"}},
            }
        )
    result["ok"] = not any(
        (b["usable"] and not b["self_test"]["ok"]) or BROKEN in b.get("reason", "")
        for d in result["devices"]
        for b in d["backends"].values()
    )
    reasons = {name: b.get("reason", "") for d in result["devices"] for name, b in d["backends"].items()}
    result["left_out"] = [name for name, reason in reasons.items() if NOT_BUILT in reason]
    return result


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show(result: dict[str, Any]) -> None:
    print(
        f"fused_losses {result['fused_losses']}, Python {result['python']}, torch {result['torch']}, "
        f"triton {result['triton'] or 'not installed'}, CUDA of torch: {result['cuda'] or 'none (CPU build)'}"
    )
    print(f"installation: {result['installation']}")
    for name, module in result["modules"].items():
        print(f"  {name:7} {show_module(module) if module else '-'}")
    for device in result["devices"]:
        auto = f"; auto chooses {device['auto']}" if device["auto"] else ""
        print(f"\n{device['device']}: {device['description']}{auto}")
        for name, backend in device["backends"].items():
            if not backend["usable"]:
                print(f"  {name:7} -     {backend['reason']}")
                continue
            test = backend["self_test"]
            worst = ", ".join(f"{key} {value:.2f}" for key, value in test["error_over_allowed"].items())
            print(f"  {name:7} {'ok' if test['ok'] else 'WRONG':5} error over allowed: {worst}")
    print("\nok" if result["ok"] else "\nFAILED: a backend that should work does not")
    if left_out := ", ".join(result["left_out"]):
        if result["installation"].startswith(build.WHEEL):
            print(
                f"not in wheels: {left_out}; `pip install --no-binary fused-losses fused-losses` compiles what it can"
            )
        else:  # pip has hidden what setup.py said of it
            print(f"left out at install: {left_out}; `pip install -v` shows why")


def show_module(module: dict[str, Any]) -> str:
    sources = f"commit {module.get('commit') or 'unknown'}"
    compiler = f"{module.get('compiler') or 'unknown compiler'} {module.get('flags', '')}".strip()
    if architectures := module.get("architectures"):
        return f"{sources}; CUDA {module.get('cuda') or 'unknown'} for sm_{', sm_'.join(architectures)}; {compiler}"
    sets = [f"{name} (in use)" if name == module["in_use"] else name for name in module["instruction_sets"]]
    return f"{sources}; {', '.join(sets)}; {compiler}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_losses", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gpu", action="store_true", help="and time the losses beside a copy, about a minute a GPU")
    arguments = parser.parse_args()
    result = report()
    gpus = [device for device in devices() if device.type == "cuda"] if arguments.gpu else []
    if arguments.json:
        if arguments.gpu:
            result["speed"] = {str(gpu): [timed(row) for row in speed.rows(gpu)] for gpu in gpus}
        print(json.dumps(result, indent=2))
    else:
        show(result)
        for gpu in gpus:
            show_speed(gpu)
        if arguments.gpu and not gpus:
            print("no GPU to time: torch sees none")
    return 0 if result["ok"] and (gpus or not arguments.gpu) else 1


def timed(row: speed.Row) -> dict[str, Any]:
    own, inplace, forward = row.ratios
    ratios = {"own": own, "inplace": inplace, "forward": forward}
    return {**row._asdict(), "promise": row.promise._asdict(), "ratios": ratios, "kept": row.kept}


def show_speed(gpu: torch.device) -> None:
    print(
        f"\n{gpu}: {describe(gpu)}; bfloat16, backend {backends.choose(gpu)}. Forward and backward in copies of the "
        f"logits, forward only in reads:\n{speed.HEAD}"
    )
    for row in speed.rows(gpu):
        print(speed.line(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
