"""The tables of README.md and docs, from the records of a device or of all; conditions under each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cells import (
    MODES,
    ROW,
    by_number,
    cell,
    conditions_line,
    error,
    floor_ratio,
    in_order,
    label,
    markdown,
    mebibytes,
    megabytes,
    milliseconds,
    number,
    time_and_floor,
    time_and_speedup,
    who,
)
from records import Device, Record, distinct, read, where

NOT_MEASURED = "not measured yet"
TERMS = "fused, "  # how the contenders begin that are the loss with a term


def by_contender(records: list[Record], columns: tuple[str, ...], render: Callable[[Record], str | None]) -> str:
    """One row per contender, one column per value of ``columns``."""
    heads = distinct(records, *columns)
    names = {"mode": MODES}
    head = ["", *(" ".join(names.get(c, {}).get(v, v) for c, v in zip(columns, h, strict=True)) for h in heads)]
    rows = [
        [label(*row)]
        + [
            cell(
                where(records, **dict(zip((*ROW, *columns), (*row, *h), strict=True))),
                render,
            )
            for h in heads
        ]
        for row in in_order(distinct(records, *ROW))
    ]
    return markdown(head, rows)


def main_cases(records: list[Record]) -> list[Record]:
    """ppo where torch.compile was among the opponents: the cases that are shown first."""
    cases = tuple(c for (c,) in distinct(where(records, contender="torch.compile"), "case"))
    return where(records, case=cases, loss="ppo")


def cpu_times(device: Device) -> tuple[str, list[Record]]:
    records = [r for r in where(main_cases(device), group="fwd+bwd") if r["contender"] != "read"]
    return by_contender(records, ("case", "dtype"), time_and_speedup), records


def cpu_floor(device: Device) -> tuple[str, list[Record]]:
    """In place as a multiple of `mul_`, a reused gradient of `copy_`, anything that allocates of `clone`."""
    records = [r for r in where(main_cases(device), group="fwd+bwd") if r["mode"] != "floor"]
    return by_contender(records, ("case", "dtype"), floor_ratio), records


def cpu_modes(device: Device) -> tuple[str, list[Record]]:
    """Forward only and two phase: one row per contender, so that its mode is the column."""
    records = [r for r in where(main_cases(device), group=("forward", "two_phase")) if r["mode"] != "floor"]
    heads = distinct(records, "mode", "dtype", "case")
    rows = []
    for contender, backend, same_loss in distinct(records, "contender", "backend", "same_loss"):
        cells = (where(records, contender=contender, backend=backend, mode=m, dtype=d, case=c) for m, d, c in heads)
        rows.append([who(contender, backend, same_loss), *(cell(found, time_and_speedup) for found in cells)])
    return markdown(["", *(f"{MODES[m]}, {c} {d}" for m, d, c in heads)], rows), records


def cpu_losses(device: Device) -> tuple[str, list[Record]]:
    """Every loss and backend in every mode, on the smaller case."""
    others = {*distinct(main_cases(device), "case"), *distinct(with_terms(device), "case")}
    small = tuple(set(distinct(device, "case")) - others)
    records = where(device, contender="fused", mode=tuple(MODES), case=tuple(c for (c,) in small))
    modes = [m for m in MODES if m != "reused" and where(records, mode=m)]
    rows = [
        [f"{loss} ({backend})", f"{case} {dtype}"]
        + [
            cell(where(records, loss=loss, backend=backend, case=case, dtype=dtype, mode=m), time_and_speedup)
            for m in modes
        ]
        for loss, backend, case, dtype in distinct(records, "loss", "backend", "case", "dtype")
    ]
    return markdown(["loss", "case", *(MODES[m] for m in modes)], rows), records


def with_terms(records: list[Record]) -> list[Record]:
    """The cases in which the loss was measured with and without terms, such as the entropy."""
    cases = tuple(r["case"] for r in records if r["contender"].startswith(TERMS))
    return [r for r in where(records, case=cases) if r["contender"] == "fused" or r["contender"].startswith(TERMS)]


def terms(device: Device) -> tuple[str, list[Record]]:
    """What a term costs beside the plain loss, in the same run; in place, as what fresh memory costs hides it."""
    records = where(with_terms(device), mode="inplace")
    columns = distinct(records, "case", "dtype", "mode")

    def beside(record: Record) -> str:
        same = {key: record[key] for key in ("case", "dtype", "mode", "backend")}
        base = where(records, contender="fused", **same)
        times = f"{number(record['median_ms'])} ms"
        return (
            times if record["contender"] == "fused" else f"{times}, {record['median_ms'] / base[-1]['median_ms']:.2f}"
        )

    rows = [
        [f"ppo{contender.replace('fused, ', ', ') if contender != 'fused' else ''} ({backend})"]
        + [
            cell(where(records, contender=contender, backend=backend, case=c, dtype=d, mode=m), beside)
            for c, d, m in columns
        ]
        for contender, backend in distinct(records, "contender", "backend")
    ]
    return markdown(["", *(f"{c.removesuffix(', terms')} {d}, {MODES[m]}" for c, d, m in columns)], rows), records


def memory_and_errors(device: Device) -> tuple[str, list[Record]]:
    """Of the first main case: peak memory beyond the logits, and errors against float64."""
    records = [r for r in where(main_cases(device), group="fwd+bwd") if r["mode"] != "floor"]
    records = where(records, case=records[0]["case"]) if records else []
    columns: dict[str, Callable[[Record], str | None]] = {
        "peak memory": megabytes,
        "page faults": lambda record: None if record["page_faults"] is None else f"{record['page_faults']:.0f}",
        "loss": error("loss_error"),
        "gradient": error("grad_error"),
        "gradient at the target": error("true_class_error"),
    }
    if all(r["page_faults"] is None for r in records):  # CUDA
        del columns["page faults"]
    dtypes = [d for (d,) in distinct(records, "dtype")]
    rows = [
        [label(*row)]
        + [
            cell(where(records, dtype=d, **dict(zip(ROW, row, strict=True))), render, even_if_wrong=True)
            for render in columns.values()
            for d in dtypes
        ]
        for row in in_order(distinct(records, *ROW))
    ]
    case = records[0]["case"] if records else ""
    return markdown([f"ppo {case}", *(f"{name}, {d}" for name in columns for d in dtypes)], rows), records


def overhead(device: Device) -> tuple[str, list[Record]]:
    """Host time of ppo, forward and backward, on one token: what the interface costs above its kernels."""
    records = where(device, group="overhead")
    rows = []
    for contender, backend in distinct(records, "contender", "backend"):
        public = where(records, contender=contender, backend=backend, mode="public")
        kernels = where(records, contender=contender, backend=backend, mode="kernels")
        us = [cell(found, lambda r: f"{r['median_ms'] * 1e3:.0f} us") for found in (public, kernels)]
        rows.append(
            [
                who(contender, backend),
                *us,
                cell(public, lambda r: f"{r['overhead_us']:.0f} us" if r.get("overhead_us") else None),
            ]
        )
    return markdown(["ppo, N = 1, V = 1024", "public call and backward", "bare kernels", "interface"], rows), records


def heads(device: Device) -> tuple[str, list[Record]]:
    """Time, as a multiple of the products and the loss of logits that exist in the same run, peak memory, errors."""
    records = where(device, group="head")
    columns = distinct(records, "case", "dtype", "loss")

    def all_of_it(record: Record) -> str:
        parts = [f"{number(record['median_ms'])} ms ({number(record['ratio_to_floor'])})"]
        if record["contender"] != "loss of logits":
            parts.append(megabytes(record))
        if record.get("weight_grad_error") is not None:
            parts.append(f"{record['hidden_grad_error']:.0e} {record['weight_grad_error']:.0e}")
        return ", ".join(parts)

    rows = [
        [f"**{name}**" if name.startswith("fused") else name]
        + [cell(where(records, contender=name, case=c, dtype=d, loss=x), all_of_it) for c, d, x in columns]
        for (name,) in distinct(records, "contender")
    ]
    titles = (f"{case.removeprefix('head ')} {dtype} {loss}" for case, dtype, loss in columns)
    return markdown(["forward and backward", *titles], rows), records


def shards(device: Device) -> tuple[str, list[Record]]:
    """Time, and how many times as fast as torch's in the same run."""
    records = where(device, group="shard")
    cases = [case for (case,) in distinct(records, "case")]

    def beside(record: Record) -> str:
        return f"{number(record['median_ms'])} ms, {number(record['speedup_over_torch'])}x"

    rows = [
        [f"**{name}**" if name.startswith("fused") else name]
        + [cell(where(records, contender=name, case=case), beside) for case in cases]
        for (name,) in distinct(records, "contender")
    ]
    return markdown(["cross entropy", *(case.removeprefix("shard ") for case in cases)], rows), records


