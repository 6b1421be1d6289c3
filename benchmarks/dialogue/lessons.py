"""Teach models test tasks until they reply as taught, as `metakern chat` does, and ask what they were not taught."""

from __future__ import annotations

import random

from benchmarks.progress import Progress
from metakern.dialogue.contenders import contender
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import load_split
from metakern.dialogue.teach import judged, teach

CONTENDERS = ("maml", "finetune", "pretrained")


def lessons(run: Run) -> dict[str, dict[str, list[float]]]:
    """Return for each contender, for each test task: inner steps, and the shares of taught and unseen replies given.

    A support holds as many conversations as in training, or all but one if the task has fewer; the rest are unseen.
    """
    found: dict[str, dict[str, list[float]]] = {}
    tasks = load_split(run.config).test
    with Progress(len(CONTENDERS) * len(tasks)) as progress:
        for name in CONTENDERS:
            each = run if name == run.config.algorithm else contender(run, name)
            of = found[name] = {"steps": [], "taught": [], "unseen": []}
            for task in tasks:
                progress.say(f"{name} is taught {task.task_id}")
                drawn = random.Random(f"lessons/{run.config.seed}/{task.task_id}").sample(
                    task.dialogues, len(task.dialogues)
                )
                cut = min(run.config.support_size, len(drawn) - 1)
                lesson = teach(each, drawn[:cut])
                unseen = judged(each, lesson.phi, drawn[cut:])
                of["steps"].append(lesson.end.steps)
                of["taught"].append(lesson.end.right / lesson.end.replies)
                of["unseen"].append(unseen.right / unseen.replies)
    return found
