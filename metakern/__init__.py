"""Exact, batched second-order MAML: fused PyTorch ops with second derivatives, and an engine for meta-gradients."""

from metakern import interrupts as interrupts  # the first one: it handles Ctrl-C during all others
from metakern import losses, nn, ops, optim
from metakern.adapters.lora import lora, merge_lora, remove_lora
from metakern.adapters.peft import load_lora, save_lora
from metakern.diagnosis import doctor
from metakern.meta.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    FOMAML,
    IMAML,
    MAML,
    HyperNetwork,
    MAMLPlusPlus,
    MetaLSTM,
    MetaSGD,
    ProtoMAML,
    ProtoNet,
    Reptile,
    Streaming,
)
from metakern.meta.algorithms.registry import register_algorithm
from metakern.meta.batches import PerStep, pad_tasks
from metakern.meta.capture import StaleCaptureError
from metakern.ops.core.backend import backend, backends
from metakern.patching import patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "HyperNetwork",
    "MAMLPlusPlus",
    "MetaLSTM",
    "MetaSGD",
    "PerStep",
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "StaleCaptureError",
    "Streaming",
    "backend",
    "backends",
    "doctor",
    "load_lora",
    "lora",
    "losses",
    "merge_lora",
    "nn",
    "ops",
    "optim",
    "pad_tasks",
    "patch",
    "register_algorithm",
    "remove_lora",
    "save_lora",
    "unpatch",
]