def statistics(device: Device) -> tuple[str, list[Record]]:
    """What a row says beside its target's logprob, as a multiple of logprobs and entropy in the same run."""
    records = [r for r in where(device, group="statistics") if r["mode"] != "floor"]
    columns = distinct(records, "case", "dtype")
    rows = [
        [f"{mode} ({backend})"]
        + [
            cell(
                where(records, mode=mode, backend=backend, case=case, dtype=dtype),
                lambda r: f"{number(r['median_ms'])} ms, {r['ratio_to_entropy']:.2f}",
            )
            for case, dtype in columns
        ]
        for mode, backend in distinct(records, "mode", "backend")
    ]
    return markdown(["", *(f"{case.removesuffix(', statistics')} {dtype}" for case, dtype in columns)], rows), records


def gpu_times(device: Device) -> tuple[str, list[Record]]:
    """Milliseconds and, in brackets, multiples of the copy (forward only: of the read) in the same run."""
    records = [
        r for r in where(device, group=("fwd+bwd", "forward", "two_phase"), mode=tuple(MODES)) if r["mode"] != "reused"
    ]
    records = [r for r in records if not r["contender"].startswith("fused, ")]  # terms have a table of their own
    heads = sorted(distinct(records, "contender", "backend"), key=lambda h: h[0] != "fused")
    rows = []
    for case, loss, dtype, mode in distinct(where(records, contender="fused"), "case", "loss", "dtype", "mode"):
        row = where(records, case=case, loss=loss, dtype=dtype)
        cells = []
        for contender, backend in heads:
            mine = where(row, contender=contender, backend=backend)
            # who can't work in place is shown with a gradient of its own
            modes = (mode, "separate") if mode == "inplace" and contender != "fused" else (mode,)
            found = next((f for m in modes if (f := where(mine, mode=m))), [])
            cells.append(cell(found, time_and_floor))
        rows.append([f"{case} {dtype}", f"{loss}, {MODES[mode]}", *cells])
    names = [f"**{backend}**" if contender == "fused" else contender for contender, backend in heads]
    return markdown(["case", "", *names], rows), records


