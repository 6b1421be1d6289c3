"""Evaluation: adaptation curves of unseen tasks with intervals, paired ratios, and a baseline with tuned rates."""

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from io import StringIO

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny import tiny_config, write_tasks

import metakern as mk
from metakern.dialogue import evaluate as module
from metakern.dialogue import rates
from metakern.dialogue import report as reports
from metakern.dialogue.config import Config
from metakern.dialogue.contenders import contender
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.metrics import interval
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.replies import draw_questions, generated, retrieved, scores
from metakern.dialogue.report import plot, plot_replies, show
from metakern.dialogue.run import Run
from metakern.dialogue.split import TaskData
from metakern.dialogue.tasks import curve, episodes, load_split
from metakern.dialogue.tokenizer import Tokenizer
from metakern.dialogue.trainer import train
from metakern.errors import CheckpointError, DataError, UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with four test tasks that is evaluated together with two baselines: its folder and the report."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_tasks(folder / "data", tasks=40, dialogues=9)
    train(tiny_config(data, steps=8, pretrain_steps=20, pretrain_lr=0.03, eval_tasks=2), folder / "run")
    report = evaluate(folder / "run", (3, 0, 1, 1), ("finetune", "fomaml", "maml"))
    return folder / "run", report


def test_the_curve_is_computed_on_test_tasks_with_intervals(trained):
    folder, report = trained
    run = Run.open(folder)
    split = load_split(run.config)
    unseen = [task.task_id for task in split.test]
    assert report["steps"] == [0, 1, 3]
    assert report["tasks"] == unseen
    assert set(unseen).isdisjoint(task.task_id for task in (*split.train, *split.validation))
    test = episodes(run.config, split.test, run.tokenizer)
    losses, lowered = rates.at_factors(run.algorithm, report["curves"]["maml"]["rate_factor"], test, (0, 1, 3))
    assert report["curves"]["maml"]["loss"] == losses.tolist()
    assert report["curves"]["maml"]["lowered"] == lowered.sum(1).tolist()
    assert losses[0].equal(curve(run.algorithm, test, (0,))[1][0])
    for i, row in enumerate(losses):
        mean, half = interval(row)
        shown = [report["curves"]["maml"][key][i] for key in ("low", "perplexity", "high")]
        assert shown == pytest.approx([math.exp(mean + sign * half) for sign in (-1, 0, 1)])


def test_bits_per_byte_are_those_of_the_summed_loss_and_the_text(trained):
    folder, report = trained
    run = Run.open(folder)
    test = episodes(run.config, load_split(run.config).test, run.tokenizer)
    t = 0
    for _, _, query in test.evaluation():
        for labels in query["labels"]:
            learned = [[i for i in row if i >= 0] for row in labels.tolist()]
            size = len("".join(run.tokenizer.decode(row) for row in learned).encode())
            tokens = sum(map(len, learned))
            assert size > tokens / 2 > 0
            for name, values in report["curves"].items():
                for row, bits in zip(values["loss"], values["bits_per_byte"]["values"], strict=True):
                    assert bits[t] == pytest.approx(row[t] * tokens / math.log(2) / size), name
            t += 1
    assert t == len(report["tasks"])
    for values in report["curves"].values():
        for i, bits in enumerate(values["bits_per_byte"]["values"]):
            mean, half = interval(bits)
            found = [values["bits_per_byte"][key][i] for key in ("low", "mean", "high")]
            assert found == pytest.approx([mean - half, mean, mean + half])


def test_bits_per_byte_do_not_depend_on_the_number_of_tokens():
    talks = [Dialogue("t", str(i), (Turn("user", "hi"), Turn("bot", f"hello hello {i}"))) for i in range(4)]
    nats = []
    for size in (262, 300):
        source = Episodes(
            [TaskData("t", tuple(talks))],
            Tokenizer.train(talks, size),
            support_size=2,
            query_size=2,
            max_length=64,
            seed=0,
        )
        ((_, _, query),) = source.evaluation()
        tokens = int((query["labels"] >= 0).sum())
        nats.append(module._bits_per_byte(source).item() / tokens * math.log(2))
    assert nats[0] == pytest.approx(nats[1]) == pytest.approx(1 / (2 * len("hello hello 0")))


