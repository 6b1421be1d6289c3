"""Inner rates: a task that the chosen ones are too high for takes lower ones."""

import pytest
import torch

import metakern as mk
from metakern.dialogue import rates

SCALES = torch.tensor([1.0, 1.0, 2.0])  # a step of 0.6 diminishes the error where the curvature is 2, not where it is 8


class Lines:
    """Three tasks: to fit y = x w at one x, of which the last has the larger one."""

    def evaluation(self, limit=None, share=lambda count: slice(None)):
        x = SCALES.view(3, 1, 1)
        yield (["a", "b", "c"], {"x": x, "y": x * 3}, {"x": x, "y": x * 4})


@pytest.fixture
def maml():
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    return mk.MAML(
        model, lambda model, batch: ((model(batch["x"]) - batch["y"]) ** 2).mean(), inner=mk.optim.SGD(lr=0.06), steps=2
    )


def test_a_task_whose_support_gets_worse_takes_lower_rates(maml):
    losses, lowered = rates.at_factors(maml, [1.0, 10.0, 10.0], Lines(), (0, 1, 4))
    assert lowered.tolist() == [[False] * 3, [False, False, True], [False, False, True]]
    ((_, support, query),) = Lines().evaluation()
    for row, task, factor in ((1, 0, 10.0), (2, 1, 10.0), (1, 2, 10.0 * rates.LOWER), (2, 2, 10.0 * rates.LOWER)):
        with rates.scaled(maml, factor):
            alone = maml.evaluate(support, query, steps=(1, 4))[row - 1, task]
        torch.testing.assert_close(losses[row, task], alone)
    # infinite at the higher rates; for the last task at the lower ones too
    assert rates.at_factors(maml, [2e7], Lines(), (3,))[1].tolist() == [[True, True, False]]


def test_the_adapted_parameters_are_those_of_each_task(maml):
    ((_, support, query),) = Lines().evaluation()
    phi = rates.adapted(maml, support, 4, 10.0)
    losses, _ = rates.at_factors(maml, [10.0], Lines(), (4,))
    torch.testing.assert_close(maml.evaluate(support, query, steps=(0,), start=phi), losses)
    assert rates.adapted(maml, support, 0, 10.0)["weight"].equal(maml.model.weight.detach().expand(3, 1, 1))
