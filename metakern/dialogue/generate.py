"""Generate replies token by token with any causal language model.

    p ∝ exp(logits / temperature)

`generate` draws a token from the smallest set of likeliest tokens whose probabilities p add up to top_p or more;
`stream` yields the tokens one by one, and `text_of_stream` makes text of them. `greedy` always takes the likeliest
token, for many prompts at once.

Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1 (top_p, nucleus sampling); Keskar et
al. 2019, "CTRL: a conditional transformer language model for controllable generation", section 4.1 (repetition
penalty); Paulus, Xiong, Socher 2018, "A deep reinforced model for abstractive summarization", section 2.5 (no repeated
n-gram).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Sampling", "generate", "greedy", "stream", "text_of_stream"]

CACHES = ("cache", "past_key_values")  # what transformers calls the cache in outputs and arguments: since 5.24, before


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Finite and at least 0; 0 always takes the likeliest token.
        top_p: In (0, 1]; 1 samples from all tokens.
        repetition_penalty: Finite and at least 1; the logits of tokens that are in the reply already are divided by it
            if they are positive, and multiplied by it otherwise.
        no_repeat_ngram: n, at least 0: no n tokens in a row come twice in a reply; 0 allows all.

    Raises:
        ValueError: If a value is out of range.

    >>> Sampling(temperature=0).top_p
    1.0
    """

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"generate: temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1], got {self.top_p}")
        if not (self.repetition_penalty >= 1 and math.isfinite(self.repetition_penalty)):
            raise ValueError(
                f"generate: repetition_penalty must be finite and at least 1, got {self.repetition_penalty}"
            )
        if self.no_repeat_ngram < 0:
            raise ValueError(f"generate: no_repeat_ngram must be at least 0, got {self.no_repeat_ngram}")

    def __call__(self, logits: Tensor, reply: Sequence[int], generator: torch.Generator | None = None) -> int:
        """Return the next token.

        Args:
            logits: Those of the next token, `[V]`.
            reply: The tokens of the reply so far.
            generator: A random generator on the CPU; None stands for PyTorch's default one.

        Raises:
            ValueError: If the logits hold NaN or nothing finite.
        """
        if not logits.isfinite().any() or logits.isnan().any():
            raise ValueError("generate: logits must be finite, got NaN or infinities: the model has diverged")
        logits = self._without_repetition(logits, reply)
        if self.temperature == 0:
            return int(logits.argmax())
        p, order = (logits / self.temperature).softmax(-1).sort(descending=True, stable=True)
        p = p * (p.cumsum(0) - p < self.top_p)
        return int(order[torch.multinomial(p.cpu(), 1, generator=generator)])

    def _without_repetition(self, logits: Tensor, reply: Sequence[int]) -> Tensor:
        n = self.no_repeat_ngram
        if self.repetition_penalty != 1 and reply:
            said = torch.tensor(sorted(set(reply)), device=logits.device)
            x = logits[said]
            x = torch.where(x > 0, x / self.repetition_penalty, x * self.repetition_penalty)
            logits = logits.index_copy(0, said, x)
        if n and len(reply) >= n:
            grams = [reply[i : i + n] for i in range(len(reply) - n + 1)]
            banned = [gram[-1] for gram in grams if list(gram[:-1]) == list(reply[len(reply) - n + 1 :])]
            allowed = logits.index_fill(0, torch.tensor(banned, dtype=torch.long, device=logits.device), -math.inf)
            logits = allowed if allowed.isfinite().any() else logits
        return logits


