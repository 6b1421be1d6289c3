"""Train a dialogue model, with or without meta-learning.

A run has two phases, which share one loop: `pretrain` (plain language modeling on the training tasks; baselines start
from its weights too) and `train` (the algorithm of the config). A step depends on the weights, the optimizer's state,
the state of the random generator and the number of the step alone. A checkpoint holds all four, so a resumed run
repeats the uninterrupted one bit for bit on the CPU. If a training is to take a given time, the numbers of steps are
planned beforehand, from a rehearsal on a copy of the model; from then on it depends on steps alone. Several processes
share the tasks of each step (`metakern.dialogue.processes`), and a run may go on with another number of them.
"""

from __future__ import annotations

import math
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metakern import io
from metakern.dialogue import checkpoint, processes
from metakern.dialogue.baselines import FineTune
from metakern.dialogue.config import MAY_CHANGE, Config
from metakern.dialogue.display import Display
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.gain import gain, worth
from metakern.dialogue.hints import Hints
from metakern.dialogue.log import Log
from metakern.dialogue.manager.parser import calibrate
from metakern.dialogue.manager.training import labels_of, prepare
from metakern.dialogue.manager.utterances import Utterances
from metakern.dialogue.planning import Costs, PhaseCosts, planned, seconds_of, seconds_of_calls
from metakern.dialogue.rates import optimizers, tuned
from metakern.dialogue.registry import ONE_NUMBER, PLAIN, build_algorithm, tokenizer_class
from metakern.dialogue.run import Run, verified
from metakern.dialogue.sharding import Sharding, clip, gathered, part_of, replicated
from metakern.dialogue.split import Split
from metakern.dialogue.tasks import EpisodeSource, curve, episodes, load_split, on_device_of, source_of
from metakern.dialogue.tokenizer import DialogueTokenizer, Tokenizer, bot_in
from metakern.errors import CheckpointError, UserError
from metakern.meta.algorithms.registry import ALGORITHMS

__all__ = ["DivergenceError", "StoppedError", "train"]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the optimizer's state of a parameter
LOOKS = (0, 1, 3, 5)  # numbers of inner steps after which the pretrained weights are judged
TUNING = 5  # how many factors of the inner rates a search usually tries
AUGMENTED = 0.5  # share of few training tasks whose tokens are renamed
SAMPLE = 20_000  # streamed conversations that the tokenizer learns from
SAME_SIGNAL = 2.0  # seconds
EPISODES = 16  # of which a rehearsal takes one of median length


class DivergenceError(UserError):
    """A loss or a gradient is not finite."""

    everywhere = True


class StoppedError(UserError):
    """The user stopped the run, which has been saved."""

    code = 130
    everywhere = True


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    start: str | Path | None = None,
    seconds: float | None = None,
) -> Run:
    """Train a model as `config` says, and write the run into the folder `out`.

    After an error or a crash, the checkpoints in `out` can be used all the same. No other process can train into `out`
    in the meantime. Where torchrun has started several processes, each calls this function with the same arguments and
    computes its share of the tasks. After a restart by torchrun the run goes on from its last checkpoint.

    Args:
        config: All settings of the run.
        out: The folder of the run, which must not hold another one.
        resume: Continue the run in `out`. Only `steps`, `patience`, `log_every`, `eval_every`, `eval_tasks`, `device`,
            `threads` and `shard` may differ from its config, and `pretrain_steps` until the pretraining has ended.
        start: The folder of another run, whose tokenizer and pretrained weights this one begins with. A baseline
            begins so.
        seconds: The time that all of it should take, by which `steps`, `pretrain_steps`, `eval_every` and `log_every`
            are multiplied by one factor. The config of the run has the planned numbers. None: as `config` says.

    Returns:
        The run, with the weights that had the lowest loss on the validation tasks.

    Raises:
        UserError: If `out` holds a run and `resume` is False, or no run and `resume` is True; if a resumed run has
            another config; if another process trains into `out`; if a setting does not suit the machine or the data; if
            `seconds` is too short for a step, or given with `resume` or `start`.
        DataError: If the data can't be read or hold too few tasks.
        CheckpointError: If a checkpoint can't be written, or one to begin with can't be used: it is damaged, or its run
            has another config or tokenizer than when it was saved.
        DivergenceError: If a loss or a gradient is not finite.
        StoppedError: After Ctrl-C or SIGTERM, when the run has been saved.
        LostProcessError: If another process has ended; the run has been saved.

    >>> import contextlib, io, tempfile
    >>> data = {"data": "chatterbot:english", "vocab_size": 262, "max_length": 16}
    >>> config = Config(**data, width=8, inner_steps=1, steps=1, pretrain_steps=0)
    >>> with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
    ...     run = train(config, out)
    >>> run.state["phase"]
    'train'
    """
    with processes.joined(), _locked(Path(out)):
        return _train(config, Path(out), resume, Path(start) if start else None, seconds)


