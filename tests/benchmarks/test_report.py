"""The report: tables and pictures of stored results, and the targets that they meet."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks import algorithms, few_shot, pictures, report, results, tables, targets
from benchmarks.tables import summary_table, sweep_table, sweeps
from benchmarks.targets import against, growth, is_fastest, is_leanest, judged, mean_over_default, of_peak

WHERE = {"cpu": "none", "cores": 2, "torch": "2", "commit": "abc", "date": "today"}


def row(peer, ms, mib, **more):
    return {"peer": peer, "median_ms": ms, "min_ms": ms, "max_ms": ms, "peak_mib": mib, "first_s": 1.5} | more


def entry(**methods):
    """Return a result whose methods are the keyword arguments: `_` in a name stands for a blank, `__` for ", "."""
    named = {name.replace("_", " ").replace("  ", ", "): found for name, found in methods.items()}
    return {"machine": WHERE, "methods": named, "refused": {"higher": "out of memory"}}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A folder of made-up results that the report reads."""
    for module in (tables, pictures):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    ours = {"metakern_auto": row("metakern", 10, 50, over_auto=1, over_default=0.8, over_first_order=2.5, of_peak=0.8)}
    ours["metakern_default"] = row("metakern", 12.5, 55, over_auto=1.25, over_default=1, of_peak=0.6)
    ours["metakern_recompute"] = row("metakern", 15, 20, over_auto=1.5)
    ours["metakern__first_order"] = row("metakern", 4, 16, over_auto=0.4)
    # By the ratio within a round, JAX's task loop is faster than its vmap, although its median is larger.
    jax = {"JAX__vmap": row("jax", 19, 40, over_auto=2.1, over_default=1.68)}
    jax["JAX__task_loop"] = row("jax", 20, 30, over_auto=2, over_default=1.6)
    plain = row("plain", 80, 10, over_auto=8, over_default=6.4)
    first = {"plain_PyTorch__first_order": row("plain", 2, 5, over_auto=0.2)}
    path = tmp_path / f"{tables.MACHINE}.json"
    results.keep(path, "maml", entry(**ours, **jax, **first, plain_PyTorch=plain), "lstm:small")
    mlp = entry(metakern_auto=row("metakern", 10, 5, over_auto=1), TorchOpt=row("torchopt", 5, 9, over_auto=0.5))
    results.keep(path, "maml", mlp, "mlp:medium")  # as measured before there were the default call and the peak
    one_core = tmp_path / f"{tables.ONE_CORE}.json"
    results.keep(one_core, "maml", entry(**ours, **jax, plain_PyTorch=plain), "gpt:large")
    for tasks in (16, 4):
        results.keep(path, "sweep", entry(**ours), f"lstm:small,tasks={tasks}")
    for K, mib in ((16, 30), (1, 20)):
        recompute = {"metakern_recompute": row("metakern", K, mib)}
        results.keep(path, "sweep", entry(**recompute), f"lstm:small,K={K}")
    return tmp_path


def test_the_summary_compares_with_the_fastest_peer(stored):
    head, _, mlp, lstm, *_ = summary_table().splitlines()  # in the order of the families
    assert head.split(" | ")[1] == "ours, ms: default / captured"
    assert lstm == (
        "| lstm:small | 12.5 / 10.0 | 20.0 (JAX, task loop) | 1.60 x / 2.00 x | 6.40 x / 8.00 x | 55 / 50; 30 "
        "| 60% / 80% | 1.5 / 1.5; 1.5 |"
    )
    assert mlp == (
        "| mlp:medium | - / 10.0 | 5.0 (TorchOpt) | - / 0.50 x | - / 0.50 x | - / 5; 9 | - / - | - / 1.5; 1.5 |"
    )


def test_results_of_one_core_have_a_table_of_their_own(stored):
    assert "| gpt:large |" in summary_table(machine=tables.ONE_CORE)
    assert "| gpt:large |" not in summary_table()
    assert "1 core, torch" in tables.described({"machine": WHERE | {"cores": 1}})


def test_a_workload_is_headed_by_the_rates_of_the_machine():
    found = {"gflop": 1.5, "gflop_per_s": 200.4}
    assert report.rates({}) == ""
    assert report.rates(found) == " Its products: 1.50 GFLOP. Peak: not measured; torch.mm: 200 GFLOP/s."
    found["peak_gflop_per_s"] = {"float32": 500.2, "bfloat16": 1000}
    assert "Peak: 500 GFLOP/s in float32, 1000 GFLOP/s in bfloat16; torch.mm" in report.rates(found)