def generate(
    model: Callable[..., Any],
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return the ids that follow `input_ids`, without the `eos_id` that ends them.

    Args:
        model: A call with ids `[1, L]` returns logits `[1, L, V]`, or an object that has them as `logits`. A module is
            in eval mode during the call. If it has an attribute `max_length`, it gets at most that many of the last
            ids. A Hugging Face model uses its cache and, after the first token, gets only the new id.
        input_ids: `[L]` or `[1, L]` with L at least 1.
        max_new_tokens: The largest number of ids to return.
        temperature: As of `Sampling`, and so are `top_p`, `repetition_penalty` and `no_repeat_ngram`.
        eos_id: The id that ends the reply; None never ends it early.
        generator: A random generator on the CPU; None stands for PyTorch's default one.

    Raises:
        ValueError: If a number is out of range, `input_ids` has another shape, or the logits hold NaN or nothing
            finite.

    >>> def count_up(ids):
    ...     return torch.nn.functional.one_hot((ids + 1) % 9, 9) * 50.0
    >>> generate(count_up, [3], max_new_tokens=9, temperature=0, eos_id=8)
    [4, 5, 6, 7]
    """
    sampling = Sampling(temperature, top_p, repetition_penalty, no_repeat_ngram)
    return list(
        stream(model, input_ids, max_new_tokens=max_new_tokens, sampling=sampling, eos_id=eos_id, generator=generator)
    )


def stream(
    model: Callable[..., Any],
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield what `generate` returns, each id as soon as it is known; arguments and errors are those of `generate`.

    >>> def count_up(ids):
    ...     return torch.nn.functional.one_hot((ids + 1) % 9, 9) * 50.0
    >>> next(stream(count_up, [3], max_new_tokens=9, sampling=Sampling(temperature=0)))
    4
    """
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=_device(model))
    if ids.numel() == 0 or ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise ValueError(f"generate: input_ids must be [L] or [1, L] with L at least 1, got {list(ids.shape)}")
    ids = ids.reshape(1, -1)
    start, window = ids.shape[1], getattr(model, "max_length", None) or 0
    options: dict[str, Any] = {"use_cache": True} if _has_cache(model) else {}
    known = 0  # the number of ids in the cache
    for _ in range(max_new_tokens):
        with torch.no_grad(), _eval_mode(model):
            output = model(ids[:, max(known, ids.shape[1] - window if window else 0) :], **options)
        if cache := _cache(output):
            known = ids.shape[1]
            options |= cache
        token = sampling(getattr(output, "logits", output)[0, -1].float(), ids[0, start:].tolist(), generator)
        if token == eos_id:
            return
        yield token
        ids = torch.cat([ids, ids.new_tensor([[token]])], 1)


def text_of_stream(
    decode: Callable[[Sequence[int]], str], ids: Iterable[int], stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the text of ids in pieces, as soon as no later id can change them.

    White space at both ends of the text is left out.

    Args:
        decode: Returns the text of ids, with U+FFFD in the place of a character whose bytes are not all there.
        ids: The ids, one after another.
        stop: Texts before the first of which the text ends; no further id is taken then.

    >>> list(text_of_stream(lambda ids: bytes(ids).decode("utf-8", "replace"), "Hé. No".encode(), stop=[" N"]))
    ['H', 'é', '.']
    """
    known, shown = list[int](), 0
    for index in ids:
        known.append(index)
        text = decode(known).lstrip()
        ends = [at for word in stop if (at := text.find(word)) >= 0]
        if ends:
            yield from filter(None, [text[shown : min(ends)].rstrip()])
            return
        whole = text.rstrip("\ufffd")
        held = max((k for word in stop for k in range(1, len(word)) if whole.endswith(word[:k])), default=0)
        sure = min(len(whole.rstrip()), len(whole) - held)
        if sure > shown:
            yield text[shown:sure]
            shown = sure
    rest = decode(known).strip()[shown:]
    if rest:
        yield rest


@torch.no_grad()
def greedy(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    pad_id: int,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Return the likeliest ids that follow each prompt, one after another, without the `eos_id` that ends them.

    All prompts are in one batch. A Hugging Face model uses its cache, with the prompts padded on the left. A model of
    metakern.dialogue.models uses its own, if the replies fit its window. Another model must be causal: it gets the
    prompts with what has been generated, padded on the right.

    Args:
        model: As of `generate`, for ids `[B, L]`.
        prompts: Lists of ids, each at least one.
        max_new_tokens: The largest number of ids to return for each prompt.
        pad_id: The id for padding.
        eos_id: The id that ends a reply; None never ends it early.

    Returns:
        For each prompt the new ids. They end early where the logits hold NaN or nothing finite: the model has diverged.

    Raises:
        ValueError: If a prompt is empty, or the numbers of prompts and of `max_new_tokens` differ.

    >>> def count_up(ids):
    ...     return torch.nn.functional.one_hot((ids + 1) % 9, 9) * 50.0
    >>> greedy(count_up, [[3], [1, 2, 5]], max_new_tokens=[9, 2], pad_id=0, eos_id=8)
    [[4, 5, 6, 7], [6, 7]]
    """
    if not all(prompts) or len(prompts) != len(max_new_tokens):
        raise ValueError(
            "greedy: prompts must hold an id each, and have a number of max_new_tokens each, got lengths"
            f" {list(map(len, prompts))} and {len(max_new_tokens)} numbers"
        )
    replies: list[list[int]] = [[] for _ in prompts]
    fits = max(map(sum, zip(map(len, prompts), max_new_tokens, strict=True)), default=0) <= _window(model)
    steps = _cached_logits if _has_cache(model) else _next_logits if hasattr(model, "next_logits") and fits else _logits
    logits = steps(model, prompts, replies, pad_id)
    rows = [i for i, limit in enumerate(max_new_tokens) if limit > 0]
    with _eval_mode(model):
        while rows:
            last = logits(rows).float()  # [rows, V]
            usable = last.isfinite().any(-1) & ~last.isnan().any(-1)
            tokens = dict(zip(rows, last.argmax(-1).masked_fill(~usable, -1).tolist(), strict=True))
            rows = [i for i in rows if tokens[i] not in (-1, eos_id)]
            for i in rows:
                replies[i].append(tokens[i])
            rows = [i for i in rows if len(replies[i]) < max_new_tokens[i]]
    return replies


def _logits(
    model: Callable[..., Any], prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad_id: int
) -> Callable[[list[int]], Tensor]:
    """Return a function of rows that returns their logits `[rows, V]` after their prompts and replies."""
    window = _window(model)

    def logits(rows: list[int]) -> Tensor:
        texts = [[*prompts[i], *replies[i]] for i in rows]
        texts = [text[max(0, len(text) - window) :] for text in texts]
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[pad_id] * (longest - len(text))] for text in texts], device=_device(model))
        output = model(ids)
        last = torch.tensor([len(text) - 1 for text in texts], device=ids.device)
        return getattr(output, "logits", output)[torch.arange(len(texts), device=ids.device), last]

    return logits


