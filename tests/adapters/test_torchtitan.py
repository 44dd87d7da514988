"""torchtitan's losses: their configs, their wrapper, tensor parallelism, and what is in the masked tokens."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from ranks import Rank, Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fused_losses
from fused_losses import backends
from fused_losses.adapters import torchtitan as ours

pytest.importorskip("torchtitan", reason="torchtitan is not installed: tests/oracles.txt")
pytest.importorskip("tyro", reason="tyro is not installed: tests/oracles.txt")

import torchtitan.components.loss as theirs
import torchtitan.distributed.utils as distributed
import tyro
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import set_current_spmd_mesh

from fused_losses.adapters import _torchtitan

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(backends.unusable("cpu", torch.device("cpu")) is not None, reason="backend cpu is unusable"),
]

B, L, H, V = 2, 8, 16, 101
CONFIGS = [ours.CrossEntropyLoss.Config(), ours.DAPOLoss.Config(ratio_clip_high=0.28), ours.GRPOLoss.Config()]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config)._owner.__name__)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rollout(mask: float = 0.6) -> dict[str, torch.Tensor]:
    return {
        "generator_logprobs": -4.6 + 0.5 * torch.randn(B, L),
        "advantages": torch.randn(B, 1).expand(B, L),
        "loss_mask": torch.rand(B, L) < mask,
    }


def inputs(config, mask: float = 0.6) -> dict[str, torch.Tensor]:
    labels = torch.randint(V, (B, L))
    if isinstance(config, ours.CrossEntropyLoss.Config):
        return {"labels": labels.where(torch.rand(B, L) < mask, -100)}
    return {"labels": labels, **rollout(mask)}


# ---- The module and the configs ----


def test_what_the_module_has():
    assert ours.CrossEntropyLoss is _torchtitan.CrossEntropyLoss
    with pytest.raises(AttributeError, match="no attribute 'MSELoss'"):
        ours.MSELoss  # noqa: B018
    assert issubclass(ours.GRPOLoss, theirs.BaseLoss)


@configs
def test_a_config_as_torchtitan_uses_it(config):
    wrapper = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=config)
    again = pickle.loads(pickle.dumps(wrapper))
    assert again == wrapper == copy.deepcopy(wrapper)
    assert wrapper.to_dict()["loss_fn"]["inplace"] is True
    parsed = tyro.cli(ChunkedLossWrapper.Config, args=["--num-chunks", "2"], default=wrapper)
    assert parsed.num_chunks == 2 and parsed.loss_fn == config
    assert type(parsed.build().loss_fn) is type(config)._owner
    assert [name for name, *_ in wrapper.traverse(theirs.BaseLoss.Config, recurse=True)] == ["", "loss_fn"]


@configs
def test_compilation_of_the_loss_is_declined_aloud(config, caplog):
    logger = logging.getLogger(_torchtitan.logger.name)
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger.name):
            config.build(compile_config=CompileConfig(enable=True, components=["model"]))
            assert "leaves it alone" not in caplog.text
            config.build(compile_config=CompileConfig(enable=True))
    finally:
        logger.removeHandler(caplog.handler)
    assert "torch.compile leaves it alone" in caplog.text


def test_a_slot_that_moved(monkeypatch):
    def moved(self, pred, labels, valid_tokens):
        raise AssertionError

    monkeypatch.setattr(theirs.BaseLoss, "__call__", moved)
    with pytest.raises(RuntimeError, match=r"torchtitan 0\.3\.0: torchtitan.components.loss.BaseLoss.__call__ is not"):
        _torchtitan.SLOTS.check()


def test_it_imports_without_torchtitan():
    code = """import sys
sys.modules["torchtitan"] = None  # as where it is not installed
from fused_losses.adapters import torchtitan
try:
    torchtitan.CrossEntropyLoss
