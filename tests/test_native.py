"""Where Python meets C++: records are read by name, and what does not fit raises before anything is read or written."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from conftest import require

from fused_losses.backends import native
from fused_losses.backends.cpu import BACKEND, Cpu
from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Problem, Targets, Terms, Transform

N, V = 3, 8
TOKENS = torch.tensor([1, 2, 3])
PPO = (torch.zeros(N), torch.ones(N), 0.8, 1.2, math.inf, math.inf, math.inf)


@pytest.fixture(autouse=True)
def built():
    require("cpu")


def problem(**changes) -> Problem:
    plain = Problem(Targets(TOKENS, -100), Transform(), 1.0, OBJECTIVES["ppo"], PPO, Terms(), 1.0, V, False)
    return plain._replace(**changes)


def run(problem: Problem, logits=None, gradient=None):
    logits = torch.zeros(N, V) if logits is None else logits
    return BACKEND.loss_and_grad(logits, problem, torch.full_like(logits, 7.0) if gradient is None else gradient)


TWO = torch.zeros(N, 2)
REFUSED = {
    "weights of another dtype": (ValueError, "weights", problem(weights=torch.ones(N).double())),
    "weights of another length": (ValueError, "weights", problem(weights=torch.ones(N + 1))),
    "weights that are text": (TypeError, "weights", problem(weights="1")),
    "weights elsewhere": (RuntimeError, "meta", problem(weights=torch.ones(N, device="meta"))),
    "an input too few": (ValueError, "inputs", problem(inputs=PPO[:-1])),
    "inputs in a list": (ValueError, "inputs", problem(inputs=list(PPO))),
    "an objective of somebody else's": (
        ValueError,
        "objective",
        problem(objective=OBJECTIVES["ppo"].__class__("mine", None)),
    ),
    "an unknown KL": (ValueError, "kl_type", problem(terms=Terms(kl_type="k4"))),
    "targets of another dtype": (ValueError, "tokens", problem(targets=Targets(TOKENS.to(torch.int16), -100))),
    "targets that are not contiguous": (
        ValueError,
        "tokens",
        problem(targets=Targets(torch.arange(6)[::2], -100)),
    ),
    "too few targets": (ValueError, "tokens", problem(targets=Targets(TOKENS[:2], -100))),
    "several targets without shares": (ValueError, "tokens", problem(targets=Targets(TWO.long(), -100))),
    "shares of another shape": (ValueError, "shares", problem(targets=Targets(TWO.long(), -100, torch.ones(N, 3)))),
    "a record without its fields": (AttributeError, "softcap", problem(transform=Terms())),
    "a vocabulary that is no number": (TypeError, "vocab", problem(vocab=None)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    error, names, wrong = REFUSED[what]
    gradient = torch.full((N, V), 7.0)
    with pytest.raises(error, match=names):
        run(wrong, gradient=gradient)
    assert (gradient == 7).all()


MATRICES = {
    "float64": torch.zeros(N, V).double(),
    "of a strided vocabulary": torch.zeros(V, N).t(),
    "a list": [[0.0] * V] * N,
}


@pytest.mark.parametrize("what", MATRICES)
def test_logits_refused(what):
    with pytest.raises((TypeError, ValueError), match="logits"):
        BACKEND.module.loss_and_grad(MATRICES[what], torch.zeros(N, V), problem(), *[torch.zeros(N)] * 3, 0)


@pytest.mark.parametrize(
    "gradient", [torch.zeros(N, V + 1), torch.zeros(N + 1, V), torch.zeros(N, V).bfloat16()], ids=str
)
def test_gradient_refused(gradient):
    with pytest.raises(ValueError, match="gradient"):
        run(problem(), gradient=gradient)


def test_outputs_of_another_size_refused():
    with pytest.raises(ValueError, match="logprobs has 2 elements, not 3"):
        BACKEND.module.loss_and_grad(
            torch.zeros(N, V), torch.zeros(N, V), problem(), torch.zeros(2), torch.zeros(N), torch.zeros(()), 0
        )


@pytest.mark.parametrize(
    "shape", [(V,), (N, V), (2, N, V), (1, N, V), (N, 1, V), (2, 3, 2, V), (0, V), (0, 2, V)], ids=str
)
def test_shapes(shape):
    """Each row is the row of the same logits in a matrix."""
    logits = torch.randn(shape)
    n = math.prod(shape[:-1])
    asked = problem(targets=Targets(torch.arange(n) % V, -100), objective=OBJECTIVES["cross_entropy"], inputs=())
    alone, together = torch.full_like(logits, 7.0), torch.full((n, V), 7.0)
    losses = (
        BACKEND.loss_and_grad(logits, asked, alone)[0],
        BACKEND.loss_and_grad(logits.view(n, V), asked, together)[0],
    )
    assert torch.equal(alone.view(n, V), together) and torch.equal(*losses)


def test_built_from_other_sources(monkeypatch):
    """An order of inputs that differs would give wrong numbers without a sign."""
    there = dict(BACKEND.module.objectives)
    assert native.inputs_differ(there) is None
    there["ppo"] = there["ppo"].replace("old_logprobs, advantages", "advantages, old_logprobs")
    module = ModuleType("_cpu")
    module.objectives = there
    monkeypatch.setattr(native.importlib, "import_module", lambda name: module)
    reason = Cpu("_cpu", "").unusable(torch.device("cpu"))
    assert "its ppo takes advantages, old_logprobs" in reason and "reinstall" in reason and native.BROKEN in reason
    del there["ppo"]
    assert "no objective ppo" in Cpu("_cpu", "").unusable(torch.device("cpu"))


def test_runs_only_our_objectives():
    assert all(BACKEND.runs(objective) for objective in OBJECTIVES.values())
    assert not BACKEND.runs(OBJECTIVES["ppo"].__class__("ppo", OBJECTIVES["ppo"].formula))
