"""learn2learn's modules for Lightning: a task is a batch, and its loss that of the queries after adaptation.

A batch (data, labels) has the examples of a class one after the other, `shots` to adapt to and then `queries`.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import torch
from torch import Tensor, nn

from metakern.compat.learn2learn._lightning import pl
from metakern.compat.learn2learn.algorithms.maml import MAML
from metakern.compat.learn2learn.nn import PrototypicalClassifier
from metakern.compat.learn2learn.utils import accuracy

Episode = tuple[Tensor, Tensor, Tensor, Tensor]


class LightningEpisodicModule(pl.LightningModule):
    """Training, validation and test steps on tasks; a subclass says in `meta_learn` what a task's loss is.

    train_ways, train_shots, train_queries, test_ways, test_shots, test_queries: the sizes of tasks. lr: of Adam,
    times `scheduler_decay` every `scheduler_step` epochs. Raises TypeError for settings that it doesn't know.
    """

    train_shots = 1
    train_queries = 1
    train_ways = 5
    test_shots = 1
    test_queries = 1
    test_ways = 5
    lr = 0.001
    scheduler_step = 20
    scheduler_decay = 1.0
    _settings: tuple[str, ...] = (
        "train_ways",
        "train_shots",
        "train_queries",
        "test_ways",
        "test_shots",
        "test_queries",
        "lr",
        "scheduler_step",
        "scheduler_decay",
    )

    def _set(self, loss: Any, settings: dict[str, Any]) -> None:
        """Takes what a subclass was given, and keeps it with checkpoints."""
        who = type(self).__name__
        if settings.pop("data_parallel", False):
            raise ValueError(f"{who}: data_parallel must be False: Lightning's strategy='ddp' takes several devices")
        if unknown := sorted(set(settings) - set(self._settings)):
            raise TypeError(f"{who}: settings must be among {', '.join(self._settings)}, got {', '.join(unknown)}")
        for name, value in settings.items():
            setattr(self, name, value)
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.save_hyperparameters({name: getattr(self, name) for name in self._settings})

    @classmethod
    def add_model_specific_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """A parser that has an option for each setting too."""
        parser = ArgumentParser(parents=[parent_parser], conflict_handler="resolve")
        for name in cls._settings:
            default = getattr(cls, name)
            parser.add_argument(f"--{name}", type=type(default), default=default)
        return parser

    def meta_learn(self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int) -> tuple[Tensor, Tensor]:
        """A task's loss and accuracy on its queries."""
        raise NotImplementedError

    def _step(self, kind: str, batch: Any, batch_idx: int, *sizes: int) -> Tensor:
        loss, right = self.meta_learn(batch, batch_idx, *sizes)
        for name, value in (("loss", loss), ("accuracy", right)):
            self.log(
                f"{kind}_{name}",
                value.item(),
                on_step=False,
                on_epoch=True,
                prog_bar=name == "accuracy",
                batch_size=1,
            )
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("train", batch, batch_idx, self.train_ways, self.train_shots, self.train_queries)

    def validation_step(self, batch: Any, batch_idx: int) -> float:
        return self._step("valid", batch, batch_idx, self.test_ways, self.test_shots, self.test_queries).item()

    def test_step(self, batch: Any, batch_idx: int) -> float:
        return self._step("test", batch, batch_idx, self.test_ways, self.test_shots, self.test_queries).item()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, self.scheduler_step, self.scheduler_decay)
        return [optimizer], [scheduler]


def _parts(data: Tensor, labels: Tensor, ways: int, shots: int, queries: int) -> Episode:
    """Support and query: inputs and labels of each."""
    if len(data) != ways * (shots + queries):
        raise ValueError(
            f"meta_learn: data must hold {ways} ways of {shots} shots and {queries} queries, "
            f"{ways * (shots + queries)} examples, got {len(data)}"
        )
    support = (torch.arange(len(data), device=data.device) % (shots + queries)) < shots
    return data[support], labels[support], data[~support], labels[~support]


class LightningMAML(LightningEpisodicModule):
    """MAML of a classifier: `adaptation_steps` of rate `adaptation_lr` within a task; other settings are the base's.

    >>> import torch
    >>> from metakern.compat.learn2learn.algorithms import LightningMAML
    >>> maml = LightningMAML(torch.nn.Linear(4, 5), adaptation_lr=0.5, train_shots=2)
    >>> batch = torch.randn(15, 4), torch.arange(5).repeat_interleave(3)
    >>> loss, accuracy = maml.meta_learn(batch, 0, ways=5, shots=2, queries=1)
    >>> loss.backward()
    """

    adaptation_steps = 1
    adaptation_lr = 0.1
    _settings = (*LightningEpisodicModule._settings, "adaptation_lr", "adaptation_steps")

    def __init__(self, model: nn.Module, loss: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self._set(loss, kwargs)
        self.model = MAML(model, lr=self.adaptation_lr)

    @torch.enable_grad()
    def meta_learn(self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int) -> tuple[Tensor, Tensor]:
        support, labels, query, targets = _parts(batch[0], batch[1], ways, shots, queries)
        learner = self.model.clone()
        learner.train()
        for _ in range(self.adaptation_steps):
            learner.adapt(self.loss(learner(support), labels))
        predictions = learner(query)
        return self.loss(predictions, targets), accuracy(predictions, targets)


class LightningANIL(LightningEpisodicModule):
    """As LightningMAML, and only the classifier adapts, on features that all tasks share."""

    adaptation_steps = 1
    adaptation_lr = 0.1
    _settings = LightningMAML._settings

    def __init__(self, features: nn.Module, classifier: nn.Module, loss: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self._set(loss, kwargs)
        if self.train_ways != self.test_ways:
            raise ValueError(
                f"LightningANIL: test_ways must be train_ways, {self.train_ways}, as the classifier is one, "
                f"got {self.test_ways}"
            )
        self.features, self.classifier = features, MAML(classifier, lr=self.adaptation_lr)

    @torch.enable_grad()
    def meta_learn(self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int) -> tuple[Tensor, Tensor]:
        data, labels = batch
        self.features.train()
        learner = self.classifier.clone()
        learner.train()
        support, labels, query, targets = _parts(self.features(data), labels, ways, shots, queries)
        for _ in range(self.adaptation_steps):
            learner.adapt(self.loss(learner(support), labels))
        predictions = learner(query)
        return self.loss(predictions, targets), accuracy(predictions, targets)


class LightningPrototypicalNetworks(LightningEpisodicModule):
    """Prototypical networks: features, and the nearest prototype by `distance_metric`, "euclidean" or "cosine"."""

    distance_metric = "euclidean"
    _settings = (*LightningEpisodicModule._settings, "distance_metric")

    def __init__(self, features: nn.Module, loss: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self._set(loss, kwargs)
        self.features, self.classifier = features, PrototypicalClassifier(distance=self.distance_metric)

    def meta_learn(self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int) -> tuple[Tensor, Tensor]:
        data, labels = (part.squeeze(0) for part in batch)
        order = torch.argsort(labels, stable=True)
        self.features.train()
        support, labels, query, targets = _parts(self.features(data[order]), labels[order], ways, shots, queries)
        self.classifier.fit_(support, labels)
        logits = self.classifier(query)
        return self.loss(logits, targets), accuracy(logits, targets)


def __getattr__(name: str) -> None:
    if name == "LightningMetaOptNet":
        raise ImportError(
            "metakern.compat.learn2learn: LightningMetaOptNet is left out, as it needs a solver of quadratic programs: "
            "take it from learn2learn with qpth"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
