"""Changes of weights as pairs, matrices, low-rank factors and LoRA layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from largest import Largest
from torch import Tensor, nn

import metakern as mk
from metakern.adapters.updates import dense_update, lora_from_factors, low_rank_update
from metakern.ops.core.spec import Make

ones = torch.ones


def pairs(T: int | None = 3, M: int = 7, size: int = 5, out: int = 6, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    make, tasks = Make(seed=seed), () if T is None else (T,)
    return make(*tasks, M, size), make(*tasks, M, out), make(*tasks, M)


@pytest.mark.parametrize("M", [0, 1, 7])
def test_dense_updates_are_sums_of_outer_products(M: int) -> None:
    X, D, rates = pairs(M=M)
    expected = torch.zeros(3, 6, 5, dtype=torch.float64)
    for t in range(3):
        for j in range(M):
            expected[t] -= rates[t, j] * torch.outer(D[t, j], X[t, j])
    torch.testing.assert_close(dense_update(X, D, rates), expected)
    torch.testing.assert_close(dense_update(X[1], D[1], rates[1]), expected[1])
    torch.testing.assert_close(dense_update(X, D, 0.3), dense_update(X, D, torch.full((M,), 0.3, dtype=torch.float64)))


def test_a_layer_with_pairs_equals_one_with_the_dense_update() -> None:
    (X, D, rates), make = pairs(), Make(seed=2)
    x, weight, bias = make(3, 4, 5), make(6, 5), make(3, 6)
    expected = mk.ops.linear(x, weight + dense_update(X, D, rates), bias)
    torch.testing.assert_close(mk.ops.implicit_linear(x, weight, bias, X, D, rates), expected)


@pytest.mark.parametrize(("M", "size", "out"), [(4, 30, 20), (40, 30, 20), (25, 30, 20), (6, 3, 50), (1, 4, 4)])
@pytest.mark.parametrize("error", [0, 1e-6, 0.1, 0.5])
def test_factors_keep_to_the_error_with_the_lowest_rank(M: int, size: int, out: int, error: float) -> None:
    """By Eckart and Young: one rank less and the best approximation has a larger error, for some task."""
    X, D, rates = pairs(2, M, size, out)
    rates = rates * torch.logspace(0, -4, M, dtype=torch.float64)
    A, B = low_rank_update(X, D, rates, error)
    dense = dense_update(X, D, rates)
    norms = dense.flatten(1).norm(dim=1)
    assert A.shape == (2, B.shape[-1], size)
    assert ((B @ A - dense).flatten(1).norm(dim=1) <= (error + 1e-12) * norms).all()
    sigma = torch.linalg.svdvals(dense)
    if error:
        assert (sigma[:, A.shape[1] - 1 :].norm(dim=1) > error * norms).any()


def test_factors_are_found_without_the_dense_update() -> None:
    X, D, rates = pairs(2, 5, 300, 200)
    with Largest() as found:
        A, B = low_rank_update(X, D, rates)
    assert found.elements < 200 * 300 / 2
    torch.testing.assert_close(B @ A, dense_update(X, D, rates), rtol=0, atol=0.1)
    assert A.shape[1] == 5


def test_repeated_tokens_and_padding_take_no_rank() -> None:
    X, D, rates = pairs(None, 3)
    X, D, rates = (torch.cat([a, a, 9 * a]) for a in (X, D, rates))
    rates[6:] = 0
    A, B = low_rank_update(X, D, rates, 1e-6)
    assert A.shape[0] == 3
    torch.testing.assert_close(B @ A, dense_update(X, D, rates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_have_the_dtype_of_the_pairs(dtype: torch.dtype) -> None:
    X, D, rates = (a.to(dtype).requires_grad_() for a in pairs(None, 3))
    A, B = low_rank_update(X, D, rates)
    assert A.dtype == B.dtype == dtype
    assert not A.requires_grad
    error = (B.double() @ A.double() - dense_update(*(a.double() for a in (X, D, rates)))).norm()
    assert error < 8 * torch.finfo(dtype).eps * dense_update(X, D, rates).norm() + 1e-3


@pytest.mark.parametrize("empty", [{"M": 0}, {"T": 0}])
def test_nothing_has_rank_1(empty: dict[str, int]) -> None:
    A, B = low_rank_update(*pairs(**empty))
    assert A.shape[-2] == B.shape[-1] == 1
    assert not (B @ A).any()
    A, B = low_rank_update(*pairs()[:2], 0.0)
    assert A.shape == (3, 1, 5)
    assert not (B @ A).any()


def test_an_adapted_model_is_saved_as_factors_and_merged(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    of_layers = {"2": pairs(None, 3, 6, 4, seed=2), "0": pairs(None, 2, 5, 6, seed=3)}
    x, bias = torch.randn(9, 5).double(), torch.randn(4).double()
    dense = copy.deepcopy(model)
    for name, of_layer in of_layers.items():
        dense.get_submodule(name).weight.data += dense_update(*of_layer)
    dense[2].bias.data = bias
    expected, fresh = dense(x), copy.deepcopy(model)

    factors = {name: low_rank_update(*of_layer, 0) for name, of_layer in of_layers.items()}
    assert lora_from_factors(model, factors) == ["0", "2"]
    assert [layer.rank for layer in (model[0], model[2])] == [2, 3]
    mk.save_lora(model, tmp_path, {"2.bias": bias})
    assert mk.load_lora(fresh, tmp_path) == ["0", "2"]
    torch.testing.assert_close(fresh(x), expected)
    mk.merge_lora(fresh)
    torch.testing.assert_close(fresh(x), expected)
    torch.testing.assert_close(fresh[0].weight, dense[0].weight)


def test_errors_of_low_rank_updates() -> None:
    X, D, rates = pairs()
    for error in (-0.1, 1, "small", float("nan")):
        with pytest.raises(ValueError, match=r"^low_rank_update: error must be a number in \[0, 1\), got"):
            low_rank_update(X, D, rates, error)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^low_rank_update: D and rates must be finite, got infinite values or NaN"):
        low_rank_update(X, D, rates * torch.inf)
    with pytest.raises(ValueError, match=r"^low_rank_update: D must have shape \[T, M, out\]"):
        low_rank_update(X, D[:2], rates)
    with pytest.raises(ValueError, match=r"^dense_update: rates must have shape \[T, M\]"):
        dense_update(X, D, rates[:2])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head.weight = self.body.weight


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "factors must name a layer, got none"),
        ({"1": (ones(1, 3), ones(2, 1))}, "factors must be of layers that can be adapted, got '1', which is no linear"),
        ({"0": (ones(1, 2), ones(2, 1))}, r"factors of '0' must have shapes \[R, 3\] and \[2, R\], got \[1, 2\]"),
        ({"0": (ones(2, 1, 3), ones(2, 2, 1))}, r"factors of '0' must have shapes .*: give those of one task"),
    ],
)
def test_errors_of_lora_from_factors(factors: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=f"^lora_from_factors: {message}"):
        lora_from_factors(model, factors)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="got 'head', which has a weight that another module shares"):
        lora_from_factors(Tied(), {"head": (ones(1, 3), ones(3, 1))})
