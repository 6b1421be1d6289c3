"""Models of Hugging Face: patched ones compute the same, and their meta-gradients are exact in every batching."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern as mk
from metakern.meta.verify import comparable

transformers = pytest.importorskip("transformers")
ATTENTION, ROPE, LINEAR, RMS, GELU = (
    f"metakern.ops.{op}" for op in ("attention", "rope", "linear", "rms_norm", "gelu")
)
V, L = 19, 6
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {
    "vocab_size": V,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    **IDS,
}
WINDOW = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}
SILU = {ATTENTION + ", " + ROPE, RMS, "metakern.nn.Linear", "metakern.ops.silu", "metakern.ops.swiglu"}
GEMMA = {ATTENTION + ", " + ROPE, RMS, "metakern.nn.Linear", GELU}
NORM = {"metakern.nn.LayerNorm", "metakern.nn.Linear"}

# By model type: its config, and the ops and modules in the report of `mk.patch`, without the loss.
MODELS: dict[str, tuple[dict, set[str]]] = {
    "gpt2": (GPT2, {*NORM, ATTENTION, LINEAR, GELU}),
    "llama": ({**LLAMA, "tie_word_embeddings": True}, SILU),
    "qwen2": ({**LLAMA, **WINDOW}, SILU),
    "qwen3": ({**LLAMA, "head_dim": 8}, SILU),
    "mistral": ({**LLAMA, "sliding_window": 3}, SILU),
    "gemma": ({**LLAMA, "head_dim": 8}, GEMMA),
    "gemma2": ({**LLAMA, "head_dim": 8, "sliding_window": 3}, {ROPE, RMS, "metakern.nn.Linear", GELU}),
    "gemma3_text": ({**LLAMA, "head_dim": 8, "sliding_window": 3}, GEMMA),
    "phi": ({**LLAMA, "num_key_value_heads": 4}, {*NORM, ATTENTION + ", " + ROPE, GELU}),
    "phi3": ({**LLAMA, "sliding_window": 4}, SILU),
    "gpt_neox": ({k: v for k, v in LLAMA.items() if k[:7] != "num_key"}, {*NORM, ATTENTION + ", " + ROPE, GELU}),
    "opt": ({**LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 16}, {*NORM, ATTENTION}),
    "smollm3": (LLAMA, SILU),
}

# Models that make their causal masks themselves (GPT-2 before transformers 4.54, OPT and others before 5.9) keep their
# own attention, and that of OPT gives NaN for a query that sees no key.
NO_INTERFACE = "it does not go through transformers' attention interface"
BY_ITSELF = "it makes its causal masks by itself, not by transformers' masking_utils"
OWN_MASKS = {
    name
    for name in ("gpt2", "opt", "qwen2_moe")
    if not hasattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), "create_causal_mask")
}


def padded(name: str, *sides: str | None) -> list[str | None]:
    """Return those of `sides` on which a batch for the model can be padded, or ["right"] if there is none."""
    return [side for side in sides if side != "left" or name not in OWN_MASKS - {"gpt2"}] or ["right"]


def build(name: str, attention: str = "eager", **changes: Any) -> Any:
    """Return a tiny model in float64 with random parameters, also in norms and biases."""
    config = transformers.AutoConfig.for_model(name, **{**MODELS.get(name, (LLAMA,))[0], **changes})
    random = torch.Generator().manual_seed(len(name))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=random, dtype=p.dtype)
    return model


def batch(seed: int, *lead: int, padding: str | None = "left") -> dict[str, Tensor]:
    """Return sequences [*lead, 2, L], every second one padded; first tokens and those after padding have no label."""
    tokens = torch.randint(3, V, (*lead, 2, L), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    if padding:
        mask[..., 1, slice(2) if padding == "left" else slice(L - 2, L)] = 0
    known = mask.bool() & mask.bool().roll(1, -1)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(known, -100)}


def patched(model: nn.Module) -> tuple[Any, mk.patching.Report]:
    """Return a patched copy of a model, and the report."""
    twin = copy.deepcopy(model)
    return twin, mk.patch(twin)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A list of the options of each call of `mk.ops.attention`."""
    calls: list[dict] = []
    attention = mk.ops.attention
    monkeypatch.setattr(mk.ops, "attention", lambda *a, **options: calls.append(options) or attention(*a, **options))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_compute_the_same(name: str, fused: list[dict]) -> None:
    model = build(name)
    ours, report = patched(model)
    own = {ATTENTION} if name in OWN_MASKS else set()
    afters = {after.replace("metakern.nn.SiLU", "metakern.ops.silu") for _, _, after in report.replaced}
    assert afters == {*MODELS[name][1], "metakern.ops.cross_entropy"} - own
    why = "its scores are capped at 50.0" if name == "gemma2" else BY_ITSELF if own else None
    assert report.left == ((("", f"attention of {type(model).__name__}", why),) if why else ())
    for padding in padded(name, None, "left", "right"):
        fused.clear()
        inputs = batch(3, padding=padding)
        if padding is None:
            del inputs["attention_mask"]
        with comparable():
            expected, found = model(**inputs), ours(**inputs)
        seen = inputs.get("attention_mask", torch.ones(2, L)).bool()
        close(found.logits[seen], expected.logits[seen])
        close(found.loss, expected.loss)
        assert len(fused) == (0 if why else 2)
        windows = {"qwen2": [None, 3], "mistral": [3, 3], "phi3": [4, 4], "gemma3_text": [3, 3]}
        assert [call["window"] for call in fused] == windows.get(name, [None] * len(fused))
        for call in fused:
            plain = padding is None and call["window"] is None
            bare = call["mask"] is None or (plain and call["mask"].all())  # before 5.23, OPT passes a mask of ones
            assert bare if plain else torch.equal(call["mask"], seen)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_patching_changes_classes_alone_and_can_be_undone(name: str) -> None:
    model = build(name, attention="sdpa")
    kinds, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    state, text = {key: t.clone() for key, t in model.state_dict().items()}, model.config.to_json_string()
    report = mk.patch(model)
    assert mk.patch(model).replaced == ()
    assert isinstance(model.base_model, type(build(name).base_model))
    assert [type(m).__name__ for m in model.modules()] == [kind.__name__ for kind in kinds]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.config.to_json_string() == text
    inputs = batch(1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    back = mk.unpatch(model)
    assert sorted(back.replaced) == sorted((path, after, before) for path, before, after in report.replaced)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert model.config._attn_implementation == "sdpa"
    assert mk.unpatch(model).replaced == ()


def test_a_pickle_of_a_patched_model_can_be_loaded_in_a_new_process() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from metakern.patching.attention import NAME, register

    ours, _ = patched(build("gpt2"))
    data, expected = pickle.dumps(ours), ours(**batch(1)).logits
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping[NAME]
    register.cache_clear()
    assert torch.equal(pickle.loads(data)(**batch(1)).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_neox", "gemma3_text", "opt"])
def test_generation_with_and_without_a_cache(name: str, fused: list[dict]) -> None:
    model = build(name, attention="sdpa")
    ours, _ = patched(model)
    inputs = batch(5, padding=padded(name, "left", None)[0])
    del inputs["labels"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"})[: 3 if name == "llama" else 2]:
        expected = model.generate(**inputs, **options, **cache, output_scores=True, return_dict_in_generate=True)
        fused.clear()
        found = ours.generate(**inputs, **options, **cache, output_scores=True, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected.sequences)
        close(
            torch.stack(found.scores), torch.stack(expected.scores), 1e-4
        )  # the unpatched model computes partly in float32
        assert len(fused) == (0 if name in OWN_MASKS else 12)


def test_calls_that_the_op_does_not_compute_run_the_models_own_attention(fused: list[dict]) -> None:
    model = build("mistral", attention_dropout=0.5)
    ours, _ = patched(model)
    inputs = batch(7, padding="right")
    rows = torch.ones(2, 1, L, L, dtype=torch.bool).tril().masked_fill(torch.rand(2, 1, L, L) < 0.3, False)
    rows |= torch.eye(L, dtype=torch.bool)
    own = torch.zeros(rows.shape, dtype=torch.float64).masked_fill(~rows, torch.finfo(torch.float32).min)
    packed = {"input_ids": inputs["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)}
    cases: list[dict] = [
        {**inputs, "output_attentions": True},
        {**inputs, "attention_mask": own},
    ]
    if hasattr(transformers.masking_utils, "find_packed_sequence_indices"):
        cases.append(packed)  # two sequences in a row of the batch, which need a block mask
    for case in cases:
        with comparable(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`output_attentions=True` is not supported", UserWarning)
            expected, found = model(**case, use_cache=False), ours(**case, use_cache=False)
        seen = inputs["attention_mask"].bool() if "labels" in case else slice(None)
        close(found.logits[seen], expected.logits[seen])
        if "output_attentions" in case:
            for a, b in zip(found.attentions, expected.attentions, strict=True):
                close(a[:, :, :4], b[:, :, :4])
    outputs = []
    for m in (model.train(), ours.train()):
        torch.manual_seed(1)
        outputs.append(m(**inputs).logits)
    close(outputs[1][inputs["attention_mask"].bool()], outputs[0][inputs["attention_mask"].bool()], 1e-4)
    assert not fused


def test_windows_are_taken_from_the_mask_where_layers_lack_them(fused: list[dict]) -> None:
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 2}
    model = build("qwen2_moe", **WINDOW, **sizes).float()  # the experts do not run in float64
    ours, report = patched(model)
    close(ours(**batch(1, padding=None)).logits, model(**batch(1, padding=None)).logits, 1e-4)
    if "qwen2_moe" in OWN_MASKS:
        assert {why for path, _, why in report.left if not path} <= {BY_ITSELF, NO_INTERFACE}
        return
    assert 3 in [call["window"] for call in fused]


def test_attention_modules_can_be_called_without_a_mask() -> None:
    """They are causal or not as their `is_causal` says."""
    model = build("llama")
    ours, _ = patched(model)
    x = torch.randn(2, L, 16, dtype=torch.float64)
    position = model.model.rotary_emb(x, torch.arange(L)[None])
    for is_causal in (True, False):
        layers = [m.model.layers[0].self_attn for m in (model, ours)]
        layers[1].is_causal = is_causal
        mask = torch.zeros(L, L).double().masked_fill(torch.ones(L, L).triu(1).bool() & is_causal, -1e30)
        close(layers[1](x, position, None)[0], layers[0](x, position, mask[None, None])[0], 1e-6)


def test_losses_with_the_arguments_of_transformers_trainer() -> None:
    model = build("qwen3")
    ours, _ = patched(model)
    inputs = batch(9)
    shifted = {**inputs, "shift_labels": F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()}
    for case in ({**inputs, "num_items_in_batch": 7}, {**inputs, "num_items_in_batch": torch.tensor(5)}, shifted):
        with comparable():
            close(ours(**case).loss, model(**case).loss)
    assert ours(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss.item() == 0
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    ours, report = patched(model)
    assert "metakern.ops.cross_entropy" not in {after for _, _, after in report.replaced}
    assert ours(**inputs).loss.item() == 0


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_bfloat16_errors_are_at_most_twice_those_of_the_unpatched_model(name: str) -> None:
    model = build(name)
    inputs = batch(1, padding="right")
    exact, seen = model(**inputs).logits, inputs["attention_mask"].bool()
    model.bfloat16()
    ours, _ = patched(model)
    errors = [(m(**inputs).logits - exact)[seen].norm().item() for m in (ours, model)]
    assert errors[0] <= 2 * errors[1] + 1e-6


@pytest.mark.parametrize("name", ["qwen3", "gemma"])
def test_norms_in_bfloat16_are_as_accurate_as_unpatched_ones(name: str) -> None:
    norm, x = build(name).model.norm, torch.randn(64, 16, dtype=torch.float64).bfloat16()
    norm.weight.data.copy_((0.9 if name == "qwen3" else 0) + 0.004 * torch.arange(16)).bfloat16()
    exact = norm.bfloat16().double()(x.double()).double()
    theirs = norm.bfloat16()(x)
    mk.patch(model := build(name).bfloat16())
    model.model.norm.weight.data.copy_(norm.weight)
    ours = model.model.norm(x)
    assert (ours - exact).norm() <= 1.01 * (theirs - exact).norm()


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_autocast_gives_the_results_of_the_unpatched_model(name: str, fused: list[dict]) -> None:
    model = build(name).float()
    ours, _ = patched(model)
    inputs = batch(1, padding="right")
    seen = inputs["attention_mask"].bool()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs)
        torch.testing.assert_close(ours(**inputs).logits[seen], expected.logits[seen], rtol=0.03, atol=0.03)
        torch.testing.assert_close(mk.losses.causal_lm(ours, inputs).float(), expected.loss, rtol=0.03, atol=0.03)
    assert not fused


def truth(model: nn.Module, support: dict, query: dict, lr: float, steps: int, adapted: Any) -> dict[str, Tensor]:
    """Return the meta-gradient by plain autograd, with what the model computes in float32 computed in float64."""

    def loss(phi: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
        inputs = {key: task[key] for key in ("input_ids", "attention_mask")}
        logits = torch.func.functional_call(model, phi, (), inputs, tie_weights=True).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), task["labels"][:, 1:].flatten())

    theta, total = dict(model.named_parameters()), torch.zeros((), dtype=torch.float64)
    with comparable():
        for t in range(len(support["input_ids"])):
            phi = dict(theta)
            for _ in range(steps):
                names = [name for name in phi if adapted(name)]
                value = loss(phi, {key: x[t] for key, x in support.items()})
                g = torch.autograd.grad(value, [phi[n] for n in names], create_graph=True, allow_unused=True)
                phi |= {n: phi[n] if gi is None else phi[n] - lr * gi for n, gi in zip(names, g, strict=True)}
            total = total + loss(phi, {key: x[t] for key, x in query.items()})
        grads = torch.autograd.grad(total / len(support["input_ids"]), list(theta.values()))
    return dict(zip(theta, grads, strict=True))


def assert_exact(maml: Any, model: nn.Module, support: dict, query: dict, expected: dict, tolerance: float) -> None:
    """Assert that each gradient has at most this error relative to its norm, or to 1e-3 of the largest norm."""
    model.zero_grad()
    maml(support, query).backward()
    most = max(g.norm() for g in expected.values())
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= tolerance * max(expected[name].norm(), 1e-3 * most), name


def tolerance(name: str) -> float:
    """Return the tolerance for a model: larger where its own attention runs, which computes partly in float32."""
    return 1e-4 if name in OWN_MASKS else 1e-5 if name == "gemma2" else 1e-9


def ways(*batchings: str) -> Iterator[dict[str, str]]:
    """Yield the options of each batching with each strategy."""
    for batching in batchings:
        for strategy in ("store", "recompute"):
            yield {"batching": batching, "strategy": strategy}


def error_of(plan: object) -> float:
    """Return the error against plain autograd that a plan reports."""
    found = re.search(r"worst relative error (\S+) in float64", str(plan))
    assert found
    return float(found[1])


@pytest.mark.parametrize("name", MODELS)
def test_meta_gradients_are_exact(name: str) -> None:
    """The patched model equals plain autograd; the plan of the unpatched one reports an error of rounding alone."""
    side = (
        "right" if name == "gemma2" else padded(name, "left")[0]
    )  # eager attention computes a query that sees no key in float32
    model = build(name)
    support, query = batch(1, 3, padding=side), batch(2, 3, padding=side)
    expected = truth(model, support, query, 0.1, 2, lambda name: True)
    ours, _ = patched(model)
    for way in ways("fold", "vmap", "loop") if name in {"gpt2", "qwen2"} - OWN_MASKS else ways("fold"):
        maml = mk.MAML(ours, mk.losses.causal_lm, mk.optim.SGD(0.1), 2, **way)
        assert_exact(maml, ours, support, query, expected, tolerance(name))
        assert error_of(maml.plan) < 1e-11
    maml = mk.MAML(model, mk.losses.causal_lm, mk.optim.SGD(0.1), 1, batching="fold")
    maml(batch(1, 3, padding="right"), batch(2, 3, padding="right"))
    assert error_of(maml.plan) < 1e-11


@pytest.mark.parametrize(
    ("name", "adapt"),
    [
        ("llama", ["*mlp*", "*norm.weight"]),  # the head is tied to the embeddings, which only the outer loop learns
        ("gpt2", ["*c_attn*", "transformer.wpe*", "*ln_?.bias"]),
        ("opt", ["*fc?.weight", "*embed_positions*"]),
        ("gemma", ["*norm.weight"]),
    ],
)
def test_logits_are_not_computed_if_the_head_is_not_adapted(
    name: str, adapt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    support, query = (batch(seed, 3, padding=padded(name, "left")[0]) for seed in (1, 2))
    patterns = re.compile("|".join(p.replace(".", r"\.").replace("*", ".*").replace("?", ".") for p in adapt))
    expected = truth(model, support, query, 0.1, 2, lambda name: patterns.match(name))
    ours, _ = patched(model)
    calls: list[tuple] = []
    op = mk.ops.linear_cross_entropy
    monkeypatch.setattr(mk.ops, "linear_cross_entropy", lambda *a: calls.append(a) or op(*a))
    monkeypatch.setattr(mk.ops, "cross_entropy", None)
    for way in ways("fold", "vmap", "loop") if name in {"llama", "gpt2"} - OWN_MASKS else ways("fold"):
        calls.clear()
        maml = mk.MAML(ours, mk.losses.causal_lm, mk.optim.SGD(0.1), 2, adapt=adapt, **way)
        assert_exact(maml, ours, support, query, expected, tolerance(name))
        assert calls
    monkeypatch.undo()
    plan = mk.MAML(model, mk.losses.causal_lm, mk.optim.SGD(0.1), 1, adapt=adapt, batching="fold")
    plan(batch(1, 3, padding="right"), batch(2, 3, padding="right"))
    assert error_of(plan.plan) < 1e-11


def test_heads_that_are_not_a_plain_product_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capped logits, a bias, and a hooked head."""
    monkeypatch.setattr(mk.ops, "linear_cross_entropy", None)
    for name in ("gemma2", "phi"):
        model = build(name)
        ours, _ = patched(model)
        inputs = batch(3, padding="right")
        with comparable():
            close(mk.losses.causal_lm(ours, inputs), model(**inputs).loss)
    ours, _ = patched(build("qwen3"))
    expected = mk.losses.causal_lm(build("qwen3"), inputs)
    seen: list[int] = []
    ours.lm_head.register_forward_hook(lambda module, args, y: seen.append(y.shape[-1]))
    close(mk.losses.causal_lm(ours, inputs), expected, 1e-5)
    assert seen == [V]


def test_a_module_without_a_rule_is_left_and_the_meta_gradient_is_exact() -> None:
    model = build("olmo2")
    ours, report = patched(model)
    assert {(kind, why) for _, kind, why in report.left} == {
        ("transformers.Olmo2RMSNorm", "metakern has no replacement for this class")
    }
    inputs = batch(1)
    seen = inputs["attention_mask"].bool()
    with comparable():
        close(ours(**inputs).logits[seen], model(**inputs).logits[seen])
    ours.model.norm.forward = ours.model.norm.forward  # as if the user had wrapped it
    support, query = batch(1, 3), batch(2, 3)
    maml = mk.MAML(ours, mk.losses.causal_lm, mk.optim.SGD(0.1), 2, batching="fold")
    maml(support, query)
    assert error_of(maml.plan) < 1e-11


def test_another_rotary_embedding_is_left() -> None:
    """That of Cohere rotates pairs of neighboring features, not of the two halves."""
    model = build("cohere")
    ours, report = patched(model)
    afters = {after for _, before, after in report.replaced if before == "transformers.CohereAttention"}
    assert afters == {ATTENTION}
    with comparable():
        close(ours(**batch(1, padding=None)).logits, model(**batch(1, padding=None)).logits)


def test_a_replaced_forward_is_left() -> None:
    model = build("llama")
    for module in (model.model.norm, model.model.layers[0].self_attn):
        module.forward = module.forward
    left = {path: why for path, _, why in mk.patch(model).left}
    assert left == dict.fromkeys(("model.norm", "model.layers.0.self_attn"), "its forward was replaced")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_keep_their_attention(name: str) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    bart = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    bart |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 1}
    config = transformers.AutoConfig.for_model(name, vocab_size=V, **(sizes if name == "t5" else bart), **IDS)
    config.decoder_start_token_id = 1
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).double().eval()
    ours, report = patched(model)
    whys = {kind: why for path, kind, why in report.left if not path}
    assert whys == {
        f"attention of {type(model).__name__}": "it is part of an encoder-decoder, which needs masks of other kinds"
    }
    inputs = batch(1, padding="right")
    with comparable():
        close(ours(**inputs).loss, model(**inputs).loss)
    assert ours.config._attn_implementation == model.config._attn_implementation


def test_ops_that_a_changed_transformers_does_not_take_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where modules of a known family have changed, each op that is not put in is reported with the reason."""
    from transformers.models.llama import modeling_llama as llama

    def hidden(*args: Any, **kwargs: Any) -> Any:
        return forwards[llama.LlamaAttention](*args, **kwargs)

    forwards = {kind: kind.forward for kind in (llama.LlamaAttention, llama.LlamaMLP)}
    hidden.__wrapped__ = forwards[llama.LlamaAttention]  # type: ignore[attr-defined]
    monkeypatch.setattr(llama.LlamaAttention, "forward", hidden)  # its closure has a table of functions and no function
    double = lambda self, x: 2 * forwards[llama.LlamaMLP](self, x)  # noqa: E731
    monkeypatch.setattr(llama.LlamaMLP, "forward", double)
    model = build("llama")
    ours, report = patched(model)
    version = transformers.__version__
    hides = "metakern.ops.rope was not put in: a decorator hides the forward that calls apply_rotary_pos_emb"
    assert {(kind.rpartition(".")[2], why) for _, kind, why in report.left} == {
        ("LlamaAttention", hides),
        ("LlamaMLP", "it does not compute metakern.ops.swiglu: its class has changed"),
        *(
            (
                f"{op} of LlamaForCausalLM",
                f"no module was recognized that computes metakern.ops.{op}, in transformers {version}",
            )
            for op in ("rope", "swiglu")
        ),
    }
    with comparable():
        close(ours(**batch(1, padding=None)).logits, model(**batch(1, padding=None)).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi"])
def test_a_decorated_forward_keeps_its_decorators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(name), []
    kind = type(model.model.layers[0].self_attn)
    forward = kind.forward

    def counted(f: Any) -> Any:
        @functools.wraps(f)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(self).__name__)
            return f(self, *args, **kwargs)

        return wrapper

    monkeypatch.setattr(kind, "forward", counted(counted(forward)))
    ours, report = patched(model)
    assert report.left == ()
    rotated = mk.ops.rope
    turned: list[Tensor] = []
    monkeypatch.setattr(mk.ops, "rope", lambda x, *a: turned.append(x) or rotated(x, *a))
    with comparable():
        close(ours(**batch(1, padding=None)).logits, model(**batch(1, padding=None)).logits)
    assert len(turned) == 4  # of queries and keys, in two layers of the patched model
    assert calls == [kind.__name__] * 8
    assert kind.forward.__wrapped__.__wrapped__ is forward


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("is_patched", [False, True])
def test_padded_batches_are_captured(name: str, is_patched: bool) -> None:
    """Batches with and without padding have programs of their own where the model looks at its mask."""
    model = build(name).float()
    if is_patched:
        mk.patch(model)
    ways = [mk.MAML(model, mk.losses.causal_lm, mk.optim.SGD(0.05), 1, capture=capture) for capture in (True, False)]
    for seed, padding in enumerate((None, "right", "right", None)):
        support, query = batch(seed, 2, padding=padding), batch(seed + 9, 2, padding=padding)
        found = []
        for maml in ways:
            model.zero_grad()
            maml(support, query).backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()
    assert not [reason for reason in ways[0].plan.reasons if "captured" in reason]
