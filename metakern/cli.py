"""The command line: data, train, eval, adapt, chat, serve, bench, doctor.

An error that the user can put right becomes one line on the standard error and exit code 2, Ctrl-C exit code 130. Any
other error is a bug in metakern and becomes one line and exit code 1. With --traceback, Python's traceback takes the
place of the line. A command imports what it needs when it runs, so that `metakern doctor` works without any optional
extra.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch

import metakern
from metakern import native
from metakern.dialogue.config import Config, describe
from metakern.dialogue.terminal import printable
from metakern.errors import UserError, by_the_user
from metakern.tested import remark

__all__ = ["main"]

GROUPS = {
    "part": "data",
    "model": "model",
    "algorithm": "meta-learning",
    "outer_lr": "outer loop",
    "pretrain_steps": "pretraining",
    "log_every": "the run",
}
DIALOGUE = ("tokenizers", "safetensors", "rich", "matplotlib", "tensorboard", "prompt_toolkit", "sacrebleu")
EXTRAS = {
    **dict.fromkeys(DIALOGUE, "metakern[dialogue]"),
    "transformers": "metakern[hf]",
    "gguf": "metakern[smollm2]",
    **dict.fromkeys(("fastapi", "uvicorn"), "metakern[serve]"),
    "triton": "triton",
    **({"tomli": "metakern[dialogue]"} if sys.version_info < (3, 11) else {}),
}
BENCHMARKS = {
    "ops": "time every op on every backend, beside the machine's limit and plain PyTorch",
    "maml": "measure time and peak memory of one exact meta-gradient, beside other libraries",
    "report": "write the tables and pictures of the results into the pages of a clone of metakern",
}
# Errors of the machine, which the user can put right: a full disk, or a path that may not be read or written.
THE_MACHINE_S = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory|Storage size calculation overflowed")
BENCH = {"rich", "matplotlib", "tomli"}


class _Parser(argparse.ArgumentParser):
    """An argument parser with wide help pages, which raises a `UserError` of one line for wrong arguments."""

    def __init__(self, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns - 2, 110)
        super().__init__(
            **options, allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 30, width)
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process by default."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in given if not word.startswith("-")), "")
    traceback = "--traceback" in given and command != "bench"  # a benchmark parses its own arguments
    try:
        options = vars(_parser().parse_args([word for word in given if not traceback or word != "--traceback"]))
        del options["traceback"]
        processes, max_restarts = options.pop("processes", 1), options.pop("max_restarts", 0)
        if processes > 1 and "WORLD_SIZE" not in os.environ:
            from metakern.dialogue.processes import launch

            return launch(["-m", "metakern", *given], processes, max_restarts)
        options.pop("command")(**options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("metakern: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if traceback:
            raise
        if getattr(error, "silent", False):
            return getattr(error, "code", 2)
        if isinstance(error, UserError) or str(error).startswith(("MAML: ", "doctor: ")):  # about the user's model
            return _complain(str(error), getattr(error, "code", 2))
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in EXTRAS:
            return _complain(f"the package {package} is missing: pip install {EXTRAS[package]}")
        if isinstance(error, ImportError) and "pip install" in str(error):
            return _complain(str(error))
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            return _complain("the memory is too small for this: lower the sizes of the model, of batches or of windows")
        if isinstance(error, OSError) and error.errno in THE_MACHINE_S:
            return _complain(f"{error.filename or 'input or output'}: {error.strerror}")
        return _complain(
            f"{type(error).__name__}: {error}; this is a bug in metakern: --traceback shows where it was raised", 1
        )


def _complain(message: str, code: int = 2) -> int:
    print(f"metakern: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="metakern",
        description="Exact second-order MAML for dialogue models: train, measure the adaptation curve, adapt, chat.",
        epilog="For the arguments of a command: metakern COMMAND --help",
    )
    parser.add_argument("--traceback", action="store_true", help="show Python's traceback of an error, to report it")
    parser.add_argument("--version", action="version", version=f"metakern {metakern.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(command: Any, text: str, **options: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__[1:], help=text, description=f"{text}.", **options)
        added.set_defaults(command=command)
        return added

    train = add(
        _train,
        "Meta-train a dialogue model",
        usage="metakern train [--config FILE] [--out DIR] [--resume] [--time TIME] [--processes N] [SETTING ...]",
        epilog="Each setting is also a key of the TOML file (inner_lr for --inner-lr); a flag overrides the file.",
    )
    train.add_argument(
        "--config", metavar="FILE", help="a TOML file of settings, or the name of a packaged one, such as bots"
    )
    train.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/DATA-MODEL-ALGORITHM)")
    train.add_argument("--resume", action="store_true", help="continue the run in --out, with its config")
    train.add_argument(
        "--time",
        metavar="TIME",
        type=_seconds,
        help="plan the numbers of steps, in the ratio that the settings have them, so that all of it takes about this"
        " time, such as 90s, 10m or 2h",
    )
    _add_processes(train)
    train.add_argument(
        "--max-restarts",
        metavar="N",
        type=_number,
        default=0,
        help="how often all processes are started again from the last checkpoint if one ends early (default: 0)",
    )
    group: Any = train
    for key in fields(Config):
        if key.name in GROUPS:
            group = train.add_argument_group(GROUPS[key.name])
        _add_flag(group, key)

    data = add(
        _data,
        "Say what adaptation is worth on some data",
        usage="metakern data NAME [SETTING ...]",
        epilog="Trains a small model plainly for --steps steps; the settings are those of `metakern train`.",
    )
    data.add_argument("name", metavar="NAME", help="a file, a folder, or packaged data, as --data of `metakern train`")
    for key in fields(Config):
        if key.name not in ("part", "data"):
            _add_flag(data, key)

    evaluate = add(
        _eval,
        "Measure how well a run adapts to unseen tasks",
        epilog="Prints tables and writes eval.json, eval.png and, with --replies, replies.png into the run's folder.",
    )
    evaluate.add_argument("run", metavar="RUN", help="folder of a run")
    evaluate.add_argument(
        "--data",
        metavar="NAME",
        help="other data, all tasks of which are judged (default: the test tasks of the run's data); read as the run's"
        " data are, unless one of the next three flags is given",
    )
    _add_reading(evaluate, "format", "reader_options", "task_key")
    evaluate.add_argument(
        "--steps",
        metavar="N,N",
        type=_numbers,
        default=(0, 1, 3, 5, 10),
        help="numbers of inner steps (default: 0,1,3,5,10)",
    )
    evaluate.add_argument(
        "--compare",
        metavar="NAMES",
        type=_names,
        default=(),
        help="what to compare with: algorithms, each of which is trained first if it has not been; pretrained, the"
        " weights that the run began with; finetune:adam or pretrained:adam, adapted with another inner optimizer; with"
        " --replies also retrieval, the reply to the nearest context of the support",
    )
    evaluate.add_argument(
        "--repeats", metavar="N", type=_number, default=1, help="episodes of each task, which are averaged (default: 1)"
    )
    evaluate.add_argument(
        "--replies", action="store_true", help="also let the adapted models reply, and compare with the bot's replies"
    )
    evaluate.add_argument(
        "--reply-steps",
        metavar="N,N",
        type=_numbers,
        help="numbers of inner steps for --replies, which this flag includes (default: 0,1,3,5,10,30)",
    )
    evaluate.add_argument(
        "--policy",
        metavar="RUN",
        help="folder of the run of a policy, which chooses the acts in hints (default: the acts of the data)",
    )
    _add_processes(evaluate)

    adapt = add(_adapt, "Adapt a run to conversations and save the result as a new run")
    adapt.add_argument("run", metavar="RUN", help="folder of a run")
    adapt.add_argument(
        "--support", metavar="FILE", required=True, help="conversations to adapt to, such as chat messages in JSONL"
    )
    _add_reading(adapt)
    adapt.add_argument(
        "--out", metavar="DIR", required=True, help="folder of the adapted run, with a copy of the conversations"
    )
    _add_most(adapt)

    chat = add(_chat, "Chat with a run", argument_default=argparse.SUPPRESS)
    chat.add_argument("run", metavar="RUN", help="folder of a run")
    chat.add_argument("--support", metavar="FILE", help="conversations to adapt to before the chat")
    _add_reading(chat)
    _add_most(chat)
    chat.add_argument(
        "--parser", metavar="RUN", help="run of a parser, which finds what was taught (default: by common words)"
    )
    chat.add_argument("--policy", metavar="RUN", help="run of a policy, which predicts the next act for /why")
    chat.add_argument(
        "--unknown",
        metavar="NAME",
        help="what to do about a message that was not taught: generate, ask back, hand over (default: generate)",
    )
    chat.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        help="sampling temperature; 0: always the likeliest token (default: 0.7)",
    )
    chat.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        help="sample from the likeliest tokens that together have this probability (default: 0.9)",
    )
    chat.add_argument("--seed", metavar="N", type=_number, help="seed of the sampling (default: 0)")
    chat.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        help="divide the logits of tokens that are in the reply already (default: 1.0)",
    )
    chat.add_argument(
        "--no-repeat",
        metavar="N",
        type=_number,
        help="let no N tokens in a row come twice in a reply; 0: allow it (default: 0)",
    )
    chat.add_argument(
        "--stop", metavar="TEXT", action="append", help="end a reply before this text; may be given again"
    )
    chat.add_argument(
        "--max-tokens", metavar="N", type=_number, help="tokens of a reply (default: half of the run's max_length)"
    )
    chat.add_argument(
        "--web",
        action="store_true",
        help="chat in the browser: serve RUN at a port of its own on this machine, as `metakern serve` does",
    )

    serve = add(
        _serve,
        "Serve a run over HTTP, with a model for each user",
        epilog="The interface is that of OpenAI, at /v1; /docs describes it. Users teach at /v1/users/USER/exchanges.",
    )
    serve.add_argument("run", metavar="RUN", help="folder of a run")
    serve.add_argument(
        "--store", metavar="FILE", help="SQLite file of what users teach (default: users.sqlite in the run's folder)"
    )
    serve.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address to listen at; without tokens a loopback address (default: 127.0.0.1)",
    )
    serve.add_argument(
        "--port", metavar="N", type=_number, default=8000, help="port to listen at; 0: any free one (default: 8000)"
    )
    serve.add_argument("--add-token", metavar="USER", help="print a new token of a user, and exit")
    serve.add_argument("--revoke-token", metavar="USER", help="make all tokens of a user invalid, and exit")
    serve.add_argument(
        "--rows", metavar="N", type=_positive, default=32, help="replies in a batch, at most (default: 32)"
    )
    serve.add_argument(
        "--waiting", metavar="N", type=_positive, default=256, help="replies that may wait for the batch (default: 256)"
    )
    serve.add_argument(
        "--models", metavar="N", type=_positive, default=256, help="users' models in memory, at most (default: 256)"
    )
    serve.add_argument(
        "--rate", metavar="N", type=_positive, default=600, help="requests a minute of a user (default: 600)"
    )
    serve.add_argument(
        "--exchanges", metavar="N", type=_positive, default=100, help="exchanges that a user can teach (default: 100)"
    )
    serve.add_argument(
        "--most-steps", metavar="N", type=_positive, default=60, help="inner steps of an adaptation (default: 60)"
    )
    serve.add_argument(
        "--cors", metavar="ORIGINS", type=_names, default=(), help="origins whose pages may ask (default: none)"
    )
    serve.add_argument("--log-texts", action="store_true", help="write messages and replies into the log")

    bench = add(
        _bench,
        "Time metakern on this machine",
        epilog="For the arguments of a benchmark: metakern bench BENCHMARK --help",
    )
    benchmarks = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for name, text in BENCHMARKS.items():
        # The benchmark parses what follows its name, so no character marks an option here.
        one = benchmarks.add_parser(name, help=text, prefix_chars="\0", add_help=False)
        one.add_argument("arguments", nargs="*")
        one.set_defaults(benchmark=name)

    doctor = add(_doctor, "List what this environment has and lacks, or check whether a run's meta-gradient is exact")
    doctor.add_argument(
        "run", metavar="RUN", nargs="?", help="folder of a run to check; without it, the environment is listed"
    )
    return parser


def _add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the flag that starts several processes; where torchrun has started this one, it has no effect."""
    parser.add_argument(
        "--processes",
        metavar="N",
        type=_positive,
        default=1,
        help="processes of this machine that share the tasks; for several machines see docs/scaling.md (default: 1)",
    )


