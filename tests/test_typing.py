"""What tests/typed_user.py has type checkers believe is so when it runs.

That they believe it, and report what is wrong, is for ``make lint`` to say, which CI runs, too: the checkers are
installed for it, and its run of mypy over the package has done most of the work for this file.
"""

from __future__ import annotations

import inspect
import types
import typing

import pytest
import torch
import typed_user

FUNCTIONS = [f for name, f in inspect.getmembers(typed_user, inspect.isfunction) if name.startswith("of_")]


def fits(value: object, kind: typing.Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return isinstance(value, kind)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("known_later", [False, True])
def test_types(function, known_later, monkeypatch):
    seen = []
    monkeypatch.setattr(typed_user, "assert_type", lambda value, kind: seen.append((value, kind)))
    logits = torch.randn(2, 3, 7, requires_grad=True)
    function(logits, torch.randint(7, (2, 3)), torch.rand(2, 3), torch.rand(2, 3), known_later)
    assert seen
    for value, kind in seen:
        assert fits(value, kind), (type(value), kind)
