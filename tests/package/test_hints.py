"""Hints in error messages: the flags and config keys that they name exist."""

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import metakern
from metakern.cli import _parser
from metakern.dialogue.config import Config

PACKAGE = Path(metakern.__file__).parent
FILES = [PACKAGE / "cli.py", *sorted((PACKAGE / "dialogue").rglob("*.py"))]
OTHERS = {"--no-deps"}  # a flag of pip


def literals(file: Path) -> Iterator[str]:
    """Yield the string literals of a file, with ? for the fields of f-strings."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "?" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def commands(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """Return the flags of each command."""
    chosen = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: set(command._option_string_actions) for name, command in chosen.choices.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_every_flag_and_key_that_a_message_names_exists(file):
    known = commands(_parser())
    flags = OTHERS.union(_parser()._option_string_actions, *known.values())
    keys = {key.name for key in fields(Config)} | {"steps", "temperature", "top_p"}
    for text in literals(file):
        assert set(re.findall(r"--[a-z][a-z-]+", text)) <= flags, text
        for command, said in re.findall(r"metakern ([a-z]+)((?: [^ ;:]+)*)", text):
            if command in known:
                assert set(re.findall(r"--[a-z][a-z-]+", said)) <= known[command], text
        for key in re.findall(r"\b(?:lower|raise|increase|decrease|set) (?:an? )?([a-z]+_[a-z_]+)\b", text):
            assert key in keys, text


def test_the_flags_that_help_with_too_little_data_exist():
    train = commands(_parser())["train"]
    assert {"--min-dialogues", "--min-words", "--max-length"} <= train
