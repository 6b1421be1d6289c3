"""The settings of a run: a frozen dataclass whose values come from defaults, a TOML file and flags.

A flag overrides the file, and the file overrides the defaults. Each field is a key of the TOML file and a flag of
`metakern train` (`inner_lr = 0.1`, `--inner-lr 0.1`). An unknown key, or a value of the wrong type or out of range,
raises a `UserError` of one line. The last line of a file that `Config.toml` made is a digest of the lines above, so
that damage is noticed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from metakern import io
from metakern.dialogue.hints import KINDS as HINTS
from metakern.dialogue.readers import formats
from metakern.dialogue.registry import OPTIMIZERS
from metakern.dialogue.split import OVERLAPS
from metakern.errors import UserError
from metakern.meta.algorithms.registry import ALGORITHMS, find_algorithm

__all__ = ["MAY_CHANGE", "Config"]

PRETRAIN_STEPS = 300  # of a model that begins with random weights
PARTS = ("generator", "parser", "policy")
RECURRENT = ("rnn", "gru", "lstm")  # the models of a policy
PARSERS = ("protonet", "protomaml", "finetune")  # the algorithms of a parser
REMOVED = ("minutes", "pretrain_minutes")  # time limits, in the files of older runs
# The settings that may differ from those with which a run began.
OF_THE_MACHINE = ("shard", "device", "threads")
MAY_CHANGE = ("steps", "patience", "pretrain_steps", "log_every", "eval_every", "eval_tasks", *OF_THE_MACHINE)
LARGEST = 3e38  # of any number: float32 has no larger ones
LARGEST_FILE = 2**20  # bytes
LONGEST = 4096  # characters of a text, and texts or numbers of a list
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 200
DIGEST = "# SHA-256 of the lines above, which shows damage. Remove this line if you change one: "


def packaged_configs() -> list[str]:
    """Return the names of the configs that `Config.load` finds in the package."""
    folder = files("metakern.dialogue") / "configs"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def _option(
    default: Any,
    text: str,
    *,
    choices: Collection[str] = (),
    least: float | None = None,
    most: float = LARGEST,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    rule = {"choices": choices, "least": least, "most": most, "above": above, "below": below}
    return field(default=default, metadata={"help": text, **rule})


@dataclass(frozen=True)
class Config:
    """All settings of a run, by keyword.

    `metakern train --help` explains each field, and so do the comments of the file that `toml` makes. The explanation
    is also in the field's metadata, under `help`.

    Raises:
        UserError: If a value has the wrong type, is not finite, is out of range, is too long or is none of the choices;
            also if `lora` is not 0 and `model` is not `hf:PATH`, or `precision` is not float32 and `device` is not cpu,
            or `lm_weight` is not 0 or `hints` not none and `part` is not generator, or `model` is bag and `part` is not
            parser, or `part` is policy and `model` not recurrent.

    >>> Config(steps=10).steps
    10
    >>> Config.parse({"inner_lrr": 0.3})
    Traceback (most recent call last):
    metakern.errors.UserError: config: unknown key 'inner_lrr', did you mean 'inner_lr'?
    """

    part: str = _option(
        "generator",
        "part of a dialogue manager to train: the language model that generates replies, the classifier that parses"
        " messages (data with intents), or the policy that chooses the next act (data with acts)",
        choices=PARTS,
    )
    data: str = _option(
        "chitchat",
        "conversations: a file, a folder, or packaged data such as chitchat, chitchat:senders, chatterbot:english or"
        " bots (synthetic)",
    )
    format: str = _option(
        "auto",
        f"format of the file or folder: {', '.join(formats())}; auto recognizes it by the names of files and their"
        " first lines or records",
    )
    task_key: str = _option("", "key or column of a record that names its task; empty: as the format has it")
    reader_options: tuple[str, ...] = _option(
        (), "further options of the format's reader, as name=value: tasks=domains of crosswoz, question=Frage of csv"
    )
    stream: bool = _option(
        False,
        "leave conversations in their files and read them when they are drawn; needs a format that has a JSON record on"
        " each line, such as messages",
    )
    train_on: str = _option("bot", "speakers whose turns count in the loss", choices=("bot", "all"))
    vocab_size: int = _option(
        1024, "tokens in the byte-level BPE vocabulary (not for hf models)", least=262, most=2**20
    )
    max_length: int = _option(
        96, "tokens in a window, which is the part of a conversation that the model reads at once", least=2, most=2**20
    )
    windows: str = _option(
        "any",
        "where in a conversation a window may begin (opening is the start, later is after the opening window)",
        choices=("any", "opening", "later"),
    )
    hints: str = _option(
        "none",
        "what a system turn before each reply of the bot says about it: its dialogue act (data with acts), the reply to"
        " the most similar message of the support, or both (generator)",
        choices=HINTS,
    )
    validation_part: float = _option(
        0.1, "share of the tasks for validation, which chooses the best weights", above=0, below=0.5
    )
    test_part: float = _option(0.1, "share of the tasks that are kept for `metakern eval`", above=0, below=0.5)
    validation_data: str = _option("", "conversations whose tasks are for validation, in place of that share")
    test_data: str = _option("", "conversations whose tasks are for test, in place of that share")
    validation_tasks: tuple[str, ...] = _option(
        (), "names or patterns of the tasks for validation, in place of that share"
    )
    test_tasks: tuple[str, ...] = _option((), "names or patterns of the tasks for test, in place of that share")
    min_dialogues: int = _option(
        8, "conversations that a task must have; a task with fewer is left out", least=2, most=2**30
    )
    min_words: int = _option(
        5,
        "length, in words, from which a turn may not recur in another split or in another conversation of its task",
        least=1,
        most=2**30,
    )
    overlap: str = _option(
        "users",
        "whose turns may not recur so: those of users (a bot may give its replies again), all turns, or none but whole"
        " dialogues",
        choices=OVERLAPS,
    )
    support_size: int = _option(
        8, "windows of a task in its support, which the inner loop adapts to", least=1, most=2**16
    )
    query_size: int = _option(
        8,
        "windows of a task in its query, on which the adapted model is judged; for a parser, texts of each intent",
        least=1,
        most=2**16,
    )
    ways: int = _option(5, "intents of a task (parser)", least=2, most=2**10)
    shots: tuple[int, ...] = _option(
        (1, 5),
        "support texts of each intent; several numbers take turns from step to step (parser)",
        least=1,
        most=2**10,
    )

    model: str = _option(
        "gpt",
        "language model; hf:PATH is a pretrained one in the directory PATH, hf:smollm2 one that a package holds; bag is"
        " a weighted mean of embeddings, for a parser, which is no language model",
        choices=("rnn", "gru", "lstm", "gpt", "bag", "hf:PATH"),
    )
    system: str = _option(
        "", "system message before each conversation that has none (hf models); empty: as the chat template has it"
    )
    lora: int = _option(
        0,
        "rank of the LoRA adapters that are trained instead of the model's weights (hf models); 0: none",
        least=0,
        most=2**16,
    )
    lora_targets: tuple[str, ...] = _option((), "name patterns of the linear layers that get adapters (hf models)")
    width: int = _option(
        128, "width of the embedding, and of all layers in gpt (not for hf models)", least=1, most=2**16
    )
    hidden: int = _option(256, "hidden units in a recurrent layer (rnn, gru, lstm)", least=1, most=2**16)
    layers: int = _option(2, "number of layers (not for hf models)", least=1, most=2**10)
    heads: int = _option(4, "attention heads in a layer (gpt)", least=1, most=2**16)
    dropout: float = _option(0.0, "dropout probability (not for hf models)", least=0)

    algorithm: str = _option(
        "auto",
        f"how to train; auto is maml, or protonet for a parser (which has {', '.join(PARSERS)}); finetune is the"
        " baseline without meta-learning; other packages may register more",
        choices=ALGORITHMS,
    )
    algorithm_options: tuple[str, ...] = _option(
        (), "further arguments of the algorithm, as name=value: strength=1.0 of imaml, anneal=500 of mamlplusplus"
    )
    inner: str = _option("sgd", "inner optimizer (metasgd and mamlplusplus have their own)", choices=tuple(OPTIMIZERS))
    inner_options: tuple[str, ...] = _option(
        (), "further arguments of the inner optimizer, as name=value: momentum=0.9 of sgd, eps=1e-4 of adam"
    )
    inner_clip: float = _option(
        0.0, "largest norm of the gradient of an inner step, for each task; 0: no clipping", least=0
    )
    inner_lr: float = _option(0.3, "inner learning rate; with a learned rate, its initial value", above=0)
    learn_lr: bool = _option(True, "learn the inner learning rate in the outer loop (not in finetune)")
    lr_per: str = _option(
        "element",
        "learn one inner rate for all parameters, one for each parameter tensor, or one for each of its elements",
        choices=("all", "parameter", "element"),
    )
    inner_steps: tuple[int, ...] = _option(
        (1, 3, 5),
        "inner steps in training; several numbers, of which some may be 0, take turns from outer step to outer step"
        " (mamlplusplus, metalstm: the largest)",
        least=0,
        most=10**4,
    )
    positive_rates: bool = _option(False, "set learned inner rates that become negative to 0")
    adapt: tuple[str, ...] = _option(
        (), "name patterns of the parameters that the inner loop adapts; without any, anil adapts the head alone"
    )
    capture: bool = _option(
        True,
        "record the kernels of a meta-gradient and repeat them without Python (C++ on a CPU, a CUDA graph on a GPU)",
    )
    precision: str = _option(
        "float32",
        "precision of matrix products in meta-gradients and adaptation; all else is float32 (bfloat16 on a CPU only)",
        choices=("float32", "bfloat16"),
    )

    lm_weight: float = _option(
        0.0, "weight of the plain loss of the unadapted model on support and query, beside the outer loss", least=0
    )
    outer_lr: float = _option(2e-3, "learning rate of the outer optimizer, AdamW", above=0)
    rate_lr: float = _option(1e-2, "outer learning rate of the learned inner rates", above=0)
    finetune_lr: float = _option(
        0.0, "outer_lr of the finetune baseline that `metakern eval` trains; 0: outer_lr of this run", least=0
    )
    weight_decay: float = _option(0.01, "weight decay of the outer AdamW, on matrices only", least=0)
    warmup: int = _option(20, "steps over which the learning rate rises to its full value", least=0, most=10**9)
    cosine: bool = _option(True, "let the learning rate decay to zero along a half cosine")
    clip: float = _option(1.0, "largest norm of the outer gradient; 0: no clipping", least=0)
    tasks: int = _option(4, "tasks in an outer step", least=1, most=2**16)
    task_power: float = _option(
        0.0, "draw tasks in proportion to their numbers of conversations to this power; 0: all alike", least=0, most=8
    )
    augment_below: int = _option(
        30,
        "with fewer tasks than this to train on, which could be remembered, meta-training renames the tokens of half of"
        " them, so that they must be learned from their support (not for hf models, nor for algorithms without an inner"
        " loop); 0: never",
        least=0,
        most=10**9,
    )
    steps: int = _option(500, "outer steps", least=1, most=10**9)
    patience: int = _option(
        0,
        "validations without a better one after which training or pretraining ends; 0: neither ends early",
        least=0,
        most=10**9,
    )

    pretrain_steps: int = _option(
        -1,
        "steps of plain language modeling before meta-training, of which the best weights by validation are kept;"
        f" contenders start from the same weights; -1: {PRETRAIN_STEPS}, but 0 for a policy and for"
        " bag and hf models",
        least=-1,
        most=10**9,
    )
    pretrain_lr: float = _option(4e-3, "learning rate of the pretraining", above=0)
    pretrain_on: str = _option(
        "all", "speakers whose turns count in the loss of the pretraining", choices=("bot", "all")
    )

    log_every: int = _option(10, "steps between lines of the log", least=1, most=2**63 - 1)
    eval_every: int = _option(100, "steps between validations; a checkpoint follows each", least=1, most=10**9)
    eval_tasks: int = _option(0, "tasks in a validation; 0: all validation tasks", least=0, most=10**9)
    seed: int = _option(
        0, "seed of the split, the episodes, the initial weights and the dropout", least=0, most=2**63 - 1
    )
    shard: bool = _option(
        False, "divide parameters, gradients and moments between the processes while no step uses them (FSDP2)"
    )
    device: str = _option("cpu", "where to compute", choices=("cpu", "cuda"))
    threads: int = _option(0, "CPU threads for PyTorch; 0: PyTorch's default", least=0, most=2**10)

    def __post_init__(self) -> None:
        given: Any = self.inner_steps
        if type(given) is int:
            object.__setattr__(self, "inner_steps", (given,))
        if self.pretrain_steps == -1:
            none = self.pretrained or self.model == "bag" or self.part == "policy"
            object.__setattr__(self, "pretrain_steps", 0 if none else PRETRAIN_STEPS)
        if self.algorithm == "auto":
            object.__setattr__(self, "algorithm", "protonet" if self.part == "parser" else "maml")
        find_algorithm(self.algorithm)
        for key in fields(self):
            of_parser = key.name == "algorithm" and self.part == "parser"
            rule = {**key.metadata, "choices": PARSERS} if of_parser else key.metadata
            _check(key.name, getattr(self, key.name), key.default, rule)
        if not self.most_inner_steps:
            raise UserError("inner_steps must have a number above 0, got only 0")
        if self.lora and not self.pretrained:
            raise UserError(
                f"lora must be 0 for the model {self.model}, which is not pretrained, got {self.lora}:"
                " choose a model hf:PATH for it"
            )
        if self.model == "bag" and (self.part != "parser" or self.pretrain_steps):
            raise UserError(
                "model must be a language model, got 'bag': it is for --part parser with --pretrain-steps 0 alone"
            )
        if self.part == "policy" and (self.model not in RECURRENT or self.pretrain_steps):
            raise UserError(
                f"model must be one of {', '.join(RECURRENT)} for a policy, with pretrain_steps 0, got {self.model!r}"
                f" and {self.pretrain_steps}"
            )
        if self.hints != "none" and self.part != "generator":
            raise UserError(f"hints must be none for the part {self.part}, got {self.hints!r}")
        if self.lm_weight and self.part != "generator":
            raise UserError(f"lm_weight must be 0 for the part {self.part}, got {self.lm_weight:g}")
        if self.precision != "float32" and self.device != "cpu":
            raise UserError(f"precision must be float32 for the device {self.device}, got {self.precision!r}")

    @property
    def most_inner_steps(self) -> int:
        """The largest number of inner steps in training."""
        return max(self.inner_steps)

    def idle(self, names: Collection[str]) -> list[str]:
        """Return those of the named settings that change nothing in a run with this config.

        >>> Config(model="gru", heads=8).idle(["heads", "width"])
        ['heads']
        """
        return [name for name in names if name in _COUNTS and not _COUNTS[name](self)]

    @property
    def pretrained(self) -> str:
        """What follows `hf:` in the name of a pretrained model; for other models, an empty string."""
        return self.model[3:] if self.model.startswith("hf:") else ""

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "config", base: Config | None = None) -> Config:
        """Return `base` with `values` in the places of its own.

        Args:
            values: New values by key. A list stands for a tuple.
            source: What error messages begin with, such as the path of the file that holds the values.
            base: The config to start from; None stands for the defaults.

        Raises:
            UserError: If a key is unknown, or as the class says.

        >>> Config.parse({"steps": 9}, base=Config(model="gpt")).model
        'gpt'
        """
        known = [key.name for key in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name[:LONGEST], known, n=1, cutoff=0.0)[0]
                raise UserError(f"{source}: unknown key {_shown(name)}, did you mean {near!r}?")
        changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return replace(base, **changes) if base else cls(**changes)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | Path, complete: bool = False) -> Config:
        """Read a TOML file, or a packaged config by its name, such as `bots`; a file of that name comes first.

        Args:
            path: The file or the name.
            complete: Refuse a file that has neither all keys nor the digest of a file that had.

        Raises:
            UserError: If the file can't be read or is not TOML in UTF-8; if it is not as `toml` made it; if a key is
                unknown; if it sets a time limit, as older runs could; or as the class says.
        """
        file = Path(path)
        packaged = files("metakern.dialogue") / "configs" / f"{path}.toml"
        toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        try:
            data = packaged.read_bytes() if not file.exists() and packaged.is_file() else io.read(file, LARGEST_FILE)
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
            values = toml.loads(text)
        except (OSError, UnicodeDecodeError) as error:
            reason = f"{error.strerror}" if isinstance(error, OSError) else "it is not UTF-8 text"
            if isinstance(error, FileNotFoundError):
                reason += f"; packaged configs are {', '.join(packaged_configs())}"
            raise UserError(f"{path}: cannot read the config: {reason}") from None
        except (ValueError, RecursionError) as error:  # a ValueError also for thousands of digits
            reason = str(error) if isinstance(error, toml.TOMLDecodeError) else "too deeply nested or too long a number"
            raise UserError(f"{path}: is not TOML: {reason[:200]}") from None
        body, _, digest = text.rstrip("\n").rpartition(f"\n{DIGEST}")
        if body and digest != _sha256(body):
            cure = "put it back or, if you changed it, remove the line that begins with # SHA-256"
            raise UserError(f"{path}: is not as it was written: {cure}")
        lacking = [key.name for key in fields(cls) if key.name not in values]
        if complete and not body and lacking:
            raise UserError(f"{path}: lacks {lacking[0]}: it was cut short; put it back")
        for name in REMOVED:
            if limit := values.pop(name, 0):
                raise UserError(
                    f"{path}: {name} must be 0, as runs have no time limit any more, got {limit}: remove the line;"
                    " metakern train --time plans the numbers of steps for a given time"
                )
        return cls.parse(values, str(path))

    def toml(self) -> str:
        """Return the config as a TOML file, with a comment that explains each key and, as the last line, a digest.

        `load` reads it back.

        >>> "seed = 7" in Config(seed=7).toml().splitlines()
        True
        """
        lines = []
        for key in fields(self):
            value = getattr(self, key.name)
            shown = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
            lines += [f"# {describe(key.metadata)}", f"{key.name} = {shown}"]
        text = "\n".join(lines)
        return f"{text}\n{DIGEST}{_sha256(text)}\n"

    def settings(self) -> dict[str, Any]:
        """Return all settings by key, as JSON holds them.

        >>> Config(inner_steps=2).settings()["inner_steps"]
        [2]
        """
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


# The settings that change something in some runs alone, and in which.
_COUNTS: dict[str, Callable[[Config], Any]] = {
    "vocab_size": lambda c: not c.pretrained,
    "validation_part": lambda c: not (c.validation_data or c.validation_tasks),
    "test_part": lambda c: not (c.test_data or c.test_tasks),
    "support_size": lambda c: c.part != "parser",
    "ways": lambda c: c.part == "parser",
    "shots": lambda c: c.part == "parser",
    "system": lambda c: c.pretrained,
    "lora_targets": lambda c: c.lora,
    "width": lambda c: not c.pretrained,
    "hidden": lambda c: c.model in RECURRENT,
    "layers": lambda c: not c.pretrained and c.model != "bag",
    "heads": lambda c: c.model == "gpt",
    "dropout": lambda c: not c.pretrained,
    "lr_per": lambda c: c.learn_lr,
    "pretrain_lr": lambda c: c.pretrain_steps,
    "pretrain_on": lambda c: c.pretrain_steps,
}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(value: Any) -> str:
    """Return what a value looks like, in a few hundred characters at most."""
    try:
        return SHOWN.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__} of great length"


def describe(metadata: Mapping[str, Any]) -> str:
    """Return the help text of a field's metadata, followed by its choices."""
    return metadata["help"] + (f": {', '.join(metadata['choices'])}" if metadata["choices"] else "")