def test_ratios_are_computed_from_differences_per_task(trained):
    _, report = trained
    assert list(report["ratios"]) == ["finetune", "fomaml"]
    for name, ratio in report["ratios"].items():
        for i in range(3):
            b, own = (torch.tensor(report["curves"][k]["loss"][i], dtype=torch.float64) for k in (name, "maml"))
            mean, half = interval(b - own)
            assert [ratio["low"][i], ratio["ratio"][i], ratio["high"][i]] == pytest.approx(
                [math.exp(mean + sign * half) for sign in (-1, 0, 1)]
            )


def test_the_report_and_its_plot_are_written(trained):
    folder, report = trained
    assert json.loads((folder / "eval.json").read_text()) == report
    assert (folder / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_baselines_are_trained_once_for_the_steps_of_the_run(trained):
    folder, report = trained
    logs = {name: (folder / name / "log.jsonl").read_text() for name in ("finetune", "fomaml")}
    for log in logs.values():
        lines = [json.loads(line) for line in log.splitlines()]
        assert {line["phase"] for line in lines} == {"train"}
        assert max(line["step"] for line in lines) == 8
    again = evaluate(folder, (0, 1, 3), ("finetune", "fomaml"))
    assert again["curves"] == report["curves"]
    assert logs == {name: (folder / name / "log.jsonl").read_text() for name in logs}


@pytest.mark.parametrize("name", ["maml", "finetune"])
def test_the_rates_of_every_algorithm_are_tuned_on_validation_tasks(trained, name):
    folder, report = trained
    path = folder if name == "maml" else folder / name
    run = Run.open(path)
    split = load_split(run.config)
    validation = episodes(run.config, split.validation, run.tokenizer)
    test = episodes(run.config, split.test, run.tokenizer)
    for i, k in enumerate((1, 3), start=1):
        best = report["curves"][name]["rate_factor"][i]
        means, found = {}, {}
        for factor in (best / 10**0.5, best, best * 10**0.5):
            algorithm = Run.open(path).algorithm
            rate = algorithm.inner.lr
            rate.initial *= factor
            with torch.no_grad():
                for p in rate.parameters():
                    p.mul_(factor)
            means[factor] = curve(algorithm, validation, (k,), 2)[1].mean().item()
            algorithm.eval()
            ((_, *batches),) = test.evaluation()
            found[factor] = [algorithm.evaluate(batches[0], on, steps=(k,))[0] for on in reversed(batches)]
        assert min(means, key=means.get) == best
        (lower, low), (losses, support) = found[best / 10**0.5], found[best]
        expected = torch.where(low < support, lower, losses)
        torch.testing.assert_close(torch.tensor(report["curves"][name]["loss"][i]), expected)


def test_the_rates_are_as_before_after_they_were_scaled(trained):
    folder, _ = trained
    for path in (folder, folder / "finetune"):
        run = Run.open(path)
        rate = run.algorithm.inner.lr
        before = [rate.initial, *(p.detach().clone() for p in rate.parameters())]
        with suppress(RuntimeError), rates.scaled(run.algorithm, 3.0):
            assert rate.initial == pytest.approx(3 * before[0])
            assert all(p.allclose(3 * b) for p, b in zip(rate.parameters(), before[1:], strict=True))
            raise RuntimeError
        after = [rate.initial, *rate.parameters()]
        assert after[0] == before[0]
        assert all(a.equal(b) for a, b in zip(after[1:], before[1:], strict=True))


def test_the_rate_search_ends_where_both_neighbors_are_worse(trained, monkeypatch):
    folder, _ = trained
    tried = []

    def at_factor(algorithm, factor, source, steps, limit):
        exponent = round(2 * math.log10(factor))
        tried.append(exponent)
        losses = torch.tensor([0.0, abs(exponent - 4), abs(exponent + 2)])[:, None].expand(3, limit).clone()
        return losses.masked_fill(torch.tensor(exponent > 4), math.nan)

    monkeypatch.setattr(rates, "_at_factor", at_factor)
    factors = rates.best_factors(Run.open(folder / "finetune").algorithm, None, (0, 1, 3), 2)
    assert factors == pytest.approx([1, 100, 0.1])
    assert sorted(tried) == list(range(-3, 6))

    def diverging(algorithm, factor, source, steps, limit):
        exponent = round(2 * math.log10(factor))
        return torch.full((1, 2), math.nan if exponent > -4 else float(-exponent))

    monkeypatch.setattr(rates, "_at_factor", diverging)
    assert rates.best_factors(Run.open(folder / "finetune").algorithm, None, (3,)) == pytest.approx([10**-2])


def test_the_table_and_the_plot_show_every_curve(trained):
    _, report = trained
    console = Console(file=StringIO(), width=120)
    show(report, console)
    text = console.file.getvalue()
    for words in ("maml", "finetune", "fomaml", "finetune / maml", "fomaml / maml", f"{len(report['tasks'])} unseen"):
        assert words in text
    assert f"{report['curves']['maml']['perplexity'][2]:.1f} [" in text
    alone = {**report, "curves": {"maml": {**report["curves"]["maml"], "lowered": [0, 0, 2]}}, "ratios": {}} | {
        "best_plain": None
    }
    show(alone, console)
    shown = " ".join(console.file.getvalue().split())
    assert "episodes whose support did better at a lower rate of maml, so took it: 2 after 3 steps" in shown
    assert len(plot(alone)) != len(plot(report))


def test_contenders_share_weights_and_have_their_own_inner_optimizers(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    names = ("finetune", "finetune:adam", "pretrained", "pretrained:adam")
    report = evaluate(folder, (0, 2), names)
    losses = {name: report["curves"][name]["loss"] for name in names}
    run = Run.open(folder)
    test = episodes(run.config, load_split(run.config).test, run.tokenizer)
    for name in ("finetune", "pretrained"):
        assert losses[name][0] == losses[f"{name}:adam"][0]
        assert losses[name][1] != losses[f"{name}:adam"][1]
    finetuned = Run.open(folder / "finetune")
    assert losses["finetune"][0] == curve(finetuned.algorithm, test, (0,))[1][0].tolist()
    run.restore("pretrained", run.model)
    assert losses["pretrained"][0] == curve(run.algorithm, test, (0,))[1][0].tolist()
    assert isinstance(contender(run, "pretrained:adam").algorithm.inner, mk.optim.Adam)
    assert isinstance(contender(run, "finetune:adam").algorithm.inner, mk.optim.Adam)
    best = report["best_plain"]
    for i in range(2):
        means = {name: torch.tensor(loss[i]).mean().item() for name, loss in losses.items()}
        assert means[best["names"][i]] == min(means.values())
        assert best["ratio"][i] == report["ratios"][best["names"][i]]["ratio"][i]


def test_plain_training_keeps_the_weights_that_adapt_best_at_a_tuned_rate(tmp_path):
    data = write_tasks(tmp_path / "data", tasks=40, dialogues=9)
    config = tiny_config(data, algorithm="finetune", steps=6, eval_every=2, pretrain_steps=0, inner_steps=(1, 2))
    run = train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["validation_after"] for line in lines if "validation_after" in line}
    assert run.state["step"] == min(scores, key=scores.get)
    validation = episodes(config, load_split(config).validation, run.tokenizer)
    _, found = rates.tuned(run.algorithm, validation, (0, 1, 2))
    assert found[1:].mean().item() == pytest.approx(run.state["best"], rel=1e-6)


def test_repeated_episodes_are_averaged_for_each_task(judged, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(judged[0], folder)
    report = evaluate(folder, (0, 1), ("retrieval",), reply_steps=(0,), repeats=3)
    run = Run.open(folder)
    tasks = load_split(run.config).test
    test = episodes(run.config, tasks, run.tokenizer, repeats=3)
    names, losses = curve(run.algorithm, test, (0,))
    assert names == [task.task_id for task in tasks for _ in range(3)]
    assert len({*losses[0].tolist()}) == len(names)
    assert report["tasks"] == [task.task_id for task in tasks]
    assert report["curves"]["maml"]["loss"][0] == losses[0].view(-1, 3).mean(1).tolist()
    asked = draw_questions(test)
    own = scores(test, asked, [list(retrieved(test, asked))])["unseen"]["chrf"]["values"]
    assert report["replies"]["scores"]["retrieval"]["unseen"]["chrf"]["values"] == own
    assert len(own[0]) == len(tasks)
    with pytest.raises(UserError, match="repeats must be at least 1, got 0"):
        evaluate(folder, (0,), repeats=0)


def test_a_folder_with_another_run_is_no_contender(tmp_path):
    config = tiny_config(write_tasks(tmp_path / "data"), steps=2)
    train(config, tmp_path / "run")
    train(replace(config, outer_lr=0.5), tmp_path / "run" / "fomaml")
    with pytest.raises(UserError, match=r"fomaml: is not the contender fomaml of .*, .* differs in .*: move it away"):
        evaluate(tmp_path / "run", (0,), ("fomaml",))


def test_a_run_whose_data_have_other_tasks_is_not_judged_nor_resumed(tmp_path):
    data = write_tasks(tmp_path / "data", tasks=12)
    config = tiny_config(data, steps=2)
    train(config, tmp_path / "run")
    task = load_split(config).test[0].task_id
    file = next(data.glob(f"{task}*"))
    before = file.read_text()
    file.write_text(before.split("\n", 1)[1])  # a conversation less: the tasks are the same
    assert task in evaluate(tmp_path / "run", (0,))["tasks"]
    with pytest.raises(DataError, match=r"has other tasks or dialogues than when .* was saved: put them back"):
        train(replace(config, steps=4), tmp_path / "run", resume=True)
    assert Config.load(tmp_path / "run" / "config.toml").steps == 2
    file.unlink()
    with pytest.raises(DataError, match=r"is not split into the tasks that .* was trained and validated on"):
        evaluate(tmp_path / "run", (0,))
    file.write_text(before)
    evaluate(tmp_path / "run", (0,))
    assert train(replace(config, steps=4), tmp_path / "run", resume=True).config.steps == 4


def test_names_of_contenders_are_checked(trained, tmp_path):
    for name, error in (
        ("finetune:sgdd", "compare finetune:sgdd must name an inner optimizer of sgd, adam"),
        ("maml:adam", "compare maml:adam must be an algorithm without an inner loop in training"),
        ("incontext:adam", "compare incontext:adam must be an algorithm without an inner loop in training"),
    ):
        with pytest.raises(UserError, match=error):
            evaluate(trained[0], (0,), (name,))
    data = write_tasks(tmp_path / "data")
    train(tiny_config(data, steps=1, pretrain_steps=0), tmp_path / "run")
    with pytest.raises(UserError, match="began with random weights, so it has no contender pretrained"):
        evaluate(tmp_path / "run", (0,), ("pretrained",))


def test_a_narrow_terminal_shows_values_without_intervals(trained):
    _, report = trained
    shown = {}
    for width, terminal in ((40, True), (40, False), (200, True)):
        console = Console(file=StringIO(), width=width, force_terminal=terminal, color_system=None)
        show(report, console)
        shown[width, terminal] = console.file.getvalue()
    interval = f"{report['curves']['maml']['perplexity'][2]:.1f} ["
    assert interval not in shown[40, True]
    assert "perplexity (with intervals in a wider terminal)" in shown[40, True]
    for text in (shown[40, False], shown[200, True]):
        assert interval in text
        assert "wider terminal" not in text
    for text in shown.values():
        assert any(line.split()[:1] == ["fomaml"] for line in text.splitlines())


def test_one_test_task_has_an_infinite_interval_that_is_null_in_json(tmp_path):
    data = write_tasks(tmp_path / "data")
    train(tiny_config(data, steps=1, pretrain_steps=0), tmp_path / "run")
    report = evaluate(tmp_path / "run", (0, 2))
    assert len(report["tasks"]) == 1
    assert report["curves"]["maml"]["high"] == [math.inf] * 2
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["curves"]["maml"]["high"] == [None] * 2
    console = Console(file=StringIO(), width=120)
    show(report, console)
    assert ", inf" not in console.file.getvalue()


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(trained, monkeypatch, capsys):
    folder, report = trained

    def read_only(path, data):
        raise CheckpointError(f"{path}: cannot write: Read-only file system")

    monkeypatch.setattr("metakern.io.write", read_only)
    curve = evaluate(folder, (0, 1))["curves"]["maml"]["loss"]
    assert curve == report["curves"]["maml"]["loss"][:2]
    assert capsys.readouterr().err == f"metakern: {folder / 'eval.json'}: cannot write: Read-only file system\n"


def test_other_data_can_be_evaluated_and_wrong_arguments_are_errors(trained, tmp_path):
    folder, _ = trained
    other = write_tasks(tmp_path / "other", tasks=12)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    report = evaluate(copy, (0,), data=str(other))
    assert report["data"] == str(other)
    assert len(report["tasks"]) == 12
    split = load_split(Run.open(copy).config)
    known = {task.task_id for task in (*split.train, *split.validation)}
    assert report["seen"] == sorted(known & set(report["tasks"])) != []
    console = Console(file=StringIO(), width=120)
    show(report, console)
    assert f"not unseen: the run was trained or validated on texts of {len(report['seen'])} tasks" in (
        console.file.getvalue()
    )
    assert f"12 tasks, {12 - len(report['seen'])} of them unseen" in console.file.getvalue()
    for file in other.glob("*.jsonl"):  # the same texts under other names
        file.rename(other / f"other-{file.name}")
    assert evaluate(copy, (0,), data=str(other))["seen"] == [f"other-{name}" for name in report["seen"]]
    table = tmp_path / "table.csv"
    questions = "".join(f"river {i} stone?;cloud {i};shop {i % 3}\n" for i in range(24))
    table.write_text("Frage;Antwort;Laden\n" + questions)
    columns = {"format": "csv", "reader_options": ("question=Frage", "answer=Antwort"), "task_key": "Laden"}
    with pytest.raises(UserError, match="reading says how data is read, and needs data"):
        evaluate(copy, (0,), reading=columns)
    assert evaluate(copy, (0,), data=str(table), reading=columns)["tasks"] == ["shop 0", "shop 1", "shop 2"]
    with pytest.raises(DataError, match="must be in a known format"):
        evaluate(copy, (0,), data=str(table))
    with pytest.raises(UserError, match=r"compare must be among maml, .*, got 'fine'"):
        evaluate(folder, (0,), ("fine",))
    with pytest.raises(UserError, match=r"steps must be whole numbers of at least 0, got \[-1\]"):
        evaluate(folder, (-1,))
    with pytest.raises(UserError, match="is not the folder of a run"):
        evaluate(tmp_path / "other")
    for file in (copy / "checkpoints").glob("best-*.safetensors"):
        file.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="is cut short or damaged"):
        evaluate(copy, (0,))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run whose replies are judged beside those of three baselines: its folder and the report."""
    folder = tmp_path_factory.mktemp("replies")
    data = write_tasks(folder / "data", tasks=40, dialogues=9)
    train(tiny_config(data, steps=4, pretrain_steps=10, eval_tasks=2, max_length=64), folder / "run")
    names = ("retrieval", "finetune", "incontext")
    return folder / "run", evaluate(folder / "run", (0, 1), names, reply_steps=(2, 0, 2))


def test_replies_are_judged_beside_the_curves(judged):
    folder, report = judged
    assert json.loads((folder / "eval.json").read_text()) == report
    assert (folder / "replies.png").read_bytes().startswith(b"\x89PNG")
    assert list(report["curves"]) == ["maml", "finetune", "incontext"]
    assert list(report["ratios"]) == ["finetune", "incontext"]
    replies, tasks = report["replies"], report["tasks"]
    assert replies["steps"] == [0, 2]
    assert list(replies["scores"]) == ["maml", "retrieval", "finetune", "incontext"]
    run = Run.open(folder)
    test = episodes(run.config, load_split(run.config).test, run.tokenizer)
    asked = draw_questions(test)
    assert replies["questions"]["unseen"] == [len(task.unseen) for task in asked]
    for kinds in replies["scores"].values():
        for metrics in (kinds["taught"], kinds["unseen"]):
            for metric in metrics.values():
                assert [len(row) for row in metric["values"]] == [len(tasks)] * 2
    said = []
    for k, factor in zip((0, 2), replies["scores"]["maml"]["rate_factor"], strict=True):
        said.append(list(generated(run.algorithm, test, asked, k, factor)))
    own = {kind: replies["scores"]["maml"][kind] for kind in ("taught", "unseen")}
    assert own == scores(test, asked, said)
    for name, found in (("retrieval", replies["scores"]["retrieval"]), ("incontext", replies["scores"]["incontext"])):
        assert found["unseen"]["chrf"]["values"][0] == found["unseen"]["chrf"]["values"][1], name
    assert replies["scores"]["retrieval"] == scores(test, asked, [list(retrieved(test, asked))] * 2)


def test_samples_are_replies_of_the_run_to_its_first_task(judged):
    folder, report = judged
    run = Run.open(folder)
    test = episodes(run.config, load_split(run.config).test, run.tokenizer)
    asked, samples = draw_questions(test)[0], report["replies"]["samples"]
    assert samples["task"] == report["tasks"][0]
    assert samples["steps"] == [0, 2]
    for key, factor, k in zip(
        ("before", "after"), report["replies"]["scores"]["maml"]["rate_factor"], (0, 2), strict=True
    ):
        said = next(generated(run.algorithm, test, [asked], k, factor))
        assert [sample[key] for sample in samples["taught"]] == said[: len(samples["taught"])]
        assert [sample[key] for sample in samples["unseen"]] == said[len(asked.taught) :][: len(samples["unseen"])]
    assert [sample["bot"] for sample in samples["unseen"]] == [exchange.text for exchange in asked.unseen[:3]]
    console = Console(file=StringIO(), width=200)
    show({**report, "replies": {**report["replies"], "samples": _with_a_right_reply(samples)}}, console)
    text = console.file.getvalue()
    assert text.count("(right)") == 1
    for sample in (*samples["taught"], *samples["unseen"]):
        assert sample["question"] in text


def _with_a_right_reply(samples):
    wrong = {kind: [{**s, "before": "?", "after": "?"} for s in samples[kind]] for kind in ("taught", "unseen")}
    wrong["taught"][0]["after"] = wrong["taught"][0]["bot"]
    return {**samples, **wrong}


def test_replies_of_a_baseline_come_at_its_best_rate_for_each_number_of_steps(judged):
    folder, report = judged
    run = Run.open(folder / "finetune")
    split = load_split(run.config)
    factors = report["replies"]["scores"]["finetune"]["rate_factor"]
    validation, test = (episodes(run.config, part, run.tokenizer) for part in (split.validation, split.test))
    of_curve = report["curves"]["finetune"]["rate_factor"]
    assert factors == [of_curve[0], *rates.best_factors(run.algorithm, validation, (2,), 2)]
    tuned = Run.open(folder / "finetune", inner_lr=run.config.inner_lr * factors[1]).algorithm
    asked = draw_questions(test)
    found = scores(test, asked, [list(generated(tuned, test, asked, 2))])
    judged_then = report["replies"]["scores"]["finetune"]["taught"]["chrf"]["values"][1]
    assert found["taught"]["chrf"]["values"][0] == judged_then


def test_the_table_and_the_plot_of_replies(judged, monkeypatch):
    _, report = judged
    console = Console(file=StringIO(), width=200)
    show(report, console)
    text = console.file.getvalue()
    for words in ("perplexity", "bits per byte", "taught questions answered right", "unseen questions answered right"):
        assert words in text
    taught = text[text.index("taught questions") : text.index("unseen questions answered")]
    for name in report["replies"]["scores"]:
        exact = report["replies"]["scores"][name]["taught"]["exact"]
        assert name in taught
        assert f"{exact['mean'][1]:.0%} [{max(exact['low'][1], 0):.0%}, {min(exact['high'][1], 1):.0%}]" in taught
    drawn = []
    monkeypatch.setattr(reports, "_png", drawn.append)
    plot_replies(report)
    (figure,) = drawn
    assert isinstance(figure, Figure)
    for axes, kind in zip(figure.axes, ("taught", "unseen"), strict=True):
        assert axes.get_ylabel() == f"{kind} questions answered right"
        for line, found in zip(axes.lines, report["replies"]["scores"].values(), strict=True):
            assert line.get_ydata().tolist() == found[kind]["exact"]["mean"]


def test_wrong_arguments_of_replies_are_errors(judged):
    folder, _ = judged
    with pytest.raises(UserError, match=r"reply_steps must be whole numbers of at least 0, got \[3, -1\]"):
        evaluate(folder, (0,), reply_steps=(3, -1))
    with pytest.raises(UserError, match="retrieval has replies but no perplexity: add --replies"):
        evaluate(folder, (0,), ("retrieval",))
    with pytest.raises(UserError, match=r"compare must be among maml, .*, retrieval, got 'nearest'"):
        evaluate(folder, (0,), ("nearest",), reply_steps=(0,))
