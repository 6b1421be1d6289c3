"""A run: a folder with everything that a trained model needs, opened by `eval`, `adapt`, `chat` and the trainer alike.

::

    config.toml  tokenizer.json          what it was made from
    checkpoints/last, best, pretrained   where to go on; the best on validation tasks; the start that baselines share
    adapter/                             of a run with LoRA, the best once more, in the format of the package peft
    log.jsonl  tensorboard/              every number on the way

A checkpoint holds what the run trains. The frozen weights of a pretrained model stay where they are: the run names the
model in its config, and knows by a digest whether it is still the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue import checkpoint
from metakern.dialogue.config import Config
from metakern.dialogue.registry import build_algorithm, build_model_of, tokenizer_class
from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import CheckpointError, DataError, UserError

__all__ = ["Run"]


@dataclass
class Run:
    """An algorithm over a model, with its vocabulary, in a folder; ``state`` is what else its checkpoint says, and
    ``base`` the fingerprint of the pretrained model that it began with, if any."""

    path: Path
    config: Config
    tokenizer: DialogueTokenizer
    algorithm: Any
    state: dict[str, Any] = field(default_factory=dict)
    base: str = ""

    @classmethod
    def create(cls, path: Path, config: Config, tokenizer: DialogueTokenizer) -> Run:
        """A run at its start; the weights come from the config's seed, or from the pretrained model."""
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device must be cpu where PyTorch finds no GPU, got cuda")
        torch.manual_seed(config.seed)
        model, base = build_model_of(config, tokenizer)
        return cls(path, config, tokenizer, build_algorithm(config, model.to(config.device)), base=base)

    @classmethod
    def open(cls, path: str | Path, name: str = "best", **changes: Any) -> Run:
        """The run in the folder ``path`` with the weights of its checkpoint ``name``; ``changes`` are of its config."""
        path = Path(path)
        if not (path / "config.toml").is_file():
            raise UserError(f"{path}: is not the folder of a run (it has no config.toml); metakern train makes one")
        config = replace(Config.load(path / "config.toml"), **changes)
        try:
            run = cls.create(path, config, tokenizer_class(config).load(path / "tokenizer.json"))
        except DataError as error:
            hint = f"; if {config.model} has moved, say so in {path / 'config.toml'}" if config.pretrained else ""
            raise UserError(f"{error}{hint}") from None
        run.restore(name)
        return run

    @property
    def model(self) -> nn.Module:
        return self.algorithm.model

    @property
    def size(self) -> str:
        """The number of the model's parameters, and of those that are trained where others are not."""
        every, trained = (
            sum(p.numel() for p in self.model.parameters() if p.requires_grad or not only) for only in (False, True)
        )
        return f"{every:,} parameters" + (f", {trained:,} of them trained" if trained < every else "")

    @property
    def vocabulary(self) -> str:
        """A digest of the tokenizer's file: weights mean something with their own vocabulary only."""
        return hashlib.sha256((self.path / "tokenizer.json").read_bytes()).hexdigest()

    def save(self, name: str, module: nn.Module | None = None, extra: Mapping[str, Tensor] | None = None) -> None:
        """Write the weights of ``module`` (the algorithm), ``extra`` tensors and `state` as the checkpoint ``name``."""
        weights = checkpoint.module_tensors(module or self.algorithm)
        tensors = {f"weights.{key}": value for key, value in weights.items()} | dict(extra or {})
        state = {**self.state, "vocabulary": self.vocabulary, "base": self.base}
        checkpoint.save(self.path / "checkpoints", name, tensors, state)
        if self.config.lora and name == "best":
            mk.save_lora(self.model, self.path / "adapter")

    def restore(self, name: str, module: nn.Module | None = None, source: Path | None = None) -> dict[str, Tensor]:
        """Undo `save`, with the checkpoint of the run ``source`` (this one): sets `state`, returns ``extra``."""
        folder = (source or self.path) / "checkpoints"
        tensors, state = checkpoint.load(folder, name)
        if state.pop("vocabulary", None) != self.vocabulary:
            raise CheckpointError(
                f"{self.path / 'tokenizer.json'}: is not the vocabulary that {folder / name} was trained with"
            )
        if state.pop("base", "") != self.base:
            raise CheckpointError(
                f"{folder / name}: was trained on another {self.config.model} than is there now: put that one back"
            )
        weights = {key[8:]: tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
        checkpoint.load_module(module or self.algorithm, weights, folder / name)
        self.state = state
        return tensors
