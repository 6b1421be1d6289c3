"""The doctor: it finds the problem of every lossy model and none in honest ones, its costs are right, and it changes
nothing.
"""

import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import zoo
from torch import nn

import metakern as mk
from metakern import native
from metakern.diagnosis import Problem, costs, places
from metakern.dialogue.models import build_model
from metakern.meta.parameters import Parameters

INNER = {"inner": mk.optim.SGD(lr=0.3), "steps": 2}


def examine(case, **options):
    return mk.doctor(case.model, case.loss, case.support, case.query, **INNER | case.options | options)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", zoo.LOSSY)
def test_the_problem_of_every_lossy_model_is_found(name):
    make, kind, op = zoo.LOSSY[name]
    if name in ("vmap_of_a_layer_norm", "solve", "distances") and right_in_this_pytorch(make().model[2]):
        pytest.skip("this PyTorch has repaired it")
    if name == "triton_kernel":
        pytest.importorskip("triton")
    if name == "pybind_kernel" and native.obstacle():
        pytest.skip(native.obstacle())
    report = examine(make())
    (problem,) = report.problems
    assert not report.exact
    assert problem.kind == kind
    assert op in problem.op
    assert problem.path.startswith("(loss)" if name == "weighted_loss" else "2")
    surrogate = kind in (
        "straight-through",
        "surrogate gradient",
        "stop-gradient",
        "in-place write",
        "no first derivative",
    )
    assert problem.order == (1 if surrogate and name not in ("detaching_hook", "reentrant_checkpoint") else 2)
    if kind == "forward-mode rule":
        assert "Reverse over reverse, which mk.MAML will use, it is exact." in str(report)
    elif report.error is not None:
        assert problem.cost == report.error > 1e-6
    assert {problem.kind, problem.op} <= set(re.split(r": |\n", re.sub(r"\d+  ", "", str(report))))


def right_in_this_pytorch(module):
    """Return whether both modes of the second order equal differences: PyTorch may have repaired its fault."""
    z = [torch.randn(5, 6).double(), *module.parameters()]
    u = [torch.randn_like(t) for t in z]

    def gradient(z, **options):
        value = torch.func.functional_call(module, dict(zip(dict(module.named_parameters()), z[1:], strict=True)), z[0])
        return torch.autograd.grad(value.sin().sum(), z, **options)

    def moved(h):
        return gradient([(t.detach() + h * d).requires_grad_() for t, d in zip(z, u, strict=True)])

    truth = [(a - b) / 2e-6 for a, b in zip(moved(1e-6), moved(-1e-6), strict=True)]
    leaves = [t.detach().clone().requires_grad_() for t in z]
    try:
        reverse = torch.autograd.grad(gradient(leaves, create_graph=True), leaves, u)
    except RuntimeError:  # PyTorch has no second derivative of it
        return False
    with forward_ad.dual_level():
        try:
            tangents = gradient([forward_ad.make_dual(t, d) for t, d in zip(leaves, u, strict=True)])
            forward = [forward_ad.unpack_dual(t).tangent for t in tangents]
        except NotImplementedError:
            forward = truth
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        for got in (reverse, forward)
        for a, b in zip(got, truth, strict=True)
    )


@pytest.mark.parametrize("name", zoo.HONEST)
def test_no_problem_is_found_in_honest_models(name):
    report = examine(zoo.HONEST[name]())
    assert report.exact
    assert report.problems == []
    if report.plan:
        assert report.error < 1e-8
        assert report.kept == pytest.approx(1)
    assert "is exact" in str(report)


def meta_gradient(case, first_order=False):
    """Return the meta-gradient of the first task by plain autograd, as one vector."""
    support, query = ([t[0] for t in batch] for batch in (case.support, case.query))
    theta = dict(case.model.named_parameters())

    def at(values, batch):
        return zoo.squared(lambda x: torch.func.functional_call(case.model, values, (x,)), batch)

    phi = theta
    for _ in range(2):
        grads = torch.autograd.grad(at(phi, support), list(phi.values()), create_graph=not first_order)
        phi = {name: p - 0.3 * g for (name, p), g in zip(phi.items(), grads, strict=True)}
    return torch.cat([g.flatten() for g in torch.autograd.grad(at(phi, query), list(theta.values()))])


