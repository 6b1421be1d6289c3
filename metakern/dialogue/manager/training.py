"""What `metakern train --part parser` and `--part policy` train: the tasks, episodes, model and algorithm of a part."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

import metakern as mk
from metakern.dialogue.manager.acts import Acts, acts_in
from metakern.dialogue.manager.models import ActModel, BagEncoder, Classifier, PlainClassifier
from metakern.dialogue.manager.utterances import Utterances
from metakern.dialogue.split import TaskData
from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import UserError

if TYPE_CHECKING:
    from metakern.dialogue.config import Config

__all__ = ["labels_of", "parser_model", "part_episodes", "prepare", "prototypical"]


def labels_of(config: Config, tasks: Sequence[TaskData]) -> tuple[str, ...]:
    """Return the labels that a part learns from the training tasks: intents of a parser, acts of a policy, or none.

    Raises:
        DataError: If the data of a policy have no acts.
    """
    if config.part == "policy":
        return tuple(acts_in(dialogue for task in tasks for dialogue in task.dialogues))
    return tuple(task.task_id for task in tasks) if config.part == "parser" else ()


def part_episodes(
    config: Config, tasks: Sequence[TaskData], tokenizer: DialogueTokenizer, labels: Sequence[str], **changes: Any
) -> Utterances | Acts:
    """Return the episodes of the part that `config` names, a parser or a policy.

    Args:
        config: The settings.
        tasks: As `metakern.dialogue.tasks.load_split` returns them.
        tokenizer: The tokenizer.
        labels: What `labels_of` returned.
        changes: Arguments of `Utterances` or `Acts` that replace the settings.

    Raises:
        DataError: If there are too few tasks, or a task has too few texts or dialogues.
    """
    common = {"max_length": config.max_length, "seed": config.seed}
    if config.part == "parser":
        sizes = {"ways": config.ways, "shots": config.shots, "queries": config.query_size}
        return Utterances(tasks, tokenizer, **common | sizes | changes)  # type: ignore[arg-type]
    sizes = {key: getattr(config, key) for key in ("support_size", "query_size", "task_power")}
    return Acts(tasks, tokenizer, acts=labels, **common | sizes | changes)


def prepare(model: Any, tasks: Sequence[TaskData], tokenizer: DialogueTokenizer) -> None:
    """Set what a new model takes from the training tasks: the importance of tokens in a `BagEncoder`."""
    encoder = getattr(model, "encoder", model)
    if isinstance(encoder, BagEncoder):
        dialogues = [dialogue for task in tasks for dialogue in task.dialogues]
        if isinstance(model, ActModel):
            encoder.weigh(tokenizer.encode(turn.text) for dialogue in dialogues for turn in dialogue.turns)
        else:
            encoder.weigh(tokenizer.prompt(dialogue.turns[:1], sys.maxsize, "bot") for dialogue in dialogues)


def parser_model(config: Config, model: nn.Module) -> nn.Module:
    """Return the model of a parser, an encoder or a classifier, over a language model or a `BagEncoder`.

    Raises:
        UserError: If a pretrained model is to be pretrained further, which a parser does not do.
    """
    if config.pretrained and config.pretrain_steps:
        raise UserError(f"pretrain_steps must be 0 for a parser over an hf model, got {config.pretrain_steps}")
    body: Any = model.base_model if config.pretrained else model
    encoder = body if isinstance(body, BagEncoder) else mk.nn.TextEncoder(body)
    return Classifier(encoder, config.ways) if config.algorithm == "protomaml" else encoder


def prototypical(config: Config, model: Any, labels: Sequence[str], **options: Any) -> nn.Module:
    """Return the algorithm of a parser, one without an inner loop, over its encoder.

    Args:
        config: The settings.
        model: What `parser_model` returned.
        labels: The training intents.
        options: Arguments of `metakern.ProtoNet`.
    """
    options = {"distance": "cosine"} | options
    return (
        PlainClassifier(model, len(labels), **options)
        if config.algorithm == "finetune"
        else mk.ProtoNet(model, **options)
    )