def _train(config: Config, out: Path, resume: bool, start: Path | None, seconds: float | None) -> Run:
    """Train as `train` says, in the group of processes, if there is one."""
    began = time.perf_counter()
    if not resume and processes.first(partial(_restarted, out)):
        resume, seconds, config = True, None, processes.first(partial(Config.load, out / "config.toml"))
    processes.first(lambda: _check(config, out, resume, start, seconds))
    split = load_split(config)
    tokenizer = processes.first(lambda: _tokenizer(config, split, out if resume else start))
    labels = labels_of(config, split.train)
    changes: dict[str, Any] = {}
    if config.part == "generator":
        changes["augment"] = _augment(config, len(split.train))
    elif config.part == "parser" and config.algorithm == "finetune":
        changes["whole"] = True
    sources = _Sources(
        episodes(config, split.train, tokenizer, train_on=config.pretrain_on, seed=config.seed + 1),
        episodes(config, split.validation, tokenizer),
        source_of(config, split.train, tokenizer, labels, **changes),
        source_of(config, split.validation, tokenizer, labels),
    )
    if seconds is not None:
        Display().say(f"{out}: measuring steps, to plan a training of {seconds:g} s")
        measured = _rehearsal(config, tokenizer, labels, sources, seconds, began)
        costs = processes.first(lambda: measured)
        config = planned(config, seconds, costs)
    run = Run.create(out, config, tokenizer, labels)
    run.data = split.digest
    saved = _restore(run, "last") if resume else {}  # before anything is written, as it refuses other data

    def write() -> None:
        if not resume:
            run.save_vocabulary()
        io.write(out / "config.toml", config.toml().encode())

    processes.first(write)
    if not resume:
        prepare(run.model, split.train, tokenizer)
    plain, phases = _parts(run, sources)
    if start and not resume:
        _restore(run, "pretrained", run.body, start)
    sharding = Sharding(run.algorithm, config.shard)
    if start or (resume and run.state["phase"] == "train"):
        phases = phases[-1:]
    with Log(out) as log, _stop_asked() as stop_asked:
        log.say(f"{out}: {config.algorithm} over {config.model} of {run.size}\n{split.summary()}")
        if processes.size() > 1:
            log.say(f"{processes.size()} processes share the {config.tasks} tasks of a step")
        if seconds is not None:
            log.say(costs.summary(config))
        for phase in phases:
            if phase.name == "train" and not saved:
                with sharding.whole(change=True):
                    if config.pretrain_steps and not start:
                        _restore(run, "pretrained", run.body)
                    else:
                        run.state = run.state or phase.beginning()
                        _save(run, "pretrained", run.body)
            loop = _Loop(run, phase, plain, log, sharding)
            if saved:
                loop.restore(saved)
            else:
                loop.begin()
                if phase.name == "train" and _tells_worth(config) and not start:
                    with sharding.whole():
                        log.say(_worth_of_adaptation(config, plain, sources.language_validation))
            loop.go(stop_asked)
            saved = {}
    if sharding.active:  # a run whose parameters are whole
        run = replace(Run.create(out, config, tokenizer, labels), data=run.data)
    _restore(run, "best")
    if isinstance(sources.validation, Utterances):
        run.state["thresholds"] = calibrate(run, sources.validation)
        _save(run, "best")
    run.algorithm.steps = config.most_inner_steps  # as in a run that is opened
    return run


