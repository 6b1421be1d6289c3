"""Errors that the user can fix. The message is one line and says how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CheckpointError", "DataError", "UserError", "by_the_user"]


class UserError(Exception):
    """An error that the user can fix. The command line prints it as one line and exits with status `code`.

    >>> import metakern.errors
    >>> metakern.errors.UserError("no such run: runs/a").code
    2
    """

    code = 2
    everywhere = False  # whether every process of a run raises it, so that the first one alone prints it
    silent = False  # whether another process prints it


class CheckpointError(UserError):
    """A checkpoint that cannot be read or used here, or a file that cannot be written."""


class DataError(UserError, ValueError):
    """Input that cannot be used. The message names the file, the line in it if there is one, and what to do."""


@contextmanager
def by_the_user() -> Iterator[None]:
    """Turns a ValueError raised inside a `with` block, or in a decorated function, into a UserError of the same text.

    Use it where every ValueError is about something that the user has set.

    Raises:
        UserError: For a ValueError inside. A UserError passes through unchanged.

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
