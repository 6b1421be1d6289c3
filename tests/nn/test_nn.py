"""metakern.nn: the state dicts, calls and outputs of torch.nn, and exact second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import metakern as mk

RECURRENT = {
    "rnn": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
SHAPES = [
    {},
    {"batch_first": True},
    {"num_layers": 3, "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return a module of metakern.nn and the one of torch.nn, with equal random parameters in float64."""
    torch.manual_seed(3)
    theirs = getattr(nn, name)(*args, **kwargs).double()
    ours = getattr(mk.nn, name)(*args, **kwargs).double()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_backward(module: nn.Module, *args: Tensor, **kwargs: Any) -> list[Tensor]:
    """Return outputs, derivatives by parameters and inputs, and derivatives of a random linear function of those."""
    args = tuple(a.clone().requires_grad_() for a in args)
    wrt = [*module.parameters(), *args]
    outputs = [o for o in tree_leaves(module(*args, **kwargs)) if o is not None]
    loss = sum((draw(*o.shape, seed=i) * o * o).sum() for i, o in enumerate(outputs))
    g = torch.autograd.grad(loss, wrt, create_graph=True)
    product = sum((draw(*gi.shape, seed=i) * gi).sum() for i, gi in enumerate(g))
    return [*outputs, *g, *torch.autograd.grad(product, wrt)]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("cell", RECURRENT)
