"""griffe: docstrings as this package writes them, for the reference.

Roles such as :func:`ppo` become links to where the reference has the name, and "low, high: bounds" among the arguments
one entry for each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth):`([^`]+)`")
TOGETHER = re.compile(r"^    (\w+(?:, \w+)+): ", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """The whole package is loaded, so that a name can be looked up in it."""
        rewrite(pkg, pkg)


def rewrite(found: griffe.Object, package: griffe.Module) -> None:
    if found.docstring:
        text = ROLE.sub(lambda role: link(role[1], found, package), found.docstring.value)
        if isinstance(found, griffe.Function | griffe.Class):
            text = TOGETHER.sub(lambda names: apart(names, found.parameters), text)
        found.docstring.value = text
    for member in found.members.values():
        if not member.is_alias:
            rewrite(member, package)


def link(name: str, where: griffe.Object, package: griffe.Module) -> str:
    """To a name of this package, seen from where the docstring stands or else from the package; others are code."""
    try:
        path = where.resolve(name)
    except griffe.NameResolutionError:
        path = f"{package.path}.{name}"
    try:
        package[path.removeprefix(f"{package.path}.")]
    except KeyError:
        return f"`{name}`"
    return f"[`{name}`][{path}]"


def apart(names: re.Match[str], parameters: griffe.Parameters) -> str:
    """The last of them keeps the text, the others refer to it."""
    *others, last = names[1].split(", ")
    if any(name not in parameters for name in (*others, last)):  # exceptions, for one
        return names[0]
    return "".join(f"    {name}: see ``{last}``.\n" for name in others) + f"    {last}: "
