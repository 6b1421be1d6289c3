"""Judge a parser or a policy on unseen tasks, beside baselines; intervals are 95% Student t intervals.

    parser   accuracy       the share of texts whose likeliest intent is theirs
             accepted       the share of texts whose likeliest intent is theirs and reaches the threshold
             refused        out-of-scope recall: the share of texts of other intents that do not reach the threshold
             after 1 and 5 shots, over unseen intents, each of which is in many episodes
    policy   accuracy       the share of replies whose acts are predicted exactly
             f1             2 P R / (P + R) of the single acts, counted over all replies of a task (micro)
             after numbers of inner steps, over unseen services

Every contender that has a threshold or inner rates gets those that are best on the validation tasks. Baselines without
training are `retrieval`, the label of the text of the support that is nearest by TF-IDF, and `majority`: of a parser
any intent, as all have as many texts; of a policy the commonest act of the support.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from metakern import io
from metakern.dialogue.baselines import Retrieval
from metakern.dialogue.contenders import RETRIEVAL, contender
from metakern.dialogue.manager.acts import Acts
from metakern.dialogue.manager.parser import EPISODES, SHOTS, FewShotParser, NearestParser, chosen_threshold, judged
from metakern.dialogue.metrics import by_task, over_tasks
from metakern.dialogue.rates import best_factors, scaled
from metakern.dialogue.report import keep, show_table, within
from metakern.dialogue.run import Run, check_tasks
from metakern.dialogue.tasks import load_adapted, load_split, load_whole, on_device_of, source_of
from metakern.dialogue.terminal import say
from metakern.dialogue.tokenizer import IGNORE
from metakern.errors import UserError
from metakern.meta.parameters import twin

__all__ = ["evaluate_part", "show_part"]

MAJORITY = "majority"
TITLES = {
    "parser": {
        "accuracy": "intents found",
        "accepted": "intents found and accepted",
        "refused": "out-of-scope texts refused",
    },
    "policy": {"accuracy": "acts predicted exactly", "f1": "F1 of single acts"},
}


def evaluate_part(
    path: str | Path,
    steps: Sequence[int],
    compare: Sequence[str] = (),
    data: str | None = None,
    repeats: int = 1,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge the run of a parser or of a policy on its test tasks, and write `eval.json` into its folder.

    Args:
        path: The folder of the run.
        steps: Numbers of inner steps, of a policy; a parser takes as many as in training.
        compare: Contenders that have weights, as `metakern.dialogue.contenders` names them: of a parser "finetune"
            (plain training as a classifier of the training intents, then prototypes), "pretrained" (prototypes of the
            pretrained weights) or another algorithm of parsers. `retrieval` and `majority` are always there.
        data: Data of which all tasks are judged in place of the run's test tasks.
        repeats: By how much there are more episodes.
        reading: How `data` is read, as for `metakern.dialogue.evaluate.evaluate`.

    Returns:
        What `eval.json` holds: `part`, `data`, the names of the `tasks` (for a parser, the intents), `columns` (the
        numbers of shots or of inner steps), and `scores`, which has what `metrics.over_tasks` returns for each
        contender and metric. A parser's `thresholds` are those of each contender. A policy's `unknown` counts the
        replies whose acts training has not seen, which are not judged.

    Raises:
        UserError: If a contender is unknown or has not been trained, or a number is out of range.
        DataError: If the data can't be read or hold too few tasks.
    """
    run = Run.open(path)
    if not steps or min(steps) < 0 or repeats < 1:
        raise UserError(
            f"eval: steps must be at least 0 and repeats at least 1, got {list(steps)} and {repeats}: change them"
        )
    split = load_split(run.config)
    check_tasks(run, split)
    tasks, left_out = load_whole(run.config, data, reading) if data else (split.test, {})
    names = [run.config.algorithm, *(name for name in compare if name not in (RETRIEVAL, MAJORITY))]
    runs = {name: run if name == run.config.algorithm else contender(run, name) for name in dict.fromkeys(names)}
    sources = (
        source_of(run.config, split.validation, run.tokenizer, run.labels),
        source_of(
            run.config,
            tasks,
            run.tokenizer,
            run.labels,
            **({"repeats": repeats} if run.config.part == "policy" else {}),
        ),
    )
    report = {
        "run": str(path),
        "part": run.config.part,
        "data": data or run.config.data,
        "tasks": [task.task_id for task in tasks],
        "left_out": dict(left_out),
    }
    if run.config.part == "parser":
        report |= _parsers(runs, *sources, EPISODES * repeats)
    else:
        report |= _policies(runs, *sources, tuple(sorted(set(steps))))
    keep({Path(path) / "eval.json": io.as_json(report)})
    return report


def show_part(report: dict[str, Any], console: Console) -> None:
    """Print a report of `evaluate_part` as tables with intervals, a row for each contender."""
    for reason, count in sorted(report["left_out"].items()):
        say(console, f"left out: {count} {reason}")
    if report["part"] == "parser":
        tasks, columns = f"{report['ways']} of {len(report['tasks'])} unseen intents at a time", "shots"
    else:
        tasks, columns = f"{len(report['tasks'])} unseen tasks", "inner steps"
        if report["unknown"]:
            say(console, f"left out: {report['unknown']} replies with acts that training has not seen")
    say(console, f"{report['data']}, {tasks}, by {columns} [95% interval]\n")
    for metric, title in TITLES[report["part"]].items():
        rows = [
            (name, within(scores[metric]), "mean", ".0%")
            for name, scores in report["scores"].items()
            if metric in scores
        ]
        if rows:
            show_table(console, title, report["columns"], rows)


