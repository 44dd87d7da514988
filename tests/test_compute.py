"""Losses by Tinker's names: numbers against its documented formulas, written out here once more, and its own types."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import HAS_GPU, NEEDS_GPU

import fused_losses

N, V = 14, 31
# where inputs are brought to: no matter of the backend
device_of_logits = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason=NEEDS_GPU))]
)
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
DEFAULTS: dict[str, dict[str, float]] = {  # Tinker's; it documents none for dro and gspo, which have the library's own
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": CLIP,
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.1},
    "gspo": {},
}
POLICY = ("importance_sampling", "ppo", "cispo", "dro", "gspo")
CLIPPED = ("ppo", "cispo", "gspo")
CONFIGS: dict[str, dict[str, float]] = {  # other than the defaults
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0},
    "cispo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "dro": {"beta": 0.7},
    "gspo": CLIP,
}
# log(p / q) per token: ratios 0.14 to 7.4, none near a bound; over 14 tokens each with an advantage of either sign
LOG_RATIOS = (-2.0, -0.5, -0.1, 0.05, 0.12, 0.5, 2.0)


def formula(name: str, x: torch.Tensor, inputs: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """The loss of target logprobs x, as Tinker's documentation has it; ``weights`` are 1 there but in cross_entropy."""
    weights = inputs.get("weights", torch.ones_like(x))
    if name == "cross_entropy":
        return -(x * weights).sum()
    q, advantages = inputs["logprobs"], inputs["advantages"]
    low, high = (torch.as_tensor(inputs.get(key, config.get(key, torch.nan)), dtype=x.dtype) for key in CLIP)
    if name == "importance_sampling":
        objective = torch.exp(x - q) * advantages
    elif name == "ppo":
        ratio = torch.exp(x - q)
        objective = torch.min(ratio * advantages, torch.clamp(ratio, low, high) * advantages)
    elif name == "cispo":
        objective = torch.clamp(torch.exp(x - q), low, high).detach() * x * advantages
    elif name == "dro":
        objective = x * advantages - 0.5 * config["beta"] * (x - q) ** 2
    else:
        mean = (x.detach() - q)[inputs["sequence_ratio_mask"] != 0].mean()
        ratio = torch.exp(mean + x - x.detach())
        objective = torch.min(ratio * advantages, torch.clamp(ratio, low, high) * advantages)
    return -(objective * weights).sum()


