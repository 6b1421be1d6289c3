"""Measure `metakern serve`: many users, each with a model of their own.

The model is the small GPT of `make bots`, or SmolLM2-135M with LoRA of rank 8.

    python -m benchmarks.serving [--model gpt|smollm2] [--users 1,8,16,64] [--rounds 5] [--replies 4] [--threads 2]

replies    Each user asks for some replies of 8 to 40 tokens, one after the other. Three ways do the same work, in
           interleaved rounds: `batch`, the engine with a row for each user; `one row`, the same engine with one row,
           which serves one user after the other; and `chat`, the loop of `metakern chat` over models in memory (SmolLM2
           has a cache there, the GPT has none). All must give the same tokens. Ratios are medians of ratios within a
           round, with quartiles.
http       The same through HTTP: `metakern serve` in a process, and clients in this one that stream, each user with one
           request at a time. It gives requests a second, and percentiles of the time to the first token and to the end.
memory     What a user in memory takes, counted, and the growth of the process.

Weights are random, and no token ends a reply. Results go to benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import torch
from torch import nn

from benchmarks import results
from benchmarks.options import Parser, positive
from benchmarks.recurrent import quartiles
from metakern.dialogue.config import Config
from metakern.dialogue.generate import generate
from metakern.dialogue.huggingface import ChatTokenizer
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import load_split
from metakern.dialogue.tokenizer import DialogueTokenizer, Tokenizer
from metakern.io import write
from metakern.meta.parameters import twin
from metakern.serve.engine import Engine, Request, Resident
from metakern.serve.server import store_of
from metakern.serve.service import Service, Settings
from metakern.serve.store import Store

Work = list[list[tuple[list[int], int]]]  # for each user, prompts and the numbers of tokens of the replies
NO_END = -2


def work(users: int, replies: int, vocabulary: int, window: int) -> Work:
    """Return what users ask; a user's second, fourth, … prompt continues the conversation before it."""
    draw = random.Random(f"serving/{users}")
    asked: Work = []
    for _ in range(users):
        own: list[tuple[list[int], int]] = []
        for i in range(replies):
            before = own[-1][0] if i % 2 else []
            prompt = [*before, *(draw.randrange(6, vocabulary) for _ in range(draw.randint(6, 20)))]
            own.append((prompt, min(draw.randint(8, 40), window - len(prompt))))
        asked.append(own)
    return asked


def by_engine(engine: Engine, residents: Sequence[Resident], asked: Work) -> list[list[list[int]]]:
    """Return the replies of each user by an engine; a user's next request follows the end of the last reply."""
    ended: SimpleQueue[tuple[int, list[int]]] = SimpleQueue()
    replies: list[list[list[int]]] = [[] for _ in asked]

    def submit(user: int) -> None:
        prompt, length = asked[user][len(replies[user])]
        emit = lambda ids, reason: ended.put((user, list(ids)))  # noqa: E731
        engine.submit([Request(residents[user], prompt, length, emit, temperature=0, stream=False)])

    for user in range(len(asked)):
        submit(user)
    for _ in range(sum(map(len, asked))):
        user, ids = ended.get()
        replies[user].append(ids)
        if len(replies[user]) < len(asked[user]):
            submit(user)
    return replies


def by_chat(models: Sequence[nn.Module], asked: Work) -> list[list[list[int]]]:
    """Return the replies of each user by `generate`, one after the other."""
    return [
        [generate(model, prompt, max_new_tokens=length, temperature=0) for prompt, length in own]
        for model, own in zip(models, asked, strict=True)
    ]


