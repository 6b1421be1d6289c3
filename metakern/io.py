"""Write files atomically: whole or not at all. And private files, and the folder of files that can be made again."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from metakern.errors import CheckpointError


def write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, and make its folder if need be.

    The data goes to a temporary file first, which then takes the place of `path`. Raises CheckpointError if that fails;
    a file that was there is unchanged.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with suppress(OSError):
                temporary.unlink()
        raise CheckpointError(f"{path}: cannot write: {error.strerror}; nothing that was there is lost") from None


def as_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8, with null in the places of infinities and NaN, which JSON does not have."""
    return (json.dumps(_finite(value), indent=1) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def private(path: Path) -> Path:
    """Return `path`, after making it an empty file if there is none, and giving only its owner the right to read it.

    Raises CheckpointError if that fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror}") from None
    return path


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/metakern`, by default `~/.cache/metakern`; everything in it can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metakern"
