"""`rope` alone: equality with Llama in transformers, positions of each sequence, and errors."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import metakern as mk
from metakern.ops.core.spec import Make
from metakern.ops.rope import angles


def test_equals_llama() -> None:
    make = Make(seed=2)
    q, k = make(2, 3, 5, 8), make(2, 1, 5, 8)
    turn = angles(make, 2, 5, 8)
    for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, **turn), strict=True):
        torch.testing.assert_close(mk.ops.rope(x, **turn), expected)


def test_a_rotation_keeps_lengths_and_is_undone_by_its_vjp() -> None:
    make = Make(seed=3)
    x, angle = make(2, 3, 5, 8).requires_grad_(), make(5, 4).repeat(1, 2)
    y = mk.ops.rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.autograd.grad(y, x, y.detach())[0], x.detach())


def test_each_sequence_can_have_its_own_positions() -> None:
    make = Make(seed=4)
    x, turn = make(3, 2, 5, 4), angles(make, 3, 5, 4)
    together = mk.ops.rope(x, **turn)
    for i in range(3):
        assert torch.equal(together[i], mk.ops.rope(x[i], turn["cos"][i], turn["sin"][i]))


@pytest.mark.parametrize(
    ("x", "cos", "sin", "error", "message"),
    [
        (
            torch.ones(4),
            torch.ones(1, 4),
            torch.ones(1, 4),
            ValueError,
            r"x must have shape \[..., L, D\] with D even, got",
        ),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), ValueError, r"x must have shape .* got \[2, 3\]"),
        (torch.ones(2, 4), torch.ones(3, 4), torch.ones(2, 4), ValueError, r"rope: cos must have shape \[L, D\]"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), ValueError, r"rope: sin must have shape \[L, D\]"),
        (torch.ones(5, 1, 2, 4), torch.ones(3, 2, 4), torch.ones(3, 2, 4), ValueError, r"\[5, 2, 4\], got \[3, 2, 4\]"),
        (torch.ones(2, 4), torch.ones(3, 2, 4), torch.ones(3, 2, 4), ValueError, r"\[1, 2, 4\], got \[3, 2, 4\]"),
        (torch.ones(2, 4).int(), torch.ones(2, 4), torch.ones(2, 4), TypeError, "rope: x must be floating point"),
        (torch.ones(2, 4), torch.ones(2, 4, requires_grad=True), torch.ones(2, 4), ValueError, "cos must not require"),
    ],
)
def test_errors(x: Tensor, cos: Tensor, sin: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.ops.rope(x, cos, sin)
