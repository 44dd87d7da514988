"""Turn records into the tables of README.md and the plots of bench/plots.

    python bench/report.py            # print the tables, put them into README.md, draw the plots
    python bench/report.py --check    # exit 1 if README.md says something else than the records; writes nothing

A table named NAME goes between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; no number there is typed by hand.
Of each device and case the newest file of records counts.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured yet"
NO_VALUE = "-"
INEXACT = "†"
TERMS = "fused, "  # how the contenders begin that are the loss with a term
YARDSTICK = " (cross entropy instead)"  # F.cross_entropy beside another loss

Record = dict[str, Any]
Device = list[Record]  # the records of one device, all from one file

ROW = ("contender", "backend", "mode", "same_loss")  # what a line of a table or a bar of a plot stands for
# What makes two records the same measurement: the later one counts.
KEY = ("case", "loss", "group", "dtype", "contender", "backend", "mode")
MODES = {
    "inplace": "in place",
    "separate": "own gradient",
    "reused": "own gradient, reused",
    "forward": "forward only",
    "two_phase": "two phase",
}
FLOORS = {"mul_": "`logits.mul_(s)`", "copy": "`grad.copy_(logits)`", "clone": "`logits.clone()`", "read": "read"}
# The floor that moves the same bytes through the same kind of memory. CUDA has no fresh pages to fault in: copy there.
FLOOR_OF = {"inplace": "mul", "separate": "clone", "reused": "copy", "forward": "read", "two_phase": "clone"}


# ---- records ---------------------------------------------------------------------------------------------------------


def load(files: Iterable[Path]) -> dict[str, list[Device]]:
    """{"cpu": [records of a device, ...], "cuda": ...}: per device, number of threads and case the newest file."""
    newest: dict[tuple[str, str, int], dict[str, tuple[str, Device]]] = {}
    for path in files:
        records = [json.loads(line) for line in path.read_text().splitlines() if line]
        if not records:
            continue
        last = {tuple(r[k] for k in KEY): r for r in records}
        date = max(r["date"] for r in records)
        cases = newest.setdefault((records[0]["device_type"], records[0]["device"], records[0]["threads"]), {})
        for (case,) in distinct(list(last.values()), "case"):
            if case not in cases or cases[case][0] < date:
                cases[case] = (date, where(last.values(), case=case))
    devices: dict[str, list[Device]] = {"cpu": [], "cuda": []}
    for (device_type, *_), cases in sorted(newest.items()):
        devices[device_type].append([record for _, records in cases.values() for record in records])
    return devices


def where(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose fields are as wanted; a tuple means any of these."""

    def fits(record: Record) -> bool:
        return all(record[k] in v if isinstance(v, tuple) else record[k] == v for k, v in wanted.items())

    return [record for record in records if fits(record)]


def distinct(records: Iterable[Record], *fields: str) -> list[tuple[Any, ...]]:
    """The different values of some fields, in the order of the records."""
    return list(dict.fromkeys(tuple(r[f] for f in fields) for r in records))


def label(contender: str, backend: str | None, mode: str, same_loss: bool = True) -> str:
    if mode == "floor":
        return f"floor: {FLOORS[contender]}"
    if contender == "fused":
        return f"**fused_losses** ({backend}), {MODES[mode]}"
    return f"{contender}, {MODES[mode]}" if mode == "inplace" else contender + ("" if same_loss else YARDSTICK)


# ---- cells -----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f}"


def cell(found: list[Record], render: Callable[[Record], str | None], even_if_wrong: bool = False) -> str:
    if not found:
        return NO_VALUE
    record = found[-1]
    if record["status"] not in ("ok", "inexact") and not (even_if_wrong and record["status"] == "wrong"):
        return record["status"]  # a time of something wrong is no time
    text = render(record)
    if text is None:
        return NO_VALUE
    return f"{text} {INEXACT}" if record["status"] == "inexact" and not even_if_wrong else text


def time_and_speedup(record: Record) -> str:
    text = f"{number(record['median_ms'])} ms"
    if record.get("speedup") and record["contender"] != "eager":
        text += f", {number(record['speedup'])}x"
    return text


def time_and_floor(record: Record) -> str:
    ratio = record.get("ratio_to_read" if record["mode"] == "forward" else "ratio_to_copy")
    return f"{number(record['median_ms'])} ms" + (f" ({ratio:.2f})" if ratio else "")


def floor_ratio(record: Record) -> str | None:
    ratio = record.get(f"ratio_to_{FLOOR_OF[record['mode']]}")
    return None if ratio is None else f"{number(ratio)}"


def megabytes(record: Record) -> str:
    return f"{number(record['peak_bytes'] / 1e6)} MB"


def error(field: str) -> Callable[[Record], str | None]:
    return lambda record: None if record.get(field) is None else f"{record[field]:.1e}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