def gpu_latency(device: Device) -> tuple[str, list[Record]]:
    """Small cases: time on the device, wall time from idle to idle, and a replayed CUDA graph."""
    cases = tuple(c for (c,) in distinct([r for r in device if r.get("graph_ms")], "case"))
    records = [r for r in where(device, case=cases) if r["mode"] != "floor"]
    fields = {"device": "median_ms", "wall": "wall_ms", "CUDA graph": "graph_ms"}

    def milliseconds(field: str) -> Callable[[Record], str | None]:
        return lambda r: f"{number(r[field])} ms" if r.get(field) else None

    rows = [
        [f"{case} {loss}", label(contender, backend, mode)]
        + [
            cell(where(records, case=case, loss=loss, contender=contender, backend=backend, mode=mode), milliseconds(f))
            for f in fields.values()
        ]
        for case, loss, contender, backend, mode in distinct(records, "case", "loss", "contender", "backend", "mode")
    ]
    return markdown(["case", "", *fields], rows), records


def ratios(devices: dict[str, list[Device]]) -> str:
    """Of all devices, forward and backward as a multiple of the copy of the logits: what the README shows."""
    rows_of: list[tuple[str, list[Record]]] = []  # a label, and what was measured of its case
    lines = []
    for device, loss in [
        (device, loss) for kind, loss in (("cpu", "ppo"), ("cuda", "cross_entropy")) for device in devices[kind]
    ]:
        group = where(device, group="fwd+bwd", backend=(None, "cpu", "cuda"), loss=loss)
        shown = [r for r in group if re.fullmatch(r"(\d+: )?\d+x\d+", r["case"])]
        for name, case, loss, dtype in distinct(shown, "device", "case", "loss", "dtype"):
            shape = case.split(": ")[-1]
            rows_of.append(
                (f"{name.split()[-1]}, {loss}, {shape} {dtype}", where(shown, case=case, loss=loss, dtype=dtype))
            )
        if shown:
            lines.append(conditions_line(shown))
    if not rows_of:
        return markdown(["", ""], [["any device", NOT_MEASURED]])

    def times_the_copy(record: Record) -> str:
        return f"{record['ratio_to_copy']:.2f}"

    ours = [("fused", mode) for mode in ("inplace", "separate")]
    others = distinct(
        (r for _, records in rows_of for r in records if r["contender"] != "fused" and r["mode"] != "floor"),
        "contender",
    )
    table = []
    for name, records in rows_of:
        found = [where(records, contender=contender, mode=mode) for contender, mode in ours]
        found += [where(records, contender=contender) for (contender,) in others]
        table.append([name, *(cell(records, times_the_copy).split(":")[0] for records in found)])
    head = ["", *(f"**fused_losses**, {MODES[mode]}" for _, mode in ours), *(contender for (contender,) in others)]
    return "\n\n".join((markdown(head, table), *lines))


