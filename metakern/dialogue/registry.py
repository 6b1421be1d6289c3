"""Build what a config names: the algorithm with its inner optimizer, the model, the class of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue.episodes import Batch
from metakern.dialogue.models import build_model
from metakern.errors import by_the_user

if TYPE_CHECKING:
    from metakern.dialogue.config import Config
    from metakern.dialogue.tokenizer import DialogueTokenizer


class FineTune(nn.Module):
    """The baseline: plain training on support and query together, and MAML's adaptation afterwards.

    `options` are those of `metakern.MAML`.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], **options: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        maml = mk.MAML(model, loss, **options)
        self.inner, self.adapt, self.evaluate = maml.inner, maml.adapt, maml.evaluate

    def forward(self, support: Batch, query: Batch) -> Tensor:
        """Return the mean loss over all labeled tokens, a scalar.

        The tensors of support, `[T, B, L]`, and query, `[T, C, L]`, are put together to `[T * (B + C), L]`.
        """
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


@by_the_user()
def build_algorithm(config: Config, model: nn.Module) -> Any:
    """Return the algorithm of `config` over `model`: a module with `(support, query) -> loss`, `adapt` and `evaluate`.

    Raises:
        UserError: If the model or a setting does not suit the algorithm.
    """
    precision = None if config.precision == "float32" else config.precision
    options: dict[str, Any] = {"steps": config.inner_steps, "precision": precision}
    if config.adapt:
        options["adapt"] = list(config.adapt)
    if config.algorithm != "finetune":
        options["capture"] = config.capture and config.device == "cpu"
    if config.algorithm == "metasgd":
        options["lr"] = config.inner_lr
    else:
        learn_lr = config.learn_lr and config.algorithm != "finetune"
        options["inner"] = OPTIMIZERS[config.inner](lr=config.inner_lr, learn_lr=learn_lr, per=config.lr_per)
    return ALGORITHMS[config.algorithm](model, mk.losses.causal_lm, **options)


def tokenizer_class(config: Config) -> type[DialogueTokenizer]:
    """Return the class of the tokenizer of a run with this config."""
    if config.pretrained:
        from metakern.dialogue.huggingface import ChatTokenizer

        return ChatTokenizer
    from metakern.dialogue.tokenizer import Tokenizer

    return Tokenizer


def _new(config: Config, tokenizer: DialogueTokenizer) -> nn.Module:
    sizes = (
        {"width": config.width, "heads": config.heads, "max_length": config.max_length}
        if config.model == "gpt"
        else {"embedding": config.width, "hidden": config.hidden}
    )
    return build_model(config.model, tokenizer.vocab_size, layers=config.layers, dropout=config.dropout, **sizes)


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
def build_model_of(config: Config, tokenizer: DialogueTokenizer) -> tuple[nn.Module, str]:
    """Return the model of `config` before training, and the fingerprint of its pretrained weights ("": it has none).

    Raises:
        DataError: If a pretrained model can't be read.
        UserError: If a size or a LoRA setting does not suit the model.
    """
    return _pretrained(config, tokenizer) if config.pretrained else (_new(config, tokenizer), "")
