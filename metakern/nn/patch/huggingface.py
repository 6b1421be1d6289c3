"""Puts metakern's ops into the modules of Hugging Face's transformers, which is imported only when such a model is met.

A replaced module gets a class made for it, which derives from its own: with `forward` over metakern's op and, in the
attention modules, with `apply_rotary_pos_emb` bound to `metakern.ops.rope`. What a class computes is known by its code:
transformers writes out the same norm and the same MLP in each of its models. Attention comes in by the library's own
interface, under the name "metakern".

Where a call is not what the op computes, the class that a module had before computes it: exact, never another formula.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from metakern import ops
from metakern.nn.linear import mixed
from metakern.nn.patch.report import Left, Replaced
from metakern.ops._tensors import wide

FORMER = "_metakern_former_class"  # attributes of a replaced module or model, so that copies keep them
_FORMER_ATTENTION, _FORMER_LOSS = "_metakern_former_attention", "_metakern_former_loss"
_NAME = "metakern"  # of the attention, in transformers' interface
_ATTENTION, _ROPE, _ROTARY = "metakern.ops.attention", "metakern.ops.rope", "apply_rotary_pos_emb"

Modules = Sequence[tuple[str, nn.Module]]
Parameter = Callable[[str], Any]  # a parameter by name, with or without the tasks first


class Fused(nn.Module):
    """What the made classes share: they pickle as what they were made of, and say which ops they run."""

    runs = ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        mixin, former = type(self).__bases__
        return _blank, (former, mixin, self.runs), *state


class Elementary(Fused):
    """A module that is one op, of its input and its parameters `owns`."""

    owns: tuple[str, ...] = ()

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if mixed(x, *(getattr(self, name) for name in self.owns)):
            return super().forward(x)
        return self.compute(x, partial(getattr, self))


class RMSNorm(Elementary):
    """Llama's, and that of most models since."""

    runs, owns = "metakern.ops.rms_norm", ("weight",)
    variance_epsilon: float

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        return ops.rms_norm(x, parameter("weight"), self.variance_epsilon)


class CenteredRMSNorm(Elementary):
    """Gemma's, by 1 + weight: in float32 for half precision, in which the sum would be rounded."""

    runs, owns = "metakern.ops.rms_norm", ("weight",)
    eps: float

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        return ops.rms_norm(wide(x), 1 + wide(parameter("weight")), self.eps).to(x.dtype)


class Conv1D(Elementary):
    """GPT-2's linear layer, with a weight [in, out]."""

    runs, owns = "metakern.ops.linear", ("weight", "bias")

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        return ops.linear(x, parameter("weight").mT, parameter("bias"))


class SiLU(Elementary):
    runs = "metakern.ops.silu"

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        return ops.silu(x)


class GELU(Elementary):
    runs, approximate = "metakern.ops.gelu", "none"

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        return ops.gelu(x, self.approximate)


class TanhGELU(GELU):
    approximate = "tanh"


class GatedMLP(Fused):
    """Llama's, with SiLU as its gate."""

    runs = "metakern.ops.swiglu"
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class JointlyGatedMLP(Fused):
    """Phi-3's, with one matrix for the gate and what it gates."""

    runs = "metakern.ops.swiglu"
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(*self.gate_up_proj(hidden_states).chunk(2, -1)))


class Attention(Fused):
    """A module that calls transformers' attention interface, and what turns its queries and keys."""


def attach(modules: Modules) -> Iterator[Replaced | Left]:
    """Attention and loss of the pretrained models among `modules`."""
    configs: set[int] = set()
    for path, model in pretrained(modules):
        name = type(model).__name__
        if id(model.config) not in configs and model.config._attn_implementation != _NAME:
            configs.add(id(model.config))
            why = _attention_obstacle(model)
            if why:
                yield Left(path, f"attention of {name}", why)
            else:
                _register()
                model.__dict__[_FORMER_ATTENTION] = model.config._attn_implementation
                model.config._attn_implementation_internal = _NAME
        if model.get_output_embeddings() is not None and model.loss_function.__name__ == "ForCausalLMLoss":
            model.__dict__[_FORMER_LOSS] = model.__dict__.get("_loss_function")
            model.loss_function = causal_lm_loss
            yield Replaced(path, f"loss of {name}", "metakern.ops.cross_entropy")


def detach(modules: Modules) -> Iterator[Replaced]:
    """The reverse of `attach`."""
    for path, model in pretrained(modules):
        if _FORMER_ATTENTION in model.__dict__:
            model.config._attn_implementation_internal = model.__dict__.pop(_FORMER_ATTENTION)
        if _FORMER_LOSS in model.__dict__:
            former = model.__dict__.pop(_FORMER_LOSS)
            del model._loss_function
            if former is not None:
                model.loss_function = former
            yield Replaced(path, "metakern.ops.cross_entropy", f"loss of {type(model).__name__}")


