"""Inputs of strangers, drawn at random: data, configs, runs and adapters must be used, or refused by one line.

    python tests/dialogue/strangers.py [INPUTS] [SEED]        20,000 inputs by default

Each input is a valid one with a few changes: of bytes, of lines, of values somewhere in its JSON, or by pieces that are
hard for parsers. The digests of a run are made right again, so that what they protect is drawn too. A fault is any
other error than those that the documentation names, a message of several lines, or an input that takes longer than
`LONGEST`.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_formats import SAMPLES, write

import metakern as mk
from metakern.dialogue import checkpoint
from metakern.dialogue.config import Config
from metakern.dialogue.readers import READERS, Dialogue, Turn, formats, read
from metakern.dialogue.run import Run, _vocabulary
from metakern.dialogue.tasks import load_split
from metakern.dialogue.tokenizer import Tokenizer
from metakern.errors import UserError

FORMATS = [name for name in formats() if not READERS[name].synthetic]
LONGEST = 20.0  # seconds of one input, on a machine with other work
PIECES = [
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\x1b[2J",
        b'"',
        b"'",
        b"\t",
        b",",
        b"\\",
        b"\xe2\x80\xa8",
        b"\\ud800",
    ),
    *(b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b"a." * 3000, b"9" * 5000, b"1e999", b"NaN", b"-0x", b"a" * 200_000),
    *(
        b"&a [*a, *a]",
        b"- &b [*b]\n",
        b"!!python/object/apply:os.system [ls]",
        b"<<: *a",
        b"---\n",
        b"\n\n\n",
        b"#",
        b"=",
    ),
    *(b"text:", b"labels:", b"__eou__", b"episode_done:True", b"_comma_", b"1 ", b"2004-01-01T00:00:00.000Z\t"),
]
VALUES: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (None, True, -1, 0, 2**63, 1e308, "", "x", "\0", "\ud800", "\x1b]0;x\a")),
    *(list, dict, lambda: [[]], lambda: {"": {}}, lambda: "ab" * 100_000, lambda: 10**300, lambda: float("nan")),
    *(lambda: json.loads("[" * 400 + "]" * 400), lambda: [{"text": None}] * 3, lambda: {"content": [{"text": 3}]}),
]


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with one change."""
    begin = draw.randrange(len(data) + 1)
    end = min(len(data), begin + int(draw.expovariate(0.05)))
    kind = draw.randrange(7)
    if kind == 0:
        return data[:begin] + bytes([draw.randrange(256)]) + data[begin + 1 :]
    if kind == 1:
        return data[:begin] + data[end:]
    if kind == 2:
        return data[:begin] + data[begin:end] * draw.choice((2, 3, 500)) + data[end:]
    if kind == 3:
        return data[:begin]
    if kind == 4:
        lines = data.split(b"\n")
        draw.shuffle(lines)
        return b"\n".join(lines)
    return data[:begin] + draw.choice(PIECES) + data[begin if kind == 5 else end :]