def measure_replies(run: Run, users: int, replies: int, rounds: int) -> dict[str, Any]:
    """Return tokens a second of the three ways, and the ratios of `batch` to the others."""
    asked = work(users, replies, run.tokenizer.vocab_size, run.config.max_length)
    models = [twin(run.model).eval() for _ in range(users)]
    for user, model in enumerate(models):
        perturb(model, user)
    length = run.config.max_length
    engines = {
        name: Engine(run.model, rows, users, NO_END, length) for name, rows in (("batch", users), ("one row", 1))
    }

    def residents() -> list[Resident]:
        return [Resident(engines["batch"].stack.flat(trained(model))) for model in models]

    ways: dict[str, Callable[[], Any]] = {
        name: lambda engine=engine: by_engine(engine, residents(), asked) for name, engine in engines.items()
    }
    ways["chat"] = lambda: by_chat(models, asked)
    found = {name: way() for name, way in ways.items()}
    if not found["batch"] == found["one row"] == found["chat"]:
        raise RuntimeError("serving: the three ways must give the same replies")
    tokens = sum(length for own in asked for _, length in own)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            speeds[name].append(tokens / (time.perf_counter() - began))
    for engine in engines.values():
        engine.close()
    ratios = {
        f"batch / {name}": quartiles([a / b for a, b in zip(speeds["batch"], speeds[name], strict=True)])
        for name in ("one row", "chat")
    }
    return {"tokens_per_second": {name: statistics.median(of) for name, of in speeds.items()}, "ratios": ratios}


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Make the model of a user: the same model with other weights."""
    draw = torch.Generator().manual_seed(seed)
    for p in trained(model).values():
        p += 0.02 * torch.randn(p.shape, generator=draw)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a model that are not frozen."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def make_run(folder: Path, threads: int, model: str) -> Run:
    """Write a run before training: a GPT of the sizes in `bots.toml`, or SmolLM2."""
    config = Config(data="bots", width=96, layers=2, heads=4, vocab_size=1024, max_length=96, threads=threads)
    tokenizer: DialogueTokenizer
    if model == "smollm2":
        config = replace(config, model="hf:smollm2", lora=8)
        tokenizer = ChatTokenizer.of(config.pretrained)
    else:
        said = [d for task in load_split(config).train for d in task.dialogues]
        tokenizer = Tokenizer.train(said, config.vocab_size)
    run = Run.create(folder, config, tokenizer)
    run.state = {"phase": "train", "step": 0}
    tokenizer.save(folder / "tokenizer.json")
    write(folder / "config.toml", config.toml().encode())
    run.save("best")
    return run


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[tuple[str, int]]:
    """Start `metakern serve`; give its address and the number of its process."""
    command = [sys.executable, "-m", "metakern", "serve", str(folder), "--port", "0", "--rate", "1000000", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+:\d+", server.stdout.readline())
            if not found:
                raise RuntimeError("serving: metakern serve did not start")
            yield found[0], server.pid
        finally:
            server.terminate()


def teach_all(run: Run, users: int) -> None:
    """Put users with models of their own into the store of a run that nobody serves."""
    service = Service(run, Store(store_of(str(run.path), None)), Settings())
    for user in range(users):
        model, name = twin(run.model), f"user{user}"
        perturb(model, user)
        service.store.teach(name, [("x", "y")])
        row = service.store.user(name)
        assert row is not None
        service.store.adopt(row, trained(model))
    service.close()


async def load(address: str, users: int, replies: int) -> dict[str, Any]:
    """Let each user stream `replies` replies, one after the other, and return rates and percentiles."""
    firsts: list[float] = []
    wholes: list[float] = []

    async def one(client: httpx.AsyncClient, user: int) -> None:
        draw = random.Random(f"load/{user}")
        for _ in range(replies):
            text = " ".join(draw.choices(("open", "price", "piano", "train", "when", "where"), k=4))
            body = {"model": "run", "user": f"user{user}", "messages": [{"role": "user", "content": text}]}
            body |= {"stream": True, "max_tokens": draw.randint(8, 40)}
            began, first = time.perf_counter(), 0.0
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if not first and '"content": "' in line and '"role"' not in line:
                        first = time.perf_counter() - began
            wholes.append(time.perf_counter() - began)
            firsts.append(first or wholes[-1])

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(one(client, user) for user in range(users)))  # everything is in memory after this
        firsts.clear()
        wholes.clear()
        began = time.perf_counter()
        await asyncio.gather(*(one(client, user) for user in range(users)))
        seconds = time.perf_counter() - began
    return {
        "requests_per_second": len(wholes) / seconds,
        "first_token_ms": percentiles(firsts),
        "whole_reply_ms": percentiles(wholes),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{q}": 1000 * ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 99)}


def resident_bytes(pid: int) -> int:
    """Return the memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure_http(run: Run, users: Sequence[int], replies: int) -> dict[str, Any]:
    """Return the rates and times of each number of users, with a batch and with one row, and the memory of a user."""
    found: dict[str, Any] = {}
    for name, rows in (("batch", str(max(users))), ("one row", "1")):
        with served(run.path, "--rows", rows) as (address, pid):
            asyncio.run(load(address, 1, 1))
            before = resident_bytes(pid)
            found[name] = {count: asyncio.run(load(address, count, replies)) for count in users}
            grown = (resident_bytes(pid) - before) / max(users)
        if name == "batch":
            found["memory_mib"] = {"process, a user": grown / 2**20}
    engine = Engine(run.model, 1, 1, NO_END, run.config.max_length)
    counted = engine.stack.arena.nbytes + sum(part.nbytes for part in engine.stack.cache)
    found["memory_mib"]["weights and cache, a user"] = counted / 2**20
    engine.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    numbers = lambda text: [positive(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", choices=("gpt", "smollm2"), default="gpt", help="the model (default: gpt)")
    parser.add_argument("--users", metavar="N,N", type=numbers, default=[1, 8, 16, 64], help="numbers of users")
    parser.add_argument("--rounds", metavar="N", type=positive, default=5, help="rounds of the replies (default: 5)")
    parser.add_argument("--replies", metavar="N", type=positive, default=4, help="replies of a user (default: 4)")
    parser.add_argument("--threads", metavar="N", type=positive, default=results.cores(), help="PyTorch's threads")
    options = parser.parse_args(arguments)
    entry: dict[str, Any] = {"machine": results.machine(), "threads": options.threads, "replies": options.replies}
    entry["users"] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", options.threads, options.model)
        for users in options.users:
            entry["users"][users] = found = measure_replies(run, users, options.replies, options.rounds)
            print(users, json.dumps(found))
        teach_all(run, max(options.users))
        entry["http"] = measure_http(run, options.users, options.replies)
        print(json.dumps(entry["http"]))
    results.keep(results.FOLDER / "serving.json", "serving" if options.model == "gpt" else options.model, entry)


if __name__ == "__main__":
    main()
