"""Run a method in a process of its own; if it fails, hangs or is wrong, report why."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import IO, Any

from benchmarks import against, peers
from benchmarks.results import ROOT

TOLERANCE = 1e-4
LATE = "not ready after"  # begins the reason of a method that took too long to get ready


class RefusedError(Exception):
    """A method that can't be timed; its message says why."""


@cache
def attempt(peer: str) -> Path | str:
    """Return a peer's Python interpreter, or the reason why it can't be installed. It is tried only once."""
    try:
        return peers.environment(peer)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"not installed: {error}"


def installed(peer: str) -> Path:
    if isinstance(found := attempt(peer), str):
        raise RefusedError(found)
    return found


class Runner:
    """A warm process with one method (`benchmarks.worker`), which runs in `folder` and imports metakern from there.

    `ready` has the time of its first call, its memory, error and cosine; `sample()` returns the seconds of one call.
    """

    def __init__(
        self, peer: str, method: str, problem: Path, tiny: Path, threads: int, limit: float, folder: Path = ROOT
    ) -> None:
        python, self._limit = installed(peer), limit
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", peer, method, problem, tiny, str(threads)],
            cwd=folder,
            # A compiler's cache on disk would hide the time of compiling.
            env=against.environment()
            | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        try:
            self.ready: dict[str, float] = self._answer(LATE)
            error = self.ready["error"]
            if error is not None and not error <= TOLERANCE and peers.precision(method) == "float32":
                raise RefusedError(f"wrong by {error:.0e}")
        except BaseException:
            self.close()
            raise

    def _answer(self, late: str) -> Any:
        """Return the worker's next line; raise RefusedError if it ends without one, or takes longer than the limit."""
        over = threading.Event()

        def end() -> None:
            over.set()
            self._process.kill()

        timer = threading.Timer(self._limit, end)
        timer.start()
        try:
            if line := self._process.stdout.readline():
                return json.loads(line)
            self._process.wait()
        finally:
            timer.cancel()
        if over.is_set():
            raise RefusedError(f"{late} {self._limit:.0f} s")
        if self._process.returncode == -9:
            raise RefusedError("out of memory")
        self._errors.seek(0)
        said = [text.strip() for text in self._errors if text.strip()]
        # The line of an exception, if there is one; the lines after it are advice.
        found = [text for text in said if text.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
        raise RefusedError((found or said or [f"ended with {self._process.returncode}"])[-1])

    def sample(self) -> float:
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` reads its errors
        return self._answer("no result after")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
