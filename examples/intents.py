"""Few-shot intent classification: five new intents from two utterances each, by prototypical networks.

python examples/intents.py
"""

import random
from itertools import product

import torch

import metakern as mk
from metakern.dialogue.models import build_model

VERBS = ("book reserve", "cancel drop", "move postpone", "check show", "pay settle", "share send", "rate review")
THINGS = ("flight plane", "hotel room", "table dinner", "taxi ride", "ticket seat", "parcel package", "course class")
TEMPLATES = ("please {} the {}", "can you {} my {} today", "i want to {} a {}", "{} {} now", "help me {} this {}")
WORDS = sorted({word for part in (*VERBS, *THINGS, *TEMPLATES) for word in part.split()} - {"{}"})
Batch = dict[str, torch.Tensor]


def utterance(intent: tuple[str, str]) -> list[int]:
    """Return the tokens of a random utterance with this intent: a verb and a thing, each in one of two words."""
    text = random.choice(TEMPLATES).format(*(random.choice(words.split()) for words in intent))
    return [WORDS.index(word) + 1 for word in text.split()]


def tasks(number: int, intents: list[tuple[str, str]], ways: int = 5, shots: int = 2) -> list[Batch]:
    """Return support and query of tasks of `ways` random intents, each with `shots` utterances of every intent."""
    drawn = (intent for _ in range(number) for intent in random.sample(intents, ways) for _ in range(2 * shots))
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(utterance(intent)) for intent in drawn], batch_first=True)
    labels = torch.arange(ways).repeat_interleave(shots).expand(number, -1)
    halves = tokens.view(number, ways, 2, shots, -1).unbind(2)
    return [
        {"input_ids": x, "attention_mask": (x > 0).long(), "labels": labels} for x in (h.flatten(1, 2) for h in halves)
    ]


def accuracy(protonet: mk.ProtoNet, support: Batch, query: Batch) -> float:
    """Return the share of queries whose class is found."""
    return (protonet.log_probabilities(support, query).argmax(-1) == query["labels"]).double().mean().item()


def main(steps: int = 150) -> tuple[float, float]:
    """Return the accuracy on intents that were not trained on, before and after training."""
    random.seed(0), torch.manual_seed(0)
    intents = random.sample(list(product(VERBS, THINGS)), len(VERBS) * len(THINGS))
    protonet = mk.ProtoNet(mk.nn.TextEncoder(build_model("gru", len(WORDS) + 1, embedding=32, hidden=64)))
    optimizer = torch.optim.AdamW(protonet.parameters(), lr=5e-3)
    support, query = tasks(50, intents[30:])
    before = accuracy(protonet, support, query)
    for _ in range(steps):
        optimizer.zero_grad()
        protonet(*tasks(16, intents[:30])).backward()
        optimizer.step()
    return before, accuracy(protonet, support, query)


if __name__ == "__main__":
    before, after = main()
    print(f"accuracy on new intents: {before:.3f} -> {after:.3f}")
