"""NeMo-RL: its loss functions for logprobs and for logits, and what is refused. Its package need not be here."""

from __future__ import annotations

import enum
import importlib
import pickle
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses.adapters import nemo_rl
from fused_losses.adapters.comparisons import nemo_rl as theirs
from fused_losses.adapters.slots import installed

SEQS, TOKS = torch.tensor(7.0), torch.tensor(60.0)
B, S, V = 3, 12, 40


def drawn() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    logits = torch.randn(B, S, V).requires_grad_()
    input_ids = torch.randint(V, (B, S))
    x = torch.nn.functional.pad(theirs._logprobs(logits.detach(), input_ids), (1, 0))
    data = {
        "input_ids": input_ids,
        "token_mask": (torch.rand(B, S) < 0.6).float(),
        "sample_mask": torch.tensor([1.0, 0.0, 1.0]),
        "advantages": torch.randn(B, S),
        "rewards": torch.tensor([1.0, 1.0, -1.0]),
        "prev_logprobs": x + 0.3 * torch.randn(B, S),
        "reference_policy_logprobs": x + 0.3 * torch.randn(B, S),
    }
    data["generation_logprobs"] = data["prev_logprobs"] + 0.1 * torch.randn(B, S)
    return logits, data


def numbers(function: Any, on_logits: bool = False) -> dict[str, Tensor | float]:
    """As NeMo-RL's wrapper calls it."""
    logits, data = drawn()
    if on_logits:
        given = {"logits": logits * 1}
    else:
        given = {"next_token_logprobs": theirs._logprobs(logits, data["input_ids"])}
    loss, metrics = function(data=data, global_valid_seqs=SEQS, global_valid_toks=TOKS, **given)
    loss.backward()
    return {**metrics, "loss": loss.detach(), "gradient": logits.grad}


def defined(cfg: dict[str, Any]) -> Any:
    def call(next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor) -> Any:
        return theirs.clipped_pg(next_token_logprobs, data, global_valid_seqs, global_valid_toks, cfg)

    return call


def assert_same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        a, b = (torch.as_tensor(x).double() for x in (ours[key], value))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("case", theirs.CASES)
@pytest.mark.parametrize("options", [{}, {"on_logits": True}, {"on_logits": True, "inplace": True}], ids=str)
def test_clipped_pg(case, options):
    cfg = theirs.CASES[case]
    loss_fn = pickle.loads(pickle.dumps(nemo_rl.ClippedPGLoss(cfg, **options)))  # as it goes to a worker
    assert_same(numbers(loss_fn, loss_fn.on_logits), numbers(defined(cfg)))