def test_costs_are_those_of_plain_autograd():
    case = zoo.LOSSY["numpy_kernel"][0]()
    report = examine(case)
    found, first = meta_gradient(case), meta_gradient(case, first_order=True)
    case.model[2].function = zoo.ExactCube.apply
    truth = meta_gradient(case)
    assert report.error == pytest.approx(((found - truth).norm() / truth.norm()).item(), rel=1e-5)
    assert report.first_order_error == pytest.approx(((first - truth).norm() / truth.norm()).item(), rel=1e-5)
    second = truth - first
    assert report.kept == pytest.approx(((found - first) @ second / second.square().sum()).item(), rel=1e-5)


class Mixed(nn.Module):
    """Problems in three submodules, and one in the forward of the model itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), zoo.Act(zoo.NumpyCube.apply)) for _ in range(2))
        self.through = zoo.Act(zoo.SignThrough.apply)
        self.mixing, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        x = x + 0.1 * self.through(self.mixing(x))
        return self.head(x) * x.mean(-1, keepdim=True).detach()


def test_every_problem_is_reported_with_its_module():
    case = zoo.case()._replace(model=Mixed().double())
    report = examine(case)
    assert [(p.path, p.kind) for p in report.problems] == [
        ("blocks.0.1", "opaque backward"),
        ("blocks.1.1", "opaque backward"),
        ("through", "straight-through"),
        ("", "stop-gradient"),
    ]
    costs = [problem.cost for problem in report.problems]
    assert costs[2] is None
    assert costs[0] == costs[1] > 1e-3
    assert costs[3] > 1e-3
    assert "4 places, second-order terms are lost at 2" in str(report)
    assert "blocks.0.1, blocks.1.1" in str(report)


class Twice(nn.Module):
    """A problem of the function and a `detach` in one forward."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x) * x.sigmoid().detach()


def test_a_problem_in_the_query_alone_is_found():
    def loss(model, batch):
        y = model(batch[0])
        return ((y - batch[1]) ** 2 * (y.detach().exp() if len(y) == 3 else 1)).mean()

    case = zoo.case(loss=loss)
    assert examine(case).exact
    (problem,) = examine(case._replace(query=[t[:, :3] for t in case.query])).problems
    assert (problem.path, problem.kind, problem.order) == ("(loss)", "stop-gradient", 1)


def test_two_problems_in_one_forward_are_found():
    report = examine(zoo.case(Twice(zoo.NumpyCube.apply)))
    assert [(p.path, p.kind) for p in report.problems] == [("2", "opaque backward"), ("2", "stop-gradient")]
    centers = torch.randn(6, 6).double()
    report = examine(zoo.case(Twice(lambda x: torch.cdist(x, centers))))
    right = right_in_this_pytorch(zoo.Act(lambda x: torch.cdist(x, centers)))  # since 2.15
    cdist = [] if right else [("no second derivative", "_cdist_backward")]
    assert [(p.kind, p.op.split()[0]) for p in report.problems] == [("stop-gradient", "detach"), *cdist]


def test_each_of_several_problems_has_its_own_cost():
    case = zoo.case(zoo.Act(zoo.NumpyCube.apply), nn.Linear(6, 6), zoo.Act(zoo.NativeGelu.apply))
    report = examine(case)
    alone = {}
    for place, exact in ((4, torch.nn.GELU("tanh")), (2, zoo.Act(zoo.ExactCube.apply))):
        kept = case.model[place]
        case.model[place] = exact
        alone[{2: "NativeGelu", 4: "NumpyCube"}[place]] = examine(case).error
        case.model[place] = kept
    assert {p.op: p.cost for p in report.problems} == pytest.approx(alone, rel=1e-4)


