"""Meta-learning for streams: each chunk is predicted by the weights that all chunks before it have adapted.

    phi_0 = theta        phi_{k+1} = U(phi_k, grad S(phi_k, c_k))        L(theta) = mean_t mean_k S(phi_k, c_k)

Chunk k is the query of the weights after k steps and the support of the next step, as in test-time training (Sun et al.
2020, "Test-time training with self-supervision for generalization under distribution shifts", section 2, its online
version; Sun et al. 2024, "Learning to (learn at test time)", section 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML, Until, meta_gradient, refuse
from metakern.meta.batches import Outer, PerStep, tasks_of
from metakern.meta.batching import Loss
from metakern.meta.precision import in_precision
from metakern.meta.unroll import added
from metakern.optim import InnerOptimizer


class Streaming(MAML):
    """Meta-learn an initialisation for streams, which adapts by one inner step for each chunk.

    `streaming(stream)` returns the mean loss over the chunks, each by the weights before its own inner step; its
    `backward()` adds the exact meta-gradient, through all steps, to `.grad`.

    A stream is a tree of tensors `[T, K, ...]`, K chunks of T streams; or a `metakern.PerStep` with a batch `[T, ...]`
    for each chunk, whose sizes may differ.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, chunk)` returns the loss of one chunk of one stream, a scalar tensor.
        inner: The optimizer of the inner loop; `metakern.optim.Clipped` bounds its gradients.
        window: After how many chunks the derivative is cut: the weights go on, and count as theta plus a constant from
            there on. Memory is then that of one window. None differentiates through the whole stream.
        **options: The other arguments of `metakern.MAML`, except `steps` and `query_weights`.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it; also if `window` is not an integer of at least 1.

    >>> import torch, metakern as mk
    >>> streaming = mk.Streaming(torch.nn.Linear(8, 4), mk.losses.classification, mk.optim.SGD(lr=0.1))
    >>> x, y = torch.randn(5, 6, 10, 8), torch.randint(4, (5, 6, 10))  # 5 streams of 6 chunks
    >>> streaming((x, y)).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inner: InnerOptimizer | None = None,
        window: int | None = None,
        **options: Any,
    ) -> None:
        refuse("Streaming", options, "steps", "query_weights")
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ValueError(f"Streaming: window must be None or an integer of at least 1, got {window!r}")
        super().__init__(model, loss, inner, **options)
        self.window = window

    def forward(self, stream: Any) -> Tensor:  # type: ignore[override]
        """Return the mean loss over all chunks of all streams, a scalar.

        Raises:
            ValueError: `window` is less than K, and the inner optimizer has a state; or as `metakern.MAML` raises it.
            RuntimeError: As `metakern.MAML` raises it.
        """
        stream = _chunks(stream)
        chunks, tasks = len(stream.batches), tasks_of(stream, "stream")
        if not torch.is_grad_enabled():
            self.query_losses = self.evaluate(stream).mean(0)
            return self.query_losses.mean()
        window = min(self.window or chunks, chunks)
        self.steps = window - 1
        losses, gradients = torch.zeros(()), list[Tensor | None]()
        for first, start in self._starts(stream, window):
            part = PerStep(*stream.batches[first : first + window])
            counted = tuple(range(len(part.batches)))
            weights = self._weights([1 / chunks] * len(counted), tasks)
            found, of_window, leaves = self._gradients(part, Outer(part, counted, weights), *start)
            losses = losses.to(found) + found
            gradients = [*added(gradients or [None] * len(leaves), of_window)]
        self.query_losses = losses
        return meta_gradient(losses, gradients, leaves)

    def adapt(
        self,
        stream: Any,
        steps: int | None = None,
        start: Mapping[str, Tensor] | None = None,
        until: Until | None = None,
    ) -> dict[str, Tensor]:
        """Return the weights of each stream after its chunks, or after the first `steps` of them; as MAML's `adapt`."""
        stream = _chunks(stream)
        return super().adapt(stream, len(stream.batches) if steps is None else steps, start, until)

    def evaluate(
        self,
        stream: Any,
        query: Any = None,
        steps: Sequence[int] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the loss of each chunk before its own inner step, `[K, T]`; or as MAML's `evaluate`, with a query."""
        stream = _chunks(stream)
        return self.curves(stream, [stream if query is None else query], steps, start)[0]

    def curves(
        self,
        stream: Any,
        queries: Sequence[Any],
        steps: Sequence[int] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return what `evaluate` returns for each of several queries, `[len(queries), len(steps), T]`."""
        stream = _chunks(stream)
        return super().curves(stream, queries, range(len(stream.batches)) if steps is None else steps, start)

    def _starts(self, stream: PerStep, window: int) -> Iterator[tuple[int, list[list[Tensor]]]]:
        """Yield the number of the first chunk of each window, and what the weights of its tasks start from."""
        chunks = len(stream.batches)
        yield 0, []
        if window == chunks:
            return
        prepared = self._prepare(stream)
        if prepared.unroll.inner.init(prepared.theta(1)):
            raise ValueError(
                f"Streaming: window must be None for an inner optimizer with a state, got {window}: its state would be"
                " lost between windows"
            )
        firsts = range(window, chunks, window)

        @in_precision(self.precision)
        def compute(stream: PerStep) -> list[list[Tensor]]:
            trajectory = prepared.unroll.trajectory(prepared.theta(tasks_of(stream)), stream, firsts[-1])
            return [prepared.unroll.formed(phi) for k, phi in enumerate(trajectory) if k in firsts]

        parts = list(prepared.by_chunks(compute, stream))  # for each chunk of tasks, the weights at each window
        for first, *phi in zip(firsts, *parts, strict=True):
            yield first, [[torch.cat(tensors) for tensors in zip(*phi, strict=True)]]


def _chunks(stream: Any) -> PerStep:
    return stream if isinstance(stream, PerStep) else PerStep.split(stream)
