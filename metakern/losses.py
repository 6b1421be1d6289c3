"""Losses of one task: `loss(model, batch) -> scalar`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from metakern import ops
from metakern.patching import huggingface


def causal_lm(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of the next token, in nats a token, over the labels that are not -100.

    The logits of a Hugging Face model that `metakern.patch` knows, whose head is not adapted, are never made: the head
    and the loss are one op of the hidden states.

    Args:
        model: `model(input_ids)`, or `model(input_ids=…, attention_mask=…)`, gives logits [B, L, V], as a tensor or as
            `.logits`.
        batch: A dictionary with input_ids [B, L], attention_mask [B, L] (optional) and labels [B, L], which are aligned
            with input_ids and shifted by one here as Hugging Face does, -100 where a token is not to be learned; or
            (tokens, targets), each [B, L], where targets[i] is what follows tokens[i].

    Returns:
        A scalar.

    Raises:
        ValueError: For a dictionary without input_ids or labels.

    >>> import metakern as mk, torch
    >>> tokens = torch.randint(50, (4, 9))
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> mk.losses.causal_lm(model, (tokens[:, :-1], tokens[:, 1:])).shape
    torch.Size([])
    """
    if isinstance(batch, Mapping):
        if "input_ids" not in batch or "labels" not in batch:
            raise ValueError(f"causal_lm: batch must hold input_ids and labels, got {sorted(batch)}")
        inputs, target = {"input_ids": batch["input_ids"]}, batch["labels"][:, 1:]
        if batch.get("attention_mask") is not None:
            inputs["attention_mask"] = batch["attention_mask"]
    else:
        inputs, target = batch[0], batch[1]
    head = huggingface.separate_head(model)
    with huggingface.without(head):
        x = _logits(model(**inputs) if isinstance(inputs, dict) else model(inputs))
    x, target = x[:, : target.shape[1]].flatten(0, 1), target.flatten()
    return ops.cross_entropy(x, target) if head is None else ops.linear_cross_entropy(x, head.weight, target)


def classification(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of `model(x)`, [B, classes], against integer labels.

    Args:
        model: `model(x)` gives logits, [B, classes] or [B, ..., classes].
        batch: (x, y) with y [B] or [B, ...], of which -100 does not count; or (x, y, mask), as `metakern.pad_tasks`
            makes it, with a mask [B] of the examples that count.

    Returns:
        A scalar.

    Raises:
        ValueError: For a batch of another form.

    >>> import metakern as mk, torch
    >>> mk.losses.classification(torch.nn.Linear(3, 2), (torch.randn(5, 3), torch.ones(5, dtype=torch.long))).shape
    torch.Size([])
    """
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"classification: batch must be (x, y) or (x, y, mask), got {got}")
    x, y, *mask = batch
    if mask:
        y = y.masked_fill(~mask[0].view(-1, *(1,) * (y.dim() - 1)), -100)
    logits = _logits(model(x))
    return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]
