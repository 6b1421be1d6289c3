"""Checkpoints: tensors in safetensors, everything else in JSON, both written atomically.

The checkpoint `NAME` of a folder is two files:

    NAME-<sha256>.safetensors   the tensors, in a file that is named after the first digits of its SHA-256
    NAME.json                   the state (step, scores, …), the digest of the tensors, and a digest over all of it

The tensors are written first. The new checkpoint replaces the old one at the moment when its JSON does. A crash or a
full disk leaves one of the two, complete. The one before is kept as `NAME-before.json` with its tensors. It is loaded,
and a line on the standard error says so, if a file of `NAME` is missing or damaged.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from metakern import io
from metakern.errors import CheckpointError
from metakern.optim.base import ByName

__all__ = ["check_tensors", "exists", "load", "load_module", "module_tensors", "save", "state_of", "sweep"]

LARGEST_STATE = 2**24  # bytes of a JSON file
SHA256 = re.compile("[0-9a-f]{64}")


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and `state` as the checkpoint `name` of `folder`; the one that was there becomes the one before.

    Args:
        folder: Made if it does not exist.
        name: What the names of the files begin with, such as "last".
        tensors: Any tensors by name; they are saved from the CPU and need not be contiguous.
        state: Values that JSON can hold, under other keys than "sha256" and "digest".

    Raises:
        CheckpointError: If a file can't be written; the older checkpoint stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder), "last", {"x": torch.arange(3)}, {"step": 5})
    ...     load(Path(folder), "last")
    ({'x': tensor([0, 1, 2])}, {'step': 5})
    """
    data = to_bytes({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    io.write(folder / _tensors_of(name, sha256), data)
    record = {"sha256": sha256, **state}
    path = folder / f"{name}.json"
    if _sha256(path) not in ("", sha256):
        io.write(_before(folder, name), io.read(path))
    io.write(path, json.dumps({**record, "digest": _digest(record)}, indent=1).encode())
    _sweep(folder, name)


def sweep(folder: Path) -> None:
    """Remove tensors that belong to no checkpoint of a folder, such as a process leaves that is killed after a save."""
    for name in {path.name.removesuffix(".json").removesuffix("-before") for path in folder.glob("*.json")}:
        _sweep(folder, name)


def _sweep(folder: Path, name: str) -> None:
    records = folder / f"{name}.json", _before(folder, name)
    if any(path.exists() and not _sha256(path) for path in records):
        return  # what belongs to a damaged file can't be told
    kept = {_tensors_of(name, _sha256(path)) for path in records}
    for old in folder.glob(f"{name}-{'[0-9a-f]' * 16}.safetensors"):  # not what somebody else has put there
        if old.name not in kept:
            with suppress(OSError):  # a folder that can't be written may still be read
                old.unlink()


def load(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the state of the checkpoint `name` of `folder`, or of the one before.

    Raises:
        CheckpointError: If both are missing, damaged or unreadable.
    """
    try:
        return _load(folder, name, folder / f"{name}.json")
    except CheckpointError as error:
        try:
            found = _load(folder, name, _before(folder, name))
        except CheckpointError:
            raise error from None
        what = str(error).partition(";")[0]
        print(f"metakern: {what}; the checkpoint before, of step {found[1].get('step')}, is used", file=sys.stderr)
        return found


def state_of(folder: Path, name: str) -> dict[str, Any]:
    """Return the state of the checkpoint `name` of `folder`, or of the one before, without reading the tensors.

    Raises:
        CheckpointError: If both are missing, damaged or unreadable.
    """
    try:
        record = _record(folder / f"{name}.json")
    except CheckpointError as error:
        try:
            record = _record(_before(folder, name))
        except CheckpointError:
            raise error from None
    return {key: value for key, value in record.items() if key != "sha256"}


def exists(folder: Path, name: str) -> bool:
    """Whether a folder holds the checkpoint `name`, or the one before, in whatever state."""
    return (folder / f"{name}.json").exists() or _before(folder, name).exists()


def _before(folder: Path, name: str) -> Path:
    return folder / f"{name}-before.json"


def _tensors_of(name: str, sha256: str) -> str:
    return f"{name}-{sha256[:16]}.safetensors"


def _digest(record: Mapping[str, Any]) -> str:
    """Return the digest over a record without its digest; the order of keys and the layout do not matter."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> dict[str, Any]:
    """Return what a JSON file of `save` holds, without its digest, which is checked."""
    try:
        record = json.loads(io.read(path, LARGEST_STATE))
        if record.pop("digest") != _digest(record) or not SHA256.fullmatch(record["sha256"]):
            raise ValueError
        return record
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise _damaged(path) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _sha256(path: Path) -> str:
    """Return the digest of the tensors that a JSON file belongs to, or "" if the file is missing or damaged."""
    try:
        return str(_record(path)["sha256"])
    except CheckpointError:
        return ""


def _load(folder: Path, name: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state of the checkpoint `name` whose JSON file is `path`."""
    record = _record(path)
    file = folder / _tensors_of(name, record["sha256"])
    try:
        data = io.read(file)
        if hashlib.sha256(data).hexdigest() != record.pop("sha256"):
            raise _damaged(file)
        return from_bytes(data), record
    except FileNotFoundError:
        raise _missing(file) from None
    except (SafetensorError, KeyError, ValueError, RuntimeError):  # the last three for dtypes that PyTorch lacks
        raise _damaged(file) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: no such checkpoint; is {path.parent.parent} the folder of a run?")


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: is cut short or damaged; use another checkpoint or train again")


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters and the persistent buffers of `module` by name; a shared one has one name."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    passing = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return trainable | {name: x for name, x in module.named_buffers() if name not in passing}


@torch.no_grad()
def load_module(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the parameters and buffers of `module`.

    Args:
        module: Its `module_tensors` must have the names, shapes and dtypes of `tensors`.
        tensors: What `module_tensors` gave for the saved module.
        source: The checkpoint, for error messages.

    Raises:
        CheckpointError: If a name is missing or unknown, a shape or a dtype differs, or a parameter is not finite.
    """
    own, tensors = module_tensors(module), dict(tensors)
    for prefix, part in module.named_modules():
        if isinstance(part, ByName):
            try:
                part.name_list(tensors, f"{prefix}.")
            except ValueError as error:
                raise CheckpointError(f"{source}: {error}") from None
    check_tensors(own, tensors, source)
    for name, value in own.items():
        value.copy_(tensors[name])


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise a CheckpointError unless `tensors` have the names, shapes and dtypes of `own`, and parameters are finite.

    Args:
        own: The tensors of the model or optimizer; those that are no parameters may have any values.
        tensors: Those of the checkpoint.
        source: The checkpoint, for error messages.
    """
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own:
            raise CheckpointError(f"{source}: {name} is not a tensor of this config")
        if name not in tensors:
            raise CheckpointError(f"{source}: {name} is missing")
        for what in ("shape", "dtype"):
            wanted, got = (getattr(x[name], what) for x in (own, tensors))
            if wanted != got:
                shown = [tuple(x) if what == "shape" else x for x in (wanted, got)]
                raise CheckpointError(f"{source}: {name} must be {shown[0]} for this config, got {shown[1]}")
        if isinstance(own[name], nn.Parameter) and not tensors[name].isfinite().all():
            raise CheckpointError(f"{source}: {name} must be finite, got infinities or NaN; use another checkpoint")