def pretrained(modules: Modules) -> Iterator[tuple[str, Any]]:
    """The models of transformers among `modules`, the outer ones first."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None:
        yield from ((path, module) for path, module in modules if isinstance(module, library.PreTrainedModel))


def replacement(module: nn.Module) -> tuple[type[Fused] | None, str | None]:
    """The class that computes what a module in a pretrained model computes, and why there is none where one is due."""
    kind, mixin = type(module), known(type(module))
    if isinstance(module, Fused):
        return None, None
    if "forward" in module.__dict__ and (mixin or _calls_interface(kind)):
        return None, "its forward was replaced"
    if mixin:
        gate = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if issubclass(mixin, GatedMLP | JointlyGatedMLP) and not _is_silu(gate):
            return None, None  # its activation is replaced, and a gate of another kind is a product
        return _made(kind, mixin, mixin.runs), None
    if _calls_interface(kind):
        rotary = _is_half_rotation(_globals(kind).get(_ROTARY)) if _uses(kind, _ROTARY) else None
        fused = module.config._attn_implementation == _NAME
        runs = ", ".join([_ATTENTION] * fused + [_ROPE] * bool(rotary))
        return _made(kind, Attention, runs) if runs else None, None
    if any(p is not None for p in module._parameters.values()) and not isinstance(module, nn.Embedding):
        return None, "no rule knows it"
    return None, None


@cache
def known(kind: Any) -> type[Fused] | None:
    """What computes the same as the modules of a class of transformers."""
    from transformers import activations, pytorch_utils
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    by_name: dict[str, type[Fused]] = {
        "SiLUActivation": SiLU,
        "GELUActivation": GELU,
        **dict.fromkeys(("NewGELUActivation", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation"), TanhGELU),
        "AccurateGELUActivation": TanhGELU,
    }
    for name, mixin in by_name.items():
        if kind is getattr(activations, name, None):
            return mixin
    if kind is pytorch_utils.Conv1D:
        return Conv1D
    originals: tuple[tuple[type, type[Fused], tuple[str, ...]], ...] = (
        (LlamaRMSNorm, RMSNorm, ("forward",)),
        (GemmaRMSNorm, CenteredRMSNorm, ("forward", "_norm")),
        (LlamaMLP, GatedMLP, ("forward",)),
        (Phi3MLP, JointlyGatedMLP, ("forward",)),
    )
    for original, mixin, methods in originals:
        if all(_same(getattr(kind, method, None), getattr(original, method)) for method in methods):
            return mixin
    return None


@cache
def _made(former: Any, mixin: Any, runs: str) -> type[Fused]:
    """The class of the modules of `former` that run metakern's ops; its name is theirs, by which transformers asks."""
    body: dict[str, Any] = {"runs": runs, "__module__": __name__, "__doc__": former.__doc__}
    if _ROPE in runs:
        forward = former.forward
        body["forward"] = FunctionType(
            forward.__code__,
            {**forward.__globals__, _ROTARY: _rotary(forward.__globals__[_ROTARY])},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        body["forward"].__kwdefaults__ = forward.__kwdefaults__
    return type(former.__name__, (mixin, former), body)


def _blank(former: type[nn.Module], mixin: type[Fused], runs: str) -> Fused:
    """A module for pickle to fill."""
    _register()
    made = _made(former, mixin, runs)
    return made.__new__(made)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface over `metakern.ops.attention`: query [B, H, L, D] -> [B, L, H, D], no weights.

    attention_mask is what `key_mask` made, [B, L_k] of booleans or None, or a mask [B, 1, L, L_k] of the caller's.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = kwargs.get("sliding_window") if causal else None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask, keys = attention_mask.bool(), attention_mask.shape[1]
        key, value = key[:, :, :keys], value[:, :, :keys]  # the rest of a cache of fixed size is not filled yet
    if (
        (attention_mask is not None and attention_mask.dim() != 2)
        or (kwargs.get("dropout") and module.training)
        or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "head_mask", "cache"))
        or kwargs.get("output_attentions")
        or key.shape != value.shape
        or mixed(query, key, value)
    ):
        mask = _scores_mask(query, key, attention_mask, causal, window)
        return _globals(_former(module))["eager_attention_forward"](module, query, key, value, mask, **kwargs)
    y = ops.attention(query, key, value, causal=causal, mask=attention_mask, window=window, scale=kwargs.get("scaling"))
    return y.transpose(1, 2).contiguous(), None


