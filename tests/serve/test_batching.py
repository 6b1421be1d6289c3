"""Continuous batching: each reply is what its model gives alone, however many others come and go."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from metakern.dialogue.generate import generate
from metakern.dialogue.models import build_model
from metakern.serve.engine import Engine, FullError, Request, Resident
from metakern.serve.sampling import draw

EOS, LENGTH = 3, 24
SIZES = {"gpt": {"width": 16, "heads": 2, "layers": 2, "max_length": LENGTH}}


def make(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = SIZES.get(name, {"embedding": 8, "hidden": 12, "layers": 2})
    model = build_model(name, 30, **sizes).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # so that logits differ more
    return model


@contextmanager
def running(model: torch.nn.Module, **options: int) -> Iterator[Engine]:
    engine = Engine(model, **{"rows": 3, "waiting": 100, "eos_id": EOS} | options)
    try:
        yield engine
    finally:
        engine.close()


class Listener:
    """Collects what a request emits."""

    def __init__(self) -> None:
        self.news: queue.Queue[tuple[list[int], str | None]] = queue.Queue()

    def __call__(self, ids: list[int], reason: str | None) -> None:
        self.news.put((list(ids), reason))

    def result(self) -> tuple[list[int], str]:
        ids, reason = [], None
        while reason is None:
            new, reason = self.news.get(timeout=20)
            ids += new
        return ids, reason


def request(resident: Resident, prompt: list[int], **options: object) -> Request:
    return Request(resident, prompt, emit=Listener(), **{"max_new_tokens": 8, "temperature": 0.0} | options)


def resident(engine: Engine, model: torch.nn.Module) -> Resident:
    return Resident(engine.stack.flat(dict(model.named_parameters())))


@pytest.mark.parametrize("name", ["gpt", "gru"])
def test_replies_of_many_users_in_few_rows_are_those_of_each_alone(name):
    models = [make(name, seed) for seed in range(4)]
    draws = torch.Generator().manual_seed(1)
    with running(models[0]) as engine:
        residents = [resident(engine, model) for model in models]
        asked = []
        for i in range(20):
            prompt = torch.randint(30, (1 + i % 7,), generator=draws).tolist()
            asked.append((i % 4, request(residents[i % 4], prompt, max_new_tokens=1 + i % 9, stream=bool(i % 2))))
        for _, each in asked:
            engine.submit([each])
        for who, each in asked:
            ids, reason = each.emit.result()
            options = {"max_new_tokens": each.max_new_tokens, "temperature": 0, "eos_id": EOS}
            assert ids == generate(models[who], each.prompt, **options)
            assert reason == ("length" if len(ids) == each.max_new_tokens else "stop")
        assert engine.steps < sum(1 + each.max_new_tokens for _, each in asked) / 2


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_a_conversation_reads_only_what_is_new(name):
    model = make(name)
    with running(model) as engine:
        own, read = resident(engine, model), []
        advance = engine._advance
        engine._advance = lambda rows, new, begin: (read.append(sum(map(len, new))), advance(rows, new, begin))
        ids, prompt = [], [5, 6, 7]
        for said in ([8, 9], [10], [11, 12]):
            prompt = [*prompt, *ids, *said]
            each = request(own, prompt, max_new_tokens=3)
            engine.submit([each])
            ids, _ = each.emit.result()
            assert ids == generate(model, prompt, max_new_tokens=3, temperature=0, eos_id=EOS)
        assert max(read[1:]) <= 3  # the last id of the reply, and what was said
        read.clear()
        changed = request(own, [*prompt[:4], 20, 21], max_new_tokens=3)
        engine.submit([changed])
        expected = generate(model, changed.prompt, max_new_tokens=3, temperature=0, eos_id=EOS)
        assert changed.emit.result()[0] == expected
        assert read[0] == (2 if name == "gpt" else 6)  # a state can't go back to the fourth token


def test_a_row_that_another_reply_has_filled_gets_its_weights_again():
    models = [make("gpt", seed) for seed in range(2)]
    expected = [generate(model, [5, 6], max_new_tokens=8, temperature=0, eos_id=EOS) for model in models]
    assert expected[0][0] != expected[1][0]
    with running(models[0]) as engine:
        ann, bob = (resident(engine, model) for model in models)
        for pairs in ([(ann, 1), (bob, 4)], [(ann, 8)], [(bob, 8)]):
            asked = [request(own, [5, 6], max_new_tokens=length) for own, length in pairs]
            engine.submit(asked)
            for (own, length), each in zip(pairs, asked, strict=True):
                assert each.emit.result()[0] == expected[own is bob][:length]


def test_a_seed_repeats_a_reply_whoever_else_is_in_the_batch():
    model = make("gpt")
    with running(model) as engine:
        own = resident(engine, model)

        def reply(*others: list[int]) -> list[int]:
            each = request(own, [5, 6], temperature=1.5, top_p=0.9, seed=7)
            rest = [request(Resident(own.weights), prompt, temperature=1.5) for prompt in others]
            engine.submit([*rest[:1], each, *rest[1:]])
            return [each.emit.result()[0], *(other.emit.result() for other in rest)][0]

        assert reply() == reply([9], [10, 11]) == reply([1, 2, 3])


def test_a_model_that_diverged_ends_its_own_reply_alone():
    model = make("gpt")
    with running(model) as engine:
        own, bad = resident(engine, model), Resident(torch.full_like(engine.stack.base, torch.nan))
        asked = [request(bad, [5, 6]), request(own, [5, 6])]
        engine.submit(asked)
        assert asked[0].emit.result() == ([], "diverged")
        expected = generate(model, [5, 6], max_new_tokens=8, temperature=0, eos_id=EOS)
        assert asked[1].emit.result()[0] == expected
        again = [request(own, [5, 6]) for _ in range(3)]
        engine.submit(again)
        assert [each.emit.result()[0] for each in again] == [expected] * 3


def test_full_queues_errors_and_the_end_are_told(monkeypatch):
    model = make("gpt")
    with running(model, waiting=2) as engine:
        own = resident(engine, model)
        with pytest.raises(FullError):
            engine.submit([request(own, [5]) for _ in range(3)])
        for broken in ("metakern.serve.engine.draw", "metakern.serve.engine.Engine._reusable"):
            monkeypatch.setattr(broken, lambda *args: 1 / 0)
            failing = [request(own, [5]) for _ in range(2)]
            engine.submit(failing)
            assert [each.emit.result() for each in failing] == [([], "failed")] * 2
            monkeypatch.undo()
        working = request(own, [5])
        engine.submit([working])
        assert working.emit.result()[1] in ("stop", "length")
    with pytest.raises(FullError):
        engine.submit([request(own, [5])])


def test_draws_have_the_probabilities_of_the_kept_tokens():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(1000, 1)
    uniforms = torch.linspace(0, 1, 1001)[:1000].tolist()
    for top_p, expected in ((1.0, [500, 300, 150, 50]), (0.8, [625, 375, 0, 0]), (0.81, [526, 316, 158, 0])):
        tokens = draw(logits, [1.0] * 1000, [top_p] * 1000, uniforms)
        counts = [tokens.count(i) for i in range(4)]
        assert counts == pytest.approx(expected, abs=2)
    assert draw(logits[:2].flip(1), [0.0, 0.0], [1.0, 1.0], [0.9, 0.9]) == [3, 3]
    hot = draw(logits, [2.0] * 1000, [1.0] * 1000, uniforms)
    roots = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    assert [hot.count(i) for i in range(4)] == pytest.approx((1000 * roots / roots.sum()).tolist(), abs=2)
