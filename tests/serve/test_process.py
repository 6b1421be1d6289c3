"""The command `metakern serve` as a process: clients of others, a kill, a restart, an orderly end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from serving import adapted, ask, teach, until

from metakern.cli import main


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start `metakern serve`; give the process and its address."""
    command = [sys.executable, "-m", "metakern", "serve", str(folder), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            found = re.search(r"http://\S+:\d+", line)
            assert found, line + server.stderr.read()
            yield server, found[0]
        finally:
            server.kill()


def test_other_clients_work_and_a_kill_loses_nothing(folder, tmp_path):
    store = str(tmp_path / "users.sqlite")
    with process(folder, "--store", store, "--rows", "1") as (server, address):
        with httpx.Client(base_url=address, timeout=60) as web:
            teach(web, "ann", ("river?", "cloud otter"))
            assert adapted(web, "ann")["current"]
            check_openai(address)
            check_langchain(address)
            check_a_client_that_goes(web)
            taught = teach(web, "ann", ("stone?", "maple"))
        server.send_signal(signal.SIGKILL)
        server.wait()
    with process(folder, "--store", store) as (server, address), httpx.Client(base_url=address, timeout=60) as web:
        assert web.get("/v1/users/ann/exchanges").json()["data"][1:] == taught
        assert adapted(web, "ann")["current"]
        assert (ask(web, "ann", "river?"), ask(web, "ann", "stone?")) == ("cloud otter", "maple")
        assert main(["serve", str(folder), "--store", store, "--port", "0"]) == 2  # it is served already
        check_docs(address, store)
        check_end(server, web)


def check_openai(address: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="ann", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["run", "run-base"]
        say = {"model": "run", "messages": [{"role": "user", "content": "river?"}], "temperature": 0}
        whole = client.chat.completions.create(**say, seed=1, max_tokens=40)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("cloud otter", "stop")
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 4
        pieces = list(client.chat.completions.create(**say, n=2, stream=True, stream_options={"include_usage": True}))
        for i in range(2):
            said = [piece.choices[0] for piece in pieces if piece.choices and piece.choices[0].index == i]
            assert "".join(choice.delta.content or "" for choice in said) == "cloud otter"
            assert [choice.finish_reason for choice in said if choice.finish_reason] == ["stop"]
            assert len(said) > 3
        assert pieces[-1].usage.completion_tokens == 2 * whole.usage.completion_tokens
        old = client.completions.create(model="run", prompt=["river?", "river?"], temperature=0, stop=" otter")
        assert [choice.text for choice in old.choices] == ["cloud", "cloud"]
        with pytest.raises(openai.NotFoundError, match="model must be run or run-base, got 'gpt-4'"):
            client.chat.completions.create(**say | {"model": "gpt-4"})
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            client.chat.completions.create(**say, tools=[{"type": "function", "function": {"name": "f"}}])


def check_langchain(address: str) -> None:
    model = ChatOpenAI(base_url=f"{address}/v1", api_key="ann", model="run", temperature=0, max_retries=0)
    assert model.invoke("river?").content == "cloud otter"
    assert "".join(piece.content for piece in model.stream("river?")) == "cloud otter"


def check_a_client_that_goes(web: httpx.Client) -> None:
    def metric(name: str) -> int:
        return int(re.search(rf"^metakern_{name} (\d+)$", web.get("/metrics").text, re.MULTILINE)[1])

    before = metric("tokens_total")
    say = {"model": "run-base", "user": "bob", "messages": [{"role": "user", "content": "river?"}], "temperature": 1}
    with web.stream("POST", "/v1/chat/completions", json=say | {"n": 16, "stream": True}) as reply:
        next(reply.iter_lines())
    until(lambda: metric("active_replies") + metric("waiting_requests") == 0)
    assert metric("tokens_total") - before < 200  # of about 16 times 24


def check_docs(address: str, store: str) -> None:
    """The commands and the code of docs/serving.md run, on this server and store."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    said = []
    for language, block in blocks:
        code = block.replace("localhost:8000", address.removeprefix("http://")).replace('"bots"', '"run"')
        program = code.split()[0]
        if language == "python":
            until(lambda: httpx.get(f"{address}/v1/users/ann/adapt").json()["current"])
            exec(code, {"print": lambda text, end: said.append(text)})
        elif shutil.which(program):
            code = code.replace("runs/bots/users.sqlite", store).replace("backup.sqlite", f"{store}.backup")
            subprocess.run(code, shell=True, check=True, capture_output=True)
    assert "".join(said) == "pianos"


def check_end(server: subprocess.Popen, web: httpx.Client) -> None:
    """A reply that is under way when the server is told to end comes to its end, and the log has no text."""
    say = {"model": "run-base", "user": "bob", "messages": [{"role": "user", "content": "a secret"}], "stream": True}
    with web.stream("POST", "/v1/chat/completions", json=say) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    timer = threading.Timer(20, server.kill)
    timer.start()
    assert server.wait() == 0
    timer.cancel()
    errors = server.stderr.read()
    assert "POST /v1/chat/completions 200" in errors
    assert "secret" not in errors
    assert "otter" not in errors
