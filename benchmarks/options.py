"""Options of the commands. A wrong option is an error of one line, before anything is measured."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from benchmarks import results


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return number


def kept(text: str) -> Path:
    """Parse the path of a file of results, which may exist or be a new one."""
    path = Path(text)
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        results.load(path)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a file of results or a new one, got {text!r} ({error})") from error
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be in a folder that can be written, got {text!r}")
    return path
