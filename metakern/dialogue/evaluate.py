"""The adaptation curve: how good a model is on unseen tasks after 0, 1, 3, … inner steps, beside baselines.

    perplexity_k     = exp(mean_t l_k(t))
    bits_per_byte_k  = mean_t [l_k(t) · tokens(t) / (ln 2 · bytes(t))]
    ratio_k          = exp(mean_t [b_k(t) - l_k(t)])          > 1: the baseline is worse

l_k(t) is the query loss of task t after k steps, in nats per token, and b_k(t) that of a baseline on the same episode.
tokens(t) counts the labeled tokens of the query, and bytes(t) those of their text in UTF-8. So bits per byte do not
depend on how many tokens a tokenizer makes of a text. Intervals are 95% Student t intervals, over tasks, of the means;
exp is applied to their ends. `metakern.dialogue.replies` says how replies are judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metakern import io
from metakern.dialogue import processes
from metakern.dialogue.baselines import InContext
from metakern.dialogue.contenders import RETRIEVAL, check, contender, is_plain
from metakern.dialogue.display import Display
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.manager.policy import ActPolicy
from metakern.dialogue.metrics import by_task, interval, over_tasks, paired_interval
from metakern.dialogue.rates import Tell, at_factors, best_factors
from metakern.dialogue.replies import KINDS, Questions, draw_questions, generated, retrieved, scores
from metakern.dialogue.report import keep, plot, plot_replies
from metakern.dialogue.run import Run, check_tasks
from metakern.dialogue.split import TaskData
from metakern.dialogue.tasks import episodes, load_split, load_whole, overlapping
from metakern.dialogue.tokenizer import IGNORE
from metakern.errors import UserError

__all__ = ["evaluate"]

STEPS = (0, 1, 3, 5, 10)
REPLY_STEPS = (0, 1, 3, 5, 10, 30)
SAMPLES = 3  # questions of each kind whose replies are shown


def evaluate(
    path: str | Path,
    steps: Sequence[int] = STEPS,
    compare: Sequence[str] = (),
    data: str | None = None,
    reply_steps: Sequence[int] = (),
    repeats: int = 1,
    reading: Mapping[str, Any] | None = None,
    policy: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the adaptation curve of a run on its test tasks, and write `eval.json` and `eval.png` into its folder.

    With `reply_steps`, it also judges replies, and writes `replies.png`. If the folder can't be written, a line says
    so, and the report is returned all the same.

    Every contender, the run and what it is compared with, gets the same chances: for each number of steps all its inner
    rates, learned or not, are multiplied by the factor that has the lowest loss on the validation tasks. A test task on
    whose support a lower factor does better takes that one, as `metakern.dialogue.rates` says.

    Args:
        path: The folder of the run.
        steps: Numbers of inner steps.
        compare: Contenders, named as `metakern.dialogue.contenders` says. An algorithm is trained into the folder
            `path/<algorithm>`, if it has not been: the same model from the same pretrained weights, on the same
            episodes, for as many outer steps as the run. With `reply_steps` also "retrieval", which has no weights, and
            so no perplexity.
        data: Data of which all tasks are judged in place of the run's test tasks; named as `Config.data` is. Rates of
            contenders are chosen on the run's validation tasks.
        reply_steps: Numbers of inner steps after which replies are judged, such as `REPLY_STEPS`; none by default.
        repeats: The number of episodes of each task, over which its losses and scores are averaged.
        reading: How `data` is read: `format`, `reader_options` and `task_key` of `Config`, each with its default. None
            reads it as the run's data.
        policy: The folder of the run of a policy that chooses the acts in the hints of queries, after it has learned
            those of the support. None takes the acts of the data, of which a chat knows nothing.

    Returns:
        What `eval.json` holds. `curves` has, for each algorithm, the query losses of the tasks (`loss`,
        `[len(steps)][T]`, in nats per token), the `perplexity` and the ends of its interval (`low`, `high`),
        `bits_per_byte`, as `metrics.over_tasks` returns it, the `rate_factor` of each number of steps, and how many
        episodes took a lower one (`lowered`). `ratios` has, for each other contender, `ratio`, `low` and
        `high`, and so has `best_plain`, for the contender in its `names` that has the lowest mean test loss after each
        number of steps, among those that are trained without an inner loop (None if there is none).
        `steps` is in ascending order. With `data`, `left_out` counts what was left out of it, by reason, and `seen` has
        the tasks that the run was trained or validated on, or that share texts with those, as splits compare them.

        With `reply_steps`, `replies` has these `steps`, the `questions` asked of each task, and `scores`: for each
        contender, for `taught` and `unseen` questions and for each metric, what `metrics.over_tasks` returns. `samples`
        has some replies of the run to the first task, before adaptation and after the most steps.

    Raises:
        UserError: If a number of steps is negative, `repeats` below 1, a contender unknown, `reading` given without
            `data`, or `path` not the folder of a run; if there are contenders and the run has not been trained or is an
            adapted one; if "retrieval" is compared without `reply_steps`.
        DataError: If the data can't be read or hold too few tasks, or a task has no reply that can be judged.
        CheckpointError: If a checkpoint can't be used, or that of a contender can't be written.

    >>> import contextlib, io, tempfile
    >>> from metakern.dialogue.config import Config
    >>> from metakern.dialogue.trainer import train
    >>> data = {"data": "chatterbot:english", "vocab_size": 262, "max_length": 16}
    >>> config = Config(**data, width=8, inner_steps=1, steps=1, pretrain_steps=0)
    >>> with tempfile.TemporaryDirectory() as path, contextlib.redirect_stdout(io.StringIO()):
    ...     run = train(config, path)
    ...     report = evaluate(path, steps=(0, 1))
    >>> len(report["curves"]["maml"]["perplexity"])
    2
    """
    check(compare)
    if RETRIEVAL in compare and not reply_steps:
        raise UserError("eval: retrieval has replies but no perplexity: add --replies")
    if not steps or min(steps) < 0:
        raise UserError(f"eval: steps must be whole numbers of at least 0, got {list(steps)}")
    if min(reply_steps, default=0) < 0:
        raise UserError(f"eval: reply_steps must be whole numbers of at least 0, got {list(reply_steps)}")
    if repeats < 1:
        raise UserError(f"eval: repeats must be at least 1, got {repeats}")
    if reading is not None and not data:
        raise UserError(f"eval: reading says how data is read, and needs data, got {dict(reading)}")
    steps, reply_steps = (tuple(sorted(set(numbers))) for numbers in (steps, reply_steps))
    run = Run.open(path)
    if run.config.part != "generator":
        raise UserError(f"{path}: must be the run of a generator, got one of a {run.config.part}: use evaluate_part")
    split = load_split(run.config)
    check_tasks(run, split)
    if policy and "act" not in run.config.hints:
        raise UserError(f"{path}: hints must have acts for a policy to choose, got {run.config.hints!r}")
    chooser = ActPolicy(policy) if policy else None
    acts = {"policy": chooser.rewriter} if chooser else {}
    validation = episodes(run.config, split.validation, run.tokenizer, **acts)
    tasks, skipped = load_whole(run.config, data, reading) if data else (split.test, {})
    if chooser:
        _check_unseen(chooser.run, tasks)
    seen = overlapping((*split.train, *split.validation), tasks, run.config) if data else []
    test = episodes(run.config, tasks, run.tokenizer, repeats=repeats, **acts)
    asked = draw_questions(test) if reply_steps else []
    bits = _bits_per_byte(test)
    own, curves, replies = run.config.algorithm, {}, {}
    samples: dict[str, Any] = {}
    for name in dict.fromkeys((own, *compare)):
        if name == RETRIEVAL:
            replies[name] = scores(test, asked, [list(retrieved(test, asked))] * len(reply_steps))
            continue
        each = run if name == own else contender(run, name)
        numbers = tuple(sorted({*steps, *reply_steps}))
        with _shown(f"rates of {name}") as tell:
            best = best_factors(each.algorithm, validation, numbers, run.config.eval_tasks, tell)
        factors = dict(zip(numbers, best, strict=True))
        of_steps = [factors[k] for k in steps]
        with _shown(f"{name} on the test tasks") as tell:
            losses, lowered = at_factors(each.algorithm, of_steps, test, steps, tell=tell)
        curves[name] = {
            **_summary(by_task(losses, repeats)),
            "bits_per_byte": over_tasks(by_task(losses.double() * bits, repeats)),
            "rate_factor": of_steps,
            "lowered": lowered.sum(1).tolist(),
        }
        if reply_steps:
            said = _replies(name, each, test, asked, reply_steps, factors)
            replies[name] = {**scores(test, asked, said), "rate_factor": [factors[k] for k in reply_steps]}
            samples = samples or _samples(tasks[0].task_id, asked[0], (said[0][0], said[-1][0]), reply_steps)
    plain = [name for name in curves if name != own and is_plain(name)]
    report = {
        "run": str(path),
        "data": data or run.config.data,
        "support_size": run.config.support_size,
        "query_size": run.config.query_size,
        "inner_steps": list(run.config.inner_steps),
        "repeats": repeats,
        "policy": str(policy) if policy else None,
        "tasks": [task.task_id for task in tasks],
        "left_out": skipped,
        "seen": seen,
        "steps": list(steps),
        "curves": curves,
        "ratios": {name: _ratio(curves[name]["loss"], curves[own]["loss"]) for name in curves if name != own},
        "best_plain": _best([curves[name]["loss"] for name in plain], plain, curves[own]["loss"]) if plain else None,
    }
    if reply_steps:
        counts = {kind: [len(getattr(task, kind)) for task in asked] for kind in KINDS}
        report["replies"] = {"steps": list(reply_steps), "questions": counts, "scores": replies, "samples": samples}
    processes.first(lambda: _write(report, Path(path)))
    return report


