"""Pretrained models with LoRA: a base for all users, factors for each."""

import pytest
import torch
from pretrained import make_model, transformers
from serving import adapted, ask, serving, teach
from tiny import tiny_config, write_tasks

import metakern as mk
from metakern.dialogue.huggingface import ChatTokenizer
from metakern.dialogue.run import Run
from metakern.errors import UserError
from metakern.io import write
from metakern.serve import pretrained
from metakern.serve.stack import Stack

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
LLAMA |= {"pad_token_id": 0}
WIDE = LLAMA | {"head_dim": 8}
SIZES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": WIDE,
    "gemma2": WIDE,
    "gpt_neox": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
}


def make(kind: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        name: value for name, value in SIZES.get(kind, LLAMA).items() if kind != "gpt_neox" or "key_value" not in name
    }
    config = transformers.AutoConfig.for_model(kind, vocab_size=50, **sizes | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    mk.patch(model)
    mk.lora(model, 2)
    model.config.use_cache = False
    return model.double().eval()


@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_each_row_equals_the_model_of_its_factors(kind):
    model = make(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    attention = model.config._attn_implementation
    stack = Stack(model, rows=3, length=16)
    assert len(stack.base) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.equal(stack.arena, stack.base.expand(3, -1))
    assert not any(part.any() for part in stack.cache)
    users = []
    for row in range(3):
        phi = {name: torch.randn_like(p) / 3 for name, p in model.named_parameters() if p.requires_grad}
        stack.arena[row] = stack.flat(phi)
        users.append(phi)
    texts, known = [torch.randint(50, (9,)) for _ in users], torch.tensor([0, 0, 0])
    for counts in ((5, 2, 4), (3, 1, 1), (1, 1, 3)):
        new = torch.zeros(3, max(counts), dtype=torch.long)
        for row, count in enumerate(counts):
            new[row, :count] = texts[row][known[row] :][:count]
        logits = stack.at(0, 3).next_logits(new, torch.tensor(counts), stack.cache_at(0, 3), known)
        known += torch.tensor(counts)
        for row, phi in enumerate(users):
            ids = texts[row][: known[row]].unsqueeze(0)
            truth = torch.func.functional_call(model, phi, kwargs={"input_ids": ids}).logits[0, -1]
            torch.testing.assert_close(logits[row], truth, atol=1e-6, rtol=1e-6)
    kept = stack.copied_cache(0, int(known[0]))
    assert {part.shape[-2] for part in kept} == {9}
    stack.put_cache(1, kept)
    assert all(torch.equal(part[0], part[1]) for part in stack.cache)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.config._attn_implementation == attention


def test_the_frozen_weights_are_those_of_the_run():
    model = make("llama")
    stack = Stack(model, rows=2, length=8)
    copied = dict(stack.model.model.named_parameters())
    for name, p in model.named_parameters():
        assert p.requires_grad or copied[name] is p


def test_what_cannot_be_served_is_refused():
    sliding, whole = make("mistral", sliding_window=8), transformers.LlamaForCausalLM(make("llama").config)
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    mk.lora(bloom, 2)
    with pytest.raises(UserError, match="must see max_length tokens, 16, but MistralForCausalLM sees the last 8"):
        Stack(sliding, rows=2, length=16)
    with pytest.raises(UserError, match="position_ids, which BloomForCausalLM does not"):
        Stack(bloom, rows=2, length=16)
    with pytest.raises(UserError, match="a pretrained model must be trained with --lora"):
        Stack(whole, rows=2, length=16)


def test_a_wrong_cache_is_noticed(monkeypatch):
    right = pretrained._Layers.update

    def wrong(self, key_states, value_states, layer_idx, *_, **__):
        return right(self, key_states, 2 * value_states, layer_idx)

    monkeypatch.setattr(pretrained._Layers, "update", wrong)
    with pytest.raises(UserError, match="LlamaForCausalLM gives other logits with a cache for several users"):
        Stack(make("llama"), rows=2, length=16)


def test_a_window_that_no_setting_names_is_noticed():
    config = transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=50, attention_types=[[["local"], 2]], window_size=8
    )
    model = transformers.GPTNeoForCausalLM(config)
    mk.lora(model, 2)
    Stack(model, rows=1, length=8)
    with pytest.raises(UserError, match="serve: GPTNeoForCausalLM "):
        Stack(model, rows=2, length=16)


def test_a_server_of_a_pretrained_model_teaches_each_user_apart(tmp_path):
    model = make_model(tmp_path / "llama", hidden_size=32, intermediate_size=48)
    data = write_tasks(tmp_path / "data")
    rates = {"inner": "adam", "inner_lr": 0.05, "learn_lr": False, "pretrain_steps": 0, "capture": False}
    config = tiny_config(data, model=f"hf:{model}", lora=8, max_length=64, **rates)
    tokenizer = ChatTokenizer.of(str(model))
    run = Run.create(tmp_path / "run", config, tokenizer)
    run.state = {"phase": "train", "step": 0}
    tokenizer.save(run.path / "tokenizer.json")
    write(run.path / "config.toml", config.toml().encode())
    run.save("best")
    with serving(run.path, tmp_path / "users.sqlite") as client:
        before = ask(client, "bob", "river?")
        for name, word in (("ann", "cloud otter"), ("eve", "maple")):
            teach(client, name, ("river?", word))
            assert adapted(client, name)["curve"][-1]["right"] == 1
        assert [ask(client, name, "river?") for name in ("ann", "eve", "bob")] == ["cloud otter", "maple", before]
    with serving(run.path, tmp_path / "users.sqlite") as client:
        assert ask(client, "ann", "river?") == "cloud otter"
