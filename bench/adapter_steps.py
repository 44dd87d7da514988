"""The steps of bench/adapters.py: what a framework does with its own loss, and the same with ours.

A function per framework, ``framework(case, way) -> Step``; each runs in a process of its own, in which it may install
what it likes. What it imports of a framework may be a stub: tests/adapters/stubbed.py.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCAB = 151_936
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    framework: str
    name: str
    loss: str
    dtype: str
    tokens: int
    hidden: int  # 0: a step begins with logits
    vocab: int = VOCAB
    ways: tuple[str, ...] = ("theirs", "ours")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for size in (self.tokens, self.hidden, self.vocab) if size)

    @property
    def title(self) -> str:
        return f"{self.framework}: {self.name}, {'x'.join(map(str, self.shape))}"

    def resized(self, tokens: int, hidden: int, vocab: int) -> Case:
        return self._replace(tokens=tokens, hidden=self.hidden and hidden, vocab=vocab)


class Step(NamedTuple):
    run: Callable[[], Tensor | float]  # the loss
    prepare: Callable[[], None]  # before each, not on the clock


MEGATRON_WAYS = ("native fusion", "unfused", "install()", "install(inplace=True)", "output_processor")
CASES = [
    *(
        Case("torchtitan", f"{name}, {chunks}", loss, dtype, 1024, 64)
        for name, loss in (("CrossEntropyLoss", "cross_entropy"), ("GRPOLoss", "ppo"))
        for chunks in ("whole", "8 chunks")
        for dtype in DTYPES
    ),
    *(
        Case("ms_swift", name, loss, dtype, 1024, 64)
        for name, loss in (("cross_entropy", "cross_entropy"), ("DFT", "dft"))
        for dtype in DTYPES
    ),
    *(Case("openrlhf", name, "ppo", "fp32", 1024, 64) for name in ("ppo", "ppo with entropy")),
    *(
        Case("trl", name, loss, "fp32", 2048, 256)
        for name, loss in (("head", "logprobs"), ("frozen head", "logprobs"), ("SFTTrainer", "cross_entropy"))
    ),
    Case("verl", "logprobs_from_logits", "logprobs", "fp32", 256, 0),
    Case("verl", "logprobs_from_logits", "logprobs", "bf16", 256, 0),
    Case("verl", "entropy, then logprobs", "logprobs", "fp32", 256, 0),
    Case("verl", "FusedLinearForPPO", "logprobs", "fp32", 256, 256),
    Case("skyrl", "logprobs_from_logits", "logprobs", "fp32", 256, 0),
    Case("skyrl", "logprobs, then entropy", "logprobs", "fp32", 256, 0),
    Case("skyrl", "logprobs, then entropy", "logprobs", "bf16", 256, 0),
    Case("megatron", "GPTModel", "cross_entropy", "fp32", 512, 64, ways=MEGATRON_WAYS),
    *(Case("prime_rl", "FusedOutputLinear", "logprobs", dtype, 512, 64) for dtype in DTYPES),
]


# ---- What steps begin with ----


def head_and_labels(case: Case) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    """A head, hidden states of two sequences, and labels of which the first tenth of each is ignored."""
    length, dtype = case.tokens // 2, DTYPES[case.dtype]
    head = torch.nn.Linear(case.hidden, case.vocab, bias=False, dtype=dtype)
    hidden = torch.randn(2, length, case.hidden, dtype=dtype, requires_grad=True)
    labels = torch.randint(case.vocab, (2, length))
    labels[:, : length // 10] = -100
    return head, hidden, labels


def without_gradients(*leaves: Tensor) -> Callable[[], None]:
    """As an optimizer's zero_grad leaves them."""

    def prepare() -> None:
        for leaf in leaves:
            leaf.grad = None

    return prepare