except ImportError as error:
    print(error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith("torchtitan"), done.stdout


# ---- Numbers ----


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_is_their_memory(config, dtype):
    leaf = torch.randn(B, L, V, dtype=dtype, requires_grad=True)
    given = inputs(config)
    found = {}
    for inplace in (True, False):
        leaf.grad = None
        logits = leaf * 1.0
        before = logits.detach().clone()
        loss, _ = dataclasses.replace(config, inplace=inplace).build()(
            logits, given["labels"], 7.0, **{k: v for k, v in given.items() if k != "labels"}
        )
        loss.backward()
        assert torch.equal(logits.detach(), leaf.grad if inplace else before)
        found[inplace] = loss.detach(), leaf.grad
    assert torch.equal(found[True][0], found[False][0]) and torch.equal(found[True][1], found[False][1])


@pytest.mark.parametrize("tokens", [None, 12, torch.tensor(12), torch.tensor(12.0, dtype=torch.float64)], ids=repr)
def test_what_the_sum_is_divided_by(tokens):
    logits, labels = torch.randn(B, L, V), inputs(CONFIGS[0])["labels"]
    expected, _ = theirs.CrossEntropyLoss.Config().build()(logits, labels, tokens)
    loss, metrics = CONFIGS[0].build()(logits, labels, tokens)
    torch.testing.assert_close(loss, expected.float())
    assert metrics == {}


@configs
def test_validation_writes_nothing(config):
    """Neither without a wrapper, nor in it, where hidden states ask for no gradient."""
    given, head = inputs(config), nn.Linear(H, V, bias=False)
    with torch.no_grad():
        logits = torch.randn(B, L, V)
        before = logits.clone()
        loss, _ = config.build()(logits, **given)
        assert torch.equal(logits, before) and not loss.requires_grad
    wrapper = ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config).build()
    wrapper.set_lm_head(head)
    with torch.no_grad():
        loss, _ = wrapper(torch.randn(B, L, H), **given)
    assert not loss.requires_grad and loss.isfinite()


@configs
@pytest.mark.parametrize("chunks", [0, 4])
def test_all_tokens_masked(config, chunks):
    """0, whatever the masked tokens hold; theirs is NaN."""
    head, leaf = nn.Linear(H, V, bias=False), torch.randn(B, L, H, requires_grad=True)
    hidden, given = leaf * 1.0, inputs(config, mask=0.0)
    with torch.no_grad():
        head.weight[3, 2] = torch.nan
    if "advantages" in given:
        given["advantages"] = torch.full((B, L), torch.nan)
        given["generator_logprobs"] = torch.full((B, L), -torch.inf)
    loss_fn = config.build()
    if chunks:
        loss_fn = ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=config).build()
        loss_fn.set_lm_head(head)
    loss, metrics = loss_fn(hidden if chunks else head(hidden), global_valid_tokens=torch.tensor(0), **given)
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad.abs().sum() == 0.0
    assert all(value == 0.0 for value in metrics.values()), metrics


def test_a_token_beyond_the_clamp_of_the_log_ratio():
    """Its ratio is e^10, with no gradient."""
    logits = torch.zeros(1, 2, V, requires_grad=True)
    config, mask = ours.DAPOLoss.Config(inplace=False), torch.tensor([[True, False]])
    given = {"generator_logprobs": torch.full((1, 2), -30.0), "advantages": torch.tensor([[-2.0, 1.0]])}
    loss, metrics = config.build()(logits, torch.tensor([[3, 4]]), 1, loss_mask=mask, **given)
    loss.backward()
    assert loss.item() == pytest.approx(2 * torch.tensor(10.0).exp().item())
    assert logits.grad.abs().sum() == 0.0
    assert metrics["bit_wise/logprob_diff/max"].item() == pytest.approx(30 - torch.tensor(V).log().item())
    assert metrics["loss/ratio_clipped_frac"] == 1.0


