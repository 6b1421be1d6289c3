"""LoRA of whole models: exact meta-gradients, the choice of layers, merging and removal, and files."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import T, assert_equal, gradients, hugging_face, plain_loss, regression_loss, sgd, tokens, tokens_loss
from storages import Storages
from torch import Tensor, nn

import metakern as mk
from metakern.adapters.lora import matrix
from metakern.errors import CheckpointError
from metakern.nn import LoraLinear

ARCHITECTURES = ["gpt2", "llama"]


class Plain(LoraLinear):
    """The same layer by plain operations, for plain autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            x @ matrix(self).mT
            + (0 if self.bias is None else self.bias)
            + self.scale * (x @ self.lora_A.mT) @ self.lora_B.mT
        )


def plainly(model: nn.Module) -> nn.Module:
    """Return a copy of a model with `Plain` layers."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = Plain
    return twin


def started(model: nn.Module) -> nn.Module:
    """Make B random and return the model: B is zero at first, where half of all terms vanish."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = hugging_face(name).double()
    mk.lora(model, rank=2, alpha=3, seed=2, **options)
    return started(model)


def two_layers(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    mk.lora(model, rank=2, seed=2, **options)
    return started(model)


def points(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(T, 4, size, generator=make, dtype=torch.float64) for size in (5, 3))
    return x, y


TRAINABLE = {"gpt2": ("ln_1", "attn.*.bias", "wpe"), "llama": ("*norm*",)}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_meta_gradients_equal_plain_autograd(name: str, trained: bool, steps: int) -> None:
    """With the factors alone, and with norms, embeddings and biases of adapted layers that are trained too."""
    model = adapted(name, trainable=TRAINABLE[name] if trained else ())
    twin, support, query = plainly(model), tokens(1), tokens(2)
    value = plain_loss(twin, tokens_loss, support, query, steps, sgd(0.3))
    truth = gradients(twin, value)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(truth) == expected
    assert any(name.endswith(".bias") for name in expected) == (trained and name == "gpt2")
    first_order = gradients(twin, plain_loss(twin, tokens_loss, support, query, steps, sgd(0.3), first_order=True))
    assert max((first_order[n] - truth[n]).norm() / truth[n].norm() for n in truth) > 1e-3
    batchings = ("fold", "vmap", "loop") if steps == 1 else ("fold",)
    for batching in batchings:
        for strategy in ("store", "recompute"):
            options = {"batching": batching, "strategy": strategy, "task_chunk": 2}
            maml = mk.MAML(model, tokens_loss, mk.optim.SGD(lr=0.3), steps, **options)
            ours = maml(support, query)
            torch.testing.assert_close(ours, value.detach(), rtol=1e-12, atol=1e-12)
            assert_equal(gradients(model, ours), truth)


def test_the_engine_folds_a_layer_by_its_op_without_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, shapes = adapted("llama"), tokens(1), set()
    call = mk.ops.lora_linear

    def record(x: Tensor, weight: Tensor, A: Tensor, *rest: Any) -> Tensor:
        shapes.add((tuple(x.shape[:2]), weight.dim(), A.shape[0]))
        assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
        return call(x, weight, A, *rest)

    maml = mk.MAML(model, tokens_loss, steps=1, task_chunk=T)
    maml(batch, batch)
    monkeypatch.setattr(mk.ops, "lora_linear", record)
    maml(batch, batch)
    assert maml.plan.batching == "fold"
    assert shapes == {((T, 2), 2, T)}


@pytest.mark.parametrize("batching", ["fold", "vmap"])
@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_a_meta_step_holds_nothing_of_the_size_of_the_base(strategy: str, batching: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 20), nn.Linear(20, 40), nn.Linear(40, 3)).double()
    mk.lora(model, rank=1, targets=["1"])
    maml = mk.MAML(started(model), regression_loss, steps=2, strategy=strategy, batching=batching, task_chunk=T)
    maml(points(1), points(2))  # verifies the plan on copies of the model
    with Storages(model[1].weight) as found:
        gradients(model, maml(points(1), points(2)))
    assert T * 4 * 40 <= found.elements < 20 * 40


