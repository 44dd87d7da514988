"""TRL's functions, and its trainers on tiny models: stock, and with the adapter installed."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from .. import trl as adapter
from ..comparison import Comparison

# they are typed in part, which is none
transformers: Any = importlib.import_module("transformers")
utils: Any = importlib.import_module("trl.trainer.utils")

Numbers = dict[str, Tensor | float]

N, H, V = 256, 64, 32003
WORDS = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p")
PACKAGES = {"CPO": "trl.experimental.cpo", "TPO": "trl.experimental.tpo"}  # of trainers that are not in trl itself

HEAD = "_ChunkedLogProbFunction"


def comparisons() -> Iterator[Comparison]:
    mean = "the mean of 32,003 logits is a hundredth of one of them, and rounded as they are"
    halves = "logits and their gradient are rounded to bfloat16, by products of another shape"
    yield compared(HEAD, "float32, all outputs", lambda: head(bias=True), 1e-4, mean)
    yield compared(HEAD, "softcap, scale, temperature", lambda: head(5.0, 0.25, 0.7), 1e-4, mean)
    yield compared(HEAD, "frozen, log_probs alone", lambda: head(frozen=True, outputs=("log_probs",)))
    yield compared(HEAD, "bfloat16", lambda: head(dtype=torch.bfloat16), 2e-2, halves)
    yield compared(HEAD, "bfloat16 autocast", lambda: head(autocast=True), 2e-2, halves)
    once = "dW is rounded to the weight's bfloat16"
    yield compared(HEAD, "bfloat16 weight, float32 hidden", lambda: head(weight_dtype=torch.bfloat16), 4e-3, once)

    function = "selective_log_softmax"
    yield compared(function, "index (B, T)", lambda: selected((8, 32), temperature=0.7))
    yield compared(function, "index (B, T, K), row_mask", lambda: selected((8, 32, 4), masked=True))
    function = "selective_log_softmax_and_entropy"
    yield compared(function, "row_mask", lambda: selected((8, 32), masked=True, entropy=True))

    yield compared("SFTTrainer", "nll", lambda: sft())
    yield compared("SFTTrainer", "dft, checkpointing", lambda: sft(loss_type="dft", gradient_checkpointing=True))
    yield compared("SFTTrainer", "nll, Gemma 2: softcap", lambda: sft(model("gemma2")))
    yield compared("SFTTrainer", "nll, Cohere: logit scale", lambda: sft(model("cohere")))
    yield compared("SFTTrainer", "nll, bf16=True", lambda: sft(bf16=True), 2e-2, halves)
    yield compared("DPOTrainer", "sigmoid", lambda: dpo())
    yield compared("DPOTrainer", "ipo, use_weighting", lambda: dpo(loss_type=["ipo"], use_weighting=True))
    yield compared("KTOTrainer", "kto", lambda: kto())
    near = "the KL divergence is a difference of nearly equal logprobs, and has their rounding"
    yield compared("GRPOTrainer", "dapo, beta, entropy_coef", lambda: grpo(beta=0.04, entropy_coef=0.01), 1e-4, near)
    yield compared("GRPOTrainer", "cispo, num_iterations=2", lambda: grpo(loss_type="cispo", num_iterations=2))
    yield compared("GRPOTrainer", "cast_lm_head_to_fp32", lambda: grpo(cast_lm_head_to_fp32=True))
    yield compared("RLOOTrainer", "beta", lambda: rloo(beta=0.04), 1e-4, near)
    yield compared("experimental.cpo.CPOTrainer", "sigmoid", lambda: cpo())
    yield compared("experimental.tpo.TPOTrainer", "sigmoid", lambda: tpo())


def compared(slot: str, case: str, stock: Callable[[], Numbers], tolerance: float = 1e-5, why: str = "") -> Comparison:
    """stock: looks its functions up where TRL does, at every call."""

    def installed() -> Numbers:
        adapter.install()
        try:
            return stock()
        finally:
            adapter.remove()

    return Comparison(slot, case, stock, installed, tolerance, why)


# ---- Functions ----


def head(
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    outputs: tuple[str, ...] = tuple(adapter.OUTPUTS),
    frozen: bool = False,
    autocast: bool = False,
) -> Numbers:
    """What comes out, and the gradients of all of it; a quarter of the tokens gets none, as masked ones do."""
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=made).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=made).mul(0.4).to(weight_dtype or dtype).requires_grad_(not frozen)
    offsets = torch.randn(V, generator=made).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(V, (N,), generator=made)
    upstream = torch.randn(2, N, generator=made) * (torch.arange(N) % 4 != 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given = utils._ChunkedLogProbFunction.apply(
            hidden, weight, offsets, targets, temperature, 8192, softcap, scale, outputs
        )
    loss = sum((g * u).sum() for g, u in zip(given[:2], upstream, strict=True) if g is not None)
    assert isinstance(loss, Tensor)
    loss.backward()
    numbers = dict(zip(adapter.OUTPUTS, given, strict=True))
    gradients = {"d hidden": hidden.grad, "d weight": weight.grad, "d bias": None if offsets is None else offsets.grad}
    return {name: number for name, number in (numbers | gradients).items() if number is not None}


def selected(shape: tuple[int, ...], temperature: float = 1.0, masked: bool = False, entropy: bool = False) -> Numbers:
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape[:2], V, generator=made).mul(3).requires_grad_()
    index = torch.randint(V, shape, generator=made)
    upstream = torch.randn(2, *shape, generator=made)
    row_mask = torch.rand(shape, generator=made) > 0.3 if masked else None
    given: tuple[Tensor, ...]
    if entropy:
        given = utils.selective_log_softmax_and_entropy(logits, index, temperature=temperature, row_mask=row_mask)
    else:
        given = (utils.selective_log_softmax(logits, index, temperature, row_mask),)
    loss = sum((g * u).sum() for g, u in zip(given, upstream, strict=False))
    assert isinstance(loss, Tensor) and logits.grad is None
    loss.backward()
    assert logits.grad is not None
    return {"d logits": logits.grad, **dict(zip(("logprobs", "entropy"), given, strict=False))}


# ---- Trainers ----


def tokenizer() -> Any:
    """A token per word."""
    words = ("<pad>", "<eos>", "<unk>", *WORDS)
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(kind: str = "llama", seed: int = 0) -> Any:
    """Of random weights, large enough for its entropies to differ."""
    shape: dict[str, Any] = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    config = {
        "llama": lambda: transformers.LlamaConfig(**shape),
        "gemma2": lambda: transformers.Gemma2Config(**shape, head_dim=16, final_logit_softcapping=2.0),
        "cohere": lambda: transformers.CohereConfig(**shape, logit_scale=0.5),
    }[kind]()
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config)


def rows(**columns: Callable[[str], Any]) -> Dataset:
    """Eight prompts of five to twelve words, and what columns make of them."""
    texts = [" ".join(WORDS[(i * k + 3 * k) % 16] for k in range(1, 6 + i)) for i in range(8)]
    return Dataset.from_list(
        [{"prompt": text} | {name: make(text) for name, make in columns.items()} for text in texts]
    )


def backwards(prompt: str) -> str:
    return " " + " ".join(reversed(prompt.split()))


def in_order(prompt: str) -> str:
    return " " + " ".join(sorted(prompt.split()))


def reward(completions: list[str], **_: object) -> list[float]:
    return [
        sum(3.0 * at + WORDS.index(word) for at, word in enumerate(text.split()) if word in WORDS)
        for text in completions
    ]


def sft(made: Any = None, **options: Any) -> Numbers:
    return trained("SFT", rows(completion=backwards), made=made, max_length=32, **options)


def dpo(**options: Any) -> Numbers:
    pairs = rows(chosen=backwards, rejected=in_order)
    return trained("DPO", pairs, {"ref_model": model(seed=1)}, max_length=32, **options)


def kto() -> Numbers:
    labelled = rows(completion=backwards, label=lambda prompt: prompt.count("a") % 2 == 0)
    return trained("KTO", labelled, {"ref_model": model(seed=1)}, max_length=32)


def grpo(**options: Any) -> Numbers:
    return sampled("GRPO", **options)


def rloo(**options: Any) -> Numbers:
    return sampled("RLOO", **options)


def sampled(name: str, **options: Any) -> Numbers:
    return trained(name, rows(), {"reward_funcs": reward}, num_generations=4, max_completion_length=6, **options)


def cpo() -> Numbers:
    return trained("CPO", rows(chosen=backwards, rejected=in_order), max_length=32)


def tpo() -> Numbers:
    triples = rows(chosen=backwards, rejected=in_order, reference=lambda prompt: f" {prompt}")
    return trained("TPO", triples, max_length=32)


def trained(
    name: str,
    data: Dataset,
    arguments: dict[str, Any] | None = None,
    made: Any = None,
    **options: Any,
) -> Numbers:
    """What the trainer of that name logs of two steps, and the parameters after them."""
    package = importlib.import_module(PACKAGES.get(name, "trl"))
    trainer, config = getattr(package, f"{name}Trainer"), getattr(package, f"{name}Config")
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (made or model()).save_pretrained(folder)  # where a trainer looks for a reference model
        trainee = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        settings = {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "optim": "sgd",  # linear in the gradient, so that a rounding remains one
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        running = trainer(
            model=trainee,
            args=config(output_dir=folder, **(settings | options)),
            train_dataset=data,
            processing_class=tokenizer(),
            **(arguments or {}),
        )
        running.remove_callback(transformers.PrinterCallback)
        running.train()
    logged: Numbers = {
        f"{key} of step {at + 1}": float(value)
        for at, row in enumerate(running.state.log_history)
        for key, value in row.items()
        if not any(clock in key for clock in ("time", "per_second"))
    }
    return logged | {key: parameter.detach() for key, parameter in trainee.named_parameters()}
