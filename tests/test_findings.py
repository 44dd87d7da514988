"""What a hostile tester found, and its like: tensors that are not what they seem, numbers beyond float32, autograd's
other modes, torch's defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import Objective, checks
from fused_losses.backends.rows import overlap

N, VOCAB = 4, 16
TWO_PHASE = {
    "recompute": lambda x, c, **k: fused_losses.ppo(x, *c, recompute=True, **k),
    "none": lambda x, c, **k: fused_losses.ppo(x, *c, reduction="none", **k).sum(),
    "logprobs": lambda x, c, **k: fused_losses.logprobs(x, c[0], **k).sum(),
    "entropy": lambda x, c, **k: sum(t.sum() for t in fused_losses.logprobs(x, c[0], return_entropy=True, **k)),
    "statistics": lambda x, c, **k: sum(t.sum() for t in fused_losses.statistics(x, c[0], **k)),
    "gspo": lambda x, c, **k: fused_losses.gspo(x, *c, **k),
    "gmpo": lambda x, c, **k: fused_losses.gmpo(x, *c, **k),
    "policy_loss": lambda x, c, **k: fused_losses.policy_loss(x, c[0], lambda logp, a: -logp * a, c[2], **k),
}


class Call:
    """Arguments of a loss by name, any of which a test puts another tensor for."""

    def __init__(self, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(N, VOCAB, generator=generator).to(device)
        self.target_tokens = torch.randint(VOCAB, (N,), generator=generator).to(device)
        x = torch.log_softmax(self.logits, -1).gather(-1, self.target_tokens[:, None])[:, 0]
        self.columns: dict[str, Tensor] = {
            "old_logprobs": x + 0.1,
            "advantages": torch.tensor([1.0, -1.0, 0.5, -2.0], device=device),
            "weights": torch.tensor([1.0, 2.0, 0.5, 1.0], device=device),
            "temperature": torch.tensor([0.5, 1.0, 2.0, 1.5], device=device),
            "denominator": torch.tensor(3.0, device=device),
            "clip_low_threshold": torch.full((N,), 0.5, device=device),
            "clip_high_threshold": torch.full((N,), 1.5, device=device),
            "delta": torch.full((N,), 1.4, device=device),
            "log_ratio_clamp": torch.full((N,), 3.0, device=device),
            "importance_weights": torch.tensor([1.0, 0.5, 0.7, 1.0], device=device),
            "ref_logprobs": x - 0.2,
            "kl_coef": torch.full((N,), 0.1, device=device),
            "entropy_coef": torch.full((N,), 0.05, device=device),
        }

    @property
    def ppo(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.target_tokens, self.columns["old_logprobs"], self.columns["advantages"]

    def run(self, backend: str, upstream: Tensor | None = None, **replaced: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, gradient)"""
        given = {"logits": self.logits, "target_tokens": self.target_tokens, **self.columns, **replaced}
        logits = given.pop("logits")
        logits = logits if logits.requires_grad else logits.detach().requires_grad_()
        loss = fused_losses.ppo(logits, given.pop("target_tokens"), **given, backend=backend)
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
        return loss.detach(), gradient


COLUMNS = tuple(Call().columns)


def negated_lazily(x: Tensor) -> Tensor:
    """x, as the negative of what lies in its memory"""
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, x)
    return lazy


# ---- A1: what a tensor's pointer says ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logits", *COLUMNS])
def test_lazy_sign(backend, device, name):
    call = Call(device)
    value = call.logits if name == "logits" else call.columns[name]
    for got, wanted in zip(call.run(backend, **{name: negated_lazily(value)}), call.run(backend), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"inplace": True}], ids=str)
def test_lazy_sign_of_the_upstream_gradient(backend, device, options):
    call = Call(device)
    gradients = []
    for upstream in (torch.tensor(-2.0, device=device), negated_lazily(torch.tensor(-2.0, device=device))):
        leaf = call.logits.clone().requires_grad_()
        fused_losses.ppo(leaf * 1, *call.ppo, backend=backend, **options).backward(upstream)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["none", "logprobs", "entropy"])
def test_lazy_sign_of_an_upstream_gradient_per_token(backend, device, name):
    call = Call(device)
    gradients = []
    for lazily in (False, True):
        leaf = call.logits.clone().requires_grad_()
        if name == "none":
            outputs = (fused_losses.ppo(leaf, *call.ppo, reduction="none", backend=backend),)
        elif name == "logprobs":
            outputs = (fused_losses.logprobs(leaf, call.target_tokens, backend=backend),)
        else:
            outputs = fused_losses.logprobs(leaf, call.target_tokens, return_entropy=True, backend=backend)
        upstream = torch.arange(1.0, N + 1, device=device)
        torch.autograd.backward(outputs, [negated_lazily(upstream) if lazily else upstream] * len(outputs))
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", COLUMNS)
def test_zero_tensor(backend, device, name):
    """A zero that takes no memory is as good as one that does."""
    call = Call(device)
    zeros = torch.zeros_like(call.columns[name])
    lazy = torch._efficientzerotensor(zeros.shape, device=device)
    for got, wanted in zip(call.run(backend, **{name: lazy}), call.run(backend, **{name: zeros}), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"inplace": True}], ids=str)
def test_zero_tensor_as_upstream_gradient(backend, device, options):
    call = Call(device)
    leaf = call.logits.clone().requires_grad_()
    loss = fused_losses.ppo(leaf * 1, *call.ppo, backend=backend, **options)
    loss.backward(torch._efficientzerotensor((), device=device))
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("name", ["logits", "target_tokens", *sorted(set(COLUMNS) - {"denominator"})])
def test_other_layouts_are_refused_by_name(backend, device, name):
    call = Call(device)
    value = getattr(call, name, None)
    value = call.columns[name] if value is None else value
    with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got one of layout torch.sparse_coo"):
        call.run(backend, **{name: value.to_sparse()})
    if value.is_floating_point() and value.device.type == "cpu":
        with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got one of layout torch._mkldnn"):
            call.run(backend, **{name: value.to_mkldnn()})


NESTED = pytest.mark.parametrize("layout", [torch.jagged, torch.strided])


