"""The benchmark measures what it says: a smoke run, a report on it, and opponents that are wrong on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


pytestmark = pytest.mark.xdist_group("bench")  # what the tests share is made once


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one --quick run, in a process of its own: it sets torch up as a user's run does."""
    out = tmp_path_factory.mktemp("records")
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--quick", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def records(records_file: Path) -> list[dict]:
    return [json.loads(line) for line in records_file.read_text().splitlines()]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of bench/, which import each other by plain names as scripts do."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    names = tuple(path.stem for path in (ROOT / "bench").glob("*.py"))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = SimpleNamespace(**{name: __import__(name) for name in names})
    yield modules
    for name in names:
        sys.modules.pop(name, None)


def test_every_loss_is_measured_in_every_mode(records: list[dict], bench: SimpleNamespace) -> None:
    found = {(r["loss"], r["mode"]) for r in records if r["contender"] == "fused"}
    assert found >= {(loss, mode) for loss in bench.cases.LOSSES for mode in bench.cases.ALL_MODES}
    assert {r["contender"] for r in records} >= {"fused", "eager", "F.cross_entropy", "copy", "mul_", "clone", "read"}


def test_records_say_how_they_were_measured(records: list[dict]) -> None:
    for r in records:
        assert r["status"] == "ok"
        assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
        for field in ("device", "cpu", "threads", "driver", "torch", "triton", "python", "commit", "dirty", "date"):
            assert field in r
        if r["group"] == "head":
            assert r["ratio_to_floor"] > 0 and r["peak_bytes"] >= 0
        elif r["group"] == "shard":
            assert r["speedup_over_torch"] > 0
        elif r["group"] != "overhead":
            assert r["ratio_to_copy"] > 0 and r["ratio_to_mul"] > 0
            assert r["peak_bytes"] >= 0
    text = json.dumps(records)
    assert str(ROOT) not in text and os.uname().nodename not in text


def test_peak_memory_and_errors_of_the_smoke_run(records: list[dict]) -> None:
    logits = 64 * 1000 * 4
    for r in records:
        if r["case"] != "quick 64x1000" or not r["same_loss"] or r["mode"] == "floor":
            continue
        assert r["loss_error"] < 1e-4
        if r["mode"] == "separate":
            assert r["grad_error"] < 1e-4 and r["peak_bytes"] >= logits
        if r["mode"] == "inplace" and r["backend"] == "cpu":
            assert r["peak_bytes"] < logits


def test_interface_overhead_is_measured(records: list[dict]) -> None:
    """What the public call takes beyond its kernels; of the eager ones, on a busy machine, that may be noise."""
    fused = [r for r in records if r["group"] == "overhead" and r["contender"] == "fused"]
    times = {(r["backend"], r["mode"]): r["median_ms"] for r in fused}
    public = [r for r in fused if r["mode"] == "public"]
    assert public
    for r in public:
        assert r["overhead_us"] == pytest.approx(1e3 * (r["median_ms"] - times[r["backend"], "kernels"]))