def test_a_lower_bound_below_zero_is_none():
    logits, given = torch.randn(B, L, V), inputs(CONFIGS[1])
    wide = ours.DAPOLoss.Config(ratio_clip_low=1.5).build()(logits, **given)[0]
    none = fused_losses.ppo(
        logits,
        given["labels"],
        given["generator_logprobs"],
        given["advantages"],
        clip_low_threshold=0.0,
        log_ratio_clamp=10.0,
        weights=given["loss_mask"],
        reduction="sum",
    )
    torch.testing.assert_close(wide, none, rtol=0, atol=0)


def test_steps_of_an_optimizer():
    """The same curve as with torchtitan's own loss, over a model, chunked, with gradient accumulation."""

    def curve(config) -> list[float]:
        torch.manual_seed(0)
        body, head = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H), nn.GELU()), nn.Linear(H, V, bias=False)
        wrapper = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=config).build()
        wrapper.set_lm_head(head)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-2)
        tokens = torch.randint(V, (4, L + 1))
        found = []
        for _ in range(4):
            total = 0.0
            for batch in tokens.split(2):
                loss, _ = wrapper(body(batch[:, :-1]), batch[:, 1:], torch.tensor(4 * L))
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            found.append(total)
        return found

    own = curve(ours.CrossEntropyLoss.Config())
    assert own == pytest.approx(curve(theirs.CrossEntropyLoss.Config()), rel=1e-5)
    assert own[-1] < own[0]


# ---- Tensor parallelism ----


class Head(nn.Module):
    """A column-parallel head, whose logits are as the backend has them: a DTensor, or the shard."""

    def __init__(self, mesh: DeviceMesh, weight: torch.Tensor, vocabulary: int, wrapped: bool):
        super().__init__()
        self.mesh, self.vocabulary, self.wrapped = mesh, vocabulary, wrapped
        self.weight = nn.Parameter(weight.chunk(mesh.size())[mesh.get_local_rank()].clone())

    def forward(self, hidden):
        local = (hidden.to_local() if isinstance(hidden, DTensor) else hidden) @ self.weight.t()
        if not self.wrapped:
            return local
        shape = torch.Size((*local.shape[:-1], self.vocabulary))
        stride = (shape[1] * shape[2], shape[2], 1)
        return DTensor.from_local(local, self.mesh, [Shard(2)], run_check=False, shape=shape, stride=stride)


def tensor_parallel(rank: Rank, spmd: str, vocabulary: int, chunks: int, rl: bool) -> None:
    """Theirs beside ours, on each rank: the loss, the gradient of its part of the weight, and of the hidden states."""
    mesh = DeviceMesh.from_group(rank.group, "cpu", mesh_dim_names=("tp",))
    before = distributed.get_spmd_backend()
    distributed.set_spmd_backend(spmd)
    try:
        if rl:
            found = [_rl_step(mesh, config, spmd, vocabulary, chunks) for config in (None, ours.DAPOLoss.Config())]
        else:
            size = vocabulary if spmd == "spmd_types" else None
            found = [
                _step(mesh, config, spmd, vocabulary, chunks)
                for config in (
                    theirs.CrossEntropyLoss.Config(global_vocab_size=size),
                    ours.CrossEntropyLoss.Config(global_vocab_size=size),
                )
            ]
    finally:
        distributed.set_spmd_backend(before)
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def _step(mesh: DeviceMesh, config, spmd: str, vocabulary: int, chunks: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    head = Head(mesh, torch.randn(vocabulary, H), vocabulary, spmd != "spmd_types")
    hidden = torch.randn(B, L, H, requires_grad=True)
    labels = torch.randint(vocabulary, (B, L)).where(torch.rand(B, L) < 0.6, -100)
    if spmd == "full_dtensor":
        labels = DTensor.from_local(labels, mesh, [Replicate()], run_check=False)
    loss_fn = config.build()
    if chunks:
        loss_fn = ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=config).build()
        loss_fn.set_lm_head(head)
    with set_current_spmd_mesh(mesh) if spmd == "spmd_types" else nullcontext():
        loss, _ = loss_fn(hidden * 1.0 if chunks else head(hidden), labels, torch.tensor(9))
        loss.backward()
    loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
    return [loss.detach(), head.weight.grad, hidden.grad]


