"""Parsers: the intent of a message among those taught, its slots, and "none of these".

    NearestParser     confidence = cosine of TF-IDF vectors with the nearest taught text, times the share of the
                      message's words that any taught text holds; nothing is trained
    FewShotParser     confidence = cosine of the embedding with the nearest prototype (protonet, finetune), or the
                      probability of the adapted classifier (protomaml)

A message whose confidence is below a threshold has none of the taught intents. `best_threshold` chooses it on
validation tasks, between what is accepted and what is refused:

    threshold = argmax_t  ½ P(right and confidence >= t | in scope) + ½ P(confidence < t | out of scope)

The slots of a message are those that `metakern.dialogue.manager.slots` finds.

Larson et al. 2019, "An evaluation dataset for intent classification and out-of-scope prediction", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metakern.dialogue.baselines import Retrieval
from metakern.dialogue.manager import Neighbor, Parse, exchanges_of
from metakern.dialogue.manager.slots import SlotFinder
from metakern.dialogue.manager.utterances import Episode, Utterances, encoded
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import load_adapted, on_device_of
from metakern.dialogue.words import words
from metakern.errors import UserError
from metakern.meta.parameters import twin

__all__ = ["FewShotParser", "NearestParser", "best_threshold", "calibrate", "chosen_threshold", "judged"]

NEIGHBORS = 3  # that a parse names
EPISODES = 60  # that choose a threshold
SHOTS = (1, 5)  # for which a run has a threshold
AS_TAUGHT = 0.9  # the TF-IDF cosine from which a message counts as one that was taught
Judged = tuple[Tensor, Tensor, Tensor]  # confidences and whether right, of the queries; confidences of strangers


class NearestParser:
    """The label of the nearest taught text, by the words that the texts share, as the module says.

    Args:
        threshold: The smallest confidence of a message that has an intent. By default only messages of almost the same
            words have one.

    >>> from metakern.dialogue.readers import Turn
    >>> parser = NearestParser()
    >>> parser.learn([Dialogue("shop", "1", (Turn("user", "What do you sell?"), Turn("bot", "Pianos.")))])
    >>> parser("what do you SELL").intent, parser("Where are you?").intent
    ('Pianos.', None)
    """

    def __init__(self, threshold: float = AS_TAUGHT) -> None:
        self.threshold = threshold
        self.labels: list[str] = []
        self._known = _Known([])

    def learn(self, dialogues: Sequence[Dialogue]) -> None:
        """Replace all that was learned by the exchanges of `dialogues`."""
        self._known = _Known(dialogues)
        self.labels = self._known.labels

    def scores(self, texts: Sequence[str]) -> Tensor:
        """Return the confidence that each text has each label, `[len(texts), len(labels)]`."""
        return self._known.scores(texts)

    def __call__(self, text: str) -> Parse:
        """Return the parse of a text."""
        return self._known.parse(text, self.scores([text])[0], self.threshold)


class FewShotParser:
    """The parser of a run that `metakern train --part parser` made; it learns its labels from a few texts of each.

    Args:
        run: A run or its folder; it is not changed.
        threshold: The smallest confidence of a message that has an intent; None takes the one that the run calibrated
            on its validation tasks.

    Raises:
        UserError: If the run is not one of a parser.
    """

    def __init__(self, run: Run | str | Path, threshold: float | None = None) -> None:
        self.run = run if isinstance(run, Run) else Run.open(run)
        if self.run.config.part != "parser":
            raise UserError(
                f"{self.run.path}: must be the run of a parser, got one of a {self.run.config.part}: metakern train"
                " --part parser makes one"
            )
        self.run.algorithm.eval()
        self._given = threshold
        self.threshold = self._threshold(1)
        self.labels: list[str] = []
        self._known = _Known([])
        self._prototypes = torch.empty(0, 0)
        self._classifier: Any = None

    @torch.no_grad()
    def learn(self, dialogues: Sequence[Dialogue]) -> None:
        """Replace all that was learned by the exchanges of `dialogues`.

        Raises:
            UserError: If the run is one of protomaml, and there are more labels than it has ways.
        """
        self._known = _Known(dialogues)
        self.labels = self._known.labels
        texts = [(text, self.labels.index(label)) for text, label in self._known.examples]
        if not texts:
            return
        self.threshold = self._threshold(len(texts) / len(self.labels))
        support = self._encoded(texts)
        x = self._embedded(support)
        member = torch.nn.functional.one_hot(support["labels"][0], len(self.labels)).to(x.dtype)
        self._prototypes = torch.nn.functional.normalize(member.T @ x, dim=-1)
        self._classifier = None
        if self.run.config.algorithm == "protomaml" and len(self.labels) > 1:
            if len(self.labels) > self.run.config.ways:
                raise UserError(
                    f"parser: labels must be at most {self.run.config.ways}, as the run of protomaml has so many ways,"
                    f" got {len(self.labels)}: train one of protonet, or with more --ways"
                )
            self._classifier = twin(self.run.model)
            load_adapted(self._classifier, self.run.algorithm.adapt(support, steps=self.run.config.most_inner_steps))
            self._classifier.eval()

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> Tensor:
        """Return the confidence that each text has each label, `[len(texts), len(labels)]`."""
        if not texts or not self.labels:
            return torch.zeros(len(texts), len(self.labels))
        batch = self._encoded([(text, 0) for text in texts])
        if self._classifier is not None:
            logits = self._classifier(batch["input_ids"][0], batch["attention_mask"][0])
            return logits.softmax(-1)[:, : len(self.labels)].cpu()
        return (self._embedded(batch) @ self._prototypes.T).cpu()

    def __call__(self, text: str) -> Parse:
        """Return the parse of a text."""
        return self._known.parse(text, self.scores([text])[0], self.threshold)

    def _encoded(self, texts: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        return on_device_of(self.run.model, encoded([texts], self.run.tokenizer, self.run.config.max_length))

    def _embedded(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the embeddings `[N, D]` of a batch of one task, of norm 1."""
        model: Any = getattr(self.run.model, "encoder", self.run.model)
        return torch.nn.functional.normalize(model(batch["input_ids"][0], batch["attention_mask"][0]), dim=-1)

    def _threshold(self, shots: float) -> float:
        """Return the threshold for about this many texts of each label."""
        if self._given is not None:
            return self._given
        known = {float(k): t for k, t in self.run.state.get("thresholds", {}).items()}
        return known[min(known, key=lambda k: abs(k - shots))] if known else 0.0


