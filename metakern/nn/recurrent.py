"""torch.nn's recurrent modules by metakern's ops: one op for each layer and direction, with dropout between layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from metakern import ops

States = tuple[Tensor, ...]


def run(
    module: nn.RNNBase,
    x: Tensor,
    states: States | None,
    parameter: Callable[[str], Tensor],
    lengths: Tensor | None = None,
) -> tuple[Tensor, States]:
    """Runs all layers and directions of a torch.nn or metakern.nn module; returns the outputs and the final states.

    `parameter` gives the parameters by name. x is [B, L, I], the outputs are [B, L, directions · H]. The states, before
    and after, are (h,) or (h, c), each [layers · directions, B, H]. `lengths` [B] has the number of steps of each
    sequence. Where the parameters have the tasks first, so have x, [T, B, L, I], and `lengths`, [T, B]; states are then
    [layers · directions, T, B, H].
    """
    directions = ("", "_reverse") if module.bidirectional else ("",)
    finals: list[States] = []
    for layer in range(module.num_layers):
        if layer and module.training and module.dropout:
            x = F.dropout(x, module.dropout)
        outputs = []
        for suffix in directions:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]
            weights = [parameter(f"{name}_l{layer}{suffix}") for name in names]
            start = None if states is None else tuple(state[len(finals)] for state in states)
            y, final = _layer(module.mode, x, start, weights, lengths=lengths, reverse=bool(suffix))
            outputs.append(y)
            finals.append(final)
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return x, tuple(torch.stack(state) for state in zip(*finals, strict=True))


def _layer(mode: str, x: Tensor, start: States | None, weights: list[Tensor], **options: Any) -> tuple[Tensor, States]:
    """Runs one direction of one layer."""
    if mode == "LSTM":
        return ops.lstm(x, None if start is None else (start[0], start[1]), *weights, **options)
    h = None if start is None else start[0]
    if mode == "GRU":
        y, h = ops.gru(x, h, *weights, **options)
    else:
        y, h = ops.rnn(x, h, *weights, nonlinearity=mode.removeprefix("RNN_").lower(), **options)
    return y, (h,)


class _Recurrent(nn.RNNBase):
    """The base of RNN, GRU and LSTM: checks torch.nn's arguments, calls `run`, and returns torch.nn's results."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.proj_size:
            raise ValueError(f"{self._get_name()}: proj_size must be 0, got {self.proj_size}")

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        name, x, lengths = self._get_name(), input, None
        if isinstance(x, PackedSequence):
            x, lengths = pad_packed_sequence(x, batch_first=True)
            lengths = lengths.to(x.device)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: input must be a tensor or a PackedSequence, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: input must be floating point, got {x.dtype}")
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: input must have 2 or 3 dimensions, the last of size {self.input_size}, got {list(x.shape)}"
            )
        batched = x.dim() == 3
        time_first = batched and lengths is None and not self.batch_first
        x = x.transpose(0, 1) if time_first else x if batched else x.unsqueeze(0)
        states = self._states(hx, x.shape[:1] if batched else ())
        if states is not None and not batched:
            states = tuple(state.unsqueeze(1) for state in states)
        y, states = run(self, x, states, partial(getattr, self), lengths)
        if not batched:
            y, states = y.squeeze(0), tuple(state.squeeze(1) for state in states)
        y = y.transpose(0, 1) if time_first else y
        output = _packed(y, input) if isinstance(input, PackedSequence) else y
        return output, states if self.mode == "LSTM" else states[0]

    def _states(self, hx: Any, batch: Sequence[int]) -> States | None:
        """Checks hx, and returns it as (h,) or (h, c), each [layers · directions, *batch, H], or as None."""
        if hx is None:
            return None
        name, is_lstm = self._get_name(), self.mode == "LSTM"
        states = tuple(hx) if is_lstm and isinstance(hx, tuple | list) else (hx,)
        if len(states) != 1 + is_lstm or not all(isinstance(state, Tensor) for state in states):
            kind = "a pair (h, c) of tensors" if is_lstm else "a tensor"
            raise TypeError(f"{name}: hx must be {kind}, got {type(hx).__name__}")
        expected = [self.num_layers * (2 if self.bidirectional else 1), *batch, self.hidden_size]
        for state in states:
            if list(state.shape) != expected:
                raise ValueError(f"{name}: hx must have shape {expected}, got {list(state.shape)}")
        return states


def _packed(y: Tensor, like: PackedSequence) -> PackedSequence:
    """Packs y [B, L, D] with the lengths and the order of another PackedSequence."""
    if like.sorted_indices is not None:
        y = y.index_select(0, like.sorted_indices)
    steps = zip(y.unbind(1), like.batch_sizes.tolist(), strict=True)
    return PackedSequence(torch.cat([y_l[:size] for y_l, size in steps]), *like[1:])


class RNN(_Recurrent, nn.RNN):
    """torch.nn.RNN, computed by `metakern.ops.rnn`, with the same arguments, state dict and outputs.

    The input is [L, B, I]; [B, L, I] with `batch_first`; [L, I] without a batch; or a PackedSequence. hx is
    [layers · directions, B, H], without B if the input has no batch, or None for zeros.

    Args:
        *args, **kwargs: The arguments of torch.nn.RNN.

    Raises:
        TypeError: When called, for an input that is not a floating-point tensor or PackedSequence, for a dtype other
            than the parameters', or for an hx of another kind.
        ValueError: When called, for shapes that do not fit.

    >>> import metakern as mk, torch
    >>> y, h = mk.nn.RNN(3, 5, num_layers=2, batch_first=True)(torch.zeros(2, 7, 3))
    >>> y.shape, h.shape
    (torch.Size([2, 7, 5]), torch.Size([2, 2, 5]))
    """


class GRU(_Recurrent, nn.GRU):
    """torch.nn.GRU, computed by `metakern.ops.gru`, with the same arguments, state dict and outputs.

    The input is [L, B, I]; [B, L, I] with `batch_first`; [L, I] without a batch; or a PackedSequence. hx is
    [layers · directions, B, H], without B if the input has no batch, or None for zeros.

    Args:
        *args, **kwargs: The arguments of torch.nn.GRU.

    Raises:
        TypeError: When called, for an input that is not a floating-point tensor or PackedSequence, for a dtype other
            than the parameters', or for an hx of another kind.
        ValueError: When called, for shapes that do not fit.

    >>> import metakern as mk, torch
    >>> y, h = mk.nn.GRU(3, 5, bidirectional=True)(torch.zeros(7, 2, 3))
    >>> y.shape, h.shape
    (torch.Size([7, 2, 10]), torch.Size([2, 2, 5]))
    """


class LSTM(_Recurrent, nn.LSTM):
    """torch.nn.LSTM, computed by `metakern.ops.lstm`, with the same arguments, state dict and outputs.

    The input is [L, B, I]; [B, L, I] with `batch_first`; [L, I] without a batch; or a PackedSequence. hx is
    (h, c), each [layers · directions, B, H], without B if the input has no batch, or None for zeros.

    Args:
        *args, **kwargs: The arguments of torch.nn.LSTM, of which proj_size must be 0.

    Raises:
        TypeError: When called, for an input that is not a floating-point tensor or PackedSequence, for a dtype other
            than the parameters', or for an hx of another kind.
        ValueError: For proj_size; when called, for shapes that do not fit.

    >>> import metakern as mk, torch
    >>> y, (h, c) = mk.nn.LSTM(3, 5, batch_first=True)(torch.zeros(2, 7, 3))
    >>> y.shape, h.shape, c.shape
    (torch.Size([2, 7, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5]))
    """
