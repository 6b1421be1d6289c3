"""Configs: defaults, files and flags, and one line for each mistake."""

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import metakern as mk
from metakern.dialogue.config import PARSERS, RECURRENT, Config
from metakern.dialogue.registry import OPTIMIZERS, build_algorithm
from metakern.errors import UserError
from metakern.meta.algorithms.registry import ALGORITHMS


def values_of(key):
    """Return a strategy of allowed values of a field."""
    rule = key.metadata
    if rule["choices"]:
        return st.sampled_from(list(rule["choices"]))
    if isinstance(key.default, bool):
        return st.booleans()
    if isinstance(key.default, int):
        return st.integers(rule["least"], rule["most"])
    if isinstance(key.default, float):
        most = min(1e9, rule["most"]) if rule["below"] is None else rule["below"]
        return st.floats(rule["least"] or 0, most, exclude_min=rule["above"] is not None, exclude_max=True)
    text = st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    if key.default and isinstance(key.default, tuple):
        return st.lists(st.integers(rule["least"], rule["most"]), min_size=1).map(tuple).filter(any)
    return st.lists(text).map(tuple) if isinstance(key.default, tuple) else text


@given(st.data())
def test_a_written_config_is_read_back(tmp_path_factory, data):
    values = {key.name: data.draw(values_of(key), key.name) for key in fields(Config)}
    values["lora"] = values["lora"] if values["model"].startswith("hf:") else 0
    values["precision"] = values["precision"] if values["device"] == "cpu" else "float32"
    if values["model"] == "bag":
        values |= {"part": "parser", "pretrain_steps": 0}
    if values["part"] == "policy":
        values |= {"model": data.draw(st.sampled_from(RECURRENT), "model of a policy"), "pretrain_steps": 0, "lora": 0}
    if values["part"] != "generator":
        values |= {"lm_weight": 0.0, "hints": "none"}
    if values["part"] == "parser":
        values["algorithm"] = data.draw(st.sampled_from(PARSERS), "algorithm of a parser")
    config = Config(**values)
    file = tmp_path_factory.mktemp("config") / "c.toml"
    file.write_text(config.toml(), "utf-8")
    assert Config.load(file) == config


def test_the_default_algorithm_is_that_of_the_part(tmp_path):
    parts = ("generator", "parser", "policy")
    assert [Config(part=part, model="gru").algorithm for part in parts] == ["maml", "protonet", "maml"]
    assert Config.parse({"part": "parser"}).algorithm == "protonet"
    assert (Config(part="parser", model="bag").pretrain_steps, Config(part="parser").pretrain_steps) == (0, 300)


def test_a_written_config_explains_every_key():
    text = Config().toml()
    for key in fields(Config):
        assert f"# {key.metadata['help']}" in text


def test_files_override_defaults_and_flags_override_files(tmp_path):
    (tmp_path / "c.toml").write_text('model = "gpt"\nsteps = 7\nadapt = ["head", "rnn.*"]\n')
    config = Config.load(tmp_path / "c.toml")
    assert config == replace(Config(), model="gpt", steps=7, adapt=("head", "rnn.*"))
    assert Config.parse({"steps": 9}, base=config) == replace(config, steps=9)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("inner_lrr = 0.1", "unknown key 'inner_lrr', did you mean 'inner_lr'?"),
        ("[train]\nsteps = 3", "unknown key 'train'"),
        ("steps = 2.5", "steps must be a whole number, got 2.5"),
        ("steps = true", "steps must be a whole number, got True"),
        ("steps = 0", "steps must be at least 1, got 0"),
        ("inner_lr = 0", "inner_lr must be more than 0, got 0"),
        ("inner_lr = nan", "inner_lr must be finite, got nan"),
        ("test_part = 0.5", "test_part must be less than 0.5, got 0.5"),
        ("clip = inf", "clip must be finite, got inf"),
        ("inner_lr = '0.1'", "inner_lr must be a number, got '0.1'"),
        ("learn_lr = 1", "learn_lr must be true or false, got 1"),
        ("adapt = 'head'", "adapt must be a list of strings, got 'head'"),
        ("adapt = [1]", "adapt must be a list of strings, got (1,)"),
        ("model = 'gtp'", "model must be one of rnn, gru, lstm, gpt, bag, hf:PATH, got 'gtp'"),
        ("model = 'hf:'", "model must be one of rnn, gru, lstm, gpt, bag, hf:PATH, got 'hf:'"),
        ("part = 'tagger'", "part must be one of generator, parser, policy, got 'tagger'"),
        ("part = 'parser'\nalgorithm = 'maml'", "algorithm must be one of protonet, protomaml, finetune, got 'maml'"),
        ("algorithm = 'protonet'", "algorithm must be one of maml, "),
        ("model = 'bag'", "model must be a language model, got 'bag'"),
        ("part = 'policy'\nmodel = 'gru'\nlm_weight = 0.5", "lm_weight must be 0 for the part policy, got 0.5"),
        ("shots = []", "shots must be whole numbers, got ()"),
        ("ways = 1", "ways must be at least 2, got 1"),
        ("lora = 8", "lora must be 0 for the model gpt, which is not pretrained, got 8"),
        ("precision = 'half'", "precision must be one of float32, bfloat16, got 'half'"),
        ("precision = 'bfloat16'\ndevice = 'cuda'", "precision must be float32 for the device cuda, got 'bfloat16'"),
        ("inner_steps = 0", "inner_steps must have a number above 0, got only 0"),
        ("inner_steps = [-1, 2]", "inner_steps must be at least 0, got -1"),
        ("inner_steps = []", "inner_steps must be whole numbers, got ()"),
        ("inner_steps = [1, 2.5]", "inner_steps must be whole numbers, got (1, 2.5)"),
        ("overlap = 'bots'", "overlap must be one of users, turns, dialogues, got 'bots'"),
        ("steps = ", "is not TOML"),
        ("steps = " + "9" * 5000, "is not TOML: too deeply nested or too long a number"),
        ("steps = " + "[" * 10**5, "is not TOML"),
        ("steps = 0x" + "f" * 5000, "steps must be at most 1000000000, got"),
        ("threads = 1000000", "threads must be at most 1024, got 1000000"),
        ("width = 1e12", "width must be a whole number, got 1000000000000.0"),
        ("width = 1000000000000", "width must be at most 65536, got 1000000000000"),
        ("inner_lr = 1e308", "inner_lr must be at most 3e+38, got 1e+308"),
        ("inner_steps = [1, 20000]", "inner_steps must be at most 10000, got 20000"),
        (f"inner_steps = {[1] * 5000}", "inner_steps must have at most 4096 characters or entries, got more"),
        (f"adapt = ['{'*' * 5000}']", "adapt must have at most 4096 characters or entries, got more"),
        (f"{'k' * 10**5} = 1", "unknown key 'kkk"),
    ],
)
def test_errors_in_a_file_are_one_line_with_its_path(tmp_path, text, complaint):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        Config.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600 + len(str(file))


