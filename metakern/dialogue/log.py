"""The log of a run: log.jsonl, TensorBoard and what the user sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from metakern.dialogue import processes
from metakern.dialogue.display import Display
from metakern.errors import CheckpointError

__all__ = ["Log"]


class Log(Display):
    """The log of a run: numbers in log.jsonl and TensorBoard, and the display of the progress.

    Of several processes, the first one alone has files.
    """

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        super().__init__(quiet)
        self.writes = processes.is_first()
        if self.writes:
            self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(str(folder / "tensorboard"))
        self.losses, self.fresh = "", False

    def __exit__(self, *_: Any) -> None:
        super().__exit__()
        if self.writes:
            self.file.close()
            self.board.close()

    def __call__(self, phase: str, step: int, **numbers: float) -> None:
        """Write the numbers of a step to log.jsonl and TensorBoard."""
        if self.writes:
            try:
                self.file.write(json.dumps({"phase": phase, "step": step, **numbers}) + "\n")
                self.file.flush()
            except OSError as error:
                raise CheckpointError(f"{self.file.name}: cannot write: {error.strerror}") from None
            for name, value in numbers.items():
                self.board.add_scalar(f"{phase}/{name}", value, step)
        if "before" in numbers:
            self.losses, self.fresh = f"query loss {numbers['before']:.3f} -> {numbers['after']:.3f}", True
        elif "loss" in numbers:
            self.losses, self.fresh = f"loss {numbers['loss']:.3f}", True

    def step(self, phase: str, step: int, steps: int, seconds: float) -> None:
        """Show how many of a phase's steps are done, the speed, the time left and the losses logged last."""
        rate = step / max(seconds, 1e-9)
        minutes, rest = divmod(round((steps - step) / rate), 60)
        text = f"{step}/{steps}  {rate:.1f} steps/s  {minutes}:{rest:02d} left  {self.losses}"
        self.progress(phase, min(1.0, step / steps), text, line=self.fresh)
        self.fresh = False
