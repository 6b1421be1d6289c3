"""The workloads of `benchmarks.algorithms`: tasks, a model, and the algorithms that apply to it.

Tasks have three parts: for training, for validation (the choice of rates), and for the test.

sines      The sine waves of Finn et al. 2017, section 5.1: random amplitude and phase, ten points in support and query.
intents    Utterances of five intents, two of each in the support and three in the query; the labels are permuted in
           every task. They are read from a file (`--intents`), or made of verbs and things. The parts have different
           intents.
dialogue   Conversations of service bots (`metakern.dialogue.bots`), four in support and query. The parts have different
           kinds of business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby, islice, pairwise, product
from pathlib import Path
from random import Random
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue.baselines import FineTune, InContext, PromptTuning
from metakern.dialogue.bots import Bot, bots, dialogues
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.hypernetwork import TextHyperNetwork
from metakern.dialogue.models import build_model
from metakern.dialogue.readers import dialogue, read
from metakern.dialogue.split import TaskData
from metakern.dialogue.tokenizer import Tokenizer
from metakern.dialogue.words import words
from metakern.optim import SGD

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
Make = Callable[[nn.Module, float], Any]  # makes an algorithm of a model and an inner rate
Episode = tuple[Any, Any]  # support and query of some tasks
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")

WAYS, SHOTS, QUERIES, BUCKETS, LONGEST = 5, 2, 3, 512, 16
VERBS = ("book reserve", "cancel drop", "move postpone", "check show", "pay settle", "share send", "rate review")
THINGS = ("flight plane", "hotel room", "table dinner", "taxi ride", "ticket seat", "parcel package", "course class")
TEMPLATES = ("please {} the {}", "can you {} my {} today", "i want to {} a {}", "{} {} now", "help me {} this {}")
KINDS = {"train": 6, "validation": 2, "test": 2}  # of business
MAX_LENGTH, VOCABULARY = 40, 400


@dataclass(frozen=True)
class Workload:
    """A kind of tasks, with what is trained on it.

    Attributes:
        about: A sentence for the page of results.
        draw: `draw(part, tasks, seed)` yields episodes of `tasks` tasks of a part without end.
        model: Makes the model, which depends on the seed of PyTorch.
        algorithms: The algorithms by name.
        rateless: The algorithms without an inner rate.
        rates: The inner rates that are tried first.
        steps: The number of outer steps.
        tasks: The number of tasks in a step.
        inner_steps: The number of inner steps, K.
        outer_lr: The rate of Adam that is tried first.
        test_tasks: The number of tasks of an evaluation.
    """

    about: str
    draw: Callable[[Part, int, int], Iterator[Episode]]
    model: Callable[[], nn.Module]
    algorithms: dict[str, Make]
    rateless: tuple[str, ...]
    rates: tuple[float, ...]
    steps: int
    tasks: int
    inner_steps: int
    outer_lr: float
    test_tasks: int


def common(loss: Loss, K: int) -> dict[str, Make]:
    """Return the algorithms that apply to every model and loss.

    The penalty of iMAML is so strong that an inner step halves the distance to its minimum.
    """
    solver: dict[str, Any] = {"solver_steps": 5, "tolerance": 1.0}
    return {
        "MAML": lambda model, lr: mk.MAML(model, loss, SGD(lr), K),
        "MAML, learned rates": lambda model, lr: mk.MAML(model, loss, SGD(lr, learn_lr=True, per="parameter"), K),
        "MAML++": lambda model, lr: mk.MAMLPlusPlus(model, loss, steps=K, lr=lr),
        "Meta-SGD": lambda model, lr: mk.MetaSGD(model, loss, lr=lr, steps=K),
        "Meta-Curvature": lambda model, lr: mk.MAML(model, loss, mk.optim.MetaCurvature(lr), K),
        "iMAML": lambda model, lr: mk.IMAML(model, loss, SGD(lr), K, strength=0.5 / lr, **solver),
        "ANIL": lambda model, lr: mk.ANIL(model, loss, inner=SGD(lr), steps=K),
        "BOIL": lambda model, lr: mk.BOIL(model, loss, inner=SGD(lr), steps=K),
        "FOMAML": lambda model, lr: mk.FOMAML(model, loss, inner=SGD(lr), steps=K),
        "Reptile": lambda model, lr: mk.Reptile(model, loss, inner=SGD(lr), steps=K),
    }


def waves(tasks: int, generator: torch.Generator, points: int = 10) -> tuple[Batch, Batch]:
    """Return support and query of sine waves of random amplitude and phase, `[tasks, points, 1]`."""
    amplitude, phase = (torch.rand(tasks, 1, 1, generator=generator) for _ in range(2))
    x = 10 * torch.rand(tasks, 2 * points, 1, generator=generator) - 5
    y = (0.1 + 4.9 * amplitude) * (x + torch.pi * phase).sin()
    return (x[:, :points], y[:, :points]), (x[:, points:], y[:, points:])


def sines() -> Workload:
    def draw(part: Part, tasks: int, seed: int) -> Iterator[Episode]:
        generator = torch.Generator().manual_seed(seed + 10_000 * PARTS.index(part))
        while True:
            yield waves(tasks, generator)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def hypernetwork(K: int, model: nn.Module, lr: float) -> Any:
        net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64))
        encoder = mk.nn.SetEncoder(lambda batch: net(torch.cat(batch, -1)), modules=[net])
        return mk.HyperNetwork(model, loss, encoder, size=64, inner=SGD(lr), steps=K)

    K = 5
    return Workload(
        about="Sine waves (Finn et al. 2017, section 5.1) by a perceptron 1-40-40-1: mean squared errors.",
        draw=draw,
        model=lambda: nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)),
        algorithms={
            **common(loss, K),
            "Meta-LSTM": lambda model, lr: mk.MetaLSTM(model, loss, lr=lr, hidden=8, steps=K),
            "CAVIA": lambda model, lr: mk.CAVIA(_contextual(model), loss, inner=SGD(lr), steps=K),
            "hypernetwork": partial(hypernetwork, 0),
            "hypernetwork, then MAML": partial(hypernetwork, K),
            "plain training": lambda model, lr: mk.MAML(model, loss, SGD(lr), 0),
        },
        rateless=(),
        rates=(0.003, 0.01, 0.03, 0.1),
        steps=300,
        tasks=25,
        inner_steps=K,
        outer_lr=2e-3,
        test_tasks=200,
    )


def _contextual(model: Any) -> nn.Module:
    """Return the model with five context parameters after its first layer."""
    first, *others = model.children()
    return nn.Sequential(mk.nn.Contextual(first, size=5, features=first.out_features), *others)


class BagOfWords(nn.Module):
    """Embeds texts, given as numbers of words `[B, L]` with 0 for padding, by the mean of their words: `[B, D]`."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(BUCKETS + 1, 32), nn.Linear(32, out_features)
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        kept = (x > 0).unsqueeze(-1)
        return self.out((self.words(x) * kept).sum(-2) / kept.sum(-2).clamp(min=1))


