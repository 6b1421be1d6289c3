"""Inner optimizers: differentiable updates, batched over tasks, with hyper-parameters that the outer loop can learn."""

from metakern.optim.adagrad import Adagrad
from metakern.optim.adam import Adam, AdamW
from metakern.optim.base import InnerOptimizer
from metakern.optim.clipped import Clipped
from metakern.optim.lstm import LSTMOptimizer
from metakern.optim.metacurvature import MetaCurvature
from metakern.optim.metasgd import MetaSGD
from metakern.optim.muon import Muon
from metakern.optim.normalized import NormalizedSGD
from metakern.optim.rmsprop import RMSprop
from metakern.optim.sgd import SGD
from metakern.optim.stepoffsets import StepOffsets

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Clipped",
    "InnerOptimizer",
    "LSTMOptimizer",
    "MetaCurvature",
    "MetaSGD",
    "Muon",
    "NormalizedSGD",
    "RMSprop",
    "StepOffsets",
]
