"""``python bench/adapters.py [torchtitan ms_swift openrlhf]``: a step with the framework's own loss, and with ours.

A step is a head of 64 features, the loss, and both backwards, of 2 x 512 tokens and 151,936 classes on a CPU. Each is
run in a process of its own. What is printed is the most memory that the step had beyond what the process had before it,
and the shortest of some runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
CASES = {
    "torchtitan": [
        f"{loss}, {chunks}, {dtype}"
        for loss in ("CrossEntropyLoss", "GRPOLoss")
        for chunks in ("whole", "8 chunks")
        for dtype in ("fp32", "bf16")
    ],
    "ms_swift": [f"{loss}, {dtype}" for loss in ("plain", "DFT") for dtype in ("fp32", "bf16")],
    "openrlhf": ["ppo", "ppo, entropy"],
}
B, L, H, V = 2, 512, 64, 151936


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("framework", nargs="*", default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measured(*options.one, options.repeats))
        return
    print(f"{'step':58} {'theirs':>22} {'ours':>22}")
    for framework in options.framework:
        for case in CASES[framework]:
            found = []
            for whose in ("theirs", "ours"):
                command = [sys.executable, __file__, "--one", framework, case, whose]
                command += ["--repeats", str(options.repeats)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peak, seconds = (float(x) for x in done.stdout.split("\n")[-2].split())
                found.append(f"{peak / 2**20:7.0f} MiB {seconds:7.2f} s")
            print(f"{f'{framework}: {case}':58} {found[0]:>22} {found[1]:>22}", flush=True)


def measured(framework: str, case: str, whose: str, repeats: int) -> tuple[int, float]:
    """Bytes and seconds."""
    sys.path.insert(0, str(ROOT / "tests" / "adapters"))
    import stubbed

    stubbed.use(framework)
    step = {"torchtitan": torchtitan, "ms_swift": ms_swift, "openrlhf": openrlhf}[framework](case, whose == "ours")
    peak, seconds = 0, float("inf")
    for _ in range(repeats):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, start = memory("VmRSS"), time.perf_counter()
        step()
        seconds = min(seconds, time.perf_counter() - start)
        peak = max(peak, memory("VmHWM") - before)
    return peak, seconds


def memory(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def layer(dtype: str) -> tuple[Any, Any, Any]:
    """A head, hidden states, and labels of which a tenth is ignored."""
    import torch

    torch.manual_seed(0)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    head = torch.nn.Linear(H, V, bias=False, dtype=kind)
    hidden = torch.randn(B, L, H, dtype=kind, requires_grad=True)
    labels = torch.randint(V, (B, L))
    labels[:, : L // 10] = -100
    return head, hidden, labels


def torchtitan(case: str, ours: bool) -> Callable[[], None]:
    import torch
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.experiments.rl.losses import GRPOLoss

    from fused_losses.adapters import torchtitan as adapter

    loss, chunks, dtype = case.split(", ")
    head, hidden, labels = layer(dtype)
    own: Any = adapter if ours else SimpleNamespace(CrossEntropyLoss=CrossEntropyLoss, GRPOLoss=GRPOLoss)
    config = getattr(own, loss).Config()
    given = {"global_valid_tokens": torch.tensor(900)}
    if loss == "GRPOLoss":
        given |= {
            "generator_logprobs": torch.full((B, L), -12.0),
            "advantages": torch.randn(B, L),
            "loss_mask": labels != -100,
        }
        labels = labels.clamp(min=0)
    if chunks == "whole":
        built = config.build()
        return lambda: built(head(hidden * 1.0), labels, **given)[0].backward()
    wrapper = ChunkedLossWrapper.Config(num_chunks=8, loss_fn=config).build()
    wrapper.set_lm_head(head)
    return lambda: wrapper(hidden * 1.0, labels, **given)[0].backward()


def ms_swift(case: str, ours: bool) -> Callable[[], None]:
    import torch
    from swift.loss import loss_map
    from swift.trainers import per_token_loss_func

    from fused_losses.adapters import ms_swift as adapter

    kind, dtype = case.split(", ")
    head, hidden, labels = layer(dtype)
    tokens = torch.tensor(900)
    trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=1, task_type="causal_lm"))
    arguments = SimpleNamespace(enable_dft_loss=kind == "DFT")
    made = (adapter.CrossEntropyLoss if ours else loss_map["cross_entropy"])(arguments, trainer)

    def step() -> None:
        outputs = SimpleNamespace(logits=head(hidden))
        if kind == "DFT" and not ours:  # as the trainer does it
            loss = per_token_loss_func(outputs, labels, enable_dft_loss=True).sum() / tokens
        else:
            loss = made(outputs, labels, num_items_in_batch=tokens)
        loss.backward()

    return step


def openrlhf(case: str, ours: bool) -> Callable[[], None]:
    """In float32, as its Actor makes the logits."""
    import torch
    from openrlhf.models import actor
    from openrlhf.models.loss import PolicyLoss, aggregate_loss

    from fused_losses.adapters import openrlhf as adapter

    sys.modules["flash_attn.ops"] = None  # type: ignore[assignment]  # whose kernels are for GPUs
    torch.compiler.set_stance("force_eager")
    with_entropy = case.endswith("entropy")
    if ours:
        adapter.install(inplace=not with_entropy)
    head, hidden, labels = layer("fp32")
    mask, labels = labels != -100, labels.clamp(min=0)
    old, advantages = torch.full((B, L), -12.0), torch.randn(B, L)
    policy = PolicyLoss()

    def step() -> None:
        logits = head(hidden)
        entropy = actor.compute_entropy(logits) if with_entropy else None
        loss = policy(actor.log_probs_from_logits(logits, labels), old, advantages, mask)[0]
        if entropy is not None:
            loss = loss - 0.01 * aggregate_loss(entropy, mask)
        loss.backward()

    return step


if __name__ == "__main__":
    main()
