"""Ops with exact first and second derivatives, in forward and reverse mode, batched over tasks.

Each op is a folder of this package. `SPECS` maps its name to what the shared tests and benchmarks need to know of it. A
tensor that each task has for itself is [T, ...], with the T tasks first. A third derivative raises NotImplementedError.
"""

from metakern.ops.adagrad_update import SPEC as _ADAGRAD_UPDATE
from metakern.ops.adagrad_update import adagrad_update
from metakern.ops.adam_update import SPEC as _ADAM_UPDATE
from metakern.ops.adam_update import adam_update
from metakern.ops.attention import SPEC as _ATTENTION
from metakern.ops.attention import attention
from metakern.ops.cross_entropy import SPEC as _CROSS_ENTROPY
from metakern.ops.cross_entropy import cross_entropy
from metakern.ops.embedding import SPEC as _EMBEDDING
from metakern.ops.embedding import embedding
from metakern.ops.gelu import SPEC as _GELU
from metakern.ops.gelu import gelu
from metakern.ops.global_norm import SPEC as _GLOBAL_NORM
from metakern.ops.global_norm import global_norm
from metakern.ops.gru import SPEC as _GRU
from metakern.ops.gru import gru
from metakern.ops.layer_norm import SPEC as _LAYER_NORM
from metakern.ops.layer_norm import layer_norm
from metakern.ops.linear import SPEC as _LINEAR
from metakern.ops.linear import linear
from metakern.ops.linear_cross_entropy import SPEC as _LINEAR_CROSS_ENTROPY
from metakern.ops.linear_cross_entropy import linear_cross_entropy
from metakern.ops.lora_linear import SPEC as _LORA_LINEAR
from metakern.ops.lora_linear import lora_linear
from metakern.ops.lstm import SPEC as _LSTM
from metakern.ops.lstm import lstm
from metakern.ops.newton_schulz import SPEC as _NEWTON_SCHULZ
from metakern.ops.newton_schulz import newton_schulz
from metakern.ops.rms_norm import SPEC as _RMS_NORM
from metakern.ops.rms_norm import rms_norm
from metakern.ops.rmsprop_update import SPEC as _RMSPROP_UPDATE
from metakern.ops.rmsprop_update import rmsprop_update
from metakern.ops.rnn import SPEC as _RNN
from metakern.ops.rnn import rnn
from metakern.ops.rope import SPEC as _ROPE
from metakern.ops.rope import rope
from metakern.ops.scale import SPEC as _SCALE
from metakern.ops.scale import scale
from metakern.ops.sgd_update import SPEC as _SGD_UPDATE
from metakern.ops.sgd_update import sgd_update
from metakern.ops.silu import SPEC as _SILU
from metakern.ops.silu import silu
from metakern.ops.swiglu import SPEC as _SWIGLU
from metakern.ops.swiglu import swiglu

SPECS = {
    spec.op.name: spec
    for spec in (
        _ADAGRAD_UPDATE,
        _ADAM_UPDATE,
        _ATTENTION,
        _CROSS_ENTROPY,
        _EMBEDDING,
        _GELU,
        _GLOBAL_NORM,
        _GRU,
        _LAYER_NORM,
        _LINEAR,
        _LINEAR_CROSS_ENTROPY,
        _LORA_LINEAR,
        _LSTM,
        _NEWTON_SCHULZ,
        _RMS_NORM,
        _RMSPROP_UPDATE,
        _RNN,
        _ROPE,
        _SCALE,
        _SGD_UPDATE,
        _SILU,
        _SWIGLU,
    )
}

__all__ = [
    "SPECS",
    "adagrad_update",
    "adam_update",
    "attention",
    "cross_entropy",
    "embedding",
    "gelu",
    "global_norm",
    "gru",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "lstm",
    "newton_schulz",
    "rms_norm",
    "rmsprop_update",
    "rnn",
    "rope",
    "scale",
    "sgd_update",
    "silu",
    "swiglu",
]