def _check_unseen(policy: Run, tasks: Sequence[TaskData]) -> None:
    """Raise UserError if a policy was trained on one of the tasks."""
    known = {task.task_id for task in load_split(policy.config).train}
    if seen := sorted(known & {task.task_id for task in tasks}):
        raise UserError(f"{policy.path}: a policy must not have been trained on a test task, got {seen[0]!r}")


@contextmanager
def _shown(part: str) -> Iterator[Tell]:
    """Within the block, show how many inner rates were tried, and the time that those which are left may take."""
    began = time.monotonic()
    with Display() as display:

        def tell(tried: int, left: int) -> None:
            minutes, rest = divmod(round((time.monotonic() - began) / tried * left), 60)
            text = f"{tried} of {tried + left} rates  {minutes}:{rest:02d} left"
            display.progress(part, tried / (tried + left), text, line=not left)

        yield tell


def _write(report: dict[str, Any], folder: Path) -> None:
    """Write a report and its pictures into the folder of the run."""
    files = {folder / "eval.json": io.as_json(report)}
    files[folder / "eval.png"] = plot(report)
    if "replies" in report:
        files[folder / "replies.png"] = plot_replies(report)
    keep(files)


def _replies(
    name: str, run: Run, test: Episodes, asked: Sequence[Questions], steps: Sequence[int], factors: dict[int, float]
) -> list[list[list[str]]]:
    """Return a contender's replies after numbers of steps, with a factor of the inner rates for each number."""
    replies: list[list[list[str]]] = []
    began, own = time.monotonic(), len(asked[processes.share(len(asked))])
    with Display() as display:
        for i, k in enumerate(steps):
            if replies and isinstance(run.algorithm, InContext):
                replies.append(replies[-1])
                continue
            replies.append([])
            for task in generated(run.algorithm, test, asked, k, factors[k]):
                replies[-1].append(task)
                done = (i + len(replies[-1]) / own) / len(steps)
                minutes, rest = divmod(round((time.monotonic() - began) * (1 / done - 1)), 60)
                text = f"after {k} steps  {len(replies[-1])}/{own} episodes  {minutes}:{rest:02d} left"
                display.progress(f"replies of {name}", done, text, line=len(replies[-1]) == own)
            replies[-1] = [task for part in processes.gather(replies[-1]) for task in part]
    return replies


