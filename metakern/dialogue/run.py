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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue import checkpoint
from metakern.dialogue.config import Config
from metakern.dialogue.episodes import Episodes, Split, TaskData, split_tasks
from metakern.dialogue.models import build_model
from metakern.dialogue.readers import read
from metakern.dialogue.tokenizer import DialogueTokenizer, Tokenizer
from metakern.errors import CheckpointError, DataError, UserError

__all__ = ["FineTune", "Run", "build_algorithm", "curve", "episodes", "load_split", "on_device_of", "tokenizer_class"]

Batch = Mapping[str, Tensor]


class FineTune(nn.Module):
    """The baseline: plain training on support and query together, then adaptation just as after meta-training."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], **options: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        maml = mk.MAML(model, loss, **options)
        self.inner, self.adapt, self.evaluate = maml.inner, maml.adapt, maml.evaluate

    def forward(self, support: Batch, query: Batch) -> Tensor:
        """The mean loss over all labeled tokens; ``[T, B, L]`` of each batch become ``[T * 2B, L]``."""
        return self.loss(self.model, {k: torch.cat([support[k], query[k]], 1).flatten(0, 1) for k in support})


ALGORITHMS = {
    "maml": mk.MAML,
    "fomaml": mk.FOMAML,
    "anil": mk.ANIL,
    "metasgd": mk.MetaSGD,
    "reptile": mk.Reptile,
    "finetune": FineTune,
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": mk.optim.SGD,
    "adam": mk.optim.Adam,
    "adamw": mk.optim.AdamW,
    "rmsprop": mk.optim.RMSprop,
    "adagrad": mk.optim.Adagrad,
    "normalized": mk.optim.NormalizedSGD,
    "muon": mk.optim.Muon,
}


def build_algorithm(config: Config, model: nn.Module) -> Any:
    """The config's algorithm over ``model``: a module with ``(support, query) -> value``, `adapt` and `evaluate`."""
    options: dict[str, Any] = {"steps": config.inner_steps}
    if config.adapt:
        options["adapt"] = list(config.adapt)
    if config.algorithm != "finetune":  # a pretrained model takes seconds to record, for each length of a batch
        options["capture"] = config.capture and config.device == "cpu" and not config.pretrained
    if config.algorithm == "metasgd":
        options["lr"] = config.inner_lr
    else:
        learn_lr = config.learn_lr and config.algorithm != "finetune"
        options["inner"] = OPTIMIZERS[config.inner](lr=config.inner_lr, learn_lr=learn_lr, per=config.lr_per)
    return ALGORITHMS[config.algorithm](model, mk.losses.causal_lm, **options)


def tokenizer_class(config: Config) -> type[DialogueTokenizer]:
    """What loads the tokenizer of a run."""
    if not config.pretrained:
        return Tokenizer
    from metakern.dialogue.huggingface import ChatTokenizer

    return ChatTokenizer


def _new(config: Config, tokenizer: DialogueTokenizer) -> nn.Module:
    sizes = (
        {"width": config.width, "heads": config.heads, "max_length": config.max_length}
        if config.model == "gpt"
        else {"embedding": config.width, "hidden": config.hidden}
    )
    return build_model(config.model, tokenizer.vocab_size, layers=config.layers, dropout=config.dropout, **sizes)


def _pretrained(config: Config, tokenizer: DialogueTokenizer) -> tuple[nn.Module, str]:
    """The pretrained model with metakern's modules, under LoRA if that is wanted, and its fingerprint."""
    from metakern.dialogue.huggingface import fingerprint, load_model

    model = load_model(config.pretrained, config.max_length, tokenizer.vocab_size)
    base = fingerprint(model)
    mk.patch(model)
    if config.lora:
        mk.lora(model, config.lora, list(config.lora_targets) or None, seed=config.seed)
    return model, base


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
        model, base = _pretrained(config, tokenizer) if config.pretrained else (_new(config, tokenizer), "")
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


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """``batch`` where ``model`` is."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def load_split(config: Config) -> Split:
    """The tasks of the config's data, the same split every time and everywhere."""
    held_out = config.validation_part, config.test_part
    return split_tasks(
        read(config.data, config.format),
        seed=config.seed,
        fractions=(1 - sum(held_out), *held_out),
        min_dialogues=config.min_dialogues,
        min_words=config.min_words,
    )


def episodes(config: Config, tasks: tuple[TaskData, ...], tokenizer: DialogueTokenizer, **changes: Any) -> Episodes:
    """Episodes of ``tasks`` as the config wants them, but for ``changes``."""
    names = ("support_size", "query_size", "max_length", "seed", "train_on", "windows")
    return Episodes(tasks, tokenizer, **{name: getattr(config, name) for name in names} | changes)


def curve(algorithm: Any, source: Episodes, steps: tuple[int, ...], limit: int = 0) -> tuple[list[str], Tensor]:
    """Tasks of ``source`` (at most ``limit``; 0: all) and their query losses after ``steps`` of adaptation,
    ``[len(steps), T]``, in evaluation mode."""
    training = algorithm.training
    algorithm.eval()
    names: list[str] = []
    losses = []
    for tasks, support, query in source.evaluation(limit or None):
        names += tasks
        support, query = (on_device_of(algorithm.model, batch) for batch in (support, query))
        losses.append(algorithm.evaluate(support, query, steps=steps).cpu())
    algorithm.train(training)
    return names, torch.cat(losses, 1)
