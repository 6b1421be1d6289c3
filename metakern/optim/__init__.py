"""Inner optimizers: differentiable, batched over tasks, with hyper-parameters that the outer loop may learn."""

from metakern.optim._base import InnerOptimizer
from metakern.optim.adagrad import Adagrad
from metakern.optim.adam import Adam, AdamW
from metakern.optim.metasgd import MetaSGD
from metakern.optim.rmsprop import RMSprop
from metakern.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "InnerOptimizer", "MetaSGD", "RMSprop"]