def _samples(task: str, asked: Questions, said: Sequence[Sequence[str]], steps: Sequence[int]) -> dict[str, Any]:
    """Return some questions of each kind about a task, with the bot's replies and those after the ends of `steps`."""
    replies = [dict(zip((*asked.taught, *asked.unseen), texts, strict=True)) for texts in said]
    chosen = {
        kind: [
            {
                "question": exchange.context.rpartition("\n")[2],
                "bot": exchange.text,
                "before": replies[0][exchange],
                "after": replies[1][exchange],
            }
            for exchange in getattr(asked, kind)[:SAMPLES]
        ]
        for kind in KINDS
    }
    return {"task": task, "steps": [steps[0], steps[-1]], **chosen}


def _bits_per_byte(source: Episodes) -> Tensor:
    """Return the bits per byte that a query loss of 1 nat per token is, for each task, `[T]`."""
    tokens, sizes = [], []
    for _, _, query in source.evaluation():
        for labels in query["labels"][..., 1:]:
            rows = [row[row != IGNORE].tolist() for row in labels]
            tokens.append(sum(map(len, rows)))
            sizes.append(sum(map(source.tokenizer.size, rows)))
    return torch.tensor(tokens).double() / (math.log(2) * torch.tensor(sizes))


def _summary(losses: Tensor) -> dict[str, Any]:
    mean, half = zip(*(interval(row) for row in losses), strict=True)
    return {"loss": losses.tolist(), **_through_exp(mean, half, "perplexity")}


def _best(baselines: Sequence[Sequence[Sequence[float]]], names: Sequence[str], own: Any) -> dict[str, Any]:
    """Return the ratio of the baseline with the lowest mean loss after each number of steps, and its name."""
    means = torch.tensor(baselines).mean(2).nan_to_num(math.inf, math.inf)
    best = means.argmin(0).tolist()
    lowest = [baselines[b][i] for i, b in enumerate(best)]
    return {"names": [names[b] for b in best], **_ratio(lowest, own)}


def _ratio(baseline: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> dict[str, Any]:
    pairs = zip(torch.tensor(baseline), torch.tensor(own), strict=True)
    mean, half = zip(*(paired_interval(b, o) for b, o in pairs), strict=True)
    return _through_exp(mean, half, "ratio")


def _through_exp(mean: Sequence[float], half: Sequence[float], name: str) -> dict[str, list[float]]:
    center, reach = torch.tensor(mean).double(), torch.tensor(half).double()
    ends = {name: center, "low": center - reach, "high": center + reach}
    return {key: value.exp().tolist() for key, value in ends.items()}
