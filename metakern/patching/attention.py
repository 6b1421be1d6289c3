"""transformers' attention interface by `metakern.ops.attention`, and its rotary embedding by `metakern.ops.rope`.

transformers calls two functions that are registered by the name "metakern": `key_mask` makes the mask of a forward
pass, once for all layers, and `attention_forward` computes the attention of a layer. The op itself applies a causal
mask, with a window or without, so the mask only says which keys are padding, [B, L_k]. Whatever the op does not compute
is computed by the model's own eager formula.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, update_wrapper
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from metakern import ops
from metakern.nn.linear import mixed

NAME = "metakern"
_WINDOW = "_metakern_window"  # an attribute that `key_mask` sets on its mask
_NOT_FUSED = ("softcap", "s_aux", "position_bias", "head_mask", "cache")


@cache
def register() -> None:
    """Registers the two functions with transformers, once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_mask)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Computes a layer's attention by `metakern.ops.attention`, for transformers' attention interface.

    Args:
        module: The attention module.
        query: [B, H, L, D].
        key: [B, H_kv, L_k, D].
        value: [B, H_kv, L_k, D].
        attention_mask: The mask [B, L_k] that `key_mask` made, causal; or a mask [B, 1, L, L_k]; or None, for which
            `is_causal`, of the call or else of the module, decides.
        **kwargs: What transformers passes on, such as `scaling`, `dropout`, `sliding_window`.

    Returns:
        The outputs, [B, L, H, D], and None in place of the attention weights. A call that the op can't compute gives
        what the model's eager formula gives.
    """
    causal, window = kwargs.get("is_causal"), None
    if attention_mask is not None and attention_mask.dim() == 2:
        causal, window = True, getattr(attention_mask, _WINDOW, kwargs.get("sliding_window"))
        attention_mask, keys = attention_mask.bool(), attention_mask.shape[1]
        key, value = key[:, :, :keys], value[:, :, :keys]  # the rest of a static cache is not filled yet
    elif causal is None:
        causal = getattr(module, "is_causal", True)
    if (
        (attention_mask is not None and attention_mask.dim() != 2)
        or (kwargs.get("dropout") and module.training)
        or any(kwargs.get(name) is not None for name in _NOT_FUSED)
        or kwargs.get("output_attentions")
        or key.shape != value.shape
        or mixed(query, key, value)
    ):
        mask = _scores_mask(query, key, attention_mask, causal, window)
        eager = code_of(type(module)).__globals__["eager_attention_forward"]
        return eager(module, query, key, value, mask, **kwargs)
    y = ops.attention(query, key, value, causal=causal, mask=attention_mask, window=window, scale=kwargs.get("scaling"))
    return y.transpose(1, 2).contiguous(), None


def key_mask(**kwargs: Any) -> Tensor | None:
    """Makes the mask of a forward pass, for transformers' mask interface.

    Returns:
        For a causal mask, with a window or without, which keys are no padding, [B, L_k]; None if none is and there is
        no window. Keys after the last query's position are cut off. For any other mask [B, 1, L, L_k]. True means seen.
    """
    from transformers import masking_utils

    L_k, start, window = kwargs["kv_length"], int(kwargs.get("kv_offset", 0)), kwargs.get("local_size")
    positions = kwargs.get("cache_position")  # before transformers 5
    last = int(kwargs.get("q_offset", 0)) + kwargs["q_length"] if positions is None else int(positions[-1]) + 1
    seen, mask = last - start, kwargs.get("attention_mask")
    causal = masking_utils.causal_mask_function
    if window is not None:
        causal = masking_utils.sliding_window_causal_mask_function(window)
    if seen > L_k or not same(kwargs.get("mask_function", masking_utils.causal_mask_function), causal):
        return masking_utils.sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    if mask is not None:
        mask = nn.functional.pad(mask, (0, max(last - mask.shape[1], 0)))[:, start:last]
    elif window is not None or seen < L_k:
        device = kwargs["device"] if positions is None else positions.device
        mask = torch.ones(kwargs["batch_size"], seen, dtype=torch.bool, device=device)
    if mask is not None:
        setattr(mask, _WINDOW, window)  # some models do not pass it to `attention_forward`
    return mask


def _scores_mask(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """Returns the mask that an eager formula adds to its scores, [B, 1, L, L_k] or one that broadcasts to it."""
    L, L_k = query.shape[2], key.shape[2]
    if mask is None or mask.dim() == 2:
        mask = None if mask is None else mask[:, None, None]
        if causal:
            ones = torch.ones(L, L_k, dtype=torch.bool, device=query.device)
            seen = ones.tril(L_k - L) if window is None else ones.tril(L_k - L).triu(L_k - L - window + 1)
            mask = seen if mask is None else seen & mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    least = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)  # a softmax in float32 must not overflow
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)


def rotary(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a function that computes a model's `apply_rotary_pos_emb`, `original`, by `metakern.ops.rope`.

    It rotates the first `cos.shape[-1]` features of q and k, [B, H, L, D]. Calls of another form run `original`.
    """

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] % 2 or mixed(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    return apply


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    D = cos.shape[-1]
    if x.shape[-1] == D:
        return ops.rope(x, cos, sin)
    return torch.cat((ops.rope(x[..., :D], cos, sin), x[..., D:]), -1)


@cache
def is_half_rotation(candidate: Callable[..., Any] | None) -> bool:
    """Returns whether a model's `apply_rotary_pos_emb` computes what `metakern.ops.rope` does, by trying it."""
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = torch.randn(4, 2, 2, 3, 8, generator=random, dtype=torch.float64, device="cpu")
    cos, sin = cos[:, 0], sin[:, 0]
    try:
        found = candidate(q, k, cos, sin)  # type: ignore[misc]
        return all(torch.allclose(a, ops.rope(x, cos, sin)) for a, x in zip(found, (q, k), strict=True))
    except Exception:  # a function of other arguments is another function
        return False


def code_of(kind: Any) -> Any:
    """Returns the forward of a class without its decorators."""
    return inspect.unwrap(kind.forward)


def with_global(function: Any, name: str, value: Any) -> Any:
    """Returns a copy of a function that reads `value` as the global `name`, in copies of its decorators.

    Returns None if a decorator does not hold the function that it wraps in a cell of its closure, as a copy can't be
    put there then.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if not isinstance(function, FunctionType):
        return None
    names, closure, inner = function.__globals__, function.__closure__, None
    if wrapped is None:
        names = {**names, name: value}
    else:
        inner = with_global(wrapped, name, value)
        if inner is None or not any(cell.cell_contents is wrapped for cell in closure or ()):
            return None
        closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in closure or ())
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    update_wrapper(copied, function)
    copied.__kwdefaults__ = function.__kwdefaults__
    if wrapped is None:
        del copied.__wrapped__  # type: ignore[attr-defined]
    else:
        copied.__wrapped__ = inner  # type: ignore[attr-defined]
    return copied


def same(f: Any, g: Any) -> bool:
    """Returns whether two functions have the same code and closures, whatever their file, lines and docstrings are."""
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(map(same, f, g))
    if not (inspect.isfunction(f) and inspect.isfunction(g)):
        return bool(f == g)
    a, b = (
        (h.__code__.co_code, h.__code__.co_names, [c for c in h.__code__.co_consts if c != h.__doc__]) for h in (f, g)
    )
    cells = ([cell.cell_contents for cell in h.__closure__ or ()] for h in (f, g))
    return a == b and all(same(x, y) for x, y in zip(*cells, strict=True))
