"""learn2learn's interface on metakern: `from metakern.compat import learn2learn as l2l`."""

from metakern.compat.learn2learn import algorithms, nn, optim, utils
from metakern.compat.learn2learn._absent import absent
from metakern.compat.learn2learn.algorithms import GBML, MAML, BaseLearner, MetaSGD, maml_update, meta_sgd_update
from metakern.compat.learn2learn.utils import (
    accuracy,
    clone_distribution,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_distribution,
    detach_module,
    magic_box,
    update_module,
)

data = absent(f"{__name__}.data", "data sets and tasks of them")
gym = absent(f"{__name__}.gym", "environments")
text = absent(f"{__name__}.text", "text data sets")
vision = absent(f"{__name__}.vision", "image data sets and models")

__all__ = [
    "GBML",
    "MAML",
    "BaseLearner",
    "MetaSGD",
    "accuracy",
    "algorithms",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "magic_box",
    "maml_update",
    "meta_sgd_update",
    "nn",
    "optim",
    "update_module",
    "utils",
]
