"""Pretrained models: their dialogues in their own template, runs that train them whole or by adapters, clear refusals."""

import json
import shutil

import pytest
import torch
from tiny import WORDS, tiny_config, write_tasks

from metakern import checkpoint
from metakern.chat import Chat, adapt
from metakern.cli import main
from metakern.config import Config, UserError
from metakern.dialogue.readers import DataError, Turn, read
from metakern.dialogue.tokenizer import IGNORE
from metakern.evaluate import evaluate
from metakern.run import Run
from metakern.trainer import StoppedError, train

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from metakern.dialogue.huggingface import TEMPLATE, ChatTokenizer, fingerprint, load_model  # noqa: E402

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)


def tiny_tokenizer(template=CHATML, **special):
    """A byte-level BPE of 300 tokens, as people publish them."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS) * 3, "user assistant system " * 3], trainer)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"} | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **special)


def make_model(folder, kind="llama", tokenizer=None, **changes):
    """A directory with a tiny pretrained model, as save_pretrained writes it."""
    torch.manual_seed(1)
    llama = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama |= {"num_key_value_heads": 1, "max_position_embeddings": 128}
    gpt2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 128}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=300, **ids, **{"llama": llama, "gpt2": gpt2}.get(kind, {}) | changes
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def hf_config(data, model, **changes):
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
def test_a_dialogue_is_what_the_template_makes_of_it(template, tmp_path):
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


def test_the_oldest_tokens_go_and_the_head_and_the_reply_stay(tmp_path):
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
    assert ids.count(chat.eos_id) == 3  # of the system, of ann, of bob


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}", "{% for m in messages %}{{ m['content'] }}{% endfor %}"]
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


def test_without_a_template_there_is_a_simple_one(tmp_path):
    chat = ChatTokenizer(tiny_tokenizer(None, bos_token=None), tmp_path)
    ids, _ = chat.encode_dialogue(TALK[:2], max_length=99)
    assert chat._tokenizer.decode(ids) == "user\nriver stone<|im_end|>\nassistant\ncloud<|im_end|>"
    chat.save(tmp_path / "run" / "tokenizer.json")
    again = ChatTokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert again._tokenizer.chat_template == TEMPLATE
    assert again.encode_dialogue(TALK) == chat.encode_dialogue(TALK)
    assert [file.suffix for file in (tmp_path / "run").iterdir() if file.is_dir()] == []


def test_templates_and_tokenizers_that_cannot_be_used(tmp_path):
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
    """The tensors and the state of a checkpoint, but for the time it took."""
    tensors, state = checkpoint.load(folder / "checkpoints", name)
    return tensors, {**state, "seconds": 0}


@pytest.mark.parametrize("changes", [{"lora": 0}, {}, {"pretrain_steps": 2, "algorithm": "fomaml"}])
def test_resume_goes_on_bit_for_bit(tmp_path, data, model, monkeypatch, changes):
    config = hf_config(data, model, **changes)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("metakern.trainer._Loop.step", stopping(3 + config.pretrain_steps))
        with pytest.raises(StoppedError, match="stopped at step 3 of train"):
            train(config, tmp_path / "cut")
    torch.manual_seed(99)
    train(config, tmp_path / "cut", resume=True)
    for name in ("last", "best", "pretrained"):
        whole, cut = (parts(tmp_path / run, name) for run in ("whole", "cut"))
        assert whole[1] == cut[1]
        assert whole[0].keys() == cut[0].keys()
        assert all(torch.equal(whole[0][key], cut[0][key]) for key in whole[0])


def stopping(at):
    """A step that asks for a stop, as Ctrl-C does, after `at` steps."""
    import os
    import signal

    from metakern.trainer import _Loop

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
    config = hf_config(data, folder, lora=lora, steps=30, eval_every=15, outer_lr=0.03, inner_lr=1.0)
    run = train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "validation_after" in line]
    assert last["validation_after"] < first["validation_after"] - 0.05
    assert last["validation_after"] < last["validation_before"]
    assert run.algorithm.plan.batching == "fold"
    names = checkpoint.module_tensors(run.model)
    assert all("lora_" in name for name in names) == bool(lora)