def test_recurrent_equals_torch_to_second_order(cell: str, options: dict) -> None:
    name, extra = RECURRENT[cell]
    ours, theirs = pair(name, 3, 4, **extra, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    close(double_backward(ours, draw(2, 5, 3)), double_backward(theirs, draw(2, 5, 3)))


@pytest.mark.parametrize("cell", RECURRENT)
def test_initial_state_and_sequences_without_a_batch(cell: str) -> None:
    name, extra = RECURRENT[cell]
    ours, theirs = pair(name, 3, 4, num_layers=2, bidirectional=True, **extra)
    for shape, state in (((5, 2, 3), (4, 2, 4)), ((5, 3), (4, 4))):
        hx: Any = draw(*state, seed=6)
        hx = (hx, draw(*state, seed=7)) if cell == "lstm" else hx
        for arguments in ((draw(*shape), hx), (draw(*shape),)):
            close(tree_leaves(ours(*arguments)), tree_leaves(theirs(*arguments)))


@pytest.mark.parametrize("lengths", [[3, 5, 1, 5], [5, 4, 4, 1]], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("cell", RECURRENT)
def test_packed_sequences_equal_torch_to_second_order(cell: str, lengths: list[int]) -> None:
    name, extra = RECURRENT[cell]
    ours, theirs = pair(name, 3, 4, num_layers=2, bidirectional=True, **extra)
    is_sorted = lengths == sorted(lengths, reverse=True)
    seen: list[PackedSequence] = []

    class Padded(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, *hx: Tensor) -> Any:
            packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=is_sorted)
            y, final = self.inner(packed, *((hx,) if len(hx) == 2 else hx))
            seen.append(y)
            return pad_packed_sequence(y)[0], final

    states = [draw(4, 4, 4, seed=6), draw(4, 4, 4, seed=7)][: 1 + (cell == "lstm")]
    for hx in ([], states):
        x = draw(4, 5, 3)
        close(double_backward(Padded(ours), x, *hx), double_backward(Padded(theirs), x, *hx))
        mine, expected = seen
        assert all((a is None) == (b is None) for a, b in zip(mine, expected, strict=True))
        close([t for t in mine if t is not None], [t for t in expected if t is not None])
        seen.clear()


class Tagger(nn.Module):
    """A model that packs its sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mk.nn.GRU(3, 4, batch_first=True)
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.inner(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.outer(y)


def test_a_model_that_packs_its_sequences_has_an_exact_meta_gradient() -> None:
    torch.manual_seed(0)
    model = Tagger().double()

    def loss(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        return ((model(*batch[:2]) - batch[2]) ** 2).mean()

    lengths = torch.tensor([[3, 1], [5, 2], [1, 5]])
    support, query = ((draw(3, 2, 5, 3, seed=i), lengths, draw(3, 2, 5, 2, seed=i + 1)) for i in (1, 3))
    maml = mk.MAML(model, loss, inner=mk.optim.SGD(lr=0.3), steps=2)
    maml(support, query).backward()
    assert maml.plan.batching == "loop"
    assert any("fold is not possible: FoldError: GRU must be given a padded batch" in r for r in maml.plan.reasons)

    theta, total = dict(model.named_parameters()), torch.zeros(()).double()
    for t in range(3):
        phi, tasks = theta, [tuple(tensor[t] for tensor in batch) for batch in (support, query)]
        for batch in (tasks[0], tasks[0], tasks[1]):
            value = loss(lambda *args, phi=phi: functional_call(model, phi, args), batch)
            g = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            phi = {n: p - 0.3 * gi for (n, p), gi in zip(phi.items(), g, strict=True)}
        total = total + value / 3
    close([p.grad for p in theta.values()], list(torch.autograd.grad(total, list(theta.values()))))


@pytest.mark.parametrize("cell", RECURRENT)
def test_a_state_dict_of_torch_gives_its_outputs_in_float32(cell: str) -> None:
    name, extra = RECURRENT[cell]
    options = {"num_layers": 2, "bidirectional": True, **extra}
    ours, theirs = getattr(mk.nn, name)(17, 33, **options), getattr(nn, name)(17, 33, **options)
    ours.load_state_dict(theirs.state_dict())
    x = draw(9, 5, 17).float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-6, atol=2e-6)


def test_dropout_between_layers_only_in_training() -> None:
    ours, _ = pair("LSTM", 3, 64, num_layers=2, dropout=0.5, batch_first=True)
    x = draw(2, 5, 3)
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])
    ours.train()
    torch.manual_seed(0)
    first = ours(x)
    assert not torch.equal(first[0], ours(x)[0])
    torch.manual_seed(0)
    assert torch.equal(first[0], ours(x)[0])
    assert torch.equal(first[1][0][0], ours(x)[1][0][0]), "the first layer's state must see no dropout"


@pytest.mark.parametrize("cell", RECURRENT)
def test_hessian_vector_products_under_vmap_equal_a_loop(cell: str) -> None:
    """Forward over reverse through functional_call, with the parameters of each task."""
    name, extra = RECURRENT[cell]
    module, _ = pair(name, 3, 4, batch_first=True, **extra)
    before = [p.detach().clone() for p in module.parameters()]
    theta = {n: draw(3, *p.shape, seed=i) for i, (n, p) in enumerate(module.named_parameters())}
    v = {n: draw(*p.shape, seed=20 + i) for i, (n, p) in enumerate(theta.items())}
    x = draw(3, 2, 5, 3)

    def hvp(phi: dict, v: dict, x: Tensor) -> dict:
        return jvp(grad(lambda p: (functional_call(module, p, (x,))[0] ** 2).sum()), (phi,), (v,))[1]

    mapped = vmap(hvp)(theta, v, x)
    for t in range(3):
        one = hvp({n: p[t] for n, p in theta.items()}, {n: p[t] for n, p in v.items()}, x[t])
        close([m[t] for m in mapped.values()], list(one.values()))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("cell", RECURRENT)
def test_layers_run_with_the_weights_of_each_task(cell: str) -> None:
    name, extra = RECURRENT[cell]
    module, _ = pair(name, 3, 4, num_layers=2, bidirectional=True, batch_first=True, **extra)
    theta = {n: draw(3, *p.shape, seed=i) for i, (n, p) in enumerate(module.named_parameters())}
    x = draw(3, 2, 5, 3)
    y, states = mk.nn.recurrent.run(module, x, None, theta.__getitem__)
    for t in range(3):
        expected, final = functional_call(module, {n: p[t] for n, p in theta.items()}, (x[t],))
        final = final if cell == "lstm" else (final,)
        close([y[t], *(s[:, t] for s in states)], [expected, *final])


def test_recurrent_layers_refuse_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"^LSTM: proj_size must be 0, got 2$"):
        mk.nn.LSTM(3, 4, proj_size=2)
    gru = mk.nn.GRU(3, 4)
    with pytest.raises(TypeError, match=r"^GRU: input must be a tensor or a PackedSequence, got list$"):
        gru([torch.zeros(2, 3)])
    with pytest.raises(
        ValueError, match=r"^GRU: input must have 2 or 3 dimensions, the last of size 3, got \[1, 2, 5\]$"
    ):
        gru(pack_sequence([torch.zeros(2, 5)]))
    with pytest.raises(ValueError, match=r"^GRU: input must have 2 or 3 dimensions, the last of size 3, got \[2, 5\]$"):
        gru(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"^GRU: hx must have shape \[1, 2, 4\], got \[1, 3, 4\]$"):
        gru(torch.zeros(5, 2, 3), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"^GRU: hx must have shape \[1, 4\], got \[4\]$"):
        gru(torch.zeros(5, 3), torch.zeros(4))
    with pytest.raises(TypeError, match=r"^GRU: hx must be a tensor, got tuple$"):
        gru(torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
    with pytest.raises(TypeError, match=r"^LSTM: hx must be a pair \(h, c\) of tensors, got Tensor$"):
        mk.nn.LSTM(3, 4)(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match=r"^GRU: input must be floating point, got torch.int64$"):
        gru(torch.zeros(5, 2, 3, dtype=torch.int64))


@pytest.mark.parametrize("cell", RECURRENT)
def test_sequences_of_no_steps_and_batches_of_no_sequences(cell: str) -> None:
    name, extra = RECURRENT[cell]
    ours, _ = pair(name, 3, 4, num_layers=2, bidirectional=True, **extra)
    hx: Any = draw(4, 2, 4)
    y, final = ours(draw(0, 2, 3), (hx, hx) if cell == "lstm" else hx)
    assert y.shape == (0, 2, 8)
    assert all(torch.equal(state, hx) for state in tree_leaves(final))
    y, final = ours(draw(5, 0, 3))
    assert y.shape == (5, 0, 8)
    assert all(state.shape == (4, 0, 4) for state in tree_leaves(final))


@pytest.mark.parametrize("cell", RECURRENT)
def test_recurrent_layers_refuse_other_devices_and_dtypes(cell: str) -> None:
    name, extra = RECURRENT[cell]
    module, x, op = getattr(mk.nn, name)(3, 4, **extra), torch.zeros(5, 2, 3), name.lower()
    with pytest.raises(ValueError, match=rf"^{op}: w_ih must be on meta like the other arguments, got cpu$"):
        module(x.to("meta"))
    with pytest.raises(TypeError, match=rf"^{op}: w_ih must have the dtype torch.float64 .*, got torch.float32$"):
        module(x.double())
    for hx, error, message in (
        (torch.zeros(1, 2, 4, device="meta"), ValueError, "h must be on cpu like the other arguments, got meta"),
        (torch.zeros(1, 2, 4).double(), TypeError, "h must have the dtype torch.float32 .*, got torch.float64"),
        (torch.zeros(1, 2, 4).long(), TypeError, "h must be floating point, got torch.int64"),
    ):
        with pytest.raises(error, match=rf"^{op}: {message}"):
            module(x, (hx, hx) if cell == "lstm" else hx)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("name", "shape"), [("LayerNorm", 6), ("LayerNorm", (2, 3)), ("RMSNorm", 6), ("RMSNorm", (2, 3))]
)
def test_norms_equal_torch_to_second_order(name: str, shape: Any, affine: bool) -> None:
    ours, theirs = pair(name, shape, eps=0.1, elementwise_affine=affine)
    sizes = (6,) if shape == 6 else shape
    close(double_backward(ours, draw(4, 5, *sizes)), double_backward(theirs, draw(4, 5, *sizes)))
    with pytest.raises(ValueError, match=rf"^{name}: input must have shape .*, got \[4, 7\]$"):
        ours(draw(4, 7))


def test_layer_norm_without_a_bias() -> None:
    ours, theirs = pair("LayerNorm", 6, bias=False)
    close(double_backward(ours, draw(4, 6)), double_backward(theirs, draw(4, 6)))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A list of the options of each call of `mk.ops.attention`."""
    calls: list[dict] = []
    op = mk.ops.attention

    def counted(*args: Tensor, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(mk.ops, "attention", counted)
    return calls


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.inner(x, x, x, **options)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [True, False, False, True, True]])