def nested(*sizes, layout):
    return torch.nested.nested_tensor([torch.randn(size) for size in sizes], layout=layout)


@NESTED
def test_nested_logits_are_refused(layout):
    logits = nested((2, 8), (3, 8), layout=layout)
    with pytest.raises(TypeError, match=r"^logits must be a dense tensor, got a nested one"):
        fused_losses.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))


@NESTED
@pytest.mark.parametrize("name", ["target_tokens", "old_logprobs", "weights"])
def test_nested_columns_are_refused(name, layout):
    given = {"target_tokens": torch.zeros(5, dtype=torch.int64), "old_logprobs": torch.zeros(5), "weights": 1.0}
    given[name] = nested((2,), (3,), layout=layout)
    with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got a nested one"):
        fused_losses.ppo(torch.randn(5, 8), advantages=1.0, **given)


def _other_layouts(tensor):
    return tensor.to_sparse(), torch.nested.nested_tensor([tensor]), tensor.to_mkldnn()


@pytest.mark.parametrize("name", ["logprobs", "entropy", "old_logprobs", "sequence_ratio_mask"])
def test_other_layouts_of_losses_on_logprobs_are_refused_by_name(name):
    given = {"logprobs": -torch.rand(2, 3), "old_logprobs": -torch.rand(2, 3), "advantages": 1.0, "entropy_coef": 0.1}
    given |= {"entropy": torch.rand(2, 3), "sequence_ratio_mask": torch.ones(2, 3)}
    fused_losses.on_logprobs.gspo(**given)
    for other in _other_layouts(given[name]):
        with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got"):
            fused_losses.on_logprobs.gspo(**{**given, name: other})


@pytest.mark.parametrize("name", ["logprobs", "sampler_logprobs", "mask"])
def test_other_layouts_of_importance_weights_are_refused_by_name(name):
    given = {"logprobs": -torch.rand(2, 3), "sampler_logprobs": -torch.rand(2, 3), "mask": torch.ones(2, 3), "cap": 2.0}
    fused_losses.truncated_importance_weights(**given)
    for other in _other_layouts(given[name]):
        with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got"):
            fused_losses.truncated_importance_weights(**{**given, name: other})


@pytest.mark.parametrize("loss", ["gspo", "gmpo", "vespo", "sapo"])
def test_what_are_no_sequences_is_said_of_the_argument(loss):
    options = {"ratio_level": "sequence"} if loss == "sapo" else {}
    tokens, targets = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    for module, given, name in (
        (fused_losses.on_logprobs, (tokens,), "logprobs"),
        (fused_losses, (torch.randn(6, 8), targets), "target_tokens"),
    ):
        function = getattr(module, loss)
        with pytest.raises(ValueError, match=rf"^{name} must have shape \(..., T\) .*, got a 0-d tensor"):
            function(*(each[0] for each in given), 0.0, 1.0, **options)
        for ends, got in (([0, 5], "5"), ([0], "no sequence")):
            with pytest.raises(
                ValueError, match=f"^cu_seqlens must end at the number of tokens of {name}, 6, got {got}"
            ):
                function(*given, 0.0, 1.0, cu_seqlens=torch.tensor(ends), **options)


@pytest.fixture
def mesh() -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs torch.distributed with no group yet")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts them, as FlopCounterMode counts operations."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def test_a_sharded_head_gathers_while_somebody_watches(mesh):
    """Operators take no group: through them a rank would take its own classes for all."""
    call = Call()
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(VOCAB, 8)
    head = fused_losses.LinearHead(hidden, weight, group=mesh.get_group(), vocab_size=VOCAB)
    fused_losses.cross_entropy(head, call.target_tokens)  # ranks have compared what they say
    with Collectives() as collectives:
        fused_losses.cross_entropy(head, call.target_tokens).backward()
    assert collectives.seen == 1  # of the gradient of hidden; a rank alone has all statistics


def test_weight_grad_is_added_to_while_somebody_watches():
    call = Call()
    hidden, weight = torch.randn(N, 8), torch.randn(VOCAB, 8, requires_grad=True)
    buffers = torch.zeros(2, VOCAB, 8)
    for buffer, mode in zip(buffers, (nullcontext(), Collectives()), strict=True):
        with mode:
            head = fused_losses.LinearHead(hidden, weight, weight_grad=buffer)
            fused_losses.cross_entropy(head, call.target_tokens).backward()
    assert buffers[0].any() and buffers[1].equal(buffers[0])


def test_dtensors_are_refused_by_name(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    for backend in ("cpu", "eager"):
        require(backend)
        call = Call()
        for name in ("logits", "target_tokens", *COLUMNS):
            value = getattr(call, name, None)
            value = distribute_tensor(call.columns[name] if value is None else value, mesh, [Replicate()])
            with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor, got a DTensor.*{name}.to_local"):
                call.run(backend, **{name: value})


def test_a_collective_in_flight_is_waited_for(mesh):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

    for backend in ("cpu", "eager"):
        require(backend)
        call = Call()
        wanted = call.run(backend)
        for name in ("target_tokens", *COLUMNS):
            value = getattr(call, name, None)
            value = all_reduce(call.columns[name] if value is None else value, "sum", mesh)
            assert isinstance(value, AsyncCollectiveTensor)
            assert all(map(torch.equal, call.run(backend, **{name: value}), wanted)), name
        logits = all_reduce(call.logits, "sum", mesh)
        loss = fused_losses.ppo(logits, call.target_tokens, **call.columns, backend=backend)
        assert torch.equal(torch.as_tensor(loss), wanted[0])


@pytest.mark.parametrize("name", ["target_tokens", *COLUMNS])
def test_fake_tensors_beside_real_logits_are_refused_by_name(backend, device, name):
    from torch._subclasses import FakeTensorMode

    call = Call(device)
    value = getattr(call, name, None)
    fake = FakeTensorMode().from_tensor(call.columns[name] if value is None else value)
    with pytest.raises(TypeError, match=f"^{name} must be a Tensor as logits are, got FakeTensor"):
        call.run(backend, **{name: fake})


def test_fake_tensors_run_where_all_are_fake(backend, device):
    from torch._subclasses import FakeTensorMode

    call = Call(device)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(value) for name, value in call.columns.items()}
        logits = mode.from_tensor(call.logits).requires_grad_()
        loss = fused_losses.ppo(logits, mode.from_tensor(call.target_tokens), **fakes, backend=backend)
        loss.backward()
    assert loss.shape == () and loss.dtype is torch.float32 and logits.grad.shape == logits.shape


