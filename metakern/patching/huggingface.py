"""Put metakern's ops into the modules of Hugging Face's transformers, which is imported only if a model is one of its.

A replaced module gets a class that is derived from its own: `forward` runs metakern's op, and in attention modules
`apply_rotary_pos_emb` is bound to `metakern.ops.rope`. Classes are recognized by their code, as transformers writes out
the same norm and the same MLP in each of its models. Attention comes in by the library's own interface, by the name
"metakern".

A call that the op can't compute runs the forward of the module's former class, so results never change.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from metakern import ops
from metakern.nn.linear import Linear, mixed
from metakern.ops.core.matrices import wide
from metakern.patching.attention import NAME, code_of, is_half_rotation, register, rotary, same, with_global
from metakern.patching.report import Left, Replaced

_FORMER_ATTENTION = "_metakern_former_attention"  # the setting before the patch: an attribute, so that copies keep it
_ATTENTION, _ROPE, _ROTARY = "metakern.ops.attention", "metakern.ops.rope", "apply_rotary_pos_emb"

_LLAMA = ("rope", "rms_norm", "swiglu")
_GEMMA = ("rope", "rms_norm", "gelu")
# The ops that a patched model of each family must run beside attention; `missing` reports those that it does not.
_FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), _GEMMA),
    "gpt2": ("linear", "gelu"),
    "gpt_neox": ("rope", "gelu"),
    "opt": (),
    "phi": ("rope", "gelu"),
}
# Families whose logits are the head's outputs, unless they are capped.
_PLAIN_HEADS = frozenset(_FAMILIES) - {"phi"}
# Ops that a family runs only with one of these activations, by transformers' names.
_ACTIVATIONS = {
    "swiglu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python"),
}

Modules = Sequence[tuple[str, nn.Module]]
Parameter = Callable[[str], Any]  # returns a parameter by its name, possibly with the tasks as dimension 0


class FusedModule(nn.Module):
    """Base of the classes that replaced modules get.

    Such a class is made at run time and can't be imported, so a module is pickled by the classes that it was made of.
    """

    runs = ""  # the ops that it runs, with ", " between them

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__reduce_ex__(protocol)[2:]
        mixin, former = type(self).__bases__
        return _blank, (former, mixin, self.runs), *state


class Elementary(FusedModule):
    """Base of modules that compute one op of their input and their own parameters."""

    owns: tuple[str, ...] = ()  # the names of the parameters

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        """Returns the op's output for x and the parameters `parameter(name)`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if mixed(x, *(getattr(self, name) for name in self.owns)):
            return super().forward(x)
        return self.compute(x, partial(getattr, self))


class RMSNorm(Elementary):
    """The RMS norm of Llama and of most later models: weight * normalized x."""

    runs, owns = "metakern.ops.rms_norm", ("weight",)
    variance_epsilon: float

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        return ops.rms_norm(x, parameter("weight"), self.variance_epsilon)


class CenteredRMSNorm(Elementary):
    """The RMS norm of Gemma: (1 + weight) * normalized x, in float32 for half precision, which rounds 1 + weight."""

    runs, owns = "metakern.ops.rms_norm", ("weight",)
    eps: float

    def compute(self, x: Tensor, parameter: Parameter) -> Tensor:
        return ops.rms_norm(wide(x), 1 + wide(parameter("weight")), self.eps).to(x.dtype)


class Conv1D(Elementary):
    """The linear layer of GPT-2, whose weight is [in, out]."""

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


class GatedMLP(FusedModule):
    """The gated MLP of Llama, with SiLU as the gate's activation."""

    runs = "metakern.ops.swiglu"
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class JointlyGatedMLP(FusedModule):
    """The gated MLP of Phi-3, whose gate and up projection are one matrix."""

    runs = "metakern.ops.swiglu"
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(*self.gate_up_proj(hidden_states).chunk(2, -1)))


class Attention(FusedModule):
    """A module that calls transformers' attention interface; it may rotate its queries and keys first."""


def attach(modules: Modules) -> Iterator[Replaced | Left]:
    """Replaces attention and loss of the pretrained models among `modules`; yields what it replaced and left."""
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
    """Undoes `attach`; yields what it replaced."""
    for path, model in pretrained(modules):
        if _FORMER_ATTENTION in model.__dict__:
            model.config._attn_implementation_internal = model.__dict__.pop(_FORMER_ATTENTION)
        if model.__dict__.get("_loss_function") is causal_lm_loss:
            del model._loss_function
            yield Replaced(path, "metakern.ops.cross_entropy", f"loss of {type(model).__name__}")


