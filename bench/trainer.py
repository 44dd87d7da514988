"""A step of transformers' Trainer before and after one line: its time, and what it takes of memory.

    python bench/trainer.py [--tokens 1024] [--hidden 256] [--dtypes fp32,bf16] [--rounds 3] [--out bench/results]

The model is a tiny Llama with the vocabulary of Qwen. Each contender runs in a process of its own. "step memory" is
what its largest resident set, during its steps, had more than before one: logits, gradients and activations, not the
model or the optimizer's states. Linux's /proc says both. "cpu" is the time of all its threads, which other processes
of a busy machine lengthen least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from conditions import conditions, file_name
from memory import forget_peak, resident
from timing import quantiles

VOCAB, BATCH = 151_936, 2
CONTENDERS = ("stock", "causal_lm_loss", "head")


# ---- In a process of its own ----


def steps(contender: str, tokens: int, hidden: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Of one contender: a step to warm up, then ``repeats`` on the clock."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    one_line(contender)(model)

    ids = torch.randint(VOCAB, (BATCH * (repeats + 1), tokens // BATCH))
    samples = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=repeats + 1,
            logging_steps=1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        watch = watching()
        trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[watch])  # type: ignore[arg-type]
        trainer.train()
    return {
        "ms": watch.ms[1:],
        "cpu_ms": watch.cpu_ms[1:],
        "peak_rss": watch.peak,
        "step_rss": watch.peak - watch.before,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def one_line(contender: str) -> Callable[[Any], Any]:
    from fused_losses.adapters import transformers as ours

    def with_loss(model: Any) -> None:
        model.loss_function = ours.causal_lm_loss

    return {"stock": lambda model: None, "causal_lm_loss": with_loss, "head": ours.install}[contender]


def watching() -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Times steps; from the second on, when the optimizer has its states, it watches the resident set."""

        def __init__(self) -> None:
            self.ms: list[float] = []
            self.cpu_ms: list[float] = []
            self.before = self.peak = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(self.ms) == 1:
                self.before = resident("VmRSS")
                forget_peak()
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ms.append(1e3 * (time.perf_counter() - self.start[0]))
            self.cpu_ms.append(1e3 * (time.process_time() - self.start[1]))
            self.peak = resident("VmHWM")

    return Watch()


# ---- All of them ----


def measure(tokens: int, hidden: int, dtype: str, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """In turns, so that what else the machine does meets all contenders."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            arguments = ["--contender", name, "--tokens", str(tokens), "--hidden", str(hidden), "--dtypes", dtype]
            command = [sys.executable, __file__, *arguments, "--repeats", str(repeats)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return [record(name, tokens, hidden, dtype, found) for name, found in runs.items()]


def record(name: str, tokens: int, hidden: int, dtype: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    p20, median, p80 = quantiles([ms for run in runs for ms in run["ms"]])
    return {
        **conditions(torch.device("cpu")),
        "framework": "transformers",
        "framework_version": version("transformers"),
        "case": f"trainer {tokens}x{hidden}x{VOCAB}",
        "loss": "cross_entropy",
        "group": "trainer",
        "contender": name,
        "backend": None,
        "mode": "trainer",
        "same_loss": True,
        "dtype": dtype,
        "shape": [tokens, hidden, VOCAB],
        "n": tokens,
        "vocab": VOCAB,
        "repeats": sum(len(run["ms"]) for run in runs),
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "cpu_ms": statistics.median(ms for run in runs for ms in run["cpu_ms"]),
        "peak_bytes": statistics.median(run["step_rss"] for run in runs),
        "process_bytes": statistics.median(run["peak_rss"] for run in runs),
        "losses": runs[0]["losses"],
        "status": "ok",
    }


def table(records: list[dict[str, Any]]) -> str:
    lines = [f"{'':26} {'step':>9} {'cpu':>9} {'step memory':>12} {'process':>10}   last loss   than stock"]
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        of_dtype = [r for r in records if r["dtype"] == dtype]
        stock = of_dtype[0]
        for r in of_dtype:
            times = f"{r['median_ms']:6.0f} ms {r['cpu_ms']:6.0f} ms"
            memory = f"{r['peak_bytes'] / 2**20:8.0f} MiB {r['process_bytes'] / 2**20:6.0f} MiB"
            ratios = ", ".join(f"{stock[key] / r[key]:.1f}x" for key in ("median_ms", "cpu_ms", "peak_bytes"))
            lines.append(f"{dtype} {r['contender']:21} {times} {memory}   {r['losses'][-1]:9.6f}   {ratios}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4, help="timed steps of a process")
    parser.add_argument("--out", type=Path, help="folder to put the records into")
    parser.add_argument("--contender", choices=CONTENDERS, help="run only this one, in this process")
    chosen = parser.parse_args()
    dtypes = chosen.dtypes.split(",")
    if chosen.contender:
        print(json.dumps(steps(chosen.contender, chosen.tokens, chosen.hidden, dtypes[0], chosen.repeats)))
        return
    records = []
    for dtype in dtypes:
        records += measure(chosen.tokens, chosen.hidden, dtype, chosen.rounds, chosen.repeats)
    print(table(records))
    if chosen.out:
        path = chosen.out / file_name(records[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as out:
            out.writelines(json.dumps(r) + "\n" for r in records)


if __name__ == "__main__":
    main()
