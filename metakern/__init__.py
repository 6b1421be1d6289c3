"""metakern: exact second-order meta-learning, fused, batched over tasks, flat in memory and never silently wrong."""

from metakern import ops
from metakern.ops._backend import backend, backends

__version__ = "0.1.0"
__all__ = ["backend", "backends", "ops"]
