"""Losses of one task: functions loss(model, batch) that return a scalar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metakern import ops
from metakern.patching import huggingface


def causal_lm(model: nn.Module, batch: Any) -> Tensor:
    """Returns the mean cross-entropy of the next token, in nats per token, over the labels that are not -100.

    In a Hugging Face model that `metakern.patch` knows and has patched, a head that is linear, without a bias and not
    adapted is computed with the loss by `metakern.ops.linear_cross_entropy`, which never holds all logits.

    Args:
        model: `model(tokens)` for a pair, `model(input_ids=…, attention_mask=…)` for a dictionary; it returns logits
            [B, L, V], as a tensor, as `.logits`, or as the first entry of a tuple.
        batch: A dictionary with input_ids [B, L], attention_mask [B, L] (optional) and labels [B, L], which are aligned
            with input_ids and shifted by one here as Hugging Face does, -100 where a token is not to be learned; or
            (tokens, targets), each [B, L], where targets[:, i] is the token that follows tokens[:, i].

    Returns:
        A scalar; 0 if all labels are -100.

    Raises:
        ValueError: For a dictionary without input_ids or labels, labels that are not [B, L], or, on the CPU, labels
            outside [0, V).

    >>> import metakern as mk, torch
    >>> tokens = torch.randint(50, (4, 9))
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> mk.losses.causal_lm(model, (tokens[:, :-1], tokens[:, 1:])).shape
    torch.Size([])
    """
    if isinstance(batch, Mapping):
        if "input_ids" not in batch or "labels" not in batch:
            raise ValueError(f"causal_lm: batch must hold input_ids and labels, got {sorted(batch)}")
        _has_dims("causal_lm: labels", batch["labels"], 2, "[B, L]")
        inputs = {"input_ids": batch["input_ids"]}
        target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # to cut the last logits off would copy the others
        if batch.get("attention_mask") is not None:
            inputs["attention_mask"] = batch["attention_mask"]
    else:
        inputs, target = batch[0], batch[1]
        _has_dims("causal_lm: targets", target, 2, "[B, L]")
    head = huggingface.separate_head(model)
    with huggingface.without(head):
        x = _logits(model(**inputs) if isinstance(inputs, dict) else model(inputs))
    x, target = x[:, : target.shape[1]].flatten(0, 1), target.flatten()
    return ops.cross_entropy(x, target) if head is None else ops.linear_cross_entropy(x, head.weight, target)


def classification(model: nn.Module, batch: Any) -> Tensor:
    """Returns the mean cross-entropy of `model(x)` against integer labels, in nats.

    Args:
        model: `model(x)` returns logits, [B, classes] or [B, ..., classes], as a tensor, as `.logits`, or as the first
            entry of a tuple.
        batch: (x, y) with labels y, [B] or [B, ...], of which those that are -100 do not count; or (x, y, mask), as
            `metakern.pad_tasks` returns it, with a bool mask [B], True for the examples that count; or a dictionary
            with labels and maybe mask, whose other entries are keyword arguments of the model.

    Returns:
        A scalar; 0 if no label counts.

    Raises:
        ValueError: For a batch of another form, a single label, or, on the CPU, labels outside [0, classes).

    >>> import metakern as mk, torch
    >>> mk.losses.classification(torch.nn.Linear(3, 2), (torch.randn(5, 3), torch.ones(5, dtype=torch.long))).shape
    torch.Size([])
    """
    args, inputs, y = labelled(batch, "classification: batch")
    _has_dims("classification: labels", y, 1, "[B] or [B, ...]")
    logits = _logits(model(*args, **inputs))
    return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def labelled(batch: Any, what: str) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Returns the arguments of the model, its keyword arguments, and the labels of a batch for classification.

    Args:
        batch: One of the forms that `classification` takes, of one task or with the tasks first in every tensor.
        what: The name of the batch in messages.

    Returns:
        The labels have -100 where the mask is False.

    Raises:
        ValueError: For a batch of another form.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        inputs = dict(batch)
        args: tuple[Any, ...] = ()
        y, mask = inputs.pop("labels"), inputs.pop("mask", None)
    elif isinstance(batch, tuple | list) and len(batch) in (2, 3):
        inputs, args, y, mask = {}, (batch[0],), batch[1], batch[2] if len(batch) == 3 else None
    else:
        if isinstance(batch, Mapping):
            got = f"a dictionary without labels: {sorted(batch)}"
        else:
            got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"{what} must be (x, y), (x, y, mask) or a dictionary with labels, got {got}")
    if mask is not None:
        y = y.masked_fill(~mask.view(*mask.shape, *(1,) * (y.dim() - mask.dim())), -100)
    return args, inputs, y


def _has_dims(what: str, y: Tensor, least: int, shape: str) -> None:
    """Raises ValueError for labels of one sequence or example, such as those of a batch without a task dimension."""
    if y.dim() < least:
        raise ValueError(
            f"{what} of a task must have shape {shape}, got {list(y.shape)}: every tensor has the tasks first, such as"
            " x.unsqueeze(0) for a single task"
        )


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]