def _check(name: str, value: Any, default: Any, rule: Mapping[str, Any]) -> None:
    if isinstance(default, float):
        right, kind = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif isinstance(default, tuple):
        of = int if default else str
        right = isinstance(value, tuple) and all(type(v) is of for v in value) and len(value) >= bool(default)
        kind = "whole numbers" if default else "a list of strings"
    else:
        right = type(value) is type(default)
        kind = {bool: "true or false", int: "a whole number", str: "a string"}[type(default)]
    if not right:
        raise UserError(f"{name} must be {kind}, got {_shown(value)}")
    if isinstance(value, (str, tuple)) and max(len(value), *(len(v) for v in value if isinstance(v, str)), 0) > LONGEST:
        raise UserError(f"{name} must have at most {LONGEST} characters or entries, got more")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value}")
    if rule["choices"] and not _among(value, rule["choices"]):
        raise UserError(f"{name} must be one of {', '.join(rule['choices'])}, got {_shown(value)}")
    for number in value if isinstance(value, tuple) else (value,):
        if rule["least"] is not None and not number >= rule["least"]:
            raise UserError(f"{name} must be at least {rule['least']}, got {_shown(number)}")
        if not isinstance(number, str) and number > rule["most"]:
            raise UserError(f"{name} must be at most {rule['most']}, got {_shown(number)}")
    if rule["above"] is not None and not value > rule["above"]:
        raise UserError(f"{name} must be more than {rule['above']}, got {_shown(value)}")
    if rule["below"] is not None and not value < rule["below"]:
        raise UserError(f"{name} must be less than {rule['below']}, got {_shown(value)}")


def _among(value: str, choices: Collection[str]) -> bool:
    """Return whether `value` is one of `choices`; the choice `hf:PATH` stands for `hf:` followed by any text."""
    prefixes = tuple(choice.removesuffix("PATH") for choice in choices if choice.endswith(":PATH"))
    return value in choices or (value.startswith(prefixes) and value not in prefixes)
