"""`make bench`, as far as it goes without a GPU: which steps, and what is made of their outcomes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fused_losses.objectives import OBJECTIVES

BENCH = Path(__file__).resolve().parent.parent / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("session", "sanitized", "conditions", "records"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__("session")


def step(session: ModuleType, code: str, seconds: float = 20):
    return session.Step("step", (sys.executable, "-c", code), seconds)


@pytest.mark.parametrize(
    "code, outcome, last",
    [
        ("print('first'); print('last')", "ok", "last"),
        ("import sys; print('wrong'); sys.exit(3)", "failed", "wrong"),
    ],
)
def test_outcome(session, code, outcome, last):
    got = session.run(step(session, code))
    assert (got["outcome"], got["last"]) == (outcome, last)


def test_a_step_is_ended_with_all_that_it_started(session):
    """Else a hanging kernel's process would keep the GPU, and the pipe."""
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    got = session.run(step(session, code, 1.5))
    assert (got["outcome"], got["last"]) == ("out of time", "begun") and time.perf_counter() - start < 20


def test_steps_of_a_gpu_fit_in_ten_minutes(session, monkeypatch):
    monkeypatch.setattr(session.shutil, "which", lambda name: f"/somewhere/{name}")
    steps = {s.name: s for s in session.steps(True, False, session.RESULTS)}
    assert list(steps) == [
        *("self-test", "tests", "memcheck", "racecheck", "synccheck"),
        *("measurements", "heads", "predictions", "tables and plots"),
    ]
    assert not any(s.absent for s in steps.values())
    assert sum(s.seconds for s in steps.values()) <= 540  # and a minute to build
    for tool in session.SANITIZERS:
        assert steps[tool].command[:3] == ("/somewhere/compute-sanitizer", "--tool", tool)
    for path in session.ESSENTIALS:
        assert (session.ROOT / path).is_file()


def test_what_is_not_there_is_absent(session, monkeypatch):
    monkeypatch.setattr(session.shutil, "which", lambda name: None)
    absent = {s.name: s.absent for s in session.steps(True, False, session.RESULTS) if s.absent}
    assert absent.keys() == set(session.SANITIZERS)
    absent = {s.name: s.absent for s in session.steps(False, False, session.RESULTS) if s.absent}
    assert absent.keys() == {*session.SANITIZERS, "tests", "predictions"}
    assert session.run(session.Step("tests", ("no such program",), 1, "no GPU"))["outcome"] == "absent"


def test_every_outcome_is_recorded(session, monkeypatch, tmp_path, capsys):
    """One that fails ends no other, and shows in the exit code."""
    codes = ("import sys; print('bad'); sys.exit(1)", "print('good')")
    monkeypatch.setattr(session, "steps", lambda gpu, quick, out: [step(session, code) for code in codes])
    monkeypatch.setattr(session, "RESULTS", tmp_path)
    assert session.main([]) == 1
    (path,) = (tmp_path / "session").iterdir()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["outcome"] for r in records] == ["failed", "ok"] and records[0]["commit"]
    assert "bad" in capsys.readouterr().out


def test_what_the_sanitizers_watch_runs(session):
    sanitized = __import__("sanitized")
    assert sanitized.everything(CPU, "cpu", (7, 33)) == 2 * 2 * 14
    assert sanitized.turn_after_turn(CPU, "cpu", ((331, torch.bfloat16, 3), (33, torch.float32, 1))) == 2 * 3
    assert sanitized.every_loss(CPU, "cpu", 33) == len(OBJECTIVES)
