"""Checkpoints: a save is complete or changes nothing, and damaged files are refused or replaced by those before."""

import errno
import json
import os
import stat

import pytest
import torch
from torch import nn

from metakern.dialogue import checkpoint
from metakern.errors import CheckpointError, UserError
from metakern.io import locked, write


@pytest.fixture
def saved(tmp_path):
    """A folder that holds the checkpoint `last` of step 1."""
    checkpoint.save(tmp_path, "last", {"x": torch.arange(5.0)}, {"step": 1})
    return tmp_path


def check_step_1(folder):
    tensors, state = checkpoint.load(folder, "last")
    assert state == {"step": 1}
    assert torch.equal(tensors["x"], torch.arange(5.0))


def test_what_is_saved_is_loaded(tmp_path):
    tensors = {
        "float": torch.randn(3, 4),
        "double": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(2).bfloat16(),
        "bytes": torch.get_rng_state(),
        "strided": torch.randn(4, 3).t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 2),
    }
    state = {"step": 7, "best": None, "seconds": 1.5}
    checkpoint.save(tmp_path, "last", tensors, state)
    loaded, loaded_state = checkpoint.load(tmp_path, "last")
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_new_checkpoint_replaces_the_old_one_of_its_name_alone(saved):
    checkpoint.save(saved, "best", {"x": torch.zeros(2)}, {"step": 1})
    checkpoint.save(saved, "last", {"x": torch.ones(2)}, {"step": 2})
    assert checkpoint.load(saved, "last")[1] == {"step": 2}
    assert checkpoint.load(saved, "best")[0]["x"].tolist() == [0, 0]
    checkpoint.save(saved, "last", {"x": torch.ones(3)}, {"step": 3})
    assert checkpoint.load(saved, "last")[1] == {"step": 3}
    of_last = ["last-before.json", "last.json", *sorted(file.name for file in saved.glob("last-*.safetensors"))]
    assert len(of_last) == 4  # with the one before, and none older
    assert sorted(file.name for file in saved.glob("last*")) == sorted(of_last)


def test_the_checkpoint_before_is_loaded_where_one_is_damaged(saved, capsys):
    checkpoint.save(saved, "last", {"x": torch.ones(2)}, {"step": 2})
    digest = json.loads((saved / "last.json").read_text())["sha256"]
    files = [saved / "last.json", saved / f"last-{digest[:16]}.safetensors"]
    for file in files:
        whole = file.read_bytes()
        for content in (whole[:-1] + bytes([whole[-1] ^ 1]) if file != files[0] else whole[:-3], b"", None):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            check_step_1(saved)
            assert capsys.readouterr().err.startswith(f"metakern: {file}: ")
            assert checkpoint.exists(saved, "last")
        file.write_bytes(whole)
    assert checkpoint.load(saved, "last")[1] == checkpoint.state_of(saved, "last") == {"step": 2}
    assert capsys.readouterr().err == ""


def test_a_damaged_checkpoint_never_becomes_the_one_before(saved):
    checkpoint.save(saved, "last", {"x": torch.ones(2)}, {"step": 2})
    (saved / "last.json").write_text("{")
    checkpoint.save(saved, "last", {"x": torch.ones(3)}, {"step": 3})
    (saved / "last.json").unlink()
    check_step_1(saved)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_save_on_a_full_disk_keeps_the_old_checkpoint(saved, monkeypatch, failing, writes):
    done, real = [], getattr(os, failing)

    def full(*args):
        if len(done) == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(args)
        return real(*args)

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(CheckpointError, match="cannot write: No space left on device; nothing that was there is lost"):
        checkpoint.save(saved, "last", {"x": torch.ones(9)}, {"step": 2})
    check_step_1(saved)
    assert not [file for file in saved.iterdir() if file.name.startswith(".")]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.save(tmp_path / "file", "last", {}, {"step": 1})


def test_damaged_tensors_are_refused(saved):
    (file,) = saved.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (b"", whole[:4], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"\0"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"safetensors: is cut short or damaged"):
            checkpoint.load(saved, "last")
    file.write_bytes(whole)
    check_step_1(saved)


def test_damaged_json_is_refused(saved):
    file = saved / "last.json"
    whole = file.read_text()
    record = json.loads(whole)
    changed = [record | change for change in ({"step": 2}, {"sha256": 3}, {"sha256": "../x"}, {"new": 1})]
    changed += [{key: record[key] for key in record if key != lost} for lost in record]
    texts = ["", whole[:-5], "[]", "{}", "3", "[" * 10**5, '{"step": ' + "9" * 5000 + "}", *map(json.dumps, changed)]
    for damaged in texts:
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"last\.json: is cut short or damaged"):
            checkpoint.load(saved, "last")
    file.write_text(json.dumps(dict(reversed(record.items()))))  # the layout does not matter
    check_step_1(saved)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "endless", "huge"])
