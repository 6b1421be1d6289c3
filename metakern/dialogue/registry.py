"""Build what a config names: the algorithm with its inner optimizer, the model, the class of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import metakern as mk
from metakern.dialogue.baselines import PROMPT_LENGTH, FineTune, InContext, PromptTuning
from metakern.dialogue.hypernetwork import TextHyperNetwork
from metakern.dialogue.manager.models import ActModel, BagEncoder
from metakern.dialogue.manager.training import parser_model, prototypical
from metakern.dialogue.models import build_model
from metakern.errors import UserError, by_the_user
from metakern.meta.algorithms.registry import ALGORITHMS, Algorithm
from metakern.meta.plan import free_bytes
from metakern.optim import InnerOptimizer

if TYPE_CHECKING:
    from metakern.dialogue.config import Config
    from metakern.dialogue.tokenizer import DialogueTokenizer


for name, make, rates in (
    ("maml", mk.MAML, "learned"),
    ("mamlplusplus", mk.MAMLPlusPlus, "own"),
    ("fomaml", mk.FOMAML, "learned"),
    ("anil", mk.ANIL, "learned"),
    ("boil", mk.BOIL, "learned"),
    ("metasgd", mk.MetaSGD, "own"),
    ("metalstm", mk.MetaLSTM, "own"),
    ("imaml", mk.IMAML, "fixed"),
    ("hypernetwork", TextHyperNetwork, "learned"),
    ("reptile", mk.Reptile, "learned"),
    ("finetune", FineTune, "fixed"),
    ("prompt", PromptTuning, "fixed"),
    ("incontext", InContext, "fixed"),
):
    ALGORITHMS[name] = Algorithm(make, rates)
PROTOMAML = Algorithm(mk.ProtoMAML)
# Arguments of algorithms that settings stand for, and the names of these settings.
SETTINGS = {
    "steps": "inner_steps",
    "precision": "precision",
    "adapt": "adapt",
    "capture": "capture",
    "lr": "inner_lr",
    "inner": "inner",
}
ONE_NUMBER = (mk.MAMLPlusPlus, mk.MetaLSTM)  # whose parts are for a fixed number of inner steps, the largest
PLAIN = (FineTune, PromptTuning, InContext)  # trained without an inner loop
OPTIMIZERS: dict[str, Any] = {
    "sgd": mk.optim.SGD,
    "adam": mk.optim.Adam,
    "adamw": mk.optim.AdamW,
    "rmsprop": mk.optim.RMSprop,
    "adagrad": mk.optim.Adagrad,
    "normalized": mk.optim.NormalizedSGD,
    "muon": mk.optim.Muon,
    "metacurvature": mk.optim.MetaCurvature,
}


@by_the_user()
def build_algorithm(config: Config, model: nn.Module, labels: Sequence[str] = (), part: str = "") -> Any:
    """Return the algorithm of `config` over `model`: a module with `(support, query) -> loss`, `adapt` and `evaluate`.

    Args:
        config: The settings.
        model: As `build_model_of` returns it.
        labels: Those of the run, for a parser or a policy.
        part: What the model is: a generator, a parser or a policy; "" stands for the part that the config names.

    Raises:
        UserError: If the model or a setting does not suit the algorithm.
    """
    part = part or config.part
    if part == "parser" and config.algorithm != "protomaml":
        return _made(prototypical, config, config, model, labels)
    algorithm = PROTOMAML if part == "parser" else ALGORITHMS[config.algorithm]
    if part == "policy" and algorithm.make in (PromptTuning, InContext, TextHyperNetwork):
        raise UserError(f"algorithm must be one that adapts a policy by gradients, got {config.algorithm!r}")
    precision = None if config.precision == "float32" else config.precision
    options: dict[str, Any] = {"steps": config.most_inner_steps, "precision": precision}
    if config.adapt:
        options["adapt"] = list(config.adapt)
    if algorithm.make not in PLAIN:
        options["capture"] = config.capture
    if algorithm.rates == "own":
        if config.inner_clip:
            raise UserError(f"inner_clip must be 0 for {config.algorithm}, which has an inner optimizer of its own")
        options["lr"] = config.inner_lr
    else:
        learned = config.learn_lr and algorithm.rates == "learned"
        options["inner"] = inner_optimizer(config, learned)
    loss = mk.losses.causal_lm if part == "generator" else mk.losses.classification
    return _made(algorithm.make, config, model, loss, **options)


def _made(make: Callable[..., Any], config: Config, *args: Any, **options: Any) -> Any:
    """Return `make(*args, **options)`, with the `algorithm_options` of a config among the options."""
    given = named("algorithm_options", config.algorithm_options)
    if twice := SETTINGS.keys() & given.keys():
        name = min(twice)
        raise UserError(f"algorithm_options must not have {name}, which the setting {SETTINGS[name]} says")
    try:
        return make(*args, **options | given)
    except TypeError as error:
        if not given:
            raise
        raise UserError(f"algorithm_options must be arguments of {config.algorithm}, got {error}") from None


def inner_optimizer(config: Config, learned: bool) -> InnerOptimizer:
    """Return the inner optimizer of `config`; `learned`: the outer loop learns its rates."""
    make, options = OPTIMIZERS[config.inner], named("inner_options", config.inner_options)
    if "lr" in options:
        raise UserError("inner_options must not have lr, which the setting inner_lr says")
    if make is not mk.optim.MetaCurvature:
        options = {"learn_lr": learned, "per": config.lr_per, **options}
    try:
        inner = make(lr=config.inner_lr, **options)
    except TypeError as error:
        raise UserError(f"inner_options must be arguments of {config.inner}, got {error}") from None
    return mk.optim.Clipped(inner, config.inner_clip) if config.inner_clip else inner


def named(key: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that the `name=value` texts under a key of the config stand for.

    Values are numbers, true, false, none or words.

    Raises:
        UserError: If a text has another form.

    >>> named("algorithm_options", ["anneal=500", "solver=neumann"])
    {'anneal': 500, 'solver': 'neumann'}
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{key} must be name=value, got {text!r}")
        try:
            found[name] = json.loads({"none": "null"}.get(value.lower(), value.lower()))
        except (ValueError, RecursionError):
            found[name] = value
    return found


def tokenizer_class(config: Config) -> type[DialogueTokenizer]:
    """Return the class of the tokenizer of a run with this config."""
    if config.pretrained:
        from metakern.dialogue.huggingface import ChatTokenizer

        return ChatTokenizer
    from metakern.dialogue.tokenizer import Tokenizer

    return Tokenizer


def _new(config: Config, tokenizer: DialogueTokenizer) -> nn.Module:
    if config.model == "bag":
        return BagEncoder(tokenizer.vocab_size, config.width)
    longest = config.max_length
    if config.algorithm == "incontext":
        longest *= 1 + config.support_size
    if config.algorithm == "prompt":
        length = named("algorithm_options", config.algorithm_options).get("length", PROMPT_LENGTH)
        longest += length if isinstance(length, int) else 0  # the soft prompt refuses other types
    sizes = (
        {"width": config.width, "heads": config.heads, "max_length": longest}
        if config.model == "gpt"
        else {"embedding": config.width, "hidden": config.hidden}
    )
    _check_memory(config, tokenizer.vocab_size)
    return build_model(config.model, tokenizer.vocab_size, layers=config.layers, dropout=config.dropout, **sizes)


def _check_memory(config: Config, vocab_size: int) -> None:
    """Raise a UserError if the weights, their gradients and the optimizer's two moments can't fit into the memory."""
    width, hidden = config.width, config.hidden
    if config.model == "gpt":
        weights = 12 * config.layers * width**2
    else:
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[config.model]
        weights = gates * hidden * (width + hidden * (2 * config.layers - 1)) + hidden * width
    weights += vocab_size * width
    needed, free = 16 * weights, free_bytes(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"width, hidden, layers and vocab_size must suit the memory: training {weights:,} weights needs"
            f" {needed / 2**30:,.0f} GiB, and {free / 2**30:,.1f} GiB are free: lower them"
        )


def _pretrained(config: Config, tokenizer: DialogueTokenizer) -> tuple[nn.Module, str]:
    """Return the patched pretrained model, with LoRA layers if `lora` is not 0, and the fingerprint of its weights."""
    from metakern.dialogue.huggingface import fingerprint, load_model

    model = load_model(config.pretrained, config.max_length, tokenizer.vocab_size)
    base = fingerprint(model)
    mk.patch(model)
    if config.lora:
        mk.lora(model, config.lora, list(config.lora_targets) or None, seed=config.seed)
    return model, base


@by_the_user()
def build_model_of(config: Config, tokenizer: DialogueTokenizer, labels: Sequence[str] = ()) -> tuple[nn.Module, str]:
    """Return the model of `config` before training, and the fingerprint of its pretrained weights ("": it has none).

    Args:
        config: The settings.
        tokenizer: The tokenizer of the run.
        labels: Those of the run, for a parser or a policy.

    Raises:
        DataError: If a pretrained model can't be read.
        UserError: If a size or a LoRA setting does not suit the model.
    """
    if config.part == "policy":
        return ActModel(tokenizer.vocab_size, config.width, config.model, config.hidden, len(labels)), ""
    model, base = _pretrained(config, tokenizer) if config.pretrained else (_new(config, tokenizer), "")
    return parser_model(config, model) if config.part == "parser" else model, base
