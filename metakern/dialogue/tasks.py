"""The data of a config: its split into tasks, episodes of tasks, and the adaptation curve of an algorithm on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metakern.dialogue import processes
from metakern.dialogue.config import Config
from metakern.dialogue.episodes import Batch, Episodes
from metakern.dialogue.manager.training import part_episodes
from metakern.dialogue.manager.utterances import Utterances, by_intent
from metakern.dialogue.readers import Dialogues, read
from metakern.dialogue.registry import named
from metakern.dialogue.shards import stream
from metakern.dialogue.split import Split, TaskData, split_tasks, texts_of, whole_tasks
from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import UserError, by_the_user

__all__ = [
    "EpisodeSource",
    "curve",
    "episodes",
    "load_adapted",
    "load_split",
    "load_whole",
    "measured",
    "on_device_of",
    "overlapping",
    "source_of",
]

EpisodeSource = Episodes | Utterances


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
        DataError: If the data can't be read or hold too few tasks, or their reader has no such option.
        UserError: If names of held-out tasks match none, or an option is not `name=value`.
    """
    shares = config.validation_part, config.test_part
    whole = _read(config, config.data)
    dialogues, unread = list(whole), Counter(whole.skipped)
    held_out: dict[str, set[str] | None] = {}
    for part in ("validation", "test"):
        file, patterns = getattr(config, f"{part}_data"), getattr(config, f"{part}_tasks")
        held_out[part] = None
        if file:
            found = _read(config, file)
            held_out[part] = names = {d.task_id for d in found}
            unread += Counter(found.skipped)
            dialogues = [*found, *(d for d in dialogues if d.task_id not in names)]
        elif patterns:
            held_out[part] = _matching(part, patterns, {d.task_id for d in dialogues})
    return split_tasks(
        dialogues,
        seed=config.seed,
        fractions=(1 - sum(shares), *shares),
        min_dialogues=config.min_dialogues,
        min_words=config.min_words,
        overlap=config.overlap,
        validation=held_out["validation"],
        test=held_out["test"],
        unread=unread,
    )


@by_the_user()
def load_whole(
    config: Config, data: str, reading: Mapping[str, Any] | None = None
) -> tuple[tuple[TaskData, ...], dict[str, int]]:
    """Read other data than that of `config`; return all its tasks that have dialogues for support and query.

    A dictionary says what was left out, by reason. `reading`: `format`, `reader_options` and `task_key` in place of
    those of `config`, each with its default.

    Raises:
        DataError: If the data can't be read or hold no such task.
    """
    if reading is not None:
        config = replace(config, **{"format": "auto", "reader_options": (), "task_key": "", **reading})
    found = _read(config, data)
    return whole_tasks(found, min_words=config.min_words, overlap=config.overlap, unread=found.skipped)


def overlapping(known: Sequence[TaskData], tasks: Sequence[TaskData], config: Config) -> list[str]:
    """Return the names of the tasks that are known by name, or share texts with known ones, as splits compare them."""
    texts = partial(texts_of, min_words=config.min_words, overlap=config.overlap)
    names = {task.task_id for task in known}
    said = {text for task in known for dialogue in task.dialogues for text in texts(dialogue)}
    return sorted(
        task.task_id
        for task in tasks
        if task.task_id in names or not all(said.isdisjoint(texts(dialogue)) for dialogue in task.dialogues)
    )


def _read(config: Config, data: str) -> Dialogues:
    """Read data in the format and with the reader's options of `config`; the tasks of a parser are intents."""
    options = named("reader_options", config.reader_options)
    if config.task_key:
        options["task_key"] = config.task_key
    if config.stream and config.windows == "later":
        raise UserError("windows must be any or opening with stream, got 'later', for which all must be read")
    if config.stream and config.part != "generator":
        raise UserError(f"stream must be false for a {config.part}, which needs all of its data, got true")
    if config.stream:
        texts = partial(texts_of, min_words=config.min_words, overlap=config.overlap)
        return stream(data, config.format, texts, **options)
    found = read(data, config.format, **options)
    return Dialogues(by_intent(found), found.source, found.skipped) if config.part == "parser" else found


def _matching(part: str, patterns: Sequence[str], known: set[str]) -> set[str]:
    """Return the known names of tasks that are among the patterns, or match one."""
    found = {name for name in known if any(name == p or fnmatchcase(name, p) for p in patterns)}
    if not found:
        some = ", ".join(sorted(known)[:5])
        raise UserError(f"{part}_tasks must match a task of the data, such as {some}; got {', '.join(patterns)}")
    return found


@by_the_user()
def episodes(config: Config, tasks: tuple[TaskData, ...], tokenizer: DialogueTokenizer, **changes: Any) -> Episodes:
    """Return the `Episodes` of `tasks` with the settings of `config`, in which `changes` replace some.

    Raises:
        DataError: If there is no task, or one has fewer than two dialogues with a reply.
        UserError: If `max_length` is too small for the tokenizer.
    """
    names = ("support_size", "query_size", "max_length", "seed", "train_on", "windows", "task_power", "hints")
    return Episodes(tasks, tokenizer, **{name: getattr(config, name) for name in names} | changes)


@by_the_user()
def source_of(
    config: Config, tasks: tuple[TaskData, ...], tokenizer: DialogueTokenizer, labels: Sequence[str], **changes: Any
) -> EpisodeSource:
    """Return the episodes of `tasks` from which the part that `config` names learns, or by which it is judged.

    Args:
        config: The settings.
        tasks: The tasks.
        tokenizer: The tokenizer.
        labels: Those of the run, for a parser or a policy.
        changes: Arguments of the episodes' class that replace the settings.

    Raises:
        DataError: If there are too few tasks, or one has too few dialogues.
        UserError: If `max_length` is too small for the tokenizer.
    """
    if config.part == "generator":
        return episodes(config, tasks, tokenizer, **changes)
    return part_episodes(config, tasks, tokenizer, labels, **changes)


def curve(algorithm: Any, source: EpisodeSource, steps: tuple[int, ...], limit: int = 0) -> tuple[list[str], Tensor]:
    """Return the names of the first `limit` tasks of `source` (0: all) and their losses, `[len(steps), T]`.

    The losses are those on the query, as of `measured`.
    """
    return measured(lambda *batches: algorithm.evaluate(*batches, steps=steps), algorithm, source, limit)


def measured(
    losses: Callable[[Batch, Batch], Tensor], algorithm: Any, source: EpisodeSource, limit: int = 0
) -> tuple[list[str], Tensor]:
    """Return the names of the first `limit` tasks of `source` (0: all) and `losses` of support and query, `[..., T]`.

    They are measured in evaluation mode of the algorithm, in nats per token. Processes share the tasks, and each
    returns all of them.
    """
    training = algorithm.training
    algorithm.eval()
    names: list[str] = []
    found: list[Tensor] = []
    for tasks, support, query in source.evaluation(limit or None, share=processes.share):
        names += tasks
        found.append(losses(*(on_device_of(algorithm.model, batch) for batch in (support, query))).cpu())
    algorithm.train(training)
    parts = processes.gather((names, found))
    return [name for own, _ in parts for name in own], torch.cat([loss for _, own in parts for loss in own], -1)
