"""Errors through an adapter name what the framework's user gave, in the framework's words."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from fused_losses.adapters import (
    megatron,
    ms_swift,
    nemo_rl,
    openrlhf,
    prime_rl,
    skyrl,
    tinker,
    transformers,
    trl,
    verl,
)
from fused_losses.adapters._names import called, in_words

B, T, H, V = 2, 5, 4, 11
FLOAT_LABELS = r"{} must be int64 or int32, got torch.float32"


def logits():
    return torch.zeros(B, T, V)


def labels(dtype=torch.float32):
    return torch.zeros(B, T, dtype=dtype)


def tokens(**given):
    return torch.zeros(B, T) if not given else {name: torch.zeros(B, T) for name in given} | given


class OneRank:
    """As a group is asked."""

    def size(self):
        return 1

    def rank(self):
        return 0


# ---- Each adapter ----


def of_verl(loss="vanilla", given=None, **config):
    batch = dict.fromkeys(("old_log_prob", "log_prob", "advantages"), tokens()) | {"response_mask": torch.ones(B, T)}
    options = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.2, "tau_pos": 1.0, "tau_neg": 1.05}
    settings = SimpleNamespace(**options | config, global_batch_info={})
    settings.get = lambda name, default: config.get(name, default)
    mode = {"loss_agg_mode": "seq-mean-token-mean"} if loss in ("sapo", "geo_mean") else {}
    getattr(verl, loss)(**{**batch, **(given or {})}, config=settings, **mode)


def of_skyrl(loss="regular", given=None, **config):
    batch = {name: tokens() for name in ("log_probs", "old_log_probs", "advantages")}
    options = {"eps_clip_low": 0.2, "eps_clip_high": 0.2, "clip_ratio_c": 3.0}
    options["sapo"] = SimpleNamespace(tau_pos=-1.0, tau_neg=1.0)
    options["cispo"] = SimpleNamespace(cispo_eps_clip_low=0.0, cispo_eps_clip_high=-0.5, cispo_anchor="old")
    getattr(skyrl, loss)(**batch | (given or {}), config=SimpleNamespace(**options | config))


def of_openrlhf(given=None, **options):
    self = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None, "token_level_loss": True}
    self |= {"policy_loss_type": "ppo", "is_correction_level": "off"}
    batch = {name: tokens() for name in ("log_probs", "old_log_probs", "advantages")}
    openrlhf.policy_loss(SimpleNamespace(**self | options), **batch | (given or {}))


def of_nemo_rl(next_token_logprobs=None, loss=None, **given):
    names = ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs")
    data = {name: tokens() for name in names} | {"token_mask": torch.ones(B, T), "sample_mask": torch.ones(B)}
    count = {"global_valid_seqs": torch.tensor(2.0), "global_valid_toks": torch.tensor(9.0)}
    count |= {name: given.pop(name) for name in tuple(given) if name in count}
    x = torch.zeros(B, T - 1) if next_token_logprobs is None else next_token_logprobs
    (loss or nemo_rl.ClippedPGLoss({}))(x, data | given, **count)


def of_prime_rl(loss="ppo", given=None, **options):
    record = {name: torch.zeros(T) for name in ("trainer_logprobs", "inference_logprobs", "advantages")}
    record |= {"ref_logprobs": None, "loss_mask": torch.ones(T, dtype=torch.bool), "loss_weights": None}
    getattr(prime_rl, loss)(SimpleNamespace(**record | (given or {})), **options)


def of_tinker(**given):
    inputs = {"target_tokens": torch.zeros(T, dtype=torch.long), "logprobs": torch.zeros(T), "advantages": 1.0}
    tinker.compute("ppo", torch.zeros(T, V), {**inputs, "advantages": torch.zeros(T), **given})


def of_ms_swift(**given):
    made = ms_swift.CrossEntropyLoss(SimpleNamespace(), SimpleNamespace())
    made(SimpleNamespace(logits=logits()), given.pop("labels", labels(torch.long)), **given)


def of_head(weight=None, hidden=None, targets=None, chunk_size=8, softcap=None):
    hidden = torch.zeros(T, H) if hidden is None else hidden
    targets = torch.zeros(T, dtype=torch.long) if targets is None else targets
    weight = torch.zeros(V, H) if weight is None else weight
    trl.ChunkedLogProb().apply(hidden, weight, None, targets, 1.0, chunk_size, softcap)


WRONG = torch.zeros(B, T + 1)
MISSHAPEN = r"{} must broadcast to the tokens' shape"
FUSED_HEAD = SimpleNamespace(chunk_size=512)
CASES = {
    "transformers labels": (
        lambda: transformers.causal_lm_loss(logits(), labels(), V),
        TypeError,
        FLOAT_LABELS.format("shifted labels"),
    ),
    "transformers shift_labels": (
        lambda: transformers.causal_lm_loss(logits(), None, V, shift_labels=labels()),
        TypeError,
        FLOAT_LABELS.format("shift_labels"),
    ),
    "transformers num_items_in_batch": (
        lambda: transformers.causal_lm_loss(logits(), labels(torch.long), V, "7"),
        TypeError,
        "num_items_in_batch must be a number or a tensor, got str",
    ),
    "transformers, of a Trainer": (
        lambda: transformers.compute_loss_func({"logits": logits()}, labels(torch.long), [7]),
        TypeError,
        "num_items_in_batch must be a number or a tensor, got list",
    ),
    "trl targets": (lambda: of_head(targets=torch.zeros(T)), TypeError, FLOAT_LABELS.format("targets")),
    "trl chunk_size": (lambda: of_head(chunk_size=-1), ValueError, r"16384 \* chunk_size must be greater than 0"),
    "trl softcap": (lambda: of_head(softcap=-1.0), ValueError, "final_logit_softcapping must be greater than 0"),
    "trl index": (lambda: trl.selective_log_softmax(logits(), labels()), TypeError, FLOAT_LABELS.format("index")),
    "trl index of several": (
        lambda: trl.selective_log_softmax(logits(), torch.zeros(B, T, 3)),
        TypeError,
        FLOAT_LABELS.format("index"),
    ),
    "trl index, entropy": (
        lambda: trl.selective_log_softmax_and_entropy(logits(), labels()),
        TypeError,
        FLOAT_LABELS.format("index"),
    ),
    "verl labels": (lambda: verl.logprobs_from_logits(logits(), labels()), TypeError, FLOAT_LABELS.format("labels")),
    "verl head": (
        lambda: verl.fused_linear_for_ppo(FUSED_HEAD, torch.zeros(T, H), torch.zeros(V, H), torch.zeros(T)),
        TypeError,
        FLOAT_LABELS.format("input_ids"),
    ),
    "verl hidden_states": (
        lambda: verl.fused_linear_for_ppo(FUSED_HEAD, torch.zeros(T, H + 1), torch.zeros(V, H), torch.zeros(T)),
        ValueError,
        r"hidden_states must have shape \(..., H\) with the H = 4 of vocab_weights",
    ),
    "verl log_prob": (
        lambda: of_verl(given={"log_prob": torch.zeros(B, T, dtype=torch.long)}),
        TypeError,
        "log_prob must be float32, .*got torch.int64",
    ),
    "verl old_log_prob": (
        lambda: of_verl(given={"old_log_prob": WRONG}),
        ValueError,
        MISSHAPEN.format("old_log_prob"),
    ),
    "verl response_mask": (
        lambda: of_verl(given={"response_mask": torch.ones(B, T + 1)}),
        ValueError,
        MISSHAPEN.format("response_mask"),
    ),
    "verl rollout_is_weights": (
        lambda: of_verl(given={"rollout_is_weights": WRONG}),
        ValueError,
        MISSHAPEN.format("rollout_is_weights"),
    ),
    "verl clip_ratio_c": (
        lambda: of_verl(clip_ratio_c=0.5),
        ValueError,
        "clip_ratio_c must be at least 1, got 0.5",
    ),
    "verl clip ratios": (
        lambda: of_verl(clip_ratio_low=-0.5, clip_ratio_high=-0.9),
        ValueError,
        r"1 - clip_ratio_low \(or clip_ratio\) must not exceed 1 \+ clip_ratio_high \(or clip_ratio\), got 1.5 > 0.09",
    ),
    "verl geo_mean": (
        lambda: of_verl("geo_mean", clip_ratio_high=float("nan")),
        ValueError,
        r"exp\(clip_ratio_high \(or clip_ratio\)\) must not be NaN",
    ),
    "verl sapo": (lambda: of_verl("sapo", tau_neg=-1.0), ValueError, "tau_neg must be greater than 0"),
    "verl dppo": (lambda: of_verl("dppo_tv", clip_ratio_c=-1.0), ValueError, "clip_ratio_c must be at least 0"),
    "skyrl labels": (
        lambda: skyrl.logprobs_from_logits(logits(), labels()),
        TypeError,
        FLOAT_LABELS.format("labels"),
    ),
    "skyrl old_log_probs": (
        lambda: of_skyrl(given={"old_log_probs": WRONG}),
        ValueError,
        MISSHAPEN.format("old_log_probs"),
    ),
    "skyrl loss_mask": (
        lambda: of_skyrl("gspo", given={"loss_mask": torch.ones(B, T + 1)}),
        ValueError,
        MISSHAPEN.format("loss_mask"),
    ),
    "skyrl clip_ratio_c": (lambda: of_skyrl("dual_clip", clip_ratio_c=0.5), ValueError, "clip_ratio_c must be"),
    "skyrl sapo": (lambda: of_skyrl("sapo"), ValueError, "sapo.tau_pos must be greater than 0"),
    "skyrl cispo": (
        lambda: of_skyrl("cispo"),
        ValueError,
        r"1 - cispo.cispo_eps_clip_low must not exceed 1 \+ cispo.cispo_eps_clip_high, got 1.0 > 0.5",
    ),
    "ms_swift labels": (lambda: of_ms_swift(labels=labels()), TypeError, FLOAT_LABELS.format("labels")),
    "ms_swift num_items_in_batch": (
        lambda: of_ms_swift(num_items_in_batch=torch.ones(2)),
        ValueError,
        "num_items_in_batch must be a number or a 0-d tensor",
    ),
    "ms_swift loss_scale": (lambda: of_ms_swift(loss_scale="2"), TypeError, "loss_scale must be a number or a tensor"),
    "ms_swift index": (
        lambda: ms_swift.selective_log_softmax(logits(), labels()),
        TypeError,
        FLOAT_LABELS.format("index"),
    ),
    "openrlhf labels": (
        lambda: openrlhf.log_probs_from_logits(logits(), labels()),
        TypeError,
        FLOAT_LABELS.format("labels"),
    ),
    "openrlhf old_log_probs": (
        lambda: of_openrlhf(given={"old_log_probs": WRONG}),
        ValueError,
        MISSHAPEN.format("old_log_probs"),
    ),
    "openrlhf action_mask": (
        lambda: of_openrlhf(given={"action_mask": torch.ones(B, T + 1)}),
        ValueError,
        MISSHAPEN.format("action_mask"),
    ),
    "openrlhf clip_eps": (
        lambda: of_openrlhf(clip_eps_low=-0.5),
        ValueError,
        r"1 - clip_eps_low must not exceed 1 \+ clip_eps_high, got 1.5 > 1.2",
    ),
    "openrlhf gspo, corrected": (
        lambda: of_openrlhf(given={"rollout_log_probs": WRONG}, policy_loss_type="gspo", is_correction_level="token"),
        ValueError,
        MISSHAPEN.format("rollout_log_probs"),
    ),
    "megatron target": (
        lambda: megatron.fused_vocab_parallel_cross_entropy(logits(), labels(), OneRank()),
        TypeError,
        FLOAT_LABELS.format("target"),
    ),
    "megatron vocab_parallel_logits": (
        lambda: megatron.vocab_parallel_cross_entropy(logits().double(), labels(torch.long), 0.0, OneRank()),
        TypeError,
        "vocab_parallel_logits must be float32",
    ),
    "megatron label_smoothing": (
        lambda: megatron.vocab_parallel_cross_entropy(logits(), labels(torch.long), 0.99, OneRank()),
        ValueError,
        r"label_smoothing \* V / \(V - 1\) must be at most 1, got 1.089",
    ),
    "megatron, of Transformer Engine": (
        lambda: megatron.te_parallel_cross_entropy(logits(), labels(), OneRank()),
        TypeError,
        FLOAT_LABELS.format("labels"),
    ),
    "nemo_rl logprobs": (
        lambda: of_nemo_rl(torch.zeros(B, T - 1).long()),
        TypeError,
        "next_token_logprobs must be float32, .*got torch.int64",
    ),
    "nemo_rl advantages": (
        lambda: of_nemo_rl(advantages=tokens().long()),
        TypeError,
        "advantages must be a float tensor, got torch.int64",
    ),
    "nemo_rl prev_logprobs": (
        lambda: of_nemo_rl(prev_logprobs=tokens().long()),
        TypeError,
        "prev_logprobs must be a float tensor, got torch.int64",
    ),
    "nemo_rl NLL": (
        lambda: of_nemo_rl(loss=nemo_rl.NLLLoss(), global_valid_toks=torch.ones(2)),
        ValueError,
        r"global_valid_toks or global_valid_seqs must be a number or a 0-d tensor, got shape \(2,\)",
    ),
    "prime_rl inference_logprobs": (
        lambda: of_prime_rl(given={"inference_logprobs": torch.zeros(T + 1)}),
        ValueError,
        MISSHAPEN.format("inference_logprobs"),
    ),
    "prime_rl trainer_logprobs": (
        lambda: of_prime_rl("gspo", given={"trainer_logprobs": torch.zeros(T).long()}),
        TypeError,
        "trainer_logprobs must be float32",
    ),
    "prime_rl, options are ours": (
        lambda: of_prime_rl(clip_low_threshold=-1.0),
        ValueError,
        "clip_low_threshold must be at least 0",
    ),
    "prime_rl ipo": (lambda: of_prime_rl("ipo", kl_tau=float("nan")), ValueError, r"2 \* kl_tau must not be NaN"),
    "prime_rl icepop": (
        lambda: of_prime_rl("icepop", ratio_low=2.0, ratio_high=1.0),
        ValueError,
        "ratio_low must .* ratio_high",
    ),
    "prime_rl head": (
        lambda: prime_rl.fused_output_linear(
            SimpleNamespace(weight=torch.zeros(V, H), chunk_size=8), torch.zeros(B, T, H), labels(), tokens() + 1
        ),
        TypeError,
        FLOAT_LABELS.format("labels"),
    ),
    "tinker logprobs": (lambda: of_tinker(logprobs=torch.zeros(T + 1)), ValueError, MISSHAPEN.format("logprobs")),
    "tinker, a key that is not Tinker's": (
        lambda: of_tinker(old_logprobs=torch.zeros(T)),
        ValueError,
        "loss_fn_inputs of 'ppo' takes .*, got old_logprobs",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_an_adapter_speaks_of_the_frameworks_arguments(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_torchtitan():
    pytest.importorskip("torchtitan", reason="tests/oracles.txt")
    pytest.importorskip("tyro", reason="tests/oracles.txt")
    theirs = importlib.import_module("fused_losses.adapters.torchtitan")
    cross_entropy = theirs.CrossEntropyLoss.Config().build()
    with pytest.raises(TypeError, match=f"^{FLOAT_LABELS.format('labels')}"):
        cross_entropy(logits(), labels())
    with pytest.raises(ValueError, match=r"^pred must have shape \(..., V\) with V > 0, got \(2, 5, 0\)"):
        cross_entropy(torch.zeros(B, T, 0), labels(torch.long))
    with pytest.raises(ValueError, match=r"^global_valid_tokens must be a number or a 0-d tensor"):
        cross_entropy(logits(), labels(torch.long), torch.ones(2))
    rollout = {"generator_logprobs": tokens(), "loss_mask": tokens() == 0, "advantages": tokens()}
    for config, low, high in (
        (theirs.DAPOLoss.Config(ratio_clip_high=-0.5), "1 - ratio_clip_low", r"1 \+ ratio_clip_high"),
        (theirs.GRPOLoss.Config(clip_eps=-0.5), "1 - clip_eps", r"1 \+ clip_eps"),
    ):
        with pytest.raises(ValueError, match=f"^{low} must not exceed {high}, got"):
            config.build()(logits(), labels(torch.long), **rollout)
        with pytest.raises(TypeError, match=r"^generator_logprobs must be a float tensor"):
            wrong = rollout | {"generator_logprobs": tokens().long()}
            config.build()(logits(), labels(torch.long), **wrong)


def test_axolotl():
    pytest.importorskip("transformers")
    axolotl = importlib.import_module("fused_losses.adapters.axolotl")
    runs = importlib.import_module("fused_losses.adapters.comparisons.transformers")
    with pytest.raises(ValueError, match=r"lm_head can't be fused: fused_losses_chunk_bytes must be greater than 0"):
        axolotl.put({"fused_losses_chunk_bytes": 0}, runs.model_of("Llama"))


# ---- The names ----


def test_an_error_keeps_its_type_and_the_original():
    names = {"old_logprobs": "logprobs", "logprobs": "here"}
    for kind in (TypeError, ValueError, RuntimeError, NotImplementedError):
        original = kind("logprobs, old_logprobs and logprobs_of")
        with pytest.raises(kind, match=r"^here, logprobs and logprobs_of$") as raised, called(names):
            raise original
        assert raised.type is kind and raised.value.__cause__ is original


@pytest.mark.parametrize("error", [KeyError("logprobs"), ValueError("advantages"), torch.OutOfMemoryError("logprobs")])
def test_what_is_not_of_them_is_left_alone(error):
    with pytest.raises(type(error)) as raised, called({"logprobs": "x"}):
        raise error
    assert raised.value is error and error.__cause__ is None


def test_a_function_keeps_its_signature_and_name():
    @in_words({"logprobs": "x"})
    def function(logprobs, *, other=1):
        """What it does."""
        raise ValueError(f"logprobs must be {other}")

    assert function.__name__ == "function" and function.__doc__ == "What it does."
    assert list(inspect.signature(function).parameters) == ["logprobs", "other"]
    with pytest.raises(ValueError, match=r"^x must be 2$"):
        function(None, other=2)


class Words:
    names: ClassVar = {"logprobs": "x"}

    @in_words(names)
    def method(self, logprobs):
        with called(self.names):
            return logprobs * 2


def test_compiled_in_one_graph():
    compiled = torch.compile(lambda logprobs: Words().method(logprobs), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
