"""Baselines: soft prompts and the support as context, and every algorithm through training and evaluation."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config, write_tasks

import metakern as mk
from metakern.dialogue.baselines import FineTune, InContext, PromptTuning, Retrieval
from metakern.dialogue.chat import adapt
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.models import build_model
from metakern.dialogue.registry import build_algorithm, build_model_of
from metakern.dialogue.trainer import train
from metakern.errors import UserError
from metakern.meta.algorithms.registry import ALGORITHMS


def batch(tasks: int, windows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Return token batches in which window i of task t has its last (i + t) % 3 tokens padded."""
    ids = torch.randint(1, 20, (tasks, windows, length), generator=torch.Generator().manual_seed(seed))
    padding = (torch.arange(windows) + torch.arange(tasks)[:, None]) % 3
    mask = torch.arange(length) < (length - padding)[..., None]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@pytest.mark.parametrize("make", [FineTune, PromptTuning])
def test_plain_training_counts_every_token_and_adapts_as_maml(make: type[FineTune]) -> None:
    model = build_model("gru", 20, embedding=8, hidden=8).double()
    support, query = batch(3, 2, 6, 1), batch(3, 4, 6, 2)
    options = {"inner": mk.optim.SGD(0.5), "steps": 2}
    algorithm = make(model, mk.losses.causal_lm, **options | ({"length": 3} if make is PromptTuning else {}))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in (support, query):
        for ids, labels in zip(part["input_ids"].flatten(0, 1), part["labels"].flatten(0, 1), strict=True):
            logits = algorithm.trained(ids[None])[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            count += int((labels[1:] >= 0).sum())
    torch.testing.assert_close(algorithm(support, query), total / count)
    assert algorithm.counted == count
    assert algorithm.model is model
    maml = mk.MAML(algorithm.trained, mk.losses.causal_lm, adapt=None if make is FineTune else ["prompt"], **options)
    torch.testing.assert_close(algorithm.evaluate(support, query), maml.evaluate(support, query))
    torch.testing.assert_close(algorithm.adapt_trained(support), maml.adapt(support))
    if make is PromptTuning:
        assert algorithm.trained.prompt.shape == (3, 8)
        assert PromptTuning(model, mk.losses.causal_lm).trained.prompt.shape == (8, 8)
        with pytest.raises(UserError, match="adapt: prompt and incontext leave"):
            algorithm.adapt(support)


@pytest.mark.parametrize("name", ["gru", "gpt"])
def test_in_context_puts_the_tokens_of_the_support_before_each_query(name: str) -> None:
    sizes = {"width": 8, "heads": 2, "max_length": 64} if name == "gpt" else {"embedding": 8, "hidden": 8}
    model = build_model(name, 20, **sizes)
    support, query = batch(3, 2, 6, 1), batch(3, 4, 5, 2)
    algorithm = InContext(model, mk.losses.causal_lm)
    losses = algorithm.evaluate(support, query, (0, 3))
    assert losses.shape == (2, 3)
    assert not losses.requires_grad
    losses[1] = 0
    masks, counts = [], []
    spy = InContext(model, lambda model, batch: masks.append(batch["attention_mask"]) or torch.zeros(()))  # type: ignore[func-returns-value]
    spy.evaluate(support, query)
    for t in range(3):
        context = support["input_ids"][t][support["attention_mask"][t].bool()]
        assert masks[t][:, : len(context)].all()
        total, count = torch.zeros(()), 0
        for c in range(4):
            n = int(query["attention_mask"][t, c].sum())
            ids = torch.cat([context, query["input_ids"][t, c, :n]])
            logits = model(ids[None])[0, len(context) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[len(context) :], reduction="sum")
            count += n
        torch.testing.assert_close(losses[0, t], (total / count).detach())
        counts.append(count)
    mean = (losses[0] * torch.tensor(counts)).sum() / sum(counts)
    torch.testing.assert_close(algorithm(support, query).detach(), mean)
    assert algorithm.counted == sum(counts)
    algorithm(support, query).backward()
    assert all(p.grad is not None for p in model.parameters())
    if name == "gpt":  # the latest windows that fit
        expected = algorithm.evaluate({k: v[:, 1:] for k, v in support.items()}, query)
        model.max_length = 5 + 6
        torch.testing.assert_close(algorithm.evaluate(support, query), expected)
        assert not len(algorithm.context(support, 0, 12))
        other = InContext(SimpleNamespace(config=SimpleNamespace(max_position_embeddings=11)), mk.losses.causal_lm)
        assert torch.equal(other.context(support, 1, 5), algorithm.context(support, 1, 5))


@pytest.mark.parametrize("name", ["gru", "gpt"])
def test_a_soft_prompt_is_adapted_alone(name: str) -> None:
    sizes = {"width": 8, "heads": 2, "max_length": 64} if name == "gpt" else {"embedding": 8, "hidden": 8}
    prompted = mk.nn.SoftPrompt(build_model(name, 20, **sizes), 3).double()
    support, query = batch(2, 2, 6, 1), batch(2, 2, 6, 2)
    for b in (support, query):
        b["attention_mask"].fill_(1)
    at = lambda b, t: {k: v[t] for k, v in b.items()}  # noqa: E731
    total = torch.zeros((), dtype=torch.float64)
    for t in range(2):
        prompt = prompted.prompt
        for _ in range(2):
            phi = {"prompt": prompt}
            call = lambda *a, phi=phi, **k: torch.func.functional_call(prompted, phi, a, k)  # noqa: E731
            value = mk.losses.causal_lm(call, at(support, t))  # type: ignore[arg-type]
            prompt = prompt - 0.5 * torch.autograd.grad(value, prompt, create_graph=True)[0]
        call = lambda *a, phi=prompt, **k: torch.func.functional_call(prompted, {"prompt": phi}, a, k)  # noqa: E731
        total = total + mk.losses.causal_lm(call, at(query, t)) / 2  # type: ignore[arg-type]
    truth = torch.autograd.grad(total, list(prompted.parameters()))
    for strategy in ("store", "recompute"):
        maml = mk.MAML(
            prompted, mk.losses.causal_lm, mk.optim.SGD(0.5), 2, adapt=["prompt"], strategy=strategy, capture=False
        )
        found = torch.autograd.grad(maml(support, query), list(prompted.parameters()))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    logits = prompted(support["input_ids"][0])
    assert logits.shape == (2, 6, 20)
    assert sorted(maml.adapt(support)) == ["prompt"]


class Prompted(torch.nn.Module):
    """A small language model that says which of its embeddings is that of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.tokens = torch.nn.Embedding(20, 4), torch.nn.Embedding(20, 4)
        self.rnn, self.head = torch.nn.GRU(4, 5, batch_first=True), torch.nn.Linear(5, 20)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.tokens

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        x = self.tokens(ids)
        return self.read(x if attention_mask is None else x * attention_mask[..., None])

    def read(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.rnn(x)[0]))


def test_a_soft_prompt_is_read_before_the_embedded_tokens() -> None:
    torch.manual_seed(0)
    model, ids, mask = Prompted().double(), torch.randint(20, (2, 6)), torch.arange(6) < torch.tensor([[6], [4]])
    prompted, alone = mk.nn.SoftPrompt(model, 3), model(ids).logits
    for given in (None, mask.long()):
        x = model.tokens(ids) if given is None else model.tokens(ids) * given[..., None]
        expected = model.read(torch.cat([prompted.prompt.expand(2, -1, -1), x], 1)).logits[:, 3:]
        logits = prompted(ids, given)
        found = [(y, *torch.autograd.grad(y.logsumexp(-1).sum(), prompted.prompt)) for y in (logits, expected)]
        torch.testing.assert_close(*found)
        assert torch.equal(model(ids).logits, alone)
    prompted.model.float()
    assert prompted(ids).dtype == torch.float32
    model.tokens.forward = model.tokens.forward  # as a hook that replaces it
    prompted(ids)
    assert "forward" in model.tokens.__dict__


def test_a_soft_prompt_begins_as_embeddings_of_random_tokens() -> None:
    model = Prompted()
    for options, seed in (({}, 0), ({"seed": 5}, 5)):
        drawn = torch.randint(20, (9,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(mk.nn.SoftPrompt(model, 9, **options).prompt, model.tokens.weight[drawn])
    first = torch.nn.ModuleList([model.other, model.tokens])
    assert torch.equal(mk.nn.SoftPrompt(first, 9, 5).prompt, model.other.weight[drawn])


@pytest.mark.parametrize("options", [(), ("length=3",)])
def test_a_gpt_has_room_for_a_soft_prompt_before_the_longest_window(options: tuple[str, ...]) -> None:
    config = tiny_config("", model="gpt", algorithm="prompt", algorithm_options=options)
    model = build_model_of(config, SimpleNamespace(vocab_size=300))[0]  # type: ignore[arg-type]
    prompted = build_algorithm(config, model).trained
    assert prompted(torch.zeros(1, config.max_length, dtype=torch.long)).shape == (1, config.max_length, 300)


def test_soft_prompts_refuse_what_has_no_place_for_them() -> None:
    with pytest.raises(ValueError, match="must have an embedding of tokens"):
        mk.nn.SoftPrompt(torch.nn.Linear(2, 2), 3)
    for length in (0, True):
        with pytest.raises(ValueError, match=f"length must be an integer of at least 1, got {length}"):
            mk.nn.SoftPrompt(torch.nn.Embedding(2, 2), length)

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(9, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embedding(ids) + self.embedding(ids)

    with pytest.raises(ValueError, match="one call of its embedding, got 2"):
        mk.nn.SoftPrompt(Twice(), 3)(torch.zeros(1, 5, dtype=torch.long))
    unread = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(9, 4)})
    unread.forward = lambda ids: ids[..., None].float()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="one call of its embedding, got 0"):
        mk.nn.SoftPrompt(unread, 3)(torch.zeros(1, 5, dtype=torch.long))


def test_retrieval_picks_the_nearest_context_by_the_rarer_words() -> None:
    contexts = ["the red car is here", "the blue car is here", "the old house is blue", "what time is it?"]
    answer = Retrieval(contexts, ["red", "blue car", "house", "noon"])
    assert [answer(context) for context in contexts] == ["red", "blue car", "house", "noon"]
    assert answer("Is that house here?") == "house"  # "house" is in one context, "is" in all, "here" in two
    assert answer("TIME!") == "noon"
    weights = {"time": math.log(5 / 2) + 1, "what": math.log(5 / 2) + 1, "it": math.log(5 / 2) + 1, "is": 1.0}
    norm = math.sqrt(sum(weight**2 for weight in weights.values()))
    assert answer.vectors[3] == pytest.approx({word: weight / norm for word, weight in weights.items()})
    twice = Retrieval(["a a b"], [""]).vectors[0]
    assert twice == pytest.approx({"a": 2 / math.sqrt(5), "b": 1 / math.sqrt(5)})


def test_retrieval_takes_the_first_of_equally_near_contexts() -> None:
    contexts = ["zoo a b c", "a b c d e", "c b a e d", "a b c d e"]
    answer = Retrieval(contexts, ["0", "1", "2", "3"])
    assert {answer("a b c d e"), answer("e d c b a")} == {"1"}
    assert answer("nothing of this is known") == answer("") == "0"
    assert Retrieval(contexts[::-1], ["3", "2", "1", "0"])("a b c d e") == "3"
    for contexts, replies in (([], []), (["a"], ["b", "c"])):
        with pytest.raises(ValueError, match="Retrieval: replies must be as many as contexts, at least 1, got"):
            Retrieval(contexts, replies)


@pytest.mark.filterwarnings("ignore:IMAML")  # two inner steps reach no minimum
def test_every_algorithm_is_trained_and_compared(tmp_path) -> None:
    data = write_tasks(tmp_path / "data", tasks=20, dialogues=9)
    config = tiny_config(data, steps=2, pretrain_steps=2, eval_tasks=2)
    train(config, tmp_path / "run")
    names = tuple(name for name in ALGORITHMS if name != "maml")
    report = evaluate(tmp_path / "run", (0, 1), names)
    assert list(report["curves"]) == ["maml", *names]
    for curve in report["curves"].values():
        assert all(math.isfinite(value) for row in curve["loss"] for value in row)
    in_context = report["curves"]["incontext"]["loss"]
    assert in_context[0] == in_context[1]
    for name in ("prompt", "incontext"):
        with pytest.raises(UserError, match="adapt: prompt and incontext leave"):
            adapt(tmp_path / "run" / name, str(data), tmp_path / f"adapted-{name}")
    train(replace(config, algorithm="incontext"), tmp_path / "own")
    assert evaluate(tmp_path / "own", (0,))["curves"]["incontext"]["perplexity"][0] > 1
