"""Modules that run metakern's ops, with exact first and second derivatives.

The layers derive from the modules of the same names in torch.nn and have their constructors, calls and state dicts.
`Contextual`, `LoraLinear`, `SetEncoder`, `SoftPrompt` and `TextEncoder` are metakern's own.
"""

from metakern.nn.activation import GELU, SiLU
from metakern.nn.attention import MultiheadAttention
from metakern.nn.contextual import Contextual
from metakern.nn.linear import Linear
from metakern.nn.lora import LoraLinear
from metakern.nn.norm import LayerNorm, RMSNorm
from metakern.nn.recurrent import GRU, LSTM, RNN
from metakern.nn.set_encoder import SetEncoder
from metakern.nn.soft_prompt import SoftPrompt
from metakern.nn.text import TextEncoder
from metakern.nn.transformer import TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "Contextual",
    "LayerNorm",
    "Linear",
    "LoraLinear",
    "MultiheadAttention",
    "RMSNorm",
    "SetEncoder",
    "SiLU",
    "SoftPrompt",
    "TextEncoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
