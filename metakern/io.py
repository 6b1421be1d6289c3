"""Write files atomically: whole or not at all. And the folder of files that can be made again."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

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


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/metakern`, by default `~/.cache/metakern`; everything in it can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metakern"
