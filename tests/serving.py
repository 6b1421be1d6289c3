"""A server of a small run in this process, for the tests of `metakern serve`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from metakern.dialogue.run import Run
from metakern.serve.app import create_app
from metakern.serve.service import Service, Settings
from metakern.serve.store import Store

CHAT = "/v1/chat/completions"


@contextmanager
def serving(folder: Path, store: Path, **settings: object) -> Iterator[TestClient]:
    """Serve the run in `folder`, with what users teach in `store`."""
    service = Service(Run.open(folder), Store(store), Settings(**settings))
    with TestClient(create_app(service), "http://localhost", raise_server_exceptions=False) as client:
        yield client


def teach(client: TestClient, user: str, *pairs: tuple[str, str]) -> list[dict]:
    """Teach pairs to a user's model, and return the exchanges."""
    body = {"exchanges": [{"say": say, "answer": answer} for say, answer in pairs]}
    answer = client.post(f"/v1/users/{user}/exchanges", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]


def adapted(client: TestClient, user: str) -> dict:
    """Wait for the adaptation of a user's model, and return its end."""
    return until(lambda: (now := client.get(f"/v1/users/{user}/adapt").json())["state"] in ("ready", "failed") and now)


def until(found: Callable) -> object:
    """Return what `found` returns as soon as that is true, within 30 seconds."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError("nothing came in 30 seconds")


def ask(client: TestClient, user: str, text: str, **more: object) -> str:
    """Return the likeliest reply to a message."""
    body = {"model": "run", "user": user, "messages": [{"role": "user", "content": text}], "temperature": 0}
    answer = client.post(CHAT, json=body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]