def _is_adapted(out: Path) -> bool:
    """Whether a folder holds a run that `metakern adapt` made."""
    try:
        return checkpoint.state_of(out / "checkpoints", "best").get("phase") == "adapted"
    except CheckpointError:
        return False


def _augment(config: Config, tasks: int) -> float:
    """Return the share of the training tasks to rename.

    There is none if the tasks are too many to be remembered, the model's tokens have meanings already, or nothing is
    learned from a support.
    """
    without = config.pretrained or ALGORITHMS[config.algorithm].make in PLAIN
    return 0.0 if without or tasks >= config.augment_below else AUGMENTED


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Within the block, the first process holds the lock of the run's folder, from which it removes leftovers."""

    def enter() -> None:
        stack.enter_context(io.locked(out))
        checkpoint.sweep(out / "checkpoints")

    with ExitStack() as stack:
        processes.first(enter)
        yield


def _check(config: Config, out: Path, resume: bool, start: Path | None, seconds: float | None) -> None:
    """Raise a `UserError` if the arguments of `train` do not go with each other, the run or the processes."""
    started = checkpoint.exists(out / "checkpoints", "last")
    if (started or _is_adapted(out)) and not resume:
        raise UserError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")
    if resume and not started:
        raise UserError(f"{out}: holds no run to resume (no checkpoints/last.json)")
    if seconds is not None and (resume or start):
        raise UserError(
            f"{out}: --time must be for a new run, whose steps it plans: change --steps to go on for longer"
        )
    processes.check(config.tasks, config.device)
    if resume:
        _check_same(verified(out, "last"), config, out)
    if start:
        verified(start, "pretrained")


def _restarted(out: Path) -> bool:
    """Whether `out` holds a run that this launch by torchrun has begun, before a restart."""
    launch, folder = processes.launch_id(), out / "checkpoints"
    return (
        bool(launch)
        and checkpoint.exists(folder, "last")
        and checkpoint.state_of(folder, "last").get("launch") == launch
    )


def _tokenizer(config: Config, split: Split, folder: Path | None) -> DialogueTokenizer:
    """Return the tokenizer of the run in a folder; without one, that of the pretrained model, or a new one."""
    if folder:
        return tokenizer_class(config).load(folder / "tokenizer.json")
    if config.pretrained:
        from metakern.dialogue.huggingface import ChatTokenizer

        return ChatTokenizer.of(config.pretrained, config.system)
    dialogues = [dialogue for task in split.train for dialogue in task.dialogues]
    if config.stream and len(dialogues) > SAMPLE:
        dialogues = random.Random(config.seed).sample(dialogues, SAMPLE)
    if "act" in config.hints:
        hints = Hints("act")
        dialogues = [replace(d, turns=hints(d.turns, bot_in(d))) for d in dialogues]
    return Tokenizer.train(dialogues, config.vocab_size, io.cache_folder())


def _save(run: Run, name: str, module: nn.Module | None = None, extra: Mapping[str, Tensor] | None = None) -> None:
    """Let the first process write a checkpoint, as `Run.save` does."""
    processes.first(partial(run.save, name, module, extra))


def _restore(run: Run, name: str, module: nn.Module | None = None, source: Path | None = None) -> dict[str, Tensor]:
    """Let the first process load a checkpoint, as `Run.restore` does, and send it to the others."""
    extra, run.state = processes.first(lambda: (run.restore(name, module, source), run.state))
    processes.synchronize(list(checkpoint.module_tensors(module or run.algorithm).values()))
    return extra


def differing(old: Config, new: Config, *more: str) -> list[str]:
    """Return the settings that must stay as a run began with them, those in `more` among them, and differ."""
    fixed = [key.name for key in fields(Config) if key.name not in MAY_CHANGE or key.name in more]
    return [name for name in fixed if getattr(old, name) != getattr(new, name)]


def _check_same(old: Config, new: Config, out: Path) -> None:
    pretrained = checkpoint.state_of(out / "checkpoints", "last")["phase"] == "train"
    if changed := differing(old, new, *(["pretrain_steps"] if pretrained else [])):
        name, before, after = changed[0], getattr(old, changed[0]), getattr(new, changed[0])
        raise UserError(
            f"{out}: {name} must be {before!r} as when the run began, got {after!r}: resume without changing it"
        )


