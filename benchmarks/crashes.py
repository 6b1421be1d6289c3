"""Kill, stop and hinder commands wherever they touch the disk, go on, and compare with a run that nothing happened to.

    python -m benchmarks.crashes [--only kill,adapt] [--random 20] [--every 1] [--seed 0]

A trial is a command in a child process, to which something happens, and then the same command again (with --resume if
there is a checkpoint). In the end the checkpoints `last`, `best` and `pretrained`, the tokenizer and the config must be
those of the undisturbed run bit for bit, and no temporary file or lock may be left. A shim counts the calls of `write`,
`fsync` and `rename` by which metakern writes files. What happens:

    kill        kill -9 before each such call; a `write` has then written half of its bytes
    random      kill -9 at a random time
    full        from each `write` on, the disk is full: one line, exit code 2
    limit       from each `write` on, no file may grow beyond half of it (ulimit -f): one line, exit code 2
    rename      each `rename` fails with EIO or ESTALE: one line, exit code 2
    clock       before each call the clock is set to 1970 or to 2096: the command ends as if nothing had happened
    sigterm     at a random time: one line and exit code 130 once the training has begun, else the signal's end
    sigint      the same by Ctrl-C
    import      Ctrl-C while PyTorch is being imported: one line and exit code 130
    suspend     SIGSTOP and SIGCONT at a random time: the command ends as if nothing had happened
    processes   kill -9 at a random time to one of two processes that share the training: the run goes on with two
    adapt       kill -9 before each call of `metakern adapt`
    eval        kill -9 before each call of `metakern eval --compare finetune`

`--every N` takes each N-th call alone. The numbers go to benchmarks/results/crashes.json, each kind as soon as it is
done.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.options import Parser, kept, positive
from benchmarks.progress import Progress
from benchmarks.results import FOLDER
from metakern import cli, io
from metakern.dialogue import checkpoint
from metakern.dialogue.config import Config

CALLS = ("write", "fsync", "replace")
AT_TIMES = ("random", "sigterm", "sigint", "import", "suspend", "processes")
NAMES = ("last", "best", "pretrained")
OWN = ("seconds", "launch")  # what a state has of a launch of its own
WORDS = ("river", "stone", "cloud", "ember", "maple", "otter", "violin", "copper")
SETTINGS: dict[str, Any] = {"vocab_size": 280, "max_length": 24, "support_size": 2, "query_size": 2, "model": "gru"}
SETTINGS |= {"width": 8, "hidden": 8, "layers": 1, "inner_steps": 1, "tasks": 2, "lr_per": "parameter", "dropout": 0.1}
SETTINGS |= {"pretrain_steps": 1, "steps": 2, "eval_every": 1, "eval_tasks": 1, "threads": 1, "capture": False}
LONGEST = 120  # seconds of a command
Prepare = Callable[[], Any]
# Children are forked, so that they need not import what commands and optimizers import when they are first used.
IMPORTED = ("metakern.dialogue.chat", "metakern.dialogue.evaluate", "metakern.dialogue.trainer", "torch._dynamo")


class Shim:
    """The module `os` as metakern.io sees it, in which something happens at a call.

    Args:
        happens: Called with the name and the arguments of a call before it is made.
    """

    def __init__(self, happens: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.happens = happens
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any) -> Any:
            self.calls.append(name)
            self.happens(len(self.calls), name, args)
            return real(*args)

        return call


def kill_at(at: int) -> Callable[..., None]:
    def happens(count: int, name: str, args: tuple[Any, ...]) -> None:
        if count == at:
            if name == "write":
                os.write(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    return happens


def full_from(at: int) -> Callable[..., None]:
    """From the call `at` on, no byte can be written."""

    def happens(count: int, name: str, args: tuple[Any, ...]) -> None:
        if count >= at and name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return happens


def limited_from(at: int) -> Callable[..., None]:
    """From the call `at` on, files may have half as many bytes as it writes."""

    def happens(count: int, name: str, args: tuple[Any, ...]) -> None:
        if count == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(args[1]) // 2, resource.RLIM_INFINITY))

    return happens


def clock_at(at: int) -> Callable[..., None]:
    def happens(count: int, name: str, args: tuple[Any, ...]) -> None:
        if count == at:
            time.time = lambda: (0.0, 4e9)[at % 2]

    return happens


def no_rename_at(at: int) -> Callable[..., None]:
    def happens(count: int, name: str, args: tuple[Any, ...]) -> None:
        if count == at and name == "replace":
            code = (errno.EIO, errno.ESTALE)[at % 2]
            raise OSError(code, os.strerror(code))

    return happens


class Command:
    """A command of metakern that runs in a forked child.

    Args:
        arguments: Those of the command line.
        shim: Stands in for `os` in metakern.io.
    """

    def __init__(self, arguments: Sequence[str], shim: Shim | None = None) -> None:
        self.calls = tempfile.TemporaryFile()  # noqa: SIM115, closed with it
        self.errors, errors = os.pipe()
        self.child = os.fork()
        if not self.child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(errors, 2)
            io.os = shim or os  # type: ignore[attr-defined]
            code = cli.main(arguments)
            sys.stderr.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            if shim:
                os.write(self.calls.fileno(), " ".join(shim.calls).encode())
            os._exit(code)
        os.close(errors)

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end of the command; return its exit code, or minus a signal, and the lines of its errors."""
        deadline = time.monotonic() + LONGEST
        while not (ended := os.waitpid(self.child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(self.child, signal.SIGKILL)
            time.sleep(0.005)
        with open(self.errors, "rb") as errors:
            return os.waitstatus_to_exitcode(ended[1]), errors.read().decode().splitlines()

    def seen(self) -> list[str]:
        """Return the names of the calls that the shim saw."""
        self.calls.seek(0)
        return self.calls.read().decode().split()


def nothing(count: int, name: str, args: tuple[Any, ...]) -> None:
    """Nothing happens."""


class Campaign:
    """Trials in a folder, with a run in it to which nothing happened."""

    def __init__(self, folder: Path, seed: int) -> None:
        for module in IMPORTED:
            importlib.import_module(module)
        self.folder, self.draw = folder, random.Random(seed)
        write_data(folder / "data", self.draw)
        config = Config(data=str(folder / "data"), **SETTINGS)
        (folder / "config.toml").write_text(config.toml())
        began = time.monotonic()
        command = Command(self.train(folder / "whole"), Shim(nothing))
        ended = command.end()
        assert not ended[0], ended
        self.seconds, self.calls = time.monotonic() - began, command.seen()
        self.whole = facts(folder / "whole")

    def train(self, out: Path) -> list[str]:
        resume = ["--resume"] if checkpoint.exists(out / "checkpoints", "last") else []
        return ["train", "--config", str(self.folder / "config.toml"), "--out", str(out), *resume]

    def again(self, out: Path) -> str:
        """Train on, and return "" if the run is the undisturbed one, or else what is wrong."""
        code, lines = Command(self.train(out)).end()
        if code:
            return f"going on ended with {code}: {lines[-1:]}"
        found = facts(out)
        return ", ".join(key for key in self.whole if found[key] != self.whole[key])

    def at_calls(
        self, every: int, happens: Callable[[int], Callable[..., None]], codes: set[int], of: Sequence[str] = CALLS
    ) -> Iterator[str]:
        for at in [i for i, name in enumerate(self.calls, 1) if name in of][::every]:
            out = self.folder / "run"
            command = Command(self.train(out), Shim(happens(at)))
            code, lines = command.end()
            missed = code == 0 and len(command.seen()) < at  # a run may make a call less than the one that was counted
            right = missed or (code in codes and len(lines) <= (code == 2))
            wrong = "" if right else f"ended with {code}: {lines[-3:]}"
            yield self.ended(out, f"call {at}", wrong)

    def at_times(self, times: int, numbers: Sequence[int], codes: set[int]) -> Iterator[str]:
        for _ in range(times):
            out, wait = self.folder / "run", self.draw.uniform(0, 1.05 * self.seconds)
            command = Command(self.train(out))
            time.sleep(wait)
            for number in numbers:
                os.kill(command.child, number)
                time.sleep(0.1 if len(numbers) > 1 else 0)
            code, lines = command.end()
            wrong = "" if code in codes and len(lines) <= (code == 130) else f"ended with {code}: {lines[-3:]}"
            yield self.ended(out, f"{wait:.2f} s", wrong)

    def ended(self, out: Path, where: str, wrong: str) -> str:
        """Train on after a trial, remove the run, and return "" or a line on what is wrong."""
        wrong = wrong or self.again(out)
        subprocess.run(["rm", "-rf", out], check=True)
        return wrong and f"{where}: {wrong}"

    def shared(self, times: int) -> Iterator[str]:
        """Kill one of two processes, and compare with two that nothing happened to."""
        alone, self.whole = self.whole, {}
        code, said, seconds = self.two(self.folder / "two")
        self.whole = facts(self.folder / "two")
        yield f"two processes ended with {code}: {said[-200:]!r}" if code else ""
        for _ in range(times - 1):
            out, wait, which = self.folder / "run", self.draw.uniform(0, seconds), self.draw.randrange(2)
            code, said, _ = self.two(out, wait, which)
            ended = not code or "go on with" in said or not checkpoint.exists(out / "checkpoints", "last")
            wrong = "" if ended else f"ended with {code}: {said[-200:]!r}"
            if not wrong and (again := self.two(out))[0]:
                wrong = f"going on ended with {again}"
            if not wrong:
                found = facts(out)
                wrong = ", ".join(key for key in self.whole if found[key] != self.whole[key])
            subprocess.run(["rm", "-rf", out], check=True)
            yield wrong and f"process {which}, {wait:.2f} s: {wrong}"
        self.whole = alone

    def two(self, out: Path, wait: float | None = None, which: int = 0) -> tuple[int, str, float]:
        """Train in two processes; one is killed `wait` seconds after their run's folder is there.

        Returns the exit code, the errors, and the seconds since then.
        """
        command = [sys.executable, "-m", "metakern", *self.train(out), "--processes", "2"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not out.exists() and child.poll() is None:
            time.sleep(0.002)
        began = time.monotonic()
        if wait is not None:
            time.sleep(wait)
            workers = Path(f"/proc/{child.pid}/task/{child.pid}/children")
            if child.poll() is None and len(found := workers.read_text().split()) == 2:
                os.kill(int(found[which]), signal.SIGKILL)
        said = child.communicate()[1]
        return child.returncode, said, time.monotonic() - began

    def imports(self, times: int) -> Iterator[str]:
        for _ in range(times):
            command = [sys.executable, "-m", "metakern", "doctor"]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while "/torch/" not in Path(f"/proc/{child.pid}/maps").read_text() and child.poll() is None:
                time.sleep(0.002)
            wait = self.draw.uniform(0, 0.5)
            time.sleep(wait)
            child.send_signal(signal.SIGINT)
            said = child.communicate()[1]
            right = child.returncode == 130 and said == "metakern: stopped\n"
            yield "" if right else f"{wait:.2f} s: ended with {child.returncode}: {said[-200:]!r}"

    def adapts(self, every: int) -> Iterator[str]:
        out, run = self.folder / "adapted", self.folder / "whole"
        arguments = ["adapt", str(run), "--support", str(self.folder / "data" / "task0.jsonl"), "--out", str(out)]
        yield from self.commands(
            arguments, every, lambda: (files(out), checkpoint.load(out / "checkpoints", "best")), out
        )

    def evals(self, every: int) -> Iterator[str]:
        run = self.folder / "judged"
        arguments = ["eval", str(run), "--compare", "finetune", "--steps", "0,1"]
        subprocess.run(["cp", "-r", self.folder / "whole", run], check=True)

        def found() -> Any:
            report = json.loads((run / "eval.json").read_text())
            return files(run), report["curves"], facts(run / "finetune")

        def start() -> None:
            subprocess.run(["rm", "-rf", run], check=True)
            subprocess.run(["cp", "-r", self.folder / "whole", run], check=True)

        yield from self.commands(arguments, every, found, run, start)

    def commands(
        self, arguments: Sequence[str], every: int, found: Callable[[], Any], out: Path, start: Prepare | None = None
    ) -> Iterator[str]:
        """Kill a command before its calls, and repeat it."""
        command = Command(arguments, Shim(nothing))
        ended = command.end()
        assert not ended[0], ended
        whole = found()
        for at in range(1, len(command.seen()) + 1, every):
            if start:
                start()
            else:
                subprocess.run(["rm", "-rf", out], check=True)
            Command(arguments, Shim(kill_at(at))).end()
            code, lines = Command(arguments).end()
            done = code == 2 and lines == [f"metakern: {out}: holds a run already; choose another folder"]
            if code and not done:
                yield f"call {at}: the command ended with {code}: {lines[-1:]}"
            else:
                yield "" if same(found(), whole) else f"call {at}: another result"


def write_data(folder: Path, draw: random.Random) -> None:
    """Write conversations of ten tasks, each with three words of its own."""
    folder.mkdir()
    for t in range(10):
        favorites, lines = draw.sample(WORDS, 3), []
        for _ in range(8):
            said, reply = " ".join(draw.choices(WORDS, k=4)), " ".join(draw.choices(favorites, k=3))
            talk = [("user", said), ("assistant", reply), ("user", f"why {said}"), ("assistant", f"for {reply}")]
            lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}))
        (folder / f"task{t}.jsonl").write_text("\n".join(lines))


