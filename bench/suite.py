"""How long the test suite takes, as a record.

python bench/suite.py                                   # of this checkout
python bench/suite.py --checkout FOLDER --commit ID     # of another, to compare with
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from conditions import conditions
from records import RESULTS

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose suite; its extensions must be built")
    parser.add_argument("--commit", help="of it; default: this checkout's")
    parser.add_argument("--workers", type=int, default=2, help="of pytest-xdist; as in make test")
    parser.add_argument("--out", type=Path, default=RESULTS / "suite")
    options = parser.parse_args()

    command = [sys.executable, "-m", "pytest", "-n", str(options.workers), "--dist", "loadgroup"]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=options.checkout,
        env={**os.environ, "PYTHONPATH": str(options.checkout.resolve())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - start
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout[-500:])}
    record = {"seconds": round(seconds, 1), "workers": options.workers, "counts": counts}
    record |= conditions(torch.device("cpu"), options.commit)
    print(done.stdout[-2000:])
    print(f"{seconds:.0f} s with {options.workers} workers")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{record['date'][:10]}-{record['commit']}.jsonl"
    path.write_text(json.dumps(record) + "\n")
    print(path)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
