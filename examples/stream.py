"""Continual learning: a model that goes on adapting along a stream whose sine wave drifts.

python examples/stream.py
"""

import torch
from torch import nn

import metakern as mk

CHUNKS = 12
Batch = tuple[torch.Tensor, torch.Tensor]


def streams(tasks: int, points: int = 10) -> Batch:
    """Return streams of CHUNKS chunks of points of a wave whose amplitude and phase drift, `[T, CHUNKS, points, 1]`."""

    def drift() -> torch.Tensor:
        return 0.3 * torch.randn(tasks, CHUNKS, 1, 1).cumsum(1) + 2 * torch.randn(tasks, 1, 1, 1)

    x = 6 * torch.rand(tasks, CHUNKS, points, 1) - 3
    return x, drift() * (x + drift()).sin()


def loss(model: nn.Module, chunk: Batch) -> torch.Tensor:
    """Return the mean squared error of a chunk."""
    x, y = chunk
    return (model(x) - y).square().mean()


def main(outer_steps: int = 400) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    streaming = mk.Streaming(model, loss, mk.optim.SGD(lr=0.02, learn_lr=True, per="parameter"))
    optimizer = torch.optim.Adam(streaming.parameters(), lr=2e-3)
    test = streams(200)
    for step in range(outer_steps + 1):
        if step % 200 == 0:
            errors = streaming.evaluate(test).mean(1)
            print(f"step {step}: error of chunks 1 to {CHUNKS}", *(f"{x:.2f}" for x in errors.tolist()))
        optimizer.zero_grad()
        streaming(streams(16)).backward()
        nn.utils.clip_grad_norm_(streaming.parameters(), 10.0)
        optimizer.step()


if __name__ == "__main__":
    main()
