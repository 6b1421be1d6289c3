"""Check an installed wheel without a compiler: metakern imports, and a meta-gradient is exact. `make smoke` runs it."""

from importlib.metadata import files

import torch

import metakern as mk


def main() -> None:
    names = [str(path) for path in files("metakern") or ()]
    assert {"metakern/py.typed", "metakern/ops/core/rules.py", "metakern/dialogue/bots/kinds.txt"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc"))]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    parameters = dict(model.named_parameters())
    support, query = (
        (torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 2, dtype=torch.float64)) for _ in "sq"
    )

    def loss(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (module(batch[0]) - batch[1]).square().mean()

    mk.MAML(model, loss, inner=mk.optim.SGD(lr=0.1), steps=1)(support, query).backward()

    def plain(task: int) -> torch.Tensor:
        def at(phi: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (torch.func.functional_call(model, phi, (x[task],)) - y[task]).square().mean()

        gradients = torch.autograd.grad(at(parameters, *support), list(parameters.values()), create_graph=True)
        phi = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        return at(phi, *query)

    expected = torch.autograd.grad((plain(0) + plain(1)) / 2, list(parameters.values()))
    for p, g in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
    print("metakern", mk.__version__, mk.backends())


if __name__ == "__main__":
    main()