def make(name: str, leading: tuple[int, ...] = (N,)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and loss_fn_inputs, with prompt tokens that nothing marks but a weight or an advantage of 0."""
    torch.manual_seed(0)
    logits = torch.randn(*leading, V)
    target = torch.randint(V, leading)
    if name == "cross_entropy":
        weights = (torch.arange(target.numel()) >= 3).float().view(leading)
        return logits, {"target_tokens": target, "weights": weights}
    x = torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
    log_ratios = torch.tensor(list(itertools.islice(itertools.cycle(LOG_RATIOS), target.numel()))).view(leading)
    advantages = torch.randn(leading).abs() * torch.where(torch.arange(target.numel()) < 7, 1.0, -1.0).view(leading)
    advantages.view(-1)[[0, 9]] = 0.0
    inputs = {"target_tokens": target, "logprobs": x - log_ratios, "advantages": advantages}
    if name == "gspo":
        inputs["sequence_ratio_mask"] = (torch.arange(target.numel()) > 1).float().view(leading)
    return logits, inputs


def moved(inputs: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in inputs.items()}


def check(
    name: str, logits: torch.Tensor, inputs: dict[str, Any], config: dict[str, Any] | None, backend: str, device: Any
) -> fused_losses.ComputeResult:
    """Loss, logprobs and gradient against the formula in float64, of defaults where config is None."""
    leaf = logits.to(device, copy=True).requires_grad_()
    result = fused_losses.compute(name, leaf, moved(inputs, device), config, backend=backend)
    result.loss.backward()

    double = logits.double().requires_grad_()
    target = inputs["target_tokens"]
    indices = target if target.dim() == logits.dim() else target[..., None]
    x = torch.log_softmax(double, -1).gather(-1, indices).view(target.shape)
    exact = {k: v.double() for k, v in inputs.items() if k != "target_tokens"}
    loss = formula(name, x, exact, DEFAULTS[name] if config is None else config)
    loss.backward()

    assert result.loss.shape == () and result.loss.dtype == torch.float32 and result.loss.device == leaf.device
    torch.testing.assert_close(result.loss.double().cpu(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double().cpu(), double.grad, rtol=1e-4, atol=1e-6)
    assert result.logprobs.shape == target.shape and not result.logprobs.requires_grad
    torch.testing.assert_close(result.logprobs.double().cpu(), x.detach(), rtol=1e-5, atol=1e-5)
    assert list(result.metrics) == ["loss:sum"] and not result.metrics["loss:sum"].requires_grad
    assert torch.equal(result.metrics["loss:sum"], result.loss.detach())
    return result


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "gspo"])
def test_defaults(name, backend, device):
    check(name, *make(name), None, backend, device)


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name]])
def test_config(name, backend, device):
    logits, inputs = make(name)
    check(name, logits, inputs, CONFIGS[name], backend, device)
    if name in POLICY:  # weights mask what an advantage of 0 does not: dro's quadratic term
        inputs["weights"] = (torch.arange(N) % 3 != 0).float()
        if name == "gspo":
            inputs["sequence_ratio_mask"] *= inputs["weights"]
        result = check(name, logits, inputs, CONFIGS[name], backend, device)
        unweighted = {k: v for k, v in inputs.items() if k != "weights"}
        assert result.loss != fused_losses.compute(name, logits, unweighted, CONFIGS[name], backend="eager").loss


@pytest.mark.parametrize("log_ratio, clipped", [(-1.0, False), (0.05, False), (1.0, True)])
def test_gspo_clips_a_sequence(log_ratio, clipped, backend, device):
    logits, inputs = make("gspo")
    inputs["logprobs"] -= log_ratio - torch.tensor(LOG_RATIOS * 2)[2:].mean()
    inputs["advantages"] = inputs["advantages"].abs()
    check("gspo", logits, inputs, CLIP, backend, device)
    logits = logits.to(device).requires_grad_()
    fused_losses.compute("gspo", logits, moved(inputs, device), CLIP, backend=backend).loss.backward()
    assert (logits.grad == 0).all() == clipped


@pytest.mark.parametrize("name", CLIPPED)
def test_thresholds_per_token(name, backend, device):
    logits, inputs = make(name)
    inputs["clip_low_threshold"] = torch.where(torch.arange(N) % 2 == 0, 0.0, 0.8)
    inputs["clip_high_threshold"] = torch.where(torch.arange(N) % 3 == 0, 1.2, 5.0)
    if name == "gspo":  # within the bounds of some tokens only
        inputs["logprobs"] += 0.5 + torch.tensor(LOG_RATIOS * 2)[2:].mean()
    check(name, logits, inputs, {}, backend, device)
    one = {k: v for k, v in inputs.items() if k != "clip_low_threshold"}
    check(name, logits, one, {"clip_low_threshold": 0.3}, backend, device)


def test_several_targets_per_token(backend, device):
    logits, _ = make("cross_entropy")
    target, weights = torch.randint(V, (N, 3)), torch.randn(N, 3)
    weights[2] = 0.0
    weights[5, 1] = 0.0
    check("cross_entropy", logits, {"target_tokens": target, "weights": weights}, None, backend, device)


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "gspo"])
def test_several_sequences(name, backend, device):
    check(name, *make(name, (2, N // 2)), None, backend, device)


def test_cross_entropy_is_the_backward_of_any_loss_of_the_logprobs(backend, device):
    """What Tinker's forward_backward_custom relies on: weights of any sign, the negative gradient by the logprobs."""
    logits, inputs = make("cross_entropy")
    logits, target = logits.to(device).requires_grad_(), inputs["target_tokens"].to(device)
    logprobs = torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0]
    loss = torch.tanh(logprobs[:5] - logprobs[5:10]).sum() + (logprobs**2).mean()
    (weights,) = torch.autograd.grad(-loss, logprobs, retain_graph=True)
    assert (weights > 0).any() and (weights < 0).any()
    (expected,) = torch.autograd.grad(loss, logits)
    surrogate = {"target_tokens": target, "weights": weights}
    fused_losses.compute("cross_entropy", logits, surrogate, backend=backend).loss.backward()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)


