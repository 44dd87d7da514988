"""What pip gets: a source distribution that builds, and a wheel that holds the whole package.

The compilers are stand-ins that write down their arguments, so that this takes seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_TRACKED = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", "output", ".hypothesis", ".*_cache")
)
COMPILER = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo "{knows}"; exit; fi
echo "$0 $*" >> {log}
while [ "$1" != -o ]; do shift; done
echo object > "$2"
"""


def build(hook: str, source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A hook of the build backend, as pip calls it: in a process of its own, in the source's folder."""
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**os.environ, **environment}, capture_output=True, text=True
    )


def relative_files(folder: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves a list of files beside its source, and would take what an older one lists."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "source", ignore=NOT_TRACKED))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    done = build("build_sdist", checkout, out)
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out)
    return out / archive.name.removesuffix(".tar.gz")


class Compilers:
    """Stand-ins for a launcher such as ccache, for a C++ compiler and for nvcc, which knows some architectures."""

    def __init__(self, folder: Path, knows: str = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"):
        self.log = folder / "log"
        (folder / "bin").mkdir()
        for name in ("launcher", "nvcc"):
            path = folder / "bin" / name
            path.write_text(COMPILER.format(log=self.log, knows=knows))
            path.chmod(0o755)
        self.cxx = f"{folder}/bin/launcher g++ -m64"
        self.nvcc = folder / "bin" / "nvcc"
        self.environment = {"CXX": self.cxx, "CUDA_HOME": str(folder)}

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Compilers:
    return Compilers(tmp_path_factory.mktemp("compilers"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, compilers: Compilers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution."""
    out = tmp_path_factory.mktemp("wheel")
    done = build("build_wheel", sdist, out, **compilers.environment)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_sdist_has_what_the_checkout_has(checkout: Path, sdist: Path) -> None:
    folders = ("bench", "csrc", "docs", "examples", "fused_losses", "tests", "tools", "triton_kernels")
    wanted = relative_files(checkout, *(f"{folder}/**/*" for folder in folders), "*.*", "Makefile", "LICENSE")
    wanted -= relative_files(checkout, "*.egg-info/*", ".git*")
    assert wanted - relative_files(sdist, "**/*") == set()
    assert not relative_files(sdist, "**/*.so", "**/*.pyc")


def test_every_include_resolves_in_the_sdist(sdist: Path) -> None:
    sources = [path for path in sdist.glob("csrc/**/*") if path.is_file()]
    includes = [(path, name) for path in sources for name in re.findall(r'#include "(.*)"', path.read_text())]
    assert includes
    # host_cuda.h stands in for CUDA's own headers when device code is compiled for the host
    folders = {path: (path.parent, sdist / "tests" / "host_cuda") for path in sources}
    missing = [
        f"{path.relative_to(sdist)}: {name}"
        for path, name in includes
        if not any((folder / name).is_file() for folder in folders[path])
    ]
    assert not missing


def test_wheel_from_the_sdist_holds_the_package(checkout: Path, wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    python = relative_files(checkout, "fused_losses/**/*.py", "fused_losses/py.typed")
    triton = {f"fused_losses/{name}" for name in relative_files(checkout, "triton_kernels/*.py")}
    assert triton and python | triton == {n for n in held if n.startswith("fused_losses/") and not n.endswith(".so")}
    modules = {re.sub(r"\..*", "", name) for name in held if name.endswith(".so")}
    assert modules == {"fused_losses/_cpu", "fused_losses/_cuda"}


def test_every_source_is_compiled_by_the_whole_command(sdist: Path, wheel: Path, compilers: Compilers) -> None:
    """CXX may begin with a launcher: its first word alone would launch flags."""
    compiled = {m[1]: command for command in compilers.commands() if (m := re.search(r" -c (\S+) -o ", command))}
    assert compiled.keys() >= relative_files(sdist, "csrc/cuda/*.cu", "csrc/*.cpp")
    for source, command in compiled.items():
        assert command.startswith(f"{compilers.cxx} " if source.endswith(".cpp") else f"{compilers.nvcc} ")
    (link,) = (c for c in compilers.commands() if "_cpu" in c and " -shared " in c)
    assert link.startswith(f"{compilers.cxx} ")


def test_an_older_nvcc_compiles_for_what_it_knows(sdist: Path, tmp_path: Path) -> None:
    """And as PTX for what comes after: it would refuse all for one that it does not know."""
    compilers = Compilers(tmp_path, knows="sm_75 sm_80 sm_90")
    done = build("build_wheel", sdist, tmp_path, **compilers.environment)
    assert done.returncode == 0, done.stderr
    assert "does not know sm_100" in done.stderr
    for command in compilers.commands():
        if ".cu -o " in command:
            codes = re.findall(r",code=(\w+)", command)
            assert codes == ["sm_80", "sm_90a", "compute_90"] and '="80;90a"' in command


def test_an_nvcc_that_knows_none_is_refused(sdist: Path, tmp_path: Path) -> None:
    done = build("build_wheel", sdist, tmp_path, **Compilers(tmp_path, knows="sm_52 sm_70").environment)
    assert done.returncode != 0 and "compiles for none of sm_80, sm_90a, sm_100" in done.stderr
    assert f"{tmp_path}/bin/nvcc" in done.stderr


def test_a_compiler_that_is_not_there_is_named(sdist: Path, tmp_path: Path) -> None:
    done = build("build_wheel", sdist, tmp_path, CXX="no-such-compiler -O2")
    assert done.returncode != 0
    assert "CXX='no-such-compiler -O2'" in done.stderr and "'no-such-compiler'" in done.stderr


def test_the_doctor_says_what_the_install_left_out() -> None:
    """pip hides the notice of setup.py: without a compiler CPU tensors would be slow and nobody told."""
    code = (
        "import sys\n"
        "sys.modules['fused_losses._cpu'] = None  # not there\n"
        "from fused_losses import __main__ as doctor\n"
        "doctor.self_test = lambda *_: {'ok': True, 'error_over_allowed': {}}\n"
        "sys.argv = ['fused_losses']\n"
        "sys.exit(doctor.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("left out at install: cpu") and "pip install -v" in last, done.stdout