@dataclass(frozen=True)
class _Sources:
    """The episodes of plain language modeling and of the algorithm, for training and for validation."""

    language: Episodes
    language_validation: Episodes
    tasks: EpisodeSource
    validation: EpisodeSource


@dataclass(frozen=True)
class _Phase:
    name: str
    algorithm: Any
    episodes: EpisodeSource
    validation: EpisodeSource
    steps: int
    lr: float

    def done(self, step: int) -> float:
        """Return the finished share of the steps, from 0 to 1."""
        return min(1.0, step / self.steps)

    def beginning(self) -> dict[str, Any]:
        """Return the state of a run at the beginning of the phase."""
        return {"phase": self.name, "step": 0, "seconds": 0.0, "best": None, "worse": 0}


def _parts(run: Run, sources: _Sources) -> tuple[FineTune, list[_Phase]]:
    """Return plain training of the language model of a run, and the phases of its training."""
    config = run.config
    plain = build_algorithm(replace(config, algorithm="finetune", algorithm_options=()), run.body, part="generator")
    language = sources.language, sources.language_validation
    phases = [
        _Phase("pretrain", plain, *language, config.pretrain_steps, config.pretrain_lr),
        _Phase("train", run.algorithm, sources.tasks, sources.validation, config.steps, config.outer_lr),
    ]
    return plain, phases if config.pretrain_steps else phases[1:]


def _tells_worth(config: Config) -> bool:
    """Whether the training says what adaptation of the pretrained language model is worth."""
    return config.part == "generator" and bool(config.pretrain_steps or config.pretrained)


def _worth_of_adaptation(config: Config, plain: FineTune, validation: Episodes) -> str:
    """Return a sentence on how much fine-tuning the pretrained weights, at tuned rates, lowers the validation loss."""
    means = tuned(plain, validation, LOOKS, config.eval_tasks)[1].mean(1).tolist()
    return worth(gain(means), "of the pretrained weights", f"on the validation tasks, in up to {LOOKS[-1]} steps")


def _rehearsal(
    config: Config,
    tokenizer: DialogueTokenizer,
    labels: Sequence[str],
    sources: _Sources,
    seconds: float,
    began: float,
) -> Costs:
    """Measure the parts of a training on a model of its own, and leave nothing behind.

    Args:
        config: The settings.
        tokenizer: The tokenizer.
        labels: Those of a parser or a policy.
        sources: The episodes.
        seconds: The time that the training should take. Calls of each kind of step take up to 2% of it; if they are
            slow, three calls.
        began: When the training began, by `time.perf_counter`.

    Raises:
        UserError: If losses are not finite.
    """
    created = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Log(Path(folder), quiet=True) as log:
        run = Run.create(Path(folder), replace(config, log_every=sys.maxsize), tokenizer, labels)
        run.save_vocabulary()
        plain, phases = _parts(run, sources)
        sharding = Sharding(run.algorithm, config.shard)
        again = time.perf_counter() - created  # what the training spends anew
        try:
            found = {p.name: _Loop(run, p, plain, log, sharding).costs(seconds / 50) for p in phases}
        except DivergenceError:
            raise UserError(
                "train: --time cannot be planned, as losses of the untrained model are not finite: try a lower inner_lr"
            ) from None
        if _tells_worth(config):
            with sharding.whole():
                look = partial(curve, plain, sources.language_validation, LOOKS, config.eval_tasks)
                again += TUNING * seconds_of(look)
    again += sum(costs.first for costs in found.values())
    return Costs(time.perf_counter() - began + again, found["train"], found.get("pretrain"))


