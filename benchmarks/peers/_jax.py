"""The workloads' models and the meta-gradient in JAX. Weights have the names and shapes of torch.nn.

In a model's function `theta` holds all of its weights; in the meta-gradient it holds those that learn, and `frozen` the
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_map

from benchmarks.problem import Problem

Theta = dict[str, Array]
Batch = tuple[Array, Array]
ROPE_BASE = 10000.0


def linear(theta: Theta, name: str, x: Array) -> Array:
    y = x @ theta[f"{name}.weight"].T
    return y + theta[f"{name}.bias"] if f"{name}.bias" in theta else y


def mlp(theta: Theta, x: Array) -> Array:
    *hidden, last = sorted({name.partition(".")[0] for name in theta}, key=int)
    for layer in hidden:
        x = jax.nn.relu(linear(theta, layer, x))
    return linear(theta, last, x)


def recurrent(theta: Theta, tokens: Array) -> Array:
    """Run torch.nn's RNN, GRU or LSTM: the products of the input for all time steps, then a scan over time."""
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
    for i in range(blocks(theta)):
        block = f"blocks.{i}"
        qkv = linear(theta, f"{block}.qkv", layer_norm(theta, f"{block}.norm1", x))
        q, k, v = (a.reshape(B, L, heads, -1).swapaxes(1, 2) for a in jnp.split(qkv, 3, -1))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(D // heads)
        attended = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v
        x = x + linear(theta, f"{block}.out", attended.swapaxes(1, 2).reshape(B, L, D))
        up = linear(theta, f"{block}.up", layer_norm(theta, f"{block}.norm2", x))
        x = x + linear(theta, f"{block}.down", jax.nn.gelu(up, approximate=False))
    return linear(theta, "head", layer_norm(theta, "norm", x))


def rms_norm(theta: Theta, name: str, x: Array) -> Array:
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * theta[f"{name}.weight"]


def lora_linear(theta: Theta, name: str, x: Array) -> Array:
    y = linear(theta, name, x)
    return y + x @ theta[f"{name}.lora_A"].T @ theta[f"{name}.lora_B"].T if f"{name}.lora_A" in theta else y


def llama(theta: Theta, tokens: Array, heads: int) -> Array:
    x = theta["tokens.weight"][tokens]
    B, L, D = x.shape
    head_dim = D // heads
    causal = jnp.tril(jnp.ones((L, L), bool))
    speed = ROPE_BASE ** -(jnp.arange(0, head_dim, 2, dtype=x.dtype) / head_dim)
    angles = jnp.tile(jnp.outer(jnp.arange(L, dtype=x.dtype), speed), 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rotate(x: Array) -> Array:
        a, b = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate((-b, a), -1) * sin

    for i in range(blocks(theta)):
        of = partial(lora_linear, theta)
        block, normed = f"blocks.{i}", rms_norm(theta, f"blocks.{i}.norm1", x)
        q, k, v = (of(f"{block}.{name}", normed).reshape(B, L, -1, head_dim).swapaxes(1, 2) for name in "qkv")
        # [B, H_kv, H / H_kv, L, head_dim]: groups of heads of q that share a head of k and v
        q, k, v = rotate(q).reshape(B, k.shape[1], -1, L, head_dim), rotate(k)[:, :, None], v[:, :, None]
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(head_dim)
        attended = (jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v).reshape(B, heads, L, head_dim)
        x = x + of(f"{block}.o", attended.swapaxes(1, 2).reshape(B, L, D))
        normed = rms_norm(theta, f"{block}.norm2", x)
        x = x + of(f"{block}.down", jax.nn.silu(of(f"{block}.gate", normed)) * of(f"{block}.up", normed))
    return linear(theta, "head", rms_norm(theta, "norm", x))


def blocks(theta: Theta) -> int:
    return 1 + max(int(name.split(".")[1]) for name in theta if name.startswith("blocks."))


def model(settings: dict[str, Any]) -> Callable[[Theta, Array], Array]:
    if settings["model"] in ("gpt", "llama", "full-llama"):
        return partial(gpt if settings["model"] == "gpt" else llama, heads=settings["heads"])
    return mlp if settings["model"] == "mlp" else recurrent


def arguments(problem: Problem) -> tuple[Theta, Theta, Batch, Batch]:
    def array(a: np.ndarray) -> Array:
        return jnp.asarray(a.astype(np.int32) if a.dtype == np.int64 else a)

    return tree_map(array, (problem.theta, problem.frozen, problem.support, problem.query))


def meta_gradient(problem: Problem, tasks: str, mode: str) -> Callable[[Theta, Theta, Batch, Batch], Theta]:
    """Return the function that computes the meta-gradient.

    tasks: "vmap" runs all tasks at once, "loop" one at a time, "chunks" in at most four chunks. mode: "forward" is
    forward over reverse; the others are reverse over reverse, with inner steps that are unrolled ("reverse"), scanned
    ("scan") or recomputed ("checkpoint").
    """
    run, lr, K = model(problem.settings), problem.settings["lr"], problem.settings["K"]
    T = len(problem.support[0])

    def loss(phi: Theta, frozen: Theta, batch: Batch) -> Array:
        x, y = batch
        logits = run(phi | frozen, x)
        picked = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    def update(phi: Theta, frozen: Theta, support: Batch) -> Theta:
        return tree_map(lambda p, g: p - lr * g, phi, jax.grad(loss)(phi, frozen, support))

    inner = jax.checkpoint(update) if mode == "checkpoint" else update

    def query_loss(theta: Theta, frozen: Theta, support: Batch, query: Batch) -> Array:
        if mode == "scan":
            phi = lax.scan(lambda phi, _: (inner(phi, frozen, support), None), theta, length=K)[0]
        else:
            phi = theta
            for _ in range(K):
                phi = inner(phi, frozen, support)
        return loss(phi, frozen, query)

    def forward_over_reverse(theta: Theta, frozen: Theta, support: Batch, query: Batch) -> Theta:
        phis = [theta]
        for _ in range(K):
            phis.append(update(phis[-1], frozen, support))
        v = jax.grad(loss)(phis.pop(), frozen, query)
        for phi in reversed(phis):
            v = jax.jvp(lambda phi: update(phi, frozen, support), (phi,), (v,))[1]
        return v

    def together(theta: Theta, frozen: Theta, support: Batch, query: Batch) -> Theta:
        """Return the sum of the meta-gradients of some tasks, which are computed at once."""
        over = None, None, 0, 0
        if mode == "forward":
            each = jax.vmap(forward_over_reverse, over)(theta, frozen, support, query)
            return tree_map(lambda g: g.sum(0), each)
        return jax.grad(lambda theta: jax.vmap(query_loss, over)(theta, frozen, support, query).sum())(theta)

    count = {"vmap": 1, "loop": T, "chunks": next(n for n in (4, 3, 2, 1) if T % n == 0)}[tasks]

    def step(theta: Theta, frozen: Theta, *batches: Batch) -> Theta:
        def add(total: Theta, chunk: tuple[Batch, Batch]) -> tuple[Theta, None]:
            return tree_map(lambda a, g: a + g / T, total, together(theta, frozen, *chunk)), None

        chunks = tree_map(lambda a: a.reshape(count, T // count, *a.shape[1:]), batches)
        if count == 1:
            return add(tree_map(jnp.zeros_like, theta), tree_map(lambda a: a[0], chunks))[0]
        return lax.scan(add, tree_map(jnp.zeros_like, theta), chunks)[0]

    return step
