"""A small run that learns quickly, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import serving
from starlette.testclient import TestClient
from tiny import untrained_run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return untrained_run(tmp_path_factory.mktemp("serve") / "run", model="gpt").path


@pytest.fixture
def client(folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    with serving(folder, tmp_path / "users.sqlite") as client:
        yield client
