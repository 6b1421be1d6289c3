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

The digest of a checkpoint covers all of a run: its tensors, its state, the settings, and the digest of the tokenizer's
files. `verified` compares the settings and those files with what is in the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

import metakern as mk
from metakern import io
from metakern.dialogue import checkpoint
from metakern.dialogue.config import MAY_CHANGE, Config
from metakern.dialogue.registry import build_algorithm, build_model_of, tokenizer_class
from metakern.dialogue.split import Split
from metakern.dialogue.tokenizer import DialogueTokenizer
from metakern.errors import CheckpointError, DataError, UserError

__all__ = ["Run", "check_tasks", "part_of", "verified"]

# All that a pretrained tokenizer reads, whatever its class, and the labels of a parser or a policy.
VOCABULARY_FILES = (
    "labels.json",
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
PHASES = ("pretrain", "train", "adapted")
LARGEST_TOKENIZER = 2**28  # bytes of one of its files
MOST_STEPS = 10**12


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
        data: The digest of the split that it is trained on (`Split.digest`); "" if none is known.
        adam: What `teach` adapts the model further with, from its first use on: its plans are made once.
        teaching: The lock of `teach`, which sets inner rates for one lesson at a time.
    """

    path: Path
    config: Config
    tokenizer: DialogueTokenizer
    algorithm: Any
    state: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    labels: tuple[str, ...] = ()
    data: str = ""
    adam: mk.MAML | None = None
    teaching: Any = field(default_factory=Lock)

    @classmethod
    def create(cls, path: Path, config: Config, tokenizer: DialogueTokenizer, labels: Sequence[str] = ()) -> Run:
        """Return a run before training, with weights from the config's seed or from the pretrained model.

        It sets the number of PyTorch's threads, if the config does, and seeds PyTorch's random generator.

        Raises:
            DataError: If a pretrained model can't be read.
            UserError: If there is no GPU for the device cuda, or a setting does not suit the model or the machine.
        """
        if config.threads > (most := max(64, 4 * (os.cpu_count() or 1))):
            raise UserError(f"threads must be at most {most} on this machine, got {config.threads}")
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
        config = replace(verified(path, name), **changes)
        try:
            labels = _labels(path / "labels.json") if config.part != "generator" else ()
            run = cls.create(path, config, tokenizer_class(config).load(path / "tokenizer.json"), labels)
        except DataError as error:
            moved = f"if {config.model} has moved, change model in {path / 'config.toml'}, without its line # SHA-256"
            raise UserError(f"{error}; {moved}" if config.pretrained else str(error)) from None
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
        """The digest of the files of the tokenizer and the labels, by which a checkpoint knows its vocabulary."""
        return _vocabulary(self.path)

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
        facts = {"base": self.base, "data": self.data, "config": self.config.settings()}
        state = {**self.state, "vocabulary": _vocabulary(self.path), **facts}
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
            DataError: If the run has other data than the checkpoint.
        """
        folder = (source or self.path) / "checkpoints"
        tensors, state = checkpoint.load(folder, name)
        _check_state(state, folder / name)
        if state.pop("vocabulary") != _vocabulary(self.path):
            raise _other_vocabulary(self.path, folder / name)
        if state.pop("base") != self.base:
            raise CheckpointError(
                f"{folder / name}: was trained from other weights of {self.config.model} than are there now:"
                " put those back"
            )
        if self.data not in ("", saved := state.pop("data", "")) and saved:
            raise DataError(
                f"{self.config.data}: has other tasks or dialogues than when {folder / name} was saved: put them back,"
                " or begin another run"
            )
        self.data = self.data or saved
        del state["config"]
        weights = {key[8:]: tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
        checkpoint.load_module(module or self.algorithm, weights, folder / name)
        self.state = state
        return tensors


def check_tasks(run: Run, split: Split) -> None:
    """Raise a `DataError` if the run was trained on other tasks than those of the split, of which others are unseen."""
    if run.data and run.data.partition(":")[0] != split.digest.partition(":")[0]:
        raise DataError(
            f"{run.config.data}: is not split into the tasks that {run.path} was trained and validated on, so unseen"
            " tasks can't be told: put back the tasks that it had"
        )


def verified(path: Path, name: str) -> Config:
    """Return the config of the run in the folder `path`, after comparing it and the tokenizer with a checkpoint.

    Args:
        path: The folder.
        name: The checkpoint, such as "last".

    Raises:
        UserError: If `path` is not the folder of a run, or its config can't be read or is damaged.
        CheckpointError: If the checkpoint is missing or damaged; if a setting that must stay, or a file of the
            tokenizer, is another than when the checkpoint was saved.
    """
    file, source = path / "config.toml", path / "checkpoints" / name
    config = _config(path)
    state = checkpoint.state_of(source.parent, name)
    _check_state(state, source)
    saved = state["config"]
    for key, own in config.settings().items():
        moved = key == "model" and config.pretrained and str(saved.get(key)).startswith("hf:")
        if saved.get(key, own) != own and key not in MAY_CHANGE and not moved:
            raise CheckpointError(
                f"{file}: {key} must be {reprlib.repr(saved[key])} as when {source} was saved, got"
                f" {reprlib.repr(own)}: change it back"
            )
    if state["vocabulary"] != _vocabulary(path):
        raise _other_vocabulary(path, source)
    return config


def _vocabulary(path: Path) -> str:
    """Return the digest of the tokenizer's files in the folder of a run.

    Raises:
        DataError: If a file can't be read.
    """
    digest = hashlib.sha256()
    for file in (*(path / name for name in VOCABULARY_FILES), *sorted(path.glob("additional_chat_templates/*"))):
        try:
            digest.update(f"{file.name} {hashlib.sha256(io.read(file, LARGEST_TOKENIZER)).hexdigest()}".encode())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _other_vocabulary(path: Path, source: Path) -> CheckpointError:
    return CheckpointError(
        f"{path / 'tokenizer.json'}: is not the vocabulary that {source} was trained with: put its files back"
    )


def _check_state(state: Mapping[str, Any], source: Path) -> None:
    """Raise a CheckpointError unless the state of a checkpoint has all that a run needs, of the right types."""

    def is_number(value: Any, least: float, kinds: Any = (int, float)) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and least <= value < MOST_STEPS

    rules = {
        "phase": state.get("phase") in PHASES,
        "step": is_number(state.get("step"), 0, int),
        "seconds": is_number(state.get("seconds", 0), 0),
        "best": state.get("best") is None or is_number(state["best"], -MOST_STEPS),
        "worse": is_number(state.get("worse", 0), 0, int),
        "vocabulary": isinstance(state.get("vocabulary"), str),
        "base": isinstance(state.get("base"), str),
        "data": isinstance(state.get("data", ""), str),
        "config": isinstance(state.get("config"), dict),
        "from": isinstance(state.get("from", ""), str),
    }
    for key, right in rules.items():
        if not right:
            shown = reprlib.repr(state.get(key))
            raise CheckpointError(f"{source}: {key} must be as metakern writes it, got {shown}; use another checkpoint")


def part_of(path: str | Path) -> str:
    """Return what the run in the folder `path` is: a generator, a parser or a policy.

    Raises:
        UserError: If `path` is not the folder of a run.
    """
    return _config(Path(path)).part


def _config(path: Path) -> Config:
    if not (path / "config.toml").exists():
        raise UserError(f"{path}: is not the folder of a run (it has no config.toml); metakern train makes one")
    return Config.load(path / "config.toml", complete=True)


def _labels(file: Path) -> list[str]:
    try:
        found = json.loads(io.read(file, LARGEST_TOKENIZER))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'it is not JSON'}") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise DataError(f"{file}: must be a list of labels, got another value")
    return found
