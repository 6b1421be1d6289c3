"""Meta-reinforcement learning: a point learns to walk to an unknown goal from a few of its own walks.

python examples/navigation.py

Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks", section 5.3. As there,
the query walks are taken by the adapted policy, and how the support walks depend on theta is left out of the gradient.
"""

import torch
from torch import nn
from torch.func import functional_call, vmap

import metakern as mk

WALKS, LENGTH, NOISE, GOALS = 20, 15, 0.3, 20
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def walks(policy: nn.Module, phi: dict[str, torch.Tensor], goals: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """Walk to `goals` `[T, 2]` by one policy a task; return a batch (positions, steps, advantages) and the returns."""
    position, places, moves, rewards = torch.zeros(len(goals), WALKS, 2), [], [], []
    with torch.no_grad():
        for _ in range(LENGTH):
            mean = vmap(lambda phi, x: functional_call(policy, phi, x))(phi, position)
            move = mean + NOISE * torch.randn_like(mean)
            places.append(position), moves.append(move)
            position = position + move.clamp(-0.3, 0.3)
            rewards.append(-(position - goals.unsqueeze(1)).norm(dim=-1))
    to_go = torch.stack(rewards, 2).flip(2).cumsum(2).flip(2)  # [T, WALKS, LENGTH]
    advantages = (to_go - to_go.mean(1, keepdim=True)) / to_go.std((1, 2), keepdim=True)
    return (torch.stack(places, 2), torch.stack(moves, 2), advantages), torch.stack(rewards).sum(0).mean(1)


def loss(policy: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the loss of one task whose gradient is the policy gradient (REINFORCE)."""
    positions, moves, advantages = batch
    log_likelihood = -(moves - policy(positions)).square().sum(-1) / (2 * NOISE**2)
    return -(log_likelihood * advantages).mean()


def main(outer_steps: int = 150) -> None:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    maml = mk.MAML(policy, loss, mk.optim.SGD(lr=0.05, learn_lr=True), steps=1)
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    for step in range(outer_steps + 1):
        goals = torch.rand(GOALS, 2) - 0.5
        theta = {name: p.detach().expand(GOALS, *p.shape) for name, p in policy.named_parameters()}
        support, before = walks(policy, theta, goals)
        query, after = walks(policy, maml.adapt(support), goals)
        if step % 50 == 0:
            print(f"step {step}: return {before.mean():.2f} before, {after.mean():.2f} after one inner step")
        optimizer.zero_grad()
        maml(support, query).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
