"""Installation: a light import, builds without PyTorch, and errors that say what is missing."""

from __future__ import annotations

import runpy
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from installing import ROOT, build, run

import metakern as mk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TOML["project"]


def contents(source: Path) -> list[str]:
    (wheel,) = (source / "dist").iterdir()
    return zipfile.ZipFile(wheel).namelist()


def test_the_installed_version_is_that_of_the_module() -> None:
    assert version("metakern") == mk.__version__


def test_every_file_of_the_package_is_installed() -> None:
    folders = [path.parent for path in (ROOT / "metakern").rglob("__init__.py")]
    data = TOML["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, patterns in data.items()
        for folder in (folders if package == "*" else [ROOT.joinpath(*package.split("."))])
        for pattern in patterns
        for path in folder.glob(pattern)
    }
    files = {path for path in (ROOT / "metakern").rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc", ".so")} == installed


def test_import_needs_only_torch_and_numpy() -> None:
    """No CUDA context, no Triton, no extra, no compiler, no C++ kernels."""
    extras = {requirement.split(">")[0].split("[")[0] for requirement in PROJECT["optional-dependencies"]["dialogue"]}
    modules = {"pyyaml": "yaml", "chitchat-dataset": "chitchat_dataset", "chatterbot-corpus": "chatterbot_corpus"}
    hidden = sorted(
        {modules.get(name, name) for name in extras}
        | {"transformers", "triton", "pybind11", "metakern._C", "metakern._cuda"}
    )
    script = f"""
import sys
sys.modules.update(dict.fromkeys({hidden}))
import torch
import metakern as mk
assert not torch.cuda.is_initialized()
assert "metakern._C" in mk.backends()["cpu"], mk.backends()
torch.testing.assert_close(mk.ops.silu(torch.ones(2)), torch.nn.functional.silu(torch.ones(2)))
try:
    with mk.backend("cpu"):
        mk.ops.silu(torch.ones(2))
except RuntimeError as error:
    assert "METAKERN_NATIVE=cpu" in str(error), error
else:
    raise AssertionError("a missing backend was used")
"""
    result = run(sys.executable, "-c", script, PYTHONPATH=str(ROOT), PATH="/nonexistent")
    assert result.returncode == 0, result.stderr


NOTHING = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": "/nonexistent", "CUDA_HOME": "/nonexistent"}


@pytest.mark.parametrize(("native", "message"), [("cuda", "nvcc was not found; install"), ("gpu", "got 'gpu'")])
def test_a_build_that_is_not_possible_is_an_error(source: Path, native: str, message: str) -> None:
    result = build(source, native, **NOTHING)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_metakern_native_none_builds_a_pure_wheel(source: Path) -> None:
    assert build(source, "none").returncode == 0
    assert [path.name for path in (source / "dist").iterdir()] == [f"metakern-{mk.__version__}-py3-none-any.whl"]


@pytest.mark.slow
def test_without_a_compiler_auto_builds_a_pure_wheel_and_cpu_fails(source: Path) -> None:
    result = build(source, "auto", **NOTHING)
    assert result.returncode == 0, result.stderr
    assert "the C++ kernels were not built" in result.stderr
    assert not [name for name in contents(source) if "_C." in name and name.endswith(".so")]
    result = build(source, "cpu", **NOTHING)
    assert result.returncode != 0
    assert "set METAKERN_NATIVE=none to do without them" in result.stderr


@pytest.mark.parametrize("builds", [True, False])
@pytest.mark.parametrize(("compiler", "native"), [("/usr/bin/c++", ""), (None, ""), ("/usr/bin/c++", "none")])
def test_an_environment_of_a_clone_lacks_its_kernels_only_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: bool, compiler: str | None, native: str
) -> None:
    script = runpy.run_path(str(ROOT / "requirements" / "install.py"))
    main, names = script["main"], script["main"].__globals__
    (tmp_path / "metakern").mkdir()
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "demo.txt").touch()
    kernels = tmp_path / "metakern" / "_C.cpython-311.so"
    kernels.touch()  # of an earlier commit

    def step(title: str, *_: object) -> None:
        if title.startswith("metakern"):
            assert not kernels.exists()
            kernels.touch() if builds else None

    monkeypatch.setitem(names, "ROOT", tmp_path)
    monkeypatch.setitem(names, "run", step)
    monkeypatch.setitem(names, "kernels", lambda python: kernels)
    monkeypatch.setattr(names["venv"], "create", lambda *_, **__: None)
    monkeypatch.setattr(names["shutil"], "which", lambda name: compiler)
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path / "env"), "demo", "torch"])
    monkeypatch.delenv("METAKERN_NATIVE", raising=False)
    if native:
        monkeypatch.setenv("METAKERN_NATIVE", native)
    if builds or not compiler or native:
        main()
    else:
        with pytest.raises(SystemExit, match=r"the C.. kernels were not built: METAKERN_NATIVE=cpu .* says why"):
            main()