def as_lists(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {k: v.tolist() for k, v in inputs.items()}


def as_arrays(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of the dtypes that come of themselves, strided, and not writable."""
    arrays = {k: v.numpy().astype(np.int32 if k == "target_tokens" else np.float64) for k, v in inputs.items()}
    arrays = {k: np.flip(np.flip(v, 0).copy(), 0) for k, v in arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def as_tensor_data(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    tinker = pytest.importorskip("tinker")
    return {k: tinker.TensorData.from_torch(v) for k, v in inputs.items()}


def as_datum(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    tinker = pytest.importorskip("tinker")
    prompt = tinker.ModelInput.from_ints(list(range(N)))
    return tinker.Datum(model_input=prompt, loss_fn_inputs=inputs).loss_fn_inputs


@pytest.mark.filterwarnings("error")
@device_of_logits
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("form", [as_lists, as_arrays, as_tensor_data, as_datum])
def test_forms_of_inputs(name, form, device):
    """Numbers from anywhere are the same numbers, on the device of the logits and whatever the dtype of those."""
    logits, inputs = make(name)
    logits = logits.to(device, torch.bfloat16)
    expected = fused_losses.compute(name, logits, moved(inputs, device), CONFIGS[name])
    actual = fused_losses.compute(name, logits, form(inputs), CONFIGS[name])
    assert torch.equal(actual.loss, expected.loss) and torch.equal(actual.logprobs, expected.logprobs)


@device_of_logits
def test_integers_for_floats(device):
    """Advantages and weights of a list are often whole numbers."""
    logits, inputs = make("ppo")
    inputs["advantages"] = inputs["advantages"].sign()
    inputs["weights"] = inputs["advantages"].abs()
    expected = fused_losses.compute("ppo", logits.to(device), moved(inputs, device))
    whole = inputs | {key: inputs[key].long() for key in ("advantages", "weights")}
    actual = fused_losses.compute("ppo", logits.to(device), as_lists(whole))
    assert torch.equal(actual.loss, expected.loss)


def test_no_tokens():
    result = fused_losses.compute("ppo", torch.randn(0, V), {"target_tokens": [], "logprobs": [], "advantages": []})
    assert result.loss == 0 and result.logprobs.shape == (0,)


@pytest.mark.parametrize("name", DEFAULTS)
def test_masked_tokens_are_exactly_zero(name, backend, device):
    """... whatever their rows hold: by weight, and where that is Tinker's way, by an advantage of 0."""
    logits, inputs = make(name)
    logits[4] = torch.nan
    inputs["weights"] = torch.ones(N)
    inputs["weights"][4] = 0.0
    if name == "gspo":
        inputs["sequence_ratio_mask"][4] = 0.0
    logits = logits.to(device).requires_grad_()
    result = fused_losses.compute(name, logits, moved(inputs, device), CONFIGS[name], backend=backend)
    result.loss.backward()
    assert torch.isfinite(result.loss) and torch.isfinite(logits.grad).all() and (logits.grad[4] == 0).all()
    if name in ("importance_sampling", "ppo", "cispo"):
        assert (logits.grad[[0, 9]] == 0).all()


@pytest.mark.parametrize("name", DEFAULTS)
def test_loss_fn(name, backend, device):
    """The library's function with Tinker's defaults: the same call gives the same numbers, keywords still work."""
    logits, inputs = make(name)
    logits = logits.to(device)
    arguments = [v.to(device) for k, v in inputs.items() if k not in ("weights", "sequence_ratio_mask")]
    loss = fused_losses.loss_fn(name)(logits, *arguments, backend=backend)
    keywords = {"reduction": "sum"} | (DEFAULTS[name] if name != "dro" else {})
    assert torch.equal(loss, getattr(fused_losses, name)(logits, *arguments, **keywords, backend=backend))
    losses = fused_losses.loss_fn(name)(logits, *arguments, reduction="none", backend=backend)
    assert losses.shape == (N,)
    parameters = inspect.signature(fused_losses.loss_fn(name)).parameters
    for key, value in keywords.items():
        assert parameters[key].default == value


def test_no_gradient_wanted(backend, device):
    logits, inputs = make("ppo")
    result = fused_losses.compute("ppo", logits.to(device), moved(inputs, device), backend=backend)
    assert not result.loss.requires_grad and torch.isfinite(result.loss)


@pytest.mark.skipif(not HAS_GPU, reason=NEEDS_GPU)
def test_nothing_waits_for_the_device():
    logits, inputs = make("ppo")
    logits = logits.cuda().requires_grad_()
    for mode in ("default", "error"):  # the first call may build and allocate
        torch.cuda.set_sync_debug_mode(mode)
        try:
            fused_losses.compute("ppo", logits, as_lists(inputs)).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


NAMES = "cross_entropy, importance_sampling, ppo, cispo, dro, gspo, custom"
POLICY_KEYS = "target_tokens, logprobs, advantages"
ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    # (what is wrong in a good call of ppo, the error, a pattern of its message)
    ("unknown loss", {"loss_fn": "grpo"}, ValueError, f"loss_fn.*{NAMES}.*'grpo'"),
    ("loss of ours only", {"loss_fn": "logprobs"}, ValueError, f"loss_fn.*{NAMES}.*'logprobs'"),
    ("loss as a function", {"loss_fn": fused_losses.ppo}, ValueError, f"loss_fn.*{NAMES}.*function"),
    (
        "unknown input",
        {"mask": [1.0] * N},
        ValueError,
        f"loss_fn_inputs of 'ppo'.*{POLICY_KEYS}, weights, clip_low_threshold, clip_high_threshold, got mask",
    ),
    ("input of the library", {"old_logprobs": [1.0] * N}, ValueError, f"{POLICY_KEYS}.*got old_logprobs"),
    ("input of another loss", {"sequence_ratio_mask": [1.0] * N}, ValueError, "'ppo'.*got sequence_ratio_mask"),
    ("no logprobs", {"logprobs": ...}, ValueError, f"'ppo' needs logprobs.*{POLICY_KEYS}, got target_tokens, advant"),
    ("no targets", {"target_tokens": ...}, ValueError, "'ppo' needs target_tokens"),
    ("no inputs", {"loss_fn_inputs": {}}, ValueError, f"needs target_tokens.*{POLICY_KEYS}, got no keys"),
    ("inputs of a list", {"loss_fn_inputs": [1]}, TypeError, "loss_fn_inputs must be a mapping.*list"),
    (
        "unknown config",
        {"loss_fn_config": {"epsilon": 0.2}},
        ValueError,
        "loss_fn_config of 'ppo' takes clip_low_threshold, clip_high_threshold, got epsilon",
    ),
    ("config of another loss", {"loss_fn_config": {"beta": 0.2}}, ValueError, "'ppo'.*got beta"),
    (
        "config of a loss that has none",
        {"loss_fn": "importance_sampling", "loss_fn_config": {"clip_low_threshold": 0.1}},
        ValueError,
        "loss_fn_config of 'importance_sampling' takes no keys, got clip_low_threshold",
    ),
    ("config of numbers", {"loss_fn_config": 0.2}, TypeError, "loss_fn_config must be a mapping.*float"),
    ("bad config value", {"loss_fn_config": {"clip_low_threshold": 3.0}}, ValueError, "clip_low_threshold.*3.0"),
    (
        "given twice",
        {"clip_low_threshold": [0.5] * N, "loss_fn_config": {"clip_low_threshold": 0.5}},
        ValueError,
        "clip_low_threshold.*loss_fn_inputs.*loss_fn_config",
    ),
    ("ragged list", {"advantages": [[1.0], [1.0, 2.0]]}, TypeError, "advantages.*rectangular.*numbers, got list"),
    ("text", {"advantages": ["1"] * N}, TypeError, "advantages.*numbers, got list"),
    ("None", {"weights": None}, TypeError, "weights.*numbers, got NoneType"),
    ("fractional targets", {"target_tokens": [0.5] * N}, TypeError, "target_tokens.*integers, got float64"),
    ("targets of bools", {"target_tokens": [True] * N}, TypeError, "target_tokens.*integers, got bool"),
    ("wrong length", {"advantages": [1.0] * 5}, ValueError, r"advantages.*\(14,\).*\(5,\)"),
    ("wrong shape of targets", {"target_tokens": [1] * 5}, ValueError, r"target_tokens.*\(5,\)"),
    ("wrong dtype of a tensor", {"advantages": torch.ones(N).int()}, TypeError, "advantages.*int32"),
    ("tensor elsewhere", {"logprobs": torch.ones(N, device="meta")}, ValueError, "^logprobs must be .*cpu.*meta"),
    ("target out of range", {"target_tokens": [V] * N}, ValueError, f"target_tokens.*{V}"),
    ("unknown backend", {"backend": "tpu"}, ValueError, "backend.*tpu"),
    ("logits of a list", {"logits": [[1.0]]}, TypeError, "logits.*list"),
    ("logits of NumPy", {"logits": np.zeros((N, V), np.float32)}, TypeError, "logits must be a tensor, got ndarray"),
    ("name of a list", {"loss_fn": ["ppo"]}, ValueError, "loss_fn must be one of.*got \\['ppo'\\]"),
    (
        "unsigned targets beyond int64",
        {"target_tokens": np.full(N, 2**64 - 100, np.uint64)},
        ValueError,
        "target_tokens in loss_fn_inputs must be within the range of int64, got 18446744073709551516",
    ),
]


@pytest.mark.parametrize("wrong, error, message", [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_error(wrong, error, message):
    logits, inputs = make("ppo")
    call = {"loss_fn": "ppo", "logits": logits, "loss_fn_inputs": inputs, "backend": "eager"}
    inputs |= {key: value for key, value in wrong.items() if key not in (*call, "loss_fn_config")}
    call |= {key: value for key, value in wrong.items() if key in (*call, "loss_fn_config")}
    for key in [key for key, value in inputs.items() if value is ...]:
        del inputs[key]
    with pytest.raises(error, match=f"(?s){message}"):
        fused_losses.compute(**call)


def test_error_of_a_missing_weight():
    """A forgotten mask would train on the prompt."""
    logits, inputs = make("cross_entropy")
    with pytest.raises(ValueError, match=r"'cross_entropy' needs weights.*target_tokens, weights, got target_tokens"):
        fused_losses.compute("cross_entropy", logits, {"target_tokens": inputs["target_tokens"]})


def test_error_of_loss_fn():
    with pytest.raises(ValueError, match=f"{NAMES}, got 'PPO'"):
        fused_losses.loss_fn("PPO")


@device_of_logits
def test_sparse_tensor_data(device):
    """Datum makes 2-d targets and weights sparse where that is smaller."""
    logits, _ = make("cross_entropy")
    target, weights = torch.randint(1, V, (N, 8)), torch.randn(N, 8)
    target[:, 1:], weights[:, 1:] = 0, 0.0
    inputs = {"target_tokens": target, "weights": weights}
    data = as_datum(inputs)
    assert all(value.sparse_crow_indices is not None for value in data.values())
    actual = fused_losses.compute("cross_entropy", logits.to(device), data)
    expected = fused_losses.compute("cross_entropy", logits.to(device), moved(inputs, device))
    assert torch.equal(actual.loss, expected.loss) and actual.logprobs.shape == (N, 8)


def test_logprobs_go_back_into_tensor_data():
    tinker = pytest.importorskip("tinker")
    logprobs = fused_losses.compute("ppo", *make("ppo")).logprobs
    data = tinker.TensorData.from_torch(logprobs)
    assert data.dtype == "float32" and torch.equal(data.to_torch(), logprobs)


def test_whole_datum_is_an_error_that_says_what_to_pass():
    tinker = pytest.importorskip("tinker")
    logits, inputs = make("ppo")
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1] * N), loss_fn_inputs=inputs)
    with pytest.raises(TypeError, match=r"loss_fn_inputs.*Datum: pass its loss_fn_inputs"):
        fused_losses.compute("ppo", logits, datum)


def test_names_and_keys_are_tinkers():
    """Datum knows the dtype of a list by its key, and raises for keys of which it doesn't."""
    tinker = pytest.importorskip("tinker")
    assert set(get_args(tinker.types.LossFnType)) - {"stable_reinforce", "custom"} == set(DEFAULTS)
    keys = {key for name in DEFAULTS for key in make(name)[1]} | set(CLIP)
    for key in keys:
        datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1]), loss_fn_inputs={key: [1]})
        assert datum.loss_fn_inputs[key].dtype == ("int64" if key == "target_tokens" else "float32")
    with pytest.raises(KeyError):
        tinker.Datum(model_input=tinker.ModelInput.from_ints([1]), loss_fn_inputs={"mask": [1]})
