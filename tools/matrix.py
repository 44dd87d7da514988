"""What runs with which Python and torch: one line for each pair.

    python tools/matrix.py --root FOLDER python3.10=2.10.0 python3.13=2.15.0

Each pair has a virtual environment under --root, made where it is not there yet (torch with CUDA takes 5 GB). A wheel
of the source distribution goes into it. Then, away from the checkout: the import, `python -m fused_losses`, and what of
the suite concerns the cpu and eager backends, about 3 minutes on one core. FOLDER/*.log has what was printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("numpy", "setuptools>=77.0.3", "pybind11>=2.12", "pytest>=8", "hypothesis", "expecttest")
# What a Python or torch may break: autograd, dispatch, compilation. What else there is in these files is arithmetic.
SUITE = ("losses", "gradients", "compile", "interface", "terms", "policy", "sequences")
SELECTED = "(test_losses or test_gradients or test_interface or compile) and not triton and not cuda"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}


class Failed(Exception):
    """A step of a pair; its output is in the log."""


class Pair:
    def __init__(self, python: str, torch: str, root: Path):
        code = "import sys; print(*sys.version_info[:2], sep='.')"
        self.version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        self.name = f"python{self.version}-torch{torch}"
        self.base, self.torch, self.venv = python, torch, root / self.name
        self.log = root / f"{self.name}.log"
        self.log.write_text("")

    def run(self, step: str, *command: object, cwd: Path = ROOT) -> str:
        done = subprocess.run(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=ENVIRONMENT
        )
        with self.log.open("a") as log:
            print(f"$ {' '.join(map(str, command))}", done.stdout, file=log, sep="\n")
        if done.returncode:
            raise Failed(f"{step}: {' '.join(done.stdout.strip().splitlines()[-1:])}, see {self.log.name}")
        return done.stdout

    def python(self, step: str, *arguments: object, cwd: Path = ROOT) -> str:
        return self.run(step, self.venv / "bin" / "python", *arguments, cwd=cwd)

    def make(self) -> None:
        if not self.venv.is_dir():
            self.run("venv", self.base, "-m", "venv", self.venv)
            try:
                self.python("dependencies", "-m", "pip", "install", f"torch=={self.torch}", *NEEDED)
            except Failed:
                shutil.rmtree(self.venv)  # half of it would pass for all of it next time
                raise

    def check(self, wheel: Path, source: Path) -> str:
        """source: the tests, with no package beside them that would be imported in the wheel's place."""
        self.python("install", "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
        code = "import fused_losses, torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
        versions = self.python("import", "-c", code, cwd=source).strip().splitlines()[-1]
        return f"{versions}: self-test {self.self_test(source)}; suite {self.suite(source)}"

    def self_test(self, source: Path) -> str:
        try:
            doctor = json.loads(self.python("", "-m", "fused_losses", "--json", cwd=source))
        except Failed as failure:
            return f"FAILED{failure}"
        return "ok: " + ", ".join(name for name, b in doctor["devices"][0]["backends"].items() if b["usable"])

    def suite(self, source: Path) -> str:
        files = [f"tests/test_{name}.py" for name in SUITE]
        try:
            return self.python("", "-m", "pytest", *files, "-k", SELECTED, cwd=source).strip().splitlines()[-1]
        except Failed as failure:
            return f"FAILED{failure}"


def sdist(pair: Pair, folder: Path) -> tuple[Path, Path]:
    """The source distribution, and its unpacked files without the package."""
    pair.python("sdist", "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    source = folder / archive.name.removesuffix(".tar.gz")
    for package in ("fused_losses", "triton_kernels"):
        shutil.rmtree(source / package)
    return archive, source


def wheel(pair: Pair, archive: Path, folder: Path) -> Path:
    """One for each Python: the extensions know nothing of torch."""
    folder = folder / pair.version
    if not folder.is_dir():
        options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
        pair.python("wheel", "-m", "pip", "wheel", *options, archive)
    (path,) = folder.glob("*.whl")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="PYTHON=TORCH", help="a Python's command, a version of torch")
    parser.add_argument("--root", type=Path, required=True, help="folder of the environments and logs")
    options = parser.parse_args()
    options.root = options.root.resolve()
    options.root.mkdir(parents=True, exist_ok=True)
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        made: tuple[Path, Path] | None = None
        for text in options.pairs:
            python, torch = text.rsplit("=", 1)
            pair = Pair(python, torch, options.root)
            try:
                pair.make()
                made = made or sdist(pair, Path(temporary))
                outcome = pair.check(wheel(pair, made[0], Path(temporary)), made[1])
            except Failed as failure:
                outcome = f"FAILED {failure}"
            failures += "FAILED" in outcome
            print(f"Python {pair.version}, torch {torch}: {outcome}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
