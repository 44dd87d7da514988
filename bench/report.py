"""Turn records into the tables of README.md, docs/measured.md and docs/adapters, and the plots of docs/plots.

    python bench/report.py            # print the tables, put them into the pages, draw the plots
    python bench/report.py --check    # exit 1 if a page says something else than the records; writes nothing

A table named NAME goes between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; no number there is typed by hand.
Of each device, case and dtype the newest file of records counts.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

from plots import plot
from records import RESULTS, load
from tables import machine_code, ratios, tables

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("torchtitan", "ms_swift", "openrlhf", "trl", "verl", "skyrl", "megatron", "prime_rl", "transformers")
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "measured.md",
    *(ROOT / "docs" / "adapters" / f"{framework}.md" for framework in ADAPTERS),
]


def spliced(page: str, texts: dict[str, str]) -> tuple[str, list[str]]:
    """The page with each marked table replaced, and the names of the tables found in it."""
    found: list[str] = []

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in texts:
            raise SystemExit(f"a page asks for the table {name!r}; there are {', '.join(texts)}")
        found.append(name)
        return f"<!-- bench:{name} -->\n{texts[name]}\n<!-- /bench:{name} -->"

    pattern = r"<!-- bench:(?P<name>[\w-]+) -->.*?<!-- /bench:(?P=name) -->"
    return re.sub(pattern, replace, page, flags=re.DOTALL), found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="files of records; default: all in --results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pages", nargs="+", type=Path, default=PAGES)
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots")
    parser.add_argument("--check", action="store_true", help="compare, write nothing, exit 1 on a difference")
    options = parser.parse_args(argv)

    devices = load(options.records or sorted(options.results.glob("*.jsonl")))
    texts = {
        "ratios": ratios(devices),
        **tables(devices),
        "machine-code": machine_code(sorted(options.results.glob("machine_code/*.jsonl"))),
    }
    fine, shown = True, set()
    for page in options.pages:
        old = page.read_text() if page.exists() else ""
        new, found = spliced(old, texts)
        shown.update(found)
        if not options.check:
            if found:
                page.write_text(new)
        elif not found:
            print(f"{page.name} has no marked table", file=sys.stderr)
            fine = False
        else:
            diff = difflib.unified_diff(old.splitlines(), new.splitlines(), page.name, "the records", lineterm="")
            print("\n".join(diff), file=sys.stderr)
            fine &= old == new
    if options.check:
        return int(not fine)
    for name, text in texts.items():
        print(f"## {name}{'' if name in shown else '  (on no page)'}\n\n{text}\n")
    for device_type, name in (("cpu", "cpu"), ("cuda", "gpu")):
        for i, device in enumerate(devices[device_type]):
            plot(device, options.plots / f"{name}{i + 1 if i else ''}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