def _add_most(parser: argparse.ArgumentParser) -> None:
    """Add the flag that limits an adaptation."""
    parser.add_argument(
        "--steps",
        metavar="N",
        type=_number,
        help="largest number of inner steps; an adaptation ends when the taught replies come out (default: 60)",
    )


def _add_reading(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the flags that say how a support is read, or those in `names`; `_reading` takes their values."""
    for key in fields(Config):
        if key.name in (names or ("format", "reader_options")):
            _add_flag(parser, key)


def _reading(format: str = "auto", reader_options: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of `readers.read` after the first one."""
    from metakern.dialogue.registry import named

    return {"format": format, **named("reader_options", reader_options)}


def _add_flag(group: Any, key: Field[Any]) -> None:
    """Add the flag of a config field; without the flag there is no value, so that the file's value stays."""
    flag, default = f"--{key.name.replace('_', '-')}", key.default
    none_or_all = "none" if key.name.endswith(("_options", "_tasks")) else "all"
    shown = ("no", "yes")[default] if isinstance(default, bool) else none_or_all if default == () else default
    shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else "empty" if shown == "" else shown
    text = f"{describe(key.metadata)} (default: {shown})".replace("%", "%%")
    options: dict[str, Any] = {"dest": key.name, "default": argparse.SUPPRESS, "help": text}
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        kind: Any
        kind, metavar = {int: (int, "N"), float: (float, "X"), str: (str, "NAME")}.get(type(default), (_names, "NAMES"))
        if isinstance(default, tuple) and default:
            kind, metavar = _numbers, "N,N"
        group.add_argument(flag, type=kind, metavar=metavar, **options)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not (found := _number(text)):
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return found


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be a time above 0 with its unit, such as 90s, 10m or 2h, got {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part.strip()) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _train(config: str | None, out: str | None, resume: bool, time: float | None, **flags: Any) -> None:
    from metakern.dialogue import processes
    from metakern.dialogue.trainer import train

    settings = Config.parse(flags, "train", base=Config.load(config) if config else None)
    out = out or str(Path("runs") / re.sub(r"\W+", "-", f"{settings.data}-{settings.model}-{settings.algorithm}"))
    if resume and not config and (begun := Path(out) / "config.toml").exists():
        settings = Config.parse(flags, "train", base=Config.load(begun))
    with processes.joined():
        if processes.is_first():
            _name_idle(settings, flags, processes.size())
        run = train(settings, out, resume=resume, seconds=time)
        if processes.is_first():
            best = f"best validation loss {run.state['best']:.4f} at step {run.state['step']}"
            print(f"{best}; next: metakern eval {out}")


def _data(name: str, **flags: Any) -> None:
    from rich.console import Console

    from metakern.dialogue.worth import measure, show

    small = {"model": "gpt", "width": 64, "layers": 2, "outer_lr": 3e-3, "steps": 400}
    settings = Config.parse(small | flags | {"data": name}, "data")
    _name_idle(settings, flags)
    show(name, measure(settings), Console())


def _name_idle(settings: Config, flags: Mapping[str, Any], processes: int = 1) -> None:
    """Name the flags that change nothing in a run with these settings and so many processes."""
    told = {key.name: describe(key.metadata) for key in fields(Config)}
    alone = ["shard"] if flags.get("shard") and processes == 1 else []
    for name in [*settings.idle(flags), *alone]:
        print(f"metakern: --{name.replace('_', '-')} changes nothing in this run: {told[name]}", file=sys.stderr)


def _eval(
    run: str,
    data: str | None,
    steps: tuple[int, ...],
    compare: tuple[str, ...],
    repeats: int,
    replies: bool,
    reply_steps: tuple[int, ...] | None,
    policy: str | None,
    **reading: Any,
) -> None:
    from rich.console import Console

    from metakern.dialogue import processes
    from metakern.dialogue.evaluate import REPLY_STEPS, evaluate
    from metakern.dialogue.manager.evaluate import evaluate_part, show_part
    from metakern.dialogue.report import show
    from metakern.dialogue.run import part_of

    if reading and not data:
        raise UserError(
            "eval: --format, --reader-options and --task-key say how --data is read: add it, or leave them out"
        )
    if (part := part_of(run)) != "generator":
        if replies or reply_steps or policy:
            raise UserError(f"{run}: is the run of a {part}, which has no replies: leave out --replies and --policy")
        with processes.joined():
            processes.alone(f"{run}: is the run of a {part}, which one process judges: leave out --processes")
            show_part(evaluate_part(run, steps, compare, data, repeats, reading or None), Console())
        return
    reply_steps = reply_steps or (REPLY_STEPS if replies else ())
    with processes.joined():
        report = evaluate(run, steps, compare, data, reply_steps, repeats, reading or None, policy)
        if processes.is_first():
            show(report, Console())


def _adapt(run: str, support: str, out: str, steps: int | None, **reading: Any) -> None:
    from metakern.dialogue.chat import adapt
    from metakern.dialogue.teach import MOST_STEPS

    line = adapt(run, support, out, MOST_STEPS if steps is None else steps, _status, **_reading(**reading))
    print(f"{printable(line)}\nnext: metakern chat {out}")


def _chat(run: str, web: bool = False, **given: Any) -> None:
    if not web:
        _talk(run, **given)
        return
    if given:
        flag = f"--{next(iter(given)).replace('_', '-')}"
        raise UserError(f"chat: {flag} has no effect with --web: leave it out, and set it on the page")
    from metakern.serve import server
    from metakern.serve.service import Settings

    server.serve(run, None, "127.0.0.1", server.port_of(run), Settings(), browse=True)


def _talk(
    run: str,
    support: str | None = None,
    steps: int | None = None,
    parser: str | None = None,
    policy: str | None = None,
    unknown: str = "generate",
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat: int = 0,
    stop: Sequence[str] = (),
    max_tokens: int | None = None,
    **reading: Any,
) -> None:
    from metakern.dialogue.chat import Chat, talk
    from metakern.dialogue.generate import Sampling
    from metakern.dialogue.manager.parser import FewShotParser
    from metakern.dialogue.manager.policy import ActPolicy, TaughtPolicy
    from metakern.dialogue.readers import read
    from metakern.dialogue.run import Run
    from metakern.dialogue.teach import MOST_STEPS

    with by_the_user():
        sampling = Sampling(temperature, top_p, repetition_penalty, no_repeat)
    taught = TaughtPolicy(unknown)
    chat = Chat(
        Run.open(run),
        read(support, **_reading(**reading)) if support else [],
        parser=FewShotParser(parser) if parser else None,
        policy=ActPolicy(policy, taught) if policy else taught,
        progress=_status,
        sampling=sampling,
        most=MOST_STEPS if steps is None else steps,
        stop=stop,
        most_tokens=max_tokens,
        seed=seed,
    )
    talk(chat)


def _status(line: str) -> None:
    """Show where a computation stands in one line of the terminal, in place of the last one; elsewhere nothing."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{printable(line)}\r", end="", file=sys.stderr, flush=True)


def _serve(
    run: str,
    store: str | None,
    host: str,
    port: int,
    add_token: str | None,
    revoke_token: str | None,
    **limits: Any,
) -> None:
    from metakern.serve import server
    from metakern.serve.service import Settings

    if add_token is not None:
        print(server.add_token(run, store, add_token))
    elif revoke_token is not None:
        print(f"tokens of {revoke_token} that are no longer valid: {server.revoke_token(run, store, revoke_token)}")
    else:
        server.serve(run, store, host, port, Settings(**limits))


def _bench(benchmark: str, arguments: list[str]) -> None:
    """Run a benchmark from the clone that this package is in or, if it is installed, from its own folder `_bench`."""
    package = Path(metakern.__file__).parent
    cloned = (package.parent / "setup.py").exists()
    if benchmark == "report" and not cloned:
        raise UserError(
            "bench report: must run in a clone of metakern, whose pages it writes, got an installed package"
        )
    sys.path.insert(0, str(package.parent if cloned else package / "_bench"))
    try:
        importlib.import_module(f"benchmarks.{benchmark}").main(arguments, f"metakern bench {benchmark}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in BENCH:
            raise
        raise UserError(f"the package {missing} is missing: pip install metakern[bench]") from None


def _doctor(run: str | None) -> None:
    if run is None:
        _environment()
    else:
        _diagnosis(run)


def _diagnosis(path: str) -> None:
    from metakern.dialogue.run import Run
    from metakern.dialogue.tasks import load_split, on_device_of, source_of

    run = Run.open(path)
    config, algorithm = run.config, run.algorithm
    if config.part == "parser":
        raise UserError(f"{path}: must be the run of a generator or a policy, got one of a parser")
    loss = metakern.losses.causal_lm if config.part == "generator" else metakern.losses.classification
    batches = source_of(config, load_split(config).train, run.tokenizer, run.labels).sample(0, config.tasks)
    support, query = (on_device_of(run.model, batch) for batch in batches)
    options = {"inner": algorithm.inner, "steps": config.most_inner_steps, "adapt": getattr(algorithm, "_adapt", None)}
    print(metakern.doctor(run.model, loss, support, query, **options))


def _environment() -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"metakern {metakern.__version__}, Python {python}, torch {torch.__version__}, numpy {numpy.__version__}")
    for package, found in (("python", python), ("torch", torch.__version__), ("numpy", numpy.__version__)):
        if words := remark(package, found):
            print(f"{package} {found} is {words}")
    print(f"CPU: {torch.get_num_threads()} threads")
    if native.obstacle() is None:
        products = native.products()
        print(f"matrix products: {'our kernel' if products.is_native else 'torch.bmm'} ({products.why})")
    for i in range(torch.cuda.device_count()):
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}")
    _table("backends", metakern.backends())
    _table("kernels", {name: ", ".join(spec.op.kernels) for name, spec in metakern.ops.SPECS.items()})
    _table("packages", {name: _installed(name) for name in EXTRAS})


def _table(title: str, rows: Mapping[str, str]) -> None:
    print(f"\n{title}")
    for name, text in rows.items():
        print(f"  {name:<22}{text}")


def _installed(package: str) -> str:
    try:
        found, words = version(package), remark(package, version(package))
        return f"{found} ({words})" if words else found
    except PackageNotFoundError:
        return f"missing: pip install {EXTRAS[package]}"