@pytest.mark.parametrize(
    ("kwargs", "is_fused"),
    [
        ({"need_weights": False}, True),
        ({"need_weights": False, "attn_mask": CAUSAL, "is_causal": True}, True),
        ({"need_weights": False, "attn_mask": CAUSAL}, False),
        ({"attn_mask": CAUSAL, "average_attn_weights": False}, False),
        ({"key_padding_mask": PADDING}, False),
        ({"need_weights": False, "key_padding_mask": PADDING}, True),
        ({"need_weights": False, "key_padding_mask": PADDING, "attn_mask": CAUSAL, "is_causal": True}, True),
        ({"need_weights": False, "key_padding_mask": torch.where(PADDING, -torch.inf, 0.5).double()}, False),
        ({"attn_mask": draw(8, 5, 5)}, False),
        ({}, False),
    ],
    ids=str,
)
def test_attention_equals_torch_to_second_order(kwargs: dict, is_fused: bool, fused: list[dict]) -> None:
    for batch_first in (True, False):
        ours, theirs = pair("MultiheadAttention", 8, 4, batch_first=batch_first)
        x = draw(2, 5, 8) if batch_first else draw(5, 2, 8)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = double_backward(SelfAttention(theirs), x, **kwargs)
        close(double_backward(SelfAttention(ours), x, **kwargs), expected)
    assert len(fused) == (2 if is_fused else 0)
    for call in fused:
        mask = call.pop("mask")
        assert call == {"causal": kwargs.get("is_causal", False)}
        assert mask is None if "key_padding_mask" not in kwargs else torch.equal(mask, ~PADDING)


