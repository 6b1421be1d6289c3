"""Few-shot images: five new glyphs, each from one drawing, by the network of four convolutions of the MAML paper.

python examples/glyphs.py
"""

import torch
from torch import nn

import metakern as mk

SIZE, WAYS = 16, 5
Batch = tuple[torch.Tensor, torch.Tensor]


def glyphs(number: int) -> torch.Tensor:
    """Return the corners `[number, 5, 2]` of random glyphs, in [0, 1]. A glyph is the line through its corners."""
    return 0.15 + 0.7 * torch.rand(number, 5, 2)


def drawn(corners: torch.Tensor) -> torch.Tensor:
    """Return images `[..., 1, SIZE, SIZE]` of glyphs `[..., 5, 2]`, drawn by an unsteady hand."""
    corners = corners + 0.03 * torch.randn_like(corners) + 0.05 * torch.randn(*corners.shape[:-2], 1, 2)
    along = torch.linspace(0, 1, 8).view(-1, 1)
    points = (corners[..., :-1, None, :] * (1 - along) + corners[..., 1:, None, :] * along).flatten(-3, -2)
    grid = torch.cartesian_prod(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE))
    ink = (-(torch.cdist(points, grid).amin(-2) / 0.05).square()).exp()
    return ink.unflatten(-1, (1, SIZE, SIZE))


def tasks(number: int, pool: torch.Tensor, shots: int = 1) -> tuple[Batch, Batch]:
    """Return support and query of tasks of WAYS glyphs of the pool, with `shots` drawings of each."""
    chosen = torch.stack([pool[torch.randperm(len(pool))[:WAYS]] for _ in range(number)])
    labels = torch.arange(WAYS).repeat(shots).expand(number, -1)
    first, second = (drawn(chosen.repeat(1, shots, 1, 1)) for _ in range(2))
    return (first, labels), (second, labels)


def network(filters: int = 16) -> nn.Module:
    layers = [nn.Conv2d(inputs, filters, 3, stride=2, padding=1) for inputs in (1, filters, filters, filters)]
    blocks = (nn.Sequential(layer, nn.BatchNorm2d(filters), nn.ReLU()) for layer in layers)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(filters, WAYS))


def main(outer_steps: int = 150) -> None:
    torch.manual_seed(0)
    train, new = glyphs(200), glyphs(50)
    maml = mk.MAML(network(), mk.losses.classification, mk.optim.SGD(lr=0.3, learn_lr=True, per="parameter"), steps=3)
    optimizer, test = torch.optim.Adam(maml.parameters(), lr=3e-3), tasks(50, new, shots=3)
    for step in range(outer_steps + 1):
        if step % 50 == 0:
            losses = maml.evaluate(*test, steps=(0, 1, 3)).mean(1)
            print(f"step {step}: loss of new glyphs after 0, 1, 3 inner steps", *(f"{x:.3f}" for x in losses.tolist()))
        optimizer.zero_grad()
        maml(*tasks(8, train)).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
