"""A run: the folder with everything that a trained model needs. Training writes it; `eval`, `adapt` and `chat` read it:

    config.toml              all settings
    tokenizer.json           the vocabulary
    labels.json              of a parser the intents of the training, of a policy the acts that it chooses from
    checkpoints/last         what a resumed run continues from
    checkpoints/best         the weights with the lowest loss on the validation tasks
    checkpoints/pretrained   the best weights before meta-training, from which contenders start too
    adapter/                 with LoRA: the adapters of `best`, in the format of the package peft
    log.jsonl, tensorboard/  the losses of the training

A checkpoint holds only what the run trains. It lacks the frozen weights of a pretrained model: the config names that
model, and a digest in the checkpoint tells whether it is still the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metakern as mk
from metakern import io
from metakern.dialogue import checkpoint
from metakern.dialogue.config import Config
from metakern.dialogue.registry import build_algorithm, build_model_of, tokenizer_class
from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import CheckpointError, DataError, UserError

__all__ = ["Run", "part_of"]


@dataclass
class Run:
    """An algorithm over a model, with its tokenizer and the folder that it is saved in.

    Attributes:
        path: The folder.
        config: All settings.
        tokenizer: Its file in the folder must be the one that the weights were trained with.
        algorithm: The module that trains and adapts the model.
        state: What the checkpoint says beside tensors: the phase, the step, the seconds, the best validation loss.
        base: The fingerprint of the pretrained weights that the run began with; "" for a model trained from scratch.
        labels: The labels that a parser or a policy was trained with; none of a generator.
    """

    path: Path
    config: Config
    tokenizer: DialogueTokenizer
    algorithm: Any
    state: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    labels: tuple[str, ...] = ()

    @classmethod
    def create(cls, path: Path, config: Config, tokenizer: DialogueTokenizer, labels: Sequence[str] = ()) -> Run:
        """Return a run before training, with weights from the config's seed or from the pretrained model.

        It sets the number of PyTorch's threads, if the config does, and seeds PyTorch's random generator.

        Raises:
            DataError: If a pretrained model can't be read.
            UserError: If there is no GPU for the device cuda, or a setting does not suit the model.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device must be cpu where PyTorch finds no GPU, got cuda")
        torch.manual_seed(config.seed)
        model, base = build_model_of(config, tokenizer, labels)
        algorithm = build_algorithm(config, model.to(config.device), labels).to(config.device)
        return cls(path, config, tokenizer, algorithm, base=base, labels=tuple(labels))

    @classmethod
    def open(cls, path: str | Path, name: str = "best", **changes: Any) -> Run:
        """Return the run in the folder `path`.

        Args:
            path: The folder.
            name: The checkpoint that the weights come from: "best" or "last".
            changes: Settings that replace those of the run's config.

        Raises:
            UserError: If `path` is not the folder of a run, its tokenizer or model can't be read, or a setting does not
                suit the machine.
            CheckpointError: If the checkpoint is missing or damaged, or belongs to another vocabulary or model.
        """
        path = Path(path)
        config = replace(_config(path), **changes)
        try:
            labels = _labels(path / "labels.json") if config.part != "generator" else ()
            run = cls.create(path, config, tokenizer_class(config).load(path / "tokenizer.json"), labels)
        except DataError as error:
            hint = f"; if {config.model} has moved, change model in {path / 'config.toml'}" if config.pretrained else ""
            raise UserError(f"{error}{hint}") from None
        run.restore(name)
        return run

    @property
    def model(self) -> nn.Module:
        return self.algorithm.model

    @property
    def body(self) -> nn.Module:
        """The language model: the model of a generator, or what the head of a parser or a policy is over."""
        return getattr(self.model, "body", self.model)

    @property
    def size(self) -> str:
        """The number of the model's parameters and, if some are frozen, of those that are trained, as text."""
        every, trained = (
            sum(p.numel() for p in self.model.parameters() if p.requires_grad or not only) for only in (False, True)
        )
        return f"{every:,} parameters" + (f", {trained:,} of them trained" if trained < every else "")

    @property
    def vocabulary(self) -> str:
        """The digest of the tokenizer's file, by which a checkpoint knows the vocabulary that it was trained with."""
        return hashlib.sha256((self.path / "tokenizer.json").read_bytes()).hexdigest()

    def save_vocabulary(self) -> None:
        """Write what the weights are of use with: the tokenizer, and the labels if there are any."""
        self.tokenizer.save(self.path / "tokenizer.json")
        if self.labels:
            io.write(self.path / "labels.json", json.dumps(self.labels, ensure_ascii=False, indent=1).encode())

    def save(self, name: str, module: nn.Module | None = None, extra: Mapping[str, Tensor] | None = None) -> None:
        """Write the checkpoint `name`; with LoRA, `best` also goes into the folder `adapter`.

        Args:
            name: Such as "last".
            module: The module whose weights are saved; None stands for the algorithm, with its learned inner rates.
            extra: More tensors to save, under names that do not begin with "weights.".

        Raises:
            CheckpointError: If a file can't be written.
        """
        weights = checkpoint.module_tensors(module or self.algorithm)
        tensors = {f"weights.{key}": value for key, value in weights.items()} | dict(extra or {})
        state = {**self.state, "vocabulary": self.vocabulary, "base": self.base}
        checkpoint.save(self.path / "checkpoints", name, tensors, state)
        if self.config.lora and name == "best":
            mk.save_lora(self.model, self.path / "adapter")

    def restore(self, name: str, module: nn.Module | None = None, source: Path | None = None) -> dict[str, Tensor]:
        """Load the checkpoint `name`: set the weights and `state`, and return the `extra` tensors that were saved.

        Args:
            name: Such as "last".
            module: The module whose weights are set; None stands for the algorithm.
            source: The folder of the run whose checkpoint it is; None stands for this run.

        Raises:
            CheckpointError: If the checkpoint is missing or damaged, or belongs to another vocabulary, pretrained model
                or architecture.
        """
        folder = (source or self.path) / "checkpoints"
        tensors, state = checkpoint.load(folder, name)
        if state.pop("vocabulary", None) != self.vocabulary:
            raise CheckpointError(
                f"{self.path / 'tokenizer.json'}: is not the vocabulary that {folder / name} was trained with"
            )
        if state.pop("base", "") != self.base:
            raise CheckpointError(
                f"{folder / name}: was trained from other weights of {self.config.model} than are there now:"
                " put those back"
            )
        weights = {key[8:]: tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
        checkpoint.load_module(module or self.algorithm, weights, folder / name)
        self.state = state
        return tensors


def part_of(path: str | Path) -> str:
    """Return what the run in the folder `path` is: a generator, a parser or a policy.

    Raises:
        UserError: If `path` is not the folder of a run.
    """
    return _config(Path(path)).part


def _config(path: Path) -> Config:
    if not (path / "config.toml").is_file():
        raise UserError(f"{path}: is not the folder of a run (it has no config.toml); metakern train makes one")
    return Config.load(path / "config.toml")


def _labels(file: Path) -> list[str]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'it is not JSON'}") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise DataError(f"{file}: must be a list of labels, got another value")
    return found
