"""The report: tables and pictures of stored results, and the targets that they meet."""

import pytest

from benchmarks import pictures, report, results, tables, targets
from benchmarks.tables import summary_table, sweep_table, sweeps
from benchmarks.targets import against, growth, is_fastest, is_leanest, judged, mean_against

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
    ours = {"metakern_auto": row("metakern", 10, 50, over_auto=1, over_first_order=2.5, of_limit=0.8)}
    ours["metakern_recompute"] = row("metakern", 15, 20, over_auto=1.5)
    ours["metakern__first_order"] = row("metakern", 4, 16, over_auto=0.4)
    # By the ratio within a round, JAX's task loop is faster than its vmap, although its median is larger.
    jax = {"JAX__vmap": row("jax", 19, 40, over_auto=2.1), "JAX__task_loop": row("jax", 20, 30, over_auto=2)}
    plain = row("plain", 80, 10, over_auto=8)
    first = {"plain_PyTorch__first_order": row("plain", 2, 5, over_auto=0.2)}
    path = tmp_path / f"{tables.MACHINE}.json"
    results.keep(path, "maml", entry(**ours, **jax, **first, plain_PyTorch=plain), "lstm:small")
    mlp = entry(metakern_auto=row("metakern", 10, 5, over_auto=1), TorchOpt=row("torchopt", 5, 9, over_auto=0.5))
    results.keep(path, "maml", mlp, "mlp:medium")
    for tasks in (16, 4):
        results.keep(path, "sweep", entry(**ours), f"lstm:small,tasks={tasks}")
    for K, mib in ((16, 30), (1, 20)):
        recompute = {"metakern_recompute": row("metakern", K, mib)}
        results.keep(path, "sweep", entry(**recompute), f"lstm:small,K={K}")
    return tmp_path


def test_the_summary_compares_with_the_fastest_peer(stored):
    _, _, mlp, lstm, *_ = summary_table().splitlines()  # in the order of the families
    assert lstm == "| lstm:small | 10.0 | 20.0 (JAX, task loop) | 2.00 x | 8.00 x | 50 / 30 | 80% | 1.5 / 1.5 |"
    assert mlp == "| mlp:medium | 10.0 | 5.0 (TorchOpt) | 0.50 x | 0.50 x | 5 / 9 |  | 1.5 / 1.5 |"


def test_targets_are_judged_by_the_results(stored):
    assert against("lstm:small", targets.is_jax) == (2, "2.00 x (JAX, task loop)")
    assert against("lstm:small", targets.is_torch) == (8, "8.00 x (plain PyTorch)")
    assert against("mlp:medium", targets.is_jax) is None
    assert against("gpt:medium", targets.is_jax) is None
    assert mean_against(targets.is_torch)[0] == pytest.approx(2)
    assert growth("lstm:small") == (1.5, "1.50")
    assert growth("mlp:medium") is None
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
        "| time of exact second order over our own first order, worst workload | <= 3.3 | 2.50 x at lstm:small | yes |"
        in found
    )
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
        for name in ("maml", "sweep-lstm-small")
        for theme in pictures.THEMES
        for kind in ("png", "svg")
    }
    assert {path.name for path in stored.iterdir()} == names | {f"{tables.MACHINE}.json"}
    before = (stored / "maml-dark.svg").read_text()
    pictures.save("maml", pictures.bars)
    assert (stored / "maml-dark.svg").read_text() == before
    assert before != (stored / "maml-light.svg").read_text()
    assert 'srcset="benchmarks/results/maml-dark.svg"' in report.PAGES["README.md"]["picture"]()


def test_a_page_without_a_place_for_its_table_is_an_error(stored):
    with pytest.raises(ValueError, match=r"README.md: must have one place for the table picture, got 0"):
        report.with_tables("README.md", "")