@pytest.mark.parametrize("pattern", ["last.json", "*.safetensors"])
def test_what_is_no_file_of_moderate_size_is_refused(saved, kind, pattern):
    (file,) = saved.glob(pattern)
    file.unlink()
    make = {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/null"),
        "folder": file.mkdir,
        "endless": lambda: file.symlink_to("/dev/zero"),
        "huge": lambda: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 2**37),
    }
    make[kind]()
    with pytest.raises(CheckpointError, match=r"cannot be read: (it must (be a regular file|have at most)|Is a dir)"):
        checkpoint.load(saved, "last")


def test_a_missing_checkpoint_is_an_error(saved):
    with pytest.raises(CheckpointError, match=r"best\.json: no such checkpoint"):
        checkpoint.load(saved, "best")
    next(saved.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(saved, "last")


def test_tensors_of_no_checkpoint_are_swept(saved):
    for name in ("last-mine", "my-model", "other-0123456789abcdef"):
        (saved / f"{name}.safetensors").write_bytes(b"somebody's own")
    kept = set(saved.iterdir())
    (saved / "last-0123456789abcdef.safetensors").write_bytes(b"left by a killed process")
    checkpoint.sweep(saved)
    assert set(saved.iterdir()) == kept
    (saved / "last-0123456789abcdef.safetensors").touch()
    (saved / "last.json").write_text("{}")
    checkpoint.sweep(saved)
    assert set(saved.iterdir()) == {*kept, saved / "last-0123456789abcdef.safetensors"}


class Tied(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("made", torch.rand(2), persistent=False)


def test_a_module_round_trip_keeps_ties(tmp_path):
    module, other = Tied(), Tied()
    module.register_state_dict_pre_hook(lambda *_: pytest.fail("FSDP2 would divide the parameters"))
    tensors = checkpoint.module_tensors(module)
    assert set(tensors) == {"embedding.weight", "head.bias", "kept"}
    checkpoint.save(tmp_path, "last", tensors, {})
    checkpoint.load_module(other, checkpoint.load(tmp_path, "last")[0], tmp_path)
    assert other.head.weight is other.embedding.weight
    for name, tensor in checkpoint.module_tensors(other).items():
        assert torch.equal(tensor, tensors[name])


def test_tensors_of_another_module_are_refused_and_change_nothing(tmp_path):
    module = Tied(width=4)
    before = module.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"embedding\.weight must be \(5, 4\) for this config, got \(5, 3\)"):
        checkpoint.load_module(module, checkpoint.module_tensors(Tied()), tmp_path)
    tensors = checkpoint.module_tensors(Tied(width=4))
    bias = tensors.pop("head.bias")
    with pytest.raises(CheckpointError, match=r"head\.bias is missing"):
        checkpoint.load_module(module, tensors, tmp_path)
    with pytest.raises(CheckpointError, match="more is not a tensor of this config"):
        checkpoint.load_module(module, {**tensors, "head.bias": bias, "more": bias}, tmp_path)
    with pytest.raises(CheckpointError, match=r"head\.bias must be torch\.float32 for this config, got torch\.int8"):
        checkpoint.load_module(module, {**tensors, "head.bias": bias.to(torch.int8)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"head\.bias must be finite"):
        checkpoint.load_module(module, {**tensors, "head.bias": bias * torch.inf}, tmp_path)
    assert torch.equal(module.head.weight, before)


def test_a_file_has_the_mode_that_the_user_chose(tmp_path):
    path, before = tmp_path / "config.toml", os.umask(0o027)
    try:
        write(path, b"first")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640  # the umask's
        path.chmod(0o600)
        write(path, b"second")
    finally:
        os.umask(before)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"second", 0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_file_and_folder_are_forced_to_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        noted = name if name == "replace" else lambda file: "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"
        monkeypatch.setattr(
            os, name, lambda *args, real=real, n=noted: (calls.append(n if n == "replace" else n(args[0])), real(*args))
        )
    write(tmp_path / "new" / "file", b"data")
    assert calls == ["folder", "file", "replace", "folder"]


def test_a_folder_is_locked_and_swept(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), locked(folder):
        raise ZeroDivisionError
    assert not folder.exists()  # nothing was written
    (folder / "checkpoints").mkdir(parents=True)
    left = [folder / ".config.toml.0123abcd.tmp", folder / "checkpoints" / ".last.json.0123abcd.tmp"]
    kept = [folder / ".notes.tmp", folder / "notes"]
    for file in left + kept:
        file.touch()
    (folder / ".lock").write_text("process 1 on elsewhere")  # its process has died
    with locked(folder):
        assert [file.exists() for file in left + kept] == [False, False, True, True]
        with pytest.raises(UserError, match=rf"run: is in use by process {os.getpid()} on .*: wait for its end"):
            locked(folder).__enter__()
    with locked(folder):
        pass
    assert not (folder / ".lock").exists()


def test_a_process_that_dies_releases_its_lock(tmp_path):
    if not (child := os.fork()):
        with locked(tmp_path):
            os.kill(os.getpid(), 9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert (tmp_path / ".lock").read_text() == f"process {child} on {os.uname().nodename}"
    with locked(tmp_path):
        pass
