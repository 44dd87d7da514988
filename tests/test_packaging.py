"""What pip gets: a source distribution that builds, and a wheel that holds the whole package.

The compilers are stand-ins that write down their arguments, so that this takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_losses
from fused_losses import __main__ as doctor
from fused_losses import build as built

ROOT = Path(__file__).resolve().parent.parent
NOT_TRACKED = shutil.ignore_patterns(
    *(
        ".git",
        ".venv",
        "build",
        "dist",
        "*.egg-info",
        "*.so",
        "__pycache__",
        "output",
        ".hypothesis",
        ".*_cache",
        "commit.txt",
    )
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
    """A copy: a build leaves a list of files beside its source, and would take what an older one lists. In a repository
    of its own, where there is git."""
    folder = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "source", ignore=NOT_TRACKED))
    if shutil.which("git"):
        git(folder, "init", "--quiet")
        git(folder, "add", ".")
        git(folder, "-c", "user.name=tests", "-c", "user.email=tests@localhost", "commit", "--quiet", "--message=all")
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


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
    assert wheel.name.startswith(f"fused_losses-{fused_losses.__version__}-")


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


@needs_git
def test_a_module_knows_its_commit(checkout: Path, sdist: Path, wheel: Path, compilers: Compilers) -> None:
    """Through the source distribution, which has no repository; and a build leaves the repository as it was."""
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert (sdist / "commit.txt").read_text().strip() == commit
    assert git(checkout, "status", "--porcelain") == ""
    for source in ("csrc/bindings_cpu.cpp", "csrc/bindings_cuda.cpp"):
        (command,) = (c for c in compilers.commands() if f" -c {source} " in c)
        assert f'-DFL_COMMIT="{commit}"' in command
        assert '-DFL_FLAGS="g++ -m64 -std=c++17 ' in command


@needs_git
def test_a_commit_of_another_repository_is_none(checkout: Path, sdist: Path, tmp_path: Path) -> None:
    inner = Path(shutil.copytree(sdist, checkout / "build" / "inner", ignore=shutil.ignore_patterns("commit.txt")))
    compilers = Compilers(tmp_path)
    done = build("build_wheel", inner, tmp_path, **compilers.environment)
    assert done.returncode == 0, done.stderr
    assert {c for c in compilers.commands() if "FL_COMMIT" in c and '-DFL_COMMIT="" ' not in c} == set()
    assert any("FL_COMMIT" in c for c in compilers.commands())


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
    assert re.match(r"left out at install: (cuda, )?cpu; .*pip install -v", last), done.stdout


@pytest.mark.parametrize(
    "installation, says", [("wheel, tag", "not in wheels: cuda"), ("editable", "left out at install")]
)
def test_the_doctor_says_how_to_get_what_is_left_out(
    installation: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"fused_losses": "1", "python": "3", "torch": "2", "triton": None, "cuda": None, "devices": [], "ok": True}
    doctor.show({**result, "installation": installation, "modules": {"cuda": None}, "left_out": ["cuda"]})
    printed = capsys.readouterr().out
    assert f"installation: {installation}" in printed and printed.splitlines()[-1].startswith(says)


def test_the_doctor_says_what_a_module_was_built_of() -> None:
    build = {"commit": "0123456789ab", "compiler": "GCC 14.2.1", "flags": "-O3"}
    cpu = {**build, "instruction_sets": ["avx2", "baseline"], "in_use": "avx2"}
    assert doctor.show_module(cpu) == "commit 0123456789ab; avx2 (in use), baseline; GCC 14.2.1 -O3"
    cuda = {**build, "cuda": "13.0", "architectures": ["80", "90a"]}
    assert doctor.show_module(cuda) == "commit 0123456789ab; CUDA 13.0 for sm_80, sm_90a; GCC 14.2.1 -O3"


MANYLINUX, LINUX = "cp311-cp311-manylinux_2_28_x86_64", "cp311-cp311-linux_x86_64"


@pytest.mark.parametrize(
    "tag, folder, editable, says",
    [
        (MANYLINUX, ".", False, f"wheel, {MANYLINUX}"),
        (LINUX, ".", False, f"built from source, {LINUX}"),
        ("py3-none-any", "checkout", True, "editable, "),
        (MANYLINUX, "checkout", False, "not installed: "),  # a wheel of other files
        (None, ".", False, "not installed: "),  # what a build leaves in a checkout
    ],
)
def test_the_installation_is_told_by_its_metadata(
    tag: str | None, folder: str, editable: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "fused_losses-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: fused-losses\nVersion: 0.1.0\n")
    if tag is not None:
        (metadata / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {tag}\n")
    if editable:
        origin = {"url": (tmp_path / folder).as_uri(), "dir_info": {"editable": True}}
        (metadata / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(built, "PACKAGE", tmp_path / folder / "fused_losses")
    assert built.installation().startswith(says)


# ---- wheels for others -----------------------------------------------------------------------------------------------

REPAIR = ROOT / "tools" / "repair_wheel.py"
AUDITWHEEL = """#!{python}
import pathlib, sys, zipfile
arguments = sys.argv[1:]
assert arguments[:3] == ["repair", "--exclude", "libgomp.so.1"], arguments
wheel, folder = pathlib.Path(arguments[-1]), pathlib.Path(arguments[arguments.index("--wheel-dir") + 1])
copy = folder / wheel.name.replace("-linux_", "-manylinux_2_28_")
copy.write_bytes(wheel.read_bytes())
if {bundles}:
    zipfile.ZipFile(copy, "a").writestr("fused_losses.libs/libother.so", "")