def test_values_that_were_not_measured_are_dashes(stored):
    found = tables.measured()["mlp:medium"]
    auto = next(line for line in tables.methods_table(found).splitlines() if line.startswith("| metakern auto"))
    assert auto == "| metakern auto | 10.0 (10.0-10.0) | - | - | - | 1.00 x | 5 | - | 1.5 |"


def test_the_share_of_the_peak_is_the_least_over_three_families(stored):
    path = stored / f"{tables.MACHINE}.json"
    for name, share in (("gpt:large", 0.75), ("lstm:large", 0.9), ("mlp:large", 0.1)):
        results.keep(path, "maml", entry(metakern_default=row("metakern", 10, 5, of_peak=share)), name)
    assert of_peak("large") == (0.75, "75% at gpt:large")
    assert of_peak("medium") is None


def test_targets_are_judged_by_the_results(stored):
    assert against("lstm:small", targets.is_jax) == (2, "2.00 x (JAX, task loop)")
    assert against("lstm:small", targets.is_torch) == (8, "8.00 x (plain PyTorch)")
    assert against("mlp:medium", targets.is_jax) is None
    assert against("gpt:medium", targets.is_jax) is None
    assert mean_over_default(targets.is_torch) == (pytest.approx(6.4), "6.40 x over 1 of 2 workloads")
    assert targets.over_default(targets.is_jax) == {"lstm:small": 1.6}
    assert growth("lstm:small") == 1.5
    assert growth("mlp:medium") is None
    assert targets.worst_growth() == (1.5, "1.50 at lstm:small")
    assert [targets.is_large(name) for name in ("gpt:large", "gpt,length=1024", "gpt")] == [True, True, False]
    assert [targets.is_usual(name) for name in ("gpt:large", "gpt,tasks=64", "gpt:small")] == [False, False, True]
    mlp, lstm = tables.measured().values()
    assert (is_fastest(mlp), is_fastest(lstm)) == (False, True)
    assert (is_leanest(mlp), is_leanest(lstm)) == (False, False)  # TorchOpt is faster, plain PyTorch leaner
    lstm["methods"]["metakern recompute"]["peak_mib"] = 10
    assert is_leanest(lstm)
    lines = judged(
        ("a", ">=", 2, (2, "2 x")), ("b", "<=", 1.5, (2, "2")), ("c", "all", 1, (0.5, "1 of 2")), ("d", ">=", 1, None)
    )
    assert lines.splitlines()[2:] == [
        *("| a | >= 2 | 2 x | yes |", "| b | <= 1.5 | 2 | no |"),
        *("| c | all | 1 of 2 | no |", "| d | >= 1 | not measured |  |"),
    ]
    found = targets.targets_table()
    assert "| workloads where ours is the fastest exact method | all | 1 of 2; not mlp:medium | no |" in found
    assert (
        "| time of exact second order over our own first order, worst workload | <= 2.8 | 2.50 x at lstm:small | yes |"
        in found
    )
    assert "| geometric mean: the fastest peer over our default | >= 2 | 1.60 x over 1 of 2 workloads | no |" in found
    assert "| the fastest peer over our default, worst workload | >= 1.5 | 1.60 x at lstm:small | yes |" in found
    assert "| first call (captured) in s, worst large or long workload | <= 4 | not measured |  |" in found
    assert (
        "memory of recompute over our own first order, worst workload | <= 1.5 | 1.25 x at lstm:small | yes |" in found
    )


def test_points_of_a_sweep_are_sorted_by_size(stored):
    found = sweeps()
    assert {where: list(points) for where, points in found.items()} == {
        ("lstm:small", "K"): [1, 16],
        ("lstm:small", "tasks"): [4, 16],
    }
    assert list(found) == [("lstm:small", "K"), ("lstm:small", "tasks")]
    head, _, recompute, higher, *_, where = sweep_table("K", found["lstm:small", "K"]).splitlines()
    assert head == "| ms, MiB at K = | 1 | 16 |"
    assert recompute == "| metakern recompute | 1.0, 20 | 16.0, 30 |"
    assert higher == "| higher | out of memory | out of memory |"
    assert "commit abc" in where


@pytest.mark.slow
def test_pictures_are_drawn_for_light_and_dark_pages_and_are_reproducible(stored):
    pictures.draw()
    names = {
        f"{name}-{theme}.{kind}"
        for name in ("maml", "dialogue", "sweep-lstm-small")
        for theme in pictures.THEMES
        for kind in ("png", "svg")
    }
    assert {path.name for path in stored.iterdir()} == names | {f"{tables.MACHINE}.json", f"{tables.ONE_CORE}.json"}
    before = (stored / "maml-dark.svg").read_text()
    pictures.save("maml", pictures.bars)
    assert (stored / "maml-dark.svg").read_text() == before
    assert before != (stored / "maml-light.svg").read_text()
    assert 'srcset="benchmarks/results/maml-dark.svg"' in report.PAGES["README.md"]["picture"]()