def _rl_step(mesh: DeviceMesh, config, spmd: str, vocabulary: int, chunks: int) -> list[torch.Tensor]:
    """None: of the whole vocabulary on one rank, as torchtitan's RL losses gather it."""
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, H)
    hidden = torch.randn(B, L, H, requires_grad=True)
    given = {"labels": torch.randint(vocabulary, (B, L)), **rollout()}
    if config is None:
        whole = weight.clone().requires_grad_()
        loss, metrics = ours.DAPOLoss.Config().build()(hidden @ whole.t(), global_valid_tokens=9, **given)
        loss.backward()
        return [loss.detach(), whole.grad.chunk(mesh.size())[mesh.get_local_rank()], *metrics.values()]
    head = Head(mesh, weight, vocabulary, spmd != "spmd_types")
    wrapper = ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=config).build()
    wrapper.set_lm_head(head)
    with set_current_spmd_mesh(mesh) if spmd == "spmd_types" else nullcontext():
        loss, metrics = wrapper(hidden * 1.0, global_valid_tokens=9, **given)
        loss.backward()
    return [loss.detach(), head.weight.grad, *metrics.values()]


@pytest.mark.parametrize("spmd", ["partial_dtensor", "full_dtensor", "spmd_types"])
@pytest.mark.parametrize("vocabulary", [100, 101])
def test_a_sharded_vocabulary(ranks: Ranks, spmd, vocabulary):
    ranks(2, tensor_parallel, spmd, vocabulary, 0, False)
    if spmd != "full_dtensor":  # whose hidden states would have to be DTensors, too
        ranks(2, tensor_parallel, spmd, vocabulary, 4, False)


@pytest.mark.parametrize("spmd", ["partial_dtensor", "spmd_types"])
def test_rl_of_a_sharded_vocabulary(ranks: Ranks, spmd):
    ranks(2, tensor_parallel, spmd, 100, 2, True)


def labels_elsewhere(rank: Rank) -> None:
    mesh = DeviceMesh.from_group(rank.group, "cpu", mesh_dim_names=("tp",))
    logits = DTensor.from_local(torch.randn(B, L, V), mesh, [Shard(1)], run_check=False)
    labels = DTensor.from_local(torch.zeros(B, L, dtype=torch.int64), mesh, [Replicate()], run_check=False)
    CONFIGS[0].build()(logits, labels)


def test_labels_placed_otherwise(ranks: Ranks):
    for error in ranks.errors(2, labels_elsewhere):
        assert error.kind == "ValueError" and "labels must be placed as the rows of pred" in error.message


def tokens_sharded(rank: Rank) -> None:
    """Logits whose tokens are spread over ranks: the loss is the sum over them."""
    mesh = DeviceMesh.from_group(rank.group, "cpu", mesh_dim_names=("dp",))
    torch.manual_seed(0)
    whole, labels = torch.randn(B, L, V), torch.randint(V, (B, L))
    expected = theirs.CrossEntropyLoss.Config().build()(whole, labels, 3)[0]
    here = slice(mesh.get_local_rank(), mesh.get_local_rank() + 1)
    leaf = DTensor.from_local(whole[here].clone(), mesh, [Shard(0)], run_check=False).requires_grad_()
    placed = DTensor.from_local(labels[here], mesh, [Shard(0)], run_check=False)
    loss, _ = CONFIGS[0].build()(leaf * 1.0, placed, 3)
    torch.testing.assert_close(loss.full_tensor(), expected)
    loss.backward()
    own = whole.clone().requires_grad_()
    theirs.CrossEntropyLoss.Config().build()(own, labels, 3)[0].backward()
    torch.testing.assert_close(leaf.grad.to_local(), own.grad[here], rtol=1e-5, atol=1e-7)


def test_sharded_tokens(ranks: Ranks):
    ranks(2, tokens_sharded)
