"""Texts of others on a terminal."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from metakern.cli import main
from metakern.dialogue.display import Display
from metakern.dialogue.terminal import printable, say

BAD = "\x1b[31m\x07\x08\r\x7f\x9b\u202e\u2066\udc80"


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_can_be_written_and_commands_nothing(text):
    shown = printable(text)
    shown.encode()
    assert len(shown) == len(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066" for c in shown)
    assert printable(shown) == shown


def test_ordinary_text_stays():
    text = "naïve 你好 🙂👍🏽\n\tनमस्ते “quoted” [bold]"
    assert printable(text) == text


def test_console_display_and_errors_are_safe(capsys):
    console = Console(file=io.StringIO(), width=80)
    say(console, f"{BAD}[bold]")
    Display().say(BAD)
    assert main(["chat", f"none{BAD[:-1]}"]) == 2
    out, err = capsys.readouterr()
    assert "[bold]" in console.file.getvalue()
    for shown in (console.file.getvalue(), out, err):
        assert shown.strip()
        assert not any(c in shown for c in BAD if c not in "[31m")
