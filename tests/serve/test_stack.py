"""A stack of models: each row is the model that its weights make, whatever the other rows hold."""

import pytest
import torch
from torch import nn

from metakern.dialogue.models import MODELS, build_model
from metakern.errors import UserError
from metakern.serve.stack import Stack

SIZES = {"gpt": {"width": 16, "heads": 2, "layers": 2, "max_length": 12}}


def make(name: str, seed: int, **options) -> nn.Module:
    torch.manual_seed(seed)
    sizes = SIZES.get(name, {"embedding": 8, "hidden": 12, "layers": 2})
    return build_model(name, 30, **sizes, **options).double().eval()


def filled(models: list[nn.Module], rows: int) -> Stack:
    stack = Stack(models[0], rows)
    for row, model in enumerate(models):
        stack.arena[row] = stack.flat(dict(model.named_parameters()))
    return stack


def step(stack: Stack, begin: int, new: list[list[int]], known: list[int]) -> torch.Tensor:
    counts = torch.tensor([len(row) for row in new])
    padded = torch.tensor([[*row, *[0] * (int(counts.max()) - len(row))] for row in new])
    end = begin + len(new)
    return stack.at(begin, end).next_logits(padded, counts, stack.cache_at(begin, end), torch.tensor(known))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_row_equals_the_model_of_its_weights(name):
    models = [make(name, seed) for seed in range(4)]
    stack = filled(models, 5)
    texts = [[3, 1, 4, 1], [5, 9], [2, 6, 5], [8]]
    logits = step(stack, 0, texts, [0] * 4)
    for round_ in range(3):
        for model, text, found in zip(models, texts, logits, strict=True):
            torch.testing.assert_close(found, model(torch.tensor([text]))[0, -1], atol=1e-10, rtol=1e-10)
        new = [[7 + round_], [1], [round_], [2]]
        logits = step(stack, 0, new, list(map(len, texts)))
        texts = [text + more for text, more in zip(texts, new, strict=True)]
    assert torch.equal(stack.base, stack.flat({}))


@pytest.mark.parametrize("name", ["gpt", "lstm"])
@torch.no_grad()
def test_a_row_can_move_and_its_neighbors_do_not_notice(name):
    models = [make(name, seed) for seed in range(3)]
    stack = filled(models, 3)
    step(stack, 0, [[3, 1], [4, 1, 5], [9]], [0, 0, 0])
    alone = step(stack, 1, [[2]], [3])
    stack.arena[0] = torch.nan
    for part in stack.cache:
        part[0] = torch.nan
    stack.move(2, 0)
    stack.move(1, 2)
    logits = step(stack, 0, [[6]], [1])
    torch.testing.assert_close(logits[0], models[2](torch.tensor([[9, 6]]))[0, -1], atol=1e-10, rtol=1e-10)
    again = step(stack, 2, [[7]], [4])
    torch.testing.assert_close(again[0], models[1](torch.tensor([[4, 1, 5, 2, 7]]))[0, -1], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(alone[0], models[1](torch.tensor([[4, 1, 5, 2]]))[0, -1], atol=1e-10, rtol=1e-10)


def test_untied_heads_and_projections_are_stacked_too():
    models = [make("gru", seed, tie=False) for seed in range(2)]
    stack = filled(models, 2)
    with torch.no_grad():
        logits = step(stack, 0, [[3, 1], [4]], [0, 0])
        torch.testing.assert_close(logits[1], models[1](torch.tensor([[4]]))[0, -1], atol=1e-10, rtol=1e-10)


def test_other_layers_and_other_weights_are_refused():
    with pytest.raises(UserError, match=r"serve: layers must be .*, got Conv1d"):
        Stack(nn.Conv1d(1, 1, 1), 2)
    stack = Stack(make("gpt", 0), 2)
    with pytest.raises(ValueError, match=r"norm.weight \[3\] is not a parameter of the model"):
        stack.flat({"norm.weight": torch.zeros(3)})