def test_a_subclass_with_memory_of_its_own_is_its_memory(backend, device):
    class Named(Tensor):
        """As torchvision's are: a class for __torch_function__, the memory of a tensor"""

    call = Call(device)
    wanted = call.run(backend)
    for name in ("logits", "target_tokens", *COLUMNS):
        value = getattr(call, name, None)
        value = (call.columns[name] if value is None else value).as_subclass(Named)
        for got, truth in zip(call.run(backend, **{name: value}), wanted, strict=True):
            assert torch.equal(got.as_subclass(Tensor), truth), name


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(backend, device, mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    call = Call(device)

    def gradient(logits: Tensor, target_tokens: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        loss = fused_losses.ppo(logits, target_tokens, old_logprobs, advantages, backend=backend)
        return torch.autograd.grad(loss, logits)[0]

    logits = call.logits.clone().requires_grad_()
    graph = make_fx(gradient, tracing_mode=mode)(logits, *call.ppo)
    assert any("fused_losses" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(logits, *call.ppo), gradient(logits, *call.ppo), rtol=0, atol=0)


# ---- A2, A3: in place ----------------------------------------------------------------------------------------------


@torch.no_grad()
def overwrite(y: Tensor, how: str) -> None:
    if how == "all":
        y.mul_(2)
    elif how == "detached":
        y.detach().zero_()
    else:
        y[0].fill_(1.0)


@pytest.mark.parametrize("how", ["all", "detached", "a row", "a second loss"])
def test_a_gradient_overwritten_before_backward_is_noticed(backend, device, how):
    call = Call(device)
    y = call.logits.clone().requires_grad_() * 1

    def loss_of(logits: Tensor) -> Tensor:
        return fused_losses.ppo(logits, *call.ppo, inplace=True, backend=backend)

    loss = loss_of(y)
    assert not torch.equal(y, call.logits)  # it is the gradient now
    if how == "a second loss":
        loss_of(y)
    else:
        overwrite(y, how)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_reading_the_gradient_in_place_is_fine(backend, device):
    call = Call(device)
    leaf = call.logits.clone().requires_grad_()
    y = leaf * 1
    loss = fused_losses.ppo(y, *call.ppo, inplace=True, backend=backend)
    y.detach().abs().sum()
    loss.backward()
    plain = call.logits.clone().requires_grad_()
    fused_losses.ppo(plain, *call.ppo, backend=backend).backward()
    assert torch.equal(leaf.grad, plain.grad)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:],
    "view of a view": lambda x: x.view(2, 2, VOCAB).view(N, VOCAB),
    "itself": lambda x: x,
}


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("view", VIEWS)
def test_in_place_on_a_leaf_is_refused_under_compile(view, where):
    torch._dynamo.reset()
    call, of_leaf = Call(), VIEWS[view]
    leaf = call.logits.clone().requires_grad_()

    def inside(x: Tensor) -> Tensor:
        return fused_losses.cross_entropy(of_leaf(x), call.target_tokens, inplace=True, backend="eager")

    def outside(x: Tensor) -> Tensor:
        return fused_losses.cross_entropy(x, call.target_tokens, inplace=True, backend="eager")

    function, given = (inside, leaf) if where == "inside" else (outside, of_leaf(leaf))
    with pytest.raises(Exception, match="inplace=True would overwrite logits, a leaf"):  # dynamo wraps it
        torch.compile(function, backend="aot_eager", fullgraph=True)(given)
    assert torch.equal(leaf, call.logits)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("view", VIEWS)
def test_in_place_on_other_views_under_compile(view, where):
    torch._dynamo.reset()
    call, of_logits = Call(), VIEWS[view]
    leaf = call.logits.clone().requires_grad_()

    def inside(x: Tensor) -> Tensor:
        return fused_losses.cross_entropy(of_logits(x * 1), call.target_tokens, inplace=True, backend="eager")

    def outside(x: Tensor) -> Tensor:
        return fused_losses.cross_entropy(x, call.target_tokens, inplace=True, backend="eager")

    function, given = (inside, leaf) if where == "inside" else (outside, of_logits(leaf * 1))
    torch.compile(function, backend="aot_eager", fullgraph=True)(given).backward()
    plain = call.logits.clone().requires_grad_()
    fused_losses.cross_entropy(plain, call.target_tokens, backend="eager").backward()
    assert torch.equal(leaf.grad, plain.grad)


# ---- A4, C18: forward mode, jvp, vmap ------------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Any]] = {
    "one pass": lambda x, c, **k: fused_losses.ppo(x, *c, **k),
    "forward only": lambda x, c, **k: fused_losses.ppo(x.detach() if not x.requires_grad else x, *c, **k),
    **TWO_PHASE,
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused(backend, device, name, requires_grad):
    if name == "forward only" and not requires_grad:
        pytest.skip("detach drops the tangent before the loss is called")
    call = Call(device)
    with forward_ad.dual_level():
        logits = call.logits.clone().requires_grad_(requires_grad)
        dual = forward_ad.make_dual(logits, torch.ones_like(call.logits))
        with pytest.raises(NotImplementedError, match="logits carry a forward-mode tangent"):
            LOSSES[name](dual, call.ppo, backend=backend)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "vjp"])
@pytest.mark.parametrize("name", ["one pass", *TWO_PHASE])
def test_function_transforms_are_refused(backend, device, name, transform):
    call, loss = Call(device), LOSSES[name]
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func"):
        if transform == "vmap":
            torch.func.vmap(lambda x: loss(x, call.ppo, backend=backend))(call.logits.expand(2, N, VOCAB))
        elif transform == "grad":
            torch.func.grad(lambda x: loss(x, call.ppo, backend=backend))(call.logits)
        elif transform == "jvp":
            torch.func.jvp(lambda x: loss(x, call.ppo, backend=backend), (call.logits,), (call.logits,))
        else:
            torch.func.vjp(lambda x: loss(x, call.ppo, backend=backend), call.logits)