def conditions(records: list[Record]) -> str:
    """The line under a table that says what its numbers are numbers of."""
    newest = max(records, key=lambda r: r["date"])
    parts = [newest["device"]]
    if newest["device_type"] == "cpu":
        parts.append(f"{newest['threads']} threads")
        if newest["touched_gb"]:
            parts.append(f"{newest['touched_gb']:g} GB of memory touched before")
    else:
        parts.append(f"driver {newest['driver']}, CUDA {newest['cuda']}")
    parts.append(f"torch {newest['torch']}, triton {newest['triton']}, Python {newest['python']}")
    changed = " with uncommitted changes" if newest["dirty"] else ""
    parts.append(f"commit {newest['commit']}{changed}, {newest['date'][:10]}")
    repeats = " or ".join(str(n) for (n,) in distinct(records, "repeats"))
    parts.append(f"medians of {repeats} interleaved repeats")
    if where(records, status="inexact"):
        parts.append(f"{INEXACT} the gradient at some target is off by more than 5 %")
    if newest["device_type"] == "cuda" and newest.get("absent"):
        parts.append(f"not installed: {', '.join(newest['absent'])}")
    return f"<sub>{'; '.join(parts)}.</sub>"


# ---- tables ----------------------------------------------------------------------------------------------------------


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


