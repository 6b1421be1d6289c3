"""A small run that learns quickly, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import serving
from starlette.testclient import TestClient
from tiny import tiny_config, write_tasks

from metakern.dialogue.trainer import train


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("serve")
    rates = {"inner": "adam", "inner_lr": 0.03, "learn_lr": False, "capture": False}
    sizes = {"model": "gpt", "width": 32, "max_length": 48, "steps": 1, "pretrain_steps": 1}
    train(tiny_config(write_tasks(folder / "data"), **sizes, **rates), folder / "run")
    return folder / "run"


@pytest.fixture
def client(folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    with serving(folder, tmp_path / "users.sqlite") as client:
        yield client