def test_vmap_over_another_argument_is_refused(backend, device):
    call = Call(device)
    target_tokens, old_logprobs, advantages = call.ppo
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func"):
        torch.func.vmap(
            lambda a: fused_losses.ppo(call.logits, target_tokens, old_logprobs, a, backend=backend),
        )(advantages.expand(2, N))


# ---- A5, B8: objectives of one's own -------------------------------------------------------------------------------


def test_objectives_of_one_name_are_each_themselves(backend, device):
    pytest.importorskip("triton")
    from triton_objectives import DOUBLED, TRIPLED

    call = Call(device)
    for mode in ({}, {"recompute": True}):
        for objective, factor in ((DOUBLED, 2), (TRIPLED, 3), (DOUBLED, 2)):
            ours, theirs = (call.logits.clone().requires_grad_() for _ in range(2))
            loss = fused_losses.policy_loss(ours, call.target_tokens, objective, 0.5, backend=backend, **mode)
            truth = fused_losses.cross_entropy(theirs, call.target_tokens, backend=backend) * (0.5 * factor)
            loss.backward()
            truth.backward()
            torch.testing.assert_close(loss, truth)
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_backward_of_an_objective_after_another_of_its_name(backend, device):
    pytest.importorskip("triton")
    from triton_objectives import DOUBLED, TRIPLED

    call = Call(device)
    logits = [call.logits.clone().requires_grad_() for _ in range(2)]
    for mode in ({}, {"recompute": True}):
        losses = [
            fused_losses.policy_loss(x, call.target_tokens, o, 1.0, backend=backend, **mode)
            for x, o in zip(logits, (DOUBLED, TRIPLED), strict=True)
        ]
        two, three = (torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, logits, strict=True))
        torch.testing.assert_close(three, 1.5 * two)


def test_a_compiled_objective_stays_itself_beside_another_of_its_name():
    pytest.importorskip("triton")
    from triton_objectives import DOUBLED, TRIPLED

    torch._dynamo.reset()
    call = Call()

    def loss_of(logits: Tensor, objective: Objective) -> Tensor:
        return fused_losses.policy_loss(logits, call.target_tokens, objective, 1.0, backend="eager")

    compiled = torch.compile(lambda x: loss_of(x, DOUBLED), backend="aot_eager", fullgraph=True)
    leaf = call.logits.clone().requires_grad_()
    before = compiled(leaf)
    three = loss_of(leaf, TRIPLED)
    torch.testing.assert_close(compiled(leaf), before, rtol=0, atol=0)
    torch.testing.assert_close(three, 1.5 * before)


def halves(logp: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * scale * logp, (-0.5 * scale).expand_as(logp)


@pytest.mark.parametrize(
    "objective", ["ppo", "cispo", Objective("halves", halves, ("scale",))], ids=["ppo", "cispo", "own"]
)
def test_policy_loss_compiles_into_one_graph(backend, device, objective):
    torch._dynamo.reset()
    call = Call(device)
    inputs = call.ppo[1:] if isinstance(objective, str) else (0.7,)

    def loss_of(logits: Tensor) -> Tensor:
        return fused_losses.policy_loss(logits, call.target_tokens, objective, *inputs, backend=backend)

    ours, theirs = (call.logits.clone().requires_grad_() for _ in range(2))
    if backend == "triton" and not isinstance(objective, str):
        pytest.skip("needs a Triton function")
    torch.compile(loss_of, backend="aot_eager", fullgraph=True)(ours).backward()
    loss_of(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# ---- B6, B7: checkpointing, dynamic shapes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one pass", *TWO_PHASE])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(backend, device, name, reentrant):
    call, loss = Call(device), LOSSES[name]
    ours, theirs = (call.logits.clone().requires_grad_() for _ in range(2))
    checkpoint(lambda x: loss(x * 1, call.ppo, backend=backend), ours, use_reentrant=reentrant).backward()
    loss(theirs * 1, call.ppo, backend=backend).backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", TWO_PHASE)
def test_what_is_saved_is_unpacked_once(backend, device, name):
    """save_on_cpu moves the logits at each."""
    call, logits = Call(device), Call(device).logits.clone().requires_grad_()
    unpacked: list[tuple[int, ...]] = []

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = TWO_PHASE[name](logits, call.ppo, backend=backend)
    unpacked.clear()
    loss.backward()
    assert unpacked.count((N, VOCAB)) == 1


@pytest.mark.parametrize("shape", [(N, VOCAB), (2, 3, VOCAB)], ids=str)
def test_in_place_of_a_number_of_tokens_that_changes_under_compile(shape):
    torch._dynamo.reset()

    def loss_of(x: Tensor, target_tokens: Tensor) -> Tensor:
        return fused_losses.cross_entropy((x * 1)[..., :-1, :], target_tokens, inplace=True, backend="eager")

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=True)
    for more in range(3):
        leading = (*shape[:-2], shape[-2] + more)
        x = torch.randn(*leading, VOCAB)
        target_tokens = torch.randint(VOCAB, (*leading[:-1], leading[-1] - 1))
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        compiled(ours, target_tokens).backward()
        loss_of(theirs, target_tokens).backward()
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("tensor", "overlaps"),
    [
        (torch.zeros(3, 4), False),
        (torch.zeros(4).expand(3, 4), True),
        (torch.zeros(12).as_strided((3, 4), (3, 1)), True),
        (torch.zeros(2, 3, 4).transpose(0, 1), False),
        (torch.zeros(2, 3, 4)[:, :2], False),
        (torch.zeros(3, 1).expand(3, 1), False),
        (torch.zeros(20).as_strided((2, 3, 4), (3, 6, 1)), True),
    ],
    ids=lambda value: value if isinstance(value, bool) else f"{tuple(value.shape)}{value.stride()}",
)
def test_overlap(tensor, overlaps):
    assert overlap(tensor) is overlaps


# ---- C12, C13, C14: numbers ----------------------------------------------------------------------------------------