def key_mask(**kwargs: Any) -> Tensor | None:
    """transformers' mask interface: [B, L_k] for causal masks, with a window or without; [B, 1, L, L_k] for others.

    True is seen; None stands for a mask that shows all keys. Keys after the last query's own are cut off.
    """
    from transformers import masking_utils

    L_k, start, window = kwargs["kv_length"], int(kwargs.get("kv_offset", 0)), kwargs.get("local_size")
    positions = kwargs.get("cache_position")  # before transformers 5
    first = positions[0] if positions is not None else kwargs.get("q_offset", 0)
    last = int(first) + (len(positions) if positions is not None else kwargs["q_length"])
    seen, mask = last - start, kwargs.get("attention_mask")
    causal = masking_utils.causal_mask_function
    if window is not None:
        causal = masking_utils.sliding_window_causal_mask_function(window)
    if seen > L_k or not _same(kwargs.get("mask_function", masking_utils.causal_mask_function), causal):
        return masking_utils.sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    if mask is not None:
        return nn.functional.pad(mask, (0, max(last - mask.shape[1], 0)))[:, start:last]
    return None if seen == L_k else torch.ones(kwargs["batch_size"], seen, dtype=torch.bool, device=kwargs["device"])


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss by `metakern.ops.cross_entropy`; a batch without labels has loss 0, not NaN."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.flatten().to(logits.device)
    loss = ops.cross_entropy(wide(logits).reshape(-1, vocab_size), target, ignore_index)
    return loss if num_items_in_batch is None else loss * (target != ignore_index).sum() / num_items_in_batch


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, attention_forward)
    AttentionMaskInterface.register(_NAME, key_mask)


def _attention_obstacle(model: Any) -> str | None:
    """Why the attention of a pretrained model can't be replaced."""
    config, kinds = model.config, {type(module) for module in model.modules()}
    softcap = getattr(config, "attn_logit_softcapping", None)
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder's, with masks of other kinds"
    if softcap is not None:
        return f"its scores are capped at {softcap}"
    if not any(_calls_interface(kind) for kind in kinds):
        return "it does not go through transformers' attention interface"
    if not (getattr(model, "_supports_flash_attn", False) or getattr(model, "_supports_flash_attn_2", False)):
        return "it needs a mask for each query and key"
    return None


def _calls_interface(kind: Any) -> bool:
    return _uses(kind, "ALL_ATTENTION_FUNCTIONS") and "eager_attention_forward" in _globals(kind)


def _uses(kind: Any, name: str) -> bool:
    """Whether the forward of a class names a global of its module, and is not wrapped in something else."""
    code = getattr(kind.forward, "__code__", None)
    return code is not None and name in code.co_names


def _globals(kind: Any) -> dict[str, Any]:
    return kind.forward.__globals__


def _former(module: nn.Module) -> Any:
    return module.__dict__.get(FORMER, type(module))


def _is_silu(module: Any) -> bool:
    return isinstance(module, nn.SiLU | SiLU) or (module is not None and known(type(module)) is SiLU)


def _rotary(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """apply_rotary_pos_emb by `metakern.ops.rope`, for the first cos.shape[-1] features of q and k [B, H, L, D]."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs or q.dim() != 4 or cos.dim() != 3 or mixed(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    return apply


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    D = cos.shape[-1]
    if x.shape[-1] == D:
        return ops.rope(x, cos, sin)
    return torch.cat((ops.rope(x[..., :D], cos, sin), x[..., D:]), -1)


@cache
def _is_half_rotation(rotary: Callable[..., Any] | None) -> bool:
    """Whether a model's apply_rotary_pos_emb computes what `metakern.ops.rope` does: it is tried."""
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = torch.randn(4, 2, 2, 3, 8, generator=random, dtype=torch.float64, device="cpu")
    cos, sin = cos[:, 0], sin[:, 0]
    try:
        found = rotary(q, k, cos, sin)  # type: ignore[misc]
        return all(torch.allclose(a, ops.rope(x, cos, sin)) for a, x in zip(found, (q, k), strict=True))
    except Exception:  # a function of other arguments is another function
        return False


def _scores_mask(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """What an eager formula adds to its scores, [B, 1, L, L_k]."""
    L, L_k = query.shape[2], key.shape[2]
    if mask is None or mask.dim() == 2:
        mask = None if mask is None else mask[:, None, None]
        if causal:
            ones = torch.ones(L, L_k, dtype=torch.bool, device=query.device)
            seen = ones.tril(L_k - L) if window is None else ones.tril(L_k - L).triu(L_k - L - window + 1)
            mask = seen if mask is None else seen & mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


def _same(f: Any, g: Any) -> bool:
    """Whether two functions are one, by their code, less its place and its docstring, and what it closes over."""
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(map(_same, f, g))
    if not (inspect.isfunction(f) and inspect.isfunction(g)):
        return bool(f == g)
    a, b = (
        (h.__code__.co_code, h.__code__.co_names, [c for c in h.__code__.co_consts if c != h.__doc__]) for h in (f, g)
    )
    cells = ([cell.cell_contents for cell in h.__closure__ or ()] for h in (f, g))
    return a == b and all(_same(x, y) for x, y in zip(*cells, strict=True))
