"""Generation: the distribution of tokens, where it ends, and that it restores the modes of the model."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from metakern.dialogue.generate import Sampling, generate, greedy, stream, text_of_stream
from metakern.dialogue.models import build_model

P = torch.tensor([0.5, 0.25, 0.15, 0.1])


def fixed(ids):
    """A model that gives the probabilities `P` whatever it reads."""
    return P.log().expand(*ids.shape, 4)


def draws(n: int = 4000, **options) -> dict[int, float]:
    """Return the frequencies of n generated tokens."""
    generator = torch.Generator().manual_seed(1)
    counts = Counter(generate(fixed, [0], max_new_tokens=n, generator=generator, **options))
    return {token: count / n for token, count in sorted(counts.items())}


def test_tokens_are_drawn_with_their_probabilities():
    assert draws() == pytest.approx(dict(enumerate(P.tolist())), abs=0.03)
    warm = (P ** (1 / 2)) / (P ** (1 / 2)).sum()
    assert draws(temperature=2.0) == pytest.approx(dict(enumerate(warm.tolist())), abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, [0]), (0.5, [0]), (0.6, [0, 1]), (0.76, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(top_p, kept):
    expected = P[kept] / P[kept].sum()
    assert draws(top_p=top_p) == pytest.approx(dict(zip(kept, expected.tolist(), strict=True)), abs=0.03)


def test_a_generator_makes_the_tokens_reproducible():
    def run(seed: int) -> list[int]:
        return generate(fixed, [0], max_new_tokens=30, generator=torch.Generator().manual_seed(seed))

    assert run(3) == run(3) != run(4)


def test_generated_tokens_are_read_back_and_eos_ends_them():
    seen = []

    def next_is_sum(ids):
        seen.append(ids[0].tolist())
        return nn.functional.one_hot(ids.sum(-1, keepdim=True) % 7, 7).float() * 9

    assert generate(next_is_sum, torch.tensor([[1, 2]]), max_new_tokens=3, temperature=0) == [3, 6, 5]
    assert seen == [[1, 2], [1, 2, 3], [1, 2, 3, 6]]
    assert generate(next_is_sum, [1, 2], max_new_tokens=9, temperature=0, eos_id=6) == [3]
    assert generate(next_is_sum, [1, 2], max_new_tokens=0) == []


def test_a_module_is_in_eval_mode_while_it_generates_and_gets_its_modes_back():
    class Model(nn.Module):
        max_length = 2

        def __init__(self):
            super().__init__()
            self.weight, self.drop = nn.Parameter(torch.ones(3)), nn.Dropout(0.9)
            self.drop.eval()
            self.lengths = []

        def forward(self, ids):
            assert not self.training
            assert not torch.is_grad_enabled()
            self.lengths.append(ids.shape[1])
            return SimpleNamespace(logits=self.weight.expand(*ids.shape, 3))

    model = Model()
    generate(model, [0], max_new_tokens=4)
    assert model.lengths == [1, 2, 2, 2]
    assert (model.training, model.drop.training) == (True, False)


def test_wrong_arguments_and_logits_of_nan_are_errors():
    for options, message in [
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"input_ids": []}, r"input_ids must be \[L\] or \[1, L\] with L at least 1, got \[0\]"),
        ({"input_ids": torch.zeros(2, 3)}, r"got \[2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(fixed, **{"input_ids": [0], "max_new_tokens": 1, **options})
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits must be finite, got NaN"):
            generate(lambda ids: fixed(ids) * torch.nan, [0], max_new_tokens=1, temperature=temperature)
    masked = torch.tensor([0.0, -torch.inf, 0.0])
    assert 1 not in generate(lambda ids: masked.expand(1, ids.shape[1], 3), [0], max_new_tokens=50)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt", {"width": 16, "heads": 2, "max_length": 12}),  # shorter than prompts with replies
        ("gpt", {"width": 16, "heads": 2, "max_length": 21}),
        ("lstm", {"embedding": 8, "hidden": 16}),
        ("rnn", {"embedding": 8, "hidden": 16, "layers": 2}),
    ],
)
def test_greedy_replies_to_many_prompts_are_those_to_each_alone(name, sizes):
    torch.manual_seed(0)
    model = build_model(name, 30, **sizes)
    prompts, limits = [[3], [1, 2, 5, 7, 9], [4, 4, 8], [6, 1]], [6, 7, 0, 20]
    alone = [
        generate(model, prompt, max_new_tokens=limit, temperature=0, eos_id=eos)
        for eos in (None, 3, 11)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    together = [greedy(model, prompts, max_new_tokens=limits, pad_id=0, eos_id=eos) for eos in (None, 3, 11)]
    assert [reply for replies in together for reply in replies] == alone
    assert model.training


def test_greedy_ends_where_logits_are_not_usable_and_refuses_wrong_arguments():
    def diverging(ids):
        logits = nn.functional.one_hot(ids + 1, 9).float()
        logits[ids == 2] = torch.nan
        logits[ids == 5] = -torch.inf
        return logits

    assert greedy(diverging, [[0], [3], [6]], max_new_tokens=[9, 9, 1], pad_id=0) == [[1, 2], [4, 5], [7]]
    assert greedy(diverging, [], max_new_tokens=[], pad_id=0) == []
    for prompts, limits in (([[1], []], [2, 2]), ([[1]], [2, 2])):
        with pytest.raises(ValueError, match="greedy: prompts must hold an id each, and have a number of max_new_to"):
            greedy(diverging, prompts, max_new_tokens=limits, pad_id=0)


def test_no_ngram_comes_twice_in_a_reply() -> None:
    weights = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))

    def loops(ids):
        return weights[ids]

    free = generate(loops, [3], max_new_tokens=30, temperature=0)
    for n in (1, 2, 3):
        reply = generate(loops, [3], max_new_tokens=9 if n == 1 else 30, temperature=0, no_repeat_ngram=n)
        grams = [tuple(reply[i : i + n]) for i in range(len(reply) - n + 1)]
        assert len(set(grams)) == len(grams)
        assert len({tuple(free[i : i + n]) for i in range(len(free) - n + 1)}) < len(free) - n + 1
    assert len(generate(loops, [3], max_new_tokens=12, temperature=0, no_repeat_ngram=1)) == 12  # all are forbidden


def test_the_repetition_penalty_is_that_of_ctrl() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    assert Sampling(0)(logits, [0]) == 0
    assert Sampling(0, repetition_penalty=1.5)(logits, [0]) == 1
    assert Sampling(0, repetition_penalty=1.3)(logits, [0]) == 0
    below = torch.tensor([-2.0, -2.2])
    assert (Sampling(0)(below, [0]), Sampling(0, repetition_penalty=1.2)(below, [0])) == (0, 1)
    assert logits.tolist() == pytest.approx([2.0, 1.5, -1.0, -1.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 0.9}, "repetition_penalty must be finite and at least 1, got 0.9"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be finite and at least 1, got inf"),
        ({"temperature": float("inf")}, "temperature must be finite and at least 0, got inf"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be at least 0, got -1"),
    ],
)
def test_sampling_out_of_range_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


LETTERS = st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])


@given(st.text(LETTERS, max_size=20), st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=2))
def test_a_streamed_text_is_the_whole_text_up_to_the_first_stop_word(text, stop) -> None:
    taken = []

    def ids():
        for index in text.encode():
            taken.append(index)
            yield index

    pieces = list(text_of_stream(lambda known: bytes(known).decode("utf-8", "replace"), ids(), stop))
    start = text.lstrip()
    whole = start[: min([at for word in stop if (at := start.find(word)) >= 0], default=len(start))]
    assert "".join(pieces) == whole.rstrip()
    assert all(pieces)
    if whole == start:
        assert len(taken) == len(text.encode())


def test_a_stream_yields_each_id_before_the_next_call() -> None:
    calls = []

    def count_up(ids):
        calls.append(ids.shape[1])
        return torch.nn.functional.one_hot((ids + 1) % 9, 9) * 50.0

    ids = stream(count_up, [3], max_new_tokens=9, sampling=Sampling(0), eos_id=8)
    assert (next(ids), calls) == (4, [1])
    assert list(ids) == [5, 6, 7]
