"""Models, losses and batches that many tests share, and their meta-gradient by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import metakern as mk

T, B, L, V = 3, 2, 6, 17


class Functional:
    """A model that is called with the parameters `phi`, by `functional_call`."""

    def __init__(self, model: nn.Module, phi: dict[str, Tensor]) -> None:
        self.model, self.phi = model, phi

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.phi, args, kwargs)


Update = Callable[[dict[str, Tensor], dict[str, Tensor], int], dict[str, Tensor]]


def sgd(lr: float) -> Update:
    return lambda phi, grads, step: {name: p - lr * grads[name] for name, p in phi.items()}


def plain_loss(
    model: nn.Module,
    loss: Callable,
    support: Any,
    query: Any,
    steps: int,
    update: Update,
    adapted: Callable[[str], bool] = lambda name: True,
    first_order: bool = False,
) -> Tensor:
    """Return the mean query loss over tasks, with its whole graph; tasks are computed one by one.

    `update(phi, grads, step)` returns the next parameters; `adapted(name)` says whether the inner loop changes one.
    """
    tasks, total = len(torch.utils._pytree.tree_leaves(support)[0]), 0.0
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):
        for t in range(tasks):
            phi = {name: p for name, p in theta.items() if adapted(name)}
            for step in range(steps):
                value = loss(Functional(model, phi), tree_map(lambda a, t=t: a[t], support))
                grads = torch.autograd.grad(
                    value, list(phi.values()), create_graph=not first_order, allow_unused=True, materialize_grads=True
                )
                phi = update(phi, dict(zip(phi, grads, strict=True)), step)
            total = total + loss(Functional(model, phi), tree_map(lambda a, t=t: a[t], query)) / tasks
    return total


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Return copies of the gradients of `value` by parameter name, without those that are None."""
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Assert that the relative error of each tensor is at most `tolerance`; a missing tensor counts as zero."""
    for name in {**found, **truth}:
        right = truth.get(name, torch.zeros_like(found.get(name, torch.zeros(()))))
        ours = found.get(name, torch.zeros_like(right))
        assert (ours - right).norm() <= tolerance * max(right.norm(), 1e-3), name


def tokens_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(batch["input_ids"])
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Return token batches [T, B, L] in which task t has its first t + 1 labels set to -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (T, B, L), generator=generator)
    labels = ids.clone()
    for t in range(T):
        labels[t, :, : t + 1] = -100
    return {"input_ids": ids, "labels": labels}


def regression_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def points(seed: int = 0, outputs: int = 3) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return (
        torch.randn(T, 4, 5, generator=make, dtype=torch.float64),
        torch.randn(T, 4, outputs, generator=make, dtype=torch.float64),
    )


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 6)
        self.rnn = cell(6, 5, batch_first=True, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class TinyGPT(nn.Module):
    """A GPT with learned positions, a tied head, a parameter and a buffer at the root, and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, 8), nn.Embedding(L, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, V, bias=False)
        self.head.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        return self.head(self.norm(self.encoder(x, mask, is_causal=True))) * self.scale + self.shift


class Foldable(nn.Module):
    """The layers of a `TinyGPT` without the parameter and the buffer at the root: every parameter is in a submodule."""

    def __init__(self, model: TinyGPT) -> None:
        super().__init__()
        self.tokens, self.positions, self.encoder = model.tokens, model.positions, model.encoder
        self.norm, self.head = model.norm, model.head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])[None])
        return self.head(self.norm(self.encoder(x)))


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V,
            n_positions=L,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_implementation="eager",
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",  # eager attention computes its softmax in float32
    )
    model = transformers.LlamaForCausalLM(config)
    for block in model.model.layers:  # Llama's own norms compute in float32, so that exact results differ by rounding
        block.input_layernorm, block.post_attention_layernorm = nn.RMSNorm(8, 1e-6), nn.RMSNorm(8, 1e-6)
    model.model.norm = nn.RMSNorm(8, 1e-6)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


# By name: the model, its loss, its batches, and the batchings that are exact for it.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable, Callable, tuple[str, ...]]] = {
    "mlp": (mlp, regression_loss, points, ("fold", "vmap", "loop")),
    "lstm": (lambda: Recurrent(nn.LSTM), tokens_loss, tokens, ("fold", "loop")),
    "gru-2": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), tokens_loss, tokens, ("fold", "loop")),
    "mk-rnn": (lambda: Recurrent(mk.nn.RNN), tokens_loss, tokens, ("fold", "vmap", "loop")),
    "gpt": (TinyGPT, tokens_loss, tokens, ("fold", "vmap", "loop")),
    "gpt-folded": (lambda: Foldable(TinyGPT()), tokens_loss, tokens, ("fold", "vmap", "loop")),
    "hf-gpt2": (lambda: hugging_face("gpt2"), tokens_loss, tokens, ("fold", "vmap", "loop")),
    "hf-llama": (lambda: hugging_face("llama"), tokens_loss, tokens, ("fold", "vmap", "loop")),
}


def build(name: str) -> tuple[nn.Module, Callable, Any, Any, tuple[str, ...]]:
    """Return a model of `MODELS` in float64, its loss, support, query, and the batchings that are exact for it."""
    make, loss, batch, batchings = MODELS[name]
    torch.manual_seed(1)
    return make().double(), loss, batch(1), batch(2), batchings


# Each model of this file with each batching that is exact for it.
KINDS = [(name, batching) for name, entry in MODELS.items() for batching in entry[3] if not name.startswith("hf")]


def calls_of(maml: mk.MAML) -> list[int]:
    """Return a list that gets an entry whenever `maml` computes a chunk without a captured program."""
    calls: list[int] = []
    run = maml._meta_gradient

    def counted(*args: Any) -> Any:
        calls.append(1)
        return run(*args)

    maml._meta_gradient = counted  # type: ignore[method-assign]
    return calls
