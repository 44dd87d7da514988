"""``python -m fused_losses --gpu``, on the CPU: the same code, but for the clock."""

from __future__ import annotations

import json

import pytest
import torch

from fused_losses import __main__ as doctor
from fused_losses import speed

CPU = torch.device("cpu")
SMALL = (speed.Promise(64, 1e9, 1e9), speed.Promise(33, 1e9, 1e9))


def test_rows():
    rows = list(speed.rows(CPU, SMALL, tokens=5, repeats=2))
    assert [(row.loss, row.promise.vocab, row.tokens) for row in rows] == [
        (loss, promise.vocab, 5) for promise in SMALL for loss in speed.LOSSES
    ]
    for row in rows:
        assert min(row.copy, row.read, row.own, row.inplace, row.forward) > 0 and row.kept
        assert len(speed.line(row)) == len(speed.HEAD)


def test_every_time_is_of_the_loss(monkeypatch):
    """Each does what its column says, on logits and not on what the one before left there."""
    logits = torch.randn(4, 32, dtype=torch.bfloat16)
    target_tokens, copy = torch.tensor([1, 2, 3, 4]), torch.zeros(4, 32, dtype=torch.bfloat16)
    calls = speed._calls("cross_entropy", logits, target_tokens, {}, copy)
    before = logits.clone()
    for call in calls.values():
        call()
    assert torch.equal(logits, before)
    wanted = logits.float().requires_grad_()
    torch.nn.functional.cross_entropy(wanted, target_tokens).backward()
    torch.testing.assert_close(copy, wanted.grad.bfloat16())


def test_memory_limits_the_tokens(monkeypatch):
    monkeypatch.setattr(speed, "_free_bytes", lambda device: 64 * 2 * speed.BUFFERS * 4)
    assert {row.tokens for row in speed.rows(CPU, SMALL[:1], tokens=5, repeats=1)} == {3}
    monkeypatch.setattr(speed, "_free_bytes", lambda device: 0)
    with pytest.raises(RuntimeError, match="no memory free"):
        next(speed.rows(CPU, SMALL, tokens=5, repeats=1))


@pytest.mark.parametrize("times, kept", [((1.1, 1.1, 0.55), True), ((1.2, 1.0, 0.5), False), ((1.0, 1.0, 0.6), False)])
def test_verdict(times, kept):
    row = speed.Row("ppo", 4096, speed.Promise(32000, 1.15, 1.15), 1.0, 0.5, *times)
    assert row.kept is kept and ("more than" in speed.line(row)) is not kept


@pytest.fixture
def on_cpu(monkeypatch):
    """As if the CPU were a GPU."""

    class Device:
        type = "cuda"

        def __str__(self) -> str:
            return "cuda:0"

    rows = speed.rows
    monkeypatch.setattr(doctor, "report", lambda: {"ok": True, "devices": []})
    monkeypatch.setattr(doctor, "show", lambda result: None)
    monkeypatch.setattr(doctor, "devices", lambda: [CPU, Device()])
    monkeypatch.setattr(doctor, "describe", lambda device: "a GPU")
    monkeypatch.setattr(doctor.backends, "choose", lambda device: "cpu")
    monkeypatch.setattr(speed, "rows", lambda device: rows(CPU, SMALL, tokens=2, repeats=1))


def test_table(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fused_losses", "--gpu"])
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cuda:0: a GPU; bfloat16, backend cpu" in lines[1] and speed.HEAD in lines and len(lines) == 7


def test_json(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fused_losses", "--gpu", "--json"])
    assert doctor.main() == 0
    rows = json.loads(capsys.readouterr().out)["speed"]["cuda:0"]
    assert len(rows) == 4 and rows[0]["kept"] and rows[0]["promise"]["vocab"] == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fused_losses", "--gpu"])
    monkeypatch.setattr(doctor, "report", lambda: {"ok": True, "devices": []})
    monkeypatch.setattr(doctor, "show", lambda result: None)
    assert doctor.main() == 1 and "no GPU" in capsys.readouterr().out
