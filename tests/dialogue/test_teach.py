"""Teaching: a model adapts until it gives the taught replies, and no longer."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import untrained_run

from metakern.dialogue.generate import generate
from metakern.dialogue.rates import LOWER, scaled
from metakern.dialogue.readers import Dialogue, Turn, dialogue
from metakern.dialogue.tasks import load_adapted
from metakern.dialogue.teach import Progress, judged, support_batch, teach
from metakern.errors import UserError
from metakern.meta.parameters import twin


@pytest.fixture(scope="module", params=["gpt", "gru"])
def run(request, tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("teach") / "run", model=request.param)


def taught(*pairs: tuple[str, str]) -> list[Dialogue]:
    return [dialogue("taught", str(i), [("user", said), ("bot", reply)]) for i, (said, reply) in enumerate(pairs)]


def replies(run, lesson, *questions: str) -> list[str]:
    model = twin(run.model)
    load_adapted(model, lesson.phi)
    found = []
    for question in questions:
        prompt = run.tokenizer.prompt([Turn("user", question)], run.config.max_length, "bot")
        ids = generate(model, prompt, max_new_tokens=20, temperature=0, eos_id=run.tokenizer.eos_id)
        found.append(run.tokenizer.decode(ids))
    return found


def test_the_model_replies_as_taught_after_as_many_steps_as_that_takes(run):
    pairs = [("river?", "cloud otter"), ("stone?", "maple"), ("maple maple", "violin!")]
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    seen = []
    lesson = teach(run, taught(*pairs), progress=seen.append)
    questions, answers = zip(*pairs, strict=True)
    assert replies(run, lesson, *questions) == list(answers)
    assert lesson.curve == tuple(seen)
    assert [p.steps for p in seen] == list(range(lesson.end.steps + 1))
    assert [p.right < 3 for p in seen] == [True] * lesson.end.steps + [False]
    assert run.config.most_inner_steps < lesson.end.steps < 60
    assert seen[0].loss > 5 * lesson.end.loss
    assert lesson.summary.startswith(f"inner steps: {lesson.end.steps}, taught replies right: 3 of 3, loss on them: ")
    assert judged(run, lesson.phi, taught(*pairs)).right == 3
    assert judged(run, lesson.phi, taught(("river?", "maple"), pairs[0])).right == 1
    support = support_batch(run, taught(*pairs))
    assert run.algorithm.evaluate(support, support, (0,), lesson.phi).item() == pytest.approx(lesson.end.loss)
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_the_first_steps_are_the_algorithm_s(run):
    pairs = taught(("river?", "cloud otter"), ("stone?", "maple"))
    lesson = teach(run, pairs, most=run.config.most_inner_steps)
    assert lesson.end.steps == run.config.most_inner_steps
    for name, p in run.algorithm.adapt(support_batch(run, pairs), steps=lesson.end.steps).items():
        torch.testing.assert_close(lesson.phi[name], p, rtol=1e-5, atol=1e-6)
    further = teach(run, pairs)
    assert further.curve[: len(lesson.curve)] == lesson.curve


def test_rates_that_raise_the_loss_are_lowered_where_that_helps(run):
    pairs, steps = taught(("river?", "cloud otter"), ("stone?", "maple")), run.config.most_inner_steps
    support, shown = support_batch(run, pairs), list[Progress]()
    with scaled(run.algorithm, 1000.0):
        lesson = teach(run, pairs, most=steps, progress=shown.append)
        high = run.algorithm.evaluate(support, support, (steps,)).item()
        with scaled(run.algorithm, LOWER):
            low = run.algorithm.evaluate(support, support, (steps,)).item()
    assert [p.steps for p in shown] == [*range(steps + 1)] * 2
    assert lesson.end.loss == pytest.approx(min(high, low), rel=1e-3)
    assert [p.steps for p in lesson.curve] == [*range(steps + 1)]
    assert lesson.curve[-1] == lesson.end


@pytest.mark.parametrize("algorithm", ["maml", "finetune", "hypernetwork"])
def test_adam_gets_the_replies_right_where_the_algorithm_s_steps_are_too_short(tmp_path, algorithm):
    run = untrained_run(tmp_path / "run", algorithm=algorithm, inner="sgd", inner_lr=3.0)
    lesson = teach(run, taught(("river?", "cloud otter"), ("stone?", "maple")), most=200)
    assert lesson.end.right == 2
    assert lesson.phi.keys() == dict(run.model.named_parameters()).keys()
    own = run.algorithm.evaluate(*[support_batch(run, taught(("river?", "cloud otter")))] * 2, (lesson.end.steps,))
    assert own.item() > 2


def test_lessons_in_several_threads_are_those_of_one(tmp_path):
    run = untrained_run(tmp_path / "run", inner="sgd", inner_lr=3.0)
    supports = [taught(("river?", "cloud otter")), taught(("stone?", "maple"), ("maple maple", "violin!"))] * 2
    alone = [teach(run, support) for support in supports]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda support: teach(run, support), supports))
    for one, other in zip(alone, together, strict=True):
        assert one.end.steps == other.end.steps > run.config.most_inner_steps
        assert all(torch.equal(p, other.phi[name]) for name, p in one.phi.items())


def test_later_exchanges_of_a_conversation_are_judged_in_their_context(run):
    turns = (Turn("user", "river?"), Turn("bot", "cloud"), Turn("user", "and?"), Turn("bot", "stone"))
    lesson = teach(run, [Dialogue("taught", "1", turns, {"bot": "bot"})], most=200)
    assert (lesson.end.right, lesson.end.replies) == (2, 2)
    assert replies(run, lesson, "river?") == ["cloud"]


def test_a_question_with_two_answers_gets_one_of_them(run):
    lesson = teach(run, taught(("river?", "cloud"), ("stone?", "maple"), ("river?", "ember")))
    assert (lesson.end.right, lesson.end.replies) == (2, 3)
    answers = replies(run, lesson, "river?", "stone?")
    assert answers[0] in ("cloud", "ember")
    assert answers[1] == "maple"


def test_the_best_parameters_are_kept_where_the_steps_do_not_suffice(run):
    support = taught(("river?", "cloud otter violin lantern"), ("stone?", "maple copper"))
    lesson = teach(run, support, most=4)
    counted = lesson.curve[run.config.most_inner_steps :]
    assert len(lesson.curve) == 5
    assert lesson.end == max(counted, key=lambda p: (p.right, -p.loss))
    assert teach(run, support, most=0).end.steps == 0


def test_what_the_progress_raises_ends_the_adaptation(run):
    def stop(progress):
        if progress.steps == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(run, taught(("river?", "cloud")), progress=stop)
    assert teach(run, taught(("river?", "cloud"))).end.right == 1


def test_a_support_without_a_reply_is_refused(run):
    with pytest.raises(UserError, match="support must hold a reply of the bot, got none"):
        teach(run, [Dialogue("taught", "1", (Turn("user", "river?"),), {"bot": "bot"})])
