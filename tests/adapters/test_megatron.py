"""Megatron-core: its cross entropies and its output layer on one rank and on several, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.adapters import megatron
from fused_losses.adapters.slots import Slot, Slots, installed

pytestmark = [
    pytest.mark.skipif(installed("megatron-core") is None, reason="megatron-core is not installed: tests/oracles.txt"),
    pytest.mark.filterwarnings("ignore::UserWarning:megatron"),
]
LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module"
OUR_NAMES = ("fused_vocab_parallel_cross_entropy", "vocab_parallel_cross_entropy", "te_parallel_cross_entropy")


@pytest.fixture(scope="module")
def here() -> Iterator[Any]:
    """Megatron on one rank of a CPU, and the module that makes its models."""
    made = importlib.import_module("fused_losses.adapters.comparisons.megatron")
    with made.on_cpu():
        yield made


@pytest.fixture(autouse=True)
def removed() -> Iterator[None]:
    yield
    megatron.remove()


class OneRank:
    """As a group is asked."""

    @staticmethod
    def size() -> int:
        return 1

    @staticmethod
    def rank() -> int:
        return 0


# ---- Several ranks ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_over_ranks(ranks, dtype):
    megatron_ranks = importlib.import_module("megatron_ranks")
    for world in (1, 2, 4):
        ranks(world, megatron_ranks.functions, dtype)


def test_models_over_ranks(ranks):
    megatron_ranks = importlib.import_module("megatron_ranks")
    for compared in ranks(4, megatron_ranks.models):
        assert compared[-1] == "refused" and len(compared) == 10


def test_output_layer_over_ranks(ranks):
    """Tensor and sequence parallelism, biases, a frozen weight, a gradient that is left partial."""
    ranks(4, importlib.import_module("megatron_ranks").layers)


# ---- The functions ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3, 37), (1, 1, 2), (0, 2, 9)])
def test_per_token_loss(dtype, shape):
    """As the definition has it, logits left as they are; odd shapes, no tokens."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    before, target = logits.detach().clone(), torch.randint(shape[-1], shape[:-1])
    for function in (megatron.fused_vocab_parallel_cross_entropy, megatron.vocab_parallel_cross_entropy):
        logits.grad = None
        losses = function(logits, target, tp_group=OneRank)
        losses.sum().backward()
        exact = before.double().requires_grad_()
        truth = torch.nn.functional.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="none")
        truth.sum().backward()
        assert losses.dtype is torch.float32 and losses.shape == shape[:-1] and torch.equal(logits, before)
        torch.testing.assert_close(losses.double().flatten(), truth, rtol=1e-5, atol=1e-5)
        rtol = {torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]  # of the gradient's rounding
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rtol, atol=1e-6)


def test_negative_targets_are_left_out_and_others_are_an_error():
    logits = torch.randn(3, 1, 8)
    logits[1] = torch.nan
    logits.requires_grad_()
    losses = megatron.fused_vocab_parallel_cross_entropy(logits, torch.tensor([[2], [-1], [-100]]), OneRank)
    losses.sum().backward()
    assert (losses[1:] == 0).all() and (logits.grad[1:] == 0).all() and (logits.grad[0] != 0).any()
    with pytest.raises(ValueError, match=r"^target must be in"):
        megatron.fused_vocab_parallel_cross_entropy(logits, torch.tensor([[2], [8], [0]]), OneRank)


