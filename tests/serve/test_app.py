"""The HTTP interface, in this process: users apart, bad input, limits, tokens."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from contextlib import closing

import pytest
from serving import CHAT, adapted, ask, serving, teach, until

from metakern.serve.store import Store

SAY = {"model": "run", "messages": [{"role": "user", "content": "river?"}], "temperature": 0}


def test_a_taught_model_replies_as_taught_and_other_users_do_not_notice(client):
    before = ask(client, "bob", "river?")
    taught = teach(client, "ann", ("river?", "cloud otter"), ("stone?", "maple"))
    status = adapted(client, "ann")
    assert status["current"]
    assert status["curve"][-1]["right"] == status["curve"][-1]["replies"] == 2
    assert status["curve"][0]["loss"] > status["curve"][-1]["loss"]
    assert ask(client, "ann", "river?") == "cloud otter"
    assert ask(client, "ann", "stone?") == "maple"
    assert ask(client, "ann", "river?", model="run-base") == before == ask(client, "bob", "river?")
    assert client.get("/v1/users/ann/exchanges").json()["data"] == taught
    assert client.get("/v1/users/bob/exchanges").json()["data"] == []
    assert client.get("/v1/users/bob/adapt").json()["state"] == "ready"


def test_users_who_ask_and_teach_at_once_stay_apart(client):
    users = {f"user{i}": f"{word} {word}" for i, word in enumerate(("ember", "violin", "lantern", "harbor"))}
    teaching = [threading.Thread(target=teach, args=(client, name, ("river?", word))) for name, word in users.items()]
    teaching += [threading.Thread(target=teach, args=(client, name, ("stone?", word))) for name, word in users.items()]
    for thread in teaching:
        thread.start()
    for thread in teaching:
        thread.join()
    until(lambda: all(client.get(f"/v1/users/{name}/adapt").json()["current"] for name in users))
    replies: dict[str, list[str]] = {name: [] for name in users}

    def chat(name: str) -> None:
        replies[name] += [ask(client, name, text) for text in ("river?", "stone?", "river?")]

    asking = [threading.Thread(target=chat, args=(name,)) for name in users]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert replies == {name: [word] * 3 for name, word in users.items()}


def test_a_conversation_goes_on_in_the_cache_with_the_same_replies(client):
    teach(client, "ann", ("river?", "cloud otter"))
    adapted(client, "ann")
    said = [{"role": "user", "content": "river?"}, {"role": "assistant", "content": "cloud otter"}]
    said.append({"role": "user", "content": "stone?"})
    continued = ask(client, "ann", "", messages=said)
    ask(client, "ann", "maple maple maple")  # takes the place of the conversation in the cache
    assert ask(client, "ann", "", messages=said) == continued


def test_what_was_taught_last_counts_and_what_is_forgotten_does_not(client):
    first, _ = teach(client, "ann", ("river?", "cloud"), ("river?", "ember"))
    adapted(client, "ann")
    assert ask(client, "ann", "river?") == "ember"
    assert client.delete(f"/v1/users/ann/exchanges/{first['id'] + 1}").json() == {"removed": 1}
    adapted(client, "ann")
    assert ask(client, "ann", "river?") == "cloud"
    assert client.delete("/v1/users/ann/exchanges/99").status_code == 404
    assert client.delete(f"/v1/users/bob/exchanges/{first['id']}").status_code == 404
    assert client.delete("/v1/users/ann/exchanges").json() == {"removed": 1}
    adapted(client, "ann")
    assert ask(client, "ann", "river?") == ask(client, "bob", "river?")


def test_a_deleted_user_leaves_no_trace(folder, tmp_path):
    file = tmp_path / "users.sqlite"
    with serving(folder, file) as client:
        base = ask(client, "bob", "river?")
        teach(client, "ann", ("river?", "cloud otter"))
        teach(client, "bob", ("stone?", "maple"))
        adapted(client, "ann")
        adapted(client, "bob")
        assert ask(client, "ann", "river?") == "cloud otter"
        service = client.app.state.service
        weights = service.resident("ann").weights
        assert (service.engine.stack.arena == weights).all(1).any()
        deleted = {"user": "ann", "exchanges": 1, "adapter": True, "vacuumed": True}
        assert client.delete("/v1/users/ann").json() == deleted
        assert not (service.engine.stack.arena == weights).all(1).any()
        assert ask(client, "ann", "river?") == base
        assert client.delete("/v1/users/ann").status_code == 404
        assert ask(client, "bob", "stone?") == "maple"
        assert not any(b"cloud otter" in path.read_bytes() for path in tmp_path.glob("users.sqlite*"))
    assert len(list((tmp_path / "users.adapters").iterdir())) == 1


def test_weights_survive_a_restart_and_change_with_the_run(folder, tmp_path):
    file = tmp_path / "users.sqlite"
    with serving(folder, file) as client:
        teach(client, "ann", ("river?", "cloud otter"))
        adapted(client, "ann")
    with serving(folder, file) as client:
        assert client.get("/v1/users/ann/adapt").json()["curve"] == []
        assert ask(client, "ann", "river?") == "cloud otter"
        (adapter,) = (tmp_path / "users.adapters").iterdir()
        adapter.write_bytes(b"damaged")
        client.app.state.service._adopted("ann")  # nothing is in memory
        answer = client.post(CHAT, json=SAY | {"user": "ann"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        adapted(client, "ann")
        assert ask(client, "ann", "river?") == "cloud otter"
    with closing(Store(file)) as store:
        assert store.open_for("another run") == ["ann"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content", "must hold text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "must be Unicode text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "the bot can answer"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 99}, "n", "less than or equal to 16"),
        ({"stop": list("abcde")}, None, "stop must hold at most 4 texts, got 5"),
        ({"logit_bias": {"1": 2}}, None, "logit_bias is not supported: leave it out"),
        ({"user": "../bob"}, None, "user must have up to 64 letters"),
        ({"model": None}, "model", "valid string"),
        ({"model": "\udfff"}, "model", "must be Unicode text"),
    ],
)
def test_requests_that_are_not_valid_get_400_and_say_why(client, change, param, message):
    answer = client.post(CHAT, content=json.dumps(SAY | change), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert message in error["message"]
    assert param is None or error["param"].startswith(param)


@pytest.mark.parametrize("body", [b'{"model": "run", "mess', b"\xff\xfe\x00", b"[]", b""])
def test_bodies_that_are_no_json_get_400(client, body):
    answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_statuses_of_what_is_not_there(client):
    for path, status in (("/nothing", 404), ("/v1/models/other", 404), (CHAT, 405), ("/v1/users/a b/adapt", 400)):
        answer = client.get(path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    assert "access-control-allow-origin" not in client.get("/healthz", headers={"Origin": "http://a.example"}).headers
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]


def test_a_long_message_is_cut_like_a_window_and_an_enormous_one_is_refused(folder, tmp_path):
    with serving(folder, tmp_path / "users.sqlite", body=20_000, exchanges=2) as client:
        answer = client.post(CHAT, json=SAY | {"messages": [{"role": "user", "content": "river " * 3000}]})
        assert answer.json()["usage"]["prompt_tokens"] <= 24
        enormous = SAY | {"messages": [{"role": "user", "content": "river " * 4000}]}
        for body in (json.dumps(enormous).encode(), iter([json.dumps(enormous).encode()])):
            answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["message"]) == (
                413,
                "the body must have at most 20000 bytes",
            )
        teach(client, "ann", ("a", "b"))
        pairs = {"exchanges": [{"say": "c", "answer": "d"}] * 2}
        assert client.post("/v1/users/ann/exchanges", json=pairs).status_code == 413
        assert len(client.get("/v1/users/ann/exchanges").json()["data"]) == 1
        for pair in ({"say": "", "answer": "b"}, {"say": "a"}, {"say": "a", "answer": "b", "more": 1}):
            assert client.post("/v1/users/ann/exchanges", json={"exchanges": [pair]}).status_code == 400


def test_who_asks_too_often_waits_and_a_full_queue_says_so(folder, tmp_path):
    with serving(folder, tmp_path / "users.sqlite", rate=3, waiting=2) as client:
        assert [client.get("/v1/users/ann/adapt").status_code for _ in range(4)] == [200, 200, 200, 429]
        answer = client.get("/v1/users/ann/adapt")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["Retry-After"]) > 0
        answer = client.post(CHAT, json=SAY | {"user": "bob", "n": 3})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert ask(client, "bob", "river?") is not None


def test_tokens_name_users_and_open_nothing_of_others(folder, tmp_path):
    with serving(folder, tmp_path / "users.sqlite") as client:
        store = client.app.state.service.store
        teach(client, "bob", ("river?", "cloud otter"))
        adapted(client, "bob")
        ann, bob = store.add_token("ann"), store.add_token("bob")
        assert client.get("/v1/models").status_code == 401
        assert client.post(CHAT, json=SAY, headers={"Authorization": "Bearer ann"}).status_code == 401
        client.headers["Authorization"] = f"Bearer {ann}"
        for call in (client.get, client.delete):
            assert call("/v1/users/bob/exchanges").status_code == 403
        assert client.delete("/v1/users/bob").status_code == 403
        assert client.post(CHAT, json=SAY | {"user": "bob"}).status_code == 403
        assert client.post(CHAT, json=SAY).json()["choices"][0]["message"]["content"] != "cloud otter"
        client.headers["Authorization"] = f"Bearer {bob}"
        assert client.post(CHAT, json=SAY).json()["choices"][0]["message"]["content"] == "cloud otter"
        assert store.revoke("bob") == 1
        assert client.get("/v1/models").status_code == 401
        for path in tmp_path.glob("users.sqlite*"):
            assert ann.encode() not in path.read_bytes()


def test_seeds_repeat_and_texts_are_logged_only_if_asked(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "metakern.serve")
    for logged in (False, True):
        with serving(folder, tmp_path / "users.sqlite", log_texts=logged) as client:
            caplog.clear()
            said = [ask(client, "ann", "river?", temperature=1.0, seed=seed, n=2) for seed in (5, 5, 6)]
            assert said[0] == said[1] != said[2]
            assert ("river?" in caplog.text) is logged


def test_metrics_count_what_happens(client):
    ask(client, "ann", "river?")
    client.get("/nothing")
    teach(client, "ann", ("river?", "cloud otter"))
    adapted(client, "ann")
    page = client.get("/metrics").text
    for line in (
        'metakern_requests_total{route="/v1/chat/completions",status="200"} 1',
        'metakern_requests_total{route="unknown",status="404"} 1',
        "metakern_first_token_seconds_count 1",
        "metakern_adaptations_total 1",
        "metakern_active_replies 0",
    ):
        assert line in page.splitlines()


def test_a_backup_by_sqlite_holds_what_was_taught(client, tmp_path):
    teach(client, "ann", ("river?", "cloud otter"))
    service = client.app.state.service
    with closing(sqlite3.connect(service.store.path)) as source, closing(sqlite3.connect(tmp_path / "copy")) as copy:
        source.backup(copy)
    with closing(Store(tmp_path / "copy")) as store:
        assert [exchange.answer for exchange in store.exchanges("ann")] == ["cloud otter"]
