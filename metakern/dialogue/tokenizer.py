"""Turn dialogues into tokens: what all tokenizers have in common, and a byte-level BPE trained on the training tasks.

A dialogue becomes the ids of its texts inside a frame, which is all that stands before, between and after the texts.
The frame of the BPE is

    <bos> <user>  tokens  <eos> <bot>  tokens  <eos> …

with `<system>` before the turns of a system or a tool. Labels are aligned with the ids, as in Hugging Face: `labels[i]`
is id i if that token is to be learned, and -100 otherwise. The tokens of a reply are to be learned, and the special
token that ends it. No text becomes a special token, whatever it holds. The BPE's `decode(encode(text))` is the text.

Sennrich et al. 2016, "Neural machine translation of rare words with subword units", section 3.2 (BPE); Radford et al.
2019, "Language models are unsupervised multitask learners", section 2.2 (over bytes).
"""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

try:
    import tokenizers
except ImportError as error:
    raise ImportError("metakern.dialogue: the package tokenizers is missing: pip install metakern[dialogue]") from error

from metakern.dialogue.readers import Dialogue, Turn
from metakern.errors import CheckpointError, DataError
from metakern.io import read, write

__all__ = ["IGNORE", "SPECIAL_TOKENS", "DialogueTokenizer", "Tokenizer"]

IGNORE = -100
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<bot>", "<system>")
ALPHABET = 256  # bytes
LARGEST = 2**28  # bytes of a tokenizer's file
SYSTEM_SPEAKERS = ("system", "tool")