def test_a_page_without_a_place_for_its_table_is_an_error(stored):
    with pytest.raises(ValueError, match=r"README.md: must have one place for the table picture, got 0"):
        report.with_tables("README.md", "")


def test_algorithms_are_measured_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(algorithms, "ROUNDS", 2)
    monkeypatch.setattr(algorithms, "CALLS", 1)
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert tables.algorithms_tables() == []
    for which, name in (("sines", "CAVIA"), ("intents", "prototypical network")):
        made = algorithms.workload(which)
        of = replace(made, test_tasks=2, rates=made.rates[:1])
        assert algorithms.chosen(of, f"zzz, {name.upper()}")[0] == name
        row = algorithms.measured(of, name, steps=2, seeds=2)
        assert [len(curve) for curve in row["losses"]] == [5, 5]
        entry = {"machine": WHERE, "looks": list(algorithms.LOOKS), "steps": 2, "seeds": 2, "about": of.about} | row
        results.keep(tmp_path / "algorithms.json", which, entry, name)
    sines, intents = tables.algorithms_tables()
    assert "| CAVIA |" in sines
    assert "five in a task, made of verbs and things, by the mean" in intents
    for option, message in (
        (["--algorithms", "zzz"], "--algorithms must be words in MAML; "),
        (["--workloads", "sine"], "--workloads must be among sines, intents, dialogue, got 'sine'"),
    ):
        with pytest.raises(SystemExit):
            algorithms.main(["--workloads", "sines", *option])
        assert message in capsys.readouterr().err


def test_the_best_checkpoint_is_taken(monkeypatch):
    found, saved = iter([3.0, 1.0, 2.0, math.inf, 4.0]), []

    def losses(of, algorithm, part, seed):
        assert part == "validation"
        saved.append(algorithm.model[0].out.weight.detach().clone())
        return [0.0, 0.0, 0.0, next(found), 0.0]

    monkeypatch.setattr(algorithms, "losses", losses)
    algorithm, loss, _ = algorithms.trained(algorithms.workload("intents"), "MAML", 0.1, 0.1, seed=0, steps=10)
    assert loss == 1.0
    assert torch.equal(algorithm.model[0].out.weight, saved[1])
    assert not torch.equal(saved[1], saved[2])


@pytest.mark.parametrize(("best", "tried"), [(0.9, {0.3, 1.0, 3.0}), (50.0, {0.3, 1.0, 3.0, 9.0, 27.0, 81.0, 243.0})])
def test_the_best_rate_is_looked_for_beyond_the_first_ones(monkeypatch, best, tried):
    made, seen = algorithms.workload("intents"), set()

    def trained(of, name, lr, outer_lr, seed, steps):
        seen.add(lr)
        return None, abs(math.log(lr / best)) + outer_lr, None

    monkeypatch.setattr(algorithms, "trained", trained)
    lr, outer_lr = algorithms.tuned(made, "MAML", 10)
    assert seen == tried
    assert lr == min(tried, key=lambda rate: abs(math.log(rate / best)))
    assert outer_lr == made.outer_lr / 3


def test_every_workload_draws_the_same_tasks_for_the_same_seed():
    for which in few_shot.WORKLOADS:
        of = algorithms.workload(which)
        one, same, other = (next(of.draw("train", 3, seed)) for seed in (1, 1, 2))
        held = [next(of.draw(part, 3, 1)) for part in ("validation", "test")]
        texts = [torch.cat([x.flatten().double() for x in tree_leaves(e)]) for e in (one, same, other, *held)]
        assert torch.equal(texts[0], texts[1])
        assert not any(len(texts[0]) == len(t) and torch.equal(texts[0], t) for t in texts[2:])
        assert algorithms.LOOKS.index(of.inner_steps)


def test_intents_are_read_from_a_file(tmp_path):
    lines = [f"say {word} {k},{word}" for word in ("yes", "no", "maybe", "never", "again", "now") for k in range(6)]
    (tmp_path / "some.csv").write_text("\n".join(["text,intent", *lines, "rare,rare"]))
    found = few_shot.utterances(str(tmp_path / "some.csv"))
    assert found["some/no"] == [f"say no {k}" for k in range(6)]
    assert "read from some.csv" in few_shot.intents(str(tmp_path / "some.csv")).about
