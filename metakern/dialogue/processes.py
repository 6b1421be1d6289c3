"""The processes that share a training: torchrun starts them, and each computes a share of the tasks of every step.

    dL/dtheta = sum_r w_r g_r        w_r = n_r / sum_r n_r

g_r is the gradient of the mean loss of process r over what its share counts: n_r tasks or, in plain training, n_r
labeled tokens. All processes hold the same parameters and take the same outer step. The first process alone reads and
writes the folder of the run and shows the progress.

Numbers and Python objects go through gloo, on the CPU. Gradients go through the backend of their device: gloo or NCCL.
Outside of a group, where `size()` is 1, every function here returns what one process with all tasks has.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metakern.errors import UserError

__all__ = [
    "LostProcessError",
    "alone",
    "any_of",
    "check",
    "check_equal",
    "first",
    "gather",
    "have_gradients",
    "is_first",
    "joined",
    "largest",
    "launch",
    "launch_id",
    "rank",
    "seed",
    "share",
    "size",
    "sum_gradients",
    "synchronize",
    "together",
    "weight",
]

T = TypeVar("T")
BUCKET = 25 * 2**20  # bytes of gradients in one all-reduce, as in DistributedDataParallel
TIMEOUT = timedelta(hours=1)  # of a collective, in which others wait while the first process trains a tokenizer
_GROUPS = count()  # that this process has joined
CURE = "go on with --resume, or start again if there is no checkpoint yet"
LOST = "another process of the run has ended or can't be reached"
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostProcessError(UserError):
    """Another process of the run has ended, so this one can't go on."""

    everywhere = True


@contextmanager
def joined() -> Iterator[None]:
    """Within the block, this process belongs to the group of all processes that torchrun has started with it.

    A group that is there already, such as that of Accelerate or Lightning, is used as it is. A process that was started
    alone stays alone. On a machine that has a GPU for each of its processes, each gets its own.
    """
    if not dist.is_available() or dist.is_initialized() or not _are_several():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and _on_this_machine() <= torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    with together():
        store, place, number = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun's store still has the addresses of earlier groups, and after a restart those of dead processes.
        groups = str(next(_GROUPS))
        if _on_this_machine() == number:
            groups += "/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(groups, store)
        dist.init_process_group(backend, store=store, rank=place, world_size=number, timeout=TIMEOUT)
    try:
        yield
    except UserError as error:
        if not is_first():
            error.silent = error.everywhere
            error.args = (f"process {rank()}: {error}",)
        raise
    finally:
        dist.destroy_process_group()


def _are_several() -> bool:
    """Whether the environment says that this process was started as one of several.

    Raises:
        UserError: If what it says is incomplete, or no number.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or _number("WORLD_SIZE") == 1:
        return False
    if missing := [key for key in ENVIRONMENT if key not in os.environ]:
        raise UserError(
            f"the environment variable {missing[0]} must be set where WORLD_SIZE is {os.environ['WORLD_SIZE']}: start"
            " by torchrun or with --processes, or unset WORLD_SIZE"
        )
    for key in ("RANK", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        _number(key)
    return True


def _number(key: str) -> int:
    """Return the number that an environment variable holds, 0 if it is not set."""
    text = os.environ.get(key, "0")
    if not text.isdigit():
        raise UserError(f"the environment variable {key} must be a number, got {text!r}: unset it, or use torchrun")
    return int(text)


def check(tasks: int, device: str) -> None:
    """Check that each process has a task of a step and, on GPUs, a GPU of its own.

    Raises:
        UserError: If there are too many processes.
    """
    if tasks < size():
        raise UserError(
            f"train: tasks must be at least {size()}, one for each process, got {tasks}: raise --tasks or start fewer"
            " processes"
        )
    if size() > 1 and device == "cuda" and (own := _on_this_machine()) > (gpus := torch.cuda.device_count()):
        raise UserError(f"train: processes of a machine must be at most {gpus}, as many as it has GPUs, got {own}")


def alone(complaint: str) -> None:
    """Raise a `UserError` that says `complaint` if there are several processes."""
    if size() > 1:
        error = UserError(complaint)
        error.everywhere = True
        raise error


def _on_this_machine() -> int:
    """Return the number of processes that torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def size() -> int:
    """Return the number of processes in the group; 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process in the group, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this process reads and writes the folder of the run, and shows the progress."""
    return rank() == 0