class _Known:
    """The taught texts with their labels, the values of their slots, and their TF-IDF vectors."""

    def __init__(self, dialogues: Sequence[Dialogue]) -> None:
        pairs = [pair for dialogue in dialogues for pair in exchanges_of(dialogue)]
        latest = {words(said.text) or said.text: (said.text, reply.text) for said, reply in pairs}
        self.examples = list(latest.values())
        self.labels = list(dict.fromkeys(label for _, label in self.examples))
        self.slots = SlotFinder(said for said, _ in pairs)
        self.nearest = Retrieval(*zip(*self.examples, strict=True)) if self.examples else None

    def scores(self, texts: Sequence[str]) -> Tensor:
        """Return the similarity of each text to the nearest text of each label, `[len(texts), len(labels)]`."""
        found = torch.zeros(len(texts), len(self.labels))
        for i, text in enumerate(texts):
            for (_, label), similarity in zip(self.examples, self.similarities(text), strict=True):
                k = self.labels.index(label)
                found[i, k] = max(found[i, k].item(), similarity)
        return found

    def similarities(self, text: str) -> list[float]:
        """Return the similarity of a text to each known text, in [0, 1]."""
        said = words(text)
        if not self.nearest or not said:
            return [0.0] * len(self.examples)
        share = sum(word in self.nearest.weights for word in said) / len(said)
        return [min(share * cosine, 1.0) for cosine in self.nearest.cosines(text)]

    def parse(self, text: str, scores: Tensor, threshold: float) -> Parse:
        """Return the parse of a text, given the confidence of each label, `[len(labels)]`."""
        slots = self.slots(text)
        if not self.examples or not words(text):
            return Parse(None, 0.0, threshold, slots)
        confidence, best = scores.max(0)
        similar = self.similarities(text)
        nearest = sorted(range(len(similar)), key=lambda i: -similar[i])[:NEIGHBORS]
        neighbors = tuple(Neighbor(*self.examples[i], similar[i]) for i in nearest if similar[i] > 0)
        intent = self.labels[int(best)] if confidence.item() >= threshold else None
        return Parse(intent, confidence.item(), threshold, slots, neighbors)


def best_threshold(confidence: Tensor, right: Tensor, strangers: Tensor) -> float:
    """Return the threshold that keeps most right answers and refuses most strangers; the module has the formula.

    Args:
        confidence: Those of texts in scope, `[N]`.
        right: Whether the likeliest label of each is its own, bool `[N]`.
        strangers: The confidences of texts out of scope, `[M]`; if there are none, all texts are accepted.

    >>> right = torch.tensor([True, True, False])
    >>> round(best_threshold(torch.tensor([0.9, 0.8, 0.2]), right, torch.tensor([0.3, 0.5])), 3)
    0.65
    """
    if not strangers.numel():
        return float(confidence.min())
    every = torch.cat([confidence, strangers]).double().unique()
    between = torch.cat([every[:1], (every[1:] + every[:-1]) / 2, every[-1:] + 1e-6])
    kept = (confidence.double()[right].unsqueeze(1) >= between).double().sum(0) / len(confidence)
    refused = (strangers.double().unsqueeze(1) < between).double().mean(0)
    return float(between[(kept + refused).argmax()])


def calibrate(run: Run, validation: Utterances) -> dict[str, float]:
    """Return the threshold of a parser for each number of shots in `SHOTS`, chosen on episodes of validation intents.

    Args:
        run: The run of a parser.
        validation: The source of the episodes.
    """
    parser = FewShotParser(run, threshold=0.0)
    return {str(shots): chosen_threshold(parser, validation, shots) for shots in SHOTS}


def chosen_threshold(parser: FewShotParser | NearestParser, validation: Utterances, shots: int) -> float:
    """Return the threshold that is best on episodes of validation intents with this number of shots."""
    episodes = validation.fixed(EPISODES, shots, validation.queries)
    return best_threshold(*map(torch.cat, zip(*(judged(parser, e) for e in episodes), strict=True)))


def judged(parser: FewShotParser | NearestParser, episode: Episode) -> Judged:
    """Return what a parser, taught the support of an episode, makes of its queries and of its strangers."""
    said = [(Turn("user", text), Turn("bot", episode.intents[k])) for text, k in episode.support]
    parser.learn([Dialogue("", str(i), pair, {"bot": "bot"}) for i, pair in enumerate(said)])
    confidence, found = parser.scores([text for text, _ in episode.query]).max(1)
    labels = [parser.labels[i] for i in found.tolist()]
    right = [label == episode.intents[k] for label, (_, k) in zip(labels, episode.query, strict=True)]
    strangers = parser.scores([text for text, _ in episode.strangers])
    return confidence, torch.tensor(right), strangers.amax(1)
