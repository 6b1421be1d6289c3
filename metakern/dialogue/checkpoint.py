"""Checkpoints: tensors in safetensors, everything else in JSON, both written atomically.

The checkpoint `NAME` of a folder is two files:

    NAME-<digest>.safetensors   the tensors
    NAME.json                   the state (step, scores, …), and the name and the digest of the tensors' file

The tensors are written first, into a file that is named after their digest. The new checkpoint replaces the old one
at the moment when its JSON does. A crash or a full disk leaves one of the two, complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from metakern.errors import CheckpointError
from metakern.io import write
from metakern.optim.base import ByName

__all__ = ["load", "load_module", "module_tensors", "save"]


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and `state` as the checkpoint `name` of `folder`, in place of an older one.

    Args:
        folder: Made if it does not exist.
        name: What the names of the files begin with, such as "last".
        tensors: Any tensors by name; they are saved from the CPU and need not be contiguous.
        state: Values that JSON can hold, under other keys than "tensors" and "sha256".

    Raises:
        CheckpointError: If a file can't be written; the older checkpoint stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder), "last", {"x": torch.arange(3)}, {"step": 5})
    ...     load(Path(folder), "last")
    ({'x': tensor([0, 1, 2])}, {'step': 5})
    """
    data = to_bytes({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = folder / f"{name}-{digest[:16]}.safetensors"
    write(file, data)
    write(folder / f"{name}.json", json.dumps({"tensors": file.name, "sha256": digest, **state}, indent=1).encode())
    for old in folder.glob(f"{name}-*.safetensors"):
        if old != file:
            old.unlink(missing_ok=True)


def load(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the state of the checkpoint `name` of `folder`.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or unreadable.
    """
    path = folder / f"{name}.json"
    try:
        state = json.loads(path.read_bytes())
        path = folder / state.pop("tensors")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != state.pop("sha256"):
            raise ValueError
        return from_bytes(data), state
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; is {folder.parent} the folder of a run?") from None
    except (ValueError, KeyError, AttributeError, TypeError, SafetensorError):
        raise CheckpointError(f"{path}: is cut short or damaged; use another checkpoint or train again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters and the persistent buffers of `module` by name; a shared one has one name."""
    kept = module.state_dict(keep_vars=True).keys()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return trainable | {name: x for name, x in module.named_buffers() if name in kept}


@torch.no_grad()
def load_module(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the parameters and buffers of `module`.

    Args:
        module: Its `module_tensors` must have the names and shapes of `tensors`.
        tensors: What `module_tensors` gave for the saved module.
        source: The checkpoint, for error messages.

    Raises:
        CheckpointError: If a name is missing or unknown, or a shape differs.
    """
    own, tensors = module_tensors(module), dict(tensors)
    for prefix, part in module.named_modules():
        if isinstance(part, ByName):
            try:
                part.name_list(tensors, f"{prefix}.")
            except ValueError as error:
                raise CheckpointError(f"{source}: {error}") from None
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own:
            raise CheckpointError(f"{source}: {name} is not a tensor of this config")
        if name not in tensors:
            raise CheckpointError(f"{source}: {name} is missing")
        if tensors[name].shape != own[name].shape:
            shapes = [tuple(x[name].shape) for x in (own, tensors)]
            raise CheckpointError(f"{source}: {name} must be {shapes[0]} for this config, got {shapes[1]}")
    for name, value in own.items():
        value.copy_(tensors[name])
