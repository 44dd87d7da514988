"""The documentation runs: every python block of docs/**/*.md and README.md, in one namespace per file.

A comment right before a block says otherwise: ``<!-- not run: why -->``; or ``<!-- needs: package -->``, which skips
the rest of the file where that package is not installed.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import fused_losses

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (not run|needs): (.+?) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_python_blocks(page):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")  # none is missed
    namespace = {"__name__": page.stem}
    torch.manual_seed(0)
    for block in blocks:
        marker, what, code = block.groups()
        if marker == "not run":
            continue
        if marker == "needs" and importlib.util.find_spec(what) is None:
            pytest.skip(f"{what} is not installed")
        # at its own line of the page, for tracebacks, and for triton.jit, which reads a function's source
        lines_before = text.count("\n", 0, block.start(3))
        exec(compile("\n" * lines_before + code, page, "exec"), namespace)


def test_the_code_that_readme_compares():
    """Its first two blocks, which lack what they are given: the same loss."""
    eager, ours = (block.group(3) for block in list(BLOCK.finditer(PAGES[0].read_text()))[:2])
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (3, 8))
    targets[:, :2] = -100
    given = {
        "torch": torch, "fused_losses": fused_losses, "logits": torch.randn(3, 8, 50), "targets": targets,
        "old_logprobs": torch.randn(3, 8) - 4, "advantages": torch.randn(3, 8),
    }  # fmt: skip
    losses = []
    for code in (eager, ours):
        namespace = dict(given)
        exec(code, namespace)
        losses.append(namespace["loss"])
    torch.testing.assert_close(*losses)


@pages
def test_links(page):
    """To other files, and to headings in them."""
    text = page.read_text()
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
