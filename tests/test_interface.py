"""Names, signatures, outputs, and the errors: their type, the argument they name and what it got."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CLIPPED_LOSSES, LOSSES, POLICY_LOSSES, RATIO_LOSSES, make

import fused_losses
from fused_losses import backends, reference
from fused_losses.objectives import OBJECTIVES

COMMON = [
    "weights",
    "reduction",
    "denominator",
    "temperature",
    "softcap",
    "logit_scale",
    "ignore_index",
    "inplace",
    "recompute",
    "backend",
    "validate",
    "return_outputs",
]

POLICY = [
    "log_ratio_clamp",
    "importance_weights",
    "entropy_coef",
    "ref_logprobs",
    "kl_coef",
    "kl_type",
    "kl_weighted_by_ratio",
]


@pytest.mark.parametrize("objective", LOSSES)
def test_signature(objective):
    parameters = inspect.signature(getattr(fused_losses, objective)).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["logits", "target_tokens", *OBJECTIVES[objective].inputs]
    assert set(COMMON) | set(OBJECTIVES[objective].columns) <= set(parameters)
    terms = set(POLICY) if objective in RATIO_LOSSES else set(POLICY) - {"log_ratio_clamp", "kl_weighted_by_ratio"}
    assert (terms if objective in POLICY_LOSSES else set()) == set(POLICY) & set(parameters)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert parameters["ignore_index"].default == -100 and parameters["backend"].default == "auto"
    assert objective in fused_losses.__all__ and getattr(fused_losses, objective).__doc__
    assert inspect.signature(getattr(reference, objective)) == inspect.signature(getattr(fused_losses, objective))


def test_outputs(backend, device):
    case = make("ppo", (2, 3), 31, device=device)
    loss, outputs = case.public(backend)(case.logits, case.target_tokens, **case.keywords, return_outputs=True)
    assert loss.dim() == 0 and loss.dtype == torch.float32
    assert outputs.logprobs.shape == (2, 3) and not outputs.logprobs.requires_grad
    losses = case.public(backend)(case.logits, case.target_tokens, **case.keywords, reduction="none")
    assert losses.shape == (2, 3) and losses.dtype == torch.float32
    logp = fused_losses.logprobs(case.logits, case.target_tokens, backend=backend)
    torch.testing.assert_close(outputs.logprobs, logp)


def z(*shape: int, dtype: torch.dtype = torch.float32, **keywords: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, **keywords)


def i(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


META = {"device": "meta"}
NAN = float("nan")

# For logits (2, 3, 5): what is wrong, the error, and a pattern that names the argument and what it got.
Error = tuple[dict[str, Any], type[Exception], str]
FOR_ALL: list[Error] = [
    ({"logits": [[1.0]]}, TypeError, "logits.*list"),
    ({"logits": z(2, 3, 5, dtype=torch.float64)}, TypeError, "logits.*float64"),
    ({"logits": i(2, 3, 5)}, TypeError, "logits.*int64"),
    ({"logits": torch.tensor(0.0)}, ValueError, r"logits.*\(\)"),
    ({"logits": z(2, 3, 0)}, ValueError, r"logits.*\(2, 3, 0\)"),
    ({"target_tokens": [0]}, TypeError, "target_tokens.*list"),
    ({"target_tokens": z(2, 3)}, TypeError, "target_tokens.*float32"),
    ({"target_tokens": i(2, 3, dtype=torch.int16)}, TypeError, "target_tokens.*int16"),
    ({"target_tokens": i(2, 4)}, ValueError, r"target_tokens.*\(2, 4\)"),
    ({"target_tokens": i(6)}, ValueError, r"target_tokens.*\(6,\)"),
    ({"target_tokens": i(2, 3, 1, 1)}, ValueError, r"target_tokens.*\(2, 3, 1, 1\)"),
    ({"target_tokens": i(2, 3).to("meta")}, ValueError, "target_tokens.*meta"),
    ({"temperature": 0}, ValueError, "temperature.*0"),
    ({"temperature": -1.0}, ValueError, "temperature.*-1"),
    ({"temperature": NAN}, ValueError, "temperature.*NaN"),
    ({"temperature": float("inf")}, ValueError, "temperature.*inf"),
    ({"temperature": "hot"}, TypeError, "temperature.*str"),
    ({"temperature": z(4)}, ValueError, r"temperature.*\(4,\)"),
    ({"temperature": i(2, 3)}, TypeError, "temperature.*int64"),
    ({"temperature": z(2, 3, **META)}, ValueError, "temperature.*meta"),
    ({"softcap": 0}, ValueError, "softcap.*0"),
    ({"softcap": -30.0}, ValueError, "softcap.*-30"),
    ({"softcap": NAN}, ValueError, "softcap.*NaN"),
    ({"softcap": float("inf")}, ValueError, "softcap.*inf"),
    ({"softcap": "high"}, TypeError, "softcap.*str"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale.*0"),
    ({"logit_scale": -1}, ValueError, "logit_scale.*-1"),
    ({"logit_scale": None}, TypeError, "logit_scale.*NoneType"),
    ({"backend": "cpp"}, ValueError, "backend.*cpp"),
    ({"backend": None}, ValueError, "backend.*None"),
]
FOR_LOSSES: list[Error] = [
    ({"reduction": "batchmean"}, ValueError, "reduction.*batchmean"),
    ({"reduction": None}, ValueError, "reduction.*None"),
    ({"reduction": "none", "denominator": 3.0}, ValueError, "denominator"),
    ({"denominator": 0}, ValueError, "denominator.*0"),
    ({"denominator": -2.0}, ValueError, "denominator.*-2"),
    ({"denominator": NAN}, ValueError, "denominator.*NaN"),
    ({"denominator": "all"}, TypeError, "denominator.*str"),
    ({"denominator": z(1)}, ValueError, r"denominator.*\(1,\)"),
    ({"denominator": torch.zeros((), **META)}, ValueError, "denominator.*meta"),
    ({"weights": z(3, 2)}, ValueError, r"weights.*\(3, 2\)"),
    ({"weights": z(1, 2, 3)}, ValueError, r"weights.*\(1, 2, 3\)"),
    ({"weights": "all"}, TypeError, "weights.*str"),
    ({"weights": NAN}, ValueError, "weights.*NaN"),
    ({"weights": z(2, 3, dtype=torch.complex64)}, TypeError, "weights.*complex64"),
    ({"weights": z(2, 3, **META)}, ValueError, "weights.*meta"),
    ({"inplace": True, "recompute": True}, ValueError, "inplace.*recompute"),
    ({"inplace": True, "reduction": "none"}, ValueError, "inplace.*none"),
    ({"inplace": True}, ValueError, "inplace.*leaf"),
]
FOR_RATIO: list[Error] = [
    ({"old_logprobs": z(4)}, ValueError, r"old_logprobs.*\(4,\)"),
    ({"old_logprobs": i(2, 3)}, TypeError, "old_logprobs.*int64"),
    ({"old_logprobs": None}, TypeError, "old_logprobs.*NoneType"),
    ({"old_logprobs": z(2, 3, **META)}, ValueError, "old_logprobs.*meta"),
    ({"log_ratio_clamp": -1.0}, ValueError, "log_ratio_clamp.*-1"),
    ({"log_ratio_clamp": NAN}, ValueError, "log_ratio_clamp.*NaN"),
    ({"log_ratio_clamp": z(4)}, ValueError, r"log_ratio_clamp.*\(4,\)"),
]
FOR_POLICY: list[Error] = [
    ({"advantages": z(2, 3, 5)}, ValueError, r"advantages.*\(2, 3, 5\)"),
    ({"advantages": [1.0]}, TypeError, "advantages.*list"),
    ({"advantages": z(2, 3, dtype=torch.bool)}, TypeError, "advantages.*bool"),
    ({"advantages": NAN}, ValueError, "advantages.*NaN"),
    ({"importance_weights": z(4)}, ValueError, r"importance_weights.*\(4,\)"),
    ({"importance_weights": NAN}, ValueError, "importance_weights.*NaN"),
    ({"importance_weights": "all"}, TypeError, "importance_weights.*str"),
    ({"entropy_coef": NAN}, ValueError, "entropy_coef.*NaN"),
    ({"entropy_coef": z(4)}, ValueError, r"entropy_coef.*\(4,\)"),
    ({"entropy_coef": None}, TypeError, "entropy_coef.*NoneType"),
    ({"kl_coef": 0.1}, ValueError, "kl_coef.*ref_logprobs.*None"),
    ({"kl_coef": NAN, "ref_logprobs": -1.0}, ValueError, "kl_coef.*NaN"),
    ({"kl_coef": z(2, 4), "ref_logprobs": -1.0}, ValueError, r"kl_coef.*\(2, 4\)"),
    ({"kl_coef": 0.1, "ref_logprobs": z(4)}, ValueError, r"ref_logprobs.*\(4,\)"),
    ({"kl_coef": 0.1, "ref_logprobs": NAN}, ValueError, "ref_logprobs.*NaN"),
    ({"kl_type": "k4"}, ValueError, "kl_type.*k3.*k4"),
    ({"kl_type": None}, ValueError, "kl_type.*None"),
]
FOR_CROSS_ENTROPY: list[Error] = [
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*-0.1"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing.*1.5"),
    ({"label_smoothing": NAN}, ValueError, "label_smoothing.*NaN"),
    ({"label_smoothing": "much"}, TypeError, "label_smoothing.*str"),
    ({"z_loss": -1e-4}, ValueError, "z_loss.*-0.0001"),
    ({"z_loss": float("inf")}, ValueError, "z_loss.*inf"),
    ({"z_loss": None}, TypeError, "z_loss.*NoneType"),
    ({"target_tokens": i(2, 4, 1)}, ValueError, r"target_tokens.*K > 0.*\(2, 4, 1\)"),
    ({"target_tokens": i(2, 3, 0)}, ValueError, r"target_tokens.*K > 0.*\(2, 3, 0\)"),
    ({"target_tokens": i(2, 3, 4), "weights": z(2, 3)}, ValueError, r"weights.*\(2, 3, 4\).*\(2, 3\)"),
]
FOR_PPO: list[Error] = [
    ({"dual_clip": 0.5}, ValueError, "dual_clip.*1.*0.5"),
    ({"dual_clip": NAN}, ValueError, "dual_clip.*NaN"),
    ({"delta": -1.0}, ValueError, "delta.*-1"),
    ({"delta": z(4)}, ValueError, r"delta.*\(4,\)"),
]
FOR_SAPO: list[Error] = [
    ({"tau_positive": 0.0}, ValueError, "tau_positive.*0"),
    ({"tau_negative": -1.0}, ValueError, "tau_negative.*-1"),
    ({"ratio_level": "batch"}, ValueError, "ratio_level.*batch"),
    ({"sequence_ratio_mask": z(2, 3)}, ValueError, "sequence_ratio_mask.*ratio_level"),
]
FOR_CLIPPED: list[Error] = [
    ({"clip_low_threshold": 1.3}, ValueError, "clip_low_threshold.*1.3.*1.2"),
    ({"clip_high_threshold": 0.5}, ValueError, "clip_high_threshold.*0.8.*0.5"),
    ({"clip_low_threshold": -0.1}, ValueError, "clip_low_threshold.*-0.1"),
    ({"clip_high_threshold": NAN}, ValueError, "clip_high_threshold.*NaN"),
    ({"clip_low_threshold": z(2)}, ValueError, r"clip_low_threshold.*\(2,\)"),
    ({"clip_high_threshold": "wide"}, TypeError, "clip_high_threshold.*str"),
]
FOR_DPPO: list[Error] = [
    ({"divergence_low": -0.1}, ValueError, "divergence_low.*-0.1"),
    ({"divergence_high": NAN}, ValueError, "divergence_high.*NaN"),
    ({"divergence_high": z(4)}, ValueError, r"divergence_high.*\(4,\)"),
    ({"divergence_low": None}, TypeError, "divergence_low.*NoneType"),
    ({"ratio_cap": -1.0}, ValueError, "ratio_cap.*-1"),
    ({"ratio_cap": NAN}, ValueError, "ratio_cap.*NaN"),
]
FOR_DRO: list[Error] = [
    ({"beta": -1.0}, ValueError, "beta.*-1"),
    ({"beta": NAN}, ValueError, "beta.*NaN"),
    ({"beta": None}, TypeError, "beta.*NoneType"),
]
ERRORS = [
    (objective, *error)
    for objectives, errors in [
        (OBJECTIVES, FOR_ALL),
        (LOSSES, FOR_LOSSES),
        (POLICY_LOSSES, FOR_POLICY),
        (RATIO_LOSSES, FOR_RATIO),
        (CLIPPED_LOSSES, FOR_CLIPPED),
        (("dro",), FOR_DRO),
        (("cross_entropy",), FOR_CROSS_ENTROPY),
        (("ppo",), FOR_PPO),
        (("sapo",), FOR_SAPO),
        (("dppo_tv", "dppo_kl"), FOR_DPPO),
    ]
    for objective in objectives
    for error in errors
]


@pytest.mark.parametrize("objective, wrong, error, message", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_error(objective, wrong, error, message):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    before = logits.detach().clone()
    given = {name: z(2, 3) for name in OBJECTIVES[objective].inputs}
    given = {"logits": logits, "target_tokens": i(2, 3), "backend": "eager"} | given | wrong
    with pytest.raises(error, match=f"(?s){message}"):
        getattr(fused_losses, objective)(**given)
    assert torch.equal(logits.detach(), before)


VALIDATED: list[tuple[str, dict[str, Any], str]] = [
    ("cross_entropy", {"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature"),
    ("cross_entropy", {"temperature": torch.tensor([1.0, NAN, 1.0])}, "temperature"),
    ("ppo", {"clip_low_threshold": torch.tensor([0.8, -1.0, 0.8])}, "clip_low_threshold"),
    ("ppo", {"clip_high_threshold": torch.tensor([1.2, NAN, 1.2])}, "clip_high_threshold"),
    ("cispo", {"clip_low_threshold": torch.tensor([0.8, 1.3, 0.8])}, "clip_low_threshold"),
    ("dro", {"beta": torch.tensor(-0.1)}, "beta"),
]


@pytest.mark.parametrize("objective, wrong, message", VALIDATED, ids=lambda v: v if isinstance(v, str) else "")
def test_validate(backend, device, objective, wrong, message):
    """What only the device knows; a call that is right passes."""
    case = make(objective, (3,), 31, device=device)
    loss = case.public(backend)(case.logits, case.target_tokens, **case.keywords, validate=True)
    assert torch.isfinite(loss)
    case = case.having(**{k: v.to(device) for k, v in wrong.items()})
    for logits in (case.logits, case.logits.clone().requires_grad_()):
        with pytest.raises(ValueError, match=message):
            case.public(backend)(logits, case.target_tokens, **case.keywords, validate=True)


def test_a_named_backend_never_falls_back():
    logits, target = torch.randn(2, 5), torch.tensor([0, 1])
    for name in backends.NAMES:
        reason = backends.unusable(name, logits.device)
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"(?s){name}.*cpu"):
                fused_losses.cross_entropy(logits, target, backend=name)
            assert len(reason) > 10


def test_auto_chooses_the_fastest_that_works():
    for device, order in {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}.items():
        if device == "cuda" and not torch.cuda.is_available():
            continue
        device = torch.device(device)
        first = next(name for name in order if backends.unusable(name, device) is None)
        assert backends.choose(device) == first
        assert backends.resolve("auto", device) is backends.resolve(first, device)


def test_auto_says_where_it_has_nothing_but_eager(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(backends.named("cpu"), "cause", "it was not built")
    resolve = backends.resolve.__wrapped__  # what was resolved before is kept
    with pytest.warns(UserWarning, match="eager.* on cpu.*backend='cpu' can't run: it was not built"):
        assert resolve("auto", cpu) is backends.named("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("eager", cpu)  # as asked for
        resolve("auto", torch.device("meta"))


def test_no_environment_variable_is_read():
    """... that could change what is computed, in a file of ours: not in Python, not in C++."""
    root = Path(fused_losses.__file__).parents[1]
    sources = [f for folder in ("fused_losses", "csrc", "triton_kernels") for f in (root / folder).rglob("*.[pch]*")]
    assert len(sources) > 10
    reading = [f.name for f in sources if f.suffix not in (".pyc", ".so") and "environ" in f.read_text()]
    reading += [f.name for f in sources if f.suffix not in (".pyc", ".so") and "getenv" in f.read_text()]
    assert set(reading) <= {"__main__.py"}  # which reports on the installation


def test_command_line():
    """It knows every loss, and what runs here runs right."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # which takes its time
    command = [sys.executable, "-m", "fused_losses", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = [b["self_test"] for d in json.loads(done.stdout)["devices"] for b in d["backends"].values() if b["usable"]]
    assert tested and all(max(test["error_over_allowed"].values()) > 0 for test in tested)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}])
def test_no_second_derivative_passes_for_a_constant(options):
    """Nor where another summand of the loss has one, and the upstream gradient so no graph."""
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.zeros(3).long()
    loss = fused_losses.cross_entropy(logits, targets, **options).sum() + (logits**3).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_no_second_derivative_of_a_penalty_on_logprobs():
    logprobs = (torch.rand(3) - 2).requires_grad_()
    loss = fused_losses.on_logprobs.ppo(logprobs, -0.5, 1.0, kl_coef=1.0, ref_logprobs=-1.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logprobs, create_graph=True)
