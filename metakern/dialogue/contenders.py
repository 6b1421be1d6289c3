"""What `metakern eval` compares a run with: other algorithms, plain training, the pretrained weights alone, retrieval.

    finetune          an algorithm by its name, trained as the run was, and adapted as the run is
    finetune:adam     the same weights, adapted with another inner optimizer
    pretrained        the weights from which the training of the run began (also pretrained:adam)
    retrieval         the reply to the nearest context of the support (`metakern.dialogue.baselines.Retrieval`)

`finetune` is plain training on the dialogues of all tasks together, so it is the multitask baseline too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from metakern.dialogue import checkpoint
from metakern.dialogue.registry import OPTIMIZERS, PLAIN
from metakern.dialogue.run import Run, verified
from metakern.dialogue.trainer import differing, train
from metakern.errors import UserError
from metakern.meta.algorithms.registry import ALGORITHMS, find_algorithm

__all__ = ["PRETRAINED", "RETRIEVAL", "check", "contender", "is_plain"]

PRETRAINED, RETRIEVAL = "pretrained", "retrieval"
FIRST_RATE = 3e-3  # of an inner optimizer that is not the run's; `metakern eval` searches from here


def check(names: Sequence[str]) -> None:
    """Raise a `UserError` unless all names are those of contenders."""
    for name in names:
        base, colon, inner = name.partition(":")
        if base not in (PRETRAINED, RETRIEVAL) and not find_algorithm(base):
            known = ", ".join((*ALGORITHMS, PRETRAINED, RETRIEVAL))
            raise UserError(f"eval: compare must be among {known}, got {base!r}")
        if colon and inner not in OPTIMIZERS:
            raise UserError(f"eval: compare {name} must name an inner optimizer of {', '.join(OPTIMIZERS)}")
        if colon and not (is_plain(base) and base not in (RETRIEVAL, "incontext")):
            raise UserError(
                f"eval: compare {name} must be an algorithm without an inner loop in training: finetune, pretrained or"
                " prompt"
            )


def is_plain(name: str) -> bool:
    """Whether the contender is trained without an inner loop, or not at all."""
    base = name.partition(":")[0]
    return base in (PRETRAINED, RETRIEVAL) or ALGORITHMS[base].make in PLAIN


def contender(run: Run, name: str) -> Run:
    """Return the contender `name` of a run, ready to be adapted; train it first, or further, if it has fewer steps.

    It is trained into the folder `run.path/<algorithm>`: the same model from the same pretrained weights, on the same
    episodes, for as many outer steps as the run.

    Raises:
        UserError: If the run has not been trained or is an adapted one, or, for "pretrained", had no pretraining; or if
            the folder holds another run.
    """
    base, _, inner = name.partition(":")
    if "from" in run.state:
        raise UserError(f"{run.path}: is adapted from {run.state['from']}: compare that run")
    state = checkpoint.load(run.path / "checkpoints", "last")[1]
    if state["phase"] != "train" or not state["step"]:
        cure = f"go on with: metakern train --resume --out {run.path}"
        raise UserError(f"{run.path}: has not been trained yet, so it has no baseline; {cure}")
    changes: dict[str, Any] = {}
    if inner not in ("", run.config.inner):
        changes = {"inner": inner, "inner_options": (), "inner_lr": FIRST_RATE}
    if base == PRETRAINED:
        if not (
            run.config.pretrain_steps
            or run.config.pretrained
            or run.config.model == "bag"
            or run.config.part == "policy"
        ):
            raise UserError(f"{run.path}: began with random weights, so it has no contender pretrained")
        config = replace(run.config, algorithm="finetune", algorithm_options=(), **changes)
        found = Run.create(run.path, config, run.tokenizer, run.labels)
        found.restore("pretrained", found.body)
        return found
    config = replace(run.config, algorithm=base, steps=state["step"])
    if base != run.config.algorithm:
        config = replace(config, algorithm_options=())
    if base == "finetune":
        config = replace(config, outer_lr=config.finetune_lr or config.outer_lr)
    folder = run.path / base
    begun = checkpoint.exists(folder / "checkpoints", "last")
    if begun and (others := differing(verified(folder, "last"), config)):
        raise UserError(
            f"{folder}: is not the contender {base} of {run.path}, from which it differs in {others[0]}: move it away"
        )
    if not begun or checkpoint.load(folder / "checkpoints", "last")[1]["step"] < config.steps:
        found = train(config, folder, resume=begun, start=run.path)
        return Run.open(folder, **changes) if changes else found
    return Run.open(folder, **changes)
