"""The tasks of a config: its split, episodes of them, and how well an algorithm adapts to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metakern.dialogue.config import Config
from metakern.dialogue.episodes import Episodes, Split, TaskData, split_tasks
from metakern.dialogue.readers import read
from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import by_the_user

__all__ = ["curve", "episodes", "load_split", "on_device_of"]

Batch = Mapping[str, Tensor]


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """``batch`` where ``model`` is."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


@by_the_user()
def load_split(config: Config) -> Split:
    """The tasks of the config's data, the same split every time and everywhere."""
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
    """Episodes of ``tasks`` as the config wants them, but for ``changes``."""
    names = ("support_size", "query_size", "max_length", "seed", "train_on", "windows")
    return Episodes(tasks, tokenizer, **{name: getattr(config, name) for name in names} | changes)


def curve(algorithm: Any, source: Episodes, steps: tuple[int, ...], limit: int = 0) -> tuple[list[str], Tensor]:
    """Tasks of ``source`` (at most ``limit``; 0: all) and their query losses after ``steps`` of adaptation,
    ``[len(steps), T]``, in evaluation mode."""
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
