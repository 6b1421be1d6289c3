"""LoRA for a whole model, in place: linear layers are frozen and learn a low-rank correction of their weight.

    y = x Wᵀ + b + (alpha / rank) (x Aᵀ) Bᵀ

| parameter of an adapted layer | shape |
|---|---|
| weight W, bias b: the layer's own, by their former names | as before |
| lora_A | [rank, in], random at first, as in the PEFT library |
| lora_B | [out, rank], zero at first |

As with `metakern.patch`, only the class of an adapted layer changes: it stays the same object with its names, hooks and
device. `metakern.remove_lora` restores the class.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from metakern.nn.linear import Linear
from metakern.nn.lora import FORMER, LoraLinear, Settings, former_class, is_conv1d, matrix

HEADS = ("lm_head", "embed_out", "head", "score", "classifier")  # names of output heads, not adapted by default
_TRAINABLE = "_metakern_trainable_before_lora"  # an attribute of the model, so that its copies keep it


def lora(
    model: nn.Module,
    rank: int = 8,
    targets: str | Sequence[str] | None = None,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    trainable: str | Sequence[str] = (),
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Adapts linear layers of `model` by LoRA, in place, and freezes all other parameters.

    y = x Wᵀ + b + (alpha / rank) (x Aᵀ) Bᵀ, where A and B learn and W is frozen. `metakern.MAML(model, ...)` adapts and
    meta-learns the parameters that learn, and no others. Hu et al. 2021, "LoRA: low-rank adaptation of large language
    models", section 4.1.

    Args:
        model: Any module.
        rank: The number of rows of A, [rank, in], and of columns of B, [out, rank].
        targets: Patterns with * and ?, each of which matches one or more consecutive components of a layer's dotted
            name: "q_proj", "layers.*.mlp", "h.0.attn.c_attn". By default every `torch.nn.Linear` and Hugging Face
            `Conv1D` that can be adapted, except output heads.
        alpha: The factor of the correction is alpha / rank; by default alpha is the rank, as in PEFT for rank 8.
        dropout: The probability of dropout of the correction's input, in [0, 1).
        trainable: Patterns of the same kind for the names of other parameters that learn too, such as "*norm*" or
            "bias".
        seed: The seed of A; by default A is drawn from PyTorch's global generator.
        dtype: The dtype of A and B; by default that of each layer's weight.

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        TypeError: If `model` is no `nn.Module`, or a pattern no string.
        ValueError: If a pattern matches nothing, or a layer that can't be adapted (its weight is tied or quantized, it
            is of a subclass, or its forward was replaced); if `trainable` matches an adapted weight or an integer
            parameter; if no layer can be adapted; if the model has LoRA layers already; if rank, alpha or dropout is
            out of range.

    >>> import metakern as mk, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    >>> mk.lora(model, rank=2, targets=["0"], trainable=["1.weight"])
    ['0']
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B', '1.weight']
    """
    settings = Settings(rank, alpha, dropout)
    layers = _targets(model, targets)
    free = _trainable(model, trainable, layers)
    adapt(model, dict.fromkeys(layers, settings), free, dtype=dtype, seed=seed)
    return list(layers)


def adapt(
    model: nn.Module,
    layers: Mapping[str, Settings],
    trainable: Iterable[str],
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> None:
    """Makes LoRA layers of the layers named in `layers`, with the settings there, and freezes all other parameters.

    `trainable` names the parameters that learn too. Nothing is checked: all layers must be `adaptable`.
    """
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    free = {id(model.get_parameter(name)) for name in trainable}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in free)
    for path, settings in layers.items():
        layer: Any = model.get_submodule(path)
        kept = [p for p in layer.parameters() if p.requires_grad]
        kind = former_class(layer)
        layer.__dict__.pop(FORMER, None)
        layer.__class__ = LoraLinear
        layer._adapt(kind, settings, dtype, generator)
        for parameter in kept:
            parameter.requires_grad_(True)
    model.__dict__[_TRAINABLE] = before


def merge_lora(model: nn.Module) -> list[str]:
    """Adds each correction to its weight, W + (alpha / rank) B A, and removes the LoRA layers, in place.

    Parameters that required a gradient before `metakern.lora` require one again. The sum is computed in float32 for
    weights in half precision.

    Args:
        model: A model with LoRA layers.

    Returns:
        The names of the layers.

    Raises:
        TypeError: If `model` is no `nn.Module`.
        ValueError: If it has no LoRA layers.

    >>> import metakern as mk, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> names, x = mk.lora(model), torch.ones(1, 4)
    >>> _ = torch.nn.init.ones_(model[0].lora_B)
    >>> y = model(x)
    >>> mk.merge_lora(model), torch.allclose(model(x), y)
    (['0'], True)
    """
    layers = lora_layers("merge_lora", model)
    with torch.no_grad():
        for layer in layers.values():
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            matrix(layer).add_(layer.scale * (layer.lora_B.to(wide) @ layer.lora_A.to(wide)))
    return _take_off(model, layers)


