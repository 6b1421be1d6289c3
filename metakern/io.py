"""Files that survive a crash, folders that one process writes at a time, and files that can be made again.

write           a file is there whole or not at all, also after a power failure
opened, read    only regular files of a limited size, so that a pipe or a device from a stranger cannot block
locked          one writer for a folder; the system releases the lock when the writer dies
private         a file that only its owner can read
cache_folder    files that can be made again
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metakern.errors import CheckpointError, UserError

LARGEST = 2**36  # bytes of a file, if the caller sets no lower limit
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, and make its folder if need be.

    The data goes to a temporary file first, which then takes the place of `path`. File and folder are forced to the
    disk. A new file has the permissions that the umask leaves, a replaced one keeps its own. Raises CheckpointError if
    that fails; a file that was there is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _make(path.parent)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        finally:
            os.close(file)
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path}: cannot write: {error.strerror}; nothing that was there is lost") from None


def _make(folder: Path) -> None:
    """Make a folder and those above it that are missing, each with its entry on the disk."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Force the names in a folder to the disk, where the file system can do that."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(file)


def opened(path: str | Path, limit: int = LARGEST) -> int:
    """Open a regular file to be read, and return its descriptor; no pipe or device can block the call.

    Raises:
        OSError: If that fails, the path is of something else than a file, or the file has more than `limit` bytes.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    os.close(file)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it must be a regular file, not a pipe or a device", str(path))
    raise OSError(errno.EFBIG, f"it must have at most {limit:,} bytes, got {status.st_size:,}", str(path))


def read(path: str | Path, limit: int = LARGEST) -> bytes:
    """Return the bytes of a regular file; raises OSError as `opened`."""
    with open(opened(path, limit), "rb") as file:
        return file.read()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block, no other process or thread can enter such a block for the same folder.

    The folder is made if need be, and removed after the block if it is new and still empty. The lock is one of the
    system on the file `.lock`, so that a process that dies releases it. Temporary files of processes that died while
    they wrote are removed. On a file system without locks the block is entered without one.

    Raises:
        UserError: If the lock is taken; the message names the process.
        CheckpointError: If the folder can't be made or written to.
    """
    new = not folder.exists()
    path = folder / ".lock"
    try:
        _make(folder)
        lock = _lock(path)
        for file in (file for part in (folder, *folder.glob("*/")) for file in part.glob(".*.tmp")):
            if TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write: {error.strerror}") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)
        if new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _lock(path: Path) -> int:
    """Lock a file, which is made if need be, and return its descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode("utf-8", "replace") or "another process"
            os.close(file)
            raise UserError(f"{path.parent}: is in use by {holder}: wait for its end, or stop it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise
            return file
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        os.close(file)  # its last holder has removed it in the meantime


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
    """Return `$XDG_CACHE_HOME/metakern`, by default `~/.cache/metakern`; everything in it can be made again.

    It may be impossible to make, and always is without a home. That must not stop anyone.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metakern"
    except RuntimeError:
        return Path(os.devnull) / "metakern"