def _next_logits(
    model: Any, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad_id: int
) -> Callable[[list[int]], Tensor]:
    """Return what `_logits` does, for a model with `next_logits`; after the first call, replies have one id more."""
    device, kept = _device(model), list(range(len(prompts)))  # the prompts whose cache is held
    cache: tuple[Tensor, ...] = ()

    def logits(rows: list[int]) -> Tensor:
        nonlocal cache, kept
        new = [replies[i][-1:] or [*prompts[i]] for i in rows]
        if not cache:
            cache = model.empty_cache(len(rows))
        elif len(rows) < len(kept):
            places = torch.tensor([kept.index(i) for i in rows], device=device)
            cache = tuple(part[places] for part in cache)
        kept, counts = rows, torch.tensor([*map(len, new)], device=device)
        ids = torch.tensor([[*text, *[pad_id] * (int(counts.max()) - len(text))] for text in new], device=device)
        known = torch.tensor([len(prompts[i]) + len(replies[i]) for i in rows], device=device) - counts
        return model.next_logits(ids, counts, cache, known)

    return logits


def _cached_logits(
    model: Any, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad_id: int
) -> Callable[[list[int]], Tensor]:
    """Return what `_logits` does, for a model with a cache; at each call after the first, replies have one id more."""
    longest, device = max(map(len, prompts)), _device(model)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    options: dict[str, Any] = {"use_cache": True}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1

    def logits(rows: list[int]) -> Tensor:
        nonlocal ids, mask
        if any(replies):
            ids = torch.tensor([[reply[-1] if reply else pad_id] for reply in replies], device=device)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if "position_ids" in accepted:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(input_ids=ids, attention_mask=mask, **options)
        options.update(_cache(output))
        return output.logits[rows, -1]

    return logits


def _has_cache(model: Any) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache")


def _cache(output: Any) -> dict[str, Any]:
    """Return the cache in a model's output as an argument of its next call, or nothing if it has none."""
    keys = output.keys() if isinstance(output, Mapping) else ()  # the old name is an alias, which warns
    return {name: output[name] for name in CACHES if name in keys}


def _window(model: Any) -> int:
    """Return the number of ids that the model can read at once."""
    return getattr(model, "max_length", None) or sys.maxsize


def _device(model: Any) -> torch.device | None:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if parameter is None else parameter.device


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Set a module to eval mode within the block, and restore the mode of each of its modules after it."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
