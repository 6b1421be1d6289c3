"""Lightning: MAML's query loss is an ordinary loss, so Lightning's Trainer does the rest.

pip install lightning
python examples/lightning_module.py
"""

import lightning
import torch
from plain_loop import loss, sines
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metakern as mk


class MetaLearner(lightning.LightningModule):
    """A module whose batches are tasks: x and y, `[tasks, points, 1]`; the first 10 points are support."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
        self.maml = mk.MAML(self.model, loss, inner=mk.optim.SGD(lr=0.02, learn_lr=True), steps=3)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return self.maml((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, y = batch
        curve = self.maml.evaluate((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]), steps=(0, 3))
        self.log_dict({"before": curve[0].mean(), "adapted": curve[1].mean()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 15) -> list[dict[str, float]]:
    """Return the validation losses, unadapted and adapted, before and after training."""
    lightning.seed_everything(0, verbose=False)
    training, validation = (DataLoader(TensorDataset(*sines(tasks, 20)), batch_size=16) for tasks in (320, 64))
    learner = MetaLearner()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", gradient_clip_val=10.0, **quiet)
    before = trainer.validate(learner, validation, verbose=False)
    trainer.fit(learner, training)
    return [*before, *trainer.validate(learner, validation, verbose=False)]


if __name__ == "__main__":
    for results in main():
        print({name: round(value, 2) for name, value in results.items()})