def in_order(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """This library first, by mode; floors last; the others between, in the order of the records."""

    def key(row: tuple[Any, ...]) -> tuple[bool, int]:
        contender, _, mode, _ = row
        return mode == "floor", list(MODES).index(mode) if contender == "fused" else len(MODES)

    return sorted(rows, key=key)


def main_cases(records: list[Record]) -> list[Record]:
    """ppo where torch.compile was among the opponents: the cases that a README shows."""
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
        name = f"**fused_losses** ({backend})" if contender == "fused" else contender + ("" if same_loss else YARDSTICK)
        cells = (where(records, contender=contender, backend=backend, mode=m, dtype=d, case=c) for m, d, c in heads)
        rows.append([name, *(cell(found, time_and_speedup) for found in cells)])
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
    plain = {key: where(records, contender="fused", case=key[0], dtype=key[1], mode=key[2]) for key in columns}

    def beside(record: Record) -> str:
        base = plain[record["case"], record["dtype"], record["mode"]]
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
        name = f"**fused_losses** ({backend})" if contender == "fused" else contender
        us = [cell(found, lambda r: f"{r['median_ms'] * 1e3:.0f} us") for found in (public, kernels)]
        rows.append([name, *us, cell(public, lambda r: f"{r['overhead_us']:.0f} us" if r.get("overhead_us") else None)])
    return markdown(["ppo, N = 1, V = 1024", "public call and backward", "bare kernels", "interface"], rows), records


def gpu_times(device: Device) -> tuple[str, list[Record]]:
    """Milliseconds and, in brackets, multiples of the copy (forward only: of the read) in the same run."""
    records = [
        r for r in where(device, group=("fwd+bwd", "forward", "two_phase"), mode=tuple(MODES)) if r["mode"] != "reused"
    ]
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


LOSSES = {"": "plain", "Identity": "with terms", "Softcap": "with terms and a softcap"}
ELEMENTS = {"bfloat16": "bf16", "float16": "fp16", "float": "fp32"}


def machine_code(files: list[Path]) -> str:
    """Instructions per element of one pass, the sum and the gradient together, of the newest file."""
    read = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    if not read:
        return markdown(["CUDA kernels", ""], [["any architecture", NOT_MEASURED]])
    newest = max(read, key=lambda records: records[0]["date"])
    one_pass = [r for r in newest if r["kernel"].endswith("loss_and_grad_kernel")]
    architectures = sorted({r["architecture"] for r in one_pass}, key=lambda a: int(re.sub(r"\D", "", a)))

    def per_element(transform: str, dtype: str, architecture: str) -> str:
        (r,) = where(one_pass, transform=transform, dtype=dtype, architecture=architecture)
        loops = r["instructions_per_element"]
        return f"{loops['sum'] + loops['map']:.1f}, {r['registers']}"

    rows = [
        [f"{loss}, {element}", *(per_element(transform, dtype, a) for a in architectures)]
        for transform, loss in LOSSES.items()
        for dtype, element in ELEMENTS.items()
    ]
    first = newest[0]
    changed = " with uncommitted changes" if first["dirty"] else ""
    return f"{markdown(['one pass', *architectures], rows)}\n\n<sub>commit {first['commit']}{changed}.</sub>"


Table = Callable[[Device], tuple[str, list[Record]]]
TABLES: dict[str, tuple[str, Table]] = {
    "cpu": ("cpu", cpu_times),
    "cpu-floor": ("cpu", cpu_floor),
    "cpu-modes": ("cpu", cpu_modes),
    "cpu-losses": ("cpu", cpu_losses),
    "cpu-terms": ("cpu", terms),
    "cpu-memory": ("cpu", memory_and_errors),
    "cpu-overhead": ("cpu", overhead),
    "gpu": ("cuda", gpu_times),
    "gpu-terms": ("cuda", terms),
    "gpu-latency": ("cuda", gpu_latency),
    "gpu-memory": ("cuda", memory_and_errors),
    "gpu-overhead": ("cuda", overhead),
}


def tables(devices: dict[str, list[Device]]) -> dict[str, str]:
    """Each table with its line of conditions, one after the other for several devices."""
    texts = {}
    for name, (device_type, table) in TABLES.items():
        parts = []
        for device in devices[device_type]:
            text, records = table(device)
            if records:
                parts += [text, conditions(records)]
        what = {"cpu": "CPU", "cuda": "GPU"}[device_type]
        texts[name] = "\n\n".join(parts) or markdown([what, ""], [[f"any {what}", NOT_MEASURED]])
    return texts


def spliced(readme: str, texts: dict[str, str]) -> tuple[str, list[str]]:
    """The README with each marked table replaced, and the names of the tables found in it."""
    found: list[str] = []

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in texts:
            raise SystemExit(f"README asks for the table {name!r}; there are {', '.join(texts)}")
        found.append(name)
        return f"<!-- bench:{name} -->\n{texts[name]}\n<!-- /bench:{name} -->"

    pattern = r"<!-- bench:(?P<name>[\w-]+) -->.*?<!-- /bench:(?P=name) -->"
    return re.sub(pattern, replace, readme, flags=re.DOTALL), found


# ---- plots -----------------------------------------------------------------------------------------------------------

BLUE, SKY, GREY, LIGHT = "#0072B2", "#56B4E9", "#7F7F7F", "#BFBFBF"  # tell apart with any colour vision


def plot(device: Device, path: Path) -> None:
    """A panel per case, loss and dtype: forward and backward as multiples of the copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [
        r for r in where(device, group="fwd+bwd", status=("ok", "inexact")) if r["contender"] not in ("read", "mul_")
    ]
    shown = distinct(main_cases(records), "case", "loss", "dtype")[:8]
    if not shown:
        return
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    bars = max(len(where(records, case=c, loss=lo, dtype=d)) for c, lo, d in shown)
    size = (5.4 * columns, rows * (0.8 + 0.3 * bars))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (case, loss, dtype) in zip(axes.flat, shown, strict=False):
        panel = where(records, case=case, loss=loss, dtype=dtype)
        order = in_order(distinct(panel, *ROW))
        draw(axis, [where(panel, **dict(zip(ROW, row, strict=True)))[-1] for row in order])
        axis.set_title(f"{loss}, {case}, {dtype}", loc="left", fontsize=10)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    newest = max(records, key=lambda r: r["date"])
    threads = f", {newest['threads']} threads" if newest["device_type"] == "cpu" else ""
    figure.suptitle(
        "Forward and backward, time / time of grad.copy_(logits)\n"
        f"{newest['device']}{threads}, torch {newest['torch']}, commit {newest['commit']}, {newest['date'][:10]}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw(axis: Any, bars: list[Record]) -> None:
    """Horizontal bars with p20 to p80 as whiskers and the value beside each."""
    ends = []
    for y, r in enumerate(bars):
        ratio, copy = r["ratio_to_copy"], r["median_ms"] / r["ratio_to_copy"]
        colour = LIGHT if r["mode"] == "floor" else GREY
        if r["contender"] == "fused":
            colour = BLUE if r["mode"] == "inplace" else SKY
        axis.barh(y, ratio, color=colour, height=0.72)
        axis.plot([r["p20_ms"] / copy, r["p80_ms"] / copy], [y, y], color="black", linewidth=1)
        ends.append(max(ratio, r["p80_ms"] / copy))
        text = f"{number(ratio)}x  {number(r['median_ms'])} ms"
        axis.annotate(text, (ends[-1], y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    names = [label(*(r[field] for field in ROW)) for r in bars]
    axis.set_yticks(range(len(bars)), [re.sub(r"[*`]", "", name) for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, max(ends) * 1.4)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="files of records; default: all in --results")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "bench" / "plots")
    parser.add_argument("--check", action="store_true", help="compare, write nothing, exit 1 on a difference")
    options = parser.parse_args(argv)

    devices = load(options.records or sorted(options.results.glob("*.jsonl")))
    texts = tables(devices) | {"machine-code": machine_code(sorted(options.results.glob("machine_code/*.jsonl")))}
    old = options.readme.read_text() if options.readme.exists() else ""
    new, found = spliced(old, texts)
    if options.check:
        if not found:
            print(f"{options.readme.name} has no marked table", file=sys.stderr)
            return 1
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "the records", lineterm="")
        print("\n".join(diff), file=sys.stderr)
        return int(old != new)
    for name, text in texts.items():
        print(f"## {name}{'' if name in found else '  (not in the README)'}\n\n{text}\n")
    if found:
        options.readme.write_text(new)
    for device_type, name in (("cpu", "cpu"), ("cuda", "gpu")):
        for i, device in enumerate(devices[device_type]):
            plot(device, options.plots / f"{name}{i + 1 if i else ''}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