def files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("config.toml", "tokenizer.json")}


def facts(run: Path) -> dict[str, Any]:
    """Return what must be the same after a crash, and the names of what is left over."""
    found: dict[str, Any] = dict(files(run))
    for name in NAMES:
        tensors, state = checkpoint.load(run / "checkpoints", name)
        found[name] = {key: x.numpy().tobytes() for key, x in tensors.items()}
        found[f"state of {name}"] = {key: value for key, value in state.items() if key not in OWN}
    left = [path.name for path in run.rglob(".*")]
    found["left over"] = left + [name for name in NAMES if len(list(run.glob(f"checkpoints/{name}-*.safetensors"))) > 2]
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors bit for bit, apart from the seconds of states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trials_of(campaign: Campaign, times: int, every: int) -> dict[str, Callable[[], Iterator[str]]]:
    """Return the trials of each kind; each yields "" or what is wrong."""
    stops = {0, 130}
    return {
        "kill": lambda: campaign.at_calls(every, kill_at, {-9}),
        "random": lambda: campaign.at_times(times, (signal.SIGKILL,), {0, -9}),
        "full": lambda: campaign.at_calls(every, full_from, {2}, of=["write"]),
        "limit": lambda: campaign.at_calls(every, limited_from, {2}, of=["write"]),
        "rename": lambda: campaign.at_calls(every, no_rename_at, {2}, of=["replace"]),
        "clock": lambda: campaign.at_calls(every, clock_at, {0}),
        "sigterm": lambda: campaign.at_times(times, (signal.SIGTERM,), stops | {-15}),
        "sigint": lambda: campaign.at_times(times, (signal.SIGINT,), stops),
        "import": lambda: campaign.imports(times),
        "suspend": lambda: campaign.at_times(times, (signal.SIGSTOP, signal.SIGCONT), {0}),
        "processes": lambda: campaign.shared(times),
        "adapt": lambda: campaign.adapts(every),
        "eval": lambda: campaign.evals(every),
    }