BACKEND = "eager"  # they are looked at before there is one


@pytest.mark.parametrize("value", [None, 2.5, -100.0, "1", True, np.float32(1), torch.tensor(1)], ids=repr)
@pytest.mark.parametrize("name", ["cross_entropy", "one pass", *TWO_PHASE])
def test_ignore_index_is_an_integer(name, value):
    call = Call()
    logits = call.logits.clone().requires_grad_()
    with pytest.raises(TypeError, match=r"^ignore_index must be an integer, got"):
        if name == "cross_entropy":
            fused_losses.cross_entropy(logits, call.target_tokens, ignore_index=value, backend=BACKEND)
        else:
            LOSSES[name](logits, call.ppo, ignore_index=value, backend=BACKEND)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.int64, 2**63), (torch.int64, -(2**63) - 1), (torch.int64, 10**5000), (torch.int32, 2**32 + 1)],
    ids=["2^63", "-2^63-1", "10^5000", "int32"],
)
def test_ignore_index_is_within_the_targets_range(dtype, value):
    call = Call()
    with pytest.raises(ValueError, match=f"^ignore_index must be within the range of target_tokens' {dtype}, got"):
        fused_losses.cross_entropy(call.logits, call.target_tokens.to(dtype), ignore_index=value, backend=BACKEND)


@pytest.mark.parametrize("value", [3, np.int64(3), np.int32(3), -(2**31), -(2**63)], ids=repr)
def test_ignore_index_that_is_one(backend, device, value):
    call = Call(device)
    logits, target_tokens = call.logits, call.target_tokens.clone()
    target_tokens[1] = int(value)
    losses = fused_losses.cross_entropy(logits, target_tokens, ignore_index=value, reduction="none", backend=backend)
    assert losses[1] == 0 and (losses[torch.tensor([0, 2, 3])] > 0).all()


TAKES_ONE = {
    "beta": fused_losses.dro,
    "tau_positive": fused_losses.sapo,
    "label_smoothing": fused_losses.cross_entropy,
    "z_loss": fused_losses.cross_entropy,
}
NUMBERS = (
    "temperature",
    "softcap",
    "logit_scale",
    "denominator",
    "weights",
    "old_logprobs",
    "advantages",
    "clip_high_threshold",
    "entropy_coef",
    "kl_coef",
    "ref_logprobs",
    "importance_weights",
    "log_ratio_clamp",
    "dual_clip",
    "delta",
    *TAKES_ONE,
)


def with_number(call: Call, name: str, value: Any) -> Tensor:
    function = TAKES_ONE.get(name, fused_losses.ppo)
    given: dict[str, Any] = {}
    if function is not fused_losses.cross_entropy:
        given = {key: call.columns[key] for key in ("old_logprobs", "advantages")}
    if name == "kl_coef":
        given["ref_logprobs"] = -2.0
    if name == "ref_logprobs":
        given["kl_coef"] = 0.1
    if name == "clip_high_threshold":
        given["clip_low_threshold"] = 0.2
    return function(call.logits, call.target_tokens, **given | {name: value}, backend=BACKEND)


@pytest.mark.parametrize("value", [1e300, 1e39, 10**400], ids=["1e300", "1e39", "10**400"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_float32_has_as_infinity_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be (within float32's range|at most 1), got"):
        with_number(Call(), name, value)


@pytest.mark.parametrize("value", [1e-50, 1e-39])
@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"dual_clip"}))
def test_numbers_that_float32_has_as_zero_are_refused(name, value):
    zero = "0 or "
    try:
        with_number(Call(), name, 0.0)
    except ValueError as error:
        if "greater than 0" in str(error):
            zero = ""
    with pytest.raises(ValueError, match=f"^{name} must be {zero}at least float32's 1.18e-38, got"):
        with_number(Call(), name, value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("temperature / logit_scale", {"temperature": 1e30, "logit_scale": 1e-30}),
        ("temperature / logit_scale", {"temperature": 1e-30, "logit_scale": 1e30}),
        ("softcap / logit_scale", {"softcap": 1e30, "logit_scale": 1e-30}),
        ("softcap / logit_scale", {"softcap": 1e-30, "logit_scale": 1e30}),
    ],
    ids=str,
)
def test_transforms_that_kernels_fold_into_one_stay_within_float32(name, options):
    call = Call()
    with pytest.raises(ValueError, match=f"^{name} must be .*float32"):
        fused_losses.cross_entropy(call.logits, call.target_tokens, **options, backend=BACKEND)


@pytest.mark.parametrize(
    "value", ["1", b"1", [1.0], np.ones(N, np.float32), np.array(0.5), 1j], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a number( or a tensor)?, got {type(value).__name__}"):
        with_number(Call(), name, value)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "logit_scale", "softcap"])
@pytest.mark.parametrize("value", [torch.tensor(0.0), torch.tensor(0.5), torch.ones(N)], ids=str)
def test_tensors_for_numbers_are_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a number, got a tensor"):
        with_number(Call(), name, value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(1), 1, True], ids=repr)
@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"dual_clip"}))
def test_scalars_of_numpy_are_numbers(name, value):
    call = Call()
    assert torch.equal(with_number(call, name, value), with_number(call, name, float(value)))


@pytest.mark.parametrize("name", ["kl_coef", "entropy_coef", "temperature", "logit_scale", "clip_low_threshold"])
def test_none_where_a_number_is_needed(name):
    with pytest.raises(TypeError, match=f"^{name} must be a number( or a tensor)?, got NoneType"):
        call = Call()
        fused_losses.ppo(call.logits, *call.ppo, **{name: None}, backend=BACKEND)


@pytest.mark.parametrize("loss", [fused_losses.gspo, fused_losses.gmpo], ids=["gspo", "gmpo"])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3), ValueError, "sequence_ratio_mask must broadcast to the tokens' shape"),
        (np.ones(N), TypeError, "sequence_ratio_mask must be a tensor, got ndarray"),
        ([1, 1, 0, 1], TypeError, "sequence_ratio_mask must be a tensor, got list"),
    ],
    ids=["shape", "array", "list"],
)
def test_sequence_ratio_mask_is_named(loss, mask, error, message):
    call = Call()
    with pytest.raises(error, match=f"^{message}"):
        loss(call.logits, *call.ppo, sequence_ratio_mask=mask, backend=BACKEND)