def remove_lora(model: nn.Module) -> list[str]:
    """Removes the LoRA layers and drops their corrections, in place.

    Parameters that required a gradient before `metakern.lora` require one again.

    Args:
        model: A model with LoRA layers.

    Returns:
        The names of the layers.

    Raises:
        TypeError: If `model` is no `nn.Module`.
        ValueError: If it has no LoRA layers.

    >>> import metakern as mk, torch
    >>> model = torch.nn.Linear(4, 3)
    >>> _ = mk.lora(model)
    >>> mk.remove_lora(model), model
    ([''], Linear(in_features=4, out_features=3, bias=True))
    """
    return _take_off(model, lora_layers("remove_lora", model))


def _take_off(model: nn.Module, layers: Mapping[str, LoraLinear]) -> list[str]:
    for layer in layers.values():
        layer._give_back()
    before = model.__dict__.pop(_TRAINABLE, ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    return list(layers)


def lora_layers(verb: str, model: nn.Module) -> dict[str, LoraLinear]:
    """Returns the LoRA layers of a model by name; raises ValueError if there are none."""
    layers = {path: m for path, m in _modules(verb, model).items() if isinstance(m, LoraLinear)}
    if not layers:
        raise ValueError(f"{verb}: model must have LoRA layers, got none: call metakern.lora(model) first")
    return layers


def _modules(verb: str, model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
    return dict(model.named_modules())


def adaptable(verb: str, model: nn.Module) -> dict[str, str | None]:
    """Returns for each linear layer, by name, why it can't be adapted, or None if it can.

    Raises ValueError if the model has LoRA layers already.
    """
    modules = _modules(verb, model)
    for path, module in modules.items():
        if isinstance(module, LoraLinear):
            raise ValueError(
                f"{verb}: model must not have LoRA layers, got {path!r}: call metakern.merge_lora or remove_lora first"
            )
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values())

    def obstacle(module: nn.Module) -> str | None:
        weight: Any = module.weight
        if former_class(module) not in (nn.Linear, Linear) and not is_conv1d(module):
            return f"is a {_name(module)}, which may compute something else"
        if "forward" in module.__dict__:
            return "has a forward that was replaced"
        if type(weight.data) is not Tensor or weight.dtype not in DTYPES:
            return f"has no plain floating-point weight but {type(weight.data).__name__} of {weight.dtype}"
        return "has a weight that another module shares" if owners[id(weight)] > 1 else None

    linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or is_conv1d(m)}
    return {path: obstacle(module) for path, module in linear.items()}


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _targets(model: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """Returns the names of the layers to adapt, in the model's order."""
    layers = adaptable("lora", model)
    if targets is None:
        found = [p for p, why in layers.items() if why is None and p.rpartition(".")[2] not in HEADS]
        if not found:
            raise ValueError(
                "lora: model must have a linear layer that can be adapted, got none: name a head in targets, or check "
                "the layers' classes and dtypes"
            )
        return found
    chosen: set[str] = set()
    for pattern in _patterns("targets", targets):
        modules = _matching("targets", "module", pattern, dict(model.named_modules()))
        linear = [path for path in modules if path in layers]
        if not linear:
            kind = _name(model.get_submodule(modules[0]))
            raise ValueError(f"lora: targets must match linear layers, got {pattern!r}: {modules[0]!r} is a {kind}")
        for path in linear:
            if layers[path]:
                raise ValueError(f"lora: targets must match plain linear layers, got {path!r}, which {layers[path]}")
        chosen.update(linear)
    return [path for path in layers if path in chosen]


def _trainable(model: nn.Module, trainable: str | Sequence[str], layers: Sequence[str]) -> list[str]:
    """Returns the names of the parameters that learn beside A and B."""
    parameters = dict(model.named_parameters())
    weights = {join(path, "weight") for path in layers}
    chosen: set[str] = set()
    for pattern in _patterns("trainable", trainable):
        names = _matching("trainable", "parameter", pattern, parameters)
        for name in names:
            if name in weights:
                raise ValueError(
                    f"lora: trainable must not match the weight of an adapted layer, got {pattern!r}: {name!r}"
                )
            if not parameters[name].is_floating_point():
                raise ValueError(f"lora: trainable must match floating-point parameters, got {name!r}")
        chosen.update(names)
    return [name for name in parameters if name in chosen]


def _patterns(argument: str, patterns: str | Sequence[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"lora: {argument} must hold name patterns (strings), got {type(pattern).__name__}")
    return patterns


def _matching(argument: str, what: str, pattern: str, names: Mapping[str, Any]) -> list[str]:
    """Returns the names of which consecutive components match a pattern; raises ValueError if there are none."""
    found = [name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
    if not found:
        known = dict.fromkeys([*(name.rpartition(".")[2] for name in names), *names])
        near = difflib.get_close_matches(pattern, known, 3, 0.5) or [name for name in known if name][:8]
        raise ValueError(f"lora: {argument} must match a {what}, got {pattern!r}: there are {', '.join(near)}")
    return found


def join(path: str, name: str) -> str:
    """Returns the dotted name of the parameter or buffer `name` of the module at `path`."""
    return f"{path}.{name}" if path else name


def _name(module: nn.Module) -> str:
    return f"{former_class(module).__module__}.{former_class(module).__qualname__}"
