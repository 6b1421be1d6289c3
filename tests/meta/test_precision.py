"""The option precision="bfloat16": how far its meta-gradients are from exact ones, and where it is refused."""

from __future__ import annotations

import copy
import threading
import types
from typing import Any

import pytest
import torch
from models import (
    Recurrent,
    TinyGPT,
    V,
    gradients,
    mlp,
    plain_loss,
    points,
    regression_loss,
    sgd,
    tokens,
    tokens_loss,
)
from torch import Tensor, nn

import metakern as mk
from metakern import native
from metakern.meta import capture

pytestmark = pytest.mark.skipif(native.C is None, reason="needs the C++ kernels")


def adapters() -> nn.Module:
    model = TinyGPT()
    mk.lora(model, rank=2, targets=["encoder.linear1", "encoder.linear2"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.3)
    return model


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "mlp": (mlp, regression_loss, points),
    "gpt": (TinyGPT, tokens_loss, tokens),
    "lstm": (lambda: Recurrent(nn.LSTM), tokens_loss, tokens),
    "mk-gru": (lambda: Recurrent(mk.nn.GRU), tokens_loss, tokens),
    "lora": (adapters, tokens_loss, tokens),
}


def build(name: str) -> tuple[nn.Module, Any, Any, Any]:
    """Return a model in float32, its loss, support and query."""
    make, loss, batch = MODELS[name]
    torch.manual_seed(1)
    support, query = (torch.utils._pytree.tree_map(in_float32, batch(i)) for i in (1, 2))
    return make(), loss, support, query


def in_float32(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


def in_float64(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def vector(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].double().flatten() for name in sorted(found)])


