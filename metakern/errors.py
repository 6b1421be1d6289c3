"""Errors that the user can put right: one line, with the cure."""

from __future__ import annotations

__all__ = ["CheckpointError", "DataError", "UserError"]


class UserError(Exception):
    """Something that the user can put right: the command line prints it as one line and exits with ``code``."""

    code = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used here."""


class DataError(UserError, ValueError):
    """Input that cannot be used: one line that names the file, the line in it where there is one, and the cure."""