def test_cross_attention_of_other_widths_and_without_a_batch() -> None:
    ours, theirs = pair("MultiheadAttention", 8, 2, kdim=3, vdim=5, bias=False, batch_first=True)
    arguments = draw(2, 4, 8), draw(2, 6, 3), draw(2, 6, 5)
    for need_weights in (True, False):
        for index in (slice(None), 0):
            batch = [a[index] for a in arguments]
            a, e = ours(*batch, need_weights=need_weights), theirs(*batch, need_weights=need_weights)
            close([t for t in a if t is not None], [t for t in e if t is not None])


def test_attention_dropout_only_in_training(fused: list[dict]) -> None:
    ours, _ = pair("MultiheadAttention", 8, 2, dropout=0.5)
    x = draw(5, 2, 8)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
    assert not fused
    ours.eval()
    assert torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
    assert len(fused) == 2


def test_a_query_that_sees_no_key_gives_the_output_bias() -> None:
    ours, _ = pair("MultiheadAttention", 8, 2, batch_first=True)
    x = draw(2, 5, 8)
    y, weights = ours(x, x, x, key_padding_mask=torch.tensor([[True] * 5, [False] * 5]))
    assert torch.equal(weights[0], torch.zeros(5, 5).double())
    close([y[0]], [ours.out_proj.bias.expand(5, 8)])
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), list(ours.parameters())))


def test_attention_refuses_wrong_arguments() -> None:
    for name in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match=rf"^MultiheadAttention: {name} must be False, got True$"):
            mk.nn.MultiheadAttention(4, 2, **{name: True})
    ours, _ = pair("MultiheadAttention", 8, 2, batch_first=True)
    x = draw(2, 5, 8)
    with pytest.raises(ValueError, match=r"^MultiheadAttention: key must have 2 or 3 dimensions .*, got \[2, 5, 7\]$"):
        ours(x, x[..., :7], x)
    with pytest.raises(ValueError, match=r"^MultiheadAttention: attn_mask must have shape \[5, 5\], got \[4, 5\]$"):
        ours(x, x, x, attn_mask=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"^MultiheadAttention: attn_mask must have shape \[5, 5\], got \[7, 7\]$"):
        ours(x, x, x, attn_mask=torch.zeros(7, 7), is_causal=True, need_weights=False)
    with pytest.raises(
        ValueError, match=r"^MultiheadAttention: key_padding_mask must have shape \[2, 5\], got \[2, 4\]$"
    ):
        ours(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^MultiheadAttention: key must have the length 4 of query where is_causal"):
        ours(x[:, :4], x, x, is_causal=True, need_weights=False)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_a_new_transformer_layer_is_exact_to_second_order(name: str) -> None:
    layer = getattr(mk.nn, name)(8, nhead=2, dim_feedforward=6, dropout=0.0, batch_first=True, activation="gelu")
    theirs = getattr(nn, name)(8, nhead=2, dim_feedforward=6, dropout=0.0, batch_first=True, activation="gelu")
    theirs.load_state_dict(layer.state_dict())
    x = draw(2, 3, 8).requires_grad_()
    inputs = (x,) if "Encoder" in name else (x, x)
    torch.testing.assert_close(layer.double()(*inputs), theirs.double()(*inputs))
    assert torch.autograd.gradgradcheck(lambda x: layer(*[x] * len(inputs)), x, atol=1e-4)


def test_modules_on_the_meta_device() -> None:
    x = torch.zeros(2, 3, 4, device="meta")
    for module in (mk.nn.Linear(4, 4), mk.nn.LayerNorm(4), mk.nn.MultiheadAttention(4, 2)):
        with torch.autocast("cpu", torch.bfloat16):
            y = module.to("meta")(*[x] * (3 if isinstance(module, nn.MultiheadAttention) else 1))
        assert tree_leaves(y)[0].shape == x.shape
