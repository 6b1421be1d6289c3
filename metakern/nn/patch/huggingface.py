"""Puts metakern's ops into the modules of Hugging Face's transformers, which is imported only when such a model is met.

A replaced module gets a class made for it, which derives from its own: with `forward` over metakern's op and, in the
attention modules, with `apply_rotary_pos_emb` bound to `metakern.ops.rope`. What a class computes is known by its code:
transformers writes out the same norm and the same MLP in each of its models. Attention comes in by the library's own
interface, under the name "metakern".

Where a call is not what the op computes, the class that a module had before computes it: exact, never another formula.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType
from typing import Any, cast

from torch import Tensor, nn

from metakern import ops
from metakern.nn.linear import Linear, mixed
from metakern.nn.patch.attention import NAME, code_of, is_half_rotation, register, rotary, same
from metakern.nn.patch.report import Left, Replaced
from metakern.ops._tensors import wide

FORMER = "_metakern_former_class"  # attributes of a replaced module or model, so that copies keep them
_FORMER_ATTENTION = "_metakern_former_attention"
_ATTENTION, _ROPE, _ROTARY = "metakern.ops.attention", "metakern.ops.rope", "apply_rotary_pos_emb"

# The models whose logits are what the head returns, if they are not capped.
_PLAIN_HEADS = frozenset(
    ("gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "smollm3")
)

Modules = Sequence[tuple[str, nn.Module]]
Parameter = Callable[[str], Any]  # a parameter by name, with or without the tasks first


class Fused(nn.Module):
    """What the made classes share: they pickle as what they were made of, and say which ops they run."""

    runs = ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__reduce_ex__(protocol)[2:]
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
        if id(model.config) not in configs and model.config._attn_implementation != NAME:
            configs.add(id(model.config))
            why = _attention_obstacle(model)
            if why:
                yield Left(path, f"attention of {name}", why)
            else:
                register()
                model.__dict__[_FORMER_ATTENTION] = model.config._attn_implementation
                model.config._attn_implementation_internal = NAME
        if _has_causal_loss(model):
            model.loss_function = causal_lm_loss
            yield Replaced(path, f"loss of {name}", "metakern.ops.cross_entropy")


def detach(modules: Modules) -> Iterator[Replaced]:
    """The reverse of `attach`."""
    for path, model in pretrained(modules):
        if _FORMER_ATTENTION in model.__dict__:
            model.config._attn_implementation_internal = model.__dict__.pop(_FORMER_ATTENTION)
        if model.__dict__.get("_loss_function") is causal_lm_loss:
            del model._loss_function
            yield Replaced(path, "metakern.ops.cross_entropy", f"loss of {type(model).__name__}")


def pretrained(modules: Modules) -> Iterator[tuple[str, Any]]:
    """The models of transformers among `modules`, the outer ones first."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None:
        yield from ((path, module) for path, module in modules if isinstance(module, library.PreTrainedModel))


def replacement(module: nn.Module) -> tuple[type[Fused] | None, str | None]:
    """The class that computes what a module in a pretrained model computes, and why there is none where one is due."""
    kind: Any = type(module)
    mixin: Any = known(kind)
    if kind.__module__.startswith("metakern."):
        return None, None
    if "forward" in module.__dict__ and (mixin or _calls_interface(kind)):
        return None, "its forward was replaced"
    if mixin:
        gate = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if issubclass(mixin, GatedMLP | JointlyGatedMLP) and not _is_silu(gate):
            return None, None  # its activation is replaced, and a gate of another kind is a product
        return _made(kind, mixin, mixin.runs), None
    if _calls_interface(kind):
        fused = cast(Any, module).config._attn_implementation == NAME
        turns = code_of(kind) is kind.forward and _uses(kind, _ROTARY) and is_half_rotation(_global(kind, _ROTARY))
        runs = ", ".join([_ATTENTION] * fused + [_ROPE] * turns)
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
        if all(same(getattr(kind, method, None), getattr(original, method)) for method in methods):
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
            {**forward.__globals__, _ROTARY: rotary(forward.__globals__[_ROTARY])},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        body["forward"].__kwdefaults__ = forward.__kwdefaults__
    return type(former.__name__, (mixin, former), body)


def _blank(former: Any, mixin: Any, runs: str) -> Fused:
    """A module for pickle to fill."""
    register()
    made: Any = _made(former, mixin, runs)
    return made.__new__(made)


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


def separate_head(model: nn.Module) -> Any:
    """The head of a patched model, if it can be taken off: the last that is done, without a bias and not folded."""
    kind, lm = type(model).__module__.rpartition("modeling_")[2], cast(Any, model)
    if model.__dict__.get("_loss_function") is not causal_lm_loss or kind not in _PLAIN_HEADS:
        return None
    head = lm.get_output_embeddings()
    plain = type(head) is Linear and head._parameters["bias"] is None
    touched = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks or mixed(head.weight)
    return head if plain and not touched and not getattr(lm.config, "final_logit_softcapping", None) else None


@contextmanager
def without(head: nn.Module | None) -> Iterator[None]:
    """Within the block a head hands on the hidden states that it is given."""
    if head is None:
        yield
        return
    head.__dict__["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del head.__dict__["forward"]


def _has_causal_loss(model: Any) -> bool:
    """Whether a pretrained model computes transformers' ForCausalLMLoss, given labels."""
    return (
        model.get_output_embeddings() is not None
        and not getattr(model.config, "is_encoder_decoder", False)
        and getattr(model, "loss_type", "") in (None, "ForCausalLM")
        and "_loss_function" not in model.__dict__
    )


def _attention_obstacle(model: Any) -> str | None:
    """Why the attention of a pretrained model can't be replaced."""
    config, kinds = model.config, {type(module) for module in model.modules()}
    softcap = getattr(config, "attn_logit_softcapping", None)
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder's, with masks of other kinds"
    if softcap is not None:
        return f"its scores are capped at {softcap}"
    if not hasattr(sys.modules["transformers"], "AttentionMaskInterface"):
        return "it needs transformers 4.53 or newer"
    if not any(_calls_interface(kind) for kind in kinds):
        return "it does not go through transformers' attention interface"
    if not (getattr(model, "_supports_flash_attn", False) or getattr(model, "_supports_flash_attn_2", False)):
        return "it needs a mask for each query and key"
    return None


def _calls_interface(kind: Any) -> bool:
    return _uses(kind, "ALL_ATTENTION_FUNCTIONS") and _global(kind, "eager_attention_forward") is not None


def _uses(kind: Any, name: str) -> bool:
    """Whether the forward of a class names a global of its module."""
    code = getattr(code_of(kind), "__code__", None)
    return code is not None and name in code.co_names


def _global(kind: Any, name: str) -> Any:
    return code_of(kind).__globals__.get(name)


def _is_silu(module: Any) -> bool:
    kind: Any = type(module)
    return isinstance(module, nn.SiLU | SiLU) or known(kind) is SiLU
