"""`TextEncoder`: the mean over tokens, with padding, bodies of several kinds, and under both prototype algorithms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import assert_equal, gradients
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue.models import build_model

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [0, 0, 0, 0]])
MASK = (TOKENS > 0).long()
SIZES = {"gru": {"embedding": 6, "hidden": 8}, "gpt": {"width": 8, "heads": 2, "layers": 1}}


def encoder(name: str = "gru") -> Any:
    torch.manual_seed(0)
    return mk.nn.TextEncoder(build_model(name, 20, **SIZES[name])).double()


@pytest.mark.parametrize("name", ["gru", "gpt"])
def test_embeddings_are_means_over_tokens(name: str) -> None:
    text = encoder(name)
    found = text(TOKENS, MASK)
    states = text.body.hidden_states(TOKENS)
    torch.testing.assert_close(found[0], states[0].mean(0))
    torch.testing.assert_close(found[1], states[1, :2].mean(0))
    assert not found[2].any()
    torch.testing.assert_close(text(TOKENS[1:2, :2]), found[1:2])
    torch.testing.assert_close(text.body(TOKENS), text.body.head(states))


def test_hugging_face_encoders() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=20, **sizes)
    body = transformers.BertModel(config).eval()
    found = mk.nn.TextEncoder(body)(TOKENS[:2], MASK[:2])
    torch.testing.assert_close(found[1], body(TOKENS[1:2, :2]).last_hidden_state[0].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="got logits from BertForMaskedLM: pass the model without its head"):
        mk.nn.TextEncoder(transformers.BertForMaskedLM(config))(TOKENS, MASK)


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(TypeError, match=r"TextEncoder: body must be an nn.Module, got SimpleNamespace"):
        mk.nn.TextEncoder(SimpleNamespace())  # type: ignore[arg-type]

    class Flat(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.double()

    with pytest.raises(ValueError, match=r"TextEncoder: body must return hidden states \[B, L, D\], got \[3, 4\]"):
        mk.nn.TextEncoder(Flat())(TOKENS)


def texts(seed: int) -> dict[str, Tensor]:
    """Return a batch [T, N] of texts of 1 to 5 tokens; the last example is padding without tokens."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (2, 7, 5), generator=make)
    ids = ids.where(torch.arange(5) < torch.randint(1, 6, (2, 7, 1), generator=make), 0)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2, -100], [2, 1, 0, 0, 1, 1, -100]])
    ids[:, -1] = 0
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


@pytest.mark.parametrize("name", ["gru", "gpt"])
def test_protonet_of_texts_is_plain_autograd(name: str) -> None:
    text, support, query = encoder(name), texts(1), texts(2)
    found = gradients(text, mk.ProtoNet(text)(support, query))
    losses = []
    for t in range(2):
        x, q = (text(b["input_ids"][t, :6], b["attention_mask"][t, :6]) for b in (support, query))
        p = torch.stack([x[support["labels"][t, :6] == c].mean(0) for c in range(3)])
        losses.append(nn.functional.cross_entropy(-torch.cdist(q, p).square(), query["labels"][t, :6]))
    assert_equal(found, gradients(text, torch.stack(losses).mean()), 1e-9)


@pytest.mark.parametrize("name", ["gru", "gpt"])
def test_protomaml_of_texts_folds(name: str) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = encoder(name)
            self.head = nn.Linear(6 if name == "gru" else 8, 3).double()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.text(input_ids, attention_mask))

    model, support, query = Classifier(), texts(1), texts(2)
    found = []
    for batching, strategy in (("fold", "store"), ("loop", "recompute")):
        options = {"inner": mk.optim.SGD(lr=0.3), "steps": 2, "batching": batching, "strategy": strategy}
        protomaml = mk.ProtoMAML(model, mk.losses.classification, head="head", **options)
        found.append(gradients(model, protomaml(support, query)))
    assert_equal(*found, 1e-9)
    assert found[0]["text.body.embedding.weight"].any()
