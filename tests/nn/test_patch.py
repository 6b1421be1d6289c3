"""patch and unpatch: modules get another class and keep their parameters, hooks and outputs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metakern as mk


class Wide(nn.LayerNorm):
    """A subclass that computes in another dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(6), nn.RMSNorm(6), Wide(6)])
        self.cells = nn.ModuleDict(
            {
                "rnn": nn.RNN(6, 6, batch_first=True, nonlinearity="relu"),
                "gru": nn.GRU(6, 3, bidirectional=True, batch_first=True),
                "lstm": nn.LSTM(6, 6, num_layers=2, dropout=0.3, batch_first=True),
            }
        )
        self.head = nn.Linear(6, 2)
        self.again = self.cells["gru"]

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.cells.values():
            x = cell(x)[0]
        for norm in self.norms:
            x = norm(x)
        return self.head(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Model().double().eval()


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the outputs, first derivatives, and derivatives of a linear function of those."""
    parameters = list(model.parameters())
    y = model(x)
    ct = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    g = torch.autograd.grad(y, parameters, ct, create_graph=True)
    product = sum((torch.linspace(-1, 1, gi.numel()).view(gi.shape) * gi).sum() for gi in g)
    return [y, *g, *torch.autograd.grad(product, parameters, allow_unused=True, materialize_grads=True)]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


REPLACED = {
    "norms.0": "LayerNorm",
    "norms.1": "RMSNorm",
    "cells.rnn": "RNN",
    "cells.gru": "GRU",
    "cells.lstm": "LSTM",
    "head": "Linear",
}


def test_patching_changes_nothing_but_classes(model: nn.Module) -> None:
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected, parameters, modules = results(model, x), list(model.parameters()), list(model.modules())
    state, calls = {k: v.clone() for k, v in model.state_dict().items()}, []
    model.cells["lstm"].register_forward_hook(lambda *_: calls.append("lstm"))
    model.cells["gru"].train()

    report = mk.patch(model)

    assert report.replaced == tuple((p, f"torch.nn.{n}", f"metakern.nn.{n}") for p, n in REPLACED.items())
    why = "a subclass, which may compute something else"
    assert report.left == (("norms.2", f"{Wide.__module__}.Wide", why),)
    for path, name in REPLACED.items():
        assert type(model.get_submodule(path)) is getattr(mk.nn, name)
    assert type(model.norms[2]) is Wide
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.again is model.cells["gru"]
    assert model.cells["gru"].training
    assert not model.cells["lstm"].training
    assert list(model.state_dict()) == list(state)
    close(results(model, x), expected)
    assert calls == ["lstm"]


def test_patching_twice_changes_nothing_and_unpatching_restores_the_classes(model: nn.Module) -> None:
    kinds = [type(m) for m in model.modules()]
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    first = mk.patch(model)
    assert mk.patch(model) == mk.patching.Report((), first.left)
    back = mk.unpatch(model)
    assert back.replaced == tuple((path, after, was) for path, was, after in first.replaced)
    assert [type(m) for m in model.modules()] == kinds
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert mk.unpatch(model) == mk.patching.Report(())


def test_an_optimizer_goes_on_with_a_patched_model(model: nn.Module) -> None:
    other, x = copy.deepcopy(model), torch.randn(2, 4, 6, dtype=torch.float64)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, other)]
    for step in range(3):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            (m(x) ** 2).sum().backward()
            optimizer.step()
        if step == 0:
            mk.patch(model)
    close(list(model.parameters()), list(other.parameters()))


def test_copies_stay_patched_and_can_be_unpatched(model: nn.Module) -> None:
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    mk.patch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.cells["lstm"]) is mk.nn.LSTM
        assert torch.equal(twin(x), model(x))
        assert len(mk.unpatch(twin).replaced) == len(REPLACED)
        assert type(twin.cells["lstm"]) is nn.LSTM
        close([twin(x)], [model(x)])


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "LayerNorm", "RMSNorm"])
def test_the_model_itself_can_be_patched(name: str) -> None:
    model = getattr(nn, name)(*((6, 6) if name.isupper() else (6,)))
    report = mk.patch(model)
    assert report.replaced == (("", f"torch.nn.{name}", f"metakern.nn.{name}"),)
    assert str(report) == f"1 replaced, 0 left\n  (model)  torch.nn.{name} -> metakern.nn.{name}"
    assert type(model) is getattr(mk.nn, name)


def test_modules_that_cannot_be_replaced_are_left_and_reported() -> None:
    projected, wrapped, own = nn.LSTM(3, 4, proj_size=2), nn.GRU(3, 4), mk.nn.LSTM(3, 4)
    original: Any = wrapped.forward
    wrapped.forward = lambda *args: original(*args)  # type: ignore[method-assign]
    model = nn.ModuleList([projected, wrapped, own, nn.ReLU(), nn.MultiheadAttention(4, 2, add_zero_attn=True)])
    report = mk.patch(model)
    assert report.replaced == ()
    assert report.left == (
        ("0", "torch.nn.LSTM", "proj_size must be 0, got 2"),
        ("1", "torch.nn.GRU", "its forward was replaced"),
        ("4", "torch.nn.MultiheadAttention", "add_zero_attn must be False, got True"),
    )
    mk.unpatch(model)
    assert [type(m) for m in model] == [nn.LSTM, nn.GRU, mk.nn.LSTM, nn.ReLU, nn.MultiheadAttention]


def test_a_patched_model_has_forward_mode_and_vmap(model: nn.Module) -> None:
    """The recurrent layers of torch.nn lack both."""
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    mk.patch(model)
    many = torch.func.vmap(model)(x)
    close([many], [torch.stack([model(xi) for xi in x])])
    t_x = torch.randn_like(x[0])
    tangent = torch.func.jvp(model, (x[0],), (t_x,))[1]
    eps = 1e-6
    difference = (model(x[0] + eps * t_x) - model(x[0] - eps * t_x)) / (2 * eps)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-7)


class Transformer(nn.Module):
    """A seq2seq model with every mask: of padding, of the future, and of both."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.activations = nn.Sequential(nn.GELU(approximate="tanh"), nn.SiLU())
        self.inner = nn.Transformer(
            8, 2, 1, 1, 12, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=norm_first
        )

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        padding = torch.arange(x.shape[1]) >= torch.tensor([[5], [3]])
        y = self.activations(x[:, :4])
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return self.inner(x, y, **masks, src_mask=causal, tgt_mask=causal[:4, :4], tgt_is_causal=True)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformers_are_equal_to_second_order(norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model, x = Transformer(norm_first).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(model, x)
    calls: list[dict] = []
    attention = mk.ops.attention
    monkeypatch.setattr(mk.ops, "attention", lambda *a, **options: calls.append(options) or attention(*a, **options))
    report = mk.patch(model)
    assert report.left == ()
    layers = ("TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoderLayer", "MultiheadAttention")
    names = {*layers, "Linear", "LayerNorm", "GELU", "SiLU"}
    assert {before for _, before, _ in report.replaced} == {f"torch.nn.{name}" for name in names}
    close(results(model, x), expected)
    assert [(call["causal"], call["mask"] is not None) for call in calls] == [
        (True, True),
        (True, False),
        (False, True),
    ]
    model.eval()
    with torch.no_grad():  # torch.nn would take its fast path, which skips the modules
        close([model(x)], expected[:1])
    assert len(calls) == 6
    assert len(mk.unpatch(model).replaced) == len(report.replaced)
    with sdpa_kernel(SDPBackend.MATH):
        close(results(model.train(), x), expected)


def test_an_encoder_of_other_layers_is_left() -> None:
    class Layer(nn.TransformerEncoderLayer):
        pass

    model = nn.TransformerEncoder(Layer(4, 2, batch_first=True), 1, enable_nested_tensor=False)
    left = mk.patch(model).left
    assert left[0] == ("", "torch.nn.TransformerEncoder", "its layers must be torch.nn's, got Layer")
    assert left[1].why == "a subclass, which may compute something else"
    assert type(model) is nn.TransformerEncoder


def test_the_report_has_a_line_for_each_kind_of_module() -> None:
    block = nn.ModuleDict({"norm": nn.LayerNorm(4), "rnn": nn.LSTM(4, 4, proj_size=2)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([copy.deepcopy(block) for _ in range(12)]), "norm": nn.LayerNorm(4)})
    assert str(mk.patch(model)).splitlines() == [
        "13 replaced, 12 left",
        "  blocks.*.norm, norm  13 x torch.nn.LayerNorm -> metakern.nn.LayerNorm",
        "  blocks.*.rnn         12 x torch.nn.LSTM left: proj_size must be 0, got 2",
    ]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_autocast_gives_the_results_of_the_unpatched_model() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation=F.gelu, batch_first=True)
    model, x = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.RMSNorm(8), nn.SiLU()), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        mk.patch(model)
        torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)
    assert model(x).dtype == expected.dtype == torch.float32


def test_activations_in_place_stay_in_place() -> None:
    model, x = nn.SiLU(inplace=True), torch.randn(3)
    expected = F.silu(x)
    mk.patch(model)
    assert model(x) is x
    assert torch.equal(x, expected)


def test_models_that_are_no_module_are_errors() -> None:
    for f, name in ((mk.patch, "patch"), (mk.unpatch, "unpatch")):
        with pytest.raises(TypeError, match=rf"^{name}: model must be a torch.nn.Module, got list$"):
            f([nn.LSTM(1, 1)])  # type: ignore[arg-type]


def test_compiled_and_quantized_models_are_errors() -> None:
    message = r"^patch: model must not be compiled, got a compiled one: patch it first, then compile it$"
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=message):
        mk.patch(nn.Sequential(torch.compile(model)))
    model.compile()
    with pytest.raises(ValueError, match=message):
        mk.patch(model)
    quantized = nn.Linear(1, 1)
    quantized.is_quantized = True  # as transformers marks it
    with pytest.raises(ValueError, match=r"^patch: model must not be quantized, got a Linear that is$"):
        mk.patch(quantized)
