"""Tasks as the batches of a Lightning trainer."""

from __future__ import annotations

from typing import Any

from metakern.compat.learn2learn._lightning import pl


class _Epoch:
    """A sequence of `length` tasks, each sampled when it is read."""

    def __init__(self, tasks: Any, length: int) -> None:
        self.tasks, self.length = tasks, length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.tasks.sample()

    def __len__(self) -> int:
        return self.length


class EpisodicBatcher(pl.LightningDataModule):
    """A Lightning data module whose batches are tasks, sampled by `sample()` of a set of tasks.

    Args:
        train_tasks: The set of training tasks, any object with `sample()`.
        validation_tasks: That of validation tasks; by default `train_tasks`.
        test_tasks: That of test tasks; by default the validation tasks.
        epoch_length: The number of tasks in an epoch.

    >>> import torch
    >>> from metakern.compat.learn2learn.utils.lightning import EpisodicBatcher
    >>> class Tasks:
    ...     def sample(self):
    ...         return torch.randn(6, 4), torch.arange(3).repeat_interleave(2)
    >>> data, labels = EpisodicBatcher(Tasks(), epoch_length=10).train_dataloader()[0]
    >>> data.shape, labels.shape
    (torch.Size([6, 4]), torch.Size([6]))
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
