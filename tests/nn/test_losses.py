"""The losses of one task, and their errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern as mk


class Model(nn.Module):
    """Logits that depend on the token alone, with or without an attention mask."""

    def __init__(self, wrap: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.wrap = nn.Embedding(7, 7, dtype=torch.float64), wrap

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
        logits = self.table(input_ids)
        if attention_mask is not None:
            logits = logits * attention_mask.unsqueeze(-1)
        return type("Output", (), {"logits": logits})() if self.wrap else logits


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1]])


@pytest.mark.parametrize("wrap", [False, True])
def test_causal_lm_shifts_aligned_labels(wrap: bool) -> None:
    model = Model(wrap)
    labels = TOKENS.masked_fill(TOKENS == 3, -100)
    expected = F.cross_entropy(model.table(TOKENS)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(mk.losses.causal_lm(model, {"input_ids": TOKENS, "labels": labels}), expected)
    shifted = mk.losses.causal_lm(model, (TOKENS[:, :-1], labels[:, 1:]))
    torch.testing.assert_close(shifted, expected)


def test_causal_lm_passes_the_attention_mask() -> None:
    model, mask = Model(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"input_ids": TOKENS, "attention_mask": mask, "labels": TOKENS}
    logits = (model.table(TOKENS) * mask.unsqueeze(-1))[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(mk.losses.causal_lm(model, batch), expected)


def test_classification() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    torch.testing.assert_close(mk.losses.classification(model, (x, y)), F.cross_entropy(model(x), y))
    mask = torch.tensor([True, True, True, False, False])
    named = {"input": x, "labels": y, "mask": mask}
    torch.testing.assert_close(mk.losses.classification(model, named), F.cross_entropy(model(x[:3]), y[:3]))


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"causal_lm: batch must hold input_ids and labels, got \['input_ids'\]"):
        mk.losses.causal_lm(Model(), {"input_ids": TOKENS})


def test_batches_of_another_form_are_refused() -> None:
    x = torch.ones(4, 3)
    without = r"a dictionary without labels: \['x', 'y'\]"
    for batch, got in (((x,), "1 parts"), ([x, x, x, x], "4 parts"), (x, "Tensor"), ({"x": x, "y": x}, without)):
        forms = r"\(x, y\), \(x, y, mask\) or a dictionary with labels"
        with pytest.raises(ValueError, match=rf"classification: batch must be {forms}, got {got}"):
            mk.losses.classification(torch.nn.Linear(3, 2), batch)


def test_a_batch_without_a_task_dimension_is_refused():
    """Each example would be a task of its own, without an error."""
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), torch.randint(4, (5,))
    maml = mk.MAML(model, mk.losses.classification)
    message = r"classification: labels of a task must have shape \[B\] or \[B, ...\], got \[\]: every tensor has"
    with pytest.raises(ValueError, match=message):
        maml((x, y), (x, y))
    maml((x[None], y[None]), (x[None], y[None])).backward()
    tokens = torch.randint(7, (5, 6))
    lm = mk.MAML(nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7)), mk.losses.causal_lm)
    for batch in ((tokens, tokens), {"input_ids": tokens, "labels": tokens}):
        with pytest.raises(ValueError, match=r"must have shape \[B, L\], got \[6\]"):
            lm(batch, batch)
