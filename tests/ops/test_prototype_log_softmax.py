"""`prototype_log_softmax` alone: classes without an example, embeddings far from zero, and errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

BACKENDS = [name for name in ("reference", "cpu", "triton") if mk.backends()[name] == "available"]
PLAIN = SPECS["prototype_log_softmax"].plain


def orders(f: Any, support: Tensor, labels: Tensor, query: Tensor, classes: int, ct: Tensor) -> list[Tensor]:
    """Return the log-probabilities, and the gradients and a Hessian-vector product of their sum weighted by `ct`."""
    x = [support.clone().requires_grad_(), query.clone().requires_grad_()]
    y = f(x[0], labels, x[1], classes)
    finite = y.isfinite()
    grads = torch.autograd.grad((torch.where(finite, y, 0.0) * ct).sum(), x, create_graph=True)
    make = Make(seed=9)
    v = [make(*g.shape) for g in grads]
    return [y.detach(), *grads, *torch.autograd.grad(grads, x, v)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_without_an_example_have_probability_zero(backend: str) -> None:
    make = Make(seed=1)
    support, query, ct = make(2, 6, 5), make(2, 4, 5), make(2, 4, 4)
    labels = torch.tensor([[0, 1, 1, 3, -1, -100], [2, 0, 2, 2, 0, 0]])
    with mk.backend(backend):
        found = orders(mk.ops.prototype_log_softmax, support, labels, query, 4, ct)
    expected = orders(PLAIN, support, labels, query, 4, ct)
    assert expected[0][0, :, 2].eq(-torch.inf).all()
    assert expected[0][1, :, [1, 3]].eq(-torch.inf).all()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert not found[1][0, 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cotangents_of_classes_without_an_example_are_not_read(backend: str) -> None:
    make = Make(seed=2)
    support, query = make(1, 4, 3).requires_grad_(), make(1, 2, 3).requires_grad_()
    labels, ct = torch.tensor([[0, 0, 2, 2]]), make(1, 2, 3)
    results = []
    with mk.backend(backend):
        for value in (0.0, float("nan")):
            ct[..., 1] = value
            y = mk.ops.prototype_log_softmax(support, labels, query, 3)
            results.append(torch.autograd.grad(y, [support, query], ct))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_far_from_zero_keep_their_digits(backend: str) -> None:
    make = Make(seed=3)
    support, labels, query, ct = make(2, 6, 8), torch.arange(6).remainder(3).expand(2, 6), make(2, 5, 8), make(2, 5, 3)
    far = [(1000 + x).float() for x in (support, query)]
    with mk.backend(backend):
        found = orders(mk.ops.prototype_log_softmax, far[0], labels, far[1], 3, ct.float())
    expected = orders(PLAIN, far[0].double(), labels, far[1].double(), 3, ct)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()  # a coordinate of 1000 has a rounding error of 3e-5


S, Y, Q = torch.ones(2, 3, 4), torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.ones(2, 5, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((S[0, 0], Y, Q, 3), ValueError, r"support must have shape \[S, D\] or \[T, S, D\], got \[4\]"),
        ((S, Y, Q[0], 3), ValueError, r"query must have shape \[2, Q, 4\], got \[5, 4\]"),
        ((S[0], Y[0], Q[0, :, :3], 3), ValueError, r"query must have shape \[Q, 4\], got \[5, 3\]"),
        ((S, Y[:, :2], Q, 3), ValueError, r"labels must have shape \[T, S\] = \[2, 3\], got \[2, 2\]"),
        ((S, Y.float(), Q, 3), TypeError, "labels must be int64 or int32, got torch.float32"),
        ((S.long(), Y, Q, 3), TypeError, "support must be floating point, got torch.int64"),
        ((S, Y, Q, 2), ValueError, r"the highest label of a task must be in \[0, 2\), got 2"),
        ((S, Y - 3, Q, 3), ValueError, r"the highest label of a task must be in \[0, 3\), got -1"),
        ((S[:, :0], Y[:, :0], Q, 3), ValueError, r"the highest label of a task must be in \[0, 3\), got -1"),
        ((S, Y, Q, 0), ValueError, "classes must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"prototype_log_softmax: {message}"):
        mk.ops.prototype_log_softmax(*args)
