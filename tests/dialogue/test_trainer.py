"""Training: runs stop and resume bit for bit, keep their best weights, and name the task that diverged."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, write_tasks

import metakern as mk
from metakern import io
from metakern.dialogue import checkpoint, rates, sharding, trainer
from metakern.dialogue.config import Config
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import curve, episodes, load_split
from metakern.dialogue.trainer import DivergenceError, StoppedError, _Loop, _schedule, train
from metakern.errors import CheckpointError, UserError


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


def final(run_folder):
    """Return the tensors and the state of the last checkpoint of a run, without its training time."""
    tensors, state = checkpoint.load(run_folder / "checkpoints", "last")
    return tensors, {key: value for key, value in state.items() if key != "seconds"}


def log_of(run_folder, phase):
    """Return the lines of a run's log that are of a phase."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def stop_after(monkeypatch, samples, number=signal.SIGINT):
    """Make the `samples`-th call of Episodes.sample send a signal to this process."""
    real, drawn = Episodes.sample, []

    def sample(self, step, tasks, *share):
        drawn.append(step)
        if len(drawn) == samples:
            os.kill(os.getpid(), number)
        return real(self, step, tasks, *share)

    monkeypatch.setattr(Episodes, "sample", sample)


@pytest.mark.parametrize(
    ("stopped_at", "changes"),
    [
        (("pretrain", 2), {"dropout": 0.3}),
        (("pretrain", 3), {"algorithm": "reptile"}),
        (("train", 3), {"dropout": 0.3}),
        (("train", 1), {"model": "gpt", "heads": 2, "algorithm": "fomaml", "learn_lr": False}),
        (("train", 4), {"algorithm": "metasgd", "inner_lr": 0.1, "pretrain_steps": 0}),
        (("train", 2), {"algorithm": "finetune", "model": "lstm"}),
        (("train", 3), {"algorithm": "mamlplusplus", "algorithm_options": ("anneal=4", "first_order_calls=1")}),
        (("train", 2), {"algorithm": "imaml", "algorithm_options": ("tolerance=1e9",)}),
        (("train", 2), {"algorithm": "boil", "inner": "metacurvature"}),
        (("train", 2), {"algorithm": "hypernetwork", "algorithm_options": ("width=8", "rank=2")}),
        (("train", 2), {"inner_steps": (1, 2), "lm_weight": 0.5, "task_power": 1.0, "positive_rates": True}),
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, data, monkeypatch, stopped_at, changes):
    config = tiny_config(data, **changes)
    train(config, tmp_path / "whole")
    phase, step = stopped_at
    with monkeypatch.context() as patch:
        stop_after(patch, step + (config.pretrain_steps if phase == "train" else 0))
        stopped = f"stopped at step {step} of {phase}; go on with: metakern train --resume --out {tmp_path / 'cut'}"
        with pytest.raises(StoppedError, match=stopped):
            train(config, tmp_path / "cut")
    assert final(tmp_path / "cut")[1]["step"] == step
    torch.manual_seed(99)
    train(config, tmp_path / "cut", resume=True)

    for name in ("last", "best", "pretrained"):
        whole, cut = (checkpoint.load(tmp_path / run / "checkpoints", name) for run in ("whole", "cut"))
        assert whole[0].keys() == cut[0].keys()
        assert all(torch.equal(whole[0][key], cut[0][key]) for key in whole[0])
        assert {**whole[1], "seconds": 0} == {**cut[1], "seconds": 0}
    assert log_of(tmp_path / "whole", "train") == log_of(tmp_path / "cut", "train")


def test_a_resumed_baseline_goes_on_from_its_own_weights(tmp_path, data, monkeypatch):
    """Not from those that it started with again."""
    config = tiny_config(data)
    train(config, tmp_path / "run")
    baseline = replace(config, algorithm="finetune")
    train(baseline, tmp_path / "whole", start=tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StoppedError):
            train(baseline, tmp_path / "cut", start=tmp_path / "run")
    train(baseline, tmp_path / "cut", resume=True, start=tmp_path / "run")
    (whole, state), (cut, other) = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert {**state, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_with_more_steps(tmp_path, data):
    config = tiny_config(data, cosine=False)
    train(config, tmp_path / "whole")
    train(replace(config, steps=3), tmp_path / "more")
    train(config, tmp_path / "more", resume=True)
    whole, more = final(tmp_path / "whole"), final(tmp_path / "more")
    assert whole[1] == more[1]
    assert all(torch.equal(whole[0][key], more[0][key]) for key in whole[0])


def test_numbers_of_inner_steps_take_turns_and_their_mean_is_validated(tmp_path, data, monkeypatch):
    taken = []
    forward = mk.MAML.forward

    def noted(self, support, query):
        taken.append(self.steps)
        return forward(self, support, query)

    monkeypatch.setattr(mk.MAML, "forward", noted)
    run = train(tiny_config(data, inner_steps=(1, 4), steps=5, eval_every=5), tmp_path / "run")
    assert taken == [1, 4, 1, 4, 1]
    assert run.algorithm.steps == 4
    split = load_split(run.config)
    _, losses = curve(run.algorithm, episodes(run.config, split.validation, run.tokenizer), (1, 4))
    assert run.state["best"] == pytest.approx(losses.mean().item(), rel=1e-5)
    taken.clear()
    train(tiny_config(data, inner_steps=(1, 4), steps=2, algorithm="mamlplusplus"), tmp_path / "other")
    assert taken == [4, 4]


def test_clipped_inner_gradients_have_learned_rates_in_the_log(tmp_path, data):
    train(tiny_config(data, inner_clip=0.1, lr_per="element", log_every=1), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [line["rate"] for line in lines if "rate" in line]
    assert rates[0] == pytest.approx(0.3)
    assert rates[-1] != rates[0]


def test_training_begins_with_the_best_weights_of_the_pretraining(tmp_path, data):
    run = train(tiny_config(data, pretrain_steps=12, eval_every=2, pretrain_lr=3.0, cosine=False), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {phase: {} for phase in ("pretrain", "train")}
    for line in lines:
        if "validation_before" in line:
            losses[line["phase"]][line["step"]] = line["validation_before"]
    best = min(losses["pretrain"], key=losses["pretrain"].get)
    assert best < 12
    assert losses["train"][0] == losses["pretrain"][best]
    run.restore("pretrained", run.model)
    assert (run.state["phase"], run.state["step"]) == ("pretrain", best)


def test_the_plain_loss_is_added_with_its_weight(tmp_path, data):
    runs = [train(tiny_config(data, steps=1, eval_every=1, lm_weight=w), tmp_path / str(w)) for w in (0.0, 1e-6, 1e6)]
    plain, same, other = (torch.cat([p.flatten() for p in run.algorithm.parameters()]) for run in runs)
    assert not plain.equal(other)
    torch.testing.assert_close(plain, same, rtol=0, atol=1e-4)


def test_training_ends_after_validations_without_a_better_one(tmp_path, data, monkeypatch):
    scores = iter((3.0, 2.0, 2.5, 2.2, 1.0, 0.5))

    def found(*_):
        return ["task0"], torch.full((2, 1), next(scores))

    monkeypatch.setattr("metakern.dialogue.trainer.curve", found)
    config = tiny_config(data, pretrain_steps=0, steps=50, eval_every=1, patience=2)
    train(config, tmp_path / "run")
    assert final(tmp_path / "run")[1]["step"] == 3
    assert checkpoint.load(tmp_path / "run" / "checkpoints", "best")[1]["step"] == 1
    train(replace(config, patience=4, steps=5), tmp_path / "run", resume=True)
    assert final(tmp_path / "run")[1]["step"] == 5


def test_learned_rates_are_logged_and_can_be_kept_positive(tmp_path, data):
    for positive in (False, True):
        config = tiny_config(data, lr_per="element", rate_lr=2.0, steps=8, log_every=1, positive_rates=positive)
        run = train(config, tmp_path / str(positive))
        lines = log_of(tmp_path / str(positive), "train")
        assert lines[1]["rate"] == pytest.approx(0.3, rel=1e-5)  # the first line is a validation
        assert lines[1]["rate_std"] < 1e-6
        negative = max(line["rate_negative"] for line in lines if "rate" in line)
        assert (negative > 0) is not positive
        assert all((rate >= 0).all() for rate in run.algorithm.inner.parameters()) or not positive


def test_training_learns_and_is_logged(tmp_path, data):
    config = tiny_config(data, steps=30, pretrain_steps=40, pretrain_lr=0.03, outer_lr=0.02, log_every=5, eval_every=10)
    run = train(config, tmp_path / "run")
    assert Config.load(tmp_path / "run" / "config.toml") == config
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    lines = log_of(tmp_path / "run", "train")
    validations = {line["step"]: line for line in lines if "validation_after" in line}
    assert list(validations) == [0, 10, 20, 30]
    assert validations[30]["validation_after"] < validations[0]["validation_after"] - 0.05
    assert validations[30]["validation_after"] < validations[30]["validation_before"] - 0.05
    best = min(validations.values(), key=lambda line: line["validation_after"])
    assert (run.state["step"], run.state["best"]) == (best["step"], best["validation_after"])
    losses = [line for line in lines if "before" in line]
    assert [line["step"] for line in losses] == list(range(0, 30, 5))
    for line in losses:
        assert line["lr"] == 0.02 * _schedule(config, line["step"], line["step"] / 30)
        assert line["after"] == pytest.approx(line["loss"], rel=1e-4)  # equal, as there is no dropout


def test_the_checkpoint_with_the_best_validation_loss_is_returned(tmp_path, data, monkeypatch):
    scores, trained = iter([3.0, 2.0, 4.0]), set()
    sample = Episodes.sample

    def validate(algorithm, source, steps, limit):
        assert limit == 5
        assert {name for names, _, _ in source.evaluation() for name in names}.isdisjoint(trained)
        return [], torch.tensor([[9.0], [next(scores)]])

    def spy(self, step, tasks, *share):
        trained.update(self.names(step, tasks))
        return sample(self, step, tasks, *share)

    monkeypatch.setattr(Episodes, "sample", spy)
    monkeypatch.setattr("metakern.dialogue.trainer.curve", validate)
    run = train(tiny_config(data, pretrain_steps=0, eval_tasks=5), tmp_path / "run")
    assert (run.state["best"], run.state["step"]) == (2.0, 3)


def test_a_second_ctrl_c_stops_at_once(tmp_path, data, monkeypatch):
    real = Episodes.sample

    def sample(self, step, tasks, *share):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, tasks, *share)

    monkeypatch.setattr(Episodes, "sample", sample)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(data), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    assert final(tmp_path / "run")[1]["step"] == 0


def test_sigterm_stops_a_run_as_ctrl_c_does(tmp_path, data, monkeypatch):
    stop_after(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped at step 1 of train"):
        train(tiny_config(data, pretrain_steps=0), tmp_path / "run")


@pytest.mark.parametrize("phase", ["pretrain", "train"])
@pytest.mark.parametrize("eval_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, data, phase, eval_every):
    rate = "pretrain_lr" if phase == "pretrain" else "outer_lr"
    config = tiny_config(data, eval_every=eval_every, warmup=0, **{rate: 1e30})
    with pytest.raises(DivergenceError) as error:
        train(config, tmp_path / "run")
    kept, state = final(tmp_path / "run")
    cure = f"checkpoints/last holds step {state['step']}: try a lower inner_lr or {rate} in a new run"
    assert re.fullmatch(
        rf"the (gradient|loss of task 'task\d') is not finite at step \d of {phase}; {cure}", str(error.value)
    )
    assert state["phase"] == phase
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_first_validation_that_is_not_finite_is_one_line(tmp_path, data):
    with pytest.raises(DivergenceError) as error:
        train(tiny_config(data, pretrain_steps=0, inner_lr=1e38), tmp_path / "run")
    assert re.fullmatch(
        r"the loss of task 'task\d' is not finite at step 0 of train; try a lower inner_lr or outer_lr in a new run",
        str(error.value),
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_a_validation_that_is_not_finite_names_its_task(tmp_path, data, monkeypatch, adapted):
    broken = torch.tensor([1.0, float("nan"), 1.0])
    curves = iter([torch.ones(2, 3), torch.stack([torch.ones(3), broken] if adapted else [broken, torch.ones(3)])])
    monkeypatch.setattr("metakern.dialogue.trainer.curve", lambda *_: (["a", "b", "c"], next(curves)))
    with pytest.raises(
        DivergenceError, match=r"the loss of task 'b' is not finite at step 3 of train; .* holds step 0"
    ):
        train(tiny_config(data, pretrain_steps=0), tmp_path / "run")


@pytest.mark.parametrize(
    ("losses", "what"), [([1.0, float("nan")], "the loss of task '{1}'"), ([1.0, 2.0], "the gradient")]
)
def test_a_diverged_step_names_its_task_or_the_gradient(tmp_path, data, monkeypatch, losses, what):
    clip, calls, names = sharding.clip, [], []

    def broken_at_step_2(parameters, limit):
        calls.append(limit)
        return torch.tensor(float("inf")) if len(calls) == 3 else clip(parameters, limit)

    def look(loop, support, query):
        names[:] = loop.phase.episodes.names(2, 2)
        return torch.tensor([[1.0, 1.0], losses])

    monkeypatch.setattr("metakern.dialogue.trainer.clip", broken_at_step_2)
    monkeypatch.setattr("metakern.dialogue.trainer._Loop.look", look)
    with pytest.raises(DivergenceError) as error:
        train(tiny_config(data, pretrain_steps=0), tmp_path / "run")
    assert str(error.value).startswith(f"{what.format(*names)} is not finite at step 2 of train")


def test_a_training_takes_the_time_that_it_is_planned_for(tmp_path, data, monkeypatch, capsys):
    now, known = [0.0], set()

    def timed(owner, name, seconds):
        real = getattr(owner, name)

        def slow(*arguments):
            now[0] += seconds(*arguments)
            return real(*arguments)

        monkeypatch.setattr(owner, name, slow)

    def step(loop):
        seconds = 2.0 if loop.phase.name == "pretrain" else loop.config.inner_steps[loop.run.state["step"] % 2]
        kind = loop.run.path, loop.phase.name, seconds
        seconds += 0.0 if kind in known else 20.0
        known.add(kind)
        return seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timed(_Loop, "step", step)
    timed(_Loop, "validate", lambda loop: 6.0 if loop.phase.name == "pretrain" else 16.0)
    timed(_Loop, "look", lambda loop, *_: 1.0)
    timed(trainer, "curve", lambda *_: 10.0)
    timed(rates, "curve", lambda *_: 10.0)
    config = tiny_config(data, inner_steps=(1, 3), pretrain_steps=4, steps=6, eval_every=3, log_every=2)
    train(config, tmp_path / "run", seconds=900.0)
    assert now[0] == pytest.approx(900, rel=0.03)
    found = Config.load(tmp_path / "run" / "config.toml")
    assert found.pretrain_steps / found.steps == pytest.approx(4 / 6, rel=0.1)
    assert (found.eval_every, found.log_every) == (-(-found.steps // 2), -(-found.steps // 3))
    assert final(tmp_path / "run")[1]["step"] == found.steps
    steps = f"{found.pretrain_steps} steps of pretraining at 0.5 a second, {found.steps} outer steps at 0.5 a second"
    assert capsys.readouterr().out.count(f"planned: {steps}\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3, "inner_steps": (1, 2), "lr_per": "element", "rate_lr": 1.0},
        {"algorithm": "mamlplusplus", "algorithm_options": ("anneal=4", "first_order_calls=1"), "pretrain_steps": 0},
        {"algorithm": "finetune", "model": "lstm"},
    ],
)
def test_planning_changes_nothing_but_the_numbers_of_steps(tmp_path, data, monkeypatch, changes):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    planned_steps = {"steps": 5, "pretrain_steps": min(changes.get("pretrain_steps", 3), 3)}
    config = tiny_config(data, **changes)
    monkeypatch.setattr("metakern.dialogue.trainer.planned", lambda config, *_: replace(config, **planned_steps))
    torch.manual_seed(99)
    with monkeypatch.context() as patch:
        stop_at = planned_steps["pretrain_steps"] + 2
        real, made = Run.create, []

        def create(path, *arguments):
            made.append(path)
            if path == tmp_path / "run":
                stop_after(patch, stop_at)
            return real(path, *arguments)

        patch.setattr(Run, "create", create)
        with pytest.raises(StoppedError, match="stopped at step 2 of train"):
            train(config, tmp_path / "run", seconds=1e-3)
    assert len(made) == 2
    assert not list((tmp_path / "temporary").iterdir())
    train(Config.load(tmp_path / "run" / "config.toml"), tmp_path / "run", resume=True)
    train(replace(config, **planned_steps), tmp_path / "other")
    for name in ("last", "best", "pretrained"):
        one, other = (checkpoint.load(tmp_path / run / "checkpoints", name) for run in ("run", "other"))
        assert one[0].keys() == other[0].keys()
        assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    for phase in ("pretrain", "train"):
        assert log_of(tmp_path / "run", phase) == log_of(tmp_path / "other", phase)


def test_a_time_that_cannot_be_planned_for_is_one_line(tmp_path, data):
    config = tiny_config(data, pretrain_steps=0)
    with pytest.raises(UserError, match=r"train: --time must be at least \d+s, .*, got 0.001s: give more time"):
        train(config, tmp_path / "run", seconds=1e-3)
    with pytest.raises(UserError, match=r"train: --time cannot be planned, as losses .*: try a lower inner_lr"):
        train(replace(config, inner_lr=1e30), tmp_path / "run", seconds=60.0)
    assert not (tmp_path / "run").exists()
    for options in ({"resume": True}, {"start": tmp_path / "run"}):
        train(replace(config, steps=1), tmp_path / "run", resume=(tmp_path / "run").exists())
        out = tmp_path / ("run" if "resume" in options else "other")
        with pytest.raises(UserError, match=f"{out}: --time must be for a new run, whose steps it plans"):
            train(config, out, seconds=60.0, **options)


def test_the_worth_of_adaptation_is_said_after_pretraining(tmp_path, data, monkeypatch, capsys):
    def said():
        lines = capsys.readouterr().out.splitlines()
        return [(lines[i - 1], line) for i, line in enumerate(lines) if line.startswith(("adaptation", "that is"))]

    config = tiny_config(data, algorithm="reptile", pretrain_steps=60, pretrain_lr=0.02, steps=2, eval_tasks=1)
    train(config, tmp_path / "run")
    ((before, line),) = said()
    assert before.startswith("train 0: validation loss ")
    run = Run.create(tmp_path / "run", replace(config, algorithm="finetune"), Run.open(tmp_path / "run").tokenizer)
    run.restore("pretrained", run.model)
    validation = episodes(config, load_split(config).validation, run.tokenizer)
    looks = (0, 1, 3, 5)
    means = rates.tuned(run.algorithm, validation, looks, 1)[1].mean(1)
    gain = means[0] - means.min()
    assert gain > 0.1
    measured = "nats per token on the validation tasks, in up to 5 steps"
    assert line == f"adaptation of the pretrained weights is worth {gain:.2f} {measured}"

    train(replace(config, steps=3), tmp_path / "run", resume=True)
    train(replace(config, algorithm="finetune"), tmp_path / "run" / "finetune", start=tmp_path / "run")
    train(replace(config, pretrain_steps=0), tmp_path / "other")
    assert not said()
    monkeypatch.setattr("metakern.dialogue.gain.LITTLE", 100.0)
    train(replace(config, pretrain_steps=1), tmp_path / "little")
    (_, _), (_, little) = said()
    assert little == ("that is little: the context tells the task already, and no meta-learner can win much more here")


def test_the_steps_of_a_pretraining_that_has_ended_stay(tmp_path, data):
    config = tiny_config(data, steps=2, pretrain_steps=0)
    train(config, tmp_path / "run")
    with pytest.raises(UserError, match="pretrain_steps must be 0 as when the run began, got 5"):
        train(replace(config, steps=3, pretrain_steps=5), tmp_path / "run", resume=True)


def test_a_baseline_starts_where_the_run_started(tmp_path, data):
    config = tiny_config(data)
    train(config, tmp_path / "run")
    train(replace(config, algorithm="finetune"), tmp_path / "run" / "finetune", start=tmp_path / "run")
    own, other = log_of(tmp_path / "run", "train")[0], log_of(tmp_path / "run" / "finetune", "train")[0]
    assert own["validation_before"] == other["validation_before"]
    assert not log_of(tmp_path / "run" / "finetune", "pretrain")
    tokenizers = {(tmp_path / "run" / name / "tokenizer.json").read_bytes() for name in ("", "finetune")}
    assert len(tokenizers) == 1


def test_a_run_is_not_overwritten_nor_resumed_with_another_config(tmp_path, data):
    config = tiny_config(data, steps=1, pretrain_steps=0)
    with pytest.raises(UserError, match="holds no run to resume"):
        train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "run")
    before = final(tmp_path / "run")[0]
    with pytest.raises(UserError, match=r"holds a run already; go on with it by --resume, or choose another --out"):
        train(config, tmp_path / "run")
    for change in ({"hidden": 9}, {"vocab_size": 400}, {"seed": 4}, {"algorithm": "fomaml"}):
        ((key, value),) = change.items()
        with pytest.raises(UserError, match=f"{key} must be .* as when the run began, got {value!r}: resume without"):
            train(replace(config, **change), tmp_path / "run", resume=True)
    assert all(torch.equal(before[key], value) for key, value in final(tmp_path / "run")[0].items())


def test_a_run_with_another_vocabulary_is_refused(tmp_path, data):
    folder = tmp_path / "run"
    train(tiny_config(data, steps=1, pretrain_steps=0), folder)
    train(tiny_config(data, steps=1, pretrain_steps=0, vocab_size=280), tmp_path / "other")
    (folder / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not the vocabulary that .*best was trained with"):
        Run.open(folder)
    with pytest.raises(CheckpointError, match="is not the vocabulary"):
        train(tiny_config(data, steps=2, pretrain_steps=0), folder, resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """The folder of a finished run, which tests copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(data, steps=2, eval_every=1, pretrain_steps=0), folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_config_that_was_cut_short_or_changed_does_not_resume_with_defaults(copied, data):
    config, file = tiny_config(data, steps=3, eval_every=1, pretrain_steps=0), copied / "config.toml"
    whole = file.read_text()
    lines = whole.splitlines()[:-1]
    for text, said in (
        (whole[: len(whole) // 2], "lacks "),
        (whole.replace("hidden = 8", "hidden = 9"), "is not as it was written: put it back"),
        ("\n".join(lines).replace("hidden = 8", "hidden = 9"), "hidden must be 8 as when .*last was saved, got 9"),
        ("\n".join(lines[:40]), "lacks "),
    ):
        file.write_text(text)
        for resumed in (config, replace(config, hidden=9)):
            with pytest.raises(UserError, match=f"config.toml: {said}"):
                train(resumed, copied, resume=True)
        assert file.read_text() == text
    file.write_text("\n".join(lines))  # without the digest, as after a change by hand
    train(config, copied, resume=True)
    assert final(copied)[1]["step"] == 3


def test_a_run_resumes_from_the_checkpoint_before(copied, data, tmp_path, capsys):
    config = tiny_config(data, steps=2, eval_every=1, pretrain_steps=0)
    whole = final(copied)
    last = copied / "checkpoints" / "last.json"
    for content in (last.read_text().replace('"train"', '"trbin"'), None):
        last.unlink() if content is None else last.write_text(content)
        train(config, copied, resume=True)
        assert f"metakern: {last}: " in capsys.readouterr().err
        assert final(copied)[1] == whole[1]
        assert all(torch.equal(value, final(copied)[0][key]) for key, value in whole[0].items())


def test_two_processes_cannot_train_into_one_folder(copied, data):
    with io.locked(copied), pytest.raises(UserError, match=r"run: is in use by process \d+ on"):
        train(tiny_config(data, steps=3, eval_every=1, pretrain_steps=0), copied, resume=True)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("outer.0.exp_avg", lambda x: x.to(torch.int8), "must be torch.float32 for this config, got torch.int8"),
        ("outer.0.exp_avg", lambda x: x * torch.nan, "must be finite, got infinities or NaN"),
        ("outer.0.exp_avg", lambda x: x[1:], "must be .* for this config, got"),
        ("outer.0.exp_avg", lambda x: None, "is missing"),
        ("outer.0.step", lambda x: None, "is not a tensor of this config"),
        ("outer.99.step", lambda x: torch.zeros(()), "is not a tensor of this config"),
        ("random", lambda x: x[1:], "must be .* for this config, got"),
        ("random", lambda x: torch.full_like(x, 255), "holds no state of a random generator"),
        ("weights.model.head.bias", lambda x: x.double(), "must be torch.float32 for this config, got torch.float64"),
    ],
)
def test_wrong_tensors_with_a_right_digest_are_refused(copied, data, name, change, said):
    folder = copied / "checkpoints"
    tensors, state = checkpoint.load(folder, "last")
    value = change(tensors.pop(name, None))
    checkpoint.save(folder, "last", tensors if value is None else tensors | {name: value}, state)
    with pytest.raises(CheckpointError, match=f"last: .*{said}"):
        train(tiny_config(data, steps=3, eval_every=1, pretrain_steps=0), copied, resume=True)


@pytest.mark.parametrize(
    "change", [{"phase": "trbin"}, {"step": -1}, {"step": "2"}, {"best": True}, {"worse": None}, {"config": []}]
)
def test_wrong_states_with_a_right_digest_are_refused(copied, change):
    folder = copied / "checkpoints"
    tensors, state = checkpoint.load(folder, "best")
    checkpoint.save(folder, "best", tensors, state | change)
    with pytest.raises(CheckpointError, match=f"best: {next(iter(change))} must be as metakern writes it, got"):
        Run.open(copied)


def test_the_schedule_warms_up_and_ends_at_zero():
    config = Config(warmup=4, steps=100)
    rates = [_schedule(config, step, step / 100) for step in range(101)]
    assert rates[:4] == sorted(rates[:4])
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] < 1
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[100] == 0
    assert _schedule(replace(config, cosine=False), 50, 0.5) == 1
