"""mkdocs: pages from outside docs/, links as GitHub has them, and folders in the nav.

A page with markup that was not rendered as it is on GitHub, or that asks another host for something, is a warning, with
which a strict build fails.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
UNWANTED = {  # GitHub shows the first four as they are meant
    r"(?s)<h1\b.*<h1\b": "has two titles: does a line begin with a #?",
    r"(?s)<p>(?:(?!</p>).)*\n[*-] ": "has a list that does not follow an empty line",
    r"(?s)<p>(?:(?!</p>).)*\n\| ": "has a table that does not follow an empty line",
    r"<code>[^<]*\\\|[^<]*</code>": "has a bar in the code of a table, where it can't be escaped",
    r":[a-z]+:(<code>|`)": "shows a role that was not rendered",
    r'<(script|img|iframe)[^>]* src="(https?:)?//[^"]*"': "asks another host",
    r'<link[^>]* rel="?(stylesheet|preconnect|icon)[^>]* href="(https?:)?//[^"]*"': "asks another host",
}
log = logging.getLogger("mkdocs.hooks.docs")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A nav entry that ends in a slash is all pages of that folder, its index first."""
    for entry in config.nav:
        for title, target in entry.items():
            if isinstance(target, str) and target.endswith("/"):
                folder = Path(config.docs_dir) / target
                pages = sorted(folder.glob("*.md"), key=lambda page: (page.name != "index.md", page.name))
                entry[title] = [target + page.name for page in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for outside, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / outside)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links between files of the repository become links between pages."""
    inside = page.file.src_uri
    here = next((outside for outside, name in OUTSIDE.items() if name == inside), f"docs/{inside}")

    def moved(link: re.Match[str]) -> str:
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        there = OUTSIDE.get(there, there.removeprefix("docs/"))
        return posixpath.relpath(there, posixpath.dirname(inside) or ".")

    code = CODE.findall(markdown)
    prose = CODE.split(markdown)
    prose = [LINK.sub(moved, text) for text in prose]
    return "".join(text for pair in zip(prose, [*code, ""], strict=True) for text in pair)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    for pattern, what in UNWANTED.items():
        if found := re.search(pattern, output):
            log.warning(f"{page.file.src_uri} {what}: {found[0][:200]}")
    return output
