"""What the server keeps: users, exchanges and tokens in SQLite, and adapted weights in safetensors beside it.

    FILE.sqlite      users, exchanges, digests of tokens (in WAL mode, so with FILE.sqlite-wal and -shm)
    FILE.adapters/   the adapted weights of each user, in a file with a random name

A user's revision counts the changes of the exchanges. `adapted` is the revision that the weights were adapted to. New
weights are written first, then the user's row is pointed at their file, then the old file is removed: a crash leaves
the old weights or the new ones. A commit has reached the disk when a method returns.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from metakern import io
from metakern.errors import UserError

__all__ = ["Deleted", "Exchange", "LimitError", "Store", "User"]

# Each script brings the schema from one version to the next; `PRAGMA user_version` counts them.
MIGRATIONS = (
    """
    CREATE TABLE users (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        revision INTEGER NOT NULL DEFAULT 0,
        adapted INTEGER NOT NULL DEFAULT 0,
        adapter TEXT
    );
    CREATE TABLE exchanges (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        user INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        say TEXT NOT NULL,
        answer TEXT NOT NULL,
        created REAL NOT NULL
    );
    CREATE INDEX exchanges_of_user ON exchanges (user);
    CREATE TABLE tokens (digest TEXT PRIMARY KEY, user TEXT NOT NULL, created REAL NOT NULL);
    CREATE TABLE run (digest TEXT NOT NULL);
    """,
)


class LimitError(Exception):
    """A user would have more exchanges than allowed."""


@dataclass(frozen=True)
class User:
    """A user's row: `adapter` is the name of the file of the weights, or None for those of the run."""

    id: int
    name: str
    revision: int
    adapted: int
    adapter: str | None


@dataclass(frozen=True)
class Exchange:
    """What a user says, what the bot should answer, and when that was taught, in seconds since 1970."""

    id: int
    say: str
    answer: str
    created: float


@dataclass(frozen=True)
class Deleted:
    """What the deletion of a user removed; `vacuumed` says whether no trace of it is left in the file."""

    exchanges: int
    adapter: bool
    vacuumed: bool