def test_report_fills_the_pages_and_check_guards_them(
    records_file: Path, bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pages = (tmp_path / "README.md", tmp_path / "measured.md")
    for page, names in ((first, ("cpu-losses", "cpu-overhead", "gpu")), (second, ("ratios",))):
        page.write_text(
            "# x\n\n" + "\n\n".join(f"<!-- bench:{n} -->\n<!-- /bench:{n} -->" for n in names) + "\n\nend\n"
        )
    options = [str(records_file), "--pages", *map(str, pages), "--plots", str(tmp_path / "plots")]
    assert bench.report.main([*options, "--check"]) == 1
    assert bench.report.main(options) == 0
    text = first.read_text()
    assert text.startswith("# x\n") and text.endswith("\nend\n")
    assert "| cross_entropy (" in text and " us |" in text
    assert bench.tables.NOT_MEASURED in text.split("bench:gpu")[1]
    assert bench.tables.NOT_MEASURED in second.read_text()  # no opponent that the README shows was in the smoke run
    assert bench.report.main([*options, "--check"]) == 0

    first.write_text(text.replace(" us |", "1 us |", 1))
    assert bench.report.main([*options, "--check"]) == 1
    assert "1 us |" in capsys.readouterr().err
    first.write_text("no table here")
    assert bench.report.main([*options, "--check"]) == 1
    assert "README.md has no marked table" in capsys.readouterr().err


def test_the_ratios_of_a_case_stand_in_its_row(bench: SimpleNamespace) -> None:
    record = dict.fromkeys(bench.records.KEY) | {
        "device": "x", "device_type": "cpu", "threads": 2, "touched_gb": 0, "torch": "", "triton": "", "python": "",
        "commit": "", "dirty": False, "date": "2026-01-01", "repeats": 1, "status": "ok",
        "case": "64x1000", "loss": "ppo", "group": "fwd+bwd", "dtype": "fp32",
    }  # fmt: skip

    def measured(contender: str, mode: str, ratio: float, **other: Any) -> dict[str, Any]:
        backend = "cpu" if contender == "fused" else None
        return {**record, "contender": contender, "backend": backend, "mode": mode, "ratio_to_copy": ratio, **other}

    cpu = [measured("fused", "inplace", 1.5), measured("torch.compile", "separate", 20), measured("copy", "floor", 1)]
    gpu = {"device": "y", "device_type": "cuda", "driver": "", "cuda": "", "loss": "cross_entropy", "case": "1: 8x9"}
    cuda = [
        measured("fused", "separate", 1.25, **gpu, backend="cuda"),
        measured("fused", "separate", 1.75, **gpu, backend="triton"),
        measured("quack", "separate", 1.7, **gpu, status="failed: of something"),
        measured("fused", "separate", 9, **{**gpu, "case": "8: 8x9, masked"}, backend="cuda"),
    ]
    head, _, *rows = bench.tables.ratios({"cpu": [cpu], "cuda": [cuda]}).splitlines()
    assert head == "|  | **fused_losses**, in place | **fused_losses**, own gradient | torch.compile | quack |"
    assert rows[:2] == [
        "| x, ppo, 64x1000 fp32 | 1.50 | - | 20.00 | - |",
        "| y, cross_entropy, 8x9 fp32 | - | 1.25 | - | failed |",
    ]


def test_report_takes_the_last_of_a_measurement_and_the_newest_file(bench: SimpleNamespace, tmp_path: Path) -> None:
    record = dict.fromkeys(bench.records.KEY) | {"device": "x", "device_type": "cpu", "threads": 2}
    older, newer = tmp_path / "b.jsonl", tmp_path / "a.jsonl"
    older.write_text(json.dumps({**record, "date": "2025-01-01", "median_ms": 1}))
    newer.write_text("\n".join(json.dumps({**record, "date": "2025-01-02", "median_ms": ms}) for ms in (2, 3)))
    assert [r["median_ms"] for r in bench.records.load([newer, older])["cpu"][0]] == [3]


def test_plots_are_drawn(records: list[dict], bench: SimpleNamespace, tmp_path: Path) -> None:
    shown = [{**r, "contender": "torch.compile"} if r["contender"] == "eager" else r for r in records]
    bench.plots.plot(shown, tmp_path / "plots" / "cpu.png")
    assert (tmp_path / "plots" / "cpu.png").stat().st_size > 10_000


def test_two_commits_side_by_side(
    records: list[dict], bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a measurement the last counts; what one side has alone is left out; a kernel's old name is known."""
    (tmp_path / "machine_code").mkdir()
    (tmp_path / "suite").mkdir()
    kernel = {"architecture": "sm_80", "dtype": "float", "transform": "Softcap"}
    for commit, slower in (("aaaaaaaaaa", 1), ("bbbbbbbbbb", 3)):

        def write(name: str, lines: list[dict], commit: str = commit) -> None:
            text = "".join(json.dumps({"date": "2026-01-01", **line, "commit": commit}) + "\n" for line in lines)
            (tmp_path / name / f"{commit}.jsonl").write_text(text)

        timed = [{**r, "median_ms": slower * (i + 1), "ratio_to_mul": slower} for i, r in enumerate(records)]
        one = next(r for r in timed if r["contender"] == "fused")
        write(".", [{**one, "median_ms": 1e9}, *timed, {**one, "case": f"alone {commit}"}])
        name = "terms_stats_kernel" if slower == 1 else "stats_kernel"
        write("machine_code", [{**kernel, "kernel": name, "instructions_per_element": {"sum": 10.0 * slower}}])
        write("suite", [{"seconds": 100 * slower, "workers": 2, "counts": {"passed": 7}}])

    assert bench.compare.main(["aaaa", "bbbbbbbbbbcc", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    fused = [r for r in records if r["contender"].startswith("fused") and r["group"] != "overhead"]
    assert text.count(" | 3.00 | ") == len(fused) and "1000000000" not in text and "alone" not in text
    assert " | 1.00, 3.00 |" in text and " us | " in text
    assert "| stats_kernel | Softcap | float | sum | 10.00 → 30.00 |" in text
    assert "| before | 100 s | 2 | 7 passed |\n| after | 300 s | 2 | 7 passed |" in text
    assert bench.compare.main(["aaaa", "cccc", "--results", str(tmp_path)]) == 1


def test_the_suite_is_timed(tmp_path: Path) -> None:
    """A checkout's own: another's is what the change is compared with."""
    (tmp_path / "test_two.py").write_text("def test_one(): pass\n\ndef test_two(): assert 0")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "bench" / "suite.py"), "--checkout", str(tmp_path), "--out", str(out)]
    done = subprocess.run([*command, "--commit", "abc", "--workers", "0"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (path,) = out.iterdir()
    record = json.loads(path.read_text())
    assert record["counts"] == {"passed": 1, "failed": 1} and record["commit"] == "abc" and record["seconds"] > 0
    assert str(tmp_path) not in path.read_text()


def test_a_wrong_opponent_shows(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.cases.Case("wrong", (16,), 100, ("fp32",), ("ppo",), ("separate",), ("eager",))
    # a ratio that nobody clips: the loss of most tokens is right
    monkeypatch.setitem(bench.opponents.PLAIN, "ppo", lambda x, q, a, low, high: -torch.exp(x - q) * a)
    with pytest.raises(AssertionError, match="plain formula of ppo"):
        bench.opponents.check_plain_formulas(("ppo",))
    problem = bench.cases.make_problem(case, "ppo", "fp32", CPU)
    measured = bench.measure.measure(problem, "fwd+bwd", case.modes, (), case.opponents, repeats=2)
    (eager,) = [r for r in measured if r["contender"] == "eager"]
    assert eager["status"] == "wrong" and eager["grad_error"] > 1e-3
    assert bench.cells.cell([eager], bench.cells.time_and_speedup) == "wrong"


def test_a_loss_without_a_plain_formula_is_measured_by_the_librarys(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loss in list(bench.opponents.PLAIN):
        monkeypatch.delitem(bench.opponents.PLAIN, loss)
    bench.opponents.check_plain_formulas(bench.cases.LOSSES)


def test_bare_kernels_are_all_that_a_call_launches(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out here would count as the interface's time."""
    backend, launched = bench.contenders.backends.resolve("eager", CPU), []
    for stage in ("loss_and_grad", "stats", "objective", "grad", "scale"):
        function = getattr(backend, stage)
        spy = lambda *args, stage=stage, function=function: launched.append(stage) or function(*args)  # noqa: E731
        # of the class: undone on the object, the method would stay there and hide what a later test does to the class
        monkeypatch.setattr(type(backend), stage, staticmethod(spy))
    problem = bench.cases.make_problem(bench.cases.Case("kernels", (4,), 50), "ppo", "fp32", CPU)
    public, kernels = (bench.contenders.fused(problem, mode, "eager").call for mode in ("separate", "reused"))
    results = []
    for call in (public, kernels):
        launched.clear()
        results.append((call(), tuple(launched)))
    (expected, by_public), (got, by_kernels) = results
    assert by_public == by_kernels and "loss_and_grad" in by_kernels
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_true_class_gradient_rounded_before_it_is_formed_shows(bench: SimpleNamespace) -> None:
    problem = bench.cases.make_problem(bench.cases.Case("sharp", (64,), 1000), "cross_entropy", "bf16", CPU)
    truth = bench.accuracy.Truth(problem, two_phase=False)
    logits = problem.source.float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, problem.targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    loss = loss.detach()
    assert truth.errors(loss, gradient.bfloat16()).verdict == "ok"
    probabilities = torch.softmax(logits.detach(), -1).bfloat16()
    rounded = (probabilities - torch.nn.functional.one_hot(problem.targets, 1000)) / 64
    errors = truth.errors(loss, rounded.bfloat16())
    assert errors.true_class > 0.5 and errors.verdict == "inexact"
    assert truth.errors(loss * torch.nan, None).verdict == "wrong"
    assert truth.errors(loss, gradient * 1.05).verdict == "wrong"


def test_an_opponent_that_fails_is_a_record_and_not_the_end(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(problem: object, mode: str) -> None:
        raise ImportError("no such symbol")

    def exhausted(problem: object, mode: str):
        def loss(logits: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError

        return loss

    monkeypatch.setitem(bench.opponents.OPPONENTS, "quack", bench.opponents.Opponent("quack", broken))
    monkeypatch.setitem(bench.opponents.OPPONENTS, "Liger CE", bench.opponents.Opponent("Liger CE", exhausted))
    case = bench.cases.Case("broken", (4,), 50)
    problem = bench.cases.make_problem(case, "ppo", "fp32", CPU)
    measured = bench.measure.measure(problem, "fwd+bwd", ("separate",), ("eager",), ("quack", "Liger CE"), repeats=2)
    status = {r["contender"]: r["status"] for r in measured}
    assert status["quack"] == "failed: ImportError"
    assert status["Liger CE"] == "out of memory"
    assert status["fused"] == "ok"


def test_calls_are_interleaved_and_the_logits_restored_before_each(bench: SimpleNamespace) -> None:
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "AB"}
    times = bench.timing.interleaved(calls, lambda: log.append("restore"), 2, CPU)
    assert log == ["restore", "A", "restore", "B"] * 2
    assert all(len(t.ms) == 2 and min(t.ms) > 0 for t in times.values())
    assert bench.timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))


def test_peak_memory_counts_what_operators_take_and_give_back(bench: SimpleNamespace) -> None:
    x = torch.randn(1000, 100)

    def call() -> torch.Tensor:
        y = x + 1  # 400 kB
        z = y * 2  # 800 kB live
        del y
        return z.sum()

    assert 800_000 <= bench.memory.peak_bytes(call, CPU) < 850_000


def test_names_of_record_files_hold_no_path(bench: SimpleNamespace) -> None:
    where = bench.conditions.conditions(CPU, commit="abc123")
    assert where["commit"] == "abc123"
    name = bench.conditions.file_name({**where, "device": "AMD EPYC (R) 9/4", "threads": 2})
    assert name == f"{where['date'][:10]}-amd-epyc-r-9-4-2-threads-abc123.jsonl"


# ---- Adapters ----

FRAMEWORKS = ("torchtitan", "ms_swift", "openrlhf", "trl", "verl", "skyrl", "megatron", "prime_rl")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_takes_the_same_step_with_its_loss_and_with_ours(bench: SimpleNamespace, framework: str) -> None:
    """One of its steps, in small; by processes of its own, where what the framework depends on are stubs."""
    if bench.adapters.absent(framework):
        pytest.skip(f"{framework} is not installed: tests/oracles.txt")
    case = bench.adapters.cases_of(framework, bench.adapters.SMALL)[0]
    case = case._replace(ways=(case.ways[0], case.ways[-1]))
    records = bench.adapters.measure(case, rounds=1, repeats=1)
    assert [r["status"] for r in records] == ["ok", "ok"]
    assert [r["contender"] for r in records] == list(case.ways)
    assert records[1]["value"] == pytest.approx(records[0]["value"], rel=1e-5)
    for r in records:
        assert r["framework_version"] or framework in bench.adapters.DEFINITIONS
        assert r["shape"] in ([32, 16, 500], [32, 500]) and r["n"] == 32 and r["vocab"] == 500
        assert r["group"] == "adapters" and r["dtype"] == "fp32" and r["repeats"] == 1
        assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] and r["cpu_ms"] > 0 and r["peak_bytes"] >= 0
        assert f"{framework}: " in r["case"] and r.keys() >= {*bench.records.KEY, "commit", "threads", "date"}


def test_every_framework_has_steps_a_page_and_a_table(bench: SimpleNamespace) -> None:
    assert {case.framework for case in bench.adapter_steps.CASES} == set(bench.adapter_steps.STEPS) == set(FRAMEWORKS)
    keys = [(case.title, case.dtype, case.loss) for case in bench.adapter_steps.CASES]
    assert len(set(keys)) == len(keys)
    for framework in FRAMEWORKS:
        (page,) = (page for page in bench.report.PAGES if page.name == f"{framework}.md")
        assert f"<!-- bench:adapters-{framework} -->" in page.read_text()


def test_a_step_that_fails_is_a_record_and_not_the_end(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    case = bench.adapter_steps.Case("prime_rl", "step", "ppo", "fp8", 4, 2, 8)
    records = bench.adapters.measure(case, rounds=2, repeats=1)
    assert [r["status"] for r in records] == ["failed: KeyError"] * 2
    assert "KeyError: 'fp8'" in capsys.readouterr().err
    assert "failed: KeyError" in bench.adapters.line(records[0])


def seen(times: list[float], value: float = 1.0) -> dict[str, Any]:
    return {"ms": times, "cpu_ms": [2 * ms for ms in times], "peak": int(times[0] * 2**20), "value": value}


def test_tables_of_adapters_are_of_their_newest_records(bench: SimpleNamespace, tmp_path: Path) -> None:
    """A later run of one step displaces that step alone, and nothing that other scripts have measured."""
    first, second = (
        bench.adapter_steps.Case("verl", name, "logprobs", "fp32", 4, 0, 8) for name in ("logprobs", "entropy")
    )
    ways = bench.adapter_steps.Case(
        "megatron", "GPTModel", "cross_entropy", "fp32", 4, 2, 8, ways=("unfused", "install()")
    )

    def record(case: Any, way: str, ms: float, date: str, status: str = "ok") -> dict[str, Any]:
        runs = [seen([ms, ms + 1, ms + 2]), seen([ms])] if status == "ok" else []
        return {**bench.adapters.record(case, way, runs, status), "date": date, "commit": date[-2:], "dirty": False}

    measured = bench.adapters.record(first, "fused", [seen([1.0])], "ok")
    older = [record(case, way, 10, "2026-01-01") for case in (first, second) for way in ("theirs", "ours")]
    older += [record(ways, "unfused", 30, "2026-01-01"), record(ways, "install()", 20, "2026-01-01", "failed: E")]
    older += [{**measured, "case": "4x8", "group": "fwd+bwd", "date": "2026-01-01"}]
    newer = [record(second, way, ms, "2026-01-02") for way, ms in (("theirs", 200), ("ours", 100))]
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, records in zip(files, (older, newer), strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in records))

    devices = bench.records.load(files)
    texts = bench.tables.tables(devices)
    head, _, *rows = texts["adapters-verl"].splitlines()[:4]
    assert head.split(" | ")[1:4] == ["memory, theirs", "memory, ours", "time, theirs"]
    assert rows == [
        "| logprobs, 4x8, fp32 | 10 MiB | 10 MiB | 10.5 ms | 10.5 ms | 21.0 ms | 21.0 ms |",
        "| entropy, 4x8, fp32 | 200 MiB | 100 MiB | 200 ms | 100 ms | 401 ms | 201 ms |",
    ]
    assert "commit 02, 01, 2026-01-02; medians of 4 interleaved repeats" in texts["adapters-verl"]
    _, _, *rows = texts["adapters-megatron"].splitlines()[:4]
    assert rows == ["| unfused | 30 MiB | 30.5 ms | 61.0 ms |", "| `install()` | failed: E | failed: E | failed: E |"]
    assert bench.tables.NOT_MEASURED in texts["adapters-trl"] and bench.tables.NOT_MEASURED in texts["trainer-1024"]
    assert [r["case"] for r in bench.records.where(devices["cpu"][0], group="fwd+bwd")] == ["4x8"]


def test_the_table_of_a_trainers_steps(bench: SimpleNamespace) -> None:
    run = {"ms": [1500.0], "cpu_ms": [2000.0], "peak_rss": 3 * 2**30, "step_rss": 2**30, "losses": [1.0]}
    records = [bench.trainer.record(name, 1024, 256, "bf16", [run]) for name in ("stock", "head")]
    lines = bench.tables.tables({"cpu": [records], "cuda": []})["trainer-1024"].splitlines()
    assert lines[0] == "| 1024x256x151936 | step, bf16 | step memory, bf16 | process, bf16 |"
    assert lines[2:4] == [
        "| stock | 1500 ms | 1024 MiB | 3072 MiB |",
        "| `install(model)` | 1500 ms | 1024 MiB | 3072 MiB |",
    ]
    assert bench.tables.NOT_MEASURED in bench.tables.tables({"cpu": [records], "cuda": []})["trainer-4096"]
