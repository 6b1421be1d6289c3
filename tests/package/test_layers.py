"""Dependencies between the folders of the package: imports point downwards, and private names stay in their folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import metakern

PACKAGE = Path(metakern.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# From the lowest to the highest; folders of one line must not import each other.
LAYERS = [
    ("errors", "interrupts", "tested"),
    ("io",),
    ("native",),
    ("ops",),
    ("nn", "optim"),
    ("adapters", "patching"),
    ("losses",),
    ("meta",),
    ("diagnosis", "compat"),
    ("dialogue",),
    ("serve",),
    ("cli",),
    ("__init__", "__main__"),
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
# Imported upwards at a call: where derivatives are lost, the engine asks the doctor for the module.
ASKED_FOR = {("meta/plan.py", "diagnosis")}


def room(path: Path) -> str:
    """Return the folder or the module right below metakern that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each module of metakern that a file imports, and the names that it imports from it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "metakern":
            yield node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == "metakern")


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def rooms(module: str, names: list[str]) -> set[str]:
    """Return the folders that an import of these names from a module reaches."""
    parts = module.split(".")
    return {parts[1]} if len(parts) > 1 else set(names) & HEIGHT.keys()


def test_every_folder_has_a_layer() -> None:
    assert {room(path) for path in FILES} == HEIGHT.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    own, file = room(path), path.relative_to(PACKAGE).as_posix()
    for module, names in imports(path):
        for other in rooms(module, names):
            below = other == own or HEIGHT[other] < HEIGHT[own]
            assert below or (file, other) in ASKED_FOR, f"{file} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_stay_in_their_folder(path: Path) -> None:
    modules: dict[str, str] = {}
    for module, names in imports(path):
        if rooms(module, names) != {room(path)}:
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            assert not private, f"{module} keeps {private} to itself"
            modules |= dict.fromkeys(names, module)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in modules and is_module(f"{modules[name]}.{name}"):
                assert not node.attr.startswith("_"), f"{name} keeps {node.attr} to itself"