def utterances(file: str | None) -> dict[str, list[str]]:
    """Return the utterances of each intent, of the file or made of verbs and things."""
    if file:
        pairs = ((f"{d.task_id}/{d.turns[1].text}", d.turns[0].text) for d in read(file, "intents"))
        return {name: [text for _, text in group] for name, group in groupby(sorted(pairs), key=lambda pair: pair[0])}
    made = {}
    for verb, thing in product(VERBS, THINGS):
        texts = (t.format(v, w) for t in TEMPLATES for v in verb.split() for w in thing.split())
        made[f"{verb}/{thing}"] = list(texts)
    return made


def intents(file: str | None = None) -> Workload:
    encoded = {
        name: [[1 + crc32(word.encode()) % BUCKETS for word in words(text)][:LONGEST] for text in texts]
        for name, texts in utterances(file).items()
        if len(texts) >= SHOTS + QUERIES
    }
    names = sorted(encoded)
    Random("intents").shuffle(names)
    cuts = [part * len(names) // 5 for part in (0, 3, 4, 5)]
    parts = {part: names[start:end] for part, (start, end) in zip(PARTS, pairwise(cuts), strict=True)}

    def draw(part: Part, tasks: int, seed: int) -> Iterator[Episode]:
        rng, known = Random(f"intents/{part}/{seed}"), parts[part]
        while True:
            drawn = [[rng.sample(encoded[n], SHOTS + QUERIES) for n in rng.sample(known, WAYS)] for _ in range(tasks)]
            yield tuple(  # type: ignore[misc]
                (
                    torch.tensor(
                        [
                            [text + [0] * (LONGEST - len(text)) for texts in task for text in texts[role]]
                            for task in drawn
                        ]
                    ),
                    torch.arange(WAYS).repeat_interleave(size).expand(tasks, -1),
                )
                for role, size in ((slice(SHOTS), SHOTS), (slice(SHOTS, None), QUERIES))
            )

    def hypernetwork(model: Any, lr: float) -> Any:
        labels, body = nn.Embedding(WAYS, 64), nn.Sequential(BagOfWords(64), nn.Tanh())
        encoder = mk.nn.SetEncoder(lambda batch: body(batch[0]) * labels(batch[1]), modules=[body, labels])
        return mk.HyperNetwork(model, loss, encoder, size=64, inner=SGD(lr), steps=0, adapt=["2"])

    K, loss = 5, mk.losses.classification
    source = f"read from {Path(file).name}" if file else "made of verbs and things"
    return Workload(
        about=f"Intents from two utterances each, five in a task, {source}, by the mean of {BUCKETS} hashed words'"
        f" embeddings: cross-entropies, {math.log(WAYS):.3f} by chance.",
        draw=draw,
        model=lambda: nn.Sequential(BagOfWords(64), nn.Tanh(), nn.Linear(64, WAYS)),
        algorithms={
            **common(loss, K),
            "CAVIA": lambda model, lr: mk.CAVIA(_contextual(model), loss, inner=SGD(lr), steps=K),
            "prototypical network": lambda model, lr: mk.ProtoNet(model[:2]),  # type: ignore[index]
            "prototypical network, cosine": lambda model, lr: mk.ProtoNet(model[:2], "cosine"),  # type: ignore[index]
            "ProtoMAML": lambda model, lr: mk.ProtoMAML(model, loss, inner=SGD(lr), steps=K),
            "hypernetwork": hypernetwork,
            "plain training": lambda model, lr: mk.MAML(model, loss, SGD(lr), 0),
        },
        rateless=("prototypical network", "prototypical network, cosine"),
        rates=(0.3, 1.0, 3.0),
        steps=100,
        tasks=8,
        inner_steps=K,
        outer_lr=3e-3,
        test_tasks=100,
    )


def service() -> Workload:
    def tasks(kind: str, group: list[Bot]) -> Iterator[TaskData]:
        for bot in group:
            talks = []
            for number, turns in enumerate(dialogues(bot)):
                said = ((("user", "bot")[i % 2], text) for i, text in enumerate(turns))
                talks.append(dialogue(f"{kind}/{bot.name}", str(number), said, {"bot": "bot"}))
            yield TaskData(f"{kind}/{bot.name}", tuple(talks))

    made = ((kind, list(group)) for kind, group in groupby(bots(), key=lambda bot: bot.kind))
    parts = {part: [task for kind, group in islice(made, KINDS[part]) for task in tasks(kind, group)] for part in PARTS}
    tokenizer = Tokenizer.train([talk for task in parts["train"] for talk in task.dialogues], VOCABULARY)

    def draw(part: Part, tasks: int, seed: int) -> Iterator[Episode]:
        sizes: dict[str, Any] = {"support_size": 4, "query_size": 4, "max_length": MAX_LENGTH}
        episodes = Episodes(parts[part], tokenizer, seed=seed, **sizes)
        return (episodes.sample(step, tasks) for step in count())

    K, loss = 3, mk.losses.causal_lm
    return Workload(
        about="Replies of service bots of other kinds of business, by a GRU with 64 hidden units: cross-entropies of a"
        " token.",
        draw=draw,
        model=lambda: build_model("gru", tokenizer.vocab_size, embedding=32, hidden=64),
        algorithms={
            **common(loss, K),
            "hypernetwork": lambda model, lr: TextHyperNetwork(model, loss, 32, 32, inner=SGD(lr), steps=0),
            "prompt tuning": lambda model, lr: PromptTuning(model, loss, inner=SGD(lr), steps=K),
            "support as context": lambda model, lr: InContext(model, loss),
            "plain training": lambda model, lr: FineTune(model, loss, inner=SGD(lr), steps=K),
        },
        rateless=("support as context",),
        rates=(0.1, 0.3, 1.0),
        steps=60,
        tasks=4,
        inner_steps=K,
        outer_lr=5e-3,
        test_tasks=24,
    )


WORKLOADS: dict[str, Callable[..., Workload]] = {"sines": sines, "intents": intents, "dialogue": service}
