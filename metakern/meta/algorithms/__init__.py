"""Meta-learning algorithms, one file each; a call `algorithm(support, query)` returns the mean query loss."""

from metakern.meta.algorithms.anil import ANIL
from metakern.meta.algorithms.fomaml import FOMAML
from metakern.meta.algorithms.maml import MAML
from metakern.meta.algorithms.metalstm import MetaLSTM
from metakern.meta.algorithms.metasgd import MetaSGD
from metakern.meta.algorithms.reptile import Reptile

__all__ = ["ANIL", "FOMAML", "MAML", "MetaLSTM", "MetaSGD", "Reptile"]
