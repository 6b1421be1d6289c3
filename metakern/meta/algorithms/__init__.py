"""Meta-learning algorithms, one file each; a call `algorithm(support, query)` returns the mean query loss."""

from metakern.meta.algorithms.anil import ANIL
from metakern.meta.algorithms.boil import BOIL
from metakern.meta.algorithms.cavia import CAVIA
from metakern.meta.algorithms.fomaml import FOMAML
from metakern.meta.algorithms.hypernetwork import HyperNetwork
from metakern.meta.algorithms.imaml import IMAML
from metakern.meta.algorithms.maml import MAML
from metakern.meta.algorithms.mamlplusplus import MAMLPlusPlus
from metakern.meta.algorithms.metalstm import MetaLSTM
from metakern.meta.algorithms.metasgd import MetaSGD
from metakern.meta.algorithms.protomaml import ProtoMAML
from metakern.meta.algorithms.protonet import ProtoNet
from metakern.meta.algorithms.reptile import Reptile
from metakern.meta.algorithms.streaming import Streaming

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
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "Streaming",
]
