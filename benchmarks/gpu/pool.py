"""Processes that compute the rows of results, so that a kernel that crashes or hangs loses only its own row."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]
MEMORY = "out of memory"
LIMIT = 120  # seconds for one row


class Job(NamedTuple):
    """A row to compute: its label, and a function that returns its other entries and can be pickled."""

    label: Row
    make: Callable[[], Row]


def run(job: Job) -> tuple[Row, bool]:
    """Return the row, with an "error" if the job failed, and whether this process can run another job."""
    try:
        found = job.make()
        _finish()
    except torch.OutOfMemoryError:
        found = {"error": MEMORY}
    except Exception as error:  # any failure is this row's result
        found = {"error": f"{type(error).__name__}: {error}"[-1000:]}
    try:
        _finish()
    except Exception:  # an illegal access breaks all later calls
        return job.label | found, False
    return job.label | found, True


def prepare() -> None:
    """Switch TF32 off, and give cuBLAS the workspace that it needs to be deterministic."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _finish() -> None:
    gc.collect()  # cycles of objects hold graphs, and with them memory
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _serve(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    prepare()
    while True:
        row, good = run(connection.recv())
        connection.send((row, good))
        if not good:
            return


class _Worker:
    """A process that computes one row at a time."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()

    def row(self, job: Job, seconds: float) -> tuple[Row, bool]:
        try:
            self.connection.send(job)
            if self.connection.poll(seconds):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return job.label | {"error": f"the process ended with exit code {self.process.exitcode}"}, False
        return job.label | {"error": f"no result after {seconds:.0f} s"}, False

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Computes rows in processes until `deadline`, in seconds of `time.monotonic`; later rows get an error."""

    def __init__(self, deadline: float = float("inf")) -> None:
        self.deadline = deadline
        self._threads = 1
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep(0)

    def rows(self, jobs: Iterable[Job], at_once: int = 1) -> Iterator[Row]:
        """Yield rows as they are finished; a job that runs out of memory beside others is run again alone."""
        jobs = list(jobs)
        self._keep(at_once)
        self._threads = max(1, (os.cpu_count() or 1) // at_once)
        again = []
        with ThreadPoolExecutor(at_once) as threads:
            futures = {threads.submit(self._row, job): job for job in jobs}
            for future in as_completed(futures):
                row = future.result()
                if at_once > 1 and row.get("error") == MEMORY:
                    again.append(futures[future])
                else:
                    yield row
        if again:
            yield from self.rows(again)

    def _row(self, job: Job) -> Row:
        left = self.deadline - time.monotonic()
        if left <= 0:
            return job.label | {"error": "the time is up"}
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(self._threads)
        row, good = worker.row(job, min(left, LIMIT))
        if good:
            self._idle.put(worker)
        else:
            worker.close()
        return row

    def _keep(self, number: int) -> None:
        """End all idle processes except `number` of them, because idle processes hold memory."""
        while self._idle.qsize() > number:
            self._idle.get().close()
