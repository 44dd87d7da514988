"""The site of docs/: all that is public is in its reference, and what leads nowhere fails the build.

Needs mkdocs, of the extra "docs".
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_losses

ROOT = Path(__file__).resolve().parent.parent
SPOILT = [  # a file, what is added to it, what the build says of it
    ("docs/policy.md", "[x](no_such_page.md)", "no_such_page.md"),
    ("docs/policy.md", "[x](contracts.md#no-such-heading)", "contracts.md#no-such-heading'"),
    ("docs/policy.md", "[x](#no-such-heading-here)", "#no-such-heading-here"),
    ("docs/adapters/index.md", "[x](../api/losses.md#fused_losses.no_such_loss)", "no_such_loss"),
    ("README.md", "[x](docs/contracts.md#no-such-heading-either)", "#no-such-heading-either"),
    ("docs/policy.md", "![x](https://example.org/x.png)", "https://example.org/x.png"),
    ("docs/policy.md", "issue\n#907 at the start of a line", "policy.md has two titles"),
    ("docs/sequence.md", "a list:\n* of one", "sequence.md has a list"),
    ("docs/sources.md", "a table:\n| of | two |\n|---|---|", "sources.md has a table"),
    ("docs/kernels.md", "\n| `a \\| b` | |\n|---|---|\n", "kernels.md has a bar"),
    ("docs/new.md", "# On no list", "new.md"),
    ("fused_losses/losses.py", ":class:`stages.Source`, which no page has", "fused_losses.stages.Source"),
    ("fused_losses/losses.py", ":term:`logits`, a role that is not known", ":term:"),
]
pytest.importorskip("mkdocs")
pytestmark = pytest.mark.xdist_group("site")  # what the tests share is made once


def build(checkout: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the build of a copy with all faults."""
    checkout = tmp_path_factory.mktemp("spoilt")
    for name in ("docs", "examples", "fused_losses"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "output"))
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(path, checkout / path.name)
    for page, added, _ in SPOILT:
        path = checkout / page
        if path.suffix == ".py":
            start = '"""Cross entropy: '
            assert start in path.read_text()
            path.write_text(path.read_text().replace(start, f"{start}{added}; ", 1))
        else:
            path.write_text((path.read_text() if path.exists() else "") + f"\n{added}\n")
    done = build(checkout, checkout / "site")
    assert done.returncode != 0
    return done.stderr


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages |= {Path(f"{name}.html") for name in ("index", "changelog", "contributing", "examples")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}


def test_every_framework_with_a_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "adapters" / "index.md").read_text()
    pages = [path.name for path in (ROOT / "docs" / "adapters").glob("*.md") if path.name != "index.md"]
    assert pages and [page for page in pages if f"]({page})" not in index] == []


def test_all_that_is_public_is_in_the_reference(site: Path) -> None:
    text = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    modules = [f"adapters.{path.stem}" for path in (ROOT / "fused_losses" / "adapters").glob("[!_]*.py")]
    names = [*(name for name in fused_losses.__all__ if name != "__version__"), *modules]
    assert [name for name in names if f'id="fused_losses.{name}"' not in text] == []


def test_docstrings_are_rendered(site: Path) -> None:
    """Roles are links, also to names that are imported where they stand; "low, high: bounds" is two entries."""
    losses = (site / "api" / "losses.html").read_text()
    assert re.search(r'href="outputs.html#[\w.]*Outputs"', losses)
    assert re.search(r'href="sources.html#[\w.]*VocabShard"', losses)
    assert losses.count("see <code>clip_high_threshold</code>") >= 2
    assert "where an entropy_coef is in use" in (site / "api" / "outputs.html").read_text()  # a field's comment


@pytest.mark.parametrize("page, added, complaint", SPOILT, ids=lambda value: value)
def test_what_leads_nowhere_fails(complaints: str, page: str, added: str, complaint: str) -> None:
    assert complaint in complaints
