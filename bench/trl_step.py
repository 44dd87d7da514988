"""What TRL's trainers take with this library's head instead of TRL's own, on a CPU: memory, time, loss.

    python bench/trl_step.py [--tokens 2048] [--hidden 256] [--vocab 151936] [--repeats 3]

Medians over processes, theirs and ours in turn. Memory is a process's largest resident set beyond what was there before
the step: in a training step that has the gradients and what AdamW keeps. Of the two times what processors spent, in all
threads, is the one to read on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CASES = {
    "head": "the head alone, forward and backward",
    "frozen": "the head alone, its weight frozen",
    "sft": "a step of SFTTrainer, one layer, AdamW",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="one process's part: CASE,theirs or CASE,ours")
    asked = parser.parse_args()
    if asked.only:
        case, whose = asked.only.split(",")
        print(json.dumps(measured(case, whose == "ours", asked.tokens, asked.hidden, asked.vocab)))
        return
    print(f"N = {asked.tokens}, H = {asked.hidden}, V = {asked.vocab}, float32, {torch.get_num_threads()} threads")
    print("| | MiB, theirs | ours | seconds, theirs | ours | of processors, theirs | ours | loss |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for case, words in CASES.items():
        seen: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
        for _ in range(asked.repeats):
            for whose, records in seen.items():
                command = [sys.executable, __file__, "--only", f"{case},{whose}"]
                sizes = ["--tokens", str(asked.tokens), "--hidden", str(asked.hidden), "--vocab", str(asked.vocab)]
                done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
                records.append(json.loads(done.stdout.splitlines()[-1]))
        cells = [
            f"{statistics.median(record[key] for record in records):{form}}"
            for key, form in (("MiB", ".0f"), ("seconds", ".2f"), ("of processors", ".2f"))
            for records in seen.values()
        ]
        losses = {f"{record['loss']:.5f}" for records in seen.values() for record in records}
        print(f"| {words} | {' | '.join(cells)} | {' or '.join(sorted(losses))} |", flush=True)


def measured(case: str, ours: bool, tokens: int, hidden: int, vocab: int) -> dict[str, float]:
    if ours:
        from fused_losses.adapters import trl

        trl.install()
    torch.manual_seed(0)
    step = a_training_step(tokens, hidden, vocab) if case == "sft" else of_the_head(case, tokens, hidden, vocab)
    before, start, spent = resident(), time.perf_counter(), time.process_time()
    loss = step()
    return {
        "loss": loss,
        "seconds": time.perf_counter() - start,
        "of processors": time.process_time() - spent,
        "MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20,
    }


def of_the_head(case: str, tokens: int, hidden: int, vocab: int) -> Callable[[], float]:
    """As SFTTrainer calls it: log_probs, the entropy and whether the target is the most likely."""
    from trl.trainer import utils

    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden).mul_(hidden**-0.5).requires_grad_(case != "frozen")
    targets = torch.randint(vocab, (tokens,))
    asked = ("log_probs",) if case == "frozen" else ("log_probs", "entropy", "is_top1")

    def step() -> float:
        given = utils._ChunkedLogProbFunction.apply(
            states, weight, None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, asked
        )
        loss = -given[0].mean()
        loss.backward()
        return float(loss)

    return step


def a_training_step(tokens: int, hidden: int, vocab: int) -> Callable[[], float]:
    """Two rows of tokens / 2 tokens each, none of them masked."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    shape: dict[str, Any] = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    processing = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    length = tokens // 2 + 1  # a row's first token has no target
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(Path(tempfile.gettempdir(), "trl_step")),  # nothing is saved
            max_steps=1,
            per_device_train_batch_size=2,
            max_length=length,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": torch.randint(2, vocab, (2, length)).tolist()}),
        processing_class=processing,
    )
    return lambda: float(trainer.train().training_loss)


def resident() -> int:
    """Bytes, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