def of_logits(case: Case, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Loss and gradient of logits that exist, which a step may write over."""
    leaf = torch.randn(1, case.tokens, case.vocab).to(DTYPES[case.dtype]).requires_grad_()
    labels, logits = torch.randint(case.vocab, (1, case.tokens)), leaf * 1.0  # no leaf, as no model's are

    def run() -> Tensor:
        loss = loss_of(logits, labels)
        torch.autograd.grad(loss, logits)
        return loss.detach()

    def restore() -> None:
        logits.detach().copy_(leaf.detach())

    return Step(run, restore)


# ---- Frameworks ----


def torchtitan(case: Case, way: str) -> Step:
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.experiments.rl.losses import GRPOLoss

    from fused_losses.adapters import torchtitan as adapter

    name, chunks = case.name.split(", ")
    head, hidden, labels = head_and_labels(case)
    own: Any = SimpleNamespace(CrossEntropyLoss=CrossEntropyLoss, GRPOLoss=GRPOLoss) if way == "theirs" else adapter
    config = getattr(own, name).Config()
    valid = labels != -100
    given = {"global_valid_tokens": valid.sum()}
    if name == "GRPOLoss":
        labels = labels.clamp(min=0)
        given |= {
            "generator_logprobs": torch.full(labels.shape, -12.0),
            "advantages": torch.randn(labels.shape),
            "loss_mask": valid,
        }
    if chunks == "whole":
        made, outputs = config.build(), head
    else:
        made, outputs = ChunkedLossWrapper.Config(num_chunks=8, loss_fn=config).build(), torch.nn.Identity()
        made.set_lm_head(head)

    def run() -> Tensor:
        loss: Tensor = made(outputs(hidden * 1.0), labels, **given)[0]  # the wrapper takes no leaf
        loss.backward()
        return loss.detach()

    return Step(run, without_gradients(head.weight, hidden))


def ms_swift(case: Case, way: str) -> Step:
    from swift.loss import loss_map
    from swift.trainers import per_token_loss_func

    from fused_losses.adapters import ms_swift as adapter

    dft = case.name == "DFT"
    head, hidden, labels = head_and_labels(case)
    tokens = (labels != -100).sum()
    trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=1, task_type="causal_lm"))
    arguments = SimpleNamespace(enable_dft_loss=dft)
    made = (loss_map["cross_entropy"] if way == "theirs" else adapter.CrossEntropyLoss)(arguments, trainer)

    def run() -> Tensor:
        outputs = SimpleNamespace(logits=head(hidden))
        if dft and way == "theirs":  # as the trainer does it
            loss = per_token_loss_func(outputs, labels, enable_dft_loss=True).sum() / tokens
        else:
            loss = made(outputs, labels, num_items_in_batch=tokens)
        loss.backward()
        return loss.detach()

    return Step(run, without_gradients(head.weight, hidden))


def openrlhf(case: Case, way: str) -> Step:
    """In float32, as its Actor makes the logits."""
    from openrlhf.models import actor
    from openrlhf.models.loss import PolicyLoss, aggregate_loss

    from fused_losses.adapters import openrlhf as adapter

    sys.modules["flash_attn.ops"] = None  # type: ignore[assignment]  # whose kernels are for GPUs
    torch.compiler.set_stance("force_eager")
    with_entropy = case.name == "ppo with entropy"
    if way == "ours":
        adapter.install(inplace=not with_entropy)
    head, hidden, labels = head_and_labels(case)
    mask, labels = labels != -100, labels.clamp(min=0)
    old, advantages = torch.full(labels.shape, -12.0), torch.randn(labels.shape)
    policy = PolicyLoss()

    def run() -> Tensor:
        logits = head(hidden)
        entropy = actor.compute_entropy(logits) if with_entropy else None
        loss = policy(actor.log_probs_from_logits(logits, labels), old, advantages, mask)[0]
        if entropy is not None:
            loss = loss - 0.01 * aggregate_loss(entropy, mask)
        loss.backward()
        return loss.detach()

    return Step(run, without_gradients(head.weight, hidden))


def trl(case: Case, way: str) -> Step:
    from fused_losses.adapters import trl as adapter

    if way == "ours":
        adapter.install()
    return sft_trainer(case) if case.name == "SFTTrainer" else trl_head(case)


def trl_head(case: Case) -> Step:
    """As SFTTrainer calls it: log_probs, the entropy and whether the target is the most likely; frozen as with LoRA."""
    from trl.trainer import utils

    frozen = case.name == "frozen head"
    states = torch.randn(case.tokens, case.hidden, requires_grad=True)
    weight = torch.randn(case.vocab, case.hidden).mul_(case.hidden**-0.5).requires_grad_(not frozen)
    targets = torch.randint(case.vocab, (case.tokens,))
    asked = ("log_probs",) if frozen else ("log_probs", "entropy", "is_top1")

    def run() -> Tensor:
        given = utils._ChunkedLogProbFunction.apply(
            states, weight, None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, asked
        )
        loss: Tensor = -given[0].mean()
        loss.backward()
        return loss.detach()

    return Step(run, without_gradients(states, weight))


def sft_trainer(case: Case) -> Step:
    """A training step of a model of one layer, on two rows of which no token is masked."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    sizes: dict[str, Any] = {
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": 2 * case.hidden,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    length = case.tokens // 2 + 1  # a row's first token has no target
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(Path(tempfile.gettempdir(), "bench_sft")),  # nothing is saved
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
        train_dataset=Dataset.from_dict({"input_ids": torch.randint(2, case.vocab, (2, length)).tolist()}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )
    return Step(lambda: float(trainer.train().training_loss), without_gradients(*model.parameters()))


def verl(case: Case, way: str) -> Step:
    from verl.utils import torch_functional

    from fused_losses.adapters import verl as adapter

    if way == "ours":
        adapter.install(megatron=False)
    if case.name == "FusedLinearForPPO":
        return verl_head(case)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        """As the engines do: not in place where the entropy has a gradient."""
        logits, labels = logits.squeeze(0), labels.squeeze(0)
        if case.name == "logprobs_from_logits":
            return -torch_functional.logprobs_from_logits(logits, labels).mean()
        entropy = torch_functional.entropy_from_logits(logits)
        logprobs = torch_functional.logprobs_from_logits(logits, labels, inplace_backward=False)
        return -logprobs.mean() - 0.01 * entropy.mean()

    return of_logits(case, loss_of)


def verl_head(case: Case) -> Step:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    head, hidden, labels = head_and_labels(case)
    labels, fused = labels.clamp(min=0), FusedLinearForPPO()

    def run() -> Tensor:
        logprobs, entropy = fused(hidden, head.weight, labels)
        loss: Tensor = -logprobs.mean() - 0.01 * entropy.mean()
        loss.backward()
        return loss.detach()

    return Step(run, without_gradients(head.weight, hidden))


def skyrl(case: Case, way: str) -> Step:
    from skyrl.backends.skyrl_train.utils import torch_utils

    from fused_losses.adapters import skyrl as adapter

    if way == "ours":
        adapter.install()

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = -torch_utils.logprobs_from_logits(logits, labels, inplace_backward=True).mean()
        if case.name == "logprobs, then entropy":
            loss = loss - 0.01 * torch_utils.chunked_entropy_from_logits(logits, requires_grad=True).mean()
        return loss

    return of_logits(case, loss_of)


@functools.cache
def one_rank() -> ExitStack:
    """Megatron's groups and its CPU as a device, for the rest of the process."""
    from fused_losses.adapters.comparisons import megatron as made

    stack = ExitStack()
    stack.enter_context(made.on_cpu())
    return stack


def megatron(case: Case, way: str) -> Step:
    """A step of a model of one layer, on one rank."""
    from fused_losses.adapters import megatron as adapter
    from fused_losses.adapters.comparisons import megatron as made

    one_rank()
    fusion = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"}
    sizes = {"hidden": case.hidden, "vocab": case.vocab, "length": case.tokens}
    model = made.model(**sizes, **(fusion if way == "native fusion" else {}))
    given: dict[str, Any] = made.batch(1, case.tokens, case.vocab)
    if way.startswith("install"):
        adapter.install(inplace=way == "install(inplace=True)")
    elif way == "output_processor":
        chunks = {"chunk_bytes": 2**25}
        given |= {"output_processor": adapter.output_processor, "output_processor_context": chunks}
    mask = given["loss_mask"]

    def run() -> Tensor:
        loss: Tensor = (model(**given) * mask).sum() / mask.sum()
        loss.backward()
        return loss.detach()

    return Step(run, without_gradients(*model.parameters()))


def prime_rl(case: Case, way: str) -> Step:
    """Theirs is the definition of its head without a chunk size, as prime-rl is on no package index."""
    from fused_losses.adapters import prime_rl as adapter
    from fused_losses.adapters.comparisons import prime_rl as definitions

    head, hidden, labels = head_and_labels(case)
    labels, temperature = labels.clamp(min=0), torch.ones(labels.shape)
    layer = SimpleNamespace(weight=head.weight, chunk_size=max(case.tokens // 4, 1))

    def run() -> Tensor:
        if way == "theirs":
            logprobs = definitions.head(hidden, head.weight, labels, temperature)["logprobs"]
        else:
            logprobs = adapter.fused_output_linear(layer, hidden, labels, temperature)["logprobs"]
        loss = -logprobs.mean()
        loss.backward()
        return loss.detach()

    return Step(run, without_gradients(head.weight, hidden))


STEPS: dict[str, Callable[[Case, str], Step]] = {
    function.__name__: function for function in (torchtitan, ms_swift, openrlhf, trl, verl, skyrl, megatron, prime_rl)
}