def _parsers(runs: dict[str, Run], validation: Any, test: Any, episodes: int) -> dict[str, Any]:
    """Return the scores of parsers, `retrieval` and `majority`, over the intents of `test`."""
    parsers: dict[str, FewShotParser | NearestParser] = {name: FewShotParser(run, 0.0) for name, run in runs.items()}
    parsers[RETRIEVAL] = NearestParser(0.0)
    found: dict[str, dict[str, list[list[float]]]] = {name: defaultdict(list) for name in parsers}
    chosen: dict[str, list[float]] = {name: [] for name in parsers}
    for shots in SHOTS:
        asked = test.fixed(episodes, shots, test.queries)
        for name, parser in parsers.items():
            threshold = chosen_threshold(parser, validation, shots)
            chosen[name].append(threshold)
            of_intent: dict[str, dict[str, list[bool]]] = {m: defaultdict(list) for m in TITLES["parser"]}
            for episode in asked:
                confidence, right, strangers = judged(parser, episode)
                for (_, k), sure, hit in zip(episode.query, confidence.tolist(), right.tolist(), strict=True):
                    of_intent["accuracy"][episode.intents[k]].append(hit)
                    of_intent["accepted"][episode.intents[k]].append(hit and sure >= threshold)
                for (_, intent), sure in zip(episode.strangers, strangers.tolist(), strict=True):
                    of_intent["refused"][intent].append(sure < threshold)
            for metric, values in of_intent.items():
                if values:
                    found[name][metric].append([sum(hits) / len(hits) for _, hits in sorted(values.items())])
    scores: dict[str, Any] = {n: {m: over_tasks(rows) for m, rows in metrics.items()} for n, metrics in found.items()}
    scores[MAJORITY] = {"accuracy": over_tasks([[1 / test.ways] * len(test.texts)] * len(SHOTS))}
    return {"ways": test.ways, "columns": list(SHOTS), "scores": scores, "thresholds": chosen}


def _policies(runs: dict[str, Run], validation: Any, test: Any, steps: tuple[int, ...]) -> dict[str, Any]:
    """Return the scores of policies, `retrieval` and `majority`, over the tasks of `test`."""
    run = next(iter(runs.values()))
    true = [labels for _, _, query in test.evaluation() for labels in map(_acts, query["labels"])]
    scores, factors = {}, {}
    for name, each in runs.items():
        factors[name] = best_factors(each.algorithm, validation, steps, each.config.eval_tasks)
        rows = []
        for k, factor in zip(steps, factors[name], strict=True):
            with scaled(each.algorithm, factor):
                rows.append(_predicted(each, test, k))
        scores[name] = _act_scores(rows, true, run.labels, test.repeats)
    for name, guess in ((RETRIEVAL, _nearest), (MAJORITY, _commonest)):
        scores[name] = _act_scores([_guessed(test, guess)] * len(steps), true, run.labels, test.repeats)
    return {"columns": list(steps), "scores": scores, "rate_factor": factors, "unknown": test.unknown}


def _acts(labels: Tensor) -> list[int]:
    return labels[labels != IGNORE].tolist()


@torch.no_grad()
def _predicted(run: Run, source: Acts, steps: int) -> list[list[int]]:
    """Return the numbers of the acts that a policy predicts after `steps` inner steps, for each episode."""
    model, found = twin(run.model), []
    run.algorithm.eval()
    model.eval()
    for names, support, query in source.evaluation():
        support, query = (on_device_of(run.model, batch) for batch in (support, query))
        phi = run.algorithm.adapt(support, steps=steps)
        for t in range(len(names)):
            load_adapted(model, phi, t)
            logits = model(**{name: x[t] for name, x in query.items() if name != "labels"})
            found.append(logits.argmax(-1)[query["labels"][t] != IGNORE].tolist())
    return found


def _guessed(source: Acts, guess: Callable[[list[tuple[str, int]]], Callable[[str], int]]) -> list[list[int]]:
    """Return what a baseline predicts: `guess` makes of a support, texts with numbers of acts, what predicts one."""
    return [list(map(guess(support), (text for text, _ in query))) for support, query in source.examples()]


def _nearest(support: list[tuple[str, int]]) -> Callable[[str], int]:
    nearest = Retrieval([text for text, _ in support], [str(act) for _, act in support])
    return lambda text: int(nearest(text))


def _commonest(support: list[tuple[str, int]]) -> Callable[[str], int]:
    (act, _), *_ = Counter(act for _, act in support).most_common()
    return lambda text: act


def _act_scores(
    rows: Sequence[Sequence[Sequence[int]]], true: Sequence[Sequence[int]], acts: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Return accuracy and F1 of predicted acts `rows` `[K][episodes][replies]`, over tasks."""
    pairs = [[list(zip(said, right, strict=True)) for said, right in zip(row, true, strict=True)] for row in rows]
    exact = [[sum(a == b for a, b in task) / len(task) for task in row] for row in pairs]
    f1 = [[_f1([(acts[a], acts[b]) for a, b in task]) for task in row] for row in pairs]
    return {"accuracy": over_tasks(by_task(exact, repeats)), "f1": over_tasks(by_task(f1, repeats))}


def _f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the F1 of the single acts in pairs of predicted and true acts, such as ("OFFER", "INFORM_COUNT+OFFER")."""
    sets = [(set(said.split("+")), set(true.split("+"))) for said, true in pairs]
    common = sum(len(said & true) for said, true in sets)
    return 2 * common / sum(len(said) + len(true) for said, true in sets)
