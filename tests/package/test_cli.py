"""The command line: every command, and every mistake of the user as one line with exit code 2."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import tiny_config, write_tasks

import metakern
from metakern import cli
from metakern.cli import main
from metakern.dialogue.config import Config
from metakern.errors import UserError
from metakern.tested import TESTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, a config file, and a run that the command line made of them."""
    folder = tmp_path_factory.mktemp("cli")
    data = write_tasks(folder / "data", tasks=12)
    (folder / "tiny.toml").write_text(tiny_config(data, steps=5, hidden=9, pretrain_steps=2).toml())
    assert main(["train", "--config", str(folder / "tiny.toml"), "--out", str(folder / "run"), "--hidden", "8"]) == 0
    return folder


def complaint(capsys, *arguments, code=2):
    """Assert that a command fails with one line on standard error; return the line."""
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("metakern: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error[len("metakern: ") : -1]


def test_flags_override_the_config_file(folder):
    config = Config.load(folder / "run" / "config.toml")
    assert config == tiny_config(folder / "data", steps=5, hidden=8, pretrain_steps=2)


def test_a_flag_that_changes_nothing_is_named(folder, tmp_path, capsys):
    start = ["train", "--config", str(folder / "tiny.toml"), "--steps", "1", "--out", str(tmp_path / "run")]
    assert main([*start, "--hidden", "8", "--heads", "2", "--ways", "3", "--shard"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("metakern: ")]
    assert said == [
        "metakern: --heads changes nothing in this run: attention heads in a layer (gpt)",
        "metakern: --ways changes nothing in this run: intents of a task (parser)",
        "metakern: --shard changes nothing in this run: divide parameters, gradients and moments between the processes"
        " while no step uses them (FSDP2)",
    ]


def test_every_key_is_a_flag():
    special = {
        "learn_lr": ("--no-learn-lr", False),
        "capture": ("--no-capture", False),
        "cosine": ("--no-cosine", False),
        "adapt": ("--adapt=head,rnn.*", ("head", "rnn.*")),
        "inner_steps": ("--inner-steps=1,3,5", (1, 3, 5)),
        "positive_rates": ("--positive-rates", True),
        "stream": ("--stream", True),
        "shard": ("--shard", True),
        "shots": ("--shots=1,5", (1, 5)),
        "validation_tasks": ("--validation-tasks=bank*", ("bank*",)),
        "test_tasks": ("--test-tasks=gym,zoo", ("gym", "zoo")),
        "lora_targets": ("--lora-targets=q_proj", ("q_proj",)),
        "reader_options": ("--reader-options=tasks=domains", ("tasks=domains",)),
        "algorithm_options": ("--algorithm-options=anneal=5", ("anneal=5",)),
        "inner_options": ("--inner-options=eps=1e-4", ("eps=1e-4",)),
    }
    for key in fields(Config):
        flag, expected = special.get(key.name, (f"--{key.name.replace('_', '-')}={key.default}", key.default))
        parsed = vars(cli._parser().parse_args(["train", flag]))
        assert parsed[key.name] == expected
        assert type(parsed[key.name]) is type(key.default)
        others = {"command", "config", "out", "resume", "time", "processes", "max_restarts", "traceback"}
        assert parsed.keys() - others == {key.name}


@pytest.mark.parametrize("command", ["", "train", "eval", "adapt", "chat", "bench", "doctor"])
def test_help_lists_commands_and_flags(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: metakern {command}".rstrip() in text
    if command == "train":
        for key in fields(Config):
            assert f"--{key.name.replace('_', '-')}" in text
    if not command:
        for name in ("train", "eval", "adapt", "chat", "bench", "doctor"):
            assert f"\n    {name}" in text


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"metakern {metakern.__version__}\n"


def test_eval_prints_and_writes_the_curve(folder, capsys):
    assert main(["eval", str(folder / "run"), "--steps", "0,2", "--compare", "finetune"]) == 0
    text = capsys.readouterr().out
    assert "finetune / maml" in text
    assert f"written: {folder / 'run' / 'eval.json'}, {folder / 'run' / 'eval.png'}" in text
    report = json.loads((folder / "run" / "eval.json").read_text())
    assert (report["steps"], list(report["curves"])) == ([0, 2], ["maml", "finetune"])


def test_eval_judges_replies(folder, tmp_path, capsys):
    for option in ("--max-length 24", "--max-length 64"):
        run = str(tmp_path / option[-2:])
        config = ["--config", str(folder / "tiny.toml"), *option.split(), "--steps", "1", "--pretrain-steps", "0"]
        assert main(["train", *config, "--overlap", "turns", "--out", run]) == 0
    capsys.readouterr()
    options = ["--steps", "0", "--reply-steps", "0,1", "--compare", "retrieval"]
    assert main(["eval", str(tmp_path / "64"), *options]) == 0
    text = capsys.readouterr().out
    for words in (
        "replies of maml after 1 steps  1/1 episodes  0:00 left",
        "unseen questions answered right",
        "retrieval",
        "replies.png",
    ):
        assert words in text
    assert "windows of 24 tokens hold no whole one" in complaint(capsys, "eval", tmp_path / "24", "--replies")
    assert complaint(capsys, "eval", tmp_path / "64", "--reply-steps", "-1").startswith("argument --reply-steps:")
    without = complaint(capsys, "eval", tmp_path / "64", "--compare", "retrieval")
    assert without == "eval: retrieval has replies but no perplexity: add --replies"


def test_adapt_then_chat_then_eval(folder, tmp_path, monkeypatch, capsys):
    support = str(folder / "data" / "task1.jsonl")
    assert main(["adapt", str(folder / "run"), "--support", support, "--out", str(tmp_path / "mine")]) == 0
    assert f"next: metakern chat {tmp_path / 'mine'}" in capsys.readouterr().out
    read_as = ["--support", support, "--format", "messages", "--steps", "2"]
    for arguments in ([str(tmp_path / "mine")], [str(folder / "run"), *read_as]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("river stone\n"))
        assert main(["chat", *arguments, "--temperature", "0"]) == 0
        assert capsys.readouterr().out.count("\n") == 1
    assert main(["eval", str(tmp_path / "mine"), "--steps", "0"]) == 0
    taught = (tmp_path / "mine", "--stop", "river", "--unknown", "guess")
    assert complaint(capsys, "chat", *taught).startswith("policy: unknown must be one of generate, ask back, hand over")
    assert complaint(capsys, "chat", tmp_path / "mine", "--no-repeat", "-1").startswith("argument --no-repeat:")
    wrong = complaint(capsys, "chat", tmp_path / "mine", "--repetition-penalty", "0.5")
    assert wrong == "generate: repetition_penalty must be finite and at least 1, got 0.5"
    wrong = complaint(capsys, "chat", tmp_path / "mine", "--parser", tmp_path / "mine")
    assert wrong.startswith(f"{tmp_path / 'mine'}: must be the run of a parser, got one of a generator")
    adapted = complaint(capsys, "eval", tmp_path / "mine", "--compare", "finetune")
    assert adapted == f"{tmp_path / 'mine'}: is adapted from {folder / 'run'}: compare that run"


def test_resume_of_a_finished_run_changes_nothing(folder, capsys):
    before = (folder / "run" / "checkpoints" / "last.json").read_text()
    assert main(["train", "--resume", "--out", str(folder / "run")]) == 0
    assert "best validation loss" in capsys.readouterr().out
    assert (folder / "run" / "checkpoints" / "last.json").read_text() == before


def test_the_default_folder_of_a_run_is_named_by_data_model_and_algorithm(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path / "d.a-ta")
    limits = ["--steps", "1", "--pretrain-steps", "0"]
    config = ["--config", str(folder / "tiny.toml"), "--data", "d.a-ta"]
    assert main(["train", *config, *limits, "--algorithm", "fomaml"]) == 0
    assert (tmp_path / "runs" / "d-a-ta-gru-fomaml" / "config.toml").exists()
    named = ["--data", "d.a-ta", "--model", "gru", "--algorithm", "fomaml"]  # the other settings are those of the run
    assert main(["train", "--resume", *named, "--steps", "2"]) == 0


def test_doctor_says_whether_the_meta_gradient_of_a_run_is_exact(folder, capsys):
    assert main(["doctor", str(folder / "run")]) == 0
    page = capsys.readouterr().out
    assert page.startswith("The meta-gradient is exact.\n")
    assert "Meta-gradient of 2 inner steps, one task, float64" in page
    assert "missing: is not the folder of a run" in complaint(capsys, "doctor", "missing")


def test_doctor_describes_an_environment_without_extras(capsys, monkeypatch):
    for extra in cli.EXTRAS:
        for module in [name for name in sys.modules if name.partition(".")[0] == extra]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, extra, None)
    monkeypatch.setattr(cli, "version", lambda name: "1.2.3" if name == "rich" else missing(name))
    assert main(["doctor"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for name, status in metakern.backends().items():
        assert [name, status] in lines
    for name, spec in metakern.ops.SPECS.items():
        assert [name, ", ".join(spec.op.kernels)] in lines
    assert ["rich", "1.2.3"] in lines
    assert ["matplotlib", "missing: pip install metakern[dialogue]"] in lines
    assert ["transformers", "missing: pip install metakern[hf]"] in lines


def test_an_unexpected_error_is_reported_as_a_fault_of_metakern(capsys, monkeypatch):
    def broken():
        raise ValueError("odd")

    monkeypatch.setattr(cli, "_environment", broken)
    words = complaint(capsys, "doctor", code=1)
    assert words == "ValueError: odd; this is a bug in metakern: --traceback shows where it was raised"
    for arguments in (["--traceback", "doctor"], ["doctor", "--traceback"]):
        with pytest.raises(ValueError, match="odd"):
            main(arguments)


def test_a_run_can_have_the_name_of_a_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="bench: is not the folder of a run"):
        main(["eval", "bench", "--traceback"])


def test_an_error_of_the_system_is_no_fault_of_metakern(capsys, monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "runs/log.jsonl")

    monkeypatch.setattr(cli, "_environment", full)
    assert complaint(capsys, "doctor") == "runs/log.jsonl: No space left on device"


def test_an_error_of_the_engine_is_no_fault_of_metakern(capsys, monkeypatch):
    def refused():
        raise ValueError("MAML: no batching is exact for this model and loss")

    monkeypatch.setattr(cli, "_environment", refused)
    assert complaint(capsys, "doctor") == "MAML: no batching is exact for this model and loss"


def test_doctor_marks_versions_older_or_newer_than_the_tested_ones(capsys, monkeypatch):
    monkeypatch.setattr(cli, "version", lambda name: {"transformers": "99.1", "triton": "3.1.0"}.get(name, "1.0"))
    monkeypatch.setattr(cli.torch, "__version__", "1.0.0+cpu")
    lowest, highest = (TESTED[name][i] for name, i in (("triton", 0), ("transformers", 1)))
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert f"torch 1.0.0+cpu is older than {TESTED['torch'][0]}, the lowest that was tested\n" in page
    assert f"  transformers          99.1 (newer than {highest}, the highest that was tested)\n" in page
    assert f"  triton                3.1.0 (older than {lowest}, the lowest that was tested)\n" in page
    assert "  rich                  1.0\n" in page


def test_warnings_of_other_packages_end_no_run(folder):
    """The command hides deprecation and future warnings, and shows other warnings."""
    noisy = """
import sys, warnings
import metakern.dialogue.generate as writing
real = writing.Sampling.__call__
def deprecated(*arguments):
    warnings.warn("use tokens", FutureWarning)
    warnings.warn("soon", DeprecationWarning)
    warnings.warn("mind this", UserWarning)
    return real(*arguments)
writing.Sampling.__call__ = deprecated
warnings.simplefilter("error")
from metakern.__main__ import main
sys.argv[1:] = ["chat", sys.argv[1], "--seed", "1"]
sys.exit(main())
"""
    command = [sys.executable, "-c", noisy, str(folder / "run")]
    ended = subprocess.run(command, input="river stone\n", capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "mind this" in ended.stderr
    assert "use tokens" not in ended.stderr
    assert "soon" not in ended.stderr


def missing(name):
    raise cli.PackageNotFoundError(name)


def test_a_time_is_a_number_with_its_unit_and_for_a_new_run(folder, capsys):
    for time, seconds in (("90s", 90), ("1.5m", 90), ("2h", 7200)):
        assert vars(cli._parser().parse_args(["train", "--time", time]))["time"] == seconds
    for time in ("600", "10 m", "0s", "-1m", "1d"):
        wrong = f"--time: must be a time above 0 with its unit, such as 90s, 10m or 2h, got '{time}'; see"
        assert wrong in complaint(capsys, "train", f"--time={time}")
    assert complaint(capsys, "train", "--time=9m", "--resume", "--out", folder / "run") == (
        f"{folder / 'run'}: --time must be for a new run, whose steps it plans: change --steps to go on for longer"
    )


def test_wrong_arguments_are_one_line(capsys):
    assert "invalid choice: 'trian'" in complaint(capsys, "trian")
    assert "required: COMMAND" in complaint(capsys)
    assert complaint(capsys, "train", "--lr", "3") == "unrecognized arguments: --lr 3; see metakern --help"
    assert "--steps: invalid int value: 'x'; see metakern train --help" in complaint(capsys, "train", "--steps", "x")
    assert complaint(capsys, "train", "--inner-lr", "-1") == "train: inner_lr must be more than 0, got -1.0"
    assert "must be a whole number, got '-1'" in complaint(capsys, "eval", "run", "--steps=0,-1")
    assert "required: --support" in complaint(capsys, "adapt", "run", "--out", "x")


def test_wrong_config_files_and_folders_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("inner_lrr = 1")
    assert complaint(capsys, "train", "--config", tmp_path / "bad.toml") == (
        f"{tmp_path / 'bad.toml'}: unknown key 'inner_lrr', did you mean 'inner_lr'?"
    )
    assert "no run to resume" in complaint(capsys, "train", "--resume", "--out", folder / "data", "--data", "x")
    assert "no run to resume" in complaint(capsys, "train", "--resume", "--out", tmp_path / "none")
    assert "cannot read the config" in complaint(capsys, "train", "--config", tmp_path)
    assert "holds a run already" in complaint(capsys, "train", "--out", folder / "run", "--data", folder / "data")
    assert "is not the folder of a run" in complaint(capsys, "eval", tmp_path)
    assert "no such file or directory" in complaint(capsys, "chat", folder / "run", "--support", tmp_path / "none")
    support = folder / "data" / "task1.jsonl"
    for command in (["chat", folder / "run"], ["adapt", folder / "run", "--out", tmp_path / "x"]):
        wrong = complaint(capsys, *command, "--support", support, "--reader-options", "limit=3")
        assert wrong == "messages: options of the reader must be among task_key, got 'limit'"


def test_wrong_data_is_one_line(tmp_path, capsys):
    def says(text, name="data.jsonl", *flags):
        (tmp_path / name).write_bytes(text)
        error = complaint(capsys, "train", "--data", tmp_path / name, "--out", tmp_path / "run", *flags)
        assert not (tmp_path / "run" / "checkpoints").exists()
        return error

    turn = b'{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}'
    assert "must hold a dialogue, got an empty file" in says(b"")
    assert "data.jsonl:2: must be JSON" in says(b'{"messages": [' + turn + b']}\n{"messages": [{"ro')
    assert "must hold a dialogue" in says(b'{"messages": [{"role": "assistant", "content": "hi"}]}')
    assert "must have" in says(b'{"messages": [' + turn + b"]}")
    assert "must be UTF-8" in says(b'{"messages": "\xff"}')
    assert "must be in a known format" in says(b"x", "data.xyz")
    assert "format must be one of" in says(b"", "data.jsonl", "--format", "chit")
    assert "nor packaged data" in complaint(capsys, "train", "--data", "chitchta", "--out", tmp_path / "run")


def test_the_vocabulary_of_another_run_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--config", str(folder / "tiny.toml"), "--out", str(out), "--vocab-size=280"]) == 0
    (out / "tokenizer.json").write_bytes((folder / "run" / "tokenizer.json").read_bytes())
    assert "tokenizer.json: is not the vocabulary that" in complaint(capsys, "eval", out)


def test_truncated_checkpoints_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--config", str(folder / "tiny.toml"), "--out", str(out), "--steps=1"]) == 0
    for file in (out / "checkpoints").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:99])
    for arguments in (["eval", out], ["train", "--resume", "--out", out, "--steps=2"], ["chat", out]):
        assert "is cut short or damaged; use another checkpoint or train again" in complaint(capsys, *arguments)


@pytest.mark.parametrize("at", [1, 4, 9, 16])
def test_training_on_a_full_disk_is_one_line(folder, tmp_path, monkeypatch, capsys, at):
    arguments = ["train", "--config", folder / "tiny.toml", "--out", tmp_path / "run"]
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in complaint(capsys, *arguments)
    resume = ["--resume"] if (tmp_path / "run" / "checkpoints" / "last.json").exists() else []
    assert bool(resume) == (at > 14)
    assert main([str(argument) for argument in [*arguments, *resume]]) == 0


def test_diverged_training_is_one_line(folder, tmp_path, capsys):
    config = folder / "tiny.toml"
    error = complaint(capsys, "train", "--config", config, "--out", tmp_path / "run", "--outer-lr=1e30", "--warmup=0")
    assert "is not finite at step" in error
    assert "checkpoints/last holds step" in error


def test_ctrl_c_in_training_says_how_to_resume(folder, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "metakern", "train", "--config", str(folder / "tiny.toml"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--steps=1000000"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("train 1/"):
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("metakern: stopped at step ")
    assert error.endswith(f"; go on with: metakern train --resume --out {out}\n")
    assert error.count("\n") == 1
    step = json.loads((out / "checkpoints" / "last.json").read_text())["step"]
    assert f"stopped at step {step} of train" in error


@pytest.mark.parametrize("command", [["-m", "metakern"], ["metakern"]])
def test_ctrl_c_during_imports_ends_with_one_line(tmp_path, command):
    if command == ["metakern"]:  # as pip installs it
        script = tmp_path / "metakern"
        script.write_text("import sys\nfrom metakern.__main__ import main\nsys.exit(main())\n")
        command = [str(script)]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(metakern.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, *command, "doctor"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, b"metakern: stopped\n")


def test_ctrl_c_during_imports_of_the_package_raises_as_ever(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(metakern.__file__).parent.parent)])
    code = "try:\n    import metakern\nexcept KeyboardInterrupt:\n    print('mine')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"mine\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--width=65536", "--hidden=65536", "--layers=1000", "--model=lstm"], "must suit the memory: training"),
        (["--threads=1024"], "threads must be at most "),
        (["--threads=1000000"], "threads must be at most 1024, got 1000000"),
        (["--inner-lr=1e308"], "inner_lr must be at most 3e+38, got 1e+308"),
        (["--algorithm=imaml", f"--algorithm-options=tolerance={'[' * 10**5}"], "algorithm_options must"),
    ],
)
def test_numbers_beyond_every_limit_are_one_line(folder, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    arguments = ["train", "--config", folder / "tiny.toml", "--out", tmp_path / "run", *flags]
    assert said in complaint(capsys, *arguments)


def test_memory_that_is_too_small_is_no_fault_of_metakern(capsys, monkeypatch):
    def large():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(cli, "_environment", large)
    assert complaint(capsys, "doctor").startswith("the memory is too small for this: lower the sizes")


def test_control_characters_never_reach_a_terminal(capsys, monkeypatch):
    assert complaint(capsys, "eval", "\x1b]0;title\x07run").startswith("␛]0;title␇run: is not the folder of a run")


def test_ctrl_c_outside_of_training_ends_with_one_line(monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_table", stop)
    assert complaint(capsys, "doctor", code=130) == "stopped"


def test_a_missing_extra_is_one_line(folder, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith(("matplotlib", "metakern.dialogue.evaluate"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert complaint(capsys, "eval", folder / "run") == (
        "the package matplotlib is missing: pip install metakern[dialogue]"
    )


def test_a_closed_standard_output_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "metakern", "doctor"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
