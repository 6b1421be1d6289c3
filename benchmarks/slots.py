"""Fit the weights of `metakern.dialogue.manager.slots` on services of SGD, and find slots in services of other domains.

    python -m benchmarks.slots --data DIR [--seed 0]

An episode has the user's turns of some conversations of a service as support, and those of others as query. A quarter
of the domains is for the test. Weights and threshold maximize the likelihood of the right slot, or none, of each span
of the queries; the threshold is then lowered to where the F1 on the training services is highest. A slot is found if
its name and its value are right. `known values` finds the taught values wherever they stand, and nothing else.

Results go to benchmarks/results/slots.json. The weights are copied from there into the module by hand.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.options import Parser
from metakern.dialogue.manager import slots
from metakern.dialogue.manager.slots import FEATURES, SlotFinder, alike, spans_of
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.words import words

SUPPORTS = (4, 8, 16)  # conversations
QUERIES = 12
NEGATIVES = 0.3  # the share of spans without a slot that are fitted
TEST = 0.25  # the share of the domains
OFFSETS = (0.0, -0.25, -0.5, -0.75, -1.0, -1.5)
Services = dict[str, list[Dialogue]]
Found = dict[str, str]


def episode(name: str, dialogues: Sequence[Dialogue], size: int, seed: str) -> tuple[list[Turn], list[Turn]]:
    """Return the user's turns of `size` conversations, and of `QUERIES` others."""
    drawn = random.Random(f"{seed}/{name}/{size}").sample(list(dialogues), len(dialogues))
    support, query = (
        [turn for dialogue in part for turn in dialogue.turns if turn.speaker == "user"]
        for part in (drawn[:size], drawn[size : size + QUERIES])
    )
    return support, query


def examples(services: Services, seed: str) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield spans of queries: how alike each taught value is, `[N, F]`, the slots `[N]`, and the right slot (0: none).

    The slots of a service are numbered from 1.
    """
    draw = random.Random(seed)
    for name, dialogues in services.items():
        for size in SUPPORTS[:2]:
            support, query = episode(name, dialogues, size, seed)
            taught = SlotFinder(support).taught
            numbers = {slot: i for i, slot in enumerate(sorted({slot for slot, _, _ in taught}), 1)}
            if not taught:
                continue
            of = torch.tensor([numbers[slot] for slot, _, _ in taught])
            for turn in query:
                right = {(s.begin, s.end): numbers.get(slot, 0) for slot, s, _ in SlotFinder([turn]).taught}
                for span in spans_of(turn.text, slots.LONGEST):
                    label = right.get((span.begin, span.end), 0)
                    if label or draw.random() < NEGATIVES:
                        yield torch.tensor([alike(span, other) for _, other, _ in taught]), of, label


def fitted(services: Services, seed: str) -> tuple[list[float], float]:
    """Return the weights and the threshold with the highest likelihood."""
    rows = list(examples(services, seed))
    most, slots_most = max(len(x) for x, _, _ in rows), 1 + max(int(of.max()) for _, of, _ in rows)
    x = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, most - len(x))) for x, _, _ in rows])
    of = torch.stack([torch.nn.functional.pad(of, (0, most - len(of))) for _, of, _ in rows])
    label = torch.tensor([label for _, _, label in rows])
    weights = torch.ones(len(FEATURES), requires_grad=True)
    threshold = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.Adam([weights, threshold], lr=0.05)
    draw = torch.Generator().manual_seed(0)
    for _ in range(600):
        batch = torch.randint(len(rows), (512,), generator=draw)
        scores = torch.where(of[batch] > 0, x[batch] @ weights, -torch.inf)
        best = torch.full((len(batch), slots_most), -1e9).scatter_reduce(1, of[batch], scores, "amax")
        best = torch.cat([threshold.expand(len(batch), 1), best[:, 1:]], 1)
        loss = torch.nn.functional.cross_entropy(best, label[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights.tolist(), threshold.item()


def known_values(support: Sequence[Turn]) -> Callable[[str], Found]:
    """Return a function that finds the taught values in a text, the longest first."""
    values = {words(value): (slot, value) for turn in support for slot, value in turn.slots if words(value)}

    def find(text: str) -> Found:
        said, found = words(text), Found()
        taken = [False] * len(said)
        for value in sorted(values, key=len, reverse=True):
            for i in range(len(said) - len(value) + 1):
                if said[i : i + len(value)] == value and not any(taken[i : i + len(value)]):
                    taken[i : i + len(value)] = [True] * len(value)
                    found.setdefault(*values[value])
        return found

    return find


def scores(make: Callable[[Sequence[Turn]], Callable[[str], Found]], services: Services, size: int, seed: str) -> dict:
    """Return precision, recall and F1 over all queries."""
    right = found = wanted = 0
    for name, dialogues in services.items():
        support, query = episode(name, dialogues, size, seed)
        find = make(support)
        for turn in query:
            truth = {(slot, words(value)) for slot, value in turn.slots if words(value)}
            said = {(slot, words(value)) for slot, value in find(turn.text).items()}
            right, found, wanted = right + len(truth & said), found + len(said), wanted + len(truth)
    return {"precision": right / max(found, 1), "recall": right / wanted, "f1": 2 * right / (found + wanted)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.slots", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", metavar="DIR", required=True, help="dialogues in the format of SGD")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the domains and episodes")
    options = parser.parse_args(arguments)
    services: Services = defaultdict(list)
    for dialogue in read(options.data, "sgd"):
        services[dialogue.task_id].append(dialogue)
    services = {name: found for name, found in services.items() if len(found) >= SUPPORTS[-1] + QUERIES}
    domains = sorted({str(found[0].meta["group"]) for found in services.values()})
    unseen = random.Random(options.seed).sample(domains, round(TEST * len(domains)))
    test = {name: found for name, found in services.items() if found[0].meta["group"] in unseen}
    train = {name: found for name, found in services.items() if name not in test}
    weights, threshold = fitted(train, f"fit/{options.seed}")
    slots.WEIGHTS = tuple(round(w, 2) for w in weights)  # type: ignore[assignment]

    def tuned(offset: float) -> float:
        slots.THRESHOLD = round(threshold + offset, 2)
        return scores(SlotFinder, train, SUPPORTS[1], f"tune/{options.seed}")["f1"]

    slots.THRESHOLD = round(threshold + max(OFFSETS, key=tuned), 2)
    entry = {
        "machine": results.machine(),
        "weights": dict(zip(FEATURES, slots.WEIGHTS, strict=True)),
        "threshold": slots.THRESHOLD,
        "train": sorted(train),
        "test": sorted(test),
        "scores": {
            name: {size: scores(make, test, size, f"test/{options.seed}") for size in SUPPORTS}
            for name, make in (("nearest contexts", SlotFinder), ("known values", known_values))
        },
    }
    for name, found in entry["scores"].items():
        print(name, {size: {key: round(x, 3) for key, x in of.items()} for size, of in found.items()})
    print(entry["weights"], entry["threshold"])
    results.keep(results.FOLDER / "slots.json", str(options.seed), entry)


if __name__ == "__main__":
    main()