def test_one_factor_can_be_adapted_alone() -> None:
    """B is adapted to each task; A and a bias are learned by the outer loop alone."""
    model = two_layers(trainable=["3.bias"])
    twin, chosen = plainly(model), lambda name: name.endswith("lora_B")
    truth = gradients(twin, plain_loss(twin, regression_loss, points(1), points(2), 2, sgd(0.2), chosen))
    for batching in ("fold", "vmap", "loop"):
        maml = mk.MAML(model, regression_loss, mk.optim.SGD(0.2), 2, adapt=["*lora_B"], batching=batching)
        assert_equal(gradients(model, maml(points(1), points(2))), truth)
    assert set(maml.adapt(points(1))) == {"0.lora_B", "3.lora_B"}


def test_adapted_parameters_loaded_into_the_model_give_the_losses_of_their_task() -> None:
    model, support, query = adapted("gpt2"), tokens(1), tokens(2)
    maml = mk.MAML(model, tokens_loss, mk.optim.SGD(lr=0.3), steps=2)
    phi, curve = maml.adapt(support), maml.evaluate(support, query, (2,))[0]
    for t in range(T):
        twin = copy.deepcopy(model)
        missing, unexpected = twin.load_state_dict({name: p[t] for name, p in phi.items()}, strict=False)
        assert not unexpected
        assert not [name for name in missing if "lora" in name]
        batch = {name: value[t] for name, value in query.items()}
        torch.testing.assert_close(tokens_loss(twin, batch), curve[t], rtol=1e-12, atol=1e-12)
        mk.merge_lora(twin)
        torch.testing.assert_close(tokens_loss(twin, batch), curve[t], rtol=1e-12, atol=1e-12)


