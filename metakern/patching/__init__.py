"""Put metakern's modules and ops into a model of torch.nn or Hugging Face, in place, and take them out again.

A replaced module keeps all its attributes: only the class of the object changes. So parameters, buffers, hooks, names
and modes stay the same objects, optimizers stay valid, and copies and pickles of a patched model are patched.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from metakern.nn.activation import GELU, SiLU
from metakern.nn.attention import MultiheadAttention, extra_keys
from metakern.nn.linear import Linear
from metakern.nn.lora import FORMER
from metakern.nn.norm import LayerNorm, RMSNorm
from metakern.nn.recurrent import GRU, LSTM, RNN
from metakern.nn.transformer import TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer
from metakern.patching import huggingface
from metakern.patching.huggingface import FusedModule
from metakern.patching.report import Left, Replaced, Report

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.GELU: GELU,
    nn.SiLU: SiLU,
    nn.Linear: Linear,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


def patch(model: nn.Module) -> Report:
    """Replaces modules of `model` by metakern's, in place; outputs stay the same up to rounding.

    A second call changes nothing more.

    Of torch.nn it replaces RNN, GRU, LSTM, LayerNorm, RMSNorm, GELU, SiLU, Linear, MultiheadAttention and the
    Transformer layers.

    Of Hugging Face's transformers, from 4.53 on, it replaces attention, rotary embeddings, RMS norms, gated MLPs,
    activations, Conv1D and the loss of a causal language model. Attention comes in by the library's own interface, with
    the model's window and the padding mask [B, L_k], so that there is no L x L matrix. Calls that
    `metakern.ops.attention` can't compute (active dropout, capped scores, a mask of the caller's) run the model's eager
    formula. A query that sees no key, as at a padded position, gets zeros.

    Modules that may compute something else are left as they are, and the report says why: subclasses, modules whose
    `forward` was replaced, LSTMs with projections, modules of transformers for which metakern has no replacement.

    Args:
        model: Any module. Its parameters stay the same objects.

    Returns:
        A `metakern.patching.Report`: what was replaced, what was left, and why. Print it.

    Raises:
        TypeError: If `model` is no `nn.Module`.
        ValueError: If a part of it is compiled or quantized.

    >>> import metakern as mk, torch
    >>> layers = torch.nn.LayerNorm(4), torch.nn.LSTM(4, 8), torch.nn.LSTM(8, 8), torch.nn.LSTM(8, 8, proj_size=2)
    >>> model = torch.nn.ModuleList(layers)
    >>> print(mk.patch(model))
    3 replaced, 1 left
      0  torch.nn.LayerNorm -> metakern.nn.LayerNorm
      *  2 x torch.nn.LSTM -> metakern.nn.LSTM
      3  torch.nn.LSTM left: proj_size must be 0, got 2
    """
    replaced: list[Replaced] = []
    left: list[Left] = []
    modules = _modules("patch", model)
    for _, module in modules:
        _check(module)
    for row in huggingface.attach(modules):
        (replaced if isinstance(row, Replaced) else left).append(row)  # type: ignore[arg-type]
    foreign = {id(part) for _, pretrained in huggingface.pretrained(modules) for part in pretrained.modules()}
    for path, module in modules:
        kind, why = type(module), _obstacle(module)
        new = None if why else _CLASSES.get(kind)
        if id(module) in foreign and not (new or why or kind in _CLASSES.values()):
            new, why = huggingface.replacement(module)
        if new:
            module.__dict__[FORMER], module.__class__ = kind, new
            replaced.append(Replaced(path, _name(kind), _name(new)))
        if why:
            left.append(Left(path, _name(kind), why))
    left.extend(huggingface.missing(modules))
    return Report(tuple(replaced), tuple(left))


def unpatch(model: nn.Module) -> Report:
    """Undoes `patch`, in place.

    Modules that were metakern's before the patch stay as they are.

    Args:
        model: Any module.

    Returns:
        A `metakern.patching.Report`: what was replaced.

    Raises:
        TypeError: If `model` is no `nn.Module`.

    >>> import metakern as mk, torch
    >>> model = torch.nn.GRU(2, 3)
    >>> _ = mk.patch(model)
    >>> print(mk.unpatch(model))
    1 replaced, 0 left
      (model)  metakern.nn.GRU -> torch.nn.GRU
    """
    modules = _modules("unpatch", model)
    replaced = []
    for path, module in modules:
        former = module.__dict__.pop(FORMER, None)
        if former is not None:
            replaced.append(Replaced(path, _name(type(module)), _name(former)))
            module.__class__ = former
    return Report((*huggingface.detach(modules), *replaced))


def _modules(verb: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _check(module: nn.Module) -> None:
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        raise ValueError("patch: model must not be compiled, got a compiled one: patch it first, then compile it")
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        raise ValueError(f"patch: model must not be quantized, got a {type(module).__name__} that is")


def _obstacle(module: nn.Module) -> str | None:
    """Returns why a module of torch.nn, or of a subclass, can't be replaced; None if it can, or for another module."""
    kind = type(module)
    # MultiheadAttention never calls its NonDynamicallyQuantizableLinear, only reads its weight.
    ours = (*_CLASSES.values(), NonDynamicallyQuantizableLinear, FusedModule)
    if isinstance(module, ours) or not isinstance(module, tuple(_CLASSES)):
        return None
    if kind not in _CLASSES:
        return "a subclass, which may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if isinstance(module, nn.LSTM) and module.proj_size:
        return f"proj_size must be 0, got {module.proj_size}"
    if isinstance(module, nn.MultiheadAttention):
        return extra_keys(module)
    if isinstance(module, nn.TransformerEncoder):
        kinds = {type(layer) for layer in module.layers} - {nn.TransformerEncoderLayer, TransformerEncoderLayer}
        return f"its layers must be torch.nn's, got {min(k.__name__ for k in kinds)}" if kinds else None
    return None


def _name(kind: type) -> str:
    """Returns the name of a class for the report; for a class of `FusedModule` the ops that it runs."""
    if issubclass(kind, FusedModule):
        return kind.runs
    package = "torch.nn" if kind in _CLASSES else "metakern.nn" if kind in _CLASSES.values() else kind.__module__
    package = "transformers" if package.startswith("transformers.") else package
    return f"{package}.{kind.__qualname__}"