def test_label_smoothing(here):
    """Theirs on one rank: the target's probability is 1 - e, each other's e / (V - 1)."""
    torch.manual_seed(0)
    target, upstream = torch.randint(40, (6, 2)), torch.rand(6, 2)
    group = torch.distributed.group.WORLD
    numbers = []
    theirs = here.tensor_parallel.vocab_parallel_cross_entropy
    for function in (theirs, megatron.vocab_parallel_cross_entropy):
        torch.manual_seed(1)
        logits = torch.randn(6, 2, 40, requires_grad=True)
        losses = function(logits * 1, target, 0.2, group)
        losses.backward(upstream)
        numbers.append((losses, logits.grad))
    for a, b in zip(*numbers, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and less than 1"):
            megatron.vocab_parallel_cross_entropy(logits, target, wrong, group)
    with pytest.raises(ValueError, match="inplace=True has no label smoothing"):
        megatron.vocab_parallel_cross_entropy(logits * 1, target, 0.2, group, inplace=True)


def test_the_default_group_is_megatrons(here):
    logits, target = torch.randn(3, 2, 8), torch.randint(8, (3, 2))
    expected = megatron.vocab_parallel_cross_entropy(logits, target, tp_group=OneRank)
    assert torch.equal(megatron.vocab_parallel_cross_entropy(logits, target), expected)


def test_in_place_the_gradient_is_the_logits_memory():
    made = torch.randn(4, 2, 50, requires_grad=True)
    target, upstream = torch.randint(50, (4, 2)), torch.rand(4, 2)
    grads = []
    for inplace in (False, True):
        logits = made * 2
        losses = megatron.fused_vocab_parallel_cross_entropy(logits, target, OneRank, inplace=inplace)
        kept = logits.detach().clone()
        assert torch.equal(logits, kept)
        (gradient,) = torch.autograd.grad(losses, logits, upstream, retain_graph=True)
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace
        grads.append(gradient.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


# ---- install and remove ----


def in_the_slots() -> list[Any]:
    return [getattr(importlib.import_module(slot.module), slot.name) for slot in megatron.replacements()]


def test_install_and_remove(here):
    before = in_the_slots()
    megatron.install()
    megatron.install()
    module = importlib.import_module(LANGUAGE_MODULE)
    for name in ("fused_vocab_parallel_cross_entropy", "te_parallel_cross_entropy"):
        assert getattr(module, name) is getattr(megatron, name)
    assert module.tensor_parallel.vocab_parallel_cross_entropy is megatron.vocab_parallel_cross_entropy
    with pytest.raises(RuntimeError, match=r"installed already with inplace=False; call remove\(\) first"):
        megatron.install(inplace=True)
    megatron.remove()
    megatron.remove()
    assert all(a is b for a, b in zip(in_the_slots(), before, strict=True))
    megatron.install(inplace=True)
    module.fused_vocab_parallel_cross_entropy, ours = before[0], module.fused_vocab_parallel_cross_entropy
    with pytest.raises(RuntimeError, match=r"language_module\.fused_vocab_parallel_cross_entropy was replaced after"):
        megatron.remove()
    module.fused_vocab_parallel_cross_entropy = ours


def test_a_slot_that_moved_is_named_with_the_version(here, monkeypatch):
    name = "megatron.core.tensor_parallel.vocab_parallel_cross_entropy"
    monkeypatch.setattr(name, lambda vocab_parallel_logits, target, group: None)
    before = in_the_slots()
    with pytest.raises(
        RuntimeError, match=rf"megatron-core {installed('megatron-core')}: {name} is not the slot.*group"
    ):
        megatron.install()
    assert all(a is b for a, b in zip(in_the_slots(), before, strict=True))


def test_signatures_begin_as_megatrons(here):
    from inspect import signature

    for slot in megatron.replacements():
        if slot.parameters is not None:
            assert tuple(signature(getattr(megatron, slot.name)).parameters) == (*slot.parameters, "inplace")
    slots = Slots("megatron-core", "0.19.2", {Slot("megatron.core.models.gpt", "GPTModel.forward"): None})
    for name in ("labels", "loss_mask", "output_processor", "output_processor_context"):
        assert name in signature(slots.found(next(iter(slots.replacements)))).parameters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
        {
            "cross_entropy_loss_fusion": True,
            "cross_entropy_fusion_impl": "te",
        },  # which without it has no function at all
    ],
    ids=["unfused", "native", "te"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_trains_on_ours(here, options, inplace):
    theirs = here.step(here.model())
    made = here.model()
    for key, value in options.items():
        setattr(made.config, key, value)
    megatron.install(inplace=inplace)
    for key, value in here.step(made).items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6)


# ---- The output processor ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_a_model_without_logits(here, dtype, shared):
    options = {"share_embeddings_and_output_weights": shared, "params_dtype": dtype, "bf16": dtype is torch.bfloat16}
    theirs = here.step(here.model(**options).to(dtype))
    ours = here.step(here.model(**options).to(dtype), output_processor=megatron.output_processor)
    # in bf16 theirs rounds each gradient of a logit in another order, and dW of the shared weight twice
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-5, "atol": 2e-3}
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], **tolerance)


def test_training_steps_of_a_model(here):
    """Three of AdamW, its head's weight at the end as theirs has it."""
    ends = []
    for options in ({}, {"output_processor": megatron.output_processor}):
        made = here.model()
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(here.step(made, **options)["loss"].detach())
            optimizer.step()
        ends.append((torch.stack(losses), made.output_layer.weight.detach()))
    assert ends[0][0][2] < ends[0][0][0]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)  # AdamW divides by gradients that are nearly 0


def call(here: Any, made: Any = None, **options: Any) -> Tensor:
    given = here.batch() | {key: options.pop(key) for key in list(options) if key in ("labels", "loss_mask")}
    returned: Tensor = (made or here.model())(**given, output_processor=megatron.output_processor, **options)
    return returned


def test_masked_labels_and_all_masked(here):
    labels = here.batch()["labels"]
    whole = call(here)
    some = call(here, labels=labels.masked_fill(torch.arange(here.S) < 9, -1))
    assert (some[:, :9] == 0).all()
    torch.testing.assert_close(some[:, 9:], whole[:, 9:])
    made = here.model()
    none = call(here, made, labels=torch.full_like(labels, -100))
    none.sum().backward()
    assert (none == 0).all() and (made.output_layer.weight.grad == 0).all()


def test_skip_masked(here):
    mask = here.batch()["loss_mask"]
    whole = call(here)
    skipped = call(here, output_processor_context={"skip_masked": True})
    assert (skipped[mask == 0] == 0).all()
    torch.testing.assert_close(skipped[mask == 1], whole[mask == 1])
    with pytest.raises(ValueError, match="skip_masked of output_processor_context needs loss_mask"):
        call(here, loss_mask=None, output_processor_context={"skip_masked": True})


