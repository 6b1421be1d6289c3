"""learn2learn's interface to MAML on metakern: `from metakern.compat import learn2learn as l2l`."""

from metakern.compat.learn2learn import algorithms, utils
from metakern.compat.learn2learn.algorithms import MAML, BaseLearner, MetaSGD, maml_update, meta_sgd_update
from metakern.compat.learn2learn.utils import clone_module, clone_parameters, detach_module, magic_box, update_module

__all__ = [
    "MAML",
    "BaseLearner",
    "MetaSGD",
    "algorithms",
    "clone_module",
    "clone_parameters",
    "detach_module",
    "magic_box",
    "maml_update",
    "meta_sgd_update",
    "update_module",
    "utils",
]
