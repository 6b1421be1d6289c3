"""The choice between our batched product and torch.bmm: measured once, kept in a file, or made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metakern import cli, native
from metakern.native import choice
from metakern.ops.core import cpp, matrices

pytestmark = pytest.mark.skipif(native.C is None, reason="metakern was built without C++ kernels")


class Measurement:
    """Stands for the measurement: returns the given ratios, one in each call, and counts the calls."""

    def __init__(self, *ratios: float) -> None:
        self.ratios, self.calls = iter(ratios), 0

    def __call__(self, ours: choice.Product) -> float:
        self.calls += 1
        return next(self.ratios)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of kept decisions, empty; nothing is decided."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("METAKERN_PRODUCTS", raising=False)
    native._products.cache_clear()
    yield tmp_path / "metakern" / "products"
    native._products.cache_clear()


def choose(isa: str = "avx512") -> choice.Choice:
    return choice.choose(torch.bmm, isa)


def test_ours_is_used_where_it_is_faster_by_a_margin(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measured", Measurement(1.5, 1.1, 0.4))
    assert [choose(isa).is_native for isa in ("a", "b", "c")] == [True, False, False]
    assert len(list(cache.iterdir())) == 3


def test_a_decision_is_kept_for_its_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measurement(1.5, 0.5, 0.6, 0.7)
    monkeypatch.setattr(choice, "measured", measured)
    first = choose()
    assert first == choose()
    assert (measured.calls, str(cache) in first.why) == (1, True)
    assert not choose(isa="avx2").is_native
    assert choose() == first
    monkeypatch.setattr(torch, "__version__", "99")
    assert not choose().is_native
    monkeypatch.setattr(choice, "processor", lambda: "another")
    assert not choose().is_native
    assert measured.calls == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ratio": 9.0}', "\0", "null"])
def test_a_damaged_file_is_measured_again(text: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measured", Measurement(1.5, 0.5))
    choose()
    (file,) = cache.iterdir()
    file.write_text(text)
    assert not choose().is_native
    assert json.loads(file.read_text())["ratio"] == 0.5


def test_a_folder_that_cannot_be_written_costs_only_the_measurement(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    cache.touch()  # a file where the folder should be
    measured = Measurement(1.5, 1.6)
    monkeypatch.setattr(choice, "measured", measured)
    assert [choose().is_native, choose().is_native, measured.calls] == [True, True, 2]
    assert "kept" not in choose_without_home(monkeypatch).why


def choose_without_home(monkeypatch: pytest.MonkeyPatch) -> choice.Choice:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(choice, "measured", Measurement(1.5))
    return choose()


def test_processes_that_measure_at_once_decide_alike(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(ours: choice.Product) -> float:
        monkeypatch.setattr(choice, "measured", Measurement(2.0))
        choose()  # another process is done first
        return 0.5

    monkeypatch.setattr(choice, "measured", measured)
    assert choose().is_native
    assert choose().is_native


def test_the_environment_decides_without_a_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measured", Measurement())
    for asked in ("native", "torch"):
        monkeypatch.setenv("METAKERN_PRODUCTS", asked)
        native._products.cache_clear()
        assert native.products() == choice.Choice(asked == "native", f"METAKERN_PRODUCTS={asked}")
    monkeypatch.setenv("METAKERN_PRODUCTS", "mkl")
    native._products.cache_clear()
    with pytest.raises(ValueError, match="METAKERN_PRODUCTS must be native or torch, got 'mkl'"):
        cpp.product(torch.ones(1, 8, 8), torch.ones(1, 8, 8))
    assert not cache.exists()


@pytest.mark.parametrize("asked", ["native", "torch"])
def test_products_are_computed_as_decided(asked: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def note(name: str, product: choice.Product) -> choice.Product:
        return lambda *args: (taken.append(name), product(*args))[1]

    monkeypatch.setenv("METAKERN_PRODUCTS", asked)
    monkeypatch.setattr(native, "product", note("native", native.product))
    monkeypatch.setattr(matrices, "product", note("torch", matrices.product))
    cpp.product(torch.ones(2, 8, 8), torch.ones(2, 8, 8))
    assert taken == [asked]


def test_the_measurement_compares_the_two_products() -> None:
    def slow(a: Tensor, b: Tensor) -> Tensor:
        torch.bmm(a, b)
        return torch.bmm(a, b)

    def fast(a: Tensor, b: Tensor) -> Tensor:
        return a

    assert choice.measured(slow) < 1 / choice.MARGIN
    assert choice.measured(fast) > choice.MARGIN


def test_no_mode_of_pytorch_sees_the_measurement(cache: Path) -> None:
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{function} was seen")

    dtype, asked = torch.get_default_dtype(), []
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), Refusing():
            asked.append(native.products())
    finally:
        torch.set_default_dtype(dtype)
    native._products.cache_clear()
    torch.func.vmap(lambda x: (asked.append(native.products()), x)[1])(torch.ones(2))
    assert asked[0] == asked[1]
    assert len(list(cache.iterdir())) == 1


def test_the_number_of_threads_is_restored(cache: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        native.has_fast_products()
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_of_one_process_may_ask_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: choice.choose(native.product, native.C.isa()).is_native, range(4))]
    assert len(set(found)) == 1


def test_doctor_shows_the_decision(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(choice, "measured", Measurement(2.0))
    assert cli.main(["doctor"]) == 0
    assert "matrix products: our kernel (torch.bmm takes 2.00 x the time of ours, kept in " in capsys.readouterr().out
