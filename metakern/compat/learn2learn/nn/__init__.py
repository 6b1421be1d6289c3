"""learn2learn's modules."""

from metakern.compat.learn2learn.nn.kroneckers import KroneckerLinear, KroneckerLSTM, KroneckerRNN, kronecker_addmm
from metakern.compat.learn2learn.nn.metalayers import MetaModule, ParameterTransform
from metakern.compat.learn2learn.nn.misc import Flatten, Lambda, Scale, freeze, unfreeze
from metakern.compat.learn2learn.nn.protonet import PrototypicalClassifier, compute_prototypes

__all__ = [
    "Flatten",
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerRNN",
    "Lambda",
    "MetaModule",
    "ParameterTransform",
    "PrototypicalClassifier",
    "Scale",
    "compute_prototypes",
    "freeze",
    "kronecker_addmm",
    "unfreeze",
]


def __getattr__(name: str) -> None:
    if name == "SVClassifier":
        raise ImportError(
            "metakern.compat.learn2learn.nn: SVClassifier is left out, as it needs a solver of quadratic "
            "programs: take it from learn2learn with qpth"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
