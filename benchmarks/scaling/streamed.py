"""Measure the memory of streamed conversations: python -m benchmarks.scaling.streamed FOLDER MEGABYTES.

It writes conversations of random words, splits them with `stream`, draws 100 steps, and prints a JSON object with MiB
of memory beyond those of the process before. `peak` is that of the split, `held` what stays after it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from benchmarks.worker import resident
from metakern.dialogue.config import Config
from metakern.dialogue.tasks import episodes, load_split
from metakern.dialogue.tokenizer import Tokenizer

TASKS = 500
SHARDS = 4
TURNS, WORDS = 6, 24  # of a conversation, and of a turn


def write(folder: Path, size: int) -> int:
    """Write conversations of about `size` bytes into `folder`; return the bytes written."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for shard in range(SHARDS):
        with (folder / f"{shard}.jsonl").open("w") as file:
            while written < size * (shard + 1) / SHARDS:
                said = (" ".join(draw.choices(words, k=WORDS)) for _ in range(TURNS))
                turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
                written += file.write(json.dumps({"messages": turns, "topic": f"t{draw.randrange(TASKS)}"}) + "\n")
    return written


def measured(folder: Path, megabytes: int, overlap: str) -> dict[str, float]:
    """Return what `stream` takes for the conversations in a folder."""
    config = Config(data=str(folder), format="messages", stream=True, overlap=overlap, vocab_size=300)
    before, began = resident("VmRSS"), time.perf_counter()
    split = load_split(config)
    seconds = time.perf_counter() - began
    peak, held = resident("VmHWM"), resident("VmRSS")
    count = sum(len(task.dialogues) for part in (split.train, split.validation, split.test) for task in part)
    tokenizer = Tokenizer.train(split.train[0].dialogues[:50], 300)
    source = episodes(config, split.train, tokenizer)
    began = time.perf_counter()
    for step in range(100):
        source.sample(step, 4)
    return {
        "megabytes": megabytes,
        "dialogues": count,
        "split_s": seconds,
        "sample_ms": 10 * (time.perf_counter() - began),
        "peak_mib": (peak - before) / 1024,
        "held_mib": (held - before) / 1024,
        "peak_bytes_a_dialogue": 1024 * (peak - before) / count,
    }


if __name__ == "__main__":
    where, size = Path(sys.argv[1]), int(sys.argv[2])
    overlap = sys.argv[3] if len(sys.argv) > 3 else "users"
    print(json.dumps(measured(where, write(where, size * 10**6) // 10**6, overlap)))
