"""Show texts of models, data and checkpoints on a terminal, none of which may command it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["printable", "say"]

# Control characters but line breaks and tabs; marks and overrides of the direction of writing; lone surrogates.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a text with a visible sign in the place of each character that a terminal would obey.

    Such are control characters, and thus escape sequences, and what reverses the direction of writing. Line breaks and
    tabs stay.

    >>> printable("\x1b[2Jhello\r\nthere\x9b")
    '␛[2Jhello␍\nthere�'
    """
    return UNSAFE.sub(lambda found: _sign(ord(found[0])), text)


def say(console: Console, text: str) -> None:
    """Print lines of text as they are, but for what `printable` replaces."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _sign(code: int) -> str:
    """Return Unicode's picture of a control character of ASCII, or the replacement character."""
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