"""


def with_modules(folder: Path, *modules: str) -> Path:
    wheel = folder / "fused_losses-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for module in modules:
            archive.writestr(f"fused_losses/{module}.cpython-311-x86_64-linux-gnu.so", "")
    return wheel


def repair(wheel: Path, bundles: bool = False) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """By a stand-in for auditwheel; the names of what came of it."""
    auditwheel = wheel.parent / "auditwheel"
    auditwheel.write_text(AUDITWHEEL.format(python=sys.executable, bundles=bundles))
    auditwheel.chmod(0o755)
    environment = {**os.environ, "PATH": f"{wheel.parent}{os.pathsep}{os.environ['PATH']}"}
    out = wheel.parent / "out"
    command = [sys.executable, str(REPAIR), str(wheel), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, [path.name for path in out.glob("*")]


def test_a_repaired_wheel_shares_the_openmp_of_torch(tmp_path: Path) -> None:
    done, names = repair(with_modules(tmp_path, "_cpu"))
    assert (done.returncode, names) == (0, ["fused_losses-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"]), done.stderr
    done, names = repair(with_modules(tmp_path, "_cpu"), bundles=True)
    assert done.returncode != 0 and "auditwheel copied fused_losses.libs/libother.so" in done.stderr


@pytest.mark.parametrize("modules, says", [(("_cpu", "_cuda"), "has the CUDA module"), ((), "has no CPU module")])
def test_a_wheel_that_is_not_for_others_is_refused(modules: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done, names = repair(with_modules(tmp_path, *modules))
    assert done.returncode != 0 and says in done.stderr and not names


def test_cibuildwheel_names_files_that_exist() -> None:
    (section,) = re.findall(
        r"^\[tool\.cibuildwheel\]\n(.*?)^\[tool\.ruff\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    named = re.findall(r"\b(?:tests|tools)/\w+\.py", section)
    assert len(named) > 1 and all((ROOT / name).is_file() for name in named)
    assert 'build = ["cp310-*", "cp311-*", "cp312-*", "cp313-*"]' in section


def test_the_changelog_is_of_this_version() -> None:
    """What is not released comes first; then the version, once it is."""
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and headings[1:2] in ([], [fused_losses.__version__])