def test_number_of_the_checks():
    largest = torch.finfo(torch.float32).max
    assert checks.number("x", largest) == largest and checks.number("x", -largest) == -largest
    assert checks.number("x", math.inf) == math.inf  # a bound that bounds nothing
    assert checks.number("x", 0) == 0.0 and type(checks.number("x", 3)) is float
    for value in (math.nextafter(largest, math.inf), -1e39):
        with pytest.raises(ValueError, match=r"^x must be within float32's range"):
            checks.number("x", value)
    with pytest.raises(ValueError, match=r"^x must not be NaN"):
        checks.number("x", math.nan)


# ---- C15, C16: torch's defaults ------------------------------------------------------------------------------------


@contextmanager
def default_of_torch(what: str) -> Iterator[None]:
    if what == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def numbers_of(call: Call, backend: str) -> list[Tensor]:
    """Losses, gradients and outputs of everything, in each reduction."""
    found: list[Tensor] = []
    extra = {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs": -2.0, "validate": True}
    losses = [
        (fused_losses.cross_entropy, call.ppo[:1], {"validate": True}),
        (
            fused_losses.ppo,
            call.ppo,
            call.columns | {"denominator": None, "validate": True, "old_logprobs": call.ppo[1]},
        ),
        (fused_losses.gspo, call.ppo, extra),
        (fused_losses.gmpo, call.ppo, {}),
        (fused_losses.sapo, call.ppo, {"ratio_level": "sequence"}),
        (fused_losses.policy_loss, (call.target_tokens, lambda logp, a: -logp * a, call.columns["advantages"]), {}),
        (fused_losses.logprobs, call.ppo[:1], None),
    ]
    for function, given, options in losses:
        for reduction in ("mean", "none"):
            logits = call.logits.clone().requires_grad_()
            if options is None:
                loss = function(logits, *given, backend=backend)
                entropy = function(logits, *given, backend=backend, return_entropy=True)[1]
                loss, outputs = loss + entropy, None
            else:
                keywords = {k: v for k, v in options.items() if k not in ("old_logprobs", "advantages")}
                loss, outputs = function(
                    logits, *given, reduction=reduction, return_outputs=True, backend=backend, **keywords
                )
            loss.sum().backward()
            found += [loss.detach(), logits.grad]
            if outputs is not None:
                found += [outputs.logprobs, *outputs.metrics.values()]
    return found


@pytest.mark.parametrize("what", ["float64", "meta"])
def test_default_dtype_and_device_of_torch_change_nothing(backend, device, what):
    call = Call(device)
    wanted = numbers_of(call, backend)
    with default_of_torch(what):
        numbers = numbers_of(call, backend)
    for got, truth in zip(numbers, wanted, strict=True):
        assert got.dtype == truth.dtype and got.device == truth.device
        torch.testing.assert_close(got, truth, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.inf, 0.0, -1.0])
def test_temperatures_that_validate_refuses(backend, device, value):
    call = Call(device)
    temperature = call.columns["temperature"].clone()
    temperature[2] = value
    with pytest.raises(ValueError, match="temperature must be greater than 0 and finite at every token"):
        fused_losses.ppo(call.logits, *call.ppo, temperature=temperature, validate=True, backend=backend)


def test_metrics_of_no_token_have_one_dtype(backend, device):
    logits, nothing = torch.zeros(0, VOCAB, device=device), torch.zeros(0, device=device)
    with default_of_torch("float64"):
        outputs = fused_losses.ppo(logits, nothing.long(), nothing, nothing, return_outputs=True, backend=backend)[1]
        assert {value.dtype for value in outputs.metrics.values()} == {torch.float32}


# ---- Found by reading ----


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "sapo"])
def test_policy_loss_clamps_as_the_loss_of_that_name(backend, device, name):
    call = Call(device)
    tokens, old_logprobs, advantages = call.ppo
    options = {"log_ratio_clamp": 0.05, "reduction": "mean", "backend": backend}
    expected = getattr(fused_losses, name)(call.logits, tokens, old_logprobs, advantages, **options)
    assert fused_losses.policy_loss(call.logits, tokens, name, old_logprobs, advantages, **options) == expected
    without = getattr(fused_losses, name)(
        call.logits, tokens, old_logprobs, advantages, reduction="mean", backend=backend
    )
    assert expected != without  # the clamp does something here


def test_policy_loss_takes_inputs_in_the_order_of_the_loss(backend, device):
    call = Call(device)
    tokens, old_logprobs, advantages = call.ppo
    advantages = -torch.ones_like(call.ppo[1] + 0 * advantages)
    expected = fused_losses.ppo(call.logits, tokens, old_logprobs - 3, advantages, dual_clip=1.5, backend=backend)
    got = fused_losses.policy_loss(
        call.logits, tokens, "ppo", old_logprobs - 3, advantages, 0.8, 1.2, 1.5, backend=backend
    )
    assert got == expected


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
def test_wrapper_as_upstream_gradient(backend, device, options):
    """It has no memory: refused by name, not read."""
    from torch.testing._internal.two_tensor import TwoTensor

    call = Call(device)
    leaf = call.logits.clone().requires_grad_()
    loss = fused_losses.ppo(leaf, *call.ppo, backend=backend, **options)
    two = torch.full((), 2.0, device=device)
    with pytest.raises(TypeError, match="upstream gradient"):
        loss.backward(TwoTensor(two, two.clone()))


@pytest.mark.filterwarnings("ignore")  # of Dynamo, about what it does not look into
def test_backward_under_compiled_autograd(backend, device):
    from torch._dynamo import compiled_autograd

    call = Call(device)
    plain, compiled = (call.logits.clone().requires_grad_() for _ in range(2))
    fused_losses.ppo(plain, *call.ppo, backend=backend).backward()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        fused_losses.ppo(compiled, *call.ppo, backend=backend).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


