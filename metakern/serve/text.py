"""Turn the ids of a reply into text as they come: whole characters, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Writer"]

PARTIAL = "\ufffd"  # what a byte-level tokenizer gives for the first bytes of a character


class Writer:
    """Collects ids and returns the text that is sure to be in the reply.

    Args:
        decode: Returns the text of ids.
        stops: Texts that end the reply; they are not part of it.

    Attributes:
        stopped: Whether a stop text has come.

    >>> writer = Writer(lambda ids: bytes(ids).decode(errors="replace"), ["END"])
    >>> [writer.add([byte]) for byte in "é EN".encode()], writer.add(b"DED"), writer.stopped
    (['', 'é', ' ', '', ''], '', True)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops, self.ids = decode, stops, list[int]()
        self.sent, self.stopped = 0, False

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Return the new text after more ids. `last`: no more will come, so nothing is held back."""
        if self.stopped:
            return ""
        self.ids += ids
        text = self.decode(self.ids)
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not last:
            text = text.rstrip(PARTIAL)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)]
        new, self.sent = text[self.sent :], max(self.sent, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
