"""The head of a model as a source of logits, a chunk of tokens at a time.

    one pass    per chunk: logits = hidden W^T + b, the loss and its gradient in place, then d(hidden) and dW of it
    two phase   per chunk: logits and their statistics; in backward the logits again, their gradient, the two products

The matrix products are torch's, 2 N V H operations each: three in one pass, four in two phases, and in both one less
where weight is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .backends import Backend, resolve
from .backends.eager import BACKEND as EAGER
from .backends.eager import active_rows, rows_to_read
from .problem import (
    BackendName,
    Coefficients,
    Problem,
    Selection,
    Stats,
    Targets,
    Transform,
    logprobs_shape,
    stats_shape,
)
from .stages import Forward, Ways
from .vocab_shard import Layout

LINE = 128  # bytes; rows of logits start on it, whatever V: products are slow on rows that do not
_WHOLE = 128  # tokens; a chunk is a multiple of it where it can be: products are made of such tiles
_TILE = 1 << 13  # classes whose numbers are at hand in another dtype at a time, where products can't change theirs


class Head(NamedTuple):
    """A :class:`stages.Source`; ``inputs`` are (hidden, weight) or (hidden, weight, bias)."""

    backend: BackendName
    validate: bool
    rows: int  # tokens in a chunk, at most
    products: torch.dtype  # of the matrix products
    logits_dtype: torch.dtype
    sum_dtype: torch.dtype  # of dW, while chunks are added up
    weight_grad: Tensor | None
    skip_masked: bool
    partial: bool
    layout: Layout | None
    needs: tuple[bool, ...]  # which inputs get a gradient

    def ways(self) -> Ways:
        return Ways(one_pass=self.weight_grad is None, row_by_row=self.needs[0] and not any(self.needs[1:]))

    def loss_and_grad(
        self, inputs: tuple[Tensor, ...], problem: Problem
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        backend = self._ready(inputs, problem)
        if problem.denominator is None:
            problem = problem._replace(denominator=EAGER.normaliser(problem).float())
        loss = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        table = _zeros(logprobs_shape(problem.n, problem.targets.num, problem.plain), inputs[0])
        with self._without_autocast(inputs):
            chunks = self._chunks(problem)
            products = Products(self, inputs, len(chunks), active_rows(problem))
            for tokens in chunks:
                logits = products.logits(tokens)
                part, logprobs = backend.loss_and_grad(logits, problem.rows(tokens), logits)
                loss += part
                table[..., tokens] = logprobs
                products.send(tokens, logits)
            return loss.float(), table, products.gradients()

    def forward(self, inputs: tuple[Tensor, ...], problem: Problem, reduce: bool) -> Forward:
        backend = self._ready(inputs, problem)
        statistics = problem.terms.statistics
        shape = stats_shape(problem.n, problem.targets.num, problem.plain, statistics)
        stats = Stats(_zeros(shape, inputs[0]), statistics)
        with self._without_autocast(inputs):
            chunks = self._chunks(problem)
            products = Products(self, inputs, len(chunks))
            for tokens in chunks:
                stats.table[:, tokens] = backend.stats(products.logits(tokens), problem.rows(tokens)).table
        return Forward(*backend.objective(stats, problem, reduce), stats)

    def losses_and_grad(self, inputs: tuple[Tensor, ...], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Of a frozen head: (a loss per token, logprobs, the gradient of ``hidden`` for upstream gradients of 1)."""
        backend = self._ready(inputs, problem)
        losses = _zeros((problem.n,), inputs[0])
        table = _zeros(logprobs_shape(problem.n, problem.targets.num, problem.plain), inputs[0])
        with self._without_autocast(inputs):
            chunks = self._chunks(problem)
            products = Products(self, inputs, len(chunks))
            for tokens in chunks:
                logits, part = products.logits(tokens), problem.rows(tokens)
                stats = backend.stats(logits, part)
                losses[tokens], table[..., tokens], coefficients = backend.objective(stats, part, False)
                backend.grad(logits, part.targets, part.transform, stats, coefficients, 1.0, logits)
                products.send(tokens, logits)
            gradient = products.gradients()[0]
        assert gradient is not None
        return losses, table, gradient

    def grad(
        self,
        inputs: tuple[Tensor, ...],
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Tensor,
    ) -> tuple[Tensor | None, ...]:
        backend = self._backend(inputs)
        flows = (coefficients.table != 0).any(0) & (upstream != 0)
        with self._without_autocast(inputs):
            chunks = self.spans(flows)
            products = Products(self, inputs, len(chunks), flows)
            for tokens in chunks:
                logits = products.logits(tokens)
                backend.grad(
                    logits,
                    targets.rows(tokens),
                    transform.rows(tokens),
                    Stats(stats.table[:, tokens].contiguous()),
                    Coefficients(coefficients.table[:, tokens].contiguous()),
                    upstream[tokens],
                    logits,
                )
                products.send(tokens, logits)
            return products.gradients()

    def each_chunk(self, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The logits of all tokens, some at a time, each in the memory of the last."""
        chunks = self.spans(torch.ones(inputs[0].shape[:-1].numel(), dtype=torch.bool))
        with self._without_autocast(inputs):
            products = Products(self, inputs, len(chunks))
            yield from map(products.logits, chunks)

    def scale(self, gradients: tuple[Tensor | None, ...], upstream: Tensor) -> None:
        for gradient in gradients:
            if gradient is not None:
                resolve(self.backend, gradient.device).scale(gradient, upstream)

    def _backend(self, inputs: tuple[Tensor, ...]) -> Backend:
        backend = resolve(self.backend, inputs[0].device)
        return backend if self.layout is None else self.layout.over(backend)

    def _ready(self, inputs: tuple[Tensor, ...], problem: Problem) -> Backend:
        """The backend. Values are looked at for all tokens before the first chunk."""
        backend = self._backend(inputs)
        checks.values(problem, self.validate, look_at_targets=self.validate or inputs[0].is_cpu)
        return backend

    def _without_autocast(self, inputs: tuple[Tensor, ...]) -> AbstractContextManager[None]:
        return torch.autocast(inputs[0].device.type, enabled=False)

    def _chunks(self, problem: Problem) -> list[Selection]:
        return self.spans(rows_to_read(problem))

    def spans(self, wanted: Tensor) -> list[Selection]:
        """The tokens in chunks of about one size; with ``skip_masked`` those that are wanted, which are few enough to
        wait for."""
        indices = wanted.nonzero()[:, 0] if self.skip_masked else None
        n = wanted.shape[0] if indices is None else indices.shape[0]
        count = -(-n // self.rows)
        size = -(-n // count) if count else 0
        rounded = -(-size // _WHOLE) * _WHOLE
        size = rounded if rounded <= self.rows else size
        spans = [slice(first, min(first + size, n)) for first in range(0, n, size or 1)]
        return [span if indices is None else indices[span] for span in spans]


def _zeros(shape: tuple[int, ...], beside: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=beside.device)


class Products:
    """The matrix products of a call: logits of a chunk of tokens, and from their gradient those of the inputs."""

    def __init__(self, head: Head, inputs: tuple[Tensor, ...], chunks: int, flows: Tensor | None = None):
        """flows: (N,) bool, which tokens send a gradient, for that of weight."""
        hidden, weight, *bias = (tensor.detach() for tensor in inputs)
        self.head = head
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.weight = weight.to(head.products)
        self.bias = bias[0].to(head.products) if bias else None
        self.dtypes = [tensor.dtype for tensor in inputs]
        self.shape = hidden.shape
        # on a CPU it is no synchronisation to see that all of them do
        self.flows = None if flows is None or (flows.is_cpu and bool(flows.all())) else flows
        # one chunk is no sum: its product is rounded once, to what products can give
        self.sum_dtype = weight.dtype if chunks <= 1 and weight.dtype is head.products else head.sum_dtype
        self.buffer: Tensor | None = None
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        self.reductions: list[dist.Work] = []

    def logits(self, tokens: Selection) -> Tensor:
        """In a buffer that the next chunk takes over."""
        hidden = self._hidden(tokens)
        out = self._buffer(hidden.shape[0])
        if out.dtype is hidden.dtype:
            if self.bias is None:
                return torch.mm(hidden, self.weight.t(), out=out)
            return torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if out.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for part in _tiles(self.weight.shape[0]):
                out[:, part] = hidden @ self.weight[part].to(out.dtype).t()
        return out if self.bias is None else out.add_(self.bias)

    def send(self, tokens: Selection, gradient: Tensor) -> None:
        """gradient: of the chunk's logits."""
        gradient = gradient.to(self.head.products)
        wants_hidden, wants_weight, *wants_bias = self.head.needs
        if wants_hidden:
            self._send_to_hidden(tokens, gradient)
        if wants_weight:
            self._send_to_weight(gradient, self._hidden_that_flows(tokens))
        if any(wants_bias):
            part = gradient.sum(0, dtype=torch.float32)
            self.d_bias = part if self.d_bias is None else self.d_bias.add_(part)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the inputs; 0 where no token was sent."""
        for reduction in self.reductions:
            reduction.wait()
        wants_hidden, wants_weight, *wants_bias = self.head.needs
        if wants_hidden and self.d_hidden is None:
            self.d_hidden = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        if wants_weight and self.d_weight is None and self.head.weight_grad is None:
            self.d_weight = torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        if any(wants_bias) and self.d_bias is None:
            self.d_bias = torch.zeros_like(self.weight[:, 0])
        d_hidden = None if self.d_hidden is None else self.d_hidden.view(self.shape)
        given = (d_hidden, self.d_weight, self.d_bias)[: len(self.dtypes)]
        return tuple(g if g is None else g.to(dtype) for g, dtype in zip(given, self.dtypes, strict=True))

    def _hidden(self, tokens: Selection) -> Tensor:
        return self.hidden[tokens].to(self.head.products)

    def _hidden_that_flows(self, tokens: Selection) -> Tensor:
        """0 for a token whose gradient is: dW is a sum over tokens, and 0 * NaN is NaN."""
        hidden = self._hidden(tokens)
        return hidden if self.flows is None else hidden.masked_fill(~self.flows[tokens, None], 0.0)

    def _buffer(self, rows: int) -> Tensor:
        vocab = self.weight.shape[0]
        if self.buffer is None:
            line = LINE // self.head.logits_dtype.itemsize
            width = -(-vocab // line) * line
            self.buffer = torch.empty(rows, width, dtype=self.head.logits_dtype, device=self.weight.device)
        return self.buffer[:rows, :vocab]

    def _send_to_hidden(self, tokens: Selection, gradient: Tensor) -> None:
        if self.d_hidden is None:
            make = torch.zeros_like if self.head.skip_masked else torch.empty_like
            self.d_hidden = make(self.hidden, memory_format=torch.contiguous_format)
        layout = self.head.layout
        reduces = layout is not None and not self.head.partial
        if isinstance(tokens, slice) and self.d_hidden.dtype is gradient.dtype:
            part = torch.mm(gradient, self.weight, out=self.d_hidden[tokens])
            if layout is not None and reduces:  # while the next product runs
                self.reductions.append(dist.all_reduce(part, group=layout.group, async_op=True))
            return
        part = gradient @ self.weight
        if layout is not None and reduces:
            dist.all_reduce(part, group=layout.group)
        self.d_hidden[tokens] = part.to(self.d_hidden.dtype)

    def _send_to_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        into = self.d_weight if self.head.weight_grad is None else self.head.weight_grad
        first = into is None
        if into is None:
            into = self.d_weight = torch.empty(self.weight.shape, dtype=self.sum_dtype, device=self.weight.device)
        by_class = gradient.t()
        if into.dtype is hidden.dtype:
            torch.mm(by_class, hidden, out=into) if first else into.addmm_(by_class, hidden)
        elif into.is_cuda:
            if first:
                torch.mm(by_class, hidden, out_dtype=into.dtype, out=into)
            else:
                torch.addmm(into, by_class, hidden, out_dtype=into.dtype, out=into)
        else:
            for part in _tiles(into.shape[0]):
                product = by_class[part] @ hidden
                into[part].copy_(product) if first else into[part].add_(product)


def _tiles(size: int) -> Iterator[slice]:
    for first in range(0, size, _TILE):
        yield slice(first, min(first + _TILE, size))
