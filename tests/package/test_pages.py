"""The pages: files and functions of the architecture exist, the reference has every public name, versions are right."""

import re
from collections.abc import Iterator
from types import ModuleType

import pytest
from installing import ROOT

import metakern as mk
from metakern.tested import TESTED

HOP = re.compile(r"^\| `([\w/.]+)` \| `([\w.]+)` \|", re.MULTILINE)
PUBLIC = {"metakern": mk, "metakern.ops": mk.ops, "metakern.nn": mk.nn, "metakern.optim": mk.optim}


def hops() -> list[tuple[str, str]]:
    """Return the file and the name in each row of the tables of the architecture."""
    found = HOP.findall((ROOT / "docs" / "architecture.md").read_text("utf-8"))
    assert len(found) > 20, "the rows of docs/architecture.md must begin with | `file` | `name` |"
    return found


@pytest.mark.parametrize(("file", "name"), hops())
def test_names_in_the_architecture_are_in_their_files(file: str, name: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    for part in name.split("."):
        assert re.search(rf"\b(?:class|def|void|\w+>) {part}\b", text), f"{file} has no {name}"


def documented() -> Iterator[str]:
    """Yield the names that the reference documents."""
    for page in (ROOT / "docs" / "reference").glob("*.rst"):
        yield from re.findall(r"^\.\. auto\w+:: (\S+)$", page.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("path", "module"), PUBLIC.items())
def test_every_public_name_is_in_the_reference(path: str, module: ModuleType) -> None:
    names = {f"{path}.{name}" for name in module.__all__ if not isinstance(getattr(module, name), ModuleType | dict)}
    assert names <= set(documented())


@pytest.mark.parametrize("package", TESTED)
def test_tested_versions_are_those_of_the_compatibility_page(package: str) -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8").lower()
    lowest, _, newest = re.findall(rf"^\| {package} \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)[0]
    assert lowest.startswith(TESTED[package][0])
    assert newest.startswith(TESTED[package][1])