def cosine(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return torch.cosine_similarity(vector(found), vector(truth), dim=0).item()


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return ((vector(found) - vector(truth)).norm() / vector(truth).norm()).item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("batching", ["fold", "loop"])
def test_meta_gradients_are_near_those_in_float64(name: str, strategy: str, batching: str) -> None:
    model, loss, support, query = build(name)
    exact, data = copy.deepcopy(model).double(), [torch.utils._pytree.tree_map(in_float64, b) for b in (support, query)]
    truth = gradients(exact, plain_loss(exact, loss, *data, 2, sgd(0.3)))
    first = gradients(exact, plain_loss(exact, loss, *data, 2, sgd(0.3), first_order=True))
    options = {"inner": mk.optim.SGD(lr=0.3), "steps": 2, "strategy": strategy, "batching": batching, "capture": False}
    single = gradients(model, mk.MAML(model, loss, **options)(support, query))
    found = gradients(model, mk.MAML(model, loss, **options, precision="bfloat16")(support, query))
    assert cosine(found, truth) > 0.999
    assert 1e-4 < distance(found, truth) < 0.03
    assert distance(single, truth) < 1e-5
    assert distance(found, truth) < distance(first, truth) / 2  # second order is there


class Decoder(nn.Module):
    """One layer of a language model, of modules and ops that have Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(V, 8), mk.nn.RMSNorm(8)
        self.qkv, self.out, self.head = mk.nn.Linear(8, 24), mk.nn.Linear(8, 8), mk.nn.Linear(8, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-2, -3)
        return self.head(x + self.out(mk.ops.attention(*qkv).transpose(-2, -3).flatten(-2)))


def test_a_gpus_kernels_under_autocast_are_near_float64(launched: list[str]) -> None:
    """What a GPU computes in bfloat16, by the interpreter; weights, updates, losses and gradients stay float32."""
    torch.manual_seed(1)
    model, batches = Decoder(), [{name: t[:2, :1, -4:] for name, t in tokens(i).items()} for i in (1, 2)]
    exact = copy.deepcopy(model).double()
    truth = gradients(exact, plain_loss(exact, tokens_loss, *batches, 1, sgd(0.3)))
    maml = mk.MAML(model, tokens_loss, inner=mk.optim.SGD(lr=0.3), steps=1, capture=False)
    with torch.autocast("cpu", torch.bfloat16):
        maml(*batches)  # verifies the plan, by other kernels
        with mk.backend("triton"):
            found = gradients(model, maml(*batches))
            adapted = maml.adapt(batches[0])
    assert {f"_{name}_kernel" for name in ("products", "rows", "vjp", "queries", "keys")} <= set(launched)
    assert {t.dtype for t in (*found.values(), *adapted.values(), maml.query_losses)} == {torch.float32}
    assert 1e-4 < distance(found, truth) < 0.03
    assert cosine(found, truth) > 0.999


@pytest.mark.parametrize("name", MODELS)
def test_programs_are_checked_in_float32_and_run_in_bfloat16(name: str) -> None:
    model, loss, support, query = build(name)
    options = {"inner": mk.optim.SGD(lr=0.3), "steps": 2, "precision": "bfloat16"}
    ordinary, captured = (mk.MAML(model, loss, capture=c, **options) for c in (False, True))
    truth = gradients(model, ordinary(support, query))
    single = gradients(model, mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 2, capture=False)(support, query))
    found = [gradients(model, captured(support, query)) for _ in range(5)]  # recorded, checked, run, audited
    captures = captured._engine.last.captures(True, "bfloat16")
    assert not captures.reasons
    assert any(program.checked for program in captures._programs.values())
    for result in found:
        assert torch.equal(vector(result), vector(found[0]))
        assert cosine(result, truth) > 0.999
        assert distance(result, single) > 1e-4  # the products were rounded


def test_programs_that_python_runs_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, support, query = build("gpt")
    monkeypatch.setattr(capture.Captures, "_lowered", lambda self, program, inputs: None)
    single, found = (
        gradients(model, mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 2, capture=True, precision=p)(support, query))
        for p in (None, "bfloat16")
    )
    assert cosine(found, single) > 0.999
    assert distance(found, single) > 1e-4


def test_audits_find_stale_programs() -> None:
    model, _, support, query = build("mlp")
    hidden = {"__name__": "torch.of_a_test"}  # guards take the globals of modules of PyTorch for constants
    exec("FACTOR = 1.0\ndef factor(): return FACTOR", hidden)
    functions = types.SimpleNamespace(factor=hidden["factor"])

    def loss(model: Any, batch: Any) -> Tensor:
        return regression_loss(model, batch) * functions.factor()

    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.1), 2, capture=True, precision="bfloat16")
    maml(support, query)
    programs = maml._engine.last.captures(True, "bfloat16")._programs
    while max(program.uses for program in programs.values()) < capture.FIRST_AUDIT - 1:
        maml(support, query)
    hidden["FACTOR"] = 1.01
    with pytest.raises(capture.StaleCaptureError, match="the query losses differs by"):
        maml(support, query)


def test_the_option_can_be_switched_between_calls() -> None:
    model, loss, support, query = build("gpt")
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 2, capture=True)
    found: dict[str | None, list[Tensor]] = {None: [], "bfloat16": []}
    for _ in range(3):
        for maml.precision, results in found.items():
            results.append(vector(gradients(model, maml(support, query))))
    for results in found.values():
        assert torch.equal(results[1], results[0])
        assert torch.equal(results[2], results[0])
    assert not torch.equal(found[None][0], found["bfloat16"][0])


@pytest.mark.filterwarnings("ignore")  # which warnings are errors is state of the process, not of a thread
def test_threads_have_their_own_precision() -> None:
    model, loss, support, query = build("gpt")
    mamls = {
        p: mk.MAML(copy.deepcopy(model), loss, mk.optim.SGD(lr=0.3), 2, capture=True, precision=p)
        for p in (None, "bfloat16")
    }
    alone = {p: vector(gradients(maml.model, maml(support, query))) for p, maml in mamls.items()}
    together: dict[str | None, list[Tensor]] = {p: [] for p in mamls}

    def work(p: str | None) -> None:
        for _ in range(5):
            together[p].append(vector(gradients(mamls[p].model, mamls[p](support, query))))

    threads = [threading.Thread(target=work, args=(p,)) for p in mamls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for p, results in together.items():
        assert len(results) == 5
        assert all(torch.equal(result, alone[p]) for result in results)


def test_adapting_and_evaluating_obey() -> None:
    model, loss, support, query = build("mlp")
    single, maml = (mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 2, precision=p) for p in (None, "bfloat16"))
    phi, truth = maml.adapt(support), single.adapt(support)
    assert cosine(phi, truth) > 0.9999
    assert distance(phi, truth) > 1e-6
    assert all(p.dtype == torch.float32 for p in phi.values())
    curve, exact = (m.evaluate(support, query, (0, 1, 2)) for m in (maml, single))
    torch.testing.assert_close(curve, exact, rtol=0.02, atol=0)
    assert not torch.equal(curve[0], exact[0])
    with torch.no_grad():
        assert torch.equal(maml(support, query), curve[2].mean())


def test_the_plan_says_it() -> None:
    model, loss, support, query = build("mlp")
    for precision in (None, "bfloat16"):
        maml = mk.MAML(model, loss, precision=precision)
        maml(support, query)
        assert ("precision bfloat16" in str(maml.plan)) == (precision is not None)
        assert "equals plain autograd" in str(maml.plan)


ALGORITHMS = [mk.MAML, mk.FOMAML, mk.ANIL, mk.MetaSGD, mk.Reptile]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_takes_it(algorithm: Any) -> None:
    model, loss, support, query = build("mlp")
    single, found = (
        gradients(model, algorithm(model, loss, steps=2, capture=False, precision=p)(support, query))
        for p in (None, "bfloat16")
    )
    assert cosine(found, single) > 0.999
    assert distance(found, single) > 1e-6
    with pytest.raises(ValueError, match=r"^MAML: precision must be None or \"bfloat16\", got 'float16'$"):
        algorithm(model, loss, precision="float16")


def test_what_it_cannot_serve_is_refused() -> None:
    model, loss, support, query = build("mlp")
    maml = mk.MAML(model, loss, precision="bfloat16")
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"^MAML: precision must be None inside torch.autocast"):
        maml(support, query)
    model.double()
    with pytest.raises(
        ValueError, match=r"^MAML: precision must be None for parameters of torch.float64, got .*float32"
    ):
        maml.adapt(support)
    model.to("meta")
    with pytest.raises(ValueError, match=r"^MAML: precision must be None for a model on meta, got .*torch.autocast"):
        maml.evaluate(support, query)


def test_it_needs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "C", None)
    with pytest.raises(RuntimeError, match=r"^MAML: precision must be None without the C\+\+ kernels: "):
        mk.MAML(mlp(), regression_loss, precision="bfloat16")
