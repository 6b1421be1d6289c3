"""Small conversations and the config of a small run, for the tests of training, evaluation and chat."""

import json
import random
from dataclasses import replace
from pathlib import Path

from metakern.dialogue.config import Config
from metakern.dialogue.readers import read
from metakern.dialogue.run import Run
from metakern.dialogue.tokenizer import Tokenizer
from metakern.io import write

WORDS = ("river", "stone", "cloud", "ember", "maple", "otter", "violin", "copper", "lantern", "meadow", "harbor")


def write_tasks(folder: Path, tasks: int = 10, dialogues: int = 10) -> Path:
    """Write a JSONL file of messages for each task, whose replies use three words of its own; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(tasks):
        draw = random.Random(t)
        favorites = draw.sample(WORDS, 3)
        lines = []
        for _ in range(dialogues):
            said = " ".join(draw.choices(WORDS, k=4))
            reply = " ".join(draw.choices(favorites, k=4))
            talk = [("user", said), ("assistant", reply), ("user", f"why {said}"), ("assistant", f"for {reply}")]
            lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}))
        (folder / f"task{t}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def tiny_config(data: Path, **changes: object) -> Config:
    """Return a config that trains on `data` in a few seconds; `changes` replace its values."""
    config = Config(
        data=str(data),
        vocab_size=300,
        max_length=24,
        support_size=3,
        query_size=2,
        model="gru",
        width=8,
        hidden=8,
        layers=1,
        inner_steps=2,
        inner_lr=0.3,
        lr_per="parameter",
        outer_lr=0.01,
        rate_lr=1e-3,
        warmup=2,
        tasks=2,
        steps=6,
        pretrain_steps=4,
        log_every=2,
        eval_every=3,
        threads=1,
        seed=3,
    )
    return replace(config, **changes)


def untrained_run(folder: Path, **changes: object) -> Run:
    """Write a run with the weights that training would begin with, which learns a few exchanges in some steps."""
    rates = {"inner": "adam", "inner_lr": 0.03, "learn_lr": False, "capture": False}
    config = tiny_config(write_tasks(folder.parent / "data"), width=32, hidden=32, max_length=48, **rates | changes)
    tokenizer = Tokenizer.train(read(config.data), config.vocab_size)
    run = Run.create(folder, config, tokenizer)
    run.state = {"phase": "train", "step": 0}
    tokenizer.save(folder / "tokenizer.json")
    write(folder / "config.toml", config.toml().encode())
    run.save("best")
    return run
