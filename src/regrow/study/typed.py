"""Errors in what a person has typed behind ``regrow``, for which the command ends with the exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Mistyped(ValueError):
    """A name or value that was typed cannot be right. Nothing has been done."""


@contextmanager
def typed() -> Iterator[None]:
    """Turn a ``ValueError`` that is raised in the block into ``Mistyped``.

    Raises:
        Mistyped: the error, with its message.
    """
    try:
        yield
    except ValueError as error:
        raise Mistyped(str(error)) from None