LOSSES = {"": "plain", "Identity": "with terms", "Softcap": "with terms and a softcap"}
ELEMENTS = {"bfloat16": "bf16", "float16": "fp16", "float": "fp32"}


class Engine(NamedTuple):
    name: str
    sum: str  # its loops
    map: str


ENGINES = {
    "on_chip_kernel": Engine("on chip", "sum on chip", "map on chip"),
    "loss_and_grad_kernel": Engine("two sweeps", "sum", "map"),
}


def machine_code(files: list[Path]) -> str:
    """Instructions per element of one pass, the sum and the gradient together, of the newest file."""
    if not files:
        return markdown(["CUDA kernels", ""], [["any architecture", NOT_MEASURED]])
    newest = max(map(read, files), key=lambda records: records[0]["date"])
    one_pass = where(newest, kernel=tuple(ENGINES))
    architectures = by_number(r["architecture"] for r in one_pass)

    def per_element(kernel: str, transform: str, dtype: str, architecture: str) -> str:
        (r,) = where(one_pass, kernel=kernel, transform=transform, dtype=dtype, architecture=architecture)
        engine, loops = ENGINES[kernel], r["instructions_per_element"]
        return f"{loops[engine.sum] + loops[engine.map]:.1f}, {r['registers']}"

    rows = [
        [f"{engine.name}: {loss}, {element}", *(per_element(kernel, transform, dtype, a) for a in architectures)]
        for kernel, engine in ENGINES.items()
        if where(one_pass, kernel=kernel)
        for transform, loss in LOSSES.items()
        for dtype, element in ELEMENTS.items()
    ]
    first = newest[0]
    changed = " with uncommitted changes" if first["dirty"] else ""
    return f"{markdown(['one pass', *architectures], rows)}\n\n<sub>commit {first['commit']}{changed}.</sub>"


Table = Callable[[Device], tuple[str, list[Record]]]

