"""Tasks as the batches of a Lightning trainer."""

from __future__ import annotations

from typing import Any

from metakern.compat.learn2learn._lightning import pl


class _Epoch:
    """`length` tasks that are sampled as they are taken."""

    def __init__(self, tasks: Any, length: int) -> None:
        self.tasks, self.length = tasks, length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.tasks.sample()

    def __len__(self) -> int:
        return self.length


class EpisodicBatcher(pl.LightningDataModule):
    """Epochs of `epoch_length` tasks, by `sample()` of the three sets of tasks.

    Validation is on the training tasks, and the test on those of validation, where these are not given.
    """

    def __init__(
        self, train_tasks: Any, validation_tasks: Any = None, test_tasks: Any = None, epoch_length: int = 1
    ) -> None:
        super().__init__()
        self.train_tasks = train_tasks
        self.validation_tasks = train_tasks if validation_tasks is None else validation_tasks
        self.test_tasks = self.validation_tasks if test_tasks is None else test_tasks
        self.epoch_length = epoch_length

    @staticmethod
    def epochify(taskset: Any, epoch_length: int) -> Any:
        return _Epoch(taskset, epoch_length)

    def train_dataloader(self) -> Any:
        return self.epochify(self.train_tasks, self.epoch_length)

    def val_dataloader(self) -> Any:
        return self.epochify(self.validation_tasks, self.epoch_length)

    def test_dataloader(self) -> Any:
        return self.epochify(self.test_tasks, self.epoch_length)
