"""The store: its limits, its versions, damaged files, and what is on the disk."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing

import pytest
import torch

from metakern.errors import UserError
from metakern.serve.store import MIGRATIONS, LimitError, Store


@pytest.fixture
def store(tmp_path):
    with closing(Store(tmp_path / "users.sqlite")) as store:
        yield store


def test_exchanges_over_the_limit_are_refused_as_a_whole(store):
    store.teach("ann", [("a", "b")], limit=2)
    with pytest.raises(LimitError):
        store.teach("ann", [("c", "d"), ("e", "f")], limit=2)
    assert [exchange.say for exchange in store.exchanges("ann")] == ["a"]
    assert store.user("ann").revision == 1


def test_weights_are_adopted_for_a_revision_and_replace_older_ones(store):
    store.teach("ann", [("a", "b")])
    before = store.user("ann")
    store.teach("ann", [("c", "d")])
    assert store.adopt(before, {"x": torch.arange(3.0)})
    assert (store.user("ann").adapted, store.user("ann").revision) == (1, 2)
    assert store.weights(store.user("ann"))["x"].tolist() == [0, 1, 2]
    assert store.adopt(store.user("ann"), {"x": torch.ones(3)})
    assert len(list(store.adapters.iterdir())) == 1
    (store.adapters / "orphan.safetensors").write_bytes(b"")
    assert store.open_for("run") == ["ann"]  # no run was served before
    assert list(store.adapters.iterdir()) == []
    store.delete("ann")
    assert not store.adopt(before, {"x": torch.ones(3)})
    assert list(store.adapters.iterdir()) == []


def test_a_new_user_of_the_same_name_has_another_number(store):
    store.teach("ann", [("a", "b")])
    number, exchange = store.user("ann").id, store.exchanges("ann")[0].id
    store.delete("ann")
    store.teach("ann", [("a", "b")])
    assert store.user("ann").id > number
    assert store.exchanges("ann")[0].id > exchange


def test_files_are_for_the_owner_alone(store):
    store.teach("ann", [("a", "b")])
    for path in store.path.parent.glob("users.sqlite*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_files_and_later_versions_are_refused(tmp_path):
    (tmp_path / "text").write_text("not a database, but long enough to look at " * 30)
    with pytest.raises(UserError, match="is not a store of metakern serve, or is damaged"):
        Store(tmp_path / "text")
    with closing(sqlite3.connect(tmp_path / "later")) as database:
        database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(UserError, match="which a later metakern wrote: update metakern"):
        Store(tmp_path / "later")
    with pytest.raises(UserError, match="cannot be opened"):
        Store(tmp_path)