def test_a_loss_of_the_callers_in_one_pass(here):
    """ppo of the model's head, against the formula on the model's own logits; with MuP, too."""
    for options in ({}, {"use_mup": True, "mup_base_hidden_size": 16}):
        given = here.batch()
        torch.manual_seed(2)
        advantages, gap = torch.randn(2, here.B, here.S)
        inputs = {key: value for key, value in given.items() if key not in ("labels", "loss_mask")}
        theirs, ours = here.model(**options), here.model(**options)
        logits = theirs(**inputs)
        logprobs = torch.log_softmax(logits, -1).gather(-1, given["labels"][..., None])[..., 0]
        old = logprobs.detach() - 0.2 * gap
        truth = reference.ppo(logits, given["labels"], old, advantages, weights=given["loss_mask"])
        truth.backward()

        def loss(head, labels, loss_mask, old=old, advantages=advantages, **keywords):
            assert isinstance(head, fused_losses.LinearHead) and head.shape == (here.B, here.S, here.V)
            assert keywords == ({} if not options else {"logit_scale": 0.5})  # noqa: B023 (called at once)
            return fused_losses.ppo(head, labels, old, advantages, weights=loss_mask, **keywords)

        found = call(here, ours, output_processor_context={"loss": loss})
        found.backward()
        torch.testing.assert_close(found, truth)
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


def test_pre_hooks_run_and_other_hooks_are_refused(here):
    made, seen = here.model(), []
    made.output_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    made.output_layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    call(here, made)
    assert seen == [(here.S, here.B, here.H), {}]
    made.output_layer.register_forward_pre_hook(lambda module, args: args)
    with pytest.raises(ValueError, match="pre-hook that changes its input"):
        call(here, made)
    for register in ("register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
        made = here.model()
        getattr(made.output_layer, register)(lambda *_: None)
        with pytest.raises(ValueError, match="output_layer has hooks"):
            call(here, made)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown option", {"context": {"chunks": 3, "loss": None}}, "output_processor_context takes .*, got chunks"),
    ("no labels", {"labels": None}, "with labels.*got no labels"),
    ("inference", {"inference_context": SimpleNamespace()}, "got an inference_context"),
    ("gathered", {"tp": 2, "runtime_gather_output": True}, "runtime_gather_output"),
    ("always gathered", {"tp": 2, "gather_output": True}, "parallel_output=False"),
    ("deferred", {"config.defer_embedding_wgrad_compute": True}, "defer_embedding_wgrad_compute"),
    ("experts", {"explicit_expert_comm": True}, "output_layer of experts"),
    ("sharded", {"gtp_remat_size": 2}, "gtp_remat"),
    (
        "fused gradients and MTP",
        {"gradient_accumulation_fusion": True, "model.mtp_num_layers": 1},
        "gradient_accumulation_fusion with mtp_num_layers",
    ),
]


@pytest.mark.parametrize("given, message", [e[1:] for e in REFUSED], ids=[e[0] for e in REFUSED])
def test_refused(here, monkeypatch, given, message):
    made = here.model()
    layer, config = made.output_layer, made.config
    keywords: dict[str, Any] = {"labels": torch.zeros(2, 3, dtype=torch.int64)}
    for key, value in given.items():
        if key == "tp":
            monkeypatch.setattr(layer, "tp_group", SimpleNamespace(size=lambda: 2, rank=lambda: 0))
        elif key.startswith("config."):
            layer.config = SimpleNamespace(**{key.removeprefix("config."): value})
        elif key.startswith("model."):
            config = SimpleNamespace(**{key.removeprefix("model."): value})
        elif hasattr(layer, key):
            setattr(layer, key, value)
        else:
            keywords[key] = value
    with pytest.raises(ValueError, match=message):
        megatron.output_processor(
            hidden_states=torch.zeros(3, 2, here.H), output_layer=layer, output_weight=None, config=config, **keywords
        )


def test_a_wrapped_or_other_layer_is_refused(here):
    class Wrapped(here.tensor_parallel.ColumnParallelLinear):
        base_layer = None

    layer = here.model().output_layer
    layer.__class__ = Wrapped
    for other, message in ((layer, "Wrapped, wrapped: merge it first"), (torch.nn.Linear(2, 3), "got Linear")):
        with pytest.raises(TypeError, match=f"ColumnParallelLinear.*{message}"):
            megatron.output_processor(
                hidden_states=torch.zeros(1, 1, 2),
                output_layer=other,
                output_weight=None,
                labels=torch.zeros(1, 1, dtype=torch.int64),
            )


def test_gradient_accumulation_fusion_gets_an_ordinary_gradient(here):
    """Which DistributedDataParallel adds to main_grad."""
    made = here.model()
    made.output_layer.gradient_accumulation_fusion = True
    made.output_layer.weight.main_grad = torch.zeros_like(made.output_layer.weight)
    call(here, made).sum().backward()
    assert made.output_layer.weight.grad.abs().sum() > 0 and (made.output_layer.weight.main_grad == 0).all()


def test_the_module_imports_without_megatron():
    import subprocess
    import sys

    code = "import sys; from fused_losses.adapters import megatron; assert 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