def main(argv: Sequence[str] = ()) -> int:
    parser = Parser(prog="python -m benchmarks.crashes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="kinds, comma-separated (default: all)")
    parser.add_argument(
        "--random", type=positive, default=20, help="trials at random times, of each kind (default: 20)"
    )
    parser.add_argument("--every", type=positive, default=1, help="take each N-th call (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the times (default: 0)")
    parser.add_argument("--out", type=kept, default=FOLDER / "crashes.json", help="file for the results")
    args = parser.parse_args(argv)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), args.seed)
        kinds = trials_of(campaign, args.random, args.every)
        chosen = args.only.split(",") if args.only else list(kinds)
        if unknown := [kind for kind in chosen if kind not in kinds]:
            parser.error(f"--only must be among {', '.join(kinds)}, got {unknown[0]!r}")
        for kind in chosen:
            counts: Counter[str] = Counter()
            with Progress(args.random if kind in AT_TIMES else len(campaign.calls) // args.every) as progress:
                for wrong in kinds[kind]():
                    progress.say(kind)
                    counts["wrong" if wrong else "right"] += 1
                    if wrong:
                        print(f"{kind}, {wrong}", flush=True)
            print(f"{kind}: {counts['right']} right, {counts['wrong']} wrong", flush=True)
            failed |= bool(counts["wrong"])
            entry = {"machine": results.machine(), "seed": args.seed, "every": args.every, "trials": counts}
            results.keep(args.out, kind, entry)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
