"""Damage the folder of a run at random, and count what metakern does not notice.

    python -m benchmarks.damage RUN [--trials 10000] [--seed 0]

Each trial changes one file in a copy of the run and opens the copy, by its checkpoint `best` as `metakern eval` does or
by `last` as `metakern train --resume` does. Most changes are of bytes: a bit, a byte, a digit, a range that is lost,
repeated or overwritten, lines that change places, a file that is cut short, missing or a pipe. Some keep the form of
the file: a key or a value of its JSON, two merges of the tokenizer. Some are of weights whose digests are right:
integers, complex numbers, NaN, another shape, a tensor that is missing. A trial ends in one of these ways:

    refused      one line names the file
    replaced     one line names the file, and the checkpoint before is loaded
    harmless     nothing is said, and the run is the same: settings, state, tensors, tokenizer
    silent       nothing is said, and the run is another one
    traceback    an error that is not for users

The last two must not occur. The numbers go to benchmarks/results/damage.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.options import Parser, kept, positive
from benchmarks.progress import Progress
from benchmarks.results import FOLDER
from metakern.dialogue import checkpoint
from metakern.dialogue.run import Run
from metakern.errors import UserError

OUTCOMES = ("refused", "replaced", "harmless", "silent", "traceback")
FAULTS = ("silent", "traceback")
LONGEST = 20  # seconds that a run may take to open
Change = Callable[[Path, random.Random], object]


def _bytes(change: Callable[[bytearray, int, int, random.Random], object]) -> Change:
    """Return a change of a file's bytes, given a change of a range of them in place."""

    def changed(file: Path, draw: random.Random) -> None:
        data = bytearray(file.read_bytes())
        begin = draw.randrange(len(data))
        end = min(len(data), begin + 1 + int(draw.expovariate(1 / draw.choice((2, 50, 2000)))))
        change(data, begin, end, draw)
        file.write_bytes(data)

    return changed


