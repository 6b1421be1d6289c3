"""learn2learn's learned optimizers: transforms of gradients, and steps with transformed gradients."""

from metakern.compat.learn2learn.optim import transforms
from metakern.compat.learn2learn.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from metakern.compat.learn2learn.optim.updates import DifferentiableSGD, LearnableOptimizer, ParameterUpdate

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "ReshapedTransform",
    "TransformDictionary",
    "transforms",
]
