"""Tiny models of Hugging Face with tokenizers and chat templates, in folders as save_pretrained writes them."""

import pytest
import torch
from tiny import WORDS

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)


def tiny_tokenizer(template=CHATML, **special):
    """Return a byte-level BPE tokenizer of transformers with 300 tokens and a chat template."""
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
    """Write a tiny model and its tokenizer to a folder by save_pretrained; return the folder."""
    torch.manual_seed(1)
    llama = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama |= {"num_key_value_heads": 1, "max_position_embeddings": 128}
    gpt2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 128}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    ids |= {"initializer_range": 0.3}  # large enough for adapters to matter
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=300, **ids, **{"llama": llama, "gpt2": gpt2}.get(kind, {}) | changes
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder
