"""`embedding` alone: tokens out of range, and errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import metakern as mk
from metakern.ops.core.spec import Make


def test_equals_torch() -> None:
    make = Make(seed=2)
    tokens, weight = make.integers(5, 2, 3), make(5, 4)
    assert torch.equal(mk.ops.embedding(tokens, weight), F.embedding(tokens, weight))


def test_tokens_out_of_range_are_errors_and_read_no_table_of_another_task() -> None:
    """The op itself refuses them too, if its caller does not check the tokens first."""
    weight = torch.zeros(3, 2, 4, 5)
    for wrong in (-1, 4, 7):
        tokens = torch.full((3, 2, 1), wrong)
        with pytest.raises(IndexError, match="out of range"):
            mk.ops.SPECS["embedding"].op(weight[0], tokens=tokens[0])
        for embedding, of in ((mk.ops.embedding, 0), (vmap(mk.ops.embedding), slice(None))):
            with pytest.raises(ValueError, match=rf"embedding: tokens must be in \[0, 4\), got {wrong}"):
                embedding(tokens[of], weight[of])


@pytest.mark.parametrize(
    ("tokens", "weight", "error", "message"),
    [
        (torch.ones(2), torch.ones(4, 5), TypeError, "embedding: tokens must be int64 or int32, got torch.float32"),
        (torch.ones(2).long(), torch.ones(4), ValueError, r"embedding: weight must have shape \[V, D\] or"),
        (
            torch.ones(2).long(),
            torch.ones(3, 4, 5),
            ValueError,
            r"tokens must have shape \[T, ...\] = \[3, ...\], got \[2\]",
        ),
        (torch.ones(2).long(), torch.ones(4, 5).long(), TypeError, "embedding: weight must be floating point"),
    ],
)
def test_errors(tokens: torch.Tensor, weight: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.ops.embedding(tokens, weight)
