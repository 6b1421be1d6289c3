"""What a run is: a frozen dataclass made from defaults, a TOML file and flags, in that order.

Every field is a key of the TOML file and a flag of ``metakern train`` (``inner_lr = 0.1``, ``--inner-lr 0.1``).
A key that does not exist, a value of the wrong type or out of range is a `UserError` of one line.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from metakern.dialogue.registry import ALGORITHMS, OPTIMIZERS
from metakern.errors import UserError

__all__ = ["Config", "cache_folder"]


def _option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    rule = {"choices": choices, "least": least, "above": above, "below": below}
    return field(default=default, metadata={"help": text, **rule})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; ``help`` of a field's metadata says what it means.

    >>> Config(steps=10).steps
    10
    >>> Config.parse({"inner_lrr": 0.3})
    Traceback (most recent call last):
    metakern.errors.UserError: config: unknown key 'inner_lrr', did you mean 'inner_lr'?
    """

    data: str = _option(
        "chitchat", "packaged data (chitchat, chitchat:senders, chatterbot:english) or a file or folder"
    )
    format: str = _option("auto", "format of the file or folder; auto looks inside")
    train_on: str = _option("bot", "whose words the loss counts", choices=("bot", "all"))
    vocab_size: int = _option(2048, "size of the byte-level BPE vocabulary", least=262)
    max_length: int = _option(64, "tokens of a conversation that are kept", least=2)
    windows: str = _option("any", "where in a conversation a window may be", choices=("any", "opening", "later"))
    validation_part: float = _option(0.1, "share of the tasks that choices are made on", above=0, below=0.5)
    test_part: float = _option(0.1, "share of the tasks that are kept for eval", above=0, below=0.5)
    min_dialogues: int = _option(8, "conversations that a task must have", least=2)
    min_words: int = _option(5, "words of a turn that must not recur in other splits or conversations", least=1)
    support_size: int = _option(8, "conversations of a task to adapt on", least=1)
    query_size: int = _option(8, "conversations of a task to be judged on", least=1)

    model: str = _option(
        "gru",
        "kind of language model; hf: a pretrained one, in the directory PATH or, as hf:smollm2, in its package",
        choices=("rnn", "gru", "lstm", "gpt", "hf:PATH"),
    )
    system: str = _option("", "what a system says before a conversation (hf); empty: what the model's template says")
    lora: int = _option(
        0, "rank of the adapters that are trained in place of the model's weights (hf); 0: none", least=0
    )
    lora_targets: tuple[str, ...] = _option((), "name patterns of the linear layers that get adapters")
    width: int = _option(128, "width of the embedding (gpt: of the model)", least=1)
    hidden: int = _option(256, "hidden units of a recurrent layer", least=1)
    layers: int = _option(1, "number of layers", least=1)
    heads: int = _option(4, "attention heads (gpt)", least=1)
    dropout: float = _option(0.0, "probability of dropping a unit", least=0)

    algorithm: str = _option("maml", "how to train (finetune: the baseline)", choices=tuple(ALGORITHMS))
    inner: str = _option("sgd", "inner optimizer", choices=tuple(OPTIMIZERS))
    inner_lr: float = _option(0.1, "inner learning rate; where it is learned, its start", above=0)
    learn_lr: bool = _option(True, "learn the inner learning rate")
    lr_per: str = _option(
        "parameter", "what has a learned inner rate of its own", choices=("all", "parameter", "element")
    )
    inner_steps: int = _option(3, "inner steps in training", least=1)
    adapt: tuple[str, ...] = _option((), "name patterns of the parameters that adapt")
    capture: bool = _option(True, "on a CPU, record the kernels of a meta-step and call them without Python")

    outer_lr: float = _option(1e-3, "learning rate of the outer AdamW", above=0)
    rate_lr: float = _option(1e-3, "learning rate of the learned inner rates", above=0)
    finetune_lr: float = _option(0.0, "outer_lr of the baseline finetune; 0: the same", least=0)
    weight_decay: float = _option(0.01, "weight decay of the outer AdamW, on matrices only", least=0)
    warmup: int = _option(50, "outer steps until the learning rate is full", least=0)
    cosine: bool = _option(True, "let the learning rate end at zero along a half cosine")
    clip: float = _option(1.0, "largest norm of the gradient; 0: any", least=0)
    tasks: int = _option(4, "tasks in an outer step", least=1)
    steps: int = _option(1000, "outer steps", least=1)
    minutes: float = _option(0.0, "time limit of the outer steps; 0: none", least=0)

    pretrain_steps: int = _option(0, "steps of plain language modeling before, shared with every baseline", least=0)
    pretrain_minutes: float = _option(0.0, "time limit of these; 0: none", least=0)
    pretrain_lr: float = _option(3e-3, "learning rate of these", above=0)
    pretrain_on: str = _option("all", "whose words they count", choices=("bot", "all"))

    log_every: int = _option(10, "outer steps between lines of the log", least=1)
    eval_every: int = _option(100, "outer steps between validations, each followed by a checkpoint", least=1)
    eval_tasks: int = _option(0, "validation tasks looked at; 0: all", least=0)
    seed: int = _option(0, "seed of the split, the episodes, the weights and the dropout", least=0)
    device: str = _option("cpu", "where to compute", choices=("cpu", "cuda"))
    threads: int = _option(0, "threads that PyTorch may use; 0: as many as it likes", least=0)

    def __post_init__(self) -> None:
        for key in fields(self):
            _check(key.name, getattr(self, key.name), key.default, key.metadata)
        if self.lora and not self.pretrained:
            raise UserError(f"lora must be 0 for the model {self.model}, which is not pretrained, got {self.lora}")

    @property
    def pretrained(self) -> str:
        """The name of the pretrained model, or nothing."""
        return self.model[3:] if self.model.startswith("hf:") else ""

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "config", base: Config | None = None) -> Config:
        """``base`` (the defaults) with ``values`` over it; errors begin with ``source``."""
        known = [key.name for key in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise UserError(f"{source}: unknown key {name!r}, did you mean {near!r}?")
        changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return replace(base or cls(), **changes)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a TOML file, or one of the packaged settings by its name, such as ``demo``."""
        file = Path(path)
        packaged = files("metakern.dialogue") / "configs" / f"{path}.toml"
        toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        try:
            text = file.read_text("utf-8") if file.exists() or not packaged.is_file() else packaged.read_text("utf-8")
            return cls.parse(toml.loads(text), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise UserError(f"{path}: cannot read the config: {reason}") from None
        except toml.TOMLDecodeError as error:
            raise UserError(f"{path}: is not TOML: {error}") from None

    def toml(self) -> str:
        """The config as a TOML file that explains itself; `load` reads it back.

        >>> "seed = 7" in Config(seed=7).toml().splitlines()
        True
        """
        lines = []
        for key in fields(self):
            value = getattr(self, key.name)
            shown = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
            lines += [f"# {describe(key.metadata)}", f"{key.name} = {shown}"]
        return "\n".join(lines) + "\n"


def describe(metadata: Mapping[str, Any]) -> str:
    """A field's help, with its choices."""
    return metadata["help"] + (f": {', '.join(metadata['choices'])}" if metadata["choices"] else "")


def cache_folder() -> Path:
    """Where what can be made again is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metakern"


def _check(name: str, value: Any, default: Any, rule: Mapping[str, Any]) -> None:
    if isinstance(default, float):
        right, kind = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif isinstance(default, tuple):
        right, kind = isinstance(value, tuple) and all(isinstance(v, str) for v in value), "a list of strings"
    else:
        right = type(value) is type(default)
        kind = {bool: "true or false", int: "a whole number", str: "a string"}[type(default)]
    if not right:
        raise UserError(f"{name} must be {kind}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value}")
    if rule["choices"] and not _among(value, rule["choices"]):
        raise UserError(f"{name} must be one of {', '.join(rule['choices'])}, got {value!r}")
    if rule["least"] is not None and not value >= rule["least"]:
        raise UserError(f"{name} must be at least {rule['least']}, got {value}")
    if rule["above"] is not None and not value > rule["above"]:
        raise UserError(f"{name} must be more than {rule['above']}, got {value}")
    if rule["below"] is not None and not value < rule["below"]:
        raise UserError(f"{name} must be less than {rule['below']}, got {value}")


def _among(value: str, choices: tuple[str, ...]) -> bool:
    """Whether ``value`` is one of ``choices``, of which one like ``hf:PATH`` stands for all that begin with ``hf:``."""
    prefixes = tuple(choice.removesuffix("PATH") for choice in choices if choice.endswith(":PATH"))
    return value in choices or (value.startswith(prefixes) and value not in prefixes)
