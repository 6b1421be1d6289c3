"""Algorithms over the engine, one file each; all are called as value = algorithm(support, query)."""

from metakern.meta.algorithms.anil import ANIL
from metakern.meta.algorithms.fomaml import FOMAML
from metakern.meta.algorithms.maml import MAML
from metakern.meta.algorithms.metasgd import MetaSGD
from metakern.meta.algorithms.reptile import Reptile

__all__ = ["ANIL", "FOMAML", "MAML", "MetaSGD", "Reptile"]