def changed_value(value: Any, draw: random.Random) -> Any:
    """Return a JSON value in which one part, at any depth, is another one, has another key, or is missing."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(VALUES)()
    value = copy.copy(value)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = draw.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[draw.choice(["x", "", *value])] = value.pop(key)
    else:
        value[key] = changed_value(value[key], draw)
    return value


def changed_text(text: str, draw: random.Random) -> bytes:
    """Return a text with one to three changes; those of JSON keep its form half the time."""
    data = text.encode("utf-8", "surrogatepass")
    for _ in range(draw.randint(1, 3)):
        try:
            if draw.random() < 0.5:
                data = json.dumps(changed_value(json.loads(data), draw)).encode()
                continue
        except (ValueError, RecursionError):
            pass
        data = changed_bytes(data, draw)
    return data


class Fuzzer:
    """Draws inputs into a folder, and tries them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        adapted = copy.deepcopy(self.model)
        mk.lora(adapted, rank=2, trainable=["1"])
        mk.save_lora(adapted, folder / "adapter")
        self.adapter = {path: path.read_bytes() for path in (folder / "adapter").iterdir()}
        self.run = folder / "run"
        talk = Dialogue("tea", "1", (Turn("ann", "Tea?"), Turn("bob", "Yes, tea.")))
        tokenizer = Tokenizer.train([talk], 270)
        tokenizer.save(self.run / "tokenizer.json")
        config = Config(model="gru", width=4, hidden=4, layers=1, max_length=16, capture=False)
        (self.run / "config.toml").write_text(config.toml())
        run = Run.create(self.run, config, tokenizer)
        run.state = {"phase": "train", "step": 3, "seconds": 1.0, "best": 2.0, "worse": 0}
        run.save("best")
        self.files = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        self.samples = {}
        for name in SAMPLES:
            place = Path(write(folder / "samples" / name, name))
            self.samples[name] = [path for path in place.rglob("*") if path.is_file()]

    def data(self, draw: random.Random) -> None:
        name = draw.choice(sorted(self.samples))
        source = draw.choice(self.samples[name])
        file = self.folder / f"input{source.suffix}"
        file.write_bytes(changed_text(source.read_text("utf-8"), draw))
        format = draw.choice(["auto", SAMPLES[name][0], draw.choice(FORMATS)])
        options = {}
        if format != "auto" and draw.random() < 0.2:
            options = {draw.choice([*READERS[format].options, "other"]): draw.choice(["x", "", 3, "topics", None])}
        if draw.random() < 0.3:
            load_split(Config(data=str(file), format=format, min_dialogues=2))
        else:
            read(str(file), format, **options)

    def config(self, draw: random.Random) -> None:
        file = self.folder / "input.toml"
        text = Config().toml()
        if draw.random() < 0.8:
            text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        file.write_bytes(changed_text(text, draw))
        Config.load(file, complete=draw.random() < 0.3)

    def runs(self, draw: random.Random) -> None:
        path = self.run / "checkpoints" / "best.json"
        record = checkpoint._record(path)
        if draw.random() < 0.5:
            file = self.run / "tokenizer.json"
            file.write_bytes(changed_text(file.read_text("utf-8"), draw))
            record["vocabulary"] = _vocabulary(self.run)
        else:
            record = changed_value(record, draw)
        if isinstance(record, dict):
            record["digest"] = checkpoint._digest(record)
        path.write_text(json.dumps(record))
        try:
            Run.open(self.run)
        finally:
            for file, content in self.files.items():
                file.write_bytes(content)

    def adapters(self, draw: random.Random) -> None:
        file = draw.choice(sorted(self.adapter))
        is_json = file.suffix == ".json"
        changed = (
            changed_text(self.adapter[file].decode(), draw) if is_json else changed_bytes(self.adapter[file], draw)
        )
        file.write_bytes(changed)
        try:
            mk.load_lora(copy.deepcopy(self.model), file.parent)
        finally:
            file.write_bytes(self.adapter[file])

    def fault(self, seed: int | str, number: int) -> tuple[str, str]:
        """Try one input; return its kind, and what is wrong or ""."""
        draw = random.Random(f"{seed} {number}")
        kind = draw.choices(("data", "config", "runs", "adapters"), (5, 2, 2, 1))[0]
        allowed = (ValueError, FileNotFoundError) if kind == "adapters" else UserError
        began, wrong = time.monotonic(), ""
        try:
            getattr(self, kind)(draw)
        except allowed as error:
            if "\n" in str(error) or len(str(error)) > 5000:
                wrong = f"a message of {len(str(error))} characters in lines: {str(error)[:200]!r}"
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        if (took := time.monotonic() - began) > LONGEST:
            wrong = wrong or f"took {took:.0f} s"
        return kind, wrong


def main(inputs: int = 20_000, seed: int = 0) -> int:
    counts, faults = Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for number in range(inputs):
            kind, wrong = fuzzer.fault(seed, number)
            counts[kind] += 1
            if wrong:
                faults += 1
                print(f"input {number}: {kind}: {wrong}", flush=True)
    print(f"{inputs} inputs ({', '.join(f'{n} {kind}' for kind, n in counts.items())}): {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
