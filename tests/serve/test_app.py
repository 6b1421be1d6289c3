"""The HTTP interface, in this process."""

from serving import adapted, ask, teach


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
