"""The data of a config: its split into tasks, episodes of tasks, and the adaptation curve of an algorithm on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metakern.dialogue.config import Config
from metakern.dialogue.episodes import Batch, Episodes, Split, TaskData, split_tasks
from metakern.dialogue.readers import read
from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import by_the_user

__all__ = ["curve", "episodes", "load_adapted", "load_split", "on_device_of"]


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return `batch` on the device of the parameters of `model`."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def load_adapted(model: nn.Module, phi: Mapping[str, Tensor], task: int = 0) -> None:
    """Copy the parameters of one task into `model`; `phi` is what an algorithm's `adapt` returned, `[T, *shape]`."""
    for name, parameter in model.named_parameters():
        if name in phi:
            parameter.copy_(phi[name][task])


@by_the_user()
def load_split(config: Config) -> Split:
    """Read the data of `config` and split its tasks; the same data and config give the same split on every machine.

    Raises:
        DataError: If the data can't be read or hold too few tasks.
    """
    held_out = config.validation_part, config.test_part
    return split_tasks(
        read(config.data, config.format),
        seed=config.seed,
        fractions=(1 - sum(held_out), *held_out),
        min_dialogues=config.min_dialogues,
        min_words=config.min_words,
    )


@by_the_user()
def episodes(config: Config, tasks: tuple[TaskData, ...], tokenizer: DialogueTokenizer, **changes: Any) -> Episodes:
    """Return the `Episodes` of `tasks` with the settings of `config`, in which `changes` replace some.

    Raises:
        DataError: If there is no task, or one has fewer than two dialogues with a reply.
        UserError: If `max_length` is too small for the tokenizer.
    """
    names = ("support_size", "query_size", "max_length", "seed", "train_on", "windows")
    return Episodes(tasks, tokenizer, **{name: getattr(config, name) for name in names} | changes)


def curve(algorithm: Any, source: Episodes, steps: tuple[int, ...], limit: int = 0) -> tuple[list[str], Tensor]:
    """Return the names of the first `limit` tasks of `source` (0: all) and their query losses, `[len(steps), T]`.

    The losses are measured in evaluation mode after each number of inner steps in `steps`, in nats per token.
    """
    training = algorithm.training
    algorithm.eval()
    names: list[str] = []
    losses = []
    for tasks, support, query in source.evaluation(limit or None):
        names += tasks
        support, query = (on_device_of(algorithm.model, batch) for batch in (support, query))
        losses.append(algorithm.evaluate(support, query, steps=steps).cpu())
    algorithm.train(training)
    return names, torch.cat(losses, 1)