class Store:
    """The store in a SQLite file, which is made if it does not exist. Its methods may be called from any thread.

    Args:
        path: The file.

    Raises:
        UserError: If the file can't be opened, is damaged, or was written by a later version of metakern.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, closing(Store(Path(folder) / "users.sqlite")) as store:
    ...     taught = store.teach("ann", [("tea?", "yes")])
    ...     [(e.say, e.answer) for e in store.exchanges("ann")], store.exchanges("bob")
    ([('tea?', 'yes')], [])
    """

    def __init__(self, path: Path) -> None:
        self.path, self.adapters, self._lock = path, path.with_suffix(".adapters"), threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
                self._database.execute(f"PRAGMA {pragma}")
            self._migrate()
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}") from None
        except sqlite3.Error as error:
            raise UserError(f"{path}: is not a store of metakern serve, or is damaged: {error}") from None

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _migrate(self) -> None:
        with self._transaction():
            version = self._one("PRAGMA user_version")[0]
            if version > len(MIGRATIONS):
                raise UserError(f"{self.path}: has version {version}, which a later metakern wrote: update metakern")
            for number in range(version, len(MIGRATIONS)):
                for statement in filter(str.strip, MIGRATIONS[number].split(";")):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {number + 1}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _rows(self, statement: str, *values: object) -> list[tuple]:
        with self._lock, closing(self._database.execute(statement, values)) as cursor:
            return cursor.fetchall()

    def _one(self, statement: str, *values: object) -> tuple:
        return next(iter(self._rows(statement, *values)), ())

    def user(self, name: str) -> User | None:
        """Return a user's row, or None if the name has taught nothing yet."""
        row = self._one("SELECT id, name, revision, adapted, adapter FROM users WHERE name = ?", name)
        return User(*row) if row else None

    def exchanges(self, name: str) -> list[Exchange]:
        """Return what a user has taught, oldest first."""
        rows = self._rows(
            "SELECT e.id, say, answer, created FROM exchanges e JOIN users u ON u.id = e.user WHERE name = ?"
            " ORDER BY e.id",
            name,
        )
        return [Exchange(*row) for row in rows]

    def teach(self, name: str, pairs: Sequence[tuple[str, str]], limit: int = 2**31) -> list[Exchange]:
        """Add exchanges, pairs of what the user says and the answer, and return them.

        Raises:
            LimitError: If the user would have more than `limit`; nothing is added.
        """
        now = time.time()
        with self._transaction():
            self._database.execute("INSERT OR IGNORE INTO users (name) VALUES (?)", (name,))
            user = self._one("SELECT id FROM users WHERE name = ?", name)[0]
            if self._one("SELECT count(*) FROM exchanges WHERE user = ?", user)[0] + len(pairs) > limit:
                raise LimitError
            added = [
                self._one(
                    "INSERT INTO exchanges (user, say, answer, created) VALUES (?, ?, ?, ?) RETURNING id",
                    *(user, say, answer, now),
                )[0]
                for say, answer in pairs
            ]
            self._database.execute("UPDATE users SET revision = revision + 1 WHERE id = ?", (user,))
        return [Exchange(number, *pair, now) for number, pair in zip(added, pairs, strict=True)]

    def forget(self, name: str, exchange: int | None = None) -> int:
        """Remove an exchange of a user, or all (None); return how many that were."""
        which, values = ("", ()) if exchange is None else (" AND id = ?", (exchange,))
        with self._transaction():
            user = self._one("SELECT id FROM users WHERE name = ?", name)
            removed = self._rows(f"DELETE FROM exchanges WHERE user = ?{which} RETURNING id", *(user or (0,)), *values)
            if removed:
                self._database.execute("UPDATE users SET revision = revision + 1 WHERE id = ?", user)
        if removed:
            self._truncate()
        return len(removed)

    def delete(self, name: str) -> Deleted | None:
        """Remove a user with all exchanges and weights, and rewrite the file without them; None: no such user.

        Tokens stay: they belong to whoever runs the server.
        """
        with self._lock:
            user = self.user(name)
            if user is None:
                return None
            with self._transaction():
                count = self._one("SELECT count(*) FROM exchanges WHERE user = ?", user.id)[0]
                self._database.execute("DELETE FROM users WHERE id = ?", (user.id,))
            self._remove(user.adapter)
            try:
                self._database.execute("VACUUM")
                return Deleted(count, user.adapter is not None, self._truncate())
            except sqlite3.OperationalError:  # another process reads the file
                return Deleted(count, user.adapter is not None, False)

    def _truncate(self) -> bool:
        """Bring the log of SQLite into the file and empty it; return whether no other process was in the way."""
        return self._one("PRAGMA wal_checkpoint(TRUNCATE)")[0] == 0

    def weights(self, user: User) -> dict[str, Tensor] | None:
        """Return the adapted parameters of a user by name; None stands for those of the run.

        Raises:
            UserError: If the file can't be read.
        """
        if user.adapter is None:
            return None
        file = self.adapters / user.adapter
        try:
            return from_bytes(file.read_bytes())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None

    def adopt(self, user: User, phi: Mapping[str, Tensor] | None) -> bool:
        """Keep the weights that were adapted to the revision of `user`; False: the user is no longer there.

        Raises:
            CheckpointError: If the file can't be written; the older weights stay.
        """
        file = None if phi is None else f"{secrets.token_hex(16)}.safetensors"
        if file is not None and phi is not None:
            io.write(self.adapters / file, to_bytes({name: p.contiguous() for name, p in phi.items()}))
        with self._transaction():
            old = self._one("SELECT adapter FROM users WHERE id = ?", user.id)
            self._database.execute(
                "UPDATE users SET adapted = ?, adapter = ? WHERE id = ?", (user.revision, file, user.id)
            )
        self._remove(old[0] if old else file)
        return bool(old)

    def _remove(self, adapter: str | None) -> None:
        if adapter is not None:
            (self.adapters / adapter).unlink(missing_ok=True)

    def open_for(self, digest: str) -> list[str]:
        """Prepare for serving the run with this digest, and return the users whose weights are not up to date.

        These are all users if the store served another run before. Files that no user has are removed.
        """
        with self._transaction():
            if self._one("SELECT digest FROM run") != (digest,):
                self._database.execute("DELETE FROM run")
                self._database.execute("INSERT INTO run VALUES (?)", (digest,))
                self._database.execute("UPDATE users SET adapted = -1, adapter = NULL")
            known = {adapter for (adapter,) in self._rows("SELECT adapter FROM users")}
        for file in self.adapters.glob("*.safetensors"):
            if file.name not in known:
                file.unlink()
        return [name for (name,) in self._rows("SELECT name FROM users WHERE adapted <> revision")]

    def add_token(self, user: str) -> str:
        """Return a new token of a user; the store keeps its SHA-256 alone."""
        token = f"mk-{secrets.token_urlsafe(32)}"
        with self._transaction():
            self._database.execute("INSERT INTO tokens VALUES (?, ?, ?)", (_digest(token), user, time.time()))
        return token

    def revoke(self, user: str) -> int:
        """Remove all tokens of a user; return how many."""
        with self._transaction():
            return len(self._rows("DELETE FROM tokens WHERE user = ? RETURNING user", user))

    def has_tokens(self) -> bool:
        return bool(self._one("SELECT 1 FROM tokens LIMIT 1"))

    def user_of(self, token: str) -> str | None:
        """Return the user whom a token names, or None if it is not valid."""
        row = self._one("SELECT user FROM tokens WHERE digest = ?", _digest(token))
        return row[0] if row else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
