"""Ops with exact first and second derivatives, in forward and reverse mode, batched over tasks.

Each op is a folder of this package. `SPECS` maps its name to what the shared tests and benchmarks need to know of it. A
tensor that each task has for itself is [T, ...], with the T tasks first. A third derivative raises NotImplementedError.
"""

import sys

from metakern.ops.adagrad_update import adagrad_update
from metakern.ops.adam_update import adam_update
from metakern.ops.attention import attention
from metakern.ops.core.spec import Spec
from metakern.ops.cross_entropy import cross_entropy
from metakern.ops.embedding import embedding
from metakern.ops.gelu import gelu
from metakern.ops.global_norm import global_norm
from metakern.ops.gru import gru
from metakern.ops.implicit_linear import implicit_linear
from metakern.ops.layer_norm import layer_norm
from metakern.ops.linear import linear
from metakern.ops.linear_cross_entropy import linear_cross_entropy
from metakern.ops.lora_linear import lora_linear
from metakern.ops.lstm import lstm
from metakern.ops.metalstm_update import metalstm_update
from metakern.ops.newton_schulz import newton_schulz
from metakern.ops.prototype_log_softmax import prototype_log_softmax
from metakern.ops.rms_norm import rms_norm
from metakern.ops.rmsprop_update import rmsprop_update
from metakern.ops.rnn import rnn
from metakern.ops.rope import rope
from metakern.ops.scale import scale
from metakern.ops.sgd_update import sgd_update
from metakern.ops.silu import silu
from metakern.ops.swiglu import swiglu

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
    "implicit_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "lstm",
    "metalstm_update",
    "newton_schulz",
    "prototype_log_softmax",
    "rms_norm",
    "rmsprop_update",
    "rnn",
    "rope",
    "scale",
    "sgd_update",
    "silu",
    "swiglu",
]

SPECS: dict[str, Spec] = {op: sys.modules[f"{__name__}.{op}"].SPEC for op in __all__[1:]}