def test_importance_weight_next_to_1(backend, device):
    """1 in float32, and not in float64: one place decides whether a loss is plain."""
    call = Call(device)
    expected = fused_losses.ppo(call.logits, *call.ppo, backend=backend)
    got = fused_losses.ppo(call.logits, *call.ppo, importance_weights=1 + 1e-9, backend=backend)
    torch.testing.assert_close(got, expected)


def test_softcap_over_temperature_within_float32(backend, device):
    call = Call(device)
    with pytest.raises(ValueError, match="softcap / temperature"):
        fused_losses.ppo(call.logits, *call.ppo, softcap=1e38, temperature=0.1, backend=backend)


class Mine(torch.Tensor):
    """A subclass with memory of its own."""


def test_own_objective_beside_a_subclass(backend, device):
    call = Call(device)
    tokens, _, advantages = call.ppo

    def formula(logp, advantages):
        return -logp * advantages, -advantages.expand_as(logp)

    objective = fused_losses.Objective("beside_a_subclass", formula, inputs=("advantages",))
    advantages = advantages + torch.zeros(call.logits.shape[:-1], device=device)
    expected = fused_losses.policy_loss(call.logits, tokens, objective, advantages, backend=backend)
    got = fused_losses.policy_loss(call.logits, tokens, objective, advantages.as_subclass(Mine), backend=backend)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected)


# ---- What the second one found, of losses that are composed of torch operations and of edges of the others ----

COMPOSED = {
    "gspo": fused_losses.gspo,
    "gmpo": fused_losses.gmpo,
    "vespo": fused_losses.vespo,
    "sapo": lambda *call, **more: fused_losses.sapo(*call, ratio_level="sequence", **more),
    "policy_loss": lambda x, t, q, a, **more: fused_losses.policy_loss(
        x, t, lambda logp, q, a: -(logp - q).exp() * a, q, a, **more
    ),
}
of_composed = pytest.mark.parametrize("loss", COMPOSED.values(), ids=COMPOSED)


@pytest.mark.parametrize("clamp", [None, 20.0, 2.0, 0.5])
@pytest.mark.parametrize("log_ratio", [-3.0, 3.0])
def test_a_ratio_token_without_a_loss_is_as_one_with_one(log_ratio, clamp):
    """Its clamp and its clip are the call's. x is log 1/4 of both tokens, x - q is 0 and log_ratio."""
    logits, targets, x = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long), -math.log(4)
    given = logits, targets, torch.tensor([[x, x - log_ratio]]), torch.ones(1, 2)
    more = {
        "weights": torch.tensor([[1.0, 0.0]]),
        "sequence_ratio_mask": torch.ones(1, 2, dtype=torch.bool),
        "log_ratio_clamp": clamp,
        "reduction": "sum",
    }
    d = log_ratio if clamp is None else max(min(log_ratio, clamp), -clamp)
    phi = math.exp(2 * d + 3 * (1 - math.exp(d)))
    clipped = math.exp(min(d, math.log(1.5)) / 2)
    sources = [
        *((lambda name, b=b, **k: getattr(fused_losses, name)(*given, **k, backend=b)) for b in ("cpu", "eager")),
        lambda name, **k: getattr(fused_losses.reference, name)(*given, **k),
        lambda name, **k: getattr(fused_losses.on_logprobs, name)(torch.full((1, 2), x), *given[2:], **k),
    ]
    for compute in sources:
        torch.testing.assert_close(compute("vespo", **more), torch.tensor(-phi * x))
        loss = compute("gmpo", **more, clip_low_threshold=0.0, clip_high_threshold=1.5)
        torch.testing.assert_close(loss, torch.tensor(-clipped))


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_a_clamp_that_makes_no_sense_in_a_ratio(bad):
    """NaN in the sequence that it is part of, whose token it may be without a loss, and in no other."""
    x = torch.zeros(2, 2, 4, requires_grad=True)
    q, a = torch.zeros(2, 2), torch.ones(2, 2)
    clamp = torch.tensor([[9.0, bad], [9.0, 9.0]])
    for loss in (fused_losses.vespo, fused_losses.gmpo):
        losses = loss(
            x, torch.zeros(2, 2, dtype=torch.long), q, a, log_ratio_clamp=clamp, weights=torch.tensor([1.0, 0.0]),
            sequence_ratio_mask=torch.ones(2, 2), reduction="none",
        )  # fmt: skip
        assert losses[0, 0].isnan() and losses[0, 1] == 0 and losses[1].isfinite().all()


