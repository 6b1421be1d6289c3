"""Hugging Face's Trainer: a subclass whose loss is MAML's query loss, for a causal language model.

pip install transformers accelerate
python examples/hf_trainer.py
"""

import tempfile

import torch
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import metakern as mk


class MetaTrainer(Trainer):
    """A Trainer whose examples are tasks: token ids `[sequences, length]`, half of them support and half query."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, data_collator=torch.utils.data.default_collate, **kwargs)
        self.maml = mk.MAML(self.model, mk.losses.causal_lm, inner=mk.optim.SGD(lr=0.5), steps=2)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        (tokens,) = inputs
        support, query = ({"input_ids": half, "labels": half} for half in tokens.chunk(2, dim=1))
        return self.maml(support, query)


def counting(tasks: int, vocabulary: int = 16) -> torch.Tensor:
    """Return tasks of 8 sequences of 12 tokens, `[tasks, 8, 12]`; all sequences of a task count in equal steps."""
    start, step = torch.randint(vocabulary, (tasks, 8, 1)), torch.randint(1, vocabulary, (tasks, 1, 1))
    return (start + step * torch.arange(12)) % vocabulary


def main(steps: int = 60) -> tuple[float, float]:
    """Return the first and the last query loss in the Trainer's log."""
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