@pytest.mark.parametrize("options", [{}, {"on_logits": True}, {"on_logits": True, "inplace": True}], ids=str)
def test_nll(options):
    def expected(next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        return theirs.nll(next_token_logprobs, data, global_valid_seqs, global_valid_toks)

    loss_fn = nemo_rl.NLLLoss(**options)
    assert_same(numbers(loss_fn, loss_fn.on_logits), numbers(expected))


@pytest.mark.parametrize("cfg", [{}, {"force_on_policy_ratio": True}, {"token_level_loss": False}], ids=str)
def test_filtered_tokens(cfg):
    """Top-k filtering: some tokens have no logprob for the policy's loss, and one for the KL."""

    def filtered(function: Any) -> dict[str, Any]:
        logits, data = drawn()
        x = theirs._logprobs(logits, data["input_ids"])
        keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.7
        data |= {"curr_logprobs_keep_mask": keep.float(), "curr_logprobs_unfiltered": x}
        loss, metrics = function(torch.where(keep, x, 0.0), data, SEQS, TOKS)
        loss.backward()
        return {**metrics, "loss": loss.detach(), "gradient": logits.grad}

    found = filtered(nemo_rl.ClippedPGLoss({"reference_policy_kl_penalty": 0.1, **cfg}))
    without = {"reference_policy_kl_penalty": 0.0, **cfg}

    def narrowed(x: Tensor, data: dict[str, Tensor], seqs: Tensor, toks: Tensor) -> Any:
        """The policy's loss over the tokens that are kept, and the KL over all."""
        kept = data | {"token_mask": data["token_mask"].clone()}
        kept["token_mask"][:, 1:] *= data["curr_logprobs_keep_mask"]
        actor, of_actor = theirs.clipped_pg(x, kept, seqs, toks, without)
        none = data | {"advantages": torch.zeros_like(data["advantages"])}
        everything = {"reference_policy_kl_penalty": 0.1, "token_level_loss": cfg.get("token_level_loss", True)}
        kl, of_all = theirs.clipped_pg(data["curr_logprobs_unfiltered"], none, seqs, toks, everything)
        metrics = of_all | {
            key: of_actor[key] for key in of_actor if key.startswith("probs") or key == "approx_entropy"
        }
        if cfg.get("force_on_policy_ratio"):  # what it compares with is the filtered logprobs themselves
            metrics |= {key: of_actor[key] for key in of_actor if key.endswith("_error") or key.startswith("sampling")}
        return actor + kl, metrics

    assert_same(found, filtered(narrowed))


@pytest.mark.parametrize("case", theirs.CASES)
def test_masked_tokens_are_exactly_zero_whatever_they_hold(case):
    """Of a masked token, and of a sample that does not count."""
    for garbage in (torch.nan, torch.inf, -torch.inf):
        _, data = drawn()
        mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()
        x = torch.where(mask, -torch.rand(B, S - 1), garbage).requires_grad_()
        for name in ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs"):
            data[name][:, 1:] = torch.where(mask, data[name][:, 1:], garbage)
        loss, metrics = nemo_rl.ClippedPGLoss(theirs.CASES[case])(x, data, SEQS, TOKS)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and (x.grad[~mask] == 0).all()
        assert all(value == value for value in metrics.values()), metrics


@pytest.mark.parametrize("on_logits", [False, True])
@pytest.mark.parametrize("make", [partial(nemo_rl.ClippedPGLoss, {}), nemo_rl.NLLLoss], ids=["clipped", "nll"])
def test_all_masked(make, on_logits):
    logits, data = drawn()
    data["token_mask"].zero_()
    logits.data[:] = torch.nan if on_logits else logits.data
    given = {"logits": logits * 1} if on_logits else {"next_token_logprobs": logits[:, 1:, 0]}
    loss, metrics = make(on_logits=on_logits)(data=data, global_valid_seqs=SEQS, global_valid_toks=TOKS, **given)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all() and metrics["loss"] == 0
    if "probs_ratio_min" in metrics:
        assert metrics["probs_ratio_min"] == float("inf") and metrics["probs_ratio_max"] == float("-inf")


def test_in_place_no_logits_are_copied():
    logits, data = drawn()
    made = logits * 1
    call = {"data": data, "global_valid_seqs": SEQS, "global_valid_toks": TOKS}
    loss, _ = nemo_rl.ClippedPGLoss({}, on_logits=True, inplace=True)(logits=made, **call)
    (gradient,) = torch.autograd.grad(loss, made)
    assert gradient.data_ptr() == made.data_ptr() and gradient.shape == (B, S, V)


def test_a_sharded_vocabulary(ranks):
    helper = importlib.import_module("nemo_rl_ranks")
    expected = numbers(nemo_rl.ClippedPGLoss({}))
    for found in ranks(2, helper.clipped_pg):
        torch.testing.assert_close(found["gradient"], expected["gradient"][..., found["columns"]], rtol=1e-4, atol=1e-6)
        assert abs(found["loss"] - expected["loss"].item()) < 1e-5


# ---- What is refused ----


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"clip_ratio": 0.2}, "cfg takes disable_ppo_ratio, .*, got clip_ratio"),
    ({"sequence_level_importance_ratios": True}, "needs token_level_loss=False"),
    ({"use_cispo": True, "ratio_clip_c": 3.0}, "use_cispo excludes"),
    ({"use_cispo": True, "token_level_loss": False}, "use_cispo excludes"),
    ({"ratio_clip_c": 1.0}, "ratio_clip_c must be greater than 1"),
    ({"ratio_clip_c": 3.0, "disable_ppo_ratio": True}, "disable_ppo_ratio excludes ratio_clip_c"),
    ({"reference_policy_kl_type": "k4"}, "reference_policy_kl_type must be one of"),
    ({"truncated_importance_sampling_type": "mis"}, "truncated_importance_sampling_type must be one of"),
    ({"truncated_importance_sampling_type": "tis"}, "needs use_importance_sampling_correction"),
    ({"truncated_importance_sampling_ratio": 2.0}, "needs truncated_importance_sampling_type"),
    (
        {**theirs.CASES["icepop"], "truncated_importance_sampling_ratio_min": None},
        "icepop and seq-mask-tis need truncated_importance_sampling_ratio_min",
    ),
    (
        {**theirs.CASES["icepop"], "truncated_importance_sampling_ratio_min": 3.0},
        "truncated_importance_sampling_ratio_min must be at most",
    ),
    (
        {**theirs.CASES["seq-mask-tis"], "sequence_level_importance_ratios": True, "token_level_loss": False},
        "seq-mask-tis excludes sequence_level_importance_ratios",
    ),
]