# Of adapters: a framework's own step beside ours.
STEP = {"memory": mebibytes("peak_bytes"), "time": milliseconds("median_ms"), "of processors": milliseconds("cpu_ms")}
TRAINER = {"step": STEP["time"], "step memory": STEP["memory"], "process": mebibytes("process_bytes")}
WAYS = {  # how a record calls it: how a page does
    "causal_lm_loss": "`model.loss_function = causal_lm_loss`",
    "head": "`install(model)`",
    "install()": "`install()`",
    "install(inplace=True)": "`install(inplace=True)`",
    "output_processor": "`output_processor`, chunks of 32 MiB",
}


def adapters(framework: str) -> Table:
    """A row per step, theirs and ours side by side."""

    def table(device: Device) -> tuple[str, list[Record]]:
        records = of_framework(device, framework)
        columns = [(what, whose) for what in STEP for whose in ("theirs", "ours")]
        rows = [
            [f"{case.removeprefix(f'{framework}: ')}, {dtype}"]
            + [cell(where(records, case=case, dtype=dtype, contender=whose), STEP[what]) for what, whose in columns]
            for case, dtype in distinct(records, "case", "dtype")
        ]
        return markdown(["", *(f"{what}, {whose}" for what, whose in columns)], rows), records

    return table


def of_framework(device: Device, framework: str) -> list[Record]:
    return where(where(device, group="adapters"), framework=framework)


def megatron(device: Device) -> tuple[str, list[Record]]:
    records = of_framework(device, "megatron")
    return by_way(records, STEP), records


def trainer(tokens: int) -> Table:
    def table(device: Device) -> tuple[str, list[Record]]:
        records = where(device, group="trainer", n=tokens)
        return by_way(records, TRAINER), records

    return table


def by_way(records: list[Record], columns: dict[str, Callable[[Record], str | None]]) -> str:
    """A row per way to train the same model."""
    heads = [(case, dtype, what) for case, dtype in distinct(records, "case", "dtype") for what in columns]
    rows = [
        [WAYS.get(way, way)]
        + [cell(where(records, case=c, dtype=d, contender=way), columns[what]) for c, d, what in heads]
        for (way,) in distinct(records, "contender")
    ]
    cases = ", ".join(case.split(" ", 1)[1] for (case,) in distinct(records, "case"))
    return markdown([cases, *(f"{what}, {dtype}" for _, dtype, what in heads)], rows)


TABLES: dict[str, tuple[str, Table]] = {
    "cpu": ("cpu", cpu_times),
    "cpu-floor": ("cpu", cpu_floor),
    "cpu-modes": ("cpu", cpu_modes),
    "cpu-losses": ("cpu", cpu_losses),
    "cpu-terms": ("cpu", terms),
    "cpu-statistics": ("cpu", statistics),
    "cpu-memory": ("cpu", memory_and_errors),
    "cpu-overhead": ("cpu", overhead),
    "cpu-heads": ("cpu", heads),
    "cpu-shards": ("cpu", shards),
    **{
        f"adapters-{framework}": ("cpu", adapters(framework))
        for framework in ("torchtitan", "ms_swift", "openrlhf", "trl", "verl", "skyrl", "prime_rl")
    },
    "adapters-megatron": ("cpu", megatron),
    "trainer-1024": ("cpu", trainer(1024)),
    "trainer-4096": ("cpu", trainer(4096)),
    "gpu": ("cuda", gpu_times),
    "gpu-terms": ("cuda", terms),
    "gpu-statistics": ("cuda", statistics),
    "gpu-latency": ("cuda", gpu_latency),
    "gpu-memory": ("cuda", memory_and_errors),
    "gpu-overhead": ("cuda", overhead),
    "gpu-heads": ("cuda", heads),
}


def tables(devices: dict[str, list[Device]]) -> dict[str, str]:
    """Each table with its line of conditions, one after the other for several devices."""
    texts = {}
    for name, (device_type, table) in TABLES.items():
        parts = []
        for device in devices[device_type]:
            text, records = table(device)
            if records:
                parts += [text, conditions_line(records)]
        what = {"cpu": "CPU", "cuda": "GPU"}[device_type]
        texts[name] = "\n\n".join(parts) or markdown([what, ""], [[f"any {what}", NOT_MEASURED]])
    return texts
