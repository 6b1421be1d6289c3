"""Build another commit of metakern in a folder of its own, and run it in a process of its own beside the present tree.

    python -m benchmarks.ops --against REV        python -m benchmarks.maml --against REV

`checkout(rev)` returns a folder with metakern as of that commit and its built C++ kernels, but without `benchmarks`. A
process that starts there, with HOME on its PYTHONPATH, runs the present benchmarks on that metakern.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import IO, Any

HOME = Path(__file__).parent.parent  # the folder that `benchmarks` is imported from
SOURCES = ("metakern", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")  # what a build needs


def commit(rev: str) -> str:
    """Return the full hash of a commit; raise ValueError if there is no such commit, or no git or clone."""
    if not (HOME / ".git").exists() or not shutil.which("git"):
        raise ValueError("--against needs git and a clone of metakern")
    name = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}"]
    found = subprocess.run(name, cwd=HOME, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"--against must be a commit, a tag or a branch of this clone, got {rev!r}")
    return found.stdout.strip()


def checkout(rev: str) -> Path:
    """Return the folder of a commit, under ~/.cache/metakern/against; it is built at the first use.

    Raises ValueError if `rev` names no commit, RuntimeError if the commit can't be built.
    """
    name = commit(rev)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metakern" / "against"
    if (cache / name).exists():
        return cache / name
    cache.mkdir(parents=True, exist_ok=True)
    print(f"metakern {name[:7]}: building its kernels", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        folder = Path(made) / name
        folder.mkdir()
        archive = subprocess.run(["git", "archive", name, *SOURCES], cwd=HOME, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        env = os.environ | {"METAKERN_NATIVE": "cpu"}
        done = subprocess.run(build, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"metakern {name[:7]} was not built: {last_line(done.stderr)}")
        shutil.rmtree(folder / "build", ignore_errors=True)
        folder.rename(cache / name)
    return cache / name


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def environment() -> dict[str, str]:
    """Return the environment variables of a process that starts in a checkout and imports the present benchmarks."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])}


class Process:
    """A process that imports metakern from `folder` and holds the object `module:name(*arguments)`.

    `process(method, *arguments)` calls a method of that object. Arguments and results are JSON. An exception in the
    process becomes a RuntimeError with its message.
    """

    def __init__(self, folder: Path, made: str, *arguments: Any) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.against", made, json.dumps(arguments)],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def __call__(self, method: str, *arguments: Any) -> Any:
        try:
            print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(last_line(self._errors.read()))
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(made: str, arguments: str) -> None:
    """Run the loop of a `Process`: read a call from stdin, write its result to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr  # so that what libraries print stays out of the answers
    module, _, name = made.partition(":")
    target = getattr(import_module(module), name)(*json.loads(arguments))
    for line in sys.stdin:
        method, *given = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"result": getattr(target, method)(*given)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