def test_a_file_that_is_not_as_it_was_written_is_refused_unless_its_digest_is_removed(tmp_path):
    file = tmp_path / "c.toml"
    whole = Config(steps=7).toml()
    lines = whole.splitlines()[:-1]
    for damaged in (whole.replace("steps = 7", "steps = 8"), whole.replace("threads = 0", ""), whole[:-2] + "\n"):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"is not as it was written: put it back or, if you changed it, remove"):
            Config.load(file)
    file.write_text("\n".join(lines).replace("steps = 7", "steps = 8"))
    assert Config.load(file, complete=True) == Config(steps=8)
    file.write_text("\n".join(lines[:-1]))  # cut short
    with pytest.raises(UserError, match="lacks threads: it was cut short; put it back"):
        Config.load(file, complete=True)
    file.write_text(whole.replace("\n", "\r\n"))
    assert Config.load(file, complete=True) == Config(steps=7)


def test_files_of_runs_from_before_are_read_if_they_have_no_time_limit(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("minutes = 0.0\npretrain_minutes = 0.0\nsteps = 7\n")
    assert Config.load(file) == Config(steps=7)
    for name in ("minutes", "pretrain_minutes"):
        file.write_text(f"{name} = 2.5\n")
        with pytest.raises(UserError, match=f"{file}: {name} must be 0, as .*, got 2.5: remove the line; .* --time"):
            Config.load(file)
        with pytest.raises(UserError, match=f"unknown key '{name}'"):
            Config.parse({name: 0.0})


def test_files_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(
        UserError, match=r"cannot read the config: No such file .*; packaged configs are bots, chitchat,"
    ):
        Config.load(tmp_path / "none.toml")
    (tmp_path / "mark.toml").write_bytes(b"\xef\xbb\xbfsteps = 9")  # as Windows writes it
    assert Config.load(tmp_path / "mark.toml").steps == 9
    with pytest.raises(UserError, match="cannot read the config: Is a directory"):
        Config.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="cannot read the config: it must be a regular file"):
        Config.load(tmp_path / "pipe.toml")
    (tmp_path / "long.toml").write_text("#" * 2**21)
    with pytest.raises(UserError, match="cannot read the config: it must have at most 1,048,576 bytes, got 2,097,152"):
        Config.load(tmp_path / "long.toml")
    (tmp_path / "latin.toml").write_bytes(b'data = "caf\xe9"')
    with pytest.raises(UserError, match="is not UTF-8"):
        Config.load(tmp_path / "latin.toml")


def test_pretraining_has_a_default_for_models_that_begin_with_random_weights() -> None:
    assert Config().pretrain_steps == 300
    assert Config(model="hf:smollm2").pretrain_steps == 0
    assert Config(model="hf:smollm2", pretrain_steps=7).pretrain_steps == 7
    assert Config(pretrain_steps=0).pretrain_steps == 0
    with pytest.raises(UserError, match="pretrain_steps must be at least -1, got -2"):
        Config(pretrain_steps=-2)


