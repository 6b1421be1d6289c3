"""Modules over metakern's ops, with torch.nn's constructors, calls and state dicts, exact to second order."""

from metakern.nn.attention import MultiheadAttention
from metakern.nn.lora import LoraLinear
from metakern.nn.norm import LayerNorm, RMSNorm
from metakern.nn.recurrent import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "LayerNorm", "LoraLinear", "MultiheadAttention", "RMSNorm"]
