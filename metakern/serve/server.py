"""`metakern serve`: open the run and the store, and answer requests until the process is told to end."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import signal
import socket
import sys
import webbrowser
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import uvicorn

from metakern.dialogue.run import Run
from metakern.errors import UserError
from metakern.serve.app import LOCAL, create_app
from metakern.serve.limits import valid_name
from metakern.serve.service import Service, Settings
from metakern.serve.store import Store

__all__ = ["add_token", "port_of", "revoke_token", "serve", "store_of"]

MOST_PORT = 65535
PRIVATE_PORTS = range(49152, MOST_PORT + 1)
GRACE = 30  # seconds that open replies have to end in


def port_of(run: str) -> int:
    """Return a port for the page of a run, the same each time, as a browser keeps what it remembers by address.

    It is one of those that IANA leaves to private use.
    """
    return PRIVATE_PORTS[zlib.crc32(str(Path(run).resolve()).encode()) % len(PRIVATE_PORTS)]


def store_of(run: str, store: str | None) -> Path:
    """Return the file of the store: `store`, or a file in the folder of the run."""
    return Path(store) if store else Path(run) / "users.sqlite"


def serve(run: str, store: str | None, host: str, port: int, settings: Settings, browse: bool = False) -> None:
    """Serve a run until SIGINT or SIGTERM; replies under way are then finished, for up to half a minute.

    With `browse`, the user's browser opens the page, if there is a desktop to open it on, and a free port takes the
    place of one that is taken.

    Raises:
        UserError: If the run or the store can't be used, another server has the store, the port is taken, or `host` is
            not a loopback address and there is no token.
    """
    os.umask(0o077)  # the store, its log and the weights are for the owner alone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    path = store_of(run, store)
    with _listening(host, port, or_any=browse) as listener, _alone(path):
        opened, kept = Run.open(run), Store(path)
        guarded = kept.has_tokens()
        if not (guarded or _is_loopback(host)):
            kept.close()
            raise UserError(
                f"serve: host must be a loopback address as long as there are no tokens, got {host}: make one with"
                " --add-token USER"
            )
        service = Service(opened, kept, settings)
        app = create_app(service, ["*"] if guarded else [*LOCAL, host])
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
        address = f"[{host}]" if ":" in host else host
        page = f"http://{address}:{listener.getsockname()[1]}"
        print(f"{service.name} at {page}, described at {page}/docs", flush=True)
        if browse and _has_desktop():
            webbrowser.open(page)
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when the server has ended
        uvicorn.Server(config).run([listener])


def add_token(run: str, store: str | None, user: str) -> str:
    """Return a new token of a user.

    Raises:
        UserError: If the store can't be used, or the name is not valid.
    """
    if not valid_name(user):
        raise UserError(f"serve: a user must have up to 64 letters, digits and ._@-, got {user!r}")
    with closing(Store(store_of(run, store))) as kept:
        return kept.add_token(user)


def revoke_token(run: str, store: str | None, user: str) -> int:
    """Make all tokens of a user invalid, at once; return how many.

    Raises:
        UserError: If the store can't be used.
    """
    with closing(Store(store_of(run, store))) as kept:
        return kept.revoke(user)


def _has_desktop() -> bool:
    """Return whether a browser has a desktop to open on; in a terminal it would take the terminal from the server."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _listening(host: str, port: int, or_any: bool) -> Iterator[socket.socket]:
    """Return the socket that the server listens at within the block; `or_any`: at a free port if this one is taken."""
    if port > MOST_PORT:
        raise UserError(f"serve: port must be at most {MOST_PORT}, got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family)
        except OSError:
            if not or_any:
                raise
            listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise UserError(
            f"serve: cannot listen at {host}, port {port}: {error.strerror}; choose another --port or --host"
        ) from None
    with listener:
        yield listener


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other servers from the store within the block."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: is served by another process: end it, or choose another --store") from None
            yield
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}") from None
