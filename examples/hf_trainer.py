"""Hugging Face's Trainer: a subclass whose loss is the meta-gradient's, for a causal language model.

pip install transformers accelerate
python examples/hf_trainer.py
"""

import tempfile

import torch
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import metakern as mk


class MetaTrainer(Trainer):
    """Its examples are tasks: token ids, [sequences, length]; the first half is support, the second is query."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, data_collator=torch.utils.data.default_collate, **kwargs)
        self.maml = mk.MAML(self.model, mk.losses.causal_lm, inner=mk.optim.SGD(lr=0.5), steps=2)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        (tokens,) = inputs
        support, query = ({"input_ids": half, "labels": half} for half in tokens.chunk(2, dim=1))
        return self.maml(support, query)


def counting(tasks: int, vocabulary: int = 16) -> torch.Tensor:
    """A task counts in steps of its own: 8 sequences of 12 tokens."""
    start, step = torch.randint(vocabulary, (tasks, 8, 1)), torch.randint(1, vocabulary, (tasks, 1, 1))
    return (start + step * torch.arange(12)) % vocabulary


def main(steps: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    mk.patch(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=steps // 3,
            report_to=[], use_cpu=True, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = MetaTrainer(model=model, args=arguments, train_dataset=TensorDataset(counting(64)))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


if __name__ == "__main__":
    first, last = main()
    print(f"query loss after two inner steps: {first:.2f} -> {last:.2f}")