def test_every_inner_optimizer_of_a_config_can_be_built() -> None:
    for name in OPTIMIZERS:
        inner = build_algorithm(Config(inner=name), torch.nn.Linear(3, 2)).inner
        if name == "metacurvature":
            assert inner.lr == Config().inner_lr
            continue
        assert inner.lr.values["weight"].shape == (2, 3)
        assert inner.lr.initial == Config().inner_lr


def test_options_of_an_inner_optimizer_reach_it() -> None:
    config = Config(inner="adam", inner_options=("eps=1e-4", "learn=eps"), lr_per="all")
    inner = build_algorithm(config, torch.nn.Linear(3, 2)).inner
    assert inner.eps.initial == 1e-4
    assert {name for name, _ in inner.named_parameters()} == {"lr.value", "eps.value"}
    for options, message in (
        (("eps",), "inner_options must be name=value, got 'eps'"),
        (("epsilon=1",), "inner_options must be arguments of adam, got .*epsilon"),
        (("eps=-1",), "eps must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            build_algorithm(replace(config, inner_options=options), torch.nn.Linear(3, 2))


def test_inner_gradients_are_clipped_if_a_config_says_so() -> None:
    assert isinstance(build_algorithm(Config(), torch.nn.Linear(3, 2)).inner, mk.optim.SGD)
    clipped = build_algorithm(Config(inner_clip=0.5), torch.nn.Linear(3, 2)).inner
    assert (type(clipped), clipped.norm, clipped.inner.lr.initial) == (mk.optim.Clipped, 0.5, Config().inner_lr)
    with pytest.raises(UserError, match="inner_clip must be 0 for metasgd, which has an inner optimizer of its own"):
        build_algorithm(Config(inner_clip=0.5, algorithm="metasgd"), torch.nn.Linear(3, 2))


def test_the_precision_of_a_config_reaches_the_algorithm() -> None:
    for algorithm in ALGORITHMS.keys() - {"prompt", "incontext", "hypernetwork"}:
        config = Config(algorithm=algorithm, precision="bfloat16")
        for settings, expected in ((config, "bfloat16"), (replace(config, precision="float32"), None)):
            built = build_algorithm(settings, torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
            maml = built.adapt.__self__ if algorithm == "finetune" else built
            assert maml.precision == expected


def test_options_of_an_algorithm_reach_it() -> None:
    config = Config(algorithm="imaml", algorithm_options=("strength=3", "solver=neumann", "learn_strength=false"))
    imaml = build_algorithm(config, torch.nn.Linear(3, 2))
    assert (imaml.strength, imaml.solver, imaml.log_strength) == (3.0, "neumann", None)
    plus = build_algorithm(Config(algorithm="mamlplusplus", algorithm_options=("anneal=7",)), torch.nn.Linear(3, 2))
    assert (plus.anneal, plus.steps) == (7, Config().most_inner_steps)
    assert plus.inner.lr.values["weight"].shape == (Config().most_inner_steps,)
    for options, message in (
        (("strength",), "algorithm_options must be name=value, got 'strength'"),
        (("rank=2",), "algorithm_options must be arguments of imaml"),
        (("strength=a",), "algorithm_options must be arguments of imaml, got IMAML: strength must be a number"),
        (("steps=7",), "algorithm_options must not have steps, which the setting inner_steps says"),
        (("strength=-1",), "IMAML: strength must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            build_algorithm(replace(config, algorithm_options=options), torch.nn.Linear(3, 2))


def test_algorithms_of_other_packages_are_found_by_their_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "signs.py").write_text("import metakern as mk\nclass Signs(mk.FOMAML):\n    rates = 'fixed'\n")
    info = tmp_path / "signs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: signs\nVersion: 1.0\n")
    points = "signs = signs:Signs\ngone = nosuchmodule:X\nnone = signs:None\nnumber = signs:__doc__\n"
    (info / "entry_points.txt").write_text(f"[metakern.algorithms]\n{points}")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        built = build_algorithm(Config(algorithm="signs"), torch.nn.Linear(3, 2))
        assert type(built).__name__ == "Signs"
        assert not list(built.inner.parameters())  # its rates are fixed
    finally:
        ALGORITHMS.pop("signs", None)
    for name, place in (("gone", "nosuchmodule:X"), ("none", "signs:None"), ("number", "signs:__doc__")):
        with pytest.raises(UserError, match=f"algorithm '{name}' can't be loaded from {place}: "):
            Config(algorithm=name)
    with pytest.raises(UserError, match=r"algorithm must be one of maml, .*, got 'sings'"):
        Config(algorithm="sings")
    with pytest.raises(ValueError, match="name must be a new one"):
        mk.register_algorithm("maml", mk.MAML)
