"""Meta-gradients: the engine (planning, batching, unrolling, capture) and the algorithms that use it."""
