"""A token's numbers are bitwise the same whatever batch it is in: see docs/contracts.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import DTYPES, MODES
from conftest import instruction_sets, require, using
from torch import Tensor

import fused_losses

IGNORE = -100
PPO_TERMS = {"entropy_coef": 0.1, "kl_coef": 0.2, "kl_weighted_by_ratio": True}
ASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "terms": PPO_TERMS,
    "softcap": {**PPO_TERMS, "softcap": 6.0},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "targets": {"label_smoothing": 0.1},
}
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


class Batch:
    """N tokens with everything per token that the ask takes."""

    def __init__(self, n: int, vocab: int, dtype: torch.dtype, device: torch.device, ask: str):
        generator = torch.Generator().manual_seed(n + vocab)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.ask = ask
        self.tensors = {"logits": (2 * random(n, vocab)).to(dtype), "temperature": 0.5 + random(n).abs()}
        shape = (n, 3) if ask == "targets" else (n,)
        self.tensors["target_tokens"] = torch.randint(vocab, shape, generator=generator)
        self.tensors["weights"] = 0.5 + torch.rand(*shape, generator=generator)
        if "smoothing" not in ask and ask != "targets":
            self.tensors |= {"old_logprobs": random(n) - 5, "advantages": random(n)}
        if ask in ("terms", "softcap"):
            self.tensors["ref_logprobs"] = random(n) - 5
        self.tensors["logits"][::3, 1:2] = -torch.inf
        rows = torch.arange(n)[1::5]  # sure tokens
        at = self.tensors["target_tokens"].view(n, -1)[rows, 0]
        self.tensors["logits"][rows, at] = 25.0
        self.tensors = {name: value.to(device) for name, value in self.tensors.items()}
        self.n = n

    def of(self, tokens: Sequence[int]) -> dict[str, Tensor]:
        return {name: value[list(tokens)] for name, value in self.tensors.items()}


def run(ask: str, given: dict[str, Tensor], backend: str, mode: str) -> dict[str, Tensor]:
    """By name what each token has, tokens first."""
    given = dict(given)
    leaf = given.pop("logits").detach().requires_grad_()
    logits = leaf * 1 if mode == "in place" else leaf
    function = fused_losses.ppo if "advantages" in given else fused_losses.cross_entropy
    options = {"reduction": "sum", **MODES[mode], **ASKS[ask], "return_outputs": True, "backend": backend}
    if mode != "none":
        options["denominator"] = 3.0
    loss, outputs = function(logits, **given, **options)
    loss.sum().backward()
    found = {"gradient": leaf.grad, "logprobs": outputs.logprobs}
    if outputs.entropy is not None:
        found["entropy"] = outputs.entropy
    if mode == "none":
        found["loss"] = loss.detach()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tokens: Sequence[int], what: str) -> None:
    """Bit for bit."""
    for name, value in found.items():
        bits = torch.int16 if value.element_size() == 2 else torch.int32
        same = (value.contiguous().view(bits) == wanted[name][list(tokens)].contiguous().view(bits)).view(
            len(tokens), -1
        )
        assert same.all(), f"{what}: {name} of {int((~same.all(1)).sum())} of {len(tokens)} tokens differs"


def check(ask: str, backend: str, device: torch.device, mode: str, vocab: int, dtype: torch.dtype, n: int) -> None:
    """Alone, in few, in many, at another place, with others masked: as in the batch of all."""
    batch = Batch(n, vocab, dtype, device, ask)
    wanted = run(ask, batch.of(range(n)), backend, mode)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    parts = {"alone": [n // 2], "the last alone": [n - 1], "few": list(range(7)), "moved": shuffled}
    if n > 64:
        parts["many"] = shuffled[:64]
    for what, tokens in parts.items():
        assert_same(run(ask, batch.of(tokens), backend, mode), wanted, tokens, what)
    masked = batch.of(range(n))
    kept = [0, n // 2, n - 1]
    others = torch.ones(n, dtype=torch.bool, device=device)
    others[kept] = False
    masked["target_tokens"][others] = IGNORE
    found = {name: value[kept] for name, value in run(ask, masked, backend, mode).items()}
    assert_same(found, wanted, kept, "others ignored")
    masked = batch.of(range(n))
    masked["weights"][others] = 0.0
    masked["logits"][others] = torch.nan  # not read, but for the logprob
    found = {name: value[kept] for name, value in run(ask, masked, backend, mode).items()}
    assert_same(found, wanted, kept, "others of weight 0")


def tokens_on(backend: str) -> int:
    return 12 if backend == "triton" and not torch.cuda.is_available() else 300  # the interpreter takes its time


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ask", ASKS)
def test_every_way_to_a_gradient(backend, device, ask, mode):
    check(ask, backend, device, mode, 264, torch.float32, tokens_on(backend))


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("ask", ["plain", "softcap"])
def test_dtypes(backend, device, ask, dtype):
    """Whole 16-byte vectors, no whole tiles."""
    check(ask, backend, device, "one pass", 1000, dtype, tokens_on(backend))


@pytest.mark.parametrize("ask", ["plain", "terms"])
@pytest.mark.parametrize("mode", ["one pass", "recompute"])
def test_rows_that_are_swept_twice(backend, device, ask, mode):
    check(ask, backend, device, mode, 20_000, torch.float32, 7 if tokens_on(backend) == 12 else 40)


@pytest.mark.parametrize("vocab", [1004, 20_012])
def test_float32_rows_of_an_odd_number_of_16_byte_vectors(backend, device, vocab):
    check("plain", backend, device, "one pass", vocab, torch.float32, 7 if tokens_on(backend) == 12 else 40)


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize(("vocab", "threads"), [(1, 1), (13, 1), (257, 1), (1001, 2)])
def test_any_row_on_cpu(vocab, threads, instruction_set):
    """Rows on no boundary, too, under every instruction set and any number of threads."""
    require("cpu")
    if instruction_set not in instruction_sets():
        pytest.skip(f"{instruction_set} does not run here")
    with using(instruction_set), threads_of(threads):
        for dtype in DTYPES:
            check("plain", "cpu", torch.device("cpu"), "in place", vocab, dtype, 40)
            check("smoothing", "cpu", torch.device("cpu"), "none", vocab, dtype, 40)
        for ask in ("terms", "softcap", "targets"):
            check(ask, "cpu", torch.device("cpu"), "one pass", vocab, torch.float32, 40)


@pytest.mark.parametrize("name", ["eager", "cpu"])
@pytest.mark.parametrize("ask", ["plain", "terms"])
def test_a_long_row_alone_has_all_threads_to_itself(name, ask):
    """torch shares a sum that is the only one out among its threads, which orders it otherwise."""
    require("cpu")
    with threads_of(2):
        check(ask, name, torch.device("cpu"), "one pass", 80_000, torch.float32, 9)


def test_threads_share_rows_without_a_trace():
    """Large enough for a second thread to help."""
    require("cpu")
    numbers = []
    for threads in (1, 2):
        with threads_of(threads):
            batch = Batch(64, 4001, torch.float32, torch.device("cpu"), "terms")
            numbers.append(run("terms", batch.of(range(64)), "cpu", "none"))
    assert_same(numbers[0], numbers[1], range(64), "1 thread and 2")