def _bit(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    data[begin] ^= 1 << draw.randrange(8)


def _byte(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    data[begin] = draw.randrange(256)


def _letter(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    """Replace a letter or a digit by another one."""
    found = [i for i in range(len(data)) if chr(data[i]).isalnum()]
    i = draw.choice(found or [begin])
    data[i] = ord(draw.choice("0123456789" if chr(data[i]).isdecimal() else "abcdefghijklmnopqrstuvwxyz"))


def _lost(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    del data[begin:end]


def _repeated(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    data[begin:begin] = data[begin:end]


def _zeros(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    data[begin:end] = bytes(end - begin)


def _noise(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    data[begin:end] = draw.randbytes(end - begin)


def _cut(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    del data[begin:]


def _lines(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    """Let two lines change places, or lose one."""
    lines = bytes(data).split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    if draw.random() < 0.5:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        del lines[i]
    data[:] = b"\n".join(lines)


def _values(file: Path, draw: random.Random) -> None:
    """Change a key or a value somewhere in a JSON file; in any other file, a byte."""
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        return _bytes(_byte)(file, draw)
    at = value
    while True:
        key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.8:
            at = at[key]
            continue
        kind = draw.randrange(3)
        if kind == 0 and isinstance(at, dict):
            at[f"{key}x"] = at.pop(key)
        elif kind == 1 and isinstance(at, list) and len(at) > 1:
            i = draw.randrange(len(at))
            at[key], at[i] = at[i], at[key]
        else:
            at[key] = draw.choice([None, -1, 44, 1e300, "", "x", [], {}, True, float("nan")])
        break
    file.write_text(json.dumps(value))
    return None


def _absent(file: Path, draw: random.Random) -> None:
    """Put a pipe, a folder, an endless device, an empty file or nothing in the place of a file."""
    file.unlink()
    draw.choice(
        (
            lambda: None,
            file.touch,
            file.mkdir,
            lambda: os.mkfifo(file),
            lambda: file.symlink_to("/dev/zero"),
            lambda: file.symlink_to(file),
            lambda: file.symlink_to("/etc/hostname"),
        )
    )()


def _tensors(file: Path, draw: random.Random) -> None:
    """Save the checkpoint of a JSON file anew, with right digests and one wrong tensor of weights."""
    folder, name = file.parent, file.stem
    tensors, state = checkpoint.load(folder, name)
    key = draw.choice(sorted(key for key in tensors if key.startswith("weights.")))
    x = tensors[key]
    wrong: Any = draw.choice(
        (
            lambda: x.to(torch.int8 if x.is_floating_point() else torch.int64),
            lambda: x.to(torch.complex64),
            lambda: torch.full_like(x, torch.nan) if x.is_floating_point() else x[1:],
            lambda: torch.zeros(*x.shape, 2, dtype=x.dtype),
            lambda: None,
        )
    )()
    tensors = {k: wrong if k == key else value for k, value in tensors.items() if k != key or wrong is not None}
    for old in folder.glob(f"{name}*"):
        old.unlink()
    checkpoint.save(folder, name, tensors, state)


CHANGES: dict[str, Change] = {
    "a bit": _bytes(_bit),
    "a byte": _bytes(_byte),
    "a letter or digit": _bytes(_letter),
    "a lost range": _bytes(_lost),
    "a repeated range": _bytes(_repeated),
    "zeros": _bytes(_zeros),
    "noise": _bytes(_noise),
    "cut short": _bytes(_cut),
    "lines": _bytes(_lines),
    "keys and values": _values,
    "another kind of file": _absent,
    "wrong tensors": _tensors,
}


def files_of(run: Path) -> list[Path]:
    """Return the files of a run on which it depends."""
    found = [run / "config.toml", run / "tokenizer.json", *sorted((run / "checkpoints").iterdir())]
    return [file for file in found if not file.name.startswith("pretrained")]


def facts(run: Path, name: str) -> dict[str, Any]:
    """Return what a run is when it is opened by the checkpoint `name`."""
    opened = Run.open(run, name)
    extra = opened.restore(name)
    tensors = {**extra, **checkpoint.module_tensors(opened.algorithm)}
    data = b"".join(key.encode() + tensors[key].detach().numpy().tobytes() for key in sorted(tensors))
    words = opened.tokenizer.encode("The quick brown fox jumps over the lazy dog 0123456789 äöü 你好")
    return {
        "settings": opened.config.settings(),
        "state": opened.state,
        "tensors": hashlib.sha256(data).hexdigest(),
        "tokenizer": [(run / "tokenizer.json").read_bytes(), words],
    }


def outcome(run: Path, name: str, whole: dict[str, Any]) -> tuple[str, str]:
    """Open a run that was damaged; return the outcome, and what was said."""

    def hang(*_: Any) -> None:
        raise TimeoutError(f"not opened in {LONGEST} s")

    said = io.StringIO()
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stderr(said):
            found = facts(run, name)
    except UserError as error:
        return ("traceback" if "\n" in str(error) else "refused"), str(error)
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    if "the checkpoint before" in said.getvalue():
        return "replaced", said.getvalue()
    return ("harmless" if found == whole else "silent"), said.getvalue()


def damaged(run: Path, trials: int, seed: int) -> dict[str, Counter[str]]:
    """Return how often each outcome occurred, by kind of change; print each fault."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as temporary, Progress(trials) as progress:
        copy = Path(temporary) / "run"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("tensorboard", "finetune", ".lock"))
        kept_bytes = {file: file.read_bytes() for file in files_of(copy)}
        whole = {name: facts(copy, name) for name in ("best", "last")}
        for trial in range(trials):
            draw = random.Random(f"{seed} {trial}")
            kind, name = draw.choice(list(CHANGES)), draw.choice(list(whole))
            file = draw.choice([path for path in kept_bytes if path.name.startswith(("config", "tokenizer", name))])
            if kind == "wrong tensors":
                file = copy / "checkpoints" / f"{name}.json"
            progress.say(kind)
            CHANGES[kind](file, draw)
            how, said = outcome(copy, name, whole[name])
            counts[kind][how] += 1
            if how in FAULTS:
                print(f"trial {trial}: {how}: {kind} in {file.relative_to(copy)}, opened by {name}: {said}", flush=True)
            restore(copy, kept_bytes)
    return counts


def restore(run: Path, kept_bytes: dict[Path, bytes]) -> None:
    """Give the files of a run the contents that they had."""
    for path in (*kept_bytes, *(run / "checkpoints").iterdir()):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.is_symlink() or not path.is_file() or path.read_bytes() != kept_bytes.get(path):
            path.unlink(missing_ok=True)
    for path, data in kept_bytes.items():
        if not path.exists():
            path.write_bytes(data)


def main(argv: Sequence[str] = ()) -> int:
    parser = Parser(prog="python -m benchmarks.damage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run with at least two validations")
    parser.add_argument("--trials", type=positive, default=10_000, help="number of trials (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes (default: 0)")
    parser.add_argument("--out", type=kept, default=FOLDER / "damage.json", help="file for the results")
    args = parser.parse_args(argv)
    if not (args.run / "checkpoints" / "last-before.json").exists():
        parser.error(f"RUN must be the folder of a run with at least two validations, got {str(args.run)!r}")
    counts = damaged(args.run, args.trials, args.seed)
    print("change", *OUTCOMES, sep="\t")
    for kind, found in counts.items():
        print(kind, *(found[how] for how in OUTCOMES), sep="\t")
    total = sum(counts.values(), Counter())
    print("all", *(total[how] for how in OUTCOMES), sep="\t")
    entry = {"machine": results.machine(), "trials": args.trials, "seed": args.seed, "outcomes": counts}
    results.keep(args.out, f"seed {args.seed}", entry)
    return int(any(total[how] for how in FAULTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
