"""The examples run as a user runs them, and print the results that they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def numbers_of(*command: str) -> list[float]:
    """Run an example and return the numbers with a decimal point that it prints."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [float(number) for number in NUMBER.findall(run.stdout)]


def by_fives(numbers: list[float]) -> list[list[float]]:
    return [numbers[i : i + 5] for i in range(0, len(numbers), 5)]


def test_every_example_has_at_most_60_lines_and_a_test() -> None:
    tested = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert len(example.read_text().splitlines()) <= 60, example
        assert f'"{example.name}"' in tested, example


@pytest.mark.slow
@pytest.mark.parametrize("example", ["plain_loop.py", "accelerate_loop.py", "mixed_precision.py"])
def test_training_loops_learn(example: str) -> None:
    first, last = numbers_of(example)
    assert last < 0.5 * first


@pytest.mark.slow
def test_prototypes_classify_intents_that_were_not_trained_on() -> None:
    before, after = numbers_of("intents.py")
    assert before < 0.6
    assert after > 0.85


@pytest.mark.slow
def test_maml_fits_sine_waves_that_plain_training_does_not() -> None:
    *_, maml, plain = (row[-1] for row in by_fives(numbers_of("sines.py")))
    assert maml < 0.3 * plain


@pytest.mark.slow
def test_new_glyphs_are_told_apart_after_adaptation() -> None:
    before, *_, after = numbers_of("glyphs.py")
    assert after < 0.5 * before


@pytest.mark.slow
def test_points_walk_better_after_one_step() -> None:
    *_, before, after = numbers_of("navigation.py")
    assert after > before + 1


@pytest.mark.slow
def test_a_learned_loss_ignores_wrong_labels() -> None:
    squared, learned = numbers_of("learned_loss.py")
    assert learned < 0.5 * squared


@pytest.mark.slow
def test_a_stream_is_predicted_better_after_its_first_chunk() -> None:
    *_, first, second, _, _, _, _, _, _, _, _, _, last = numbers_of("stream.py")
    assert max(second, last) < 0.5 * first


@pytest.mark.slow
def test_a_replay_keeps_what_was_adapted_first() -> None:
    first, _, forgotten, second, kept, both = numbers_of("continual.py")
    assert forgotten > 5 * first
    assert kept < 0.2 * forgotten
    assert both < 3 * second


@pytest.mark.slow
def test_lightning_learns_and_validates() -> None:
    before, _, after, adapted = numbers_of("lightning_module.py")[-4:]
    assert adapted < 0.5 * before
    assert adapted < 0.5 * after


@pytest.mark.slow
def test_the_trainer_of_hugging_face_learns() -> None:
    first, last = numbers_of("hf_trainer.py")[-2:]
    assert last < first - 0.2


@pytest.mark.slow
def test_torch_func_gives_the_same_product_in_two_ways() -> None:
    *_, by_hessian, forward_over_reverse = numbers_of("torch_func.py")
    assert by_hessian == forward_over_reverse


@pytest.mark.slow
def test_compiled_models_have_graph_breaks_and_the_same_results() -> None:
    breaks, *results = numbers_of("compile.py")
    assert breaks > 0
    assert results[:2] == pytest.approx(results[2:], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["distributed.py", "fsdp.py"])
def test_two_processes_that_share_the_tasks_equal_one(example: str) -> None:
    assert numbers_of("-m", "torch.distributed.run", "--nproc-per-node", "2", example)[-1] < 1e-6
