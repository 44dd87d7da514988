"""griffe: docstrings as this package writes them, for the reference.

Roles such as :func:`ppo` become links to where the reference has the name, "low, high: bounds" among the arguments one
entry for each, and the comments beside the fields of a record the text of these.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`([^`]+)`")
TOGETHER = re.compile(r"^    (\w+(?:, \w+)+): ", re.MULTILINE)
RETURNED = re.compile(r"^    ``([^`]+)``: ", re.MULTILINE)  # what stands before the colon is code anyway


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """The whole package is loaded, so that a name can be looked up in it."""
        rewrite(pkg, pkg)


def rewrite(found: griffe.Object, package: griffe.Module) -> None:
    if found.docstring:
        text = ROLE.sub(lambda role: link(role[1], found, package), found.docstring.value)
        if isinstance(found, griffe.Function | griffe.Class):
            text = TOGETHER.sub(lambda names: apart(names, found.parameters), RETURNED.sub(r"    \1: ", text))
        if isinstance(found, griffe.Class) and {"NamedTuple", "dataclass"} & {*map(str, found.bases), *found.labels}:
            text += f"\n\nAttributes:\n{fields(found)}"
        found.docstring.value = text
    for member in found.members.values():
        if not member.is_alias:
            rewrite(member, package)


def link(name: str, where: griffe.Object, package: griffe.Module) -> str:
    """To a name of this package, seen from where the docstring stands or else from the package; others are code.

    So is what has no docstring: the reference leaves it out.
    """
    start = f"{package.path}."
    try:
        if name.startswith("."):  # as in an import
            path = f"{where.module.path.rpartition('.')[0]}{name}"
        else:
            path = name if name.startswith(start) else where.resolve(name)
    except griffe.NameResolutionError:
        path = start + name
    try:
        known = package[path.removeprefix(start)].has_docstring
    except (KeyError, griffe.AliasResolutionError):
        known = False
    name = name.lstrip(".")
    return f"[`{name}`][{path}]" if known else f"`{name}`"


def apart(names: re.Match[str], parameters: griffe.Parameters) -> str:
    """The last of them keeps the text, the others refer to it."""
    *others, last = names[1].split(", ")
    if any(name not in parameters for name in (*others, last)):  # exceptions, for one
        return names[0]
    return "".join(f"    {name}: see ``{last}``.\n" for name in others) + f"    {last}: "


def fields(record: griffe.Class) -> str:
    """An entry for each, with the comment that stands beside it."""
    found = [member for member in record.attributes.values() if "property" not in member.labels]
    comments = [member.lines[0].partition("  # ")[2] for member in found]
    return "".join(f"    {member.name}: {comment}\n" for member, comment in zip(found, comments, strict=True))
