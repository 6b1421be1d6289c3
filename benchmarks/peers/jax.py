"""JAX: a jitted meta-gradient, over tasks by vmap, a loop or chunks, in the modes of `_jax.meta_gradient`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.problem import Problem

requirements = ("jax==0.10.2",)
shares_torch = False


def method(tasks: str, mode: str) -> Callable[[Problem], Callable[[], dict[str, Any]]]:
    def prepare(problem: Problem) -> Callable[[], dict[str, Any]]:
        import jax

        from benchmarks.peers._jax import arguments, meta_gradient

        compiled = jax.jit(meta_gradient(problem, tasks, mode))
        args = arguments(problem)
        return lambda: jax.block_until_ready(compiled(*args))

    return prepare


methods = {
    "JAX, vmap": method("vmap", "reverse"),
    "JAX, vmap, forward over reverse": method("vmap", "forward"),
    "JAX, task loop": method("loop", "reverse"),
    "JAX, task loop, scan over steps": method("loop", "scan"),
    "JAX, task loop, checkpointed steps": method("loop", "checkpoint"),
    "JAX, task loop, forward over reverse": method("loop", "forward"),
    "JAX, tasks in 4 chunks": method("chunks", "reverse"),
    "JAX, tasks in 4 chunks, forward over reverse": method("chunks", "forward"),
}
