"""learn2learn's modules for Lightning: a batch is one task, and its loss is the query loss after adaptation.

A batch is (data, labels), [N, ...] and [N] with N = ways (shots + queries). The examples of a class follow one another:
first its `shots` examples of the support set, then its `queries` examples of the query set.
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
    """Base of the Lightning modules: training, validation and test steps on tasks, and Adam as the outer optimizer.

    A subclass defines `meta_learn`, the loss of a task. Its constructor takes these settings as keywords:

    - train_ways, train_shots, train_queries: classes of a training task, and support and query examples of each class.
    - test_ways, test_shots, test_queries: the same of validation and test tasks.
    - lr: Adam's learning rate, multiplied by `scheduler_decay` every `scheduler_step` epochs.

    The constructor raises TypeError for an unknown setting and ValueError for `data_parallel=True`.
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
        """Sets the loss and the settings that a subclass was given, and saves the settings with checkpoints."""
        who = type(self).__name__
        if settings.pop("data_parallel", False):
            raise ValueError(
                f"{who}: data_parallel must be False, got True: pass strategy='ddp' to Lightning's Trainer instead"
            )
        if unknown := sorted(set(settings) - set(self._settings)):
            raise TypeError(f"{who}: settings must be among {', '.join(self._settings)}, got {', '.join(unknown)}")
        for name, value in settings.items():
            setattr(self, name, value)
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.save_hyperparameters({name: getattr(self, name) for name in self._settings})

    @classmethod
    def add_model_specific_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """Returns a parser with the options of `parent_parser` and an option for each setting of this class."""
        parser = ArgumentParser(parents=[parent_parser], conflict_handler="resolve")
        for name in cls._settings:
            default = getattr(cls, name)
            parser.add_argument(f"--{name}", type=type(default), default=default)
        return parser

    def meta_learn(self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int) -> tuple[Tensor, Tensor]:
        """Returns the loss and the accuracy on a task's query examples, two scalars.

        Args:
            batch: (data, labels), [N, ...] and [N] with N = ways (shots + queries), ordered by class.
            batch_idx: The index of the batch in its epoch.
            ways: The number of classes.
            shots: The number of support examples of each class.
            queries: The number of query examples of each class.

        Raises:
            ValueError: If the batch has another number of examples.
        """
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
    """Splits a task: returns support inputs and labels, query inputs and labels."""
    if len(data) != ways * (shots + queries):
        raise ValueError(
            f"meta_learn: data must hold {ways * (shots + queries)} examples, {ways} ways of {shots} shots and "
            f"{queries} queries, got {len(data)}"
        )
    support = (torch.arange(len(data), device=data.device) % (shots + queries)) < shots
    return data[support], labels[support], data[~support], labels[~support]


class LightningMAML(LightningEpisodicModule):
    """MAML of a classifier, for Lightning.

    Args:
        model: The classifier, any module that returns logits, [B, ways].
        loss: `loss(logits, labels)`, a scalar; by default `nn.CrossEntropyLoss()`.
        **kwargs: `adaptation_steps`, the number of inner steps (1), `adaptation_lr`, the inner learning rate (0.1), and
            the settings of `LightningEpisodicModule`.

    Raises:
        TypeError: For an unknown setting.
        ValueError: For `data_parallel=True`.

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
    """ANIL of a classifier, for Lightning: MAML in which only the classifier adapts, on features that all tasks share.

    Raghu et al. 2020, "Rapid learning or feature reuse?".

    Args:
        features: Any module; it returns what the classifier takes.
        classifier: Any module that returns logits, [B, ways].
        loss: `loss(logits, labels)`, a scalar; by default `nn.CrossEntropyLoss()`.
        **kwargs: The settings of `LightningMAML`.

    Raises:
        TypeError: For an unknown setting.
        ValueError: If `test_ways` is not `train_ways`, or for `data_parallel=True`.

    >>> import torch
    >>> from metakern.compat.learn2learn.algorithms import LightningANIL
    >>> anil = LightningANIL(torch.nn.Linear(4, 8), torch.nn.Linear(8, 5))
    >>> batch = torch.randn(10, 4), torch.arange(5).repeat_interleave(2)
    >>> loss, accuracy = anil.meta_learn(batch, 0, ways=5, shots=1, queries=1)
    >>> loss.backward()
    """

    adaptation_steps = 1
    adaptation_lr = 0.1
    _settings = LightningMAML._settings

    def __init__(self, features: nn.Module, classifier: nn.Module, loss: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self._set(loss, kwargs)
        if self.train_ways != self.test_ways:
            raise ValueError(
                f"LightningANIL: test_ways must be train_ways, {self.train_ways}, as all tasks share one classifier, "
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
    """Prototypical networks, for Lightning: an example gets the class with the nearest prototype.

    Snell, Swersky, Zemel 2017, "Prototypical networks for few-shot learning".

    Args:
        features: Any module that returns features, [B, D].
        loss: `loss(logits, labels)`, a scalar; by default `nn.CrossEntropyLoss()`.
        **kwargs: `distance_metric`, "euclidean" (the default) or "cosine", and the settings of
            `LightningEpisodicModule`.

    Raises:
        TypeError: For an unknown setting.
        ValueError: For another `distance_metric`, or for `data_parallel=True`.

    >>> import torch
    >>> from metakern.compat.learn2learn.algorithms import LightningPrototypicalNetworks
    >>> networks = LightningPrototypicalNetworks(torch.nn.Linear(4, 8))
    >>> batch = torch.randn(1, 10, 4), torch.arange(5).repeat_interleave(2)[None]
    >>> loss, accuracy = networks.meta_learn(batch, 0, ways=5, shots=1, queries=1)
    >>> loss.backward()
    """

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