class DialogueTokenizer(ABC):
    """A tokenizer of dialogues; a subclass says how to encode a text, and what the frame around texts is.

    Attributes:
        vocab_size: The number of tokens.
        pad_id: The id for padding.
        eos_id: The special token that ends a reply.
        head: The number of ids that each dialogue begins with; they stay where the oldest ids are dropped.
        least: The smallest `max_length` that has room for a turn and a reply.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    head: int
    least: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, which are never special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""

    def size(self, ids: Sequence[int]) -> int:
        """Return the number of bytes of the text of ids in UTF-8, without special tokens."""
        return len(self.decode(ids).encode())

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write `path`, a JSON file that holds the vocabulary, and beside it what else `load` reads."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> DialogueTokenizer:
        """Read what `save` wrote."""

    @abstractmethod
    def _frame(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Return the ids before the text of each turn and after the last text, given the roles that `_roles` returns.

        There are `len(roles) + 1` lists.
        """

    @abstractmethod
    def _is_special(self, index: int) -> bool:
        """Return whether an id is a special token, such as one that ends a turn."""

    @property
    def word_ids(self) -> list[int]:
        """The ids, in order, of which texts alone consist: neither special tokens nor in the frame around texts."""
        framing = set(chain(*self._frame(("system", "user", "assistant"))))
        return [i for i in range(self.vocab_size) if not self._is_special(i) and i not in framing]

    def encode_dialogue(
        self, turns: Sequence[Turn], train_on: str = "bot", max_length: int = 64, bot: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids and the labels of the beginning of a dialogue.

        The ids before the first turn to be learned may take up half of `max_length`. If there are more, the oldest are
        dropped, so that a part of that turn is always there.

        Args:
            turns: The turns, oldest first.
            train_on: Which turns are to be learned: "bot" stands for the bot's, "all" for all but those of a system or
                a tool.
            max_length: The largest number of ids, at least `least`.
            bot: The speaker who is the bot. None stands for the one named bot or assistant or, if there is none, for
                the second to speak.

        Returns:
            Two lists of the same length, at most `max_length`.

        Raises:
            ValueError: If `train_on` is neither "bot" nor "all", or `max_length` is too small.
            DataError: If the chat template of a pretrained model refuses the turns.

        >>> from metakern.dialogue.readers import Dialogue
        >>> turns = (Turn("ann", "hi"), Turn("bob", "yo"))
        >>> tokenizer = Tokenizer.train([Dialogue("t", "d", turns)], 262)
        >>> ids, labels = tokenizer.encode_dialogue(turns, max_length=16)
        >>> [tokenizer.token(i) for i in ids]
        ['<bos>', '<user>', 'h', 'i', '<eos>', '<bot>', 'y', 'o', '<eos>']
        >>> [tokenizer.token(i) if i >= 0 else "" for i in labels]
        ['', '', '', '', '', '', 'y', 'o', '<eos>']
        """
        ids, labels, _ = self._encode_turns(turns, train_on, max_length, bot)
        return ids, labels

    def replies(
        self, turns: Sequence[Turn], max_length: int = 64, bot: str | None = None
    ) -> list[tuple[int, list[int], list[int]]]:
        """Return the replies of the bot in the window that `encode_dialogue` returns.

        Args:
            turns: As of `encode_dialogue`, and so are `max_length` and `bot`.

        Returns:
            For each reply the index of its turn, the ids of the window before it, and its own ids. These end with the
            special token that ends a turn, unless the window ends before.

        Raises:
            ValueError: If `max_length` is too small.
            DataError: If the chat template of a pretrained model refuses the turns.
        """
        ids, _, spans = self._encode_turns(turns, "bot", max_length, bot)
        return [(turn, ids[:begin], ids[begin:end]) for turn, begin, end in spans if begin < len(ids)]

    def _encode_turns(
        self, turns: Sequence[Turn], train_on: str, max_length: int, bot: str | None
    ) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
        """Return ids, labels and, for each turn to be learned, its index and where its ids begin and end."""
        if train_on not in ("bot", "all"):
            raise ValueError(f"encode_dialogue: train_on must be bot or all, got {train_on!r}")
        if max_length < self.least:
            raise ValueError(f"encode_dialogue: max_length must be at least {self.least}, got {max_length}")
        bot = bot_of(turns) if bot is None else bot
        between, *after = self._frame(_roles(turns, bot))
        ids: list[int] = []
        labels: list[int] = []
        spans: list[tuple[int, int, int]] = []
        for i, (turn, frame) in enumerate(zip(turns, after, strict=True)):
            ids += between
            labels += [IGNORE] * len(between)
            learned = turn.speaker == bot or (train_on == "all" and turn.speaker not in SYSTEM_SPEAKERS)
            if learned and not spans:
                room = self._room(max_length)
                if len(ids) > room:
                    ids[self.head :] = ids[self.head - room :]
                    labels = [IGNORE] * room
            end = self._end(frame)
            said, between = [*self.encode(turn.text), *frame[:end]], frame[end:]
            if learned:
                spans.append((i, len(ids), len(ids) + len(said)))
            ids += said
            labels += said if learned else [IGNORE] * len(said)
            if spans and len(ids) >= max_length:
                break
        return ids[:max_length], labels[:max_length], spans

    def prompt(self, turns: Sequence[Turn], max_length: int, bot: str | None = None) -> list[int]:
        """Return the ids that the bot's reply to `turns` follows.

        Where they would take up more than half of `max_length`, the oldest after the head are dropped.
        """
        bot = bot_of(turns) if bot is None else bot
        *frame, last, _ = self._frame((*_roles(turns, bot), "assistant"))
        ids = [i for before, turn in zip(frame, turns, strict=True) for i in (*before, *self.encode(turn.text))] + last
        return ids[: self.head] + ids[self.head :][-max(self._room(max_length) - self.head, 2) :]

    def length(self, turns: Sequence[Turn], bot: str | None = None) -> int:
        """Return the number of ids of a whole dialogue."""
        return len(self.encode_dialogue(turns, max_length=sys.maxsize, bot=bot)[0])

    def _room(self, max_length: int) -> int:
        """Return how many ids may come before a reply: the head, and half of what it leaves of `max_length`."""
        return (max_length + self.head - 1) // 2

    def _end(self, frame: Sequence[int]) -> int:
        """Return how many of the ids after a text end its turn: those up to the first special token, or none."""
        return next((i + 1 for i, index in enumerate(frame) if self._is_special(index)), 0)


class Tokenizer(DialogueTokenizer):
    """A byte-level BPE; `train` or `load` makes one.

    >>> from metakern.dialogue.readers import Dialogue
    >>> tokenizer = Tokenizer.train([Dialogue("t", "d", (Turn("ann", "hi"), Turn("bob", "hi there")))], 270)
    >>> tokenizer.decode(tokenizer.encode("naïve <eos> 🙂"))
    'naïve <eos> 🙂'
    """

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        missing = [token for token in SPECIAL_TOKENS if bpe.token_to_id(token) is None]
        if missing:
            raise DataError(f"tokenizer: must have the tokens {', '.join(SPECIAL_TOKENS)}, lacks {', '.join(missing)}")
        bpe.encode_special_tokens = True
        self._bpe, self.head, self.least = bpe, 1, 4
        self.vocab_size = bpe.get_vocab_size()
        ids = bpe.get_vocab(with_added_tokens=True)
        self.pad_id, self.bos_id, self.eos_id, self.user_id, self.bot_id, self.system_id = (
            ids[token] for token in SPECIAL_TOKENS
        )
        self._special = {ids[token] for token in SPECIAL_TOKENS}

    @classmethod
    def train(cls, dialogues: Iterable[Dialogue], vocab_size: int = 2048, cache_dir: Path | None = None) -> Tokenizer:
        """Train a tokenizer on the turns of dialogues; the same turns give the same tokenizer.

        Args:
            dialogues: They must hold a text.
            vocab_size: The largest number of tokens, including the 6 special tokens and the 256 bytes.
            cache_dir: A directory that keeps tokenizers under a hash of the texts and the size, and one of the file;
                one that is there and whole is loaded. None keeps none. It need not be writable.

        Raises:
            ValueError: If `vocab_size` is below 262.
            DataError: If the dialogues hold no text.
        """
        if vocab_size < (least := ALPHABET + len(SPECIAL_TOKENS)):
            raise ValueError(f"Tokenizer.train: vocab_size must be at least {least}, got {vocab_size}")
        texts = [turn.text for dialogue in dialogues for turn in dialogue.turns]
        if not texts:
            raise DataError("Tokenizer.train: dialogues must hold a text, got none")
        digest = _sha256(json.dumps([vocab_size, SPECIAL_TOKENS, texts]).encode())
        prefix = f"tokenizer-{digest[:16]}-"
        for cached in Path(cache_dir).glob(f"{prefix}*.json") if cache_dir else ():
            with suppress(OSError, DataError):  # a damaged file: train again
                if cached.name == f"{prefix}{_sha256(read(cached, LARGEST))[:16]}.json":
                    return cls.load(cached)
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        tokenizer = cls(bpe)
        if cache_dir:
            with suppress(CheckpointError):  # a cache that can't be written
                tokenizer.save(Path(cache_dir) / f"{prefix}{_sha256(bpe.to_str().encode())[:16]}.json")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write one JSON file, atomically.

        Raises:
            CheckpointError: If it can't be written.
        """
        write(Path(path), self._bpe.to_str().encode())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            DataError: If the file can't be read or is not such a tokenizer.
        """
        try:
            text = read(path, LARGEST).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        try:
            bpe = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:  # `tokenizers` raises Exception itself, and a panic of Rust is none
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            why = " ".join(str(error)[:200].split())
            raise DataError(f"{path}: must be a tokenizer, got a damaged file ({why})") from None
        return cls(bpe)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, which are never special tokens."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self._bpe.decode(list(ids), skip_special_tokens=True)

    def size(self, ids: Sequence[int]) -> int:
        """Return the number of bytes of ids, of which a window may cut a character; special tokens have none.

        The vocabulary spells each byte as a character of its own.
        """
        return sum(len(self.token(index)) for index in ids if not self._is_special(index))

    def token(self, index: int) -> str:
        """Return the token of an id, as the vocabulary spells it."""
        return str(self._bpe.id_to_token(index))

    def _frame(self, roles: tuple[str, ...]) -> list[list[int]]:
        of = {"user": self.user_id, "assistant": self.bot_id, "system": self.system_id}
        frame = [[self.bos_id]]
        for role in roles:
            frame[-1].append(of[role])
            frame.append([self.eos_id])
        return frame

    def _is_special(self, index: int) -> bool:
        return index in self._special


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _roles(turns: Sequence[Turn], bot: str | None) -> tuple[str, ...]:
    """Return the role of each turn as chat templates name it: "assistant", "system" or "user"."""
    return tuple(
        "assistant" if turn.speaker == bot else "system" if turn.speaker in SYSTEM_SPEAKERS else "user"
        for turn in turns
    )


def bot_in(dialogue: Dialogue) -> str | None:
    """Return the speaker whose turns a model learns: the one that the dialogue names, or else `bot_of` its turns."""
    return dialogue.meta.get("bot") or bot_of(dialogue.turns)


def bot_of(turns: Sequence[Turn]) -> str | None:
    """Return the speaker who is the bot if nothing else says so, or None if there is none.

    It is the one named bot or assistant or, without such a name, the second to speak.
    """
    speakers = list(dict.fromkeys(turn.speaker for turn in turns if turn.speaker not in SYSTEM_SPEAKERS))
    named = [speaker for speaker in speakers if speaker in ("bot", "assistant")]
    return next(iter(named + speakers[1:2]), None)
