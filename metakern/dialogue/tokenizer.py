"""A byte-level BPE tokenizer of dialogues, trained on the training tasks and saved with a run.

A dialogue becomes

    <bos> [<user> tokens <eos>] [<bot> tokens <eos>] …

with `<system>` for the turns of a system or a tool.  Labels are aligned with the ids, as in Hugging Face: `labels[i]`
is token i where token i is to be learned, which are a reply's tokens and the `<eos>` that ends it, and -100 elsewhere.
A text never becomes a special token, whatever it holds, and every text survives `decode(encode(text))`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

try:
    import tokenizers
except ImportError as error:
    raise ImportError("metakern.dialogue: the package tokenizers is missing: pip install metakern[dialogue]") from error

from metakern.dialogue.readers import DataError, Dialogue, Turn

__all__ = ["IGNORE", "SPECIAL_TOKENS", "Tokenizer"]

IGNORE = -100
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<bot>", "<system>")
ALPHABET = 256
SYSTEM_SPEAKERS = ("system", "tool")


class Tokenizer:
    """Texts and dialogues to ids and back; made by `train` or `load`.

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
        self._bpe = bpe
        self.vocab_size: int = bpe.get_vocab_size()
        ids = bpe.get_vocab(with_added_tokens=True)
        self.pad_id, self.bos_id, self.eos_id, self.user_id, self.bot_id, self.system_id = (
            ids[token] for token in SPECIAL_TOKENS
        )

    @classmethod
    def train(cls, dialogues: Iterable[Dialogue], vocab_size: int = 2048, cache_dir: Path | None = None) -> Tokenizer:
        """Train on the turns of dialogues; the same turns give the same tokenizer.

        vocab_size   the most tokens to have, special tokens and the 256 bytes included
        cache_dir    a directory that keeps tokenizers by a hash of the texts and the size
        """
        if vocab_size < (least := ALPHABET + len(SPECIAL_TOKENS)):
            raise ValueError(f"Tokenizer.train: vocab_size must be at least {least}, got {vocab_size}")
        texts = [turn.text for dialogue in dialogues for turn in dialogue.turns]
        if not texts:
            raise DataError("Tokenizer.train: dialogues must hold a text, got none")
        digest = hashlib.sha256(json.dumps([vocab_size, SPECIAL_TOKENS, texts]).encode()).hexdigest()
        cached = Path(cache_dir) / f"tokenizer-{digest[:16]}.json" if cache_dir else None
        if cached and cached.exists():
            try:
                return cls.load(cached)
            except DataError:
                cached.unlink()  # cut short by a crash: train again
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
        if cached:
            tokenizer.save(cached)
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write one JSON file, all of it or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(self._bpe.to_str())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        try:
            bpe = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the class that `tokenizers` raises is Exception itself
            raise DataError(f"{path}: must be a tokenizer, got a damaged file ({error})") from None
        return cls(bpe)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens among them never."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self._bpe.decode(list(ids), skip_special_tokens=True)

    def encode_dialogue(
        self, turns: Sequence[Turn], train_on: str = "bot", max_length: int = 64, bot: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of the beginning of a dialogue, at most `max_length` of each.

        turns      what was said, oldest first
        train_on   "bot": the bot's turns are labeled; "all": everybody's but the system's
        bot        the speaker who is the bot; None: the one named bot or assistant, otherwise the second to speak

        Where what comes before the first reply would fill more than half of `max_length`, its oldest tokens are
        dropped, so that a reply is always there.

        >>> from metakern.dialogue.readers import Dialogue
        >>> turns = (Turn("ann", "hi"), Turn("bob", "yo"))
        >>> tokenizer = Tokenizer.train([Dialogue("t", "d", turns)], 262)
        >>> ids, labels = tokenizer.encode_dialogue(turns, max_length=16)
        >>> [tokenizer.token(i) for i in ids]
        ['<bos>', '<user>', 'h', 'i', '<eos>', '<bot>', 'y', 'o', '<eos>']
        >>> [tokenizer.token(i) if i >= 0 else "" for i in labels]
        ['', '', '', '', '', '', 'y', 'o', '<eos>']
        """
        if train_on not in ("bot", "all"):
            raise ValueError(f"encode_dialogue: train_on must be bot or all, got {train_on!r}")
        if max_length < 4:
            raise ValueError(f"encode_dialogue: max_length must be at least 4, got {max_length}")
        bot = bot_of(turns) if bot is None else bot
        ids, labels = [self.bos_id], [IGNORE]
        replied = False
        for turn in turns:
            said = [*self.encode(turn.text), self.eos_id]
            learned = turn.speaker == bot or (train_on == "all" and turn.speaker not in SYSTEM_SPEAKERS)
            ids += [self._role(turn.speaker, bot), *said]
            labels += [IGNORE, *(said if learned else [IGNORE] * len(said))]
            if learned and not replied:
                replied, before = True, len(ids) - len(said)
                if before > (room := max_length // 2):
                    ids[1:before], labels[1:before] = ids[before - room + 1 : before], [IGNORE] * (room - 1)
            if replied and len(ids) >= max_length:
                break
        return ids[:max_length], labels[:max_length]

    def prompt(self, turns: Sequence[Turn], max_length: int, bot: str | None = None) -> list[int]:
        """The ids after which the bot's reply to `turns` follows: the latest that leave it half of `max_length`."""
        bot = bot_of(turns) if bot is None else bot
        ids: list[int] = []
        for turn in turns:
            ids += [self._role(turn.speaker, bot), *self.encode(turn.text), self.eos_id]
        return [self.bos_id, *ids[-(max(max_length // 2, 3) - 2) :], self.bot_id]

    def token(self, index: int) -> str:
        """The token of an id, as it is written in the vocabulary."""
        return str(self._bpe.id_to_token(index))

    def _role(self, speaker: str, bot: str | None) -> int:
        if speaker == bot:
            return self.bot_id
        return self.system_id if speaker in SYSTEM_SPEAKERS else self.user_id


def bot_of(turns: Sequence[Turn]) -> str | None:
    """Who the bot is where nobody says: the one named bot or assistant, otherwise the second to speak."""
    speakers = list(dict.fromkeys(turn.speaker for turn in turns if turn.speaker not in SYSTEM_SPEAKERS))
    named = [speaker for speaker in speakers if speaker in ("bot", "assistant")]
    return next(iter(named + speakers[1:2]), None)