def pretrained(modules: Modules) -> Iterator[tuple[str, Any]]:
    """Yields the models of transformers among `modules`, with their paths, outer ones first."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None:
        yield from ((path, module) for path, module in modules if isinstance(module, library.PreTrainedModel))


def missing(modules: Modules) -> Iterator[Left]:
    """Yields the ops that models of known families among the patched `modules` should run, and do not."""
    reported: set[str] = set()
    for path, model in pretrained(modules):
        family = _family(model)
        if family not in _FAMILIES or family in reported:
            continue
        reported.add(family)
        runs = {op for part in model.modules() for op in getattr(type(part), "runs", "").split(", ")}
        expected = [] if _attention_obstacle(model) else ["attention"]
        config = model.config.get_text_config()
        activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        expected += [op for op in _FAMILIES[family] if activation in _ACTIVATIONS.get(op, (activation,))]
        for op in expected:
            if f"metakern.ops.{op}" not in runs:
                version = sys.modules["transformers"].__version__
                why = f"no module was recognized that computes metakern.ops.{op}, in transformers {version}"
                yield Left(path, f"{op} of {type(model).__name__}", why)


def replacement(module: nn.Module) -> tuple[type[FusedModule] | None, str | None]:
    """Returns the class that a module of a pretrained model gets, None for none, and the reason to report, or None."""
    kind: Any = type(module)
    mixin: Any = known(kind)
    if kind.__module__.startswith("metakern."):
        return None, None
    if "forward" in module.__dict__ and (mixin or _calls_interface(kind)):
        return None, "its forward was replaced"
    if mixin:
        gate = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if issubclass(mixin, GatedMLP | JointlyGatedMLP) and not _is_silu(gate):
            return None, None  # with another activation the op does not apply; the activation itself is replaced
        if not _behaves(module, mixin):
            return None, f"it does not compute {mixin.runs}: its class has changed"
        return _made(kind, mixin, mixin.runs), None
    if _calls_interface(kind):
        fused = cast(Any, module).config._attn_implementation == NAME
        turns = _uses(kind, _ROTARY) and is_half_rotation(_global(kind, _ROTARY))
        why = None
        if turns and with_global(kind.forward, _ROTARY, None) is None:
            turns, why = False, f"{_ROPE} was not put in: a decorator hides the forward that calls {_ROTARY}"
        runs = ", ".join([_ATTENTION] * fused + [_ROPE] * turns)
        return _made(kind, Attention, runs) if runs else None, why
    if any(p is not None for p in module._parameters.values()) and not isinstance(module, nn.Embedding):
        return None, "metakern has no replacement for this class"
    return None, None


def known(kind: Any) -> type[FusedModule] | None:
    """Returns the class that computes what a class of transformers computes, None if there is none."""
    return _known(kind, kind.forward)


@cache
def _known(kind: Any, forward: Any) -> Any:
    """Computes `known`; `forward` is part of the cache's key, as the forward of a class may be replaced later."""
    from transformers import activations, pytorch_utils
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    by_name: dict[str, type[FusedModule]] = {
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
    originals: tuple[tuple[type, type[FusedModule], tuple[str, ...]], ...] = (
        (LlamaRMSNorm, RMSNorm, ("forward",)),
        (GemmaRMSNorm, CenteredRMSNorm, ("forward", "_norm")),
        (LlamaMLP, GatedMLP, ("forward",)),
        (Phi3MLP, JointlyGatedMLP, ("forward",)),
    )
    for original, mixin, methods in originals:
        if all(same(getattr(kind, method, None), getattr(original, method)) for method in methods):
            return mixin
    return None


_BEHAVES: dict[Any, bool] = {}


def _behaves(module: nn.Module, mixin: type[FusedModule]) -> bool:
    """Returns whether a class computes what `mixin` does, tried on `module` with tiny random parameters."""
    key = type(module), mixin, type(module).forward
    if key not in _BEHAVES:
        trial: Any = copy.copy(module)
        trial.__dict__ = {**module.__dict__, "_parameters": {}, "_modules": dict(module._modules), "nf": 5}
        random = torch.Generator().manual_seed(0)
        x = torch.randn(3, 6, generator=random) * torch.tensor([[1.0], [2e-3], [30.0]])  # eps matters in the second row
        for name, part in module._modules.items():
            if isinstance(part, nn.Linear):
                rows, columns = (6, 4) if name == "down_proj" else (8 if name == "gate_up_proj" else 4, 6)
                trial._modules[name] = nn.utils.skip_init(nn.Linear, columns, rows, bias=False)
                trial._modules[name].weight.data = torch.randn(rows, columns, generator=random)
        for name, sizes in {"weight": (6, 5) if mixin is Conv1D else (6,), "bias": (5,)}.items():
            if name in module._parameters:
                trial._parameters[name] = nn.Parameter(torch.randn(sizes, generator=random))
        try:
            with torch.no_grad():
                found = key[0].forward(trial, x)
                trial.__class__ = _made(key[0], mixin, mixin.runs)
                expected = trial.forward(x)
            _BEHAVES[key] = torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        except Exception:  # a class that is made otherwise may raise anything
            _BEHAVES[key] = False
    return _BEHAVES[key]


def _made(former: Any, mixin: Any, runs: str) -> type[FusedModule]:
    """Returns the class for replaced modules of the class `former`; it has the same name, as transformers reads it."""
    return _made_of(former, mixin, runs, former.forward)


@cache
def _made_of(former: Any, mixin: Any, runs: str, forward: Any) -> type[FusedModule]:
    """Makes the class; `forward` is part of the cache's key, as the forward of `former` may be replaced later."""
    body: dict[str, Any] = {"runs": runs, "__module__": __name__, "__doc__": former.__doc__}
    if _ROPE in runs:
        body["forward"] = with_global(forward, _ROTARY, rotary(_global(former, _ROTARY)))
    return type(former.__name__, (mixin, former), body)


def _blank(former: Any, mixin: Any, runs: str) -> FusedModule:
    """Returns a module without attributes, which pickle then sets."""
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
    """Computes transformers' `ForCausalLMLoss` by `metakern.ops.cross_entropy`: the mean, in nats a token.

    Args:
        logits: [B, L, V].
        labels: [B, L], aligned with the inputs; they are shifted by one here.
        vocab_size: V.
        num_items_in_batch: The number to divide the sum by; by default that of the labels that count.
        ignore_index: The label of a position that does not count.
        shift_labels: Labels [B, L] that are shifted already, in place of `labels`.

    Returns:
        A scalar; 0 for a batch in which no label counts, where transformers gives NaN.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.flatten().to(logits.device)
    loss = ops.cross_entropy(wide(logits).reshape(-1, vocab_size), target, ignore_index)
    return loss if num_items_in_batch is None else loss * (target != ignore_index).sum() / num_items_in_batch


def separate_head(model: nn.Module) -> Any:
    """Returns the head of a patched model, if the loss can be computed from hidden states and the head's weight.

    Otherwise returns None. The logits must be the outputs of a linear layer without a bias, without hooks, not run by
    `fold` and not under autocast.
    """
    lm = cast(Any, model)
    if model.__dict__.get("_loss_function") is not causal_lm_loss or _family(model) not in _PLAIN_HEADS:
        return None
    head = lm.get_output_embeddings()
    plain = type(head) is Linear and head._parameters["bias"] is None
    touched = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks or mixed(head.weight)
    return head if plain and not touched and not getattr(lm.config, "final_logit_softcapping", None) else None


@contextmanager
def without(head: nn.Module | None) -> Iterator[None]:
    """Within the block, the head returns its input, the hidden states; None changes nothing."""
    if head is None:
        yield
        return
    head.__dict__["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del head.__dict__["forward"]


def _has_causal_loss(model: Any) -> bool:
    """Returns whether a pretrained model computes transformers' own `ForCausalLMLoss` if it gets labels."""
    return (
        model.get_output_embeddings() is not None
        and not getattr(model.config, "is_encoder_decoder", False)
        and getattr(model, "loss_type", "") in (None, "ForCausalLM")
        and "_loss_function" not in model.__dict__
    )


def _attention_obstacle(model: Any) -> str | None:
    """Returns why the attention of a pretrained model can't be replaced, None if it can."""
    config, kinds = model.config, {type(module) for module in model.modules()}
    softcap = getattr(config, "attn_logit_softcapping", None)
    if getattr(config, "is_encoder_decoder", False):
        return "it is part of an encoder-decoder, which needs masks of other kinds"
    if softcap is not None:
        return f"its scores are capped at {softcap}"
    if not hasattr(sys.modules["transformers"], "AttentionMaskInterface"):
        return "it needs transformers 4.53 or newer"
    if not any(_calls_interface(kind) for kind in kinds):
        return "it does not go through transformers' attention interface"
    callers = (part for part in model.modules() if _calls_interface(type(part)))
    if any(getattr(part, "is_causal", False) and not _imports_masks(cast(Any, type(part))) for part in callers):
        return "it makes its causal masks by itself, not by transformers' masking_utils"
    if not (getattr(model, "_supports_flash_attn", False) or getattr(model, "_supports_flash_attn_2", False)):
        return "it needs a mask for each query and key"
    return None


def _family(model: nn.Module) -> str:
    """Returns the family of a pretrained model: the name in transformers' modeling_<name>.py that defines its class."""
    return type(model).__module__.rpartition("modeling_")[2]


def _calls_interface(kind: Any) -> bool:
    return _uses(kind, "ALL_ATTENTION_FUNCTIONS") and _global(kind, "eager_attention_forward") is not None


def _uses(kind: Any, name: str) -> bool:
    """Returns whether the forward of a class uses the global `name`."""
    code = getattr(code_of(kind), "__code__", None)
    return code is not None and name in code.co_names


def _global(kind: Any, name: str) -> Any:
    return code_of(kind).__globals__.get(name)


@cache
def _imports_masks(kind: Any) -> bool:
    """Returns whether the file of a class imports a function of transformers' masking_utils."""
    names = code_of(kind).__globals__.values()
    return any(getattr(value, "__module__", "") == "transformers.masking_utils" for value in names)


def _is_silu(module: Any) -> bool:
    kind: Any = type(module)
    return isinstance(module, nn.SiLU | SiLU) or known(kind) is SiLU