@of_composed
@pytest.mark.parametrize("bad", [[math.nan] * 4, [math.inf, 0, 0, 0], [-math.inf] * 4], ids=["NaN", "inf", "-inf"])
def test_bad_rows_without_a_loss(backend, device, loss, bad):
    """They are read for their logprob, and their gradient is 0 all the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 4, generator=generator)
    logits[0, 2] = torch.tensor(bad)
    logits = logits.to(device).requires_grad_()
    targets = torch.tensor([[2, 0, 3]], device=device)
    q, a = torch.tensor([[-1.0, -2.0, 0.0]], device=device), torch.ones(1, 3, device=device)
    weights = torch.tensor([[1.0, 1.0, 0.0]], device=device)
    value, _ = loss(
        logits, targets, q, a, weights=weights, entropy_coef=0.1, return_outputs=True, backend=backend
    )  # fmt: skip
    value.backward()
    assert value.isfinite() and (logits.grad[0, 2] == 0).all() and (logits.grad[0, :2] != 0).all()


@of_composed
def test_a_bad_hidden_state_without_a_loss(loss):
    hidden, weight = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True)
    hidden[2] = math.nan
    hidden.requires_grad_()
    value, _ = loss(
        fused_losses.LinearHead(hidden, weight), torch.tensor([2, 0, 3]), torch.zeros(3), torch.ones(3),
        weights=torch.tensor([1.0, 1.0, 0.0]), entropy_coef=0.1, return_outputs=True,
    )  # fmt: skip
    value.backward()
    assert weight.grad.isfinite().all() and (hidden.grad[2] == 0).all()


@of_composed
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_of_many_tokens_is_the_same_for_any_number_of_threads(loss, reduction):
    n, generator = 70_000, torch.Generator().manual_seed(0)
    logits = torch.randn(n // 7, 7, 2, generator=generator)
    targets = torch.randint(2, (n // 7, 7), generator=generator)
    q, a = torch.randn(2, n // 7, 7, generator=generator).unbind()
    weights = torch.rand(n // 7, 7, generator=generator)
    threads, seen = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            seen.add(loss(logits, targets, q - 0.7, a, weights=weights, reduction=reduction).item())
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo_of_a_token_that_is_alone(backend, device, level):
    """torch.sigmoid rounds the last tokens of a batch in another way."""
    n, vocab, generator = 33, 8, torch.Generator().manual_seed(0)
    logits = torch.randn(n, 1, vocab, generator=generator).to(device)
    targets = torch.randint(vocab, (n, 1), generator=generator).to(device)
    q, a = torch.randn(2, n, 1, generator=generator).to(device).unbind()

    def of(rows):
        x = logits[rows].clone().requires_grad_()
        losses = fused_losses.sapo(
            x, targets[rows], q[rows] - 2, a[rows], ratio_level=level, reduction="none", backend=backend
        )
        losses.sum().backward()
        return losses.detach(), x.grad

    together = of(slice(None))
    for i in range(n):
        for alone, all_of_them in zip(of(slice(i, i + 1)), together, strict=True):
            assert torch.equal(alone[0], all_of_them[i])


@pytest.mark.parametrize("shape", [(0,), (1, 2, 0), (2, 0, 4)], ids=str)
def test_no_tokens_of_a_strided_vocabulary(backend, device, shape):
    logits = torch.empty(*shape, 5, 2, device=device)[..., 0].requires_grad_()
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    losses = [
        fused_losses.cross_entropy(logits, targets, backend=backend),
        fused_losses.cross_entropy(logits, targets, backend=backend, recompute=True),
        fused_losses.cross_entropy(logits, targets, backend=backend, reduction="none").sum(),
        fused_losses.reinforce(logits, targets, 1.0, entropy_coef=0.1, backend=backend),
        fused_losses.logprobs(logits, targets, backend=backend).sum(),
        fused_losses.statistics(logits, targets, backend=backend).entropy.sum(),
    ]
    (gradient,) = torch.autograd.grad(sum(losses), logits)
    assert gradient.shape == logits.shape and all(loss == 0 for loss in losses)


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"recompute": True}, {"entropy_coef": 0.1}], ids=str)
@pytest.mark.parametrize("vocab", [5, 67, 1003])
def test_far_beyond_a_softcap(backend, device, vocab, options):
    """The slope of tanh is 1 / cosh^2, of which 1 - tanh^2 is off by a rounding of 1."""
    cap, target = 3.0, torch.tensor([vocab // 2])
    logits = torch.linspace(-12 * cap, 11 * cap, vocab)[None]
    ours = logits.to(device).requires_grad_()
    loss = fused_losses.reinforce(ours * 1, target.to(device), 1.0, softcap=cap, backend=backend, **options)
    (got,) = torch.autograd.grad(loss, ours)
    u = logits.double() / cap
    p = torch.softmax(cap * torch.tanh(u), -1)
    want = p - torch.nn.functional.one_hot(target, vocab)
    if "entropy_coef" in options:
        want += 0.1 * p * (p.log() - (p * p.log()).sum())
    torch.testing.assert_close(got.double().cpu(), want / torch.cosh(u) ** 2, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["ppo", "importance_sampling", *COMPOSED])
def test_a_bad_row_of_importance_weight_0(backend, device, name):
    """It is no masked one: NaN in loss and gradient."""
    loss = COMPOSED.get(name) or getattr(fused_losses, name)
    logits = torch.full((1, 1, 3), math.nan, device=device, requires_grad=True)
    q, a = torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device)
    targets = torch.zeros(1, 1, dtype=torch.long, device=device)
    for weight in (0.0, torch.zeros(1, 1, device=device)):
        value = loss(logits, targets, q, a, importance_weights=weight, backend=backend)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isnan() and gradient.isnan().all()
    if name != "policy_loss":
        given = logits.cpu(), targets.cpu(), q.cpu(), a.cpu()
        assert getattr(fused_losses.reference, name)(*given, importance_weights=0.0).isnan()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("key", "at", "wrong", "right"),
    [("temperature", 1, -1.0, 1.0), ("clip_high_threshold", 2, -0.5, 1.2), ("clip_low_threshold", 1, 5.0, 0.8)],
)
@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_validate_looks_at_what_counts(name, key, at, wrong, right, masked):
    """A bound of a token without a loss is never used."""
    call, column, weights = Call(), torch.full((N,), right), torch.ones(N)
    targets, q, a = call.ppo
    column[at] = wrong
    if masked:
        targets[1], weights[2] = -100, 0.0
    given = {"weights": weights, "validate": True, key: column}
    with nullcontext() if masked else pytest.raises(ValueError, match=rf"^{key} must .*at token {at}$"):
        assert getattr(fused_losses, name)(call.logits, targets, q, a, **given).isfinite()


def test_flags_are_flags():
    call = Call()
    for name in ("inplace", "recompute", "validate", "return_outputs", "kl_weighted_by_ratio"):
        for wrong in ("yes", None, 1):
            for loss in (fused_losses.ppo, fused_losses.gspo):
                if loss is fused_losses.gspo and name == "recompute":
                    continue  # it has none
                with pytest.raises(TypeError, match=f"^{name} must be True or False, got {wrong!r}"):
                    loss(call.logits, *call.ppo, **{name: wrong})
        fused_losses.ppo(call.logits, *call.ppo, **{name: np.bool_(False)})
    with pytest.raises(TypeError, match=r"^return_entropy must be"):
        fused_losses.logprobs(call.logits, call.target_tokens, return_entropy="yes")


def test_a_ratio_of_tokens_has_no_gradient_through_a_sequence():
    call = Call()
    with pytest.raises(ValueError, match=r'^ratio_gradient="sequence" needs ratio_level="sequence", got "token"'):
        fused_losses.sapo(call.logits, *call.ppo, ratio_gradient="sequence")