class _Loop:
    """The loop of one phase: outer steps, validations and checkpoints."""

    def __init__(self, run: Run, phase: _Phase, plain: FineTune, log: Log, sharding: Sharding) -> None:
        self.run, self.phase, self.log, self.sharding = run, phase, log, sharding
        self.config, self.algorithm = run.config, phase.algorithm
        self.looks = (0, *sorted(set(self.config.inner_steps))) if phase.name == "train" else (0,)
        self.plain = plain
        self.trained = [p for p in self.algorithm.parameters() if p.requires_grad]
        own = {id(p) for p in run.model.parameters()}
        model = [p for p in self.trained if id(p) in own]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model if p.ndim > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in model if p.ndim <= 1]},
            {"params": [p for p in self.trained if id(p) not in own], "lr": self.config.rate_lr},
        ]
        together = False if sharding.active else None  # PyTorch updates no divided and whole parameters together
        self.optimizer = torch.optim.AdamW(groups, phase.lr, weight_decay=0.0, foreach=together)
        self.full_rates = [group["lr"] for group in self.optimizer.param_groups]

    def begin(self) -> None:
        """Begin the phase with a validation."""
        self.run.state = self.phase.beginning()
        self.validate()

    def go(self, stop_asked: Callable[[], bool]) -> None:
        """Run the phase to its end."""
        run, phase, config = self.run, self.phase, self.config
        state = run.state
        began = time.monotonic() - state["seconds"]
        self.algorithm.train()
        while phase.done(state["step"]) < 1 and not self.is_patient_no_more():
            with self.saved_at_a_loss():
                self.step()
            state["step"] += 1
            state["seconds"] = time.monotonic() - began
            self.log.step(phase.name, state["step"], phase.steps, state["seconds"])
            over = phase.done(state["step"]) == 1
            if over or state["step"] % config.eval_every == 0:
                self.validate()
            with self.saved_at_a_loss():
                stop = processes.any_of(stop_asked())
            if stop and not over:
                self.save()
                where = f"stopped at step {state['step']} of {phase.name}"
                raise StoppedError(f"{where}; go on with: metakern train --resume --out {run.path}")

    @contextmanager
    def saved_at_a_loss(self) -> Iterator[None]:
        """Within the block, if another process ends, save the run as it was at the beginning of the block."""
        buffers = [(b, b.clone()) for b in self.algorithm.buffers()] if processes.size() > 1 else []
        try:
            yield
        except processes.LostProcessError as error:
            where = f"the run is saved at step {self.run.state['step']} of {self.phase.name}"
            if self.sharding.active:
                where = "its parts of the parameters are lost, and the run is as at the last checkpoint"
            else:
                for buffer, before in buffers:
                    buffer.copy_(before)
                if processes.is_first():
                    self.write(self.moments())
            cure = f"go on with: metakern train --resume --out {self.run.path}"
            raise processes.LostProcessError(f"{processes.LOST}; {where}; {cure}") from error

    def step(self) -> None:
        """Take one outer step; every `log_every` steps, log it, with the query losses before and after adaptation."""
        config, algorithm, state = self.config, self.algorithm, self.run.state
        processes.seed(config.seed, self.phase.name, state["step"])
        episode = self.phase.episodes.sample(state["step"], config.tasks, processes.share)
        support, query = (on_device_of(self.run.model, batch) for batch in episode)
        done = self.phase.done(state["step"])
        for group, rate in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            group["lr"] = rate * _schedule(config, state["step"], done)
        if self.phase.name == "train" and len(set(config.inner_steps)) > 1 and not isinstance(algorithm, ONE_NUMBER):
            algorithm.steps = config.inner_steps[state["step"] % len(config.inner_steps)]
        self.optimizer.zero_grad()
        loss = self.share(algorithm, support, query)
        self.sharding.backward(loss)
        if config.lm_weight and self.phase.name == "train":
            self.sharding.backward(config.lm_weight * self.share(self.plain, support, query))
        loss = processes.sum_gradients(replicated(self.trained), loss)
        norm = clip(list(algorithm.parameters()), config.clip or math.inf)
        if not torch.isfinite(loss + norm):
            names = self.phase.episodes.names(state["step"], config.tasks)
            raise self.divergence(names, self.look(support, query).sum(0))
        if state["step"] % config.log_every == 0:
            numbers = {"loss": loss.item(), "norm": norm.item(), "lr": self.optimizer.param_groups[0]["lr"]}
            if self.phase.name == "train":
                before, *after = self.look(support, query).mean(1).tolist()
                numbers |= {"before": before, "after": sum(after) / len(after)} | self.spread_of_rates()
            self.log(self.phase.name, state["step"], **numbers)
        self.optimizer.step()
        if config.positive_rates:
            with torch.no_grad():
                for rate in self.rates():
                    rate.clamp_(min=0)

    def share(self, algorithm: Any, support: Any, query: Any) -> Tensor:
        """Return what a process contributes to the mean loss over all tasks or, in plain training, labeled tokens."""
        loss = self.sharding(algorithm, support, query)
        counted = getattr(algorithm, "counted", None)
        return loss * processes.weight(len(query["input_ids"]) if counted is None else counted)

    def rates(self) -> list[Tensor]:
        """Return the learned inner rates."""
        if self.phase.name != "train":
            return []
        return [rate for optimizer in optimizers(self.algorithm) for rate in optimizer.lr.parameters()]

    def spread_of_rates(self) -> dict[str, float]:
        """Return the mean, the standard deviation and the share of negative values of the learned inner rates."""
        if not (rates := self.rates()):
            return {}
        every = torch.cat([gathered(rate.detach()).flatten() for rate in rates])
        negative = (every < 0).float().mean().item()
        return {"rate": every.mean().item(), "rate_std": every.std(correction=0).item(), "rate_negative": negative}

    def is_patient_no_more(self) -> bool:
        """Whether the last `patience` validations of the phase were no better than one before."""
        return bool(self.config.patience) and self.run.state.get("worse", 0) >= self.config.patience

    def look(self, support: Any, query: Any) -> Tensor:
        """Return the query losses after the numbers of inner steps in `looks`, `[len(looks), T]`, in eval mode."""
        self.algorithm.eval()
        with self.sharding.whole():
            losses = self.algorithm.evaluate(support, query, steps=self.looks)
        self.algorithm.train()
        return torch.cat(processes.gather(losses.cpu()), 1)

    def validate(self) -> None:
        """Log the losses on the validation tasks; save the weights as `last`, and also as `best` if they are the best.

        The best weights of the pretraining are `pretrained`.
        """
        run, config, state = self.run, self.config, self.run.state
        processes.check_equal(replicated(self.trained), f"step {state['step']} of {self.phase.name}")
        with self.sharding.whole():
            look = (self.algorithm, self.phase.validation, self.looks, config.eval_tasks)
            names: list[str] = []
            if isinstance(self.algorithm, FineTune) and len(self.looks) > 1:
                # its training says nothing of the inner rates
                _, losses = tuned(*look)
            else:
                names, losses = curve(*look)
            if not losses.isfinite().all():
                raise self.divergence(names or curve(*look)[0], losses.sum(0))
            before, after = losses[0].mean().item(), losses[min(1, len(losses) - 1) :].mean().item()
            self.log(self.phase.name, state["step"], validation_before=before, validation_after=after)
            change = f" -> {after:.4f}" if len(losses) > 1 else ""
            self.log.say(f"{self.phase.name} {state['step']}: validation loss {before:.4f}{change}")
            state["worse"] = state.get("worse", 0) + 1
            if state["best"] is None or after < state["best"]:
                state["best"], state["worse"] = after, 0
                if self.phase.name == "train":
                    _save(run, "best")
                else:
                    _save(run, "pretrained", run.body)
        self.save()

    def costs(self, limit: float) -> PhaseCosts:
        """Measure the parts of the phase; steps have learning rates of 0.

        A step is measured on an episode of median length, for each number of inner steps that takes its turn.

        Args:
            limit: The seconds after which no further calls of a kind of step are measured.
        """
        state, config = self.phase.beginning(), self.config
        self.run.state, self.full_rates = state, [0.0] * len(self.full_rates)
        self.algorithm.train()
        turns = len(config.inner_steps) if self.phase.name == "train" else 1
        first, each = 0.0, 0.0
        for turn in range(turns):
            numbers = range(turns + turn, turns + turns * EPISODES, turns)
            lengths = {i: self.phase.episodes.sample(i, config.tasks)[0]["input_ids"].shape[-1] for i in numbers}
            state["step"] = sorted(numbers, key=lengths.__getitem__)[EPISODES // 2]
            once, later = seconds_of_calls(self.step, limit)
            first, each = first + once, each + later / turns
        episode = self.phase.episodes.sample(state["step"], config.tasks, processes.share)
        look = partial(self.look, *(on_device_of(self.run.model, batch) for batch in episode))
        looks = [seconds_of(look) for _ in range(2)]
        return PhaseCosts(first + looks[0], each, seconds_of(self.validate), looks[1])

    def save(self) -> None:
        """Let the first process write the checkpoint `last`."""
        moments = self.moments()
        with self.sharding.whole():
            processes.first(partial(self.write, moments))

    def moments(self) -> dict[str, Tensor]:
        """Return the state of the optimizer by the names of a checkpoint; in processes that write none, nothing."""
        found: dict[str, Tensor] = {}
        for i, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensor = gathered(value)
                if processes.is_first():
                    found[f"outer.{i}.{key}"] = tensor.cpu()
        return found

    def write(self, moments: Mapping[str, Tensor]) -> None:
        """Write the checkpoint `last`, which holds everything that the next step depends on."""
        if launch := processes.launch_id():
            self.run.state["launch"] = launch
        self.run.save("last", extra={**moments, **self.random()})

    def random(self) -> dict[str, Tensor]:
        """Return the states of the random generators."""
        states = {"random": torch.get_rng_state()}
        return states | ({"random.cuda": torch.cuda.get_rng_state()} if self.config.device == "cuda" else {})

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Set the optimizer and the random generators to the state in `saved`, the tensors that `save` calls extra.

        Raises:
            CheckpointError: If they are not those of this run.
        """
        source = self.run.path / "checkpoints" / "last"
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        saved = dict(saved)
        on_gpu = saved.pop("random.cuda", None)
        moments: dict[int, dict[str, Tensor]] = {}
        like: dict[str, Tensor] = {}
        for i, parameter in enumerate(parameters):
            names = {key: f"outer.{i}.{key}" for key in MOMENTS}
            if names["step"] in saved:  # the optimizer has moved this parameter
                moments[i] = {key: part_of(saved.get(name, parameter), parameter) for key, name in names.items()}
                like |= {name: torch.zeros(()) if key == "step" else parameter for key, name in names.items()}
        checkpoint.check_tensors(like | {"random": torch.get_rng_state()}, saved, source)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        try:
            torch.set_rng_state(saved["random"])
            if on_gpu is not None and self.config.device == "cuda":
                torch.cuda.set_rng_state(on_gpu)
        except (RuntimeError, TypeError):
            raise CheckpointError(f"{source}: holds no state of a random generator; use another checkpoint") from None

    def divergence(self, names: Sequence[str], losses: Tensor) -> DivergenceError:
        """Return an error that names the step, the first task whose loss, of `losses` `[T]`, is not finite, and a cure.

        Args:
            names: The tasks of `losses`.
            losses: If all are finite, the error blames the gradient.
        """
        bad = [name for name, loss in zip(names, losses.tolist(), strict=True) if not math.isfinite(loss)]
        what = f"the loss of task {bad[0]!r}" if bad else "the gradient"
        where = f"step {self.run.state['step']} of {self.phase.name}"
        rate = "pretrain_lr" if self.phase.name == "pretrain" else "outer_lr"
        cure = f"try a lower inner_lr or {rate} in a new run"
        folder = self.run.path / "checkpoints"
        if (folder / "last.json").exists():
            cure = f"checkpoints/last holds step {checkpoint.load(folder, 'last')[1]['step']}: {cure}"
        return DivergenceError(f"{what} is not finite at {where}; {cure}")


def _schedule(config: Config, step: int, done: float) -> float:
    """Return the factor of the learning rate: a linear warmup, times half a cosine over the share `done`, if wanted."""
    cosine = 0.5 * (1 + math.cos(math.pi * done)) if config.cosine else 1.0
    return cosine * min(1.0, (step + 1) / (config.warmup + 1))


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Within the block, the first Ctrl-C or SIGTERM only sets what is yielded to True; a second one stops at once.

    So a step is never cut in two. In a process that torchrun has started, a signal right after the first one is the
    same one, which torchrun passes on. Signals can be caught in the main thread alone; in others this does nothing.
    """
    asked = threading.Event()
    first, same = math.inf, SAME_SIGNAL if processes.launch_id() else 0.0

    def ask(*_: Any) -> None:
        nonlocal first
        if time.monotonic() - first >= same:
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
        asked.set()

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
