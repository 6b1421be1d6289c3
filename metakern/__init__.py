"""metakern: exact second-order meta-learning, fused, batched over tasks, flat in memory and never silently wrong."""

from metakern import losses, nn, ops, optim
from metakern.meta.algorithms import ANIL, FOMAML, MAML, MetaSGD, Reptile
from metakern.nn.patch import patch, unpatch
from metakern.ops._backend import backend, backends

__version__ = "0.1.0"
__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "MetaSGD",
    "Reptile",
    "backend",
    "backends",
    "losses",
    "nn",
    "ops",
    "optim",
    "patch",
    "unpatch",
]