def test_dropout_applies_to_the_correction_alone() -> None:
    model = two_layers(dropout=0.5, alpha=3)
    x, first = points(1)[0], model[0]
    torch.manual_seed(3)
    y = first(x)
    torch.manual_seed(3)
    correction = 1.5 * F.dropout(x, 0.5) @ first.lora_A.mT @ first.lora_B.mT
    torch.testing.assert_close(y, F.linear(x, first.weight, first.bias) + correction)
    twin = plainly(model).eval()
    torch.testing.assert_close(model.eval()(x), twin(x))
    model.train()
    found = []
    for strategy in ("store", "recompute"):  # recompute draws the same masks again
        maml = mk.MAML(model, regression_loss, mk.optim.SGD(0.2), 2, strategy=strategy, task_chunk=T)
        torch.manual_seed(4)
        found.append(gradients(model, maml(points(1), points(2))))
        assert maml.plan.batching == "fold"
    assert_equal(*found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_freezes_the_base_and_can_be_removed_or_merged(name: str) -> None:
    torch.manual_seed(1)
    model, batch = hugging_face(name).double().eval(), tokens(1)["input_ids"][0]
    model.lm_head.weight.requires_grad_(False)
    before, flags = model(batch).logits, {n: p.requires_grad for n, p in model.named_parameters()}
    classes, state = [type(m) for m in model.modules()], {n: p.clone() for n, p in model.state_dict().items()}
    bookkeeping = {path: set(vars(m)) for path, m in model.named_modules()}
    names = mk.lora(model, rank=3)
    kinds = {"gpt2": ("c_attn", "c_proj", "c_fc"), "llama": ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")}
    assert {n.rpartition(".")[2] for n in names} >= set(kinds[name])
    assert [n for n, m in model.named_modules() if type(m) is LoraLinear] == names
    assert not [n for n in names if "lm_head" in n]
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    torch.testing.assert_close(model(batch).logits, before, rtol=1e-12, atol=1e-12)
    assert set(model.state_dict()) == set(state) | {f"{n}.{f}" for n in names for f in ("lora_A", "lora_B")}
    started(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(batch).logits, model(batch).logits)
        assert mk.remove_lora(twin) == names
        assert torch.equal(twin(batch).logits, before)
        assert [type(m) for m in twin.modules()] == classes
        assert {path: set(vars(m)) for path, m in twin.named_modules()} == bookkeeping
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == flags
        assert mk.lora(twin) == names
    changed = model(batch).logits
    assert not torch.allclose(changed, before)
    assert mk.merge_lora(model) == names
    torch.testing.assert_close(model(batch).logits, changed)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert set(model.state_dict()) == set(state)


def test_targets_and_trainable_are_patterns_of_consecutive_components() -> None:
    def names(*targets: str, **options: Any) -> list[str]:
        return mk.lora(hugging_face("llama"), targets=list(targets), **options)

    layer = "model.layers.{}.self_attn.{}".format
    assert names("q_proj", "v_proj") == [layer(i, p) for i in (0, 1) for p in ("q_proj", "v_proj")]
    assert names("layers.1.self_attn.?_proj") == [layer(1, p) for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert names("0.*attn") == [layer(0, p) for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert names("lm_head", "gate_proj")[-1] == "lm_head"
    assert mk.lora(hugging_face("llama"), targets=layer(0, "q_proj")) == [layer(0, "q_proj")]
    model = hugging_face("llama")
    mk.lora(model, targets=["q_proj"], trainable=["layers.1", "norm", "embed_tokens"][1:])
    learning = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert learning == {"model.norm.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patched_models_give_the_same_meta_gradients(name: str, patch_first: bool) -> None:
    torch.manual_seed(1)
    model, support, query = hugging_face(name).double(), tokens(1), tokens(2)
    if patch_first:
        mk.patch(model)
    mk.lora(model, rank=2, seed=2, trainable=TRAINABLE[name])
    twin = plainly(started(model))
    mk.unpatch(twin)
    report = mk.patch(model)
    assert "LoraLinear" not in str(report)
    truth = gradients(twin, plain_loss(twin, tokens_loss, support, query, 2, sgd(0.3)))
    maml = mk.MAML(model, tokens_loss, mk.optim.SGD(lr=0.3), steps=2, batching="fold")
    assert_equal(gradients(model, maml(support, query)), truth)


def test_lora_can_be_added_before_and_after_patching() -> None:
    """patch and unpatch change no output of a model with LoRA, and removal gives back torch.nn's layer."""
    for patch_first in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
        x = points(1)[0]
        if patch_first:
            mk.patch(model)
        mk.lora(model, rank=2, seed=2, targets=["0"])
        y = started(model)(x)
        mk.patch(model)
        assert [type(m) for m in model] == [LoraLinear, mk.nn.LayerNorm, mk.nn.Linear]
        torch.testing.assert_close(model(x), y)
        mk.unpatch(model)
        assert [type(m) for m in model] == [LoraLinear, nn.LayerNorm, nn.Linear]
        torch.testing.assert_close(model(x), y)
        mk.remove_lora(model)
        assert type(model[0]) is nn.Linear


def test_the_fast_path_of_torchs_encoder_does_not_ignore_lora() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).eval()
    mk.lora(layer, targets=["linear1", "linear2"])
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        before = layer(x)
        started(layer)
        for twin in (layer, copy.deepcopy(layer)):
            assert not torch.allclose(twin(x), before)
            torch.testing.assert_close(twin(x), twin.train()(x))
            twin.eval()


def test_dtypes_of_adapters() -> None:
    """The base's dtype, a wider one, and the dtype of autocast."""
    x = points(1)[0].bfloat16()
    model = nn.Sequential(nn.Linear(5, 3)).bfloat16()
    twin = copy.deepcopy(model)
    mk.lora(model, seed=1)
    mk.lora(twin, seed=1, dtype=torch.float32)
    assert (model[0].lora_A.dtype, twin[0].lora_A.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(started(twin)(x), started(model)(x))
    twin(x).sum().backward()
    assert twin[0].lora_A.grad.dtype == torch.float32
    merged, expected = copy.deepcopy(twin), twin[0].weight.float() + twin[0].lora_B @ twin[0].lora_A
    mk.merge_lora(merged)
    assert torch.equal(merged[0].weight, expected.bfloat16())
    with pytest.raises(TypeError, match="lora_linear: weight must have the dtype"):
        model(x.float())
    wide = nn.Sequential(nn.Linear(5, 3))
    mk.lora(wide)
    wide[0].bias.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = started(wide)(x.float())
        torch.testing.assert_close(y, plainly(wide)(x.float()), rtol=0.02, atol=0.02, check_dtype=False)
    assert y.dtype == torch.bfloat16


def test_a_single_layer_and_its_initialization() -> None:
    layer = LoraLinear(5, 3, bias=False, rank=2, alpha=1, dropout=0.25)
    assert repr(layer) == "LoraLinear(in_features=5, out_features=3, bias=False, rank=2, alpha=1, dropout=0.25)"
    assert mk.lora(nn.Sequential(nn.Linear(5, 3)), seed=3) == ["0"]
    one, other = nn.Linear(5, 3), nn.Linear(5, 3)
    mk.lora(one, seed=3)
    mk.lora(other, seed=3)
    assert torch.equal(one.lora_A, other.lora_A)
    assert one.scale == 1
    assert one.lora_A.abs().max() <= 5**-0.5  # Kaiming's bound for a = sqrt(5)
    assert one.lora_A.std() > 0.5 * 15**-0.5
    assert not one.lora_B.any()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.step = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)


def quantized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = nn.Parameter(model[0].weight.data.char(), requires_grad=False)
    return model


def wrapped() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].forward = lambda x: x
    return model


def twice() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    mk.lora(model)
    return model


BAD: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (Tied, {"targets": ["boddy"]}, ValueError, r"targets must match a module, got 'boddy': there are body"),
    (Tied, {"targets": ["embedding"]}, ValueError, r"match linear layers, got 'embedding': 'embedding' is a torch.nn"),
    (Tied, {"targets": ["head"]}, ValueError, "got 'head', which has a weight that another module shares"),
    (Tied, {"targets": ["out_proj"]}, ValueError, "got 'attention.out_proj', which is a .*Quantizable.*, which may"),
    (Tied, {"targets": [3]}, TypeError, r"targets must hold name patterns \(strings\), got int"),
    (
        Tied,
        {"trainable": ["norm"]},
        ValueError,
        r"trainable must match a parameter, got 'norm': there are step, weight, bias",
    ),
    (Tied, {"trainable": ["body"]}, ValueError, "trainable must not match the weight of an adapted layer, got 'body'"),
    (Tied, {"trainable": ["step"]}, ValueError, "trainable must match floating-point parameters, got 'step'"),
    (
        quantized,
        {"targets": ["0"]},
        ValueError,
        "got '0', which has no plain floating-point weight but Tensor of torch.int8",
    ),
    (quantized, {}, ValueError, "model must have a linear layer that can be adapted, got none"),
    (wrapped, {"targets": "0"}, ValueError, "got '0', which has a forward that was replaced"),
    (twice, {}, ValueError, "model must not have LoRA layers, got '0': call metakern.merge_lora or remove_lora first"),
    (Tied, {"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
    (Tied, {"rank": 2.0}, ValueError, "rank must be an integer of at least 1, got 2.0"),
    (Tied, {"alpha": -1}, ValueError, "alpha must be a positive number, got -1"),
    (Tied, {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    (dict, {}, TypeError, "model must be a torch.nn.Module, got dict"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), BAD)
def test_layers_that_cannot_be_adapted_are_refused_and_nothing_changes(
    make: Callable[[], Any], options: dict, error: type[Exception], message: str
) -> None:
    model = make()
    before = repr(model), [p.requires_grad for p in getattr(model, "parameters", list)()]
    with pytest.raises(error, match=rf"^lora: .*{message}"):
        mk.lora(model, **options)
    assert (repr(model), [p.requires_grad for p in getattr(model, "parameters", list)()]) == before


def test_layers_that_cannot_be_adapted_are_skipped_by_default() -> None:
    assert mk.lora(Tied()) == ["body"]
    for f, name in ((mk.merge_lora, "merge_lora"), (mk.remove_lora, "remove_lora")):
        with pytest.raises(ValueError, match=f"^{name}: model must have LoRA layers, got none"):
            f(Tied())


def test_a_base_that_requires_a_gradient_is_an_error() -> None:
    model = two_layers()
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="lora_linear: weight must not require a gradient"):
        mk.MAML(model, regression_loss)(points(1), points(2))


def different(model: nn.Module) -> nn.Module:
    """Return a copy without LoRA in which every other trained parameter has changed, so that a file must restore it."""
    twin = copy.deepcopy(model)
    learning = [name for name, p in twin.named_parameters() if p.requires_grad and "lora_" not in name]
    mk.remove_lora(twin)
    for name in learning:
        twin.get_parameter(name).data.add_(1)
    return twin


SAVED: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: adapted("gpt2", trainable=["ln_f", "wpe", "attn.*.bias"]),
    "llama": lambda: adapted("llama", targets=["q_proj", "down_proj"], dropout=0.1, trainable="norm").float(),
    "mlp": two_layers,
}


@pytest.mark.parametrize("name", SAVED)
def test_files_give_the_same_model_again(name: str, tmp_path: Path) -> None:
    model = SAVED[name]().eval()
    fresh, again = different(model), started(copy.deepcopy(model))
    inputs = tokens(1)["input_ids"][0] if name != "mlp" else points(1)[0].to(next(model.parameters()).dtype)
    outputs = lambda m: getattr(m(inputs), "logits", m(inputs))  # noqa: E731
    mk.save_lora(model, tmp_path / "new" / "folder")
    for twin in (fresh, again):
        names = mk.load_lora(twin, tmp_path / "new" / "folder")
        assert torch.equal(outputs(twin), outputs(model))
        for (a, p), (b, q) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
            assert (a, p.requires_grad, p.dtype) == (b, q.requires_grad, q.dtype)
    assert names == [n for n, m in model.named_modules() if isinstance(m, LoraLinear)]
    assert [m.dropout for m in fresh.modules() if isinstance(m, LoraLinear)] == [
        m.dropout for m in model.modules() if isinstance(m, LoraLinear)
    ]


def test_a_save_asks_for_no_state_dict(tmp_path: Path) -> None:
    """In a model that FSDP2 has gathered, a state dict would divide the parameters again."""
    model = SAVED["gpt2"]()
    for module in model.modules():
        module.register_state_dict_pre_hook(lambda *_: pytest.fail("a state dict"))
    mk.save_lora(model, tmp_path)


def test_saved_files_have_the_format_of_peft(tmp_path: Path) -> None:
    """Names, shapes and settings; the folder has no other file."""
    from safetensors.torch import load_file

    model = SAVED["gpt2"]()
    mk.save_lora(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if ".h." not in name or ".h.1.attn" in name}
    prefix = "base_model.model.transformer."
    assert shapes == {
        f"{prefix}h.1.attn.c_attn.lora_A.weight": [2, 8],
        f"{prefix}h.1.attn.c_attn.lora_B.weight": [24, 2],
        f"{prefix}h.1.attn.c_attn.base_layer.bias": [24],
        f"{prefix}h.1.attn.c_proj.lora_A.weight": [2, 8],
        f"{prefix}h.1.attn.c_proj.lora_B.weight": [8, 2],
        f"{prefix}h.1.attn.c_proj.base_layer.bias": [8],
        f"{prefix}wpe.weight": [6, 8],
        f"{prefix}ln_f.weight": [8],
        f"{prefix}ln_f.bias": [8],
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "target_modules": [f"transformer.h.{i}.{layer}" for i in (0, 1) for layer in layers],
        "modules_to_save": ["transformer.ln_f", "transformer.wpe"],
        "fan_in_fan_out": True,
        "bias": "lora_only",
        "inference_mode": True,
    }


def test_adapted_parameters_of_each_task_can_be_saved(tmp_path: Path) -> None:
    model, support, query = adapted("llama", trainable="norm"), tokens(1), tokens(2)
    maml = mk.MAML(model, tokens_loss, mk.optim.SGD(lr=0.3), steps=2)
    phi, curve = maml.adapt(support), maml.evaluate(support, query, (2,))[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for t in range(T):
        mk.save_lora(model, tmp_path / str(t), {name: p[t] for name, p in phi.items()})
    for t in range(T):
        fresh = different(model)
        mk.load_lora(fresh, tmp_path / str(t))
        batch = {name: value[t] for name, value in query.items()}
        torch.testing.assert_close(tokens_loss(fresh, batch), curve[t], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"^save_lora: .*lora_A must have shape \[2, 8\] as in model, got \[3, 2, 8\]"):
        mk.save_lora(model, tmp_path, phi)
    with pytest.raises(
        ValueError, match=r"^save_lora: parameters must have names of model's state dict, got 'nothing'"
    ):
        mk.save_lora(model, tmp_path, {"nothing": torch.ones(1)})


def test_parameters_without_a_place_in_the_format_are_an_error(tmp_path: Path) -> None:
    model = Tied()
    mk.lora(model, trainable=["embedding"])
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(
        ValueError,
        match=r"^save_lora: trainable parameters must have a place in PEFT's format, got 'scale', .*: freeze it",
    ):
        mk.save_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def edit(config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Callable[[Path], None]:
    """Return a function that changes a folder's config, and tensors by the ends of their names; None removes one."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        path = folder / "adapter_model.safetensors"
        values = load_file(path)
        for end, value in tensors.items():
            name = next((n for n in values if n.endswith(end)), end)
            values.pop(name, None)
            if value is not None:
                values[name] = value
        save_file(values, path)

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Return a function that cuts the last 20 bytes off a file of a folder."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def torn(folder: Path) -> None:
    """Make the config and the tensors of a folder those of different saves."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 7}))


A, B, NORM = "0.lora_A.weight", "0.lora_B.weight", "1.weight"
X = "base_model.model."
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors cut short": (cut("adapter_model.safetensors"), "files must be readable, got a damaged adapter_model"),
    "config cut short": (cut("adapter_config.json"), "files must be readable, got a damaged adapter_config"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "directory must hold adapter_config.json"),
    "torn apart": (torn, "files must be of one save, got two with different alphas"),
    "another method": (edit({"peft_type": "LOHA"}), "peft_type must be LORA, got 'LOHA'"),
    "another formula": (edit({"use_dora": True}), r"config must be of plain LoRA, got {'use_dora': True}"),
    "another base": (edit({"init_lora_weights": "pissa"}), "config must be of plain LoRA, got {'init_lora_weights'"),
    "another rank": (edit({"r": 3}), "the rank of '0' must be 3, got 2"),
    "no alpha": (edit({"lora_alpha": None}), "config must have lora_alpha, got none"),
    "a shape": (edit(**{A: torch.ones(2, 6)}), r"of '0' must have shapes \[rank, 5\] and \[8, rank\], got \[2, 6\]"),
    "no B": (edit(**{B: None}), "lora_A and lora_B must come together, got lora_A of '0' alone"),
    "nothing": (edit(**dict.fromkeys([A, B, NORM])), "files must hold LoRA layers, got none"),
    "another layer": (
        edit(**{f"{X}2.lora_A.weight": torch.ones(2, 5), f"{X}2.lora_B.weight": torch.ones(2, 2)}),
        "layers must be those of model, got '2', which is no .* layer of model",
    ),
    "an unknown key": (edit(**{f"{X}9.weight": torch.ones(2)}), r"'9.weight' must have shape \[2\] in model, got none"),
    "a frozen weight": (edit(**{f"{X}0.weight": torch.ones(8, 5)}), "'0.weight' must have .*got a frozen weight"),
    "a norm's shape": (edit(**{NORM: torch.ones(9)}), r"'1.weight' must have shape \[9\] in model, got \[8\]"),
    "no prefix": (edit(**{"0.alpha": torch.ones(1)}), "tensors must be named and shaped as LoRA's, got '0.alpha'"),
    "integers": (edit(**{A: torch.ones(2, 5).to(torch.int8)}), r"tensors must be finite floating-point .* torch\.int8"),
    "complex": (edit(**{A: torch.ones(2, 5) * 1j}), r"tensors must be finite floating-point .* torch\.complex64"),
    "NaN": (edit(**{A: torch.full((2, 5), torch.nan)}), r"tensors must be finite floating-point numbers"),
    "deep JSON": (lambda f: (f / "adapter_config.json").write_text("[" * 10**5), "a damaged adapter_config"),
    "alpha in words": (edit({"lora_alpha": "two"}), "lora_alpha must be a number, got 'two'|of one save"),
    "no patterns": (edit({"rank_pattern": ["0"]}), "files must be readable, got a damaged"),
    "a slow pattern": (edit({"rank_pattern": {"(a+)+": 2}}), "patterns must not repeat groups"),
    "another slow pattern": (edit({"rank_pattern": {".*" * 99: 2}}), "patterns must be short and simple"),
    "a slow choice": (edit({"rank_pattern": {"(.|.)" * 40: 2}}), "patterns must be short and simple"),
    "no regular expression": (edit({"rank_pattern": {"(": 2}}), "patterns must be regular expressions"),
    "a magnitude": (edit(**{f"{X}0.lora_magnitude_vector": torch.ones(8)}), "got '.*lora_magnitude_vector'"),
}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_fit_are_refused_and_the_model_stays(damage: str, fresh: bool, tmp_path: Path) -> None:
    model = two_layers(targets=["0"], trainable=["1"])
    mk.save_lora(model, tmp_path)
    target = different(model) if fresh else started(model)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path)
    before = repr(target), {n: (p.clone(), p.requires_grad) for n, p in target.named_parameters()}
    error = FileNotFoundError if damage == "no config" else ValueError
    with pytest.raises(error, match=f"^load_lora: .*{message}"):
        mk.load_lora(target, tmp_path)
    assert repr(target) == before[0]
    for name, p in target.named_parameters():
        assert torch.equal(p, before[1][name][0])
        assert p.requires_grad == before[1][name][1]


def test_files_for_other_ranks_alphas_or_layers_are_refused(tmp_path: Path) -> None:
    mk.save_lora(two_layers(), tmp_path)
    for options, message in (
        ({"alpha": 4}, "'0' must have rank 2 and alpha 4 as in model, got 2 and 2"),
        ({"targets": ["0"]}, "got '3', which is no LoRA layer of model"),
    ):
        with pytest.raises(ValueError, match=f"^load_lora: .*{message}"):
            mk.load_lora(two_layers(**options), tmp_path)
    mk.save_lora(two_layers(targets=["0"]), tmp_path)
    with pytest.raises(ValueError, match=r"^load_lora: '3' must have rank 2 and alpha 2 as in model, got nothing"):
        mk.load_lora(two_layers(), tmp_path)


def test_a_save_that_fails_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_layers()
    mk.save_lora(model, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    nn.init.ones_(model[0].lora_A)
    with pytest.raises(CheckpointError, match="No space left on device; nothing that was there is lost"):
        mk.save_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_files_can_be_exchanged_with_peft(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = SAVED[name]().double().eval()
    batch = tokens(1)["input_ids"][0]
    expected = model(batch).logits
    mk.save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(different(model), tmp_path / "ours", autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(batch).logits, expected, rtol=1e-12, atol=1e-12)
    for parameter_name, parameter in theirs.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = different(model)
    mk.load_lora(fresh, tmp_path / "theirs")
    torch.testing.assert_close(fresh.eval()(batch).logits, theirs(batch).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("default")
def test_rank_and_alpha_patterns_can_be_exchanged_with_peft(tmp_path: Path) -> None:
    """Also with rank-stabilized scales (rsLoRA)."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    patterns = {"rank_pattern": {"2": 4}, "alpha_pattern": {"^4": 7.5}, "use_rslora": True}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2", "4"], init_lora_weights=False, **patterns)
    theirs, x = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False), points(1)[0]
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    mk.load_lora(model, tmp_path / "theirs")
    assert [model[i].rank for i in (0, 2, 4)] == [2, 4, 2]
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    mk.save_lora(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", autocast_adapter_dtype=False)
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-12, atol=1e-12)
    fresh = copy.deepcopy(base)
    mk.load_lora(fresh, tmp_path / "ours")
    assert torch.equal(fresh(x), model(x))


def test_what_load_lora_loads_into_must_be_a_module(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"load_lora: model must be a torch.nn.Module, got int"):
        mk.load_lora(3, tmp_path)  # type: ignore[arg-type]
