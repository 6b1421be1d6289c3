"""The workloads' models and the meta-gradient in JAX, over torch.nn's weights by their names."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_map

from benchmarks.problem import Problem

Theta = dict[str, Array]
Batch = tuple[Array, Array]


def linear(theta: Theta, name: str, x: Array) -> Array:
    y = x @ theta[f"{name}.weight"].T
    return y + theta[f"{name}.bias"] if f"{name}.bias" in theta else y


def mlp(theta: Theta, x: Array) -> Array:
    *hidden, last = sorted({name.partition(".")[0] for name in theta}, key=int)
    for layer in hidden:
        x = jax.nn.relu(linear(theta, layer, x))
    return linear(theta, last, x)


def recurrent(theta: Theta, tokens: Array) -> Array:
    """torch.nn's RNN, GRU or LSTM: the input's products for all time steps at once, then a scan over time."""
    w_hh, b_hh = theta["rnn.weight_hh_l0"], theta["rnn.bias_hh_l0"]
    H = w_hh.shape[1]
    x = theta["embedding.weight"][tokens.T]  # [L, B, E]
    gates = x @ theta["rnn.weight_ih_l0"].T + theta["rnn.bias_ih_l0"]

    def lstm(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = state
        i, f, g, o = jnp.split(gates + h @ w_hh.T + b_hh, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        h, _ = state
        (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(gates, 3, -1), jnp.split(h @ w_hh.T + b_hh, 3, -1)
        n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
        h = n + jax.nn.sigmoid(x_z + h_z) * (h - n)
        return (h, h), h

    def rnn(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        h = jnp.tanh(gates + state[0] @ w_hh.T + b_hh)
        return (h, h), h

    zero = jnp.zeros((tokens.shape[0], H), x.dtype)
    cell = {1: rnn, 3: gru, 4: lstm}[w_hh.shape[0] // H]
    return linear(theta, "head", lax.scan(cell, (zero, zero), gates)[1]).swapaxes(0, 1)


def layer_norm(theta: Theta, name: str, x: Array) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    rstd = lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-5)
    return centered * rstd * theta[f"{name}.weight"] + theta[f"{name}.bias"]


def gpt(theta: Theta, tokens: Array, heads: int) -> Array:
    x = theta["tokens.weight"][tokens] + theta["positions.weight"][: tokens.shape[1]]
    B, L, D = x.shape
    causal = jnp.tril(jnp.ones((L, L), bool))
    for i in range(1 + max(int(name.split(".")[1]) for name in theta if name.startswith("blocks."))):
        block = f"blocks.{i}"
        qkv = linear(theta, f"{block}.qkv", layer_norm(theta, f"{block}.norm1", x))
        q, k, v = (a.reshape(B, L, heads, -1).swapaxes(1, 2) for a in jnp.split(qkv, 3, -1))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(D // heads)
        attended = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v
        x = x + linear(theta, f"{block}.out", attended.swapaxes(1, 2).reshape(B, L, D))
        up = linear(theta, f"{block}.up", layer_norm(theta, f"{block}.norm2", x))
        x = x + linear(theta, f"{block}.down", jax.nn.gelu(up, approximate=False))
    return linear(theta, "head", layer_norm(theta, "norm", x))


def arguments(problem: Problem) -> tuple[Theta, Batch, Batch]:
    def array(a: np.ndarray) -> Array:
        return jnp.asarray(a.astype(np.int32) if a.dtype == np.int64 else a)

    return tree_map(array, (problem.theta, problem.support, problem.query))


def meta_gradient(problem: Problem, tasks: str, mode: str) -> Callable[[Theta, Batch, Batch], Theta]:
    """tasks "vmap" | "loop"; mode "reverse" | "checkpoint" (over reverse, inner steps recomputed) | "forward"."""
    family = problem.name.partition("-")[0]
    model = mlp if family == "mlp" else recurrent

    def loss(theta: Theta, batch: Batch) -> Array:
        x, y = batch
        logits = gpt(theta, x, problem.heads) if family == "gpt" else model(theta, x)
        picked = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    def update(phi: Theta, support: Batch) -> Theta:
        return tree_map(lambda p, g: p - problem.lr * g, phi, jax.grad(loss)(phi, support))

    inner = jax.checkpoint(update) if mode == "checkpoint" else update

    def query_loss(theta: Theta, support: Batch, query: Batch) -> Array:
        phi = theta
        for _ in range(problem.steps):
            phi = inner(phi, support)
        return loss(phi, query)

    def forward_over_reverse(theta: Theta, support: Batch, query: Batch) -> Theta:
        phis = [theta]
        for _ in range(problem.steps):
            phis.append(update(phis[-1], support))
        v = jax.grad(loss)(phis.pop(), query)
        for phi in reversed(phis):
            v = jax.jvp(lambda phi: update(phi, support), (phi,), (v,))[1]
        return v

    one = forward_over_reverse if mode == "forward" else jax.grad(query_loss)
    T = len(problem.support[0])

    def loop(theta: Theta, support: Batch, query: Batch) -> Theta:
        def add(total: Theta, batches: tuple[Batch, Batch]) -> tuple[Theta, None]:
            return tree_map(lambda a, g: a + g / T, total, one(theta, *batches)), None

        return lax.scan(add, tree_map(jnp.zeros_like, theta), (support, query))[0]

    def vmapped(theta: Theta, support: Batch, query: Batch) -> Theta:
        if mode == "forward":
            return tree_map(lambda g: g.mean(0), jax.vmap(one, (None, 0, 0))(theta, support, query))
        return jax.grad(lambda theta: jax.vmap(query_loss, (None, 0, 0))(theta, support, query).mean())(theta)

    return loop if tasks == "loop" else vmapped
