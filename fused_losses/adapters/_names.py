"""A framework's own names in the messages of errors about what its user gave.

An adapter states ours with the framework's for each, ``{"target_tokens": "labels"}``. Where it makes an argument of the
user's, that is the expression that does, ``{"clip_high_threshold": "1 + epsilon"}``: the number in the message is right
then, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
_RAISED = (TypeError, ValueError, RuntimeError, NotImplementedError)  # what our errors are


@contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """An error from within is raised again with our names replaced in its message, and itself as the cause.

    So within is what calls a loss, and nothing that speaks of the framework's arguments already.
    """
    try:
        yield
    except _RAISED as error:
        message = str(error)
        theirs = re.sub(rf"\b({'|'.join(names)})\b", lambda ours: names[ours[0]], message)
        if theirs == message or type(error) not in _RAISED:  # others need not be made of a message
            raise
        raise type(error)(theirs) from error


def in_words(names: Mapping[str, str]) -> Callable[[F], F]:
    """A function within :func:`called`."""

    def of(function: F) -> F:
        @functools.wraps(function)
        def speaking(*args: Any, **kwargs: Any) -> Any:
            with called(names):
                return function(*args, **kwargs)

        return cast(F, speaking)

    return of