@pytest.mark.parametrize("cfg, message", REFUSED, ids=lambda value: "" if isinstance(value, str) else ",".join(value))
def test_options_that_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        nemo_rl.ClippedPGLoss(cfg)


def test_options_as_an_object_with_fields():
    """As a pydantic model iterates: its fields, extra ones too."""

    class Config:
        def __iter__(self):
            yield from {"ratio_clip_min": 0.1, "ratio_clip_max": 0.3}.items()

    assert nemo_rl.ClippedPGLoss(Config()).options.ratio_clip_max == 0.3


def test_calls_that_are_refused():
    logits, data = drawn()
    call = {"data": data, "global_valid_seqs": SEQS, "global_valid_toks": TOKS}
    with pytest.raises(ValueError, match="on_logits=True must be called with logits"):
        nemo_rl.ClippedPGLoss({}, on_logits=True)(next_token_logprobs=logits[:, 1:, 0], **call)
    with pytest.raises(ValueError, match="on_logits=False must be called with next_token_logprobs"):
        nemo_rl.NLLLoss()(logits=logits, **call)
    with pytest.raises(ValueError, match="context parallelism needs on_logits=False"):
        nemo_rl.NLLLoss(on_logits=True)(logits=logits[:, :6], **call)
    with pytest.raises(ValueError, match="dpo_loss"):
        nemo_rl.NLLLoss()(logits[:, 1:, 0], **call, dpo_loss=True)
    with pytest.raises(ValueError, match="inplace and vocab_parallel_group are of logits"):
        nemo_rl.ClippedPGLoss({}, inplace=True)
    with pytest.raises(ValueError, match="the model returns logprobs, and no logits"):
        nemo_rl.NLLLoss(True, on_logits=True)
    for make in (partial(nemo_rl.ClippedPGLoss, {}), nemo_rl.NLLLoss):
        with pytest.raises(ValueError, match="needs data"):
            make()(logits[:, 1:, 0])


# ---- What NeMo-RL reads of a loss function ----


@pytest.fixture
def interfaces(monkeypatch) -> ModuleType:
    path = ""
    for part in ("nemo_rl", "algorithms", "loss", "interfaces"):
        path = f"{path}.{part}".lstrip(".")
        module = ModuleType(path)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, path, module)
    of = {
        "LossType": ("TOKEN_LEVEL", "SEQUENCE_LEVEL"),
        "LossInputType": ("LOGIT", "LOGPROB"),
        "MetricNormalizer": ("TOKENS", "SEQUENCES", "NONE"),
    }
    for name, members in of.items():
        setattr(module, name, enum.Enum(name, members))
    return module


def test_the_attributes_that_nemo_rl_reads(interfaces):
    clipped, on_logits = nemo_rl.ClippedPGLoss({}), nemo_rl.ClippedPGLoss({"token_level_loss": False}, on_logits=True)
    assert clipped.input_type is interfaces.LossInputType.LOGPROB
    assert on_logits.input_type is interfaces.LossInputType.LOGIT
    assert clipped.loss_type is interfaces.LossType.TOKEN_LEVEL
    assert on_logits.loss_type is interfaces.LossType.SEQUENCE_LEVEL
    assert nemo_rl.NLLLoss().loss_type is interfaces.LossType.TOKEN_LEVEL
    assert clipped.reference_policy_kl_penalty == 0.01 and not clipped.use_fused_linear_logprobs
    assert nemo_rl.ClippedPGLoss({"use_kl_in_reward": True}).reference_policy_kl_penalty == 0
    by = interfaces.MetricNormalizer
    assert clipped.metric_normalizations["kl_penalty"] is by.TOKENS
    assert on_logits.metric_normalizations["loss"] is by.SEQUENCES
    for case, cfg in theirs.CASES.items():
        loss_fn = nemo_rl.ClippedPGLoss(cfg)
        assert loss_fn.metric_normalizations.keys() == numbers(loss_fn).keys() - {"gradient"}, case
    assert nemo_rl.NLLLoss().metric_normalizations.keys() == numbers(nemo_rl.NLLLoss()).keys() - {"gradient"}


@pytest.mark.skipif(installed("nemo-rl") is not None, reason="NeMo-RL is installed")
def test_without_nemo_rl():
    assert "nemo_rl" not in sys.modules
    with pytest.raises(ImportError, match="nemo_rl"):
        _ = nemo_rl.NLLLoss().input_type
