"""What `metakern serve` refuses before it serves, and its tokens."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from metakern.cli import main
from metakern.dialogue.huggingface import load_model
from metakern.errors import UserError
from metakern.serve.engine import Engine
from metakern.serve.server import _listening, port_of
from metakern.serve.store import Store


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Return the one line that the command complains with."""
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err


def test_without_tokens_only_this_machine_is_served(folder, tmp_path, capsys):
    arguments = [str(folder), "--store", str(tmp_path / "users.sqlite"), "--port", "0"]
    line = refused(capsys, *arguments, "--host", "0.0.0.0")
    assert "host must be a loopback address as long as there are no tokens, got 0.0.0.0: make one with" in line


def test_tokens_are_made_and_revoked(folder, tmp_path, capsys):
    arguments = ["serve", str(folder), "--store", str(tmp_path / "users.sqlite")]
    tokens = []
    for _ in range(2):
        assert main([*arguments, "--add-token", "ann"]) == 0
        tokens.append(capsys.readouterr().out.strip())
    with closing(Store(tmp_path / "users.sqlite")) as store:
        assert [store.user_of(token) for token in tokens] == ["ann", "ann"]
    assert main([*arguments, "--revoke-token", "ann"]) == 0
    assert capsys.readouterr().out == "tokens of ann that are no longer valid: 2\n"
    assert "a user must have up to 64 letters, digits and ._@-, got '../x'" in refused(
        capsys, *arguments[1:], "--add-token", "../x"
    )


def test_a_port_that_is_taken_and_a_folder_without_a_run_are_refused(folder, tmp_path, capsys):
    store = ("--store", str(tmp_path / "users.sqlite"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(capsys, str(folder), *store, "--port", str(taken.getsockname()[1]))
        assert "choose another --port" in line
    assert "port must be at most 65535, got 99999" in refused(capsys, str(folder), *store, "--port", "99999")
    assert "is not the folder of a run" in refused(capsys, str(tmp_path), *store, "--port", "0")
    assert "must be at least 1, got 0" in refused(capsys, str(folder), *store, "--rows", "0")


def test_the_page_of_a_run_has_the_same_port_each_time_unless_it_is_taken():
    port = port_of("runs/a")
    assert port == port_of("./runs/a") != port_of("runs/b")
    assert port in range(49152, 65536)
    with socket.create_server(("127.0.0.1", 0)) as taken, _listening("127.0.0.1", taken.getsockname()[1], True) as free:
        assert free.getsockname()[1] != taken.getsockname()[1]


def test_pretrained_models_without_lora_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"serve: layers must be .*, got (Conv1D|LayerNorm)"):
        Engine(load_model(str(tmp_path), 8, 20), rows=1, waiting=1, eos_id=0)