def share(count: int) -> slice:
    """Return which of `count` tasks this process computes; the sizes of shares differ by one at most."""
    return slice(rank() * count // size(), (rank() + 1) * count // size())


def seed(*names: Any) -> None:
    """In a group, seed PyTorch's random generator with `names` and the rank, so that processes draw apart.

    A process on its own draws from where its generator stands.
    """
    if size() > 1:
        digest = hashlib.sha256("/".join(map(str, (*names, rank()))).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big"))


def weight(count: float | Tensor) -> float:
    """Return the part of `count` in its sum over all processes."""
    if size() == 1:
        return 1.0
    own = float(count)
    return own / (_sum([own])[0] or 1.0)


def largest(number: float) -> float:
    """Return the largest of the numbers that the processes call this with."""
    return max(gather(number))


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return bool(_sum([float(flag)])[0])


def gather(value: T) -> list[T]:
    """Return what each process calls this with, in the order of ranks. Tensors must be on the CPU."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with together():
        dist.all_gather_object(found, value)
    return found


def first(call: Callable[[], T]) -> T:
    """Call a function in the first process alone, and return its result in all.

    Raises:
        UserError: In all processes, if the call raises one.
    """
    if size() == 1:
        return call()
    outcome: list[Any] = [None, None]  # the result, or the error
    if is_first():
        try:
            outcome[0] = call()
        except UserError as error:
            error.everywhere = True
            outcome[1] = error
    with together():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@torch.no_grad()
def synchronize(tensors: Sequence[Tensor]) -> None:
    """Copy the values that `tensors` have in the first process into those of all others."""
    if size() > 1:
        with together():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)


@torch.no_grad()
def check_equal(tensors: Sequence[Tensor], where: str) -> None:
    """Check that `tensors` are the same in all processes, by the sums of their values.

    Raises:
        UserError: If they differ; the message names `where`.
    """
    if size() == 1:
        return
    sums = gather([t.detach().double().sum().item() for t in tensors])
    apart = [i for i, found in enumerate(sums) if str(found) != str(sums[0])]  # NaN equals NaN here
    if apart:
        error = UserError(
            f"{where}: parameters must be the same in all processes, got others in process {apart[0]} than in"
            " process 0: run all of them with the same software on machines of one kind"
        )
        error.everywhere = True
        raise error


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Replace each parameter's gradient by its sum over all processes; return the sum of `loss`, a scalar.

    Buckets of gradients are reduced while later ones are copied together. A parameter has no gradient afterwards if it
    has none in any process.
    """
    if size() == 1:
        return loss.detach()
    total, *have = _sum([loss.item(), *_present(parameters)])
    gradients = []
    for p, has in zip(parameters, have, strict=True):
        if has:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients.append(p.grad)
    with together():
        reduced = []
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            reduced.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in reduced:
            work.wait()
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])
    return loss.new_tensor(total)


def have_gradients(parameters: Sequence[Tensor]) -> list[bool]:
    """Return for each parameter whether it has a gradient in any process."""
    return [number > 0 for number in _sum(_present(parameters))]


def _present(parameters: Sequence[Tensor]) -> list[float]:
    """Return 1 for each parameter that has a gradient in this process, and 0 for the others."""
    return [float(p.grad is not None) for p in parameters]


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients of one dtype and device, in order, of about `BUCKET` bytes together."""
    bucket: list[Tensor] = []
    held = 0
    for g in gradients:
        if bucket and (held + g.nbytes > BUCKET or (g.dtype, g.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, held = [], 0
        bucket.append(g)
        held += g.nbytes
    if bucket:
        yield bucket


def _sum(numbers: Sequence[float]) -> list[float]:
    """Return the sums of numbers over all processes."""
    if size() == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    with together():
        dist.all_reduce(found)
    return found.tolist()


@contextmanager
def together() -> Iterator[None]:
    """Turn what a collective raises where another process is gone into a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(f"{LOST}; {CURE}") from error


def launch_id() -> str:
    """Return what names the launch by torchrun that started this process, the same after restarts; "" outside of one.

    It is the id of torchrun's rendezvous; where none was given, the machine and the number of torchrun's process.
    """
    found = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{platform.node()}/{os.getppid()}" if found == "none" else found


def launch(arguments: Sequence[str], processes: int, max_restarts: int = 0) -> int:
    """Run Python in several processes of this machine by PyTorch's elastic launcher; return the exit code.

    Args:
        arguments: Those of Python, such as `["-m", "metakern", "train"]`.
        processes: The number of processes. The machine's cores are divided between them unless OMP_NUM_THREADS is set.
        max_restarts: How often all processes are started again after one has ended early.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds, for the step that is being taken
    logging.disable(logging.ERROR)  # of the launcher; the processes report their errors themselves
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        which, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"metakern: process {which} of {processes} was ended by {name}; {CURE}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0
