"""Errors that the user can put right: one line, with the cure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CheckpointError", "DataError", "UserError", "by_the_user"]


class UserError(Exception):
    """Something that the user can put right: the command line prints it as one line and exits with ``code``."""

    code = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used here."""


class DataError(UserError, ValueError):
    """Input that cannot be used: one line that names the file, the line in it where there is one, and the cure."""


@contextmanager
def by_the_user() -> Iterator[None]:
    """Within the block a ValueError is about what the user has set: a UserError of the same words.

    >>> with by_the_user():
    ...     raise ValueError("width must be at least 1, got 0")
    Traceback (most recent call last):
    metakern.errors.UserError: width must be at least 1, got 0
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