class InFloat32(zoo.SavesInput):
    """A Function that takes float32 alone, as many kernels do."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return zoo.SavesInput.forward(ctx, x)


class ExactInFloat32(InFloat32):
    backward = zoo.ExactCube.backward


class LossyInFloat32(InFloat32):
    backward = zoo.NumpyCube.backward


@pytest.mark.parametrize(("function", "exact"), [(ExactInFloat32, True), (LossyInFloat32, False)])
def test_models_that_take_float32_alone_are_judged_in_float32(function, exact):
    case = zoo.case(zoo.Act(function.apply))
    case = case._replace(model=case.model.float())
    case = case._replace(support=[t.float() for t in case.support], query=[t.float() for t in case.query])
    report = examine(case)
    assert report.dtype == "float32"
    assert report.exact == exact
    assert [p.op for p in report.problems] == ([] if exact else ["LossyInFloat32"])


def test_float32_within_a_float64_model_is_no_problem():
    """Finite differences are noisy there, which must not be taken for a lost derivative."""
    rounding = zoo.Act(lambda x: x.type(torch.float32).sin().double())
    assert examine(zoo.case(rounding)).exact


@pytest.mark.parametrize(
    "name", ["counters_and_noise", "dropout", "lstm", "write_under_no_grad", "spectral_norm_in_training"]
)
def test_the_doctor_changes_nothing(name):
    case = zoo.HONEST[name]() if name in zoo.HONEST else zoo.LOSSY[name][0]()
    case.model[0].weight.grad = torch.ones_like(case.model[0].weight)
    state = {key: value.clone() for key, value in case.model.state_dict().items()}
    attributes = {path: dict(vars(module)) for path, module in case.model.named_modules()}
    batches = [t.clone() for t in (*case.support, *case.query)]
    methods = dict(vars(torch.Tensor))
    enter = torch.no_grad.__enter__
    np.random.seed(1)
    random.seed(2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with torch.no_grad():
        examine(case)
        assert not torch.is_grad_enabled()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(states[2], np.random.get_state(), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in case.model.state_dict().items())
    for path, module in case.model.named_modules():
        assert {key: id(value) for key, value in vars(module).items()} == {
            key: id(value) for key, value in attributes[path].items()
        }
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert [p.grad is not None for p in case.model.parameters()].count(True) == 1
    assert all(torch.equal(a, b) for a, b in zip((*case.support, *case.query), batches, strict=True))
    assert dict(vars(torch.Tensor)) == methods
    assert torch.no_grad.__enter__ is enter
    assert torch.get_default_dtype() == torch.float32


def test_wrong_arguments_are_errors_of_one_line():
    case = zoo.case()

    def complaint(**changes):
        changed = case._replace(**changes)
        with pytest.raises(ValueError) as error:
            examine(changed)
        assert "\n" not in str(error.value)
        return str(error.value)

    x, y = case.support
    assert complaint(loss=lambda m, b: m(b[0])) == (
        "doctor: loss must return a scalar tensor for one task, got [5, 3] of torch.float64"
    )
    assert complaint(loss=lambda m, b: 1.0) == "doctor: loss must return a scalar tensor for one task, got float"
    nan = complaint(loss=lambda m, b: m(b[0]).sum() * torch.nan)
    assert nan == "doctor: loss must be finite on the first task of support, got nan"
    assert complaint(model=nn.Tanh()) == "doctor: model must have trainable parameters, got none"
    assert complaint(query=(x[:1], y[:1])) == "doctor: query must have the 2 tasks of support, got 1"
    assert complaint(support=(x[:1], y)) == (
        "doctor: support must have one number of tasks along dimension 0, got [1, 2]: use in the loss what all tasks "
        "share, or expand it to [T, ...]"
    )
    assert complaint(options={"steps": -1}) == "doctor: steps must be an integer of at least 0, got -1"
    assert complaint(options={"steps": True}) == "doctor: steps must be an integer of at least 0, got True"
    with pytest.raises(TypeError, match=r"doctor: inner must be one of mk.optim's, got int"):
        examine(case._replace(options={"inner": 3}))
    assert complaint(options={"adapt": ["missing"]}).startswith("doctor: adapt must match a parameter's name")
    other = nn.Linear(6, 3).double()
    assert complaint(loss=lambda m, b: other(b[0]).sum()) == (
        "doctor: loss must depend on the model's parameters, got one that does not"
    )
    drawn = random.SystemRandom()
    assert complaint(loss=lambda m, b: m(b[0]).sum() * drawn.random()) == (
        "doctor: loss must be the same for the same parameters and random state, got one that changes from call to "
        "call: draw random numbers by torch, random or numpy.random"
    )
    assert complaint(loss=lambda m, b: m(b[0][:, 1:]).sum()).startswith(
        "doctor: loss must run on a task of support, got "
    )
    with pytest.raises(TypeError, match=r"doctor: model must be an nn\.Module, got int"):
        mk.doctor(3, case.loss, case.support, case.query)
    with pytest.raises(TypeError, match=r"doctor: loss must be a function of \(model, batch\), got int"):
        mk.doctor(case.model, 3, case.support, case.query)


def test_the_printed_report():
    page = str(examine(zoo.LOSSY["numpy_kernel"][0]()))
    assert page.splitlines()[:4] == [
        "The meta-gradient is NOT exact: 1 place, second-order terms are lost at 1.",
        "",
        "1  opaque backward: NumpyCube",
        "   where       2",
    ]
    assert max(map(len, page.splitlines())) <= 100
    for word in ("kept", "of the second-order part", "batching", "memory", "one task, float64"):
        assert word in page


@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_the_expected_memory_is_near_the_allocated_memory(strategy):
    """It must be within a factor of 1.5 of the peak that the profiler counts."""
    model = build_model("gpt", 50, width=32, heads=2, layers=2, max_length=16)
    batch = {"input_ids": torch.randint(50, (3, 4, 16))}
    batch["labels"] = batch["input_ids"]
    maml = mk.MAML(model, mk.losses.causal_lm, steps=3, strategy=strategy)
    maml(batch, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        maml(batch, batch).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    expected = sys.modules["metakern.diagnosis"]._peak(maml.plan, Parameters(model), 3, 3)
    assert max(used) / 1.5 < expected < max(used) * 1.5


@pytest.mark.parametrize("name", ["numpy_kernel", "between_modules", "relu"])
def test_it_calls_the_loss_no_more_often_than_twenty_meta_steps(name):
    """A meta-step of 2 tasks and 5 inner steps calls the loss of a task 2 * (5 + 1) times."""
    counted = [0]
    case = zoo.HONEST[name]() if name in zoo.HONEST else zoo.LOSSY[name][0]()

    def loss(model, batch):
        counted[0] += 1
        return case.loss(model, batch)

    examine(case._replace(loss=loss, options={"steps": 5}))
    assert counted[0] <= 20 * 2 * (5 + 1)


def test_repaired_modules_are_exact():
    """A module that is repaired by differences of its gradient: with parameters, two inputs and a recurrent layer."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 6, batch_first=True)

        def forward(self, x, scale=1.0):
            return {"y": self.rnn(x.unsqueeze(0))[0].squeeze(0) * scale, "n": 3}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = Cell(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.cell(x, scale=x.sin())["y"])

    case = zoo.case()
    case = case._replace(model=Model().double())
    patient = places.treat(case.model, case.loss, [t[0] for t in case.support], [t[0] for t in case.query], None)
    found = costs.Costs(patient, **INNER)
    problem = Problem("cell", "", "", "", "")
    truth, repaired = found.store(), found.store([problem])
    assert costs.distance(truth, repaired) < 1e-7 * costs.norm(truth)
    assert costs.distance(truth, found.truth()) < 1e-7 * costs.norm(truth)
